"""What the bank sends as rows and ranks grow: bytes counted on gloo processes of this machine, and time.

Bytes are those of the tensors that collectives are called with, turned into what a rank sends by the usual ring
algorithms; the small checks between hosts (pickled shapes) are counted with them.

Shapes: N global batch in two views, K rows, D embedding, R ranks.
"""

import os
import tempfile
import time
import warnings
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.utils._python_dispatch import TorchDispatchMode

from caco_scale.benchmark.bank import BANK_LR, draw_inputs
from caco_scale.benchmark.dense import DenseBank
from caco_scale.benchmark.measure import Measured
from caco_scale.errors import UserError
from caco_scale.method.bank import ShardedBank
from caco_scale.method.bank_rows import initial_rows

# What a rank of R sends, by a ring, in bytes of the collective's first argument.
SENT = {
    "allreduce_": lambda r: 2 * (r - 1) / r,
    "_allgather_base_": lambda r: (r - 1) / r,  # of what it receives
    "allgather_": lambda r: (r - 1) / r,
    "alltoall_base_": lambda r: (r - 1) / r,
    "_reduce_scatter_base_": lambda r: r - 1,  # of the part that it keeps
}


class Traffic(TorchDispatchMode):
    """Counts the bytes that this rank sends in collectives: ``sent``, and their number: ``calls``."""

    def __init__(self, ranks: int):
        super().__init__()
        self.ranks, self.sent, self.calls = ranks, 0.0, 0

    @classmethod
    def _should_skip_dynamo(cls):
        return False  # else every process imports torch.compile, for 3 seconds

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d":
            name = func.__name__.split(".")[0]
            if name not in SENT:
                raise UserError(f"the benchmark does not know how many bytes {name} sends: teach it in SENT")
            self.sent += SENT[name](self.ranks) * _num_bytes(next(iter(args)))
            self.calls += 1
        return func(*args, **(kwargs or {}))


def _num_bytes(tensors: Any) -> int:
    """Of a tensor, or of lists of them: the first argument, which holds what is received or reduced."""
    if isinstance(tensors, torch.Tensor):
        return tensors.nbytes
    return sum(_num_bytes(t) for t in tensors)


def measure(samples: int, sizes: Sequence[int], dim: int, max_ranks: int, rounds: int) -> Measured:
    """``({"rows": [...]}, notes)``: for 1 to ``max_ranks`` ranks and each bank size, both banks."""
    ranks = [r for r in range(1, max_ranks + 1) if samples % r == 0]
    rows = []
    for num_ranks in ranks:
        for size in sizes:
            found = _launch(num_ranks, samples, size, dim, rounds)
            row: dict[str, Any] = {"ranks": num_ranks, "bank_rows": size}
            for name, (sent, calls, seconds) in found.items():
                row |= {
                    f"{name}_bytes": sent,
                    f"{name}_collectives": calls,
                    f"{name}_seconds": round(seconds, 3),
                }
            if row["sharded_bytes"]:
                row["bytes_ratio"] = round(row["replicated_bytes"] / row["sharded_bytes"], 2)
            rows.append(row)
    notes = [
        f"N = {samples:,} in two views, D = {dim}, gloo, one thread a rank; bytes and seconds are those of one step",
        "sharded: queries, keys and statistics travel; replicated: the gradient of all rows is all-reduced",
    ]
    constant = all(
        len({row["sharded_bytes"] for row in rows if row["ranks"] == num_ranks}) == 1 for num_ranks in ranks
    )
    notes.append(f"sharded bytes independent of the bank's size: {'yes' if constant else 'NO'}")
    return {
        "samples": samples,
        "dim": dim,
        "rounds": rounds,
        "rows": rows,
        "independent_of_size": constant,
    }, notes


def _launch(num_ranks: int, *arguments: int) -> dict[str, tuple[int, int, float]]:
    """Rank 0's figures of :func:`both_banks` on ``num_ranks`` processes."""
    with tempfile.TemporaryDirectory(prefix="caco-benchmark-") as folder:
        mp.spawn(_rank, (num_ranks, folder, arguments), nprocs=num_ranks)
        return torch.load(f"{folder}/found", weights_only=True)


def _rank(rank: int, num_ranks: int, folder: str, arguments: tuple[int, ...]) -> None:
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", category=FutureWarning)  # torch renames a collective
    os.environ["RANK"] = str(rank)
    store = dist.FileStore(f"{folder}/store", num_ranks)
    dist.init_process_group(
        "gloo", store=store, rank=rank, world_size=num_ranks, timeout=timedelta(seconds=600)
    )
    found = both_banks(rank, num_ranks, *arguments)
    if rank == 0:
        torch.save(found, f"{folder}/found")
    os._exit(0)  # as errors.run_command does


def both_banks(
    rank: int, num_ranks: int, samples: int, size: int, dim: int, rounds: int
) -> dict[str, tuple[int, int, float]]:
    """``{"sharded" | "replicated": (bytes sent, collectives, least seconds)}`` of a step on this rank's share."""
    queries, keys = draw_inputs(samples, dim, "cpu")
    share = slice(rank * samples // num_ranks, (rank + 1) * samples // num_ranks)
    queries, keys = [q[share] for q in queries], [k[share] for k in keys]
    sharded = ShardedBank(size, dim)
    replicated = DenseBank(initial_rows(0, size, dim, 0, torch.float32, "cpu"), by_autograd=False)

    def step_sharded():
        leaves = [q.clone().requires_grad_() for q in queries]
        result = sharded.contrast(leaves, keys)
        result.loss.backward()
        sharded.step(result, BANK_LR)

    def step_replicated():
        replicated.step([q.clone().requires_grad_() for q in queries], keys, BANK_LR)

    found = {}
    for name, step in (("sharded", step_sharded), ("replicated", step_replicated)):
        with Traffic(num_ranks) as traffic:
            step()
        seconds = []
        for _ in range(rounds):
            dist.barrier()
            start = time.perf_counter()
            step()
            seconds.append(time.perf_counter() - start)
        found[name] = round(traffic.sent), traffic.calls, min(seconds)
    return found
