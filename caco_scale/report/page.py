"""The report's page: one HTML file that needs nothing but itself; what of the runs it shows, and in which words."""

from collections.abc import Sequence

import numpy as np

from caco_scale import config as configuration
from caco_scale.report.curves import HEALTH, TRAINING, axis_of, draw_panels, further_panels, write_number
from caco_scale.report.pictures import Pictures
from caco_scale.report.runs import Run, count, incidents, is_number
from caco_scale.report.templates import render, words
from caco_scale.run.scores import evaluation_scores

KINDS = {  # of incidents, in words
    "resume": "resumed",
    "skip": "skipped step",
    "corrupt": "corrupt image",
    "store": "store",
    "collapse": "collapse alarm",
    "low": "near collapse",
    "stop": "stopped",
}


def build_page(runs: Sequence[Run], pictures: Sequence[Pictures]) -> bytes:
    """The HTML file about some runs. ``pictures``: of each run, by :func:`~.pictures.draw_pictures`."""
    found = [incidents(run) for run in runs]
    resumes = [[i.step for i in listed if i.kind == "resume"] for listed in found]
    axis = axis_of(runs)
    draw = lambda panels: draw_panels(panels, runs, resumes, axis)
    sections = [
        ("Training", "training", draw(TRAINING)),
        ("The bank and the embeddings", "bank", draw(HEALTH)),
        ("Further figures", "further", draw(further_panels(runs))),
    ]
    fields = _configuration(runs)
    return render(
        "report/page.html",
        title=" and ".join(run.name for run in runs),
        runs=[_heading(run) for run in runs],
        facts=_facts(runs, found),
        sections=[(title, anchor, charts) for title, anchor, charts in sections if charts],
        axis=axis.unit,
        averaged=max(chart["averaged"] for _, _, charts in sections for chart in charts),
        has_warmup=any(run.warmup_end() is not None for run in runs),
        has_resumes=any(resumes),
        evaluations=_evaluations(runs),
        columns=2 if len(runs) in (2, 4) else 3,
        pictures=pictures,
        incidents=[[(i.step, i.kind, KINDS[i.kind], i.text) for i in listed] for listed in found],
        configuration=fields,
        differences=_differences(fields) if len(runs) > 1 else [],
        environment=_environment(runs),
    )


def _heading(run):
    word, sentence = run.status()
    model, data = run.config.model, run.config.data
    stem = f", {model.stem} stem" if model.arch != "tiny" else ""
    return {
        "name": run.name,
        "path": str(run.path),
        "status": word,
        "sentence": sentence,
        "summary": f"{run.config.recipe} · {run.config.bank.rule} · {model.arch}{stem} · "
        f"batch {data.global_batch_size:,} · bank of {run.config.bank.size:,} rows",
    }


def _facts(runs, found):
    """The figures at a glance -> list of (name, [value of each run], [note of each run])."""
    per_run = [_facts_of(run, listed) for run, listed in zip(runs, found, strict=True)]
    names = dict.fromkeys(name for facts in per_run for name in facts)
    empty = ("—", "")
    return [
        (name, [f.get(name, empty)[0] for f in per_run], [f.get(name, empty)[1] for f in per_run])
        for name in names
    ]


def _facts_of(run, listed):
    """name -> (value, note) of one run."""
    last = {name: run.series(name).last() for name in run.figures()}
    facts = {}
    if "knn_top1" in last:
        evaluation, knn = run.config.eval, run.series("knn_top1")
        step = knn.last_step()
        facts["kNN top-1"] = (
            write_number(last["knn_top1"], 4, "%"),
            f"{f'step {step:,}' if step else 'before training'}, k {evaluation.knn_k}, "
            f"T {evaluation.knn_temperature:g}",
        )
        if knn.step[0] == 0 and np.isfinite(knn.value[0]):
            facts["before training"] = (write_number(knn.value[0], 4, "%"), _pixels(last))
    schedule = f"main schedule {words(run.config.optim.epochs)}"
    if run.steps_per_epoch:
        epochs = write_number(run.last_step / run.steps_per_epoch, 4)
        facts["epochs"] = (epochs, f"{run.last_step:,} steps; {schedule}")
    else:
        facts["steps"] = (f"{run.last_step:,}", f"{schedule} epochs")
    facts["loss"] = (write_number(last["loss"], 4), _phase(run))
    speeds = run.series("images_per_second").value
    if np.isfinite(speeds).any():
        world = run.environment.get("world_size")
        facts["images / s"] = (
            write_number(float(np.nanmedian(speeds)), 4),
            "median" + (f", {count(world, 'process', 'es')}" if is_number(world) else ""),
        )
    waits = run.series("data_wait").value
    if np.isfinite(waits).any():
        facts["data wait"] = (
            write_number(100 * float(np.nanmedian(waits)), 2, "%"),
            "median share of a step",
        )
    if last.get("bank_rows_used"):
        used = last["bank_rows_used"]
        facts["bank rows used"] = (
            write_number(100 * used, 3, "%"),
            f"{round(used * run.config.bank.size):,} of {run.config.bank.size:,}",
        )
    if last.get("rankme") is not None:
        facts["RankMe"] = (write_number(last["rankme"], 3), "effective rank of features")
    if run.checkpoint is not None:
        facts["newest checkpoint"] = (f"{int(run.checkpoint.name.removeprefix('step_')):,}", "step")
    skipped = int(last.get("skipped") or 0)
    facts["incidents"] = (
        f"{len(listed):,}",
        f"{count(skipped, 'skipped step')}, {count(len(run.corrupt), 'corrupt image')}",
    )
    return facts


