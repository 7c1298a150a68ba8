"""What a finished run ends with: a backbone file with its model card, a report, and the commands that go on from it.

``DONE`` is on the disk before any of it, and nothing here takes it back: each file is written by its own command,
``caco export`` or ``caco report``, in a process of its own. Where one fails, a line says why, and what to type.
"""

import gc
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from caco_scale.config import Config
from caco_scale.distributed.collectives import rank
from caco_scale.distributed.environment import MPI, TORCH, is_on_one_node
from caco_scale.errors import UserError, one_line, quoted
from caco_scale.run.command import program, with_flags
from caco_scale.run.signals import Signals
from caco_scale.run.stopping import job_end
from caco_scale.training.trainer import Outcome

BACKBONE, REPORT = "backbone.safetensors", "report.html"
LIMIT_SECONDS = 1800  # for each file
SEVERAL_NODES_SECONDS = 120  # srun ends all nodes 300 seconds after the first is through (slurm/lib.sh)
POLL_SECONDS = 0.1
LAUNCHERS = ("ACCELERATE_", "TORCHELASTIC_", "FSDP_")  # variables: the commands here are one process


class Product(NamedTuple):
    """A file that a run ends with. ``words``: of ``caco`` that write it; ``more``: which a user need not type."""

    what: str
    file: Path
    words: list[str]
    more: list[str]


def finish(outcome: Outcome, started_as: Sequence[str] | None = None, signals: Signals | None = None) -> None:
    """Write what ``run.finish`` asks for, and print the commands that go on from a finished run. On rank 0 alone.

    A run that had finished before gets what it lacks. No error comes out of here.

    Args:
        outcome: of a run that is over; of one that was stopped nothing is written.
        started_as: the words of the command that trained it; None: it was a call of Python.
        signals: a stop signal leaves out what is not written yet.
    """
    if rank() or outcome.stopped_by or not outcome.step:
        return
    try:
        made = _write_all(outcome, signals)
        if made or outcome.trained:
            _propose(outcome, started_as)
    except Exception as error:  # the run is finished, whatever this is
        print(f"warning: {outcome.directory}: {one_line(error)}", file=sys.stderr, flush=True)


def products(config: Config, folder: Path) -> list[Product]:
    """The files that ``run.finish`` asks for."""
    own = ["--arch", config.model.arch] if ":" in config.model.arch else []  # code that the user named
    backbone, report = folder / BACKBONE, folder / REPORT
    file_format = ["--format", "timm"] if _timm_has(config) else []
    found = {
        "export": Product(
            "the backbone and its model card",
            backbone,
            ["export", str(folder), "--to", str(backbone), *file_format, *own],
            ["--force"],
        ),
        "report": Product("the report", report, ["report", str(folder), *own], []),
    }
    return [found[name] for name in found if config.run.finish in (name, "all")]


def _timm_has(config):
    from caco_scale.export.library_names import library_of

    try:
        return library_of(config.model.arch, "timm") == "timm"
    except UserError:
        return False


def _write_all(outcome, signals):
    """Write each product that is due -> how many are there now that were not before."""
    due = [p for p in products(outcome.config, outcome.directory) if outcome.trained or not p.file.exists()]
    if due:
        _free_memory()
    written = 0
    for product in due:
        print(f"writing {product.what} ...", flush=True)
        reason = _write(product, _seconds_left(), signals)
        written += reason is None
        if reason is not None:
            by_hand = " ".join(map(quoted, [*program(), *product.words]))
            print(
                f"warning: {product.what} not written ({reason}); the run is complete. By hand: {by_hand}",
                flush=True,
            )
    return written


def _free_memory():
    """What the training held on a GPU, for a report that uses it, too."""
    import torch

    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def _seconds_left():
    """How long a command may take."""
    most = LIMIT_SECONDS if is_on_one_node(os.environ) else SEVERAL_NODES_SECONDS
    end = job_end(os.environ)
    return most if end is None else min(most, end - time.time() - SEVERAL_NODES_SECONDS)


