"""The model card beside an exported backbone: what it is, what it was trained on, its scores, how to load it."""

import hashlib
import shlex

from caco_scale.layouts import loading_code
from caco_scale.run_directory import read_json_lines


def scores(run_directory, step):
    """The evaluations that a run logged up to a step -> (the last one's record or None, that of step 0 or None)."""
    lines = [line for line in read_json_lines(run_directory / "metrics.jsonl") if _has_score(line)]
    known = [line for line in lines if line["step"] <= step]
    start = next((line for line in known if line["step"] == 0), None)
    return (known[-1] if known and known[-1]["step"] else None), start


def _has_score(line):
    return isinstance(line.get("step"), int) and isinstance(line.get("knn_top1"), (int, float))


def write_card(file_name, data, library, metadata, values, config, environment, evaluations, compared):
    """The card as Markdown text; what is not known is said to be unknown.

    Args:
        file_name, data: of the exported file.
        library: whose model it loads into; ``compared``: how that was compared, in words.
        metadata: what the exporter says of the tensors; ``values``: the checkpoint's.
        config: flat, ``{"section.field": value}``; empty where it could not be read.
        environment: of ``environment.json``; empty where there is none.
        evaluations: of :func:`scores`.
    """
    arch, stem = metadata["arch"], metadata["stem"]
    command = environment.get("command")
    rows = [
        ("encoder", f"{metadata['encoder']} encoder's backbone, without projector and classifier"),
        ("architecture", f"{arch}, {stem} stem"),
        ("recipe", metadata["recipe"] or "unknown"),
        ("method", _method(config)),
        ("trained", _trained(config, values)),
        ("data", _data(config, values)),
        ("input", _input(config)),
        ("command", f"`{shlex.join(map(str, command))}`" if isinstance(command, list) else "unknown"),
        ("commit", environment.get("git_commit") or "unknown"),
        ("hardware", _hardware(environment)),
        ("file", f"`{file_name}`, {len(data):,} bytes, sha256 `{hashlib.sha256(data).hexdigest()}`"),
        ("checked", compared),
    ]
    table = "\n".join(f"| {name} | {_cell(value)} |" for name, value in rows)
    code = loading_code(library, arch, stem, file_name)
    return (
        f"# {arch}, pre-trained without labels ({config.get('bank.rule', 'method unknown')})\n\n"
        f"| | |\n|---|---|\n{table}\n\n## Scores\n\n{_score_lines(config, *evaluations)}\n\n"
        f"## Load it\n\n```python\n{code}\n```\n\n"
        "`model` gives features, one row an image; normalise images as said under input, and call `model.eval()`.\n"
    )


def _cell(text):
    return str(text).replace("|", "\\|").replace("\n", " ")


def _method(config):
    if not config:
        return "unknown"
    rule, size = config["bank.rule"], config["bank.size"]
    temperature = f"temperature {config['loss.temperature']:g}"
    return f"{rule} (arXiv:2203.14370 and its baselines), bank of {size:,} rows, {temperature}"


def _trained(config, values):
    epoch = values.get("epoch")
    epochs = f"{epoch:,.6g} epochs, " if isinstance(epoch, (int, float)) else ""
    text = f"{epochs}{values['step']:,} steps"
    if config:
        warmup, main = config["bank.warmup_epochs"], config["optim.epochs"]
        text += f" (schedule: {warmup} epochs of bank warm-up, then {main}; batch {config['data.global_batch_size']:,})"
    return text


def _data(config, values):
    count = values.get("num_samples")
    images = f", {count:,} images, no labels used" if isinstance(count, int) else ""
    return f"`{config['data.shards']}`{images}" if config.get("data.shards") else "unknown"


def _input(config):
    if not config:
        return "unknown"
    mean, std = (", ".join(f"{v:g}" for v in config[name]) for name in ("views.mean", "views.std"))
    return f"RGB from 0 to 1, minus ({mean}), divided by ({std}); trained on {config['views.size']} pixels"


def _hardware(environment):
    if not environment.get("world_size"):
        return "unknown"
    devices = environment.get("devices")
    devices = (
        ", ".join(sorted({str(d).split(":")[0] for d in devices})) if isinstance(devices, list) else "unknown"
    )
    return f"{environment['world_size']} process(es) on {devices}, {environment.get('strategy', 'strategy unknown')}"


def _score_lines(config, last, start):
    """What was measured while it trained, each figure with how."""
    if last is None:
        return "None was measured while it trained; `python -m caco_scale.evaluate knn` measures it."
    how, where = "parameters unknown", "unknown"
    if config:
        how = f"k = {config['eval.knn_k']}, T = {config['eval.knn_temperature']:g}"
        where = config["data.val_shards"] or "unknown"
    rows = [f"| step {last['step']:,} | {last['knn_top1']:.2f}% |"]
    if start is not None:
        rows.append(f"| the untrained encoder | {start['knn_top1']:.2f}% |")
        if isinstance(start.get("knn_top1_raw_pixels"), (int, float)):
            rows.append(f"| raw pixels | {start['knn_top1_raw_pixels']:.2f}% |")
    words = f"Weighted kNN, {how}, on backbone features of the query encoder, validation set `{where}`."
    return f"{words}\n\n| | top-1 |\n|---|---|\n" + "\n".join(rows)
