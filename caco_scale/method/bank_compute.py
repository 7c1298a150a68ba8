"""Where the rows of one rank compute: what the mathematics of the bank asks of them, and two ways to answer.

A way has two methods. ``rows`` are this rank's (S, D), of any norm; unit rows u = W / ‖W‖ are made as they are needed.

    nearest(rows, keys)                  for each key (Q, D) the largest similarity (Q,) and its lowest row (Q,)
    blocks(rows, query, temperatures)    the queries (N, V, D) in blocks of samples, for each a :class:`Block`

Another kernel is a third class here; nothing crosses ranks in any. No N×K matrix exists in either.

Shapes: N samples, n of them in a block, V views, Q queries or keys, S this rank's rows, D embedding, T temperatures.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from caco_scale.errors import UserError, one_of
from caco_scale.flags.choices import BANK_KERNELS, KERNEL_INPUTS, BankKernel, KernelInputs

# Bytes that a block of queries' exponentials with all own rows takes. They stay until Z is known, for which each block
# waits in one all-reduce: a GPU takes few, large blocks, on a CPU memory counts.
BLOCK_BYTES_CPU = 128 * 2**20
BLOCK_BYTES_GPU = 256 * 2**20
# Fewer queries would be no work for a matrix product; with millions of own rows a block is larger instead.
LEAST_QUERIES = 128
# Bytes of a tile, those of some own rows, which is made, summed and multiplied at a time: on a CPU it should stay in
# the cache meanwhile, on a GPU be worth its kernel launches.
TILE_BYTES_CPU = 8 * 2**20
TILE_BYTES_GPU = 64 * 2**20


@dataclass(frozen=True)
class Block:
    """What a rank's own rows give for a block of queries, e = exp(q·u / T).

    Attributes:
        samples: which of the N.
        sums: (n, V, T) Σ e over the rows, for each temperature.
        attracted: (n, V, D) Σ e u at the first temperature.
        pull_: ``pull_(pull, weighted)`` adds eᵀ weighted at the last temperature to ``pull`` (S, D), in place;
            ``weighted`` (n, V, D) are the block's queries divided by Z. Only until the next block is asked for.
    """

    samples: slice
    sums: Tensor
    attracted: Tensor
    pull_: Callable[[Tensor, Tensor], None]


class Compute(Protocol):
    """A way to compute with one's own rows; see the head of this file."""

    def nearest(self, rows: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]: ...

    def blocks(self, rows: Tensor, query: Tensor, temperatures: Sequence[float]) -> Iterator[Block]: ...


def build_compute(
    kernel: BankKernel, inputs: KernelInputs, most_rows: int, device: torch.device | str, dtype: torch.dtype
) -> Compute:
    """The way that ``bank.kernel`` names. Raises UserError for one that cannot serve such a bank.

    Args:
        inputs: what Triton's matrix products read.
        most_rows: the largest S of any rank.
    """
    one_of(inputs, KERNEL_INPUTS, "bank kernel_inputs")
    if one_of(kernel, BANK_KERNELS, "bank kernel") == "torch":
        return Chunks(most_rows)
    if dtype != torch.float32:
        raise UserError(f"bank kernel triton computes in float32, the bank is {dtype}: use the kernel torch")
    try:
        return Triton(inputs, device)
    except ImportError:
        raise UserError("bank kernel triton needs the package triton: install it, or use torch") from None


class Chunks:
    """torch's own operations: e of a block of queries, tile by tile of rows, kept in memory until Z is known.

    ``most_rows``: the largest S of any rank, so that all ranks make equally many blocks.
    """

    def __init__(self, most_rows: int):
        self.most_rows = most_rows

    def nearest(self, rows: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
        best = keys.new_full((len(keys),), -math.inf)
        found = torch.zeros(len(keys), dtype=torch.int64, device=keys.device)
        for tile in _tiles(rows, len(keys)):
            value, row = (keys @ F.normalize(rows[tile]).T).max(1)  # the first of equals
            found = torch.where(value > best, row + tile.start, found)
            best = torch.where(value > best, value, best)
        return best, found

    def blocks(self, rows: Tensor, query: Tensor, temperatures: Sequence[float]) -> Iterator[Block]:
        num_samples, num_views, _ = query.shape
        num_bytes = BLOCK_BYTES_CPU if rows.device.type == "cpu" else BLOCK_BYTES_GPU
        queries = max(LEAST_QUERIES, num_bytes // (self.most_rows * rows.element_size()))
        length = min(num_samples, max(1, queries // num_views))
        memory = rows.new_empty(length * num_views * len(rows))
        for start in range(0, num_samples, length):
            samples = slice(start, min(start + length, num_samples))
            yield _chunked_block(rows, samples, query[samples], temperatures, memory)


def _tiles(rows, num_queries):
    """The rows in slices, of a limited number of similarities."""
    num_bytes = TILE_BYTES_CPU if rows.device.type == "cpu" else TILE_BYTES_GPU
    length = max(1, num_bytes // (num_queries * rows.element_size()))
    return [slice(start, min(start + length, len(rows))) for start in range(0, len(rows), length)]


def _chunked_block(rows, samples, query, temperatures, memory):
    """The :class:`Block` of ``query`` (n, V, D); ``memory`` keeps e, at T_bank where there are two temperatures."""
    first, *others = temperatures
    scaled = query.flatten(0, 1) * (math.log2(math.e) / first)  # a power of 2 is quicker than one of e
    width = len(scaled)
    kept = [
        (own, memory[width * own.start : width * own.stop].view(width, -1)) for own in _tiles(rows, width)
    ]
    sums = scaled.new_zeros(len(temperatures), width)
    attracted = torch.zeros_like(scaled)
    for own, tile in kept:
        unit = F.normalize(rows[own])
        torch.mm(scaled, unit.T, out=tile)
        e = tile.exp2() if others else tile.exp2_()
        sums[0] += e.sum(1)
        attracted.addmm_(e, unit)
        for i, t in enumerate(others, start=1):
            sums[i] += tile.mul_(first / t).exp2_().sum(1)

    def pull_(pull, weighted):
        for own, tile in kept:
            pull[own].addmm_(tile.T, weighted.flatten(0, 1))

    return Block(samples, sums.T.reshape(*query.shape[:2], -1), attracted.view_as(query), pull_)


class Triton:
    """The kernels of ``kernels.py``, whose exponentials never reach memory: one block, whatever its size.

    ``inputs``: what the matrix products read. Raises ImportError without the package triton, UserError without CUDA.
    """

    def __init__(self, inputs: KernelInputs, device: torch.device | str):
        from caco_scale.method import kernels  # only here: triton is not on every machine

        if torch.device(device).type != "cuda" and not kernels.INTERPRETED:
            raise UserError(
                f"bank kernel triton needs a CUDA device, the bank is on {device}: use the kernel torch"
            )
        self.kernels, self.inputs = kernels, inputs

    def nearest(self, rows: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
        return self.kernels.nearest(keys, F.normalize(rows), self.inputs)

    def blocks(self, rows: Tensor, query: Tensor, temperatures: Sequence[float]) -> Iterator[Block]:
        unit, flat = F.normalize(rows), query.flatten(0, 1)
        sums, attracted = self.kernels.attract(flat, unit, temperatures, self.inputs)

        def pull_(pull, weighted):
            self.kernels.pull_(pull, flat, weighted.flatten(0, 1), unit, temperatures[-1], self.inputs)

        whole = slice(0, len(query))
        yield Block(whole, sums.view(*query.shape[:2], -1), attracted.view_as(query), pull_)
