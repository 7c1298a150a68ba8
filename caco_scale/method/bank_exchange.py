"""What crosses ranks for the nearest row and for the softmax over all rows: one number per query, or whole rows.

A way has two methods, both collective; ``rows`` are this rank's. The two ways are equal in result.

    nearest(rows, keys)                          the row of the whole bank nearest to each key; of equals the lowest
    totals(rows, query, positives, temperatures) a function (samples, own) -> what all ranks' rows give, for what one's
                                                 own rows gave for those samples: [Σ e for each T | positives' s]

Shapes: N global batch, n some of its samples, V views, Q keys, T temperatures, K rows, S this rank's, D embedding.
"""

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from caco_scale.distributed import collectives
from caco_scale.errors import one_of
from caco_scale.flags.choices import BANK_EXCHANGES, BankExchange
from caco_scale.method.bank_compute import Compute

Totals = Callable[[slice, Tensor], Tensor]


def build_exchange(
    exchange: BankExchange, compute: Compute, size: int, group: dist.ProcessGroup | None
) -> "Statistics | Logits":
    """The way that ``bank.exchange`` names, for a bank of ``size`` rows. Raises UserError for an unknown one."""
    if one_of(exchange, BANK_EXCHANGES, "bank exchange") == "logits":
        return Logits(size, group)
    return Statistics(compute, size, group)


class Statistics:
    """Sums: per query (T,) and its similarity with the positives; per key the best (value, row)."""

    def __init__(self, compute: Compute, size: int, group: dist.ProcessGroup | None):
        self.compute, self.size, self.group = compute, size, group
        self.start = collectives.shard_range(size, collectives.world_size(group), collectives.rank(group))[0]

    def nearest(self, rows: Tensor, keys: Tensor) -> Tensor:
        values, found = self.compute.nearest(rows, keys)
        found = found + self.start
        if values.dtype == torch.float32:
            packed = pack_nearest(values, found, self.size)
            return unpack_nearest(collectives.all_reduce_(packed, dist.ReduceOp.MAX, self.group), self.size)
        largest = collectives.all_reduce_(values.clone(), dist.ReduceOp.MAX, self.group)
        found = torch.where(values == largest, found, self.size - 1)
        return collectives.all_reduce_(found, dist.ReduceOp.MIN, self.group)

    def totals(
        self, rows: Tensor, query: Tensor, positives: Tensor | None, temperatures: Sequence[float]
    ) -> Totals:
        return lambda samples, own: collectives.all_reduce_(own, group=self.group)


class Logits:
    """Whole rows of similarities (B, K), to the rank that owns the query, which takes an ordinary softmax over them."""

    def __init__(self, size: int, group: dist.ProcessGroup | None):
        self.size, self.group = size, group
        self.rank, self.num_ranks = collectives.rank(group), collectives.world_size(group)

    def similarities(self, rows: Tensor, queries: Tensor) -> Tensor:
        """(B, K) of one's own queries, from all ranks' queries (R·B, D) with one's own rows; collective."""
        return collectives.exchange_row_blocks(queries @ F.normalize(rows).T, self.size, self.group)

    def nearest(self, rows: Tensor, keys: Tensor) -> Tensor:
        return collectives.all_gather_rows(self.similarities(rows, keys).argmax(1), self.group)

    def totals(
        self, rows: Tensor, query: Tensor, positives: Tensor | None, temperatures: Sequence[float]
    ) -> Totals:
        num_views = query.shape[1]
        whole = self.similarities(rows, query.flatten(0, 1)).view(-1, num_views, self.size)
        columns = torch.stack([(whole / t).exp().sum(2) for t in temperatures], dim=2)
        if positives is not None:
            own = slice(*collectives.shard_range(len(query), self.num_ranks, self.rank))
            own = positives[own, None].expand(-1, num_views, -1)
            columns = torch.cat([columns, whole.gather(2, own)], dim=2)
        totals = collectives.all_gather_rows(columns, self.group)
        return lambda samples, own: totals[samples]


def pack_nearest(values: Tensor, rows: Tensor, size: int) -> Tensor:
    """Order-preserving int64 of (float32 value, row): the larger value wins, on a tie the lower row."""
    bits = (values + 0.0).view(torch.int32).long()  # + 0.0: −0.0 and 0.0 tie
    ordered = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)  # of negative floats the larger pattern is less
    return ordered * 2**32 + (size - 1 - rows)


def unpack_nearest(packed: Tensor, size: int) -> Tensor:
    """The row of :func:`pack_nearest`."""
    return size - 1 - (packed & 0xFFFFFFFF)
