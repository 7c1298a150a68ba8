"""Steps that were not finite: they moved nothing, are counted, and several in a row end the run."""

from caco_scale.errors import UserError
from caco_scale.run.telemetry import Telemetry


class SkippedSteps:
    """``total`` of the run, and how many of them in a row just now.

    Args:
        most_in_a_row: ``run.max_skipped``.
    """

    def __init__(self, most_in_a_row: int, telemetry: Telemetry):
        self.total = self._in_a_row = 0
        self._most_in_a_row, self._telemetry = most_in_a_row, telemetry

    def count(self, step: int, moved: bool) -> None:
        """``step`` is finished, and ``moved`` something or was not finite.

        Raises:
            UserError: it was the last that ``run.max_skipped`` allows.
        """
        if moved:
            self._in_a_row = 0
            return
        self.total += 1
        self._in_a_row += 1
        self._telemetry.log_event(step, {"skipped_step": step, "skipped": self.total})
        self._telemetry.warn(f"step {step:,} was not finite and changed nothing")
        if self._in_a_row >= self._most_in_a_row:
            raise UserError(
                f"step {step}: {self._in_a_row} steps in a row were not finite (run.max_skipped "
                f"{self._most_in_a_row}): start again in another run.dir with a lower optim.lr, or with "
                "precision.compute fp32"
            )

    def state_dict(self) -> dict:
        return {"skipped": self.total, "skipped_in_a_row": self._in_a_row}

    def load_state_dict(self, values: dict) -> None:
        self.total, self._in_a_row = values["skipped"], values["skipped_in_a_row"]
