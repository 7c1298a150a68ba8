"""The model card beside an exported backbone: what it is, what it was trained on, its scores, how to load it."""

import hashlib
import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from caco_scale.data.views import describe_crop
from caco_scale.flags.choices import ENCODERS
from caco_scale.run.scores import LoggedScore, is_percent


def write_card(
    name: str,
    data: bytes,
    code: str,
    metadata: Mapping[str, str],
    values: Mapping[str, Any],
    *,
    source: str,
    unused: str,
    assumed: Mapping[str, str],
    config: Mapping[str, Any],
    warmup_steps: int | None,
    environment: Mapping[str, Any],
    logged: tuple[dict | None, dict | None],
    evaluated: Sequence[LoggedScore],
    compared: str,
) -> str:
    """The card as Markdown text; what is not known is said to be unknown.

    Args:
        name, data: of the exported file.
        code: the lines that load it; ``compared``: how what they load was compared, in words.
        metadata: what the exporter says of the tensors; ``values``: the checkpoint's, empty without one.
        source: what file of weights it comes from, empty for a run; ``unused``: the names in it that went nowhere;
            ``assumed``: size, mean, std of the images as far as only guessed.
        config: flat, ``{"section.field": value}``; empty where it could not be read.
        warmup_steps: of the bank warm-up, None where it is not known.
        environment: of ``environment.json``; empty where there is none.
        logged, evaluated: of :mod:`caco_scale.run.scores`, of this checkpoint.
    """
    arch, stem = metadata["arch"], metadata["stem"]
    command = environment.get("command")
    rows = [
        ("encoder", f"{_whose(metadata['encoder'])}, without projector and classifier"),
        ("architecture", f"{arch}, {stem} stem"),
        *([("options", ", ".join(json.loads(metadata["options"])))] if metadata.get("options") else []),
        *([("source", source)] if source else []),
        *([("not used of it", unused)] if unused else []),
        ("recipe", metadata["recipe"] or "unknown"),
        ("method", _method(config)),
        ("trained", _trained(config, values, metadata, warmup_steps)),
        ("data", _data(config, values)),
        ("input", _input({**assumed, **metadata}, assumed)),
        ("crop", _crop({**assumed, **metadata})),
        ("command", f"`{_command(command)}`" if isinstance(command, list) and command else "unknown"),
        ("commit", metadata["git_commit"] or "unknown"),
        ("hardware", _hardware(environment)),
        (
            "licence",
            "not stated: whoever publishes the file states one; the images' and the source's terms count",
        ),
        ("file", f"`{name}`, {len(data):,} bytes, sha256 `{hashlib.sha256(data).hexdigest()}`"),
        ("checked", compared),
    ]
    table = "\n".join(f"| {row} | {_cell(value)} |" for row, value in rows)
    return (
        f"# {arch}{_title(config, source)}\n\n"
        f"| | |\n|---|---|\n{table}\n\n## Scores\n\n{_score_lines(config, logged, evaluated)}\n\n"
        f"## Load it\n\n```python\n{code}\n```\n\n"
        "`model` gives features, one row an image; normalise images as said under input, and call `model.eval()`.\n"
    )


def _title(config, source):
    """What is known of how it was trained: of a file of others not even that it was without labels."""
    if source:
        return f", from {source.split(', ')[0]}"
    return (
        f", pre-trained without labels ({config['bank.rule']})" if config else ", pre-trained without labels"
    )


def _command(words):
    """As it is typed: the program without the place where it is installed, which is nobody else's affair."""
    program = Path(str(words[0]))
    started = [program.name]
    if program.suffix == ".py" and program.parent.name == "caco_scale":
        started = ["python", "-m", "caco_scale" + ("" if program.stem == "__main__" else f".{program.stem}")]
    return shlex.join([*started, *map(str, words[1:])])


def _whose(encoder):
    return (
        f"{encoder} encoder's backbone"
        if encoder in ENCODERS
        else "the file's only backbone, it does not say whose"
    )


def _cell(text):
    return str(text).replace("|", "\\|").replace("\n", " ")


