"""The order of training samples: a pure function of (seed, epoch, shard counts, lanes, window, global batch).

Nothing here has state that a checkpoint must save, and nothing knows ranks or workers: they only decide who
reads. Global batch t holds the same samples in the same order at any number of processes.

An epoch is laid out so: permute the shards, join them, rotate by a random amount (so that another remainder
is dropped each epoch), cut the row into L equal lanes, permute inside windows of each lane, and let every
global batch take an equal part of every lane. Lanes mix far-apart shards in one batch; windows keep the
shards in use few.

Random numbers are counters through splitmix64, not numpy generators, whose streams may change between
versions.

Shapes: N global batch, L lanes, T steps per epoch, n any number of samples.
"""

import hashlib
import json
from collections.abc import Iterable, Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import ArrayLike, NDArray

from caco_scale.errors import UserError

MASK = 0xFFFFFFFFFFFFFFFF
GOLDEN = np.uint64(0x9E3779B97F4A7C15)
MAX_AUTO_LANES = 64
# What a stream of counters is for; one number each, so that no two uses share random numbers.
SHARDS, ROTATION, WINDOWS, VIEWS = 1, 2, 3, 4


def mix64(x: ArrayLike) -> NDArray[np.uint64]:
    """splitmix64 of every element, a bijection of 64-bit integers: array-like -> uint64, same shape."""
    with np.errstate(over="ignore"):
        x = np.asarray(x, np.uint64) + GOLDEN
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))


def key64(*parts: int | np.integer) -> np.uint64:
    """One 64-bit key from integers; every part and its place count."""
    key = np.uint64(0)
    for part in parts:
        key = mix64(key ^ np.uint64(int(part) & MASK))
    return np.uint64(key)


def permutation(n: int, *parts: int | np.integer) -> NDArray[np.int64]:
    """A random order of ``range(n)``, int64 (n,), that depends only on n and the integer parts."""
    return np.argsort(mix64(np.arange(n, dtype=np.uint64) ^ key64(*parts)), kind="stable")


