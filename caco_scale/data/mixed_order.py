"""The order of a mixture: several sets, each with its share of every global batch; a pure function, as ``order``.

Every set goes through epochs of its own, laid out as that of a single set, one behind another over the whole run. Up to
step t it has given as many images as its share of t N, to the nearest whole ones (their differences are a batch's
counts: the error never grows). In a batch the sets' images are spread evenly, so that every process and every
micro-batch has its part of each.

An epoch of the mixture ends, at a whole batch, when the set that its share exhausts first has been seen once.

Shapes: N global batch, S sets.
"""

import hashlib
import json
from collections.abc import Sequence
from fractions import Fraction
from functools import cached_property
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray

from caco_scale.data.order import MAX_AUTO_LANES, Order, first_ids, rank_share
from caco_scale.errors import UserError

LANE_IMAGES = 64  # at least, of each lane: what an epoch leaves out of a set is below this part of it


class MixedOrder(Order):
    """The training order of several sets.

    names: of the sets, for messages; counts: of each, images per shard; weights: of each, above 0, in any unit;
    lanes (0: up to 64) and window: of each set, as of :class:`Order`.
    Raises UserError for a set with less than one image in a batch, or too small for one epoch of a single batch.
    """

    def __init__(
        self,
        names: Sequence[str],
        counts: Sequence[Sequence[int]],
        weights: Sequence[Fraction],
        *,
        seed: int,
        global_batch_size: int,
        lanes: int = 0,
        window: int = 4096,
    ):
        self.counts = np.concatenate([np.asarray(c, np.int64) for c in counts])
        self.first = first_ids(self.counts)
        self.num_samples = int(self.counts.sum())
        self.seed, self.global_batch_size, self.window = seed, global_batch_size, window
        total = sum(weights)
        self.shares = [weight / total for weight in weights]
        self._upper = list(accumulate(self.shares))  # share of the sets up to this one
        sizes = [sum(c) for c in counts]
        self._first_of_set = first_ids(sizes)
        self.lanes = lanes or MAX_AUTO_LANES
        self._parts = [
            _part_order(c, seed, max(1, min(self.lanes, n // LANE_IMAGES)), window)
            for c, n in zip(counts, sizes, strict=True)
        ]
        self._lengths = [part.steps_per_epoch * part.global_batch_size for part in self._parts]
        wanted = [share * global_batch_size for share in self.shares]
        for name, share, images in zip(names, self.shares, wanted, strict=True):
            if images < 1:
                raise UserError(
                    f"data.mix: {name} has a share of {float(share):.3g}, {float(images):.2g} of {global_batch_size:,} "
                    "images: give it a larger weight, or a larger data.global_batch_size"
                )
        epochs = [length // images for length, images in zip(self._lengths, wanted, strict=True)]
        self.steps_per_epoch = int(min(epochs))
        if self.steps_per_epoch < 1:
            which = epochs.index(min(epochs))
            raise UserError(
                f"data.mix: {names[which]} has {sizes[which]:,} images, fewer than its {float(wanted[which]):,.0f} of "
                f"a global batch of {global_batch_size:,}: give a smaller weight or data.global_batch_size"
            )

    def drawn(self, step: int) -> list[int]:
        """How many images of each set are in the batches before ``step``."""
        images = step * self.global_batch_size
        uppers = [(2 * u.numerator * images + u.denominator) // (2 * u.denominator) for u in self._upper]
        return [upper - lower for lower, upper in zip([0, *uppers], uppers, strict=False)]

    def _pieces(self, step):
        """[(set, epoch of its own, from, up to there)] that a global batch is made of, and how they are spread (N,)."""
        pieces, places = [], []
        before, after = self.drawn(step), self.drawn(step + 1)
        for number, (start, stop) in enumerate(zip(before, after, strict=True)):
            length = self._lengths[number]
            for epoch in range(start // length, -(-stop // length)):
                first = epoch * length
                pieces.append((number, epoch, max(start - first, 0), min(stop - first, length)))
            places.append((np.arange(stop - start) + 0.5) / max(1, stop - start))
        return pieces, np.argsort(np.concatenate(places), kind="stable")

    def batch(self, step: int) -> NDArray[np.int64]:
        pieces, spread = self._pieces(step)
        ids = [
            self._parts[number].part(epoch, a, b) + int(self._first_of_set[number])
            for number, epoch, a, b in pieces
        ]
        return np.concatenate(ids)[spread]

    def share(self, step: int, rank: int, world_size: int) -> NDArray[np.int64]:
        return rank_share(self.batch(step), rank, world_size)

    def rounds(self, step: int) -> NDArray[np.int64]:
        pieces, spread = self._pieces(step)
        epochs, counts = zip(*((epoch, b - a) for _, epoch, a, b in pieces), strict=True)
        return np.repeat(epochs, counts)[spread]

    def epoch(self, epoch: int) -> NDArray[np.int64]:
        first = epoch * self.steps_per_epoch
        return np.concatenate([self.batch(step) for step in range(first, first + self.steps_per_epoch)])

    @cached_property
    def _said(self):
        """What makes the order, besides the shards."""
        shares = [[share.numerator, share.denominator] for share in self.shares]
        return [shares, [len(part.counts) for part in self._parts], int(self.seed), self.lanes, self.window]

    def fingerprint(self, shard_hashes: Sequence[str]) -> str:
        assert len(shard_hashes) == len(self.counts)
        parts = ["mix", list(shard_hashes), self.counts.tolist(), self._said, self.global_batch_size]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _part_order(counts, seed, lanes, window):
    """The epochs of one set: rounds of one image from every lane; no part of a round at the end, others each time."""
    return Order(counts, seed=seed, global_batch_size=lanes, lanes=lanes, window=window)
