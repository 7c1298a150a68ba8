"""Measure against straightforward peers, in one run: a table, the machine, one JSON object on the last line.

    python -m caco_scale.benchmark {bank,step,counts,scale,loader} [--save DIR]

Every figure that matters is a ratio, so that it can be repeated on any machine.
"""

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal

from caco_scale.benchmark.measure import Measured
from caco_scale.config import Config, parse
from caco_scale.config.fit import auto_fields
from caco_scale.errors import UserError, exit_on_user_error
from caco_scale.flags.read import pick, read, shown, summary
from caco_scale.flags.rules import PositiveFloat, PositiveInt

PROG = "python -m caco_scale.benchmark"
# What a measurement imports stands in its ``run``: --help and a typo are answered at once.


def _cores() -> int:
    return len(os.sched_getaffinity(0))


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """What all benchmarks are asked."""

    save: Annotated[str | None, shown("DIR")] = None
    """Write the JSON there, too, under a dated name."""


@dataclass(frozen=True, kw_only=True)
class Bank(Benchmark):
    """A step of the sharded bank against dense banks."""

    samples: PositiveInt = 2048
    """Samples, each in two views."""
    size: PositiveInt = 65536
    """Bank rows."""
    dim: PositiveInt = 256
    """Size of an embedding."""
    rounds: PositiveInt = 3
    """Times that each is measured, in turn."""
    threads: PositiveInt = field(default_factory=_cores)
    """Threads of each contender."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where it runs."""

    def run(self) -> tuple[str, Measured]:
        from caco_scale.benchmark.bank import measure

        case = (self.samples, self.size, self.dim, self.rounds, self.threads, self.device)
        return "one step of the bank: loss, gradients, update", measure(*case)


@dataclass(frozen=True, kw_only=True)
class Step(Benchmark):
    """The training step of a recipe against the same in fp32, eager, with a dense bank."""

    takes_recipe: ClassVar[bool] = True

    steps: PositiveInt = 4
    """Steps in a round."""
    rounds: PositiveInt = 3
    """Times that each is measured, in turn."""
    threads: PositiveInt = field(default_factory=_cores)
    """Threads of each contender."""

    def run(self, config: Config) -> tuple[str, Measured]:
        import torch

        from caco_scale.benchmark.step import measure
        from caco_scale.training.assemble import resolve_precision
        from caco_scale.training.checks import Start, check_temperatures

        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        config, line = resolve_precision(config, device)
        check_temperatures(Start(config, "ddp", 0, 1, device))
        result, notes = measure(config, self.steps, self.rounds, self.threads, device.type)
        return "one training step, augmentation included", (result, [*notes, line])


@dataclass(frozen=True, kw_only=True)
class Counted(Benchmark):
    """Operations, host waits and collectives of a recipe's training step, counted on CPU: no clock."""

    takes_recipe: ClassVar[bool] = True

    processes: tuple[PositiveInt, ...] = (1, 2)
    """Numbers of processes, which divide the batch."""

    def run(self, config: Config) -> tuple[str, Measured]:
        import torch

        from caco_scale.benchmark.counts import measure
        from caco_scale.training.assemble import resolve_precision
        from caco_scale.training.checks import Start, check_temperatures

        device, batch = torch.device("cpu"), config.data.global_batch_size
        config, _ = resolve_precision(config, device)
        check_temperatures(Start(config, "ddp", 0, 1, device))
        if uneven := [number for number in self.processes if batch % number]:
            raise UserError(f"--processes {uneven[0]} does not divide --data.global_batch_size {batch:,}")
        return "what one training step asks for, augmentation aside", measure(config, self.processes)


@dataclass(frozen=True, kw_only=True)
class Scale(Benchmark):
    """Bytes that the bank sends as rows and ranks grow (gloo), and a run on paper."""

    samples: PositiveInt = 240
    """Samples of the global batch, each in two views."""
    dim: PositiveInt = 128
    """Size of an embedding."""
    ranks: PositiveInt = 4
    """Most ranks."""
    rounds: PositiveInt = 2
    """Times that each step is timed; the least counts."""
    sizes: tuple[PositiveInt, ...] = (4096, 16384, 65536)
    """Bank rows."""
    gpu_images_per_second: PositiveFloat = 2500.0
    """For the run on paper: what one of your GPUs trains of a supervised ResNet-50 (2,500 is an assumption)."""

    def run(self) -> tuple[str, Measured]:
        from caco_scale.benchmark.paper import Inputs, work_out
        from caco_scale.benchmark.scale import measure

        result, notes = measure(self.samples, self.sizes, self.dim, self.ranks, self.rounds)
        inputs = Inputs(supervised_images_per_second=self.gpu_images_per_second)
        result |= {"paper_inputs": vars(inputs), "paper": work_out(inputs)}
        return "what a rank sends for the bank in one step", (result, notes)


@dataclass(frozen=True, kw_only=True)
class Loader(Benchmark):
    """Two views of JPEGs against torchvision, at equal work."""

    images: Annotated[str | None, shown("DIR")] = None
    """Folder of class folders (default: 240 JPEGs are drawn)."""
    rounds: PositiveInt = 3
    """Times that each is measured, in turn."""
    batch: PositiveInt = 60
    """Images per batch."""
    size: PositiveInt = 224
    """Side of a view in pixels."""

    def run(self) -> tuple[str, Measured]:
        from caco_scale.benchmark.loader import measure

        return "two views per image, one process", measure(self.images, self.rounds, self.batch, self.size)


COMMANDS: dict[str, type[Any]] = {
    "bank": Bank,
    "step": Step,
    "counts": Counted,
    "scale": Scale,
    "loader": Loader,
}


@exit_on_user_error
def main(arguments: Sequence[str] | None = None, prog: str = PROG) -> None:
    """One benchmark; exit code 2 on a user's mistake."""
    listed = {name: summary(kind) for name, kind in COMMANDS.items()}
    name, rest = pick(listed, sys.argv[1:] if arguments is None else arguments, prog, __doc__ or "")
    kind, more = COMMANDS[name], []
    if getattr(kind, "takes_recipe", False):  # its flags stand beside the recipe's
        config, options = parse(rest, f"{prog} {name}", kind)
        if fields := auto_fields(config):
            raise UserError(
                f"{', '.join(fields)}: auto needs a set of images, and none is read here: give numbers"
            )
        more = [config]
    else:
        options = read(kind, rest, f"{prog} {name}")
    from caco_scale.benchmark.report import describe_machine, publish, show

    machine = describe_machine()
    title, (result, notes) = options.run(*more)
    show(title, result["rows"], machine, notes)
    if "paper" in result:
        show("ResNet-50, 800 epochs, batch 4,096, 32 GPUs, on paper: nothing of it was run", result["paper"])
    publish(name, machine, result, options.save)


if __name__ == "__main__":
    main()