def uniform(keys: ArrayLike, num: int) -> NDArray[np.floating]:
    """Random numbers in [0, 1): keys (n,) uint64 -> (n, num) float64. Row i depends only on ``keys[i]``."""
    keys = np.asarray(keys, np.uint64)
    with np.errstate(over="ignore"):
        counters = keys[:, None] + np.arange(num, dtype=np.uint64) * GOLDEN
    return (mix64(counters) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def sample_keys(
    seed: int, epoch: int | NDArray[np.integer], sample_ids: ArrayLike, view: int
) -> NDArray[np.uint64]:
    """Keys of one view's random parameters, (n,) uint64: the same for a sample at any topology.

    epoch: of all samples, or of each (n,).
    """
    ids = np.asarray(sample_ids).astype(np.uint64)
    epochs, which = np.unique(epoch, return_inverse=True)
    keys = np.array([key64(seed, one, VIEWS) for one in epochs.tolist()], np.uint64)[which]
    return mix64(mix64(keys ^ ids) ^ key64(view))


def share_size(global_batch_size: int, world_size: int) -> int:
    """Images of a global batch that each process has, N / R. UserError when R does not divide N."""
    if global_batch_size % world_size:
        lower = global_batch_size // world_size * world_size
        raise UserError(
            f"data.global_batch_size {global_batch_size} cannot be divided by {world_size} processes: "
            f"give {lower or world_size} or {lower + world_size}, or another number of processes"
        )
    return global_batch_size // world_size


def rank_share(batch_ids: NDArray[np.int64], rank: int, world_size: int) -> NDArray[np.int64]:
    """Rank r's part of a global batch, ``[r N/R, (r+1) N/R)``; :func:`share_size` raises when R does not divide N."""
    share = share_size(len(batch_ids), world_size)
    return batch_ids[rank * share : (rank + 1) * share]


def auto_lanes(global_batch_size: int) -> int:
    """The largest divisor of the global batch size up to 64."""
    return max(d for d in range(1, MAX_AUTO_LANES + 1) if global_batch_size % d == 0)


def first_ids(counts: ArrayLike) -> NDArray[np.int64]:
    """The id of each shard's first sample, and after them the number of all: counts (s,) -> int64 (s + 1,)."""
    return np.concatenate([[0], np.cumsum(np.asarray(counts, np.int64), dtype=np.int64)])


def locate(first: NDArray[np.int64], ids: ArrayLike) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Where samples lie: ids (n,) -> (shard (n,), position in the shard (n,)). ``first``: of :func:`first_ids`."""
    ids = np.asarray(ids, np.int64)
    shard = np.searchsorted(first, ids, side="right") - 1  # "right" steps over empty shards
    return shard, ids - first[shard]


class Order:
    """The training order of a shard set.

    counts: images per shard; seed; global_batch_size N; lanes L (0: the largest divisor of N up to 64);
    window: the most samples of a lane that are permuted together.
    Raises UserError when the set is smaller than one global batch or the lanes do not divide it.
    """

    def __init__(
        self,
        counts: Iterable[int],
        *,
        seed: int,
        global_batch_size: int,
        lanes: int = 0,
        window: int = 4096,
    ):
        self.counts = np.asarray(list(counts), np.int64)
        self.first = first_ids(self.counts)
        self.num_samples = int(self.counts.sum())
        self.seed, self.global_batch_size, self.window = seed, global_batch_size, window
        self._check(lanes)
        self.lanes = lanes or auto_lanes(global_batch_size)
        self.steps_per_epoch = self.num_samples // global_batch_size
        # The last two epochs: at the end of one its successor's shards are fetched ahead.
        self._cached: dict[int, NDArray[np.int64]] = {}

    def _check(self, lanes):
        size = self.global_batch_size
        if size < 1 or self.window < 1 or lanes < 0:
            raise UserError(
                f"data.global_batch_size {size} and data.window {self.window} must be at least 1, "
                f"data.lanes {lanes} at least 0"
            )
        if self.num_samples < size:
            raise UserError(
                f"the shard set has {self.num_samples} images, fewer than one global batch of {size}: "
                "lower data.global_batch_size or give a larger set"
            )
        if lanes and size % lanes:
            raise UserError(
                f"data.lanes {lanes} does not divide data.global_batch_size {size}: "
                f"use 0 (it picks {auto_lanes(size)}) or a divisor of {size}"
            )

    def epoch(self, epoch: int) -> NDArray[np.int64]:
        """The epoch's sample ids in training order, int64 (T N,), read-only; each N are a global batch."""
        if epoch not in self._cached:
            ids = self._lay_out(epoch)
            ids.flags.writeable = False
            self._cached = dict([*self._cached.items()][-1:]) | {epoch: ids}
        return self._cached[epoch]

    def _lay_out(self, epoch):
        shards = permutation(len(self.counts), self.seed, epoch, SHARDS)
        row = np.concatenate([np.arange(self.first[s], self.first[s + 1]) for s in shards])
        row = np.roll(row, -int(key64(self.seed, epoch, ROTATION) % np.uint64(self.num_samples)))
        part = self.global_batch_size // self.lanes  # of every lane in a global batch
        lane_length = self.steps_per_epoch * part
        lanes = row[: self.lanes * lane_length].reshape(self.lanes, lane_length)
        mixed = mix64(np.arange(lanes.size, dtype=np.uint64) ^ key64(self.seed, epoch, WINDOWS))
        mixed = mixed.reshape(lanes.shape)
        # Windows of nearly equal length: a short last one would hardly be shuffled.
        num_windows = -(-lane_length // self.window)
        edges = [lane_length * w // num_windows for w in range(num_windows + 1)]
        windows = [
            np.take_along_axis(lanes[:, a:b], np.argsort(mixed[:, a:b], axis=1, kind="stable"), axis=1)
            for a, b in pairwise(edges)
        ]
        lanes = np.concatenate(windows, axis=1).reshape(self.lanes, self.steps_per_epoch, part)
        return np.ascontiguousarray(lanes.transpose(1, 0, 2)).reshape(-1)  # by step, then lane

    def batch(self, step: int) -> NDArray[np.int64]:
        """Global batch of a step of the whole run, int64 (N,); its epoch is ``step // steps_per_epoch``."""
        epoch, position = divmod(step, self.steps_per_epoch)
        start = position * self.global_batch_size
        return self.epoch(epoch)[start : start + self.global_batch_size]

    def rounds(self, step: int) -> NDArray[np.int64]:
        """How often each image of a global batch could have come before, (N,): its epoch, by which its views differ."""
        return np.full(self.global_batch_size, step // self.steps_per_epoch)

    def locate(self, ids: ArrayLike) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Where samples lie: ids (n,) -> (shard (n,), position in the shard (n,))."""
        return locate(self.first, ids)

    def fingerprint(self, shard_hashes: Sequence[str]) -> str:
        """sha256 (hex) over all that makes the order: shard hashes and counts, seed, lanes, window, N."""
        assert len(shard_hashes) == len(self.counts)
        parts = [list(shard_hashes), self.counts.tolist(), int(self.seed), self.lanes, self.window]
        return hashlib.sha256(json.dumps([*parts, self.global_batch_size]).encode()).hexdigest()
