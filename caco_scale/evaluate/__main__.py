"""How good is a backbone? ``python -m caco_scale.evaluate {knn,linear,finetune} RUN_OR_WEIGHTS [--flags]``.

RUN_OR_WEIGHTS is a run directory, one of its checkpoints, or a file: an export of this program, or a checkpoint of
CaCo's authors, MoCo, DINO, torchvision or timm; or a Hugging Face directory in timm's layout, also on the
hub (hf://USER/NAME[@REVISION]). --data and --val are shard sets or folders of class folders, so that transfer to
another data set is the same command. One label an image: multi-label sets (PASCAL VOC07) are out of scope.
Several processes:
accelerate launch --config_file "$(caco path ds_configs/ddp.yaml)" --num_processes N -m caco_scale.evaluate ...
"""

import importlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from caco_scale.errors import exit_on_user_error, run_command
from caco_scale.evaluate.flags import EncoderFlags, look_early
from caco_scale.flags.read import Switch, read_command, shown
from caco_scale.flags.rules import ABOVE_0, SEED, PositiveFloat, PositiveInt, at_most

PROG = "python -m caco_scale.evaluate"
LearningRate = Annotated[float, ABOVE_0, at_most(1e6)]


@dataclass(frozen=True, kw_only=True)
class Evaluation(EncoderFlags):
    """What all evaluations are asked."""

    command: ClassVar[str]

    data: Annotated[str | None, shown("TRAIN")] = None
    """Training images, one label each (multi-label sets, VOC07, are out of scope): shard set, image folder, list or
    parquet files (default: those of the run)."""
    val: Annotated[str | None, shown("VAL")] = None
    """Validation images (default: those of the run, or the val/ beside train/ in --data)."""
    seed: Annotated[int, SEED] = 0
    """Seed of everything drawn at random."""
    to: Annotated[str | None, shown("DIR")] = None
    """Folder for progress and result (default: in the run, else runs/evaluate)."""


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
    look_early(flags, flags.data, flags.val, may_be_split=True)
    importlib.import_module(f"caco_scale.evaluate.run_{flags.command}").run(flags)


if __name__ == "__main__":
    run_command(main)
