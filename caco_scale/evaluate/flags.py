"""The flags of every command that gives images to an encoder: which encoder, what images it is given, and how many.

Imports no torch: the flags, and whether there is what they name, are answered before it is loaded.
"""

import os
from dataclasses import dataclass, field
from typing import Annotated, Literal

from tyro.conf import Positional

from caco_scale.data.store import kind_at
from caco_scale.data.store.folder import split_folders
from caco_scale.distributed.environment import is_on_one_node
from caco_scale.flags.choices import Encoder, Stem
from caco_scale.flags.read import shown
from caco_scale.flags.rules import ABOVE_0, FROM_0, Count, PositiveFloat, at_most
from caco_scale.method.architectures import refuse_unknown
from caco_scale.weights.place import place_of

Colours = tuple[Annotated[float, FROM_0], ...]
Deviations = tuple[PositiveFloat, ...]


@dataclass(frozen=True, kw_only=True)
class EncoderFlags:
    """An encoder, and the images that it is given."""

    weights: Positional[Annotated[str, shown("RUN_OR_WEIGHTS")]]
    """Run directory, checkpoint directory, file of weights, Hugging Face directory in timm's layout, or one on the hub:
    hf://USER/NAME[@REVISION]."""
    which: Annotated[Encoder | None, shown("{query,key}")] = None
    """Encoder, where there are two (default: query; of DINO key, its teacher)."""
    step: Annotated[int | None, FROM_0, shown("N")] = None
    """Checkpoint of the run (default: the newest)."""
    arch: Annotated[str | None, shown("ARCH")] = None
    """Architecture in a file of weights (default: found out); your own package.module:callable of a run that has it."""
    stem: Annotated[Stem | None, shown("{imagenet,cifar}")] = None
    """First layer in a file of weights (default: found out)."""
    size: Annotated[int | None, ABOVE_0, at_most(8192), shown("PIXELS")] = None
    """Side of the images (default: the run's, which its exports say; else 224, of the cifar stem 32)."""
    resize: Annotated[int | None, ABOVE_0, at_most(16384), shown("PIXELS")] = None
    """Shorter side before the central --size is cut out (default: the run's, else 256 for 224 in proportion, and --size
    itself, whole images, up to 96)."""
    mean: Annotated[Colours | None, shown("R G B ...")] = None
    """Mean of the colours (default: the run's, which its exports say; else ImageNet's)."""
    std: Annotated[Deviations | None, shown("R G B ...")] = None
    """Standard deviation of the colours (default: the run's, which its exports say; else ImageNet's)."""
    precision: Literal["fp32", "bf16", "fp64"] = "fp32"
    """Number format of the encoder."""
    images_at_once: Annotated[int, ABOVE_0, at_most(2**20)] = 256
    """Images per forward and process."""
    workers: Annotated[int, FROM_0, at_most(1024)] = field(
        default_factory=lambda: min(4, len(os.sched_getaffinity(0)))
    )
    """Loader processes per process."""
    cache_dir: str = "auto"
    """Where whole shards of an object store are kept."""
    world_size: Count = 0
    """Processes that must be there; 0 = unchecked."""
    timeout_seconds: PositiveFloat = 1800
    """Wait for another process, or for the loader."""


def look_early(
    flags: EncoderFlags, data: str | None, val: str | None = None, may_be_split: bool = False
) -> None:
    """Refuse what this process sees is not there: encoder, architecture, ``--data``, ``--val``. Of several nodes none.

    ``may_be_split``: ``data`` alone may be a folder that holds train and val. Raises UserError, as the command itself.
    """
    if not is_on_one_node(os.environ):
        return
    place_of(flags.weights, flags.step)
    if flags.arch is not None:
        refuse_unknown(flags.arch)
    if val is not None:
        kind_at(val, "--val")
    if data is not None and not (may_be_split and val is None and split_folders(data)):
        kind_at(data, "--data")
