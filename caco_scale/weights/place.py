"""What RUN_OR_WEIGHTS names on the disk, looked at before anything is loaded. Imports no torch."""

import os
from pathlib import Path
from typing import Literal

from caco_scale.checkpoint.folder import checkpoint_of
from caco_scale.errors import UserError
from caco_scale.weights.address import FORM, HubAddress, hub_address

CONFIG = "config.json"


def is_hub_directory(path: Path) -> bool:
    """Whether a directory is one of Hugging Face, and none of a run, which has no config.json."""
    return path.is_dir() and (path / CONFIG).is_file()


def place_of(
    path: str | Path, step: int | None = None
) -> tuple[Literal["run", "hub", "file"], Path] | tuple[Literal["address"], HubAddress]:
    """The kind of source that a user means, and its place: of a run a checkpoint's directory.

    ``step``: of a run's checkpoints, None: the newest. Of an address on the hub only its form is looked at. Raises
    UserError: nothing there, no such checkpoint, no such form.
    """
    if address := hub_address(path):
        if step is not None:
            raise UserError(f"--step chooses one of a run's checkpoints, but {address} is none: drop it")
        return "address", address
    path = Path(path)
    if not os.path.exists(path):  # pathlib raises for a name that no file can have
        raise UserError(
            f"{path} does not exist: give a run directory, one of its checkpoints, a file of weights, or {FORM}"
        )
    is_hub = is_hub_directory(path)
    if path.is_dir() and not is_hub:
        return "run", checkpoint_of(path, step)
    if step is not None:
        raise UserError(
            f"--step chooses one of a run's checkpoints, but {path} is {'none' if is_hub else 'a file'}: drop it"
        )
    return ("hub" if is_hub else "file"), path
