"""What a run's directory says of it: whether it is done, with the values that the study means, and how good it is."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from caco_scale import config as configuration
from caco_scale.config import Config
from caco_scale.config.fit import auto_fields
from caco_scale.errors import UserError
from caco_scale.run.directory import RunDirectory
from caco_scale.run.files import read_json_lines
from caco_scale.run.scores import is_percent
from caco_scale.sweep.study import Planned

CONSOLE = "console.log"  # in the run's directory, what its process printed
# Fields that a run may change when it resumes, and that its figures depend on all the same.
MEASURED = ("data.shards", "data.val_shards", "eval.knn_k", "eval.knn_temperature", "run.max_steps")


@dataclass(frozen=True)
class Result:
    """What a run's records say of it so far.

    ``done``: its final step, or None. ``final``: kNN top-1 in percent after that step. ``best``: the highest of all
    evaluations after a step, ``best_epoch``: its data epoch. ``pixels``, ``untrained``: before training. ``seconds``:
    of training and evaluation by the logged pace, starts and saves not among them. What was not logged is None.
    """

    done: int | None
    final: float | None = None
    best: float | None = None
    best_epoch: float | None = None
    pixels: float | None = None
    untrained: float | None = None
    seconds: float | None = None


def read_result(planned: Planned) -> Result:
    """The :class:`Result` of a run, of one that trains or has not begun, too. Raises UserError: a damaged DONE."""
    records = list(read_json_lines(planned.directory / "metrics.jsonl"))
    done = RunDirectory(planned.directory, is_main=False).done_step()
    knn = {r["step"]: r for r in records if is_percent(r.get("knn_top1")) and isinstance(r.get("step"), int)}
    trained = [record for step, record in knn.items() if step > 0]
    best = max(trained, key=lambda record: record["knn_top1"], default={})
    return Result(
        done=done,
        final=knn.get(done, {}).get("knn_top1") if done else None,
        best=best.get("knn_top1"),
        best_epoch=best.get("epoch"),
        pixels=knn.get(0, {}).get("knn_top1_raw_pixels"),
        untrained=knn.get(0, {}).get("knn_top1"),
        seconds=_seconds(records, _settled(planned).data.global_batch_size),
    )


def _settled(planned):
    """The run's configuration, by what it has written of it, if it has."""
    path = planned.directory / "config.yaml"
    return as_settled(planned.config, configuration.load_recipe(path)) if path.exists() else planned.config


def _seconds(records: Sequence[dict], images_per_step: int) -> float | None:
    seconds, before = 0.0, 0
    for record in records:
        if record.get("images_per_second"):
            seconds += (record["step"] - before) * images_per_step / record["images_per_second"]
            before = record["step"]
        seconds += record.get("knn_seconds") or 0
    return seconds or None


def refuse_other_values(planned: Planned) -> None:
    """A run's directory must be that of the run that the study means now.

    Raises:
        UserError: it has begun with other values, which stand in the message, or says no values.
    """
    path = planned.directory / "config.yaml"
    if not path.exists():
        if (planned.directory / "DONE").exists():
            raise UserError(
                f"{planned.directory} has a DONE but no config.yaml: remove it, or give another --dir"
            )
        return
    changed = _changes(configuration.load_recipe(path), planned.config)
    if changed:
        raise UserError(
            f"{planned.directory} was begun with other values ({'; '.join(changed)}): rename the run in the study, "
            "remove that directory, or give another --dir"
        )


def _changes(saved: Config, config: Config) -> list[str]:
    if config.precision.compute == "auto":  # settled by the machine when the run began
        config = configuration.replace(config, precision__compute=saved.precision.compute)
    config = as_settled(config, saved)
    before, now = configuration.flatten(saved), configuration.flatten(config)
    places = [configuration.flatten(configuration.with_absolute_places(one)) for one in (saved, config)]
    measured = [
        f"{field}: {before[field]} -> {now[field]}"
        for field in MEASURED
        if places[0][field] != places[1][field]
    ]
    return configuration.differences(saved, config) + measured


def as_settled(config: Config, saved: Config) -> Config:
    """The config with that of ``saved`` for what followed the set of images when the run began."""
    values, fields = configuration.flatten(saved), auto_fields(config)
    return configuration.replace(config, **{name.replace(".", "__"): values[name] for name in fields})


def complaint(directory: Path) -> str:
    """Why a run failed, from the end of what it printed: its last error, or its last line."""
    try:
        with open(directory / CONSOLE, "rb") as file:
            file.seek(max(0, file.seek(0, 2) - 4096))
            lines = [
                line.strip() for line in file.read().decode(errors="replace").splitlines() if line.strip()
            ]
    except OSError:
        lines = []
    errors = [line for line in lines if line.startswith("error: ")]
    return (errors or lines or ["it printed nothing"])[-1]