def _method(config):
    if not config:
        return "unknown"
    rule, size = config["bank.rule"], config["bank.size"]
    temperature = f"temperature {config['loss.temperature']:g}"
    return f"{rule} (arXiv:2203.14370 and its baselines), bank of {size:,} rows, {temperature}"


def _trained(config, values, metadata, warmup_steps):
    epoch, step = values.get("epoch") or metadata["epoch"], values.get("step") or metadata["step"]
    if not step:
        return "unknown"
    text = f"{float(epoch):,.6g} epochs, " if epoch else ""
    text += f"{int(step):,} steps"
    if config:
        text += f" (schedule: {_warmup(config, warmup_steps)}{config['optim.epochs']} epochs"
        text += f"; batch {config['data.global_batch_size']:,})"
    return text


def _warmup(config, steps):
    """The bank warm-up in words, empty where there is none."""
    if steps == 0:
        return ""
    asked, count = config["bank.warmup_epochs"], "" if steps is None else f" of {steps:,} steps"
    return f"bank warm-up{count} ({f'{asked} epochs' if asked else 'until the bank is full'}), then "


def _data(config, values):
    count = values.get("num_samples")
    images = f", {count:,} images, no labels used" if isinstance(count, int) else ""
    return f"`{_place(config['data.shards'])}`{images}" if config.get("data.shards") else "unknown"


def _place(data):
    """A set as a published card names it: of a local path its last two folders, the rest is the author's own."""
    path = Path(data)
    return "/".join(path.parts[-2:]) if path.is_absolute() and len(path.parts) > 3 else data


def _input(views, assumed):
    mean, std = (views[name].replace(" ", ", ") for name in ("mean", "std"))
    bits = f" of {views['bits']} bits," if "bits" in views else ""
    kind = f"{views['channels']} channel(s){bits}" if "channels" in views else "RGB"
    text = f"{kind} from 0 to 1, minus ({mean}), divided by ({std}); {views['size']} pixels"
    return f"{text}; the source does not say its {', '.join(assumed)}: assumed" if assumed else text


def _crop(views):
    return f"for evaluation: {describe_crop(int(views['size']), int(views.get('resize', 0)))}"


def _hardware(environment):
    if not environment.get("world_size"):
        return "unknown"
    devices = environment.get("devices")
    devices = (
        ", ".join(sorted({str(d).split(":")[0] for d in devices})) if isinstance(devices, list) else "unknown"
    )
    return f"{environment['world_size']} process(es) on {devices}, {environment.get('strategy', 'strategy unknown')}"


def _score_lines(config, logged, evaluated):
    """What was measured, each figure with how and on what."""
    rows = [
        (f"{s.protocol}, {s.how}" if s.how else s.protocol, f"`{_place(s.data)}`", s.top1, s.interval)
        for s in evaluated
    ]
    last, start = logged
    how, where = "kNN while it trained", "unknown"
    if config:
        how += (
            f", features of the query encoder, k {config['eval.knn_k']}, T {config['eval.knn_temperature']:g}"
        )
        where = f"`{_place(config['data.val_shards'])}`" if config["data.val_shards"] else "unknown"
    if last is not None:
        rows.append((f"{how}, step {last['step']:,}", where, last["knn_top1"], None))
    if start is not None:
        rows.append((f"{how}, untrained", where, start["knn_top1"], None))
        if is_percent(start.get("knn_top1_raw_pixels")):
            rows.append(
                (
                    f"{how.replace('features of the query encoder', 'raw pixels')}",
                    where,
                    start["knn_top1_raw_pixels"],
                    None,
                )
            )
    if last is None and not evaluated:
        return "None was measured; `python -m caco_scale.evaluate knn` does."
    lines = [
        f"| {_cell(words)} | {_cell(place)} | {top1:.2f}% | {_interval(between)} |"
        for words, place, top1, between in rows
    ]
    return (
        "| | validation images | top-1 | 95% interval (over images, not seeds) |\n|---|---|---|---|\n"
        + "\n".join(lines)
    )


def _interval(between):
    return f"{between[0]:.2f} to {between[1]:.2f}" if between else ""
