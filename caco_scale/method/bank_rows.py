"""The rows that a bank starts with, of which every rank draws its own; and the next rows of a queue of keys.

Shapes: N global batch, K rows, S this rank's rows, D embedding.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F

# Initial rows are drawn in blocks of this many, each from its own seed, so that a rank draws only its own.
ROWS_PER_SEED = 4096


def initial_rows(
    start: int, stop: int, dim: int, seed: int, dtype: torch.dtype, device: torch.device | str
) -> torch.Tensor:
    """Rows ``start <= row < stop`` of the seeded random bank: the same however many ranks share them.

    Gaussian directions of unit norm. A row's gradient is divided by its norm, so a row that the warm-up has
    not filled learns as fast as one that it has (a plain randn row of 256 dimensions would turn 256 times
    more slowly).
    """
    rows = torch.empty(stop - start, dim, dtype=dtype)
    for block in range(start // ROWS_PER_SEED, -(-stop // ROWS_PER_SEED)):
        generator = torch.Generator().manual_seed((seed * 2**24 + block + 0xCAC0) % 2**63)
        drawn = F.normalize(torch.randn(ROWS_PER_SEED, dim, generator=generator).double())
        first = block * ROWS_PER_SEED
        begin, end = max(start, first), min(stop, first + ROWS_PER_SEED)
        rows[begin - start : end - start] = drawn[begin - first : end - first]
    return rows.to(device)


def enqueue_(
    rows: torch.Tensor,
    rows_range: tuple[int, int],
    size: int,
    pointer: int,
    keys: Sequence[torch.Tensor],
    num_ranks: int,
) -> int:
    """Overwrite a bank's next rows, modulo K, by a step's keys; this rank's ``rows`` (S, D) in place -> next pointer.

    ``keys``: (N, 2, D) from each micro-step. The order is the global batch's, all of view 1 and then all of view 2. A
    rank's share of that batch is its micro-batches one after another, hence (view, rank, micro-step, sample).
    """
    by_rank = torch.cat([k.view(num_ranks, -1, *k.shape[1:]) for k in keys], dim=1)
    ordered = by_rank.permute(2, 0, 1, 3).reshape(-1, rows.shape[1])
    skipped = max(0, len(ordered) - size)  # more keys than rows: the last ones stay
    first = (pointer + skipped) % size
    before_wrap = skipped + size - first
    for row, values in ((first, ordered[skipped:before_wrap]), (0, ordered[before_wrap:])):
        start, stop = rows_range
        begin, end = max(start, row), min(stop, row + len(values))
        if begin < end:
            rows[begin - start : end - start] = values[begin - row : end - row]
    return (pointer + len(ordered)) % size
