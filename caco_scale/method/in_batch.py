"""Contrast with the batch itself, over all ranks: the other samples are the negatives, the bank has no part in them.

Two kinds (T the temperature, m and n samples of the global batch), for a pair of query view i and key view j:

    inbatch    −log exp(q_n·k_n / T) / Σ_m exp(q_n·k_m / T)       SimCLR's negatives, with keys of a momentum encoder:
                                                                  the loss of MoCo v3 (arXiv:2104.02057) but for its 2T
    nnclr      −log exp(y_n·q_n / T) / Σ_m exp(y_n·q_m / T)       y the row nearest to k_n, q after a predictor
                                                                  (arXiv:2104.14548, equation 3 and its pseudocode)

Both are means over N. So ``inbatch`` holds a query against all keys, ``nnclr`` a nearest neighbour against all queries.
As every rule of this loop, and unlike the NNCLR paper, they sum the two directions and take keys from the momentum
encoder; NNCLR's queue takes both views' keys, where the paper's takes the first view's of its one encoder.

Shapes: N global batch, B this rank's, V views, D embedding. What there is per pair is (..., V, 2).
"""

import torch
import torch.distributed as dist
from torch import Tensor

from caco_scale.distributed import collectives


def contrast_in_batch(
    query: Tensor,
    other: Tensor,
    own: slice,
    pairs: Tensor,
    temperature: float,
    over_queries: bool,
    group: dist.ProcessGroup | None,
) -> tuple[Tensor, Tensor]:
    """log p at the positives of all samples, and T N times the gradient of this rank's queries. Collective.

    Args:
        query: (N, V, D) of all ranks, unit norm.
        other: (N, 2, D) of all ranks, unit norm: the keys, or the rows nearest to them. A sample's own is its positive.
        own: this rank's samples.
        pairs: (V, 2) weights.
        over_queries: whether one ``other`` is held against all queries, as nnclr does, or one query against all others.

    Returns: log p (N, V, 2), the same on every rank; (B, V, D). Crosses ranks: one number per sample and pair.
    """
    e = torch.einsum("mvd,njd->mvjn", query[own] / temperature, other).exp_()
    if over_queries:
        z = collectives.all_reduce_(e.sum(0).permute(2, 0, 1).contiguous(), group=group)
        e /= z.permute(1, 2, 0)
    else:
        z = collectives.all_gather_rows(e.sum(3), group)
        e /= z[own, ..., None]
    log_p = torch.einsum("nvd,njd->nvj", query, other) / temperature - z.log()
    pulled = torch.einsum("vj,mvjn,njd->mvd", pairs, e, other)
    return log_p, pulled - torch.einsum("vj,mjd->mvd", pairs, other[own])
