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
    """Watches the steps of a run. How the bank is used is measured over an epoch, and known at its end.

    Args:
        bank_warmup_steps: before them the bank is not used; an epoch of which they are more than half measures nothing.
        backbone: of the query encoder; a hook keeps its features of a step's first view and micro-batch.
    """

    def __init__(
        self,
        backbone: nn.Module,
        bank: ShardedBank,
        *,
        world_size: int,
        steps_per_epoch: int,
        bank_warmup_steps: int,
        telemetry: Telemetry,
    ):
        self._bank, self._world_size, self._steps_per_epoch = bank, world_size, steps_per_epoch
        self._bank_warmup_steps, self._telemetry = bank_warmup_steps, telemetry
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
        if step % self._steps_per_epoch == 0 and self._measures(step):
            self._last_epoch_bank = self._bank.diagnostics()

    def _measures(self, step):
        """Whether at least half of the last epoch that is over after ``step`` steps came after the bank warm-up."""
        end = step // self._steps_per_epoch * self._steps_per_epoch
        return 2 * (end - self._bank_warmup_steps) >= self._steps_per_epoch

    def figures(self, result: StepResult) -> dict[str, float]:
        """The figures of the step just finished, for the metrics; warns where a collapse begins. Collective."""
        assert self._features is not None, "no forward since before_step"
        std = embedding_std(result.queries)
        rank_of_features = rankme(self._features, max_rows=MAX_RANKME_ROWS)
        most = min(len(result.queries) * self._world_size, self._features.shape[1], MAX_RANKME_ROWS)
        self._sound_alarm(std, rank_of_features, most)
        return {
            **self._of_bank(),
            "embedding_std": std,
            "rankme": rank_of_features,
        }

    def _of_bank(self):
        """How the bank was used in the last epoch; nothing until that is measured, nor of a rule without positives."""
        bank = self._last_epoch_bank or {}
        named = (
            ("row_norm",) if not bank.get("rows_used") else ("rows_used", "assignment_entropy", "row_norm")
        )
        return {f"bank_{name}": bank[name] for name in named if name in bank}

    def _sound_alarm(self, std, rank_of_features, max_rank):
        if self._alarm is None:
            self._alarm = CollapseAlarm(self._bank.dim, max_rank=max_rank)
        warning = self._alarm.check(std, rank_of_features)
        if warning:
            self._telemetry.warn(warning)

    def state_dict(self) -> dict:
        return {"last_epoch_bank": self._last_epoch_bank}

    def load_state_dict(self, values: dict) -> None:
        if self._measures(values["step"]):  # 0.1 kept it of the warm-up, too
            self._last_epoch_bank = values["last_epoch_bank"]
