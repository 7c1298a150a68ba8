"""What a contrast of queries with the bank takes and gives, and its formulae, in which nothing crosses ranks.

Shapes: N global batch, n some of its samples, B this rank's, V views, D embedding, S this rank's rows, T temperatures.
What there is per pair (query view, key view) is (n, V, 2), and a pair that does not exist has weight 0.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from caco_scale.errors import UserError, one_of
from caco_scale.flags.choices import BANK_RULES, BankRule

# Below these exp(s / T), with s from −1 to 1, or its sum over the rows could leave the numbers of the dtype.
MIN_TEMPERATURE = {torch.float32: 0.02, torch.float64: 0.003}


@dataclass(frozen=True)
class Contrast:
    """What one :meth:`ShardedBank.contrast` found: the loss for the encoder and the gradient for the bank.

    Attributes:
        loss: (), differentiable in the queries; the GLOBAL loss (times ``weight``) on every rank.
        positives: per key view the rows (B,) that are this rank's positives; None where they are no rows.
        positive_probability: (), global mean of p at the positive over all pairs; no gradient.
        bank_gradient: (S, D) of this rank's rows (times ``weight``); None where rows do not learn.
        rule: the rule that made it.
        global_positives: (N, 2) positives of the global batch, counted by :meth:`ShardedBank.step`; or None.
        global_keys: (N, 2, D) keys that a queue will take; None for the other rules.
    """

    loss: Tensor
    positives: list[Tensor] | None
    positive_probability: Tensor
    bank_gradient: Tensor | None
    rule: BankRule
    global_positives: Tensor | None
    global_keys: Tensor | None


def pair_weights(
    num_views: int, dtype: torch.dtype = torch.float64, device: torch.device | str = "cpu"
) -> Tensor:
    """Weight (V, 2) of each pair (query view, key view) in the loss and the bank gradient; 0 where i = j.

    Two views: the SUM of both pairs. More: the mean over pairs whose query is a global view plus the mean
    over pairs whose query is a local crop.
    """
    weights = torch.ones(num_views, 2, dtype=dtype, device=device)
    weights[:2].fill_diagonal_(0)
    if num_views > 2:
        weights[:2] /= 2
        weights[2:] /= 2 * (num_views - 2)
    return weights


def softmax_at_positive(
    statistics: Tensor, similarity: Tensor, pairs: Tensor, temperatures: Sequence[float], is_key: bool
) -> tuple[Tensor, list[Tensor]]:
    """log p at the positives, and what e is to be multiplied with for Σ_pairs weight p, for each temperature.

    Args:
        statistics: (n, V, ...): Z for each temperature.
        similarity: (n, V, 2) of the queries with the positives.
        pairs: (V, 2) weights: the pairs of a query differ in them, and in Z where the positive is the key.
        is_key: whether the positive is the key, whose logit is one more beside the K.

    Returns: (T, n, V, 2) log p; list of T factors (n, V, 1).
    """
    log_p, factors = [], []
    for i, t in enumerate(temperatures):
        z = statistics[:, :, i, None]
        if is_key:
            z = z + (similarity / t).exp()
        log_p.append(similarity / t - z.log())
        factors.append((pairs / z).sum(2, keepdim=True))
    return torch.stack(log_p), factors


def tangent_(pull: Tensor, rows: Tensor) -> Tensor:
    """[A − ⟨u, A⟩ u] / ‖W‖ in place of A = ``pull``; it and ``rows`` W are (S, D)."""
    norm = rows.norm(dim=1).clamp_min(1e-12)
    radial = torch.einsum("sd,sd->s", rows, pull) / norm.square()
    return pull.addcmul_(rows, radial[:, None], value=-1).div_(norm[:, None])


class GlobalLoss(torch.autograd.Function):
    """The loss with its gradient already known: autograd keeps dq and nothing else, the backward is local."""

    @staticmethod
    def forward(ctx, loss, dq, *queries):
        ctx.save_for_backward(*(d.to(query.dtype) for d, query in zip(dq.unbind(1), queries, strict=True)))
        return loss.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss):
        return None, None, *((grad_loss * dq).to(dq.dtype) for dq in ctx.saved_tensors)


def complaint(
    queries: Sequence[Tensor],
    keys: Sequence[Tensor],
    rows: Tensor,
    temperature: float,
    bank_temperature: float,
    rule: BankRule,
) -> str | None:
    """What is wrong with this rank's arguments of a contrast with ``rows`` (S, D); None: nothing."""
    try:
        _check_arguments(queries, keys, rows, temperature, bank_temperature, rule)
    except UserError as wrong:
        return str(wrong)
    return None


def _check_arguments(queries, keys, rows, temperature, bank_temperature, rule):
    one_of(rule, BANK_RULES, "bank rule")
    if len(queries) < 2 or len(keys) != 2:
        counts = f"{len(queries)} and {len(keys)}"
        raise UserError(f"contrast takes queries of 2 or more views and keys of 2, got {counts}")
    expected = (len(queries[0]), rows.shape[1])
    for name, views in (("queries", queries), ("keys", keys)):
        for view, x in enumerate(views, start=1):
            found = f"{name} of view {view} are"
            if tuple(x.shape) != expected or not len(x):
                raise UserError(f"{found} {tuple(x.shape)}, expected (batch size, dim) {expected}")
            if x.device != rows.device:
                raise UserError(f"{found} on {x.device}, the bank is on {rows.device}")
    if any(key.requires_grad for key in keys):
        raise UserError(
            "the keys carry a gradient: compute them under torch.no_grad(), only queries are trained"
        )
    lowest = MIN_TEMPERATURE[rows.dtype]
    for name, t in (("temperature", temperature), ("bank temperature", bank_temperature)):
        if not lowest <= t < math.inf:
            raise UserError(
                f"{name} {t}: use at least {lowest}, below it exp((s - 1) / T) leaves {rows.dtype}"
            )
