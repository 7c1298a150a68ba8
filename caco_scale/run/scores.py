"""The scores that a run's directory holds: those of its metrics, and those of ``caco_scale.evaluate`` afterwards."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from caco_scale.run.files import read_json_lines


@dataclass(frozen=True)
class LoggedScore:
    """A figure of a checkpoint: top-1 in percent, its 95% interval or None, and how and on what it was measured."""

    step: int
    encoder: str
    protocol: str
    how: str
    data: str
    top1: float
    interval: tuple[float, float] | None


def is_percent(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value <= 100


def logged_scores(run_directory: str | Path, step: int) -> tuple[dict | None, dict | None]:
    """The kNN evaluations that a run logged up to a step -> (the last one's record or None, that of step 0 or None)."""
    lines = read_json_lines(Path(run_directory) / "metrics.jsonl")
    known = [
        r
        for r in lines
        if is_percent(r.get("knn_top1")) and isinstance(r.get("step"), int) and r["step"] <= step
    ]
    start = next((record for record in known if record["step"] == 0), None)
    return (known[-1] if known and known[-1]["step"] else None), start


def evaluation_scores(run_directory: str | Path) -> list[LoggedScore]:
    """What ``caco_scale.evaluate`` has finished in a run's directory -> list of :class:`LoggedScore`, by step.

    A file that cannot be read, or that another version wrote in another form, is passed over.
    """
    scores = []
    for path in sorted(Path(run_directory).glob("evaluate/*/result.json")):
        try:
            scores += _scores(json.loads(path.read_text()))
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            continue
    return sorted(scores, key=lambda score: score.step)


def _scores(result):
    protocol = result["settings"]["evaluation"]
    if protocol == "knn":
        rows = [
            ("kNN", f"{row['feature']}, k {row['k']}, T {row['temperature']:g}", row["top1"], row["interval"])
            for row in result["results"]
        ]
    else:
        parts = [f"lr {result['lr']:g} per 256 images"] if "lr" in result else []
        parts += [f"{result['settings']['crops']} crops"] if "crops" in result["settings"] else []
        how = ", ".join(parts)
        rows = [(str(protocol), how, result["top1"], result.get("top1_interval"))]
    return [
        LoggedScore(
            protocol=name,
            how=how,
            top1=float(top1),
            interval=(float(between[0]), float(between[1])) if between else None,
            step=int(result["weights"]["metadata"]["step"]),
            encoder=str(result["weights"]["encoder"]),
            data=str(result["data"]["val"]["url"]),
        )
        for name, how, top1, between in rows
        if is_percent(top1)
    ]
