"""The rows that a bank starts with, of which every rank draws its own.

Shapes: D embedding.
"""

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
