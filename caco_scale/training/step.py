"""One update of CaCo (arXiv:2203.14370), the algorithm on one screen.

Shapes: B this rank's micro-batch, V views (the two global ones first), D embedding.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch

from caco_scale.distributed.strategies.base import Strategy
from caco_scale.method.bank import ShardedBank
from caco_scale.method.ema import ema_update
from caco_scale.optim.schedule import HyperParameters
from caco_scale.run.profiling import part


@dataclass
class StepResult:
    """What one step did.

    ``loss``: 0-dim tensor, global, equal on all ranks. ``moved``: False if the step was not finite and changed
    nothing. ``positive_probability``: 0-dim tensor, global mean probability of the positives. ``queries``: (B, D)
    of view 1, last micro-batch, for diagnosis.
    """

    loss: torch.Tensor
    moved: bool
    positive_probability: torch.Tensor
    queries: torch.Tensor


class MicroBatches(Protocol):
    """A step's micro-batches: of each its V views, (B, 3, H, W), the two global ones first. A list will do."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[list[torch.Tensor]]: ...


def train_step(
    strategy: Strategy, bank: ShardedBank, micro_batches: MicroBatches, hp: HyperParameters
) -> StepResult:
    """One optimizer step on this rank's share of the global batch.

    Args:
        strategy: wraps the query and key encoders.
        hp: of this step.

    Crosses ranks: queries, keys and per-row statistics (the bank), gradients (the strategy), BatchNorm statistics.
    """
    strategy.buffers.keep()
    contrasts = []
    for micro_step, views in enumerate(micro_batches, start=1):
        with strategy.micro_step(is_last=micro_step == len(micro_batches)):
            queries, keys = strategy(views)  # unit norm; keys carry no gradient
            with part("bank"):
                contrast = bank.contrast(
                    queries,
                    keys,
                    temperature=hp.temperature,
                    bank_temperature=hp.bank_temperature,
                    rule=hp.rule,
                    weight=1 / len(micro_batches),
                    agree_once=True,  # the start has seen to it that a step is the same on all ranks
                )
            with part("backward"):
                strategy.backward(contrast.loss)
            contrasts.append(contrast)
    loss = torch.stack([contrast.loss.detach() for contrast in contrasts]).sum()
    # 1. the encoder minimises the loss; a step that is not finite moves nothing, on every rank alike
    with part("optimizer"):
        moved = strategy.step(loss, lr=hp.lr)  # the step's one look at the device: may the rest follow?
    if moved:
        with part("bank step"):
            bank.step(contrasts, lr=hp.bank_lr)  # 2. the bank follows the queries
        with part("ema"):  # 3. the key encoder follows the query encoder
            ema_update(strategy.module.query, strategy.module.key, hp.key_momentum)
    else:
        strategy.buffers.restore()
    probability = torch.stack([contrast.positive_probability for contrast in contrasts]).mean()
    return StepResult(loss, moved, probability, queries[0].detach())
