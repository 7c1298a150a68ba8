"""How good is a backbone? ``python -m caco_scale.evaluate {knn,linear,finetune} RUN_OR_WEIGHTS [--flags]``.

RUN_OR_WEIGHTS is a run directory, one of its checkpoints, or a file: an export of this program, or a checkpoint of
CaCo's authors, MoCo, DINO, torchvision or timm. --data and --val are shard sets or folders of class folders, so that
transfer to another data set is the same command. One label an image: multi-label sets (PASCAL VOC07) are out of scope.
Several processes: accelerate launch --config_file ds_configs/ddp.yaml --num_processes N -m caco_scale.evaluate ...
"""

import importlib
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal

from tyro.conf import Positional

from caco_scale.errors import exit_on_user_error, run_command
from caco_scale.flags.choices import Encoder, Stem
from caco_scale.flags.read import Switch, read_command, shown
from caco_scale.flags.rules import ABOVE_0, FROM_0, SEED, Count, PositiveFloat, PositiveInt, at_most

PROG = "python -m caco_scale.evaluate"
Colours = tuple[Annotated[float, FROM_0], Annotated[float, FROM_0], Annotated[float, FROM_0]]
Deviations = tuple[PositiveFloat, PositiveFloat, PositiveFloat]
LearningRate = Annotated[float, ABOVE_0, at_most(1e6)]


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What all evaluations are asked."""

    command: ClassVar[str]

    weights: Positional[Annotated[str, shown("RUN_OR_WEIGHTS")]]
    """Run directory, checkpoint directory, or file of weights."""
    data: Annotated[str | None, shown("TRAIN")] = None
    """Training images, one label each (multi-label sets, VOC07, are out of scope): shard set or image folder (default:
    those of the run)."""
    val: Annotated[str | None, shown("VAL")] = None
    """Validation images (default: those of the run, or the val/ beside train/ in --data)."""
    which: Annotated[Encoder | None, shown("{query,key}")] = None
    """Encoder, where there are two (default: query; of DINO key, its teacher)."""
    step: Annotated[int | None, FROM_0, shown("N")] = None
    """Checkpoint of the run (default: the newest)."""
    arch: Annotated[str | None, shown("ARCH")] = None
    """Architecture in a file of weights (default: found out)."""
    stem: Annotated[Stem | None, shown("{imagenet,cifar}")] = None
    """First layer in a file of weights (default: found out)."""
    size: Annotated[int | None, ABOVE_0, at_most(8192), shown("PIXELS")] = None
    """Side of the images (default: the run's, which its exports say; else 224, of the cifar stem 32)."""
    resize: Annotated[int | None, ABOVE_0, at_most(16384), shown("PIXELS")] = None
    """Shorter side before the central --size is cut out (default: the run's, else 256 for 224 in proportion, and --size
    itself, whole images, up to 96)."""
    mean: Annotated[Colours | None, shown("R G B")] = None
    """Mean of the colours (default: the run's, which its exports say; else ImageNet's)."""
    std: Annotated[Deviations | None, shown("R G B")] = None
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
    seed: Annotated[int, SEED] = 0
    """Seed of everything drawn at random."""
    to: Annotated[str | None, shown("DIR")] = None
    """Folder for progress and result (default: in the run, else runs/evaluate)."""
    world_size: Count = 0
    """Processes that must be there; 0 = unchecked."""
    timeout_seconds: PositiveFloat = 1800
    """Wait for another process, or for the loader."""


@dataclass(frozen=True, kw_only=True)
class Knn(Evaluation):
    """Weighted k-nearest-neighbour accuracy of features and embeddings, exact."""

    command = "knn"

    k: Annotated[tuple[PositiveInt, ...], shown("N [N ...]")] = ()
    """Neighbours that vote (default: 10 20 100 200)."""
    temperature: tuple[PositiveFloat, ...] = (0.07, 0.1, 0.2)
    """Of the votes' weights exp(similarity / T)."""


@dataclass(frozen=True, kw_only=True)
class Training(Evaluation):
    """What evaluations that train are asked."""

    epochs: Annotated[int | None, ABOVE_0, at_most(100_000), shown("N")] = None
    """Epochs (default: linear 100, with --fast 10 but at least 2000 steps; finetune 30, of less than 5% of the labels
    60)."""
    batch_size: Annotated[int | None, ABOVE_0, at_most(2**24), shown("N")] = None
    """Images per step over all processes (default: linear 4096, with --fast at most 256; finetune 1024)."""


@dataclass(frozen=True, kw_only=True)
class Linear(Training):
    """A linear classifier on frozen features, as the paper trains it, or --fast."""

    command = "linear"

    fast: Switch = False
    """Sweep many learning rates in one pass over the images."""
    crops: Literal["random", "centre"] = "random"
    """Of the training images with --fast: random crops and flips, as in the paper, or one centre crop each, as fast
    probes of many others (features of all are held in memory). Figures of the two differ by points: do not mix them."""
    lr: Annotated[tuple[LearningRate, ...], shown("LR [LR ...]")] = ()
    """Per 256 images (default: 0.025, the authors' command; --fast: 0.001 to 30, the best on held-out images)."""


@dataclass(frozen=True, kw_only=True)
class Finetune(Training):
    """Encoder and classifier trained on a share of the labels (SimCLR's optimizer; its images by --list)."""

    command = "finetune"

    fraction: Annotated[float, ABOVE_0, at_most(1)] = 1.0
    """Of the labels, drawn by our own seed class by class, at least one of each: 0.01, 0.1, 1.0."""
    list: Annotated[str | None, shown("FILE")] = None
    """Instead of --fraction: the images to train on, a name a line like n02484975_1.JPEG (SimCLR's 1percent.txt)."""
    lr: Annotated[float | None, ABOVE_0, at_most(1e6), shown("LR")] = None
    """Per 256 images (default: 0.05)."""


COMMANDS: dict[str, type[Evaluation]] = {kind.command: kind for kind in (Knn, Linear, Finetune)}


def parse(arguments: Sequence[str], prog: str = PROG) -> Evaluation:
    """Flags of the command line, checked as far as they can be without looking at anything else."""
    return read_command(COMMANDS, arguments, prog, __doc__ or "")[1]


@exit_on_user_error
def main(arguments: Sequence[str] | None = None, prog: str = PROG) -> None:
    """One evaluation; exit code 0 with ``result.json`` written, 2 on a user's mistake."""
    flags = parse(sys.argv[1:] if arguments is None else arguments, prog)
    importlib.import_module(f"caco_scale.evaluate.run_{flags.command}").run(flags)


if __name__ == "__main__":
    run_command(main)
