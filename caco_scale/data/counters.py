"""What the stores of a process did, in one object for all of them."""

import threading
from collections import Counter
from collections.abc import Mapping

# "data_..." in the metrics.
COUNTERS = ("bytes", "requests", "retries", "hits", "misses", "evictions", "damaged")


class Counters:
    """Counts of a process, added by a store, its object store and its cache, from any thread.

    A pickle of it is empty: a worker counts what it does itself, and its batches bring that to the trainer.
    """

    def __init__(self) -> None:
        self._lock, self._counts = threading.Lock(), Counter()

    def __reduce__(self):
        return Counters, ()

    def __getitem__(self, name: str) -> int:
        return self._counts[name]

    def add(self, name: str, number: int = 1) -> None:
        """Count once more, or ``number`` times."""
        with self._lock:
            self._counts[name] += number

    def merge(self, taken: Mapping[str, int]) -> None:
        """Add what another process has taken."""
        with self._lock:
            self._counts.update(taken)

    def take(self) -> dict[str, int]:
        """The counts since the last call; they begin anew."""
        with self._lock:
            taken, self._counts = self._counts, Counter()
        return dict(taken)
