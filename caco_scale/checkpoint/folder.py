"""The folder of a run's checkpoints: names, what is complete, and how one appears or goes all at once.

Nothing here needs torch. A checkpoint is written as ``step_XXXXXXXX.tmp`` and renamed last; the one that a repetition
of its step replaces is ``step_XXXXXXXX.old.tmp`` meanwhile. Whoever reads one goes through :func:`read_values` and
:func:`check_files`: no byte is parsed before its file has the hash that ``SHA256SUMS`` says (of 0.1: its size).
"""

import json
import os
import re
import shutil
from collections.abc import Iterable
from pathlib import Path

from caco_scale.atomic import flush_to_disk
from caco_scale.checkpoint import sums
from caco_scale.checkpoint.values import check_values
from caco_scale.errors import UserError, one_line

FORMAT = 1
TABLE, VALUES = ".metadata", "values.json"
MOST_VALUES_BYTES = 1 << 28  # of values.json: a list of a million images that do not decode is less


def steps(directory: str | Path) -> list[int]:
    """Steps of the complete checkpoints in ``directory``, ascending."""
    if not Path(directory).is_dir():
        return []
    found = [step_of(entry) for entry in Path(directory).iterdir()]
    return sorted(step for step in found if step is not None)


def step_of(path: Path) -> int | None:
    """The step that a checkpoint's folder is named after; None: not the name of one."""
    match = re.fullmatch(r"step_(\d{8,})", path.name)
    return int(match[1]) if match else None


def step_path(directory: str | Path, step: int) -> Path:
    """The folder of one step's checkpoint."""
    return Path(directory) / f"step_{step:08d}"


def latest(directory: str | Path) -> Path | None:
    """The newest complete checkpoint in ``directory`` (the same on all ranks: ``Checkpointer.latest``)."""
    found = steps(directory)
    return step_path(directory, found[-1]) if found else None


def checkpoint_of(run: str | Path, step: int | None = None) -> Path:
    """The checkpoint that a user means by a run's or a checkpoint's directory, and maybe a step -> Path."""
    run = Path(run)
    if not run.is_dir():
        raise UserError(
            f"no checkpoint at {run}: give a run directory, or one of its checkpoints/step_XXXXXXXX"
        )
    if (run / VALUES).exists() or step_of(run) is not None:
        if step is not None and step != read_values(run)["step"]:
            raise UserError(
                f"{run} is the checkpoint of step {read_values(run)['step']}, not {step}: drop --step"
            )
        return run
    directory = run if steps(run) else run / "checkpoints"
    found = steps(directory)
    if not found:
        raise UserError(
            f"no complete checkpoint in {directory}: is {run} a run directory, and has it saved yet?"
        )
    if step is not None and step not in found:
        raise UserError(
            f"no checkpoint of step {step} in {directory}; there are {', '.join(map(str, found))}"
        )
    return step_path(directory, found[-1] if step is None else step)


def read_values(path: str | Path) -> dict:
    """The JSON values of a checkpoint: the caller's, and step, torch, world_size, shapes and files.

    Every known field has its type and range afterwards (:mod:`caco_scale.checkpoint.values`).

    Raises:
        UserError: no checkpoint there; a damaged one; one of a newer version.
    """
    path = Path(path)
    if not path.is_dir():
        raise UserError(f"no checkpoint at {path}: give the path of a checkpoints/step_XXXXXXXX folder")
    if not (path / VALUES).exists():
        raise UserError(f"{path} is not a checkpoint of this program: it has no {VALUES}{_older(path)}")
    hashes = _read_sums(path)
    if hashes is not None:
        _check_file(path, VALUES, None, hashes)
    try:
        if not (path / VALUES).is_file() or (path / VALUES).stat().st_size > MOST_VALUES_BYTES:
            raise ValueError("it is no file of a checkpoint's size")
        values = json.loads((path / VALUES).read_text())
        version = values["format"]
        if version == FORMAT:
            check_values(values)
            own = step_of(path)
            if own is not None and own != values["step"]:
                raise ValueError(f"it says step {values['step']}")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise damaged(path, VALUES, error) from error
    if version != FORMAT:
        raise UserError(
            f"checkpoint {path} has format {str(version)[:20]}, this version reads {FORMAT}: update caco_scale"
        )
    if hashes is None and "sums" in values:
        raise damaged(path, sums.NAME, "missing")
    if hashes is not None and set(hashes) != {VALUES, *values["files"]}:
        raise damaged(path, sums.NAME, f"it does not list the files that {VALUES} does")
    return values