def _pixels(last):
    raw = last.get("knn_top1_raw_pixels")
    return "" if raw is None else f"raw pixels {write_number(raw, 4, '%')}"


def _phase(run):
    phase = next((r["phase"] for r in reversed(run.metrics) if r.get("phase")), "")
    return f"phase {phase}" if phase else ""


def _evaluations(runs):
    """What was evaluated, together what one command measured -> list of dicts for the page."""
    groups = {}
    for number, run in enumerate(runs):
        for score in evaluation_scores(run.path):
            groups.setdefault((number, score.step, score.encoder, score.protocol, score.data), []).append(
                score
            )
    return [
        {
            "run": number,
            "words": f"{protocol} of the {encoder} encoder, step {step:,}, on {data}",
            "least": min(score.top1 for score in scores),
            "greatest": max(score.top1 for score in scores),
            "scores": scores,
        }
        for (number, step, encoder, protocol, data), scores in groups.items()
    ]


def _configuration(runs):
    """Sections -> list of (section, [(field, [value of each run], notable)]): notable is what a reader looks for.

    Of one run that is what differs from the defaults, of several what differs between them.
    """
    flat = [configuration.flatten(run.config) for run in runs]
    defaults = configuration.flatten(configuration.Config())
    sections = {}
    for name in flat[0]:
        values = [one[name] for one in flat]
        compared = [*values, defaults[name]] if len(runs) == 1 else values
        section, _, field = name.rpartition(".")
        sections.setdefault(section or "recipe", []).append(
            (field, values, any(v != compared[-1] for v in compared))
        )
    return list(sections.items())


def _differences(sections):
    """What :func:`_configuration` found notable of several runs -> list of (field's whole name, [value of each run]).

    Without the runs' own folders, which always differ.
    """
    found = []
    for section, fields in sections:
        for field, values, notable in fields:
            name = field if section == "recipe" else f"{section}.{field}"
            if notable and name != "run.dir":
                found.append((name, values))
    return found


def _environment(runs):
    """Rows -> list of (name, [value of each run], notable): versions, machine, command."""
    per_run = []
    for run in runs:
        environment = dict(run.environment)
        versions = environment.pop("versions", None)
        rows = {}
        for name in ("command", "git_commit", "world_size", "strategy", "hosts", "devices", "platform"):
            if name in environment:
                rows[name.replace("_", " ")] = _short(environment.pop(name))
        rows |= {name.replace("_", " "): _short(value) for name, value in environment.items()}
        if isinstance(versions, dict):
            rows |= {name: _short(value) for name, value in versions.items()}
        per_run.append(rows)
    names = dict.fromkeys(name for rows in per_run for name in rows)
    values = {name: [rows.get(name, "—") for rows in per_run] for name in names}
    return [(name, of_runs, len(set(of_runs)) > 1) for name, of_runs in values.items()]


def _short(value):
    """A value in words; of a list with one entry a rank, equal ones once, with their number."""
    if isinstance(value, dict):
        return ", ".join(f"{name} {words(item)}" for name, item in value.items())
    if isinstance(value, list) and len(value) > 1 and not any(str(item).startswith("-") for item in value):
        counts = {str(item): [str(other) for other in value].count(str(item)) for item in value}
        return ", ".join(f"{count} × {item}" if count > 1 else item for item, count in counts.items())
    return words(value)
