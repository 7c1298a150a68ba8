"""Linear classifiers on the same features, each with a learning rate of its own, trained side by side.

Shapes: H heads, C classes, F features, B samples of this rank, N of the global batch.
"""

from collections.abc import Iterable, Sequence
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn import functional as F

from caco_scale.distributed import collectives
from caco_scale.errors import UserError
from caco_scale.optim.lars import lars_update, momentum_update
from caco_scale.optim.schedule import cosine_decay

MOMENTUM = 0.9
TRUST_COEFFICIENT = 0.001  # of LARS, as in the authors' linear.py
INITIAL_STD = 0.01
TOP = 5
ROWS = 1024  # samples whose logits exist at once


class LinearHeads:
    """H linear classifiers, the same at the start: weights (H, C, F) normal of 0.01, biases (H, C) zero.

    ``rates``: the H learning rates at the peak. ``optimizer``: ``lars``, which scales weight and bias alike (the
    authors'), or ``sgd``; both with momentum 0.9 and without weight decay. Every rank holds all heads.
    """

    def __init__(
        self,
        rates: Iterable[float],
        num_classes: int,
        num_features: int,
        optimizer: str,
        *,
        device: torch.device | str,
        dtype: torch.dtype,
        seed: int,
    ):
        assert optimizer in ("lars", "sgd"), optimizer
        generator = torch.Generator().manual_seed(seed)
        start = INITIAL_STD * torch.randn(num_classes, num_features, generator=generator, dtype=torch.float64)
        self.rates, self.optimizer = list(rates), optimizer
        self.weight = start.to(device, dtype).repeat(len(self.rates), 1, 1)
        self.bias = torch.zeros(len(self.rates), num_classes, device=device, dtype=dtype)
        self.velocity = torch.zeros_like(self.weight), torch.zeros_like(self.bias)

    def logits(self, features: Tensor) -> Tensor:
        """(B, F) -> (H, B, C)."""
        return torch.matmul(features, self.weight.transpose(1, 2)) + self.bias[:, None]

    def gradients(self, features: Tensor, labels: Tensor, shares: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Mean cross-entropy over all ranks' samples and its gradients: (H,), (H, C, F), (H, C).

        ``features`` (B, F), ``labels`` (B,), ``shares`` (H, B): what a sample counts in each head's mean; over all
        ranks they sum to 1. One all-reduce.
        """
        weight, bias = torch.zeros_like(self.weight), torch.zeros_like(self.bias)
        losses = self.bias.new_zeros(len(self.rates))
        for rows in torch.arange(len(labels), device=labels.device).split(ROWS):
            x, share = features[rows], shares[:, rows]
            log_probability = F.log_softmax(self.logits(x), dim=2)
            chosen = labels[rows].expand(len(self.rates), -1)[:, :, None]
            losses -= (share * log_probability.gather(2, chosen)[:, :, 0]).sum(1)
            residual = log_probability.exp().scatter_add_(2, chosen, -torch.ones_like(chosen, dtype=x.dtype))
            residual *= share[:, :, None]
            weight += residual.transpose(1, 2) @ x
            bias += residual.sum(1)
        packed = collectives.all_reduce_(torch.cat([losses, weight.flatten(), bias.flatten()]))
        losses, weight, bias = packed.split([len(losses), weight.numel(), bias.numel()])
        return losses, weight.view_as(self.weight), bias.view_as(self.bias)

    def step(self, features: Tensor, labels: Tensor, shares: Tensor, factor: float) -> Tensor:
        """One step at ``factor`` times the peak rates -> the losses before it (H,). See :meth:`gradients`."""
        losses, *gradients = self.gradients(features, labels, shares)
        for head, rate in enumerate(self.rates):
            own = [self.weight[head], self.bias[head]]
            moving = (
                [gradient[head] for gradient in gradients],
                [velocity[head] for velocity in self.velocity],
            )
            lr = rate * factor
            if self.optimizer == "lars":
                lars_update(
                    own,
                    *moving,
                    lr=lr,
                    momentum=MOMENTUM,
                    weight_decay=0.0,
                    trust_coefficient=TRUST_COEFFICIENT,
                )
            else:
                momentum_update(own, *moving, lr=lr, momentum=MOMENTUM)
        return losses

    def tensors(self) -> dict[str, Tensor]:
        """All state, by name; loading into them is restoring the heads."""
        return {
            "weight": self.weight,
            "bias": self.bias,
            "weight_velocity": self.velocity[0],
            "bias_velocity": self.velocity[1],
        }

    def finite(self) -> list[bool]:
        """Which heads still are numbers: list of H bools."""
        return (self.weight.flatten(1).isfinite().all(1) & self.bias.isfinite().all(1)).tolist()


def growth(rates: Iterable[float], num_steps: int) -> list[float]:
    """By which power of e LARS can let a tensor grow in ``num_steps`` of a cosine from these rates: a list.

    A step of LARS moves a tensor by at most lr * 0.001 of its norm, momentum repeats it 1 / (1 - 0.9) times.
    """
    steps = sum(cosine_decay(step, num_steps) for step in range(num_steps))
    return [rate * steps * TRUST_COEFFICIENT / (1 - MOMENTUM) for rate in rates]


class Score:
    """Right answers over all images of all ranks: of H heads, by class.

    ``top1``, ``top5`` (H, C) counts; ``images`` (C,) how many there are; ``wrong`` how many of them were never seen;
    ``loss`` (H,) sums of the others' cross-entropies.
    """

    def __init__(self, num_heads: int, num_classes: int):
        self.top1, self.top5 = (torch.zeros(num_heads, num_classes, dtype=torch.int64) for _ in range(2))
        self.images = torch.zeros(num_classes, dtype=torch.int64)
        self.loss = torch.zeros(num_heads, dtype=torch.float64)
        self.wrong = torch.zeros(1, dtype=torch.int64)

    def add(self, logits: Tensor, labels: Tensor) -> None:
        """Logits (H, B, C) of images with ``labels`` (B,), on whatever device."""
        best = logits.topk(min(TOP, logits.shape[2]), dim=2).indices
        right = (best == labels[None, :, None]).cpu()
        chosen = labels.expand(len(logits), -1)[:, :, None]
        self.loss -= F.log_softmax(logits, dim=2).gather(2, chosen).sum((1, 2)).double().cpu()
        labels = labels.cpu()
        self.top1.index_add_(1, labels, right[:, :, 0].long())
        self.top5.index_add_(1, labels, right.any(2).long())
        self.images += torch.bincount(labels, minlength=len(self.images))

    def add_undecodable(self, labels: Sequence[int]) -> None:
        """Images that nothing could be asked about: they count as wrong."""
        self.images += torch.bincount(torch.tensor(labels, dtype=torch.int64), minlength=len(self.images))
        self.wrong += len(labels)

    def over_ranks(self, device: torch.device | str) -> Self:
        """Sum over the ranks; collective. Returns itself."""
        for name in ("top1", "top5", "images", "loss", "wrong"):
            setattr(self, name, collectives.all_reduce_(getattr(self, name).to(device)).cpu())
        return self

    def percent(self, head: int = 0) -> dict[str, Any]:
        """{top1, top5, mean_per_class (of the classes that there are), loss} of a head, and the counts behind them."""
        total, there = int(self.images.sum()), self.images > 0
        judged = total - int(self.wrong)
        if judged == 0:
            raise UserError("there is no image to judge by: none of them decodes, or the set is empty")
        per_class = self.top1[head][there].double() / self.images[there]
        return {
            "top1": 100 * int(self.top1[head].sum()) / total,
            "top5": 100 * int(self.top5[head].sum()) / total,
            "mean_per_class": 100 * per_class.mean().item(),
            "loss": self.loss[head].item() / judged,
            "right": int(self.top1[head].sum()),
            "right_of_5": int(self.top5[head].sum()),
            "images": total,
        }


def score_features(
    heads: LinearHeads, features: Tensor, labels: Tensor, num_classes: int, undecodable: Sequence[int] = ()
) -> Score:
    """:class:`Score` of all heads on features (n, F) of this rank, summed over the ranks. Collective.

    ``undecodable``: labels of this rank's images without features, which count as wrong.
    """
    device, dtype = heads.weight.device, heads.weight.dtype
    score = Score(len(heads.rates), num_classes)
    score.add_undecodable(undecodable)
    for x, y in zip(features.split(ROWS), labels.split(ROWS), strict=True):
        if len(y):
            score.add(heads.logits(x.to(device, dtype)), y.to(device))
    return score.over_ranks(device)
