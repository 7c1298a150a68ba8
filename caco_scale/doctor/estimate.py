"""What a run will cost: steps, hours, GPU-hours and their price, from a measured or stated number of images a second.

    python -m caco_scale.doctor.estimate [RECIPE] [--flags] --gpus 32 [--images-per-second 12800] [--price 2.10]

Measured is what the run's own ``metrics.jsonl`` says; on another number of GPUs it counts in proportion.
"""

import math
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

from caco_scale import config as configuration
from caco_scale.checkpoint import folder
from caco_scale.config import Config
from caco_scale.config.fit import fit
from caco_scale.errors import UserError, exit_on_user_error
from caco_scale.flags.read import shown
from caco_scale.flags.rules import ABOVE_0, PositiveInt
from caco_scale.run.files import read_json_lines

PROG = "python -m caco_scale.doctor.estimate"
IMAGENET = 1_281_167  # training images; what is counted with where no shard set is named
RECENT_LINES = 20


def total_steps(config: Config) -> tuple[int, int, int]:
    """(optimizer steps in all, training images, global batch), by the schedule, and the shard set if one is named."""
    from caco_scale.training.assemble import build_schedule, open_training, training_order

    images = IMAGENET
    store = None
    if config.data.shards or config.data.mix:
        store = open_training(configuration.replace(config, data__cache_dir="none"))
        images = store.manifest.num_samples
    config, _ = fit(config, images)
    batch = config.data.global_batch_size
    if batch > images:
        raise UserError(
            f"data.global_batch_size {batch:,} is more than the {images:,} training images: lower it"
        )
    steps = training_order(config, store).steps_per_epoch if store else images // batch
    schedule = build_schedule(config, steps)
    return min(schedule.total_steps, config.run.max_steps or schedule.total_steps), images, batch


def measured(run_dir: str | Path) -> tuple[float, int] | None:
    """(images per second of all processes, the median of the last lines; processes), or None where none are known.

    Of the newest start that has lines of its own: others may have had more processes or fewer.
    """
    lines = [
        line for line in read_json_lines(Path(run_dir, "metrics.jsonl")) if line.get("images_per_second")
    ]
    stop = math.inf
    for attempt in reversed(list(read_json_lines(Path(run_dir, "attempts.jsonl")))):
        start = attempt["resumed_step"] or 0
        rates = [line["images_per_second"] for line in lines if start < line["step"] <= stop]
        if rates:
            return statistics.median(rates[-RECENT_LINES:]), attempt["world_size"]
        stop = min(stop, start)
    return None


def estimate(
    config: Config, gpus: int, images_per_second: float | None = None, price: float | None = None
) -> list[str]:
    """The lines to print. ``images_per_second``: of all GPUs together; ``price``: of a GPU-hour."""
    steps, images, batch = total_steps(config)
    done = max(folder.steps(Path(config.run.dir, "checkpoints")), default=0)
    which = config.data.shards or " + ".join(config.data.mix) or "ImageNet, for data.shards is empty"
    lines = [f"{steps:,} steps of {batch:,} images ({images:,} in {which}), {done:,} done"]
    source = "stated"
    if not images_per_second:
        found = measured(config.run.dir)
        if not found:
            return [
                *lines,
                "no images/s known: give --images-per-second, or let the run train some steps first",
            ]
        images_per_second = found[0] * gpus / found[1]
        source = f"measured: {found[0]:,.0f} on {found[1]}"
    hours = max(steps - done, 0) * batch / images_per_second / 3600
    cost = f", {hours * gpus * price:,.2f} at {price:g} each" if price else ""
    rate = f"at {images_per_second:,.0f} images/s ({source})"
    return [*lines, f"{rate}: {hours:,.1f} hours on {gpus} GPU(s) = {hours * gpus:,.1f} GPU-hours{cost}"]


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What a run will cost: steps, hours, GPU-hours and their price."""

    takes_recipe: ClassVar[bool] = True

    gpus: PositiveInt
    """GPUs of the run."""
    images_per_second: Annotated[float | None, ABOVE_0, shown("X")] = None
    """Of all GPUs together (default: as measured by the run's metrics.jsonl, in proportion to the GPUs)."""
    price: Annotated[float | None, ABOVE_0, shown("X")] = None
    """Of a GPU-hour (default: no price)."""


@exit_on_user_error
def main(arguments: Sequence[str] | None = None, prog: str = PROG) -> None:
    """Print the estimate; exit code 2 on a user's mistake."""
    from caco_scale.config import parse

    config, flags = parse(sys.argv[1:] if arguments is None else arguments, prog, Estimate)
    for line in estimate(config, flags.gpus, flags.images_per_second, flags.price):
        print(line)


if __name__ == "__main__":
    main()
