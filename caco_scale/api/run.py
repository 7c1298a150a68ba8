"""Pre-train from a script or a notebook, and read what a run has left. Nothing of torch is imported before training."""

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from caco_scale import config as configuration
from caco_scale.config import Config
from caco_scale.errors import UserError
from caco_scale.run.files import read_json_lines

if TYPE_CHECKING:
    from caco_scale.api.backbone import Backbone


@dataclass(frozen=True, repr=False)
class Run:
    """A run that :func:`pretrain` has trained, finished or stopped.

    ``path``: its directory. ``config``: the whole configuration that it was trained with. ``step``: finished optimizer
    steps. ``stopped_by``: what ended it before its last step (``"SIGINT"`` for Ctrl-C, ``"SIGTERM"``, ``"STOP"`` for
    the file of that name, ...), None where it has finished.
    """

    path: Path
    config: Config
    step: int
    stopped_by: str | None

    def metrics(self) -> list[dict[str, Any]]:
        """Every record of ``metrics.jsonl``, see :func:`read_metrics`."""
        return read_metrics(self)

    def curve(self, name: str) -> tuple[list[int], list[float]]:
        """Steps and values of one figure (``"loss"``, ``"knn_top1"``, ``"lr"``, ...), as a plot takes them.

        A value that was not finite is left out. UserError where no record has the figure: it names those there are.
        """
        records = self.metrics()
        if not any(name in record for record in records):
            names = ", ".join(sorted({key for record in records for key in record})) or "none yet"
            raise UserError(f"{self.path / 'metrics.jsonl'} has no figure {name!r}: it has {names}")
        found = [(record["step"], record[name]) for record in records if record.get(name) is not None]
        return [step for step, _ in found], [value for _, value in found]

    @property
    def checkpoint(self) -> Path | None:
        """The newest complete checkpoint, None where there is none yet."""
        from caco_scale.checkpoint.folder import latest

        return latest(self.path / "checkpoints")

    def load_backbone(self, *, which: str = "query", step: int | None = None) -> "Backbone":
        """The trained backbone, see :func:`~caco_scale.load_backbone`."""
        from caco_scale.api.backbone import load_backbone

        arch = self.config.model.arch  # by whoever called pretrain: may run, if it is code
        return load_backbone(self.path, which=which, step=step, arch=arch if ":" in arch else None)

    def __repr__(self) -> str:
        state = f"stopped by {self.stopped_by}" if self.stopped_by else "finished"
        return f"Run({str(self.path)!r}, {state}, step {self.step:,})"


def pretrain(
    recipe: str | os.PathLike[str] = "demo",
    *,
    on_metrics: Callable[[dict[str, Any]], None] | None = None,
    **flags: Any,
) -> Run:
    """Pre-train an image encoder with CaCo (arXiv:2203.14370), as ``python -m caco_scale.pretrain`` does.

    The same recipe and flags train the same run, to the last digit. In a script or a notebook it is one process;
    several are this same script under the launcher,
    ``accelerate launch --config_file "$(caco path ds_configs/ddp.yaml)" script.py``, where every process makes this
    call. A second call with the same ``run.dir`` resumes, as the command does.

    Args:
        recipe: the name of a recipe (``demo``, ``caco_r50_200ep``, ...) or the path of a YAML file; the ``config.yaml``
            of a run is one.
        on_metrics: called with every record that goes to ``metrics.jsonl`` (``{"step", "epoch", "loss", ...}``), on the
            main process alone. What it raises ends the run.
        flags: fields of the configuration by their dotted names, ``**{"bank.size": 4096}``, or with two underscores for
            the dot, ``bank__size=4096``.

    In a program's main thread, Ctrl-C (a notebook's "interrupt"), SIGTERM and SIGUSR1 stop the run after a
    checkpoint, and the call returns; a second Ctrl-C is a KeyboardInterrupt at once. The program's own handlers come
    back afterwards. In another thread no signal is seen. The call sets torch's seeds, and turns TF32 off in
    convolutions.

    Raises:
        UserError: a mistake in the arguments, the data or the machine: one line, with the fix. Where it can be known,
            before training.
    """
    config = configuration.parse([os.fspath(recipe), *_as_flags(flags)], prog="caco_scale.pretrain")

    from caco_scale.api.finish import finish
    from caco_scale.run.signals import Signals
    from caco_scale.training.trainer import run

    with Signals() as signals:
        outcome = run(config, signals, on_metrics)
        finish(outcome, signals=signals)
    return Run(Path(outcome.directory), outcome.config, outcome.step, outcome.stopped_by)


def read_metrics(run: Run | str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Every record of a run's ``metrics.jsonl``, in order; also while it trains.

    A record is ``{"step", "epoch", "loss", "lr", ...}`` of a training step or ``{"step", "knn_top1", ...}`` of an
    evaluation; None stands for a number that was not finite. A line that a kill has cut is left out.

    Args:
        run: a :class:`Run`, or the path of a run directory or of its ``metrics.jsonl``.

    Raises:
        UserError: there is no such file.
    """
    path = run.path if isinstance(run, Run) else Path(run)
    file = path / "metrics.jsonl" if path.is_dir() else path
    if not file.is_file():
        raise UserError(f"no metrics at {file}: give a run directory (runs/NAME) that has begun to train")
    return list(read_json_lines(file))


def _as_flags(flags: dict[str, Any]) -> Iterable[str]:
    """Keyword arguments as the words of a command line."""
    seen: dict[str, str] = {}
    for name, value in flags.items():
        flag = name.replace("__", ".").replace("-", "_")
        if flag in seen:
            raise UserError(f"{seen[flag]} and {name} are the same flag: give one of them")
        seen[flag] = name
        if value is None:
            raise UserError(f"{name} is None: leave it out to keep the recipe's value")
        if isinstance(value, list | tuple):
            yield from (f"--{flag}", *map(str, value))
        else:
            yield f"--{flag}={value}"
