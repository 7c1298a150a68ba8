"""The flags of every command that gives images to an encoder: which encoder, what images it is given, and how many."""

import os
from dataclasses import dataclass, field
from typing import Annotated, Literal

from tyro.conf import Positional

from caco_scale.flags.choices import Encoder, Stem
from caco_scale.flags.read import shown
from caco_scale.flags.rules import ABOVE_0, FROM_0, Count, PositiveFloat, at_most

Colours = tuple[Annotated[float, FROM_0], ...]
Deviations = tuple[PositiveFloat, ...]


@dataclass(frozen=True, kw_only=True)
class EncoderFlags:
    """An encoder, and the images that it is given."""

    weights: Positional[Annotated[str, shown("RUN_OR_WEIGHTS")]]
    """Run directory, checkpoint directory, file of weights, or Hugging Face directory in timm's layout."""
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
