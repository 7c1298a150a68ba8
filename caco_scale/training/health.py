"""Is the run healthy: do embeddings and features spread, and is the bank used? Figures, and the alarm of a collapse."""

import torch
from torch import nn

from caco_scale.method.bank import ShardedBank
from caco_scale.run.alarm import CollapseAlarm
from caco_scale.run.diagnostics import embedding_std, rankme
from caco_scale.run.telemetry import Telemetry
from caco_scale.training.step import StepResult

MAX_RANKME_ROWS = 512  # of the global batch: a singular value decomposition of more takes longer than a step


class Health:
    """Watches the steps of a run. Rows used and their entropy are counted over an epoch, from its first step on.

    Args:
        backbone: of the query encoder; a hook keeps its features of a step's first view and micro-batch.
    """

    def __init__(
        self,
        backbone: nn.Module,
        bank: ShardedBank,
        *,
        world_size: int,
        steps_per_epoch: int,
        telemetry: Telemetry,
    ):
        self._bank, self._world_size, self._steps_per_epoch = bank, world_size, steps_per_epoch
        self._telemetry = telemetry
        self._last_epoch_bank: dict | None = None  # bank diagnostics of the last whole epoch
        self._alarm: CollapseAlarm | None = None  # made when the width of the features is known
        self._features: torch.Tensor | None = None
        backbone.register_forward_hook(self._keep_features)

    def _keep_features(self, module, inputs, features):
        if self._features is None:
            self._features = features.detach()

    def before_step(self, step: int) -> None:
        """``step`` finished steps are behind us."""
        self._features = None
        if step % self._steps_per_epoch == 0:
            self._bank.reset_assignments()

    def after_step(self, step: int) -> None:
        """``step`` is finished; collective at an epoch's end."""
        if step % self._steps_per_epoch == 0:
            self._last_epoch_bank = self._bank.diagnostics()

    def figures(self, result: StepResult) -> dict[str, float]:
        """The figures of the step just finished, for the metrics; warns where a collapse begins. Collective."""
        assert self._features is not None, "no forward since before_step"
        std = embedding_std(result.queries)
        rank_of_features = rankme(self._features, max_rows=MAX_RANKME_ROWS)
        bank = self._last_epoch_bank or self._bank.diagnostics()  # of the first epoch, what there is of it
        most = min(len(result.queries) * self._world_size, self._features.shape[1], MAX_RANKME_ROWS)
        self._sound_alarm(std, rank_of_features, most)
        return {
            "bank_rows_used": bank["rows_used"],
            "bank_assignment_entropy": bank["assignment_entropy"],
            "bank_row_norm": bank["row_norm"],
            "embedding_std": std,
            "rankme": rank_of_features,
        }

    def _sound_alarm(self, std, rank_of_features, max_rank):
        if self._alarm is None:
            self._alarm = CollapseAlarm(self._bank.dim, max_rank=max_rank)
        warning = self._alarm.check(std, rank_of_features)
        if warning:
            self._telemetry.warn(warning)

    def state_dict(self) -> dict:
        return {"last_epoch_bank": self._last_epoch_bank}

    def load_state_dict(self, values: dict) -> None:
        self._last_epoch_bank = values["last_epoch_bank"]
