"""What one training step asks of a machine, counted on CPU processes: the same figures on any machine at any load.

Counted are the operations below autograd that compute something (views and empty tensors are none): on a GPU the host
launches about one kernel for each, a few for one over a list of tensors. Then the results that the host must know
before it can go on, each of which waits for all that a GPU was given; and what crosses ranks: collectives of tensors,
and exchanges of small facts between hosts.
"""

import os
import socket
import tempfile
from collections import Counter
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.multiprocessing as mp
from torch.utils._python_dispatch import TorchDispatchMode

from caco_scale.benchmark.measure import Measured
from caco_scale.benchmark.step import build_ours
from caco_scale.config import Config
from caco_scale.distributed.collectives import gather_if_any
from caco_scale.run.profiling import PARTS, measure_parts_by
from caco_scale.training.assemble import parameter_dtype, view_specs
from caco_scale.training.step import train_step

WAITS = (
    *("_local_scalar_dense", "nonzero", "equal", "is_nonzero", "masked_select", "_unique2", "unique_dim"),
    *("repeat_interleave", "_assert_async"),
)
COLLECTIVES = ("c10d", "_c10d_functional")
NO_COLLECTIVE = ("wait_tensor", "_wrap_tensor_autograd")
HOSTS = "allgather_"  # lists of tensors are gathered for objects alone, between hosts
MADE_EMPTY = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "set_", "resize_")


@dataclass(eq=False)
class Counts(TorchDispatchMode):
    """Counts what is asked for within it.

    Attributes:
        operations: of each part of a step, those that compute.
        waits: the names of operations whose result the host must know, in their order.
        collectives: of tensors, by name.
        exchanges: between hosts.
    """

    operations: Counter = field(default_factory=Counter)
    waits: list[str] = field(default_factory=list)
    collectives: Counter = field(default_factory=Counter)
    exchanges: int = 0
    _part: str = "other"

    def __post_init__(self):
        super().__init__()

    @classmethod
    def _should_skip_dynamo(cls):
        return False  # else it imports torch.compile, for 3 seconds

    def __enter__(self):
        measure_parts_by(self)
        return super().__enter__()

    def __exit__(self, exc_type, exc_val, exc_tb):
        measure_parts_by(None)
        return super().__exit__(exc_type, exc_val, exc_tb)

    @contextmanager
    def measure(self, name: str) -> Generator[None]:
        """What follows belongs to this part of the step."""
        outer, self._part = self._part, name
        yield
        self._part = outer

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.__name__.split(".")[0]
        if func.namespace in COLLECTIVES:
            if name == HOSTS:
                self.exchanges += 1
            elif name not in NO_COLLECTIVE:
                self.collectives[name] += 1
        elif name in WAITS or _by_mask(name, args):
            self.waits.append(name)
        elif func.namespace == "aten" and name not in MADE_EMPTY and not _is_view(func):
            self.operations[self._part] += 1
        return func(*args, **(kwargs or {}))


def _by_mask(name, args):
    """Whether the size of the result depends on a mask's values."""
    return name in ("index", "index_put", "index_put_") and any(
        i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1]
    )


def _is_view(func):
    aliases = [result.alias_info for result in func._schema.returns]
    return any(alias is not None and not alias.is_write for alias in aliases)


def measure(config: Config, processes: Sequence[int]) -> Measured:
    """``({"rows": [...]}, notes)``: one row for each number of processes, of rank 0."""
    rows = []
    for number in processes:
        found = _launch(number, config)
        operations = {name.replace(" ", "_"): found["operations"].get(name, 0) for name in (*PARTS, "other")}
        rows.append(
            {
                "processes": number,
                "operations": sum(operations.values()),
                **{name: count for name, count in operations.items() if count},
                **{name: found[name] for name in ("waits", "collectives", "exchanges")},
            }
        )
    views, batch = config.views, config.data.global_batch_size
    notes = [
        f"{config.recipe}: {config.model.arch}, batch {batch:,}, {2 + views.num_local_crops} views, "
        f"{config.optim.name}, eager, DDP; the first view to the step's end, rank 0",
        "waits: for a result that the host must know; exchanges: between hosts, of small facts",
    ]
    return {"recipe": config.recipe, "arch": config.model.arch, "batch": batch, "rows": rows}, notes


def _launch(number: int, config: Config) -> dict[str, Any]:
    """Rank 0's figures of :func:`count_step` on so many processes."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    with tempfile.TemporaryDirectory(prefix="caco-benchmark-") as folder:
        mp.spawn(_rank, (number, port, folder, config), nprocs=number)
        return torch.load(f"{folder}/found", weights_only=True)


def _rank(rank: int, number: int, port: int, folder: str, config: Config) -> None:
    torch.set_num_threads(1)
    if number > 1:
        os.environ |= {name: str(rank) for name in ("RANK", "LOCAL_RANK")}
        os.environ |= {name: str(number) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE")}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    found = count_step(config)
    if rank == 0:
        found_plain = {
            "operations": dict(found.operations),
            "waits": len(found.waits),
            "collectives": sum(found.collectives.values()),
            "exchanges": found.exchanges,
        }
        torch.save(found_plain, f"{folder}/found")
    os._exit(0)  # as errors.run_command does


def count_step(config: Config) -> Counts:
    """Of a whole step in this process, and of what the loop asks the other ranks after it; two went before."""
    strategy, bank, hp = build_ours(config, "cpu")
    size = config.data.global_batch_size // strategy.world_size
    shapes = [(spec.size, spec.size) for spec in view_specs(config.views, config.data.channels)]
    dtype, channels = parameter_dtype(config), config.data.channels
    views = [torch.randn(size, channels, *shape, dtype=dtype) for shape in shapes]
    if config.precision.channels_last:  # as the augmentation writes them
        views = [view.contiguous(memory_format=torch.channels_last) for view in views]
    for _ in range(2):  # the engine has laid out its buckets
        train_step(strategy, bank, [views], hp)
    with Counts() as counts:
        train_step(strategy, bank, [views], hp)
        gather_if_any(None, False)
    return counts
