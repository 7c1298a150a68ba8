"""The folder of a run's checkpoints: names, what is complete, and how one appears or goes all at once.

Nothing here needs torch. A checkpoint is written as ``step_XXXXXXXX.tmp`` and renamed last; the one that a repetition
of its step replaces is ``step_XXXXXXXX.old.tmp`` meanwhile.
"""

import json
import os
import re
import shutil
from pathlib import Path

from caco_scale.atomic import flush_to_disk
from caco_scale.errors import UserError, one_line

FORMAT = 1


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


def read_values(path: str | Path) -> dict:
    """The JSON values of a checkpoint: the caller's, and step, torch, world_size, shapes and files.

    Raises:
        UserError: no checkpoint there; a damaged one; one of a newer version.
    """
    path = Path(path)
    if not path.is_dir():
        raise UserError(f"no checkpoint at {path}: give the path of a checkpoints/step_XXXXXXXX folder")
    try:
        values = json.loads((path / "values.json").read_text())
        version = values["format"]
        assert isinstance(values["shapes"], dict)
        assert isinstance(values["files"], dict)
    except FileNotFoundError:
        raise UserError(
            f"{path} is not a checkpoint of this program: it has no values.json{_older(path)}"
        ) from None
    except (OSError, ValueError, KeyError, TypeError, AssertionError) as error:
        raise damaged(path, "values.json", error) from error
    if version != FORMAT:
        raise UserError(
            f"checkpoint {path} has format {version}, this version reads {FORMAT}: update caco_scale"
        )
    return values


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


def commit(temporary: Path, final: Path, values: dict, files: list[dict[str, int]]) -> None:
    """When every rank has written its ``files`` ({name: bytes}): the values, the flush, the rename."""
    table = temporary / ".metadata"
    sizes = {name: size for part in files for name, size in part.items()}
    sizes[table.name] = table.stat().st_size
    for name, size in sizes.items():
        seen = (temporary / name).stat().st_size if (temporary / name).is_file() else None
        if seen != size:
            raise UserError(
                f"a process on another machine wrote {name} ({size} bytes), of which this one sees {seen}: "
                "run.dir must lie on a file system that all machines share"
            )
    with open(temporary / "values.json", "w") as stream:
        json.dump({**values, "files": sizes}, stream, indent=1)
    for path in (table, temporary / "values.json", temporary):
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
