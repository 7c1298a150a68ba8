"""Images that do not decode: each is recorded once, and too many of them end the run."""

from collections.abc import Iterable

from caco_scale.config import Config
from caco_scale.errors import UserError
from caco_scale.run.directory import CORRUPT, RunDirectory
from caco_scale.run.telemetry import Telemetry


class CorruptImages:
    """All that a run has met, on any rank; ``corrupt.jsonl`` has them with step and substitute.

    Args:
        num_samples: images of the training set, of which ``data.max_corrupt`` is a share.
        hint: what to do about them, in words.
    """

    def __init__(
        self, config: Config, num_samples: int, hint: str, directory: RunDirectory, telemetry: Telemetry
    ):
        self._data, self._num_samples, self._hint = config.data, num_samples, hint
        self._directory, self._telemetry = directory, telemetry
        self._file = directory.path / CORRUPT
        self._errors: dict[str, str] = {}  # key -> why it did not decode

    def __len__(self) -> int:
        return len(self._errors)

    def record(self, step: int, entries: Iterable[dict]) -> None:
        """What the ranks met in ``step``: {"key", "error", "substitute"} each, the same entries on every rank.

        Raises:
            UserError: there are more than ``data.max_corrupt`` allows.
        """
        for entry in entries:
            if entry["key"] not in self._errors:
                self._record(step, entry)
        if len(self._errors) > self._data.max_corrupt * self._num_samples:
            shown = ", ".join(list(self._errors)[:10])
            raise UserError(
                f"{len(self._errors)} of {self._num_samples:,} images do not decode, more than data.max_corrupt "
                f"{self._data.max_corrupt:g}: {shown}{' ...' if len(self._errors) > 10 else ''} (all in {self._file}): "
                f"{self._hint}, or raise the limit"
            )

    def _record(self, step, entry):
        self._errors[entry["key"]] = entry["error"]
        self._directory.append(CORRUPT, {"step": step, **entry})
        self._telemetry.warn(
            f"{entry['key']} does not decode ({entry['error']}); trained on {entry['substitute']}"
        )

    def state_dict(self) -> dict:
        return {"corrupt": self._errors}

    def load_state_dict(self, values: dict) -> None:
        self._errors = values["corrupt"]
