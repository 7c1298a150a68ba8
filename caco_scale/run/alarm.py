"""The alarm of collapse: which figures are too low, and what is said of them, once. Imports no torch."""

import math

# Spread = standard deviation times sqrt(D): 1 for embeddings that fill the sphere evenly, 0 for a single
# point. Measured on the demo (D = 64, F = 128, batch 128): a healthy run stays above 0.76 and RankMe above
# 32; one with too high a learning rate and no bank warm-up, which ends below the accuracy of raw pixels, has
# 0.18 to 0.35 and 8 to 17.
LOW_SPREAD = 0.4
LOW_RANKME = 8.0
# A figure must rise this far above its threshold before the episode is over and the alarm may sound again.
RECOVERY = 1.5


def collapse_warning(
    std: float, dim: int, rankme: float | None = None, *, max_rank: float = math.inf, margin: float = 1.0
) -> str | None:
    """One line that names the figure that is too low and what to try, or None while both are healthy.

    ``std``: :func:`embedding_std`; ``dim``: D; ``rankme``: :func:`rankme`, None if it was not measured;
    ``max_rank``: the most it can be, min(N, F). Thresholds, times ``margin``: spread std·sqrt(D) below 0.4;
    RankMe below 8, or below max_rank / 8 for batches or features under 64. A figure that is not finite counts
    as too low.
    """
    spread = std * math.sqrt(dim)
    signs = []
    if not spread >= LOW_SPREAD * margin:
        signs.append(
            f"the embeddings' standard deviation is {std:.2g}, {spread:.0%} of a healthy {dim**-0.5:.2g}"
        )
    if rankme is not None and not rankme >= min(LOW_RANKME, max_rank / 8) * margin:
        signs.append(f"the features' RankMe is {rankme:.1f}, so they span only about that many directions")
    if not signs:
        return None
    return (
        f"the encoder may be collapsing: {' and '.join(signs)}. "
        "Try a longer bank warm-up (bank.warmup_epochs), a lower bank.lr, ema.momentum nearer to 1, "
        "a lower optim.lr with a longer optim.warmup_epochs; check that loss.temperature and "
        "bank.temperature are near 0.08 and that the images differ"
    )


class CollapseAlarm:
    """Says :func:`collapse_warning` once per episode.

    An episode begins after ``patience`` checks in a row below a threshold (the first steps of a healthy run
    may look collapsed) and ends when every figure is 1.5 times its threshold again.
    """

    def __init__(self, dim: int, max_rank: float = math.inf, patience: int = 5):
        self.dim, self.max_rank, self.patience = dim, max_rank, patience
        self._low_checks = 0
        self._raised = False

    @property
    def is_raised(self) -> bool:
        """Whether an episode has begun and is not over."""
        return self._raised

    def check(self, std: float, rankme: float | None = None) -> str | None:
        """The figures of now; returns the warning when an episode begins, None otherwise."""
        margin = RECOVERY if self._raised else 1.0
        warning = collapse_warning(std, self.dim, rankme, max_rank=self.max_rank, margin=margin)
        if self._raised:
            self._raised = warning is not None
            self._low_checks = 0
            return None
        self._low_checks = self._low_checks + 1 if warning else 0
        self._raised = self._low_checks >= self.patience
        return warning if self._raised else None