def _write(product, seconds, signals):
    """Run a command and print what it says -> None, or why it failed, in a line."""
    asked: Callable[[], str | None] = lambda: signals.requested if signals else None
    if asked():
        return f"stopped by {asked()}"
    if seconds <= 0:
        return "the job ends too soon"
    command = [sys.executable, "-m", "caco_scale", *product.words, *product.more]
    with tempfile.TemporaryFile("w+") as said, tempfile.TemporaryFile("w+") as complained:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=said, stderr=complained, env=_environment()
        )
        deadline, why = time.monotonic() + seconds, None
        while process.poll() is None and not why:
            time.sleep(POLL_SECONDS)
            why = f"stopped by {asked()}" if asked() else None
            why = why or (
                f"it took more than {seconds:,.0f} seconds" if time.monotonic() > deadline else None
            )
        if process.poll() is None:
            process.kill()
            process.wait()
        for stream in (said, complained):
            stream.seek(0)
        if not process.returncode:
            print(said.read().rstrip(), flush=True)
            return None
        lines = [line for line in complained.read().splitlines() if line.strip()]
    errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    return why or (errors or lines or [f"it ended with code {process.returncode}"])[-1]


def _environment():
    """This process's, for one process that no launcher has started, with the same places of modules."""
    names = {name for variables in (TORCH, *MPI) for name in variables}
    kept = {n: v for n, v in os.environ.items() if n not in names and not n.startswith(LAUNCHERS)}
    return {**kept, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}


def _propose(outcome, started_as):
    """Print the commands that go on from the run; no line is folded, for it is to be copied."""
    rows = proposals(outcome, started_as)
    width = max(len(what) for what, _ in rows)
    print("\n".join(["next:", *(f"  {what:{width}}  {command}" for what, command in rows)]), flush=True)


def proposals(outcome: Outcome, started_as: Sequence[str] | None = None) -> list[tuple[str, str]]:
    """(what, command) of what can be done with a finished run, each for a shell; arguments as of :func:`finish`."""
    config, folder = outcome.config, outcome.directory
    caco = lambda *words: " ".join(map(quoted, [*program(), *words]))
    there = [p for p in products(config, folder) if p.file.exists()]
    rows = [("look", f"open {quoted(p.file)} in a browser") for p in there if p.file.name == REPORT]
    rows += [("load", f"the lines are in {quoted(f'{p.file}.md')}") for p in there if p.file.name == BACKBONE]
    if not any(p.file.name == BACKBONE for p in there):
        rows.append(("export", caco("export", str(folder), "--to", str(folder / BACKBONE))))
    if not any(p.file.name == REPORT for p in there):
        rows.append(("report", caco("report", str(folder))))
    data = [] if config.data.shards else ["--data", "IMAGES"]
    rows.append(("features", caco("embed", str(folder), *data, "--to", str(folder / "features.npz"))))
    labelled = [] if config.data.val_shards else ["--data", "TRAIN", "--val", "VAL"]
    words = caco("evaluate", "knn", str(folder), *labelled)
    rows.append(("evaluate", words + "   (TRAIN, VAL: images in folders by class)" * bool(labelled)))
    again = list(started_as or [*program(), "pretrain", str(folder / "config.yaml")])
    longer = {"optim.epochs": 2 * config.optim.epochs}
    if outcome.step < outcome.total_steps:
        longer = {"run.max_steps": 2 * outcome.step}
    resume = {"run.resume": "auto"} if config.run.resume == "never" else {}
    rows.append(("train on", with_flags(again, {**longer, **resume})))
    if config.bank.rule == "caco" and config.data.val_shards:
        other = {"bank.rule": "moco", "run.dir": f"{config.run.dir}_moco"}
        rows.append(("compare with MoCo", with_flags(again, other)))
    return rows