def check_files(path: Path, values: dict, names: Iterable[str] | None = None) -> None:
    """Hold files of a checkpoint against their sizes and hashes, before anything of them is parsed.

    Args:
        values: of :func:`read_values`.
        names: which (default: all).
    Raises:
        UserError: the first one that is missing, cut or changed.
    """
    hashes = _read_sums(path)
    for name in values["files"] if names is None else names:
        _check_file(path, name, values["files"][name], hashes)


def _read_sums(path):
    try:
        return sums.read_sums(path)
    except (OSError, ValueError) as error:
        raise damaged(path, sums.NAME, error) from error


def _check_file(path, name, size, hashes):
    """One file against its size and its hash; either may be unknown (None)."""
    file = path / name
    found = file.stat().st_size if file.is_file() else None
    if size is not None and found != size:
        raise damaged(path, name, "missing" if found is None else f"{found} of its {size} bytes are there")
    try:
        if hashes is not None and sums.file_sha256(file) != hashes.get(name):
            raise ValueError(f"its bytes are not those that were written ({sums.NAME})")
    except (OSError, ValueError) as error:
        raise damaged(path, name, error) from error


def damaged(path: Path, file: str, reason: object) -> UserError:
    """The error that names a checkpoint's damaged file, and what to resume from instead."""
    reason = one_line(reason) or type(reason).__name__
    return UserError(f"checkpoint {path} is damaged: {file}: {reason[:200]}{_older(path)}")


def _older(path):
    """What to do about a damaged checkpoint: the end of the error's line."""
    own = step_of(path)
    older = [step for step in steps(path.parent) if own is not None and step < own]
    if not older:
        return f"; there is no older one beside it: remove {path} or give another run.dir to start afresh"
    return f"; remove {path} and the run resumes from {step_path(path.parent, older[-1]).name}"


# ----------------------------------------------------------------------------------------------------------
# How one appears, and goes: rank 0 alone


def clean(directory: Path) -> None:
    """Remove what killed saves left; a checkpoint that was being replaced by a repetition returns."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the checkpoint folder {directory}: {error.strerror}") from error
    for old in directory.glob("step_*.old.tmp"):
        final = old.with_name(old.name.removesuffix(".old.tmp"))
        if not final.exists():
            os.rename(old, final)
    for stale in directory.glob("step_*.tmp"):
        shutil.rmtree(stale)


def temporary_path(final: Path) -> Path:
    """Where a checkpoint is written before it gets its name."""
    return final.with_name(f"{final.name}.tmp")


def begin(temporary: Path) -> None:
    """An empty folder to write in."""
    if temporary.exists():
        shutil.rmtree(temporary)
    temporary.mkdir(parents=True)


def commit(temporary: Path, final: Path, values: dict, files: list[dict[str, tuple[int, str]]]) -> None:
    """When every rank has written its ``files`` ({name: (bytes, SHA-256)}): values, hashes, the flush, the rename."""
    table = temporary / TABLE
    written = {name: facts for part in files for name, facts in part.items()}
    written[TABLE] = (table.stat().st_size, sums.file_sha256(table))
    for name, (size, _) in written.items():
        seen = (temporary / name).stat().st_size if (temporary / name).is_file() else None
        if seen != size:
            raise UserError(
                f"a process on another machine wrote {name} ({size} bytes), of which this one sees {seen}: "
                "run.dir must lie on a file system that all machines share"
            )
    sizes = {name: size for name, (size, _) in written.items()}
    text = json.dumps({**values, "files": sizes, "sums": sums.NAME}, indent=1)
    (temporary / VALUES).write_text(text)
    hashes = {name: digest for name, (_, digest) in written.items()}
    hashes[VALUES] = sums.text_sha256(text)
    for path in (table, temporary / VALUES, sums.write_sums(temporary, hashes), temporary):
        flush_to_disk(path)
    old = final.with_name(f"{final.name}.old.tmp")
    if final.exists():  # the same step again, after a resume from an older checkpoint
        os.rename(final, old)
    os.rename(temporary, final)
    flush_to_disk(final.parent)
    if old.exists():
        shutil.rmtree(old)


def prune(directory: Path, step: int, keep: int) -> None:
    """Remove the oldest checkpoints before ``step`` but the newest ``keep - 1``; ``keep`` 0 keeps all."""
    older = [s for s in steps(directory) if s < step]
    for victim in older[: max(0, len(older) + 1 - keep)] if keep else []:
        path = step_path(directory, victim)
        os.rename(path, temporary_path(path))  # from here on no reader takes it for a checkpoint
        shutil.rmtree(temporary_path(path), ignore_errors=True)
