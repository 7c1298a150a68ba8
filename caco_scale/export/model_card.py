"""The model card beside an exported backbone: what it is, what it was trained on, its scores, how to load it."""

import hashlib
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from caco_scale.export.library_names import loading_code
from caco_scale.run.scores import LoggedScore, is_percent


def write_card(
    name: str,
    data: bytes,
    library: str,
    metadata: Mapping[str, str],
    values: Mapping[str, Any],
    *,
    source: str,
    config: Mapping[str, Any],
    environment: Mapping[str, Any],
    logged: tuple[dict | None, dict | None],
    evaluated: Sequence[LoggedScore],
    compared: str,
) -> str:
    """The card as Markdown text; what is not known is said to be unknown.

    Args:
        name, data: of the exported file.
        library: whose model it loads into; ``compared``: how that was compared, in words.
        metadata: what the exporter says of the tensors; ``values``: the checkpoint's, empty without one.
        source: what file of weights it comes from, empty for a run.
        config: flat, ``{"section.field": value}``; empty where it could not be read.
        environment: of ``environment.json``; empty where there is none.
        logged, evaluated: of :mod:`caco_scale.run.scores`, of this checkpoint.
    """
    arch, stem = metadata["arch"], metadata["stem"]
    command = environment.get("command")
    rows = [
        ("encoder", f"{metadata['encoder']} encoder's backbone, without projector and classifier"),
        ("architecture", f"{arch}, {stem} stem"),
        *([("source", source)] if source else []),
        ("recipe", metadata["recipe"] or "unknown"),
        ("method", _method(config)),
        ("trained", _trained(config, values, metadata)),
        ("data", _data(config, values)),
        ("input", _input(metadata)),
        ("command", f"`{shlex.join(map(str, command))}`" if isinstance(command, list) else "unknown"),
        ("commit", metadata["git_commit"] or "unknown"),
        ("hardware", _hardware(environment)),
        ("file", f"`{name}`, {len(data):,} bytes, sha256 `{hashlib.sha256(data).hexdigest()}`"),
        ("checked", compared),
    ]
    table = "\n".join(f"| {row} | {_cell(value)} |" for row, value in rows)
    code = loading_code(library, arch, stem, name)
    return (
        f"# {arch}, pre-trained without labels ({config.get('bank.rule', 'method unknown')})\n\n"
        f"| | |\n|---|---|\n{table}\n\n## Scores\n\n{_score_lines(config, logged, evaluated)}\n\n"
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


def _trained(config, values, metadata):
    epoch, step = values.get("epoch") or metadata["epoch"], values.get("step") or metadata["step"]
    if not step:
        return "unknown"
    text = f"{float(epoch):,.6g} epochs, " if epoch else ""
    text += f"{int(step):,} steps"
    if config:
        warmup, main = config["bank.warmup_epochs"], config["optim.epochs"]
        text += f" (schedule: {warmup} epochs of bank warm-up, then {main}; batch {config['data.global_batch_size']:,})"
    return text


def _data(config, values):
    count = values.get("num_samples")
    images = f", {count:,} images, no labels used" if isinstance(count, int) else ""
    return f"`{config['data.shards']}`{images}" if config.get("data.shards") else "unknown"


def _input(metadata):
    mean, std = (metadata[name].replace(" ", ", ") for name in ("mean", "std"))
    return f"RGB from 0 to 1, minus ({mean}), divided by ({std}); trained on {metadata['size']} pixels"


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
        (f"{s.protocol}, {s.how}" if s.how else s.protocol, f"`{s.data}`", s.top1, s.interval)
        for s in evaluated
    ]
    last, start = logged
    how, where = "kNN while it trained", "unknown"
    if config:
        how += (
            f", features of the query encoder, k {config['eval.knn_k']}, T {config['eval.knn_temperature']:g}"
        )
        where = f"`{config['data.val_shards']}`" if config["data.val_shards"] else "unknown"
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
