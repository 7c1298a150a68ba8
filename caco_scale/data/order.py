"""The order of training samples: a pure function of (seed, epoch, shard counts, lanes, window, global batch).

Nothing here has state that a checkpoint must save, and nothing knows ranks or workers: they only decide who
reads. Global batch t holds the same samples in the same order at any number of processes.

An epoch is laid out so: permute the shards, join them, rotate by a random amount (so that another remainder
is dropped each epoch), cut the row into L equal lanes, permute inside windows of each lane, and let every
global batch take an equal part of every lane. Lanes mix far-apart shards in one batch; windows keep the
shards in use few.

Random numbers are counters through splitmix64, not numpy generators, whose streams may change between
versions. A window's depend on its places alone, and where a place of the row lies is a search among the sums of the
permuted shards: so any batch of any epoch is had from the windows that it is in, and nothing as long as the set is
ever held. A process keeps O(shards + lanes x window) numbers.

Shapes: N global batch, L lanes, T steps per epoch, n any number of samples.
"""

import hashlib
import json
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from caco_scale.errors import UserError

MASK = 0xFFFFFFFFFFFFFFFF
GOLDEN = np.uint64(0x9E3779B97F4A7C15)
MAX_AUTO_LANES = 64
MOST_MIXED = 1 << 16  # places that are permuted at a time
# Places of laid out windows that a process keeps; those in use at once, however long, it does.
MOST_KEPT = 1 << 22
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
            f"give {f'{lower} or ' if lower else ''}{lower + world_size}, or another number of processes"
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


class _Lanes(NamedTuple):
    """How an epoch is cut: a lane's images in a global batch, in an epoch, and its windows.

    Windows are of nearly equal length: a short last one would hardly be shuffled.
    """

    part: int
    length: int
    num_windows: int


class _Row(NamedTuple):
    """An epoch's permuted shards, joined and rotated: of each what makes a place an id, and where it begins, (s,)."""

    shifts: NDArray[np.int64]
    first: NDArray[np.int64]
    rotation: int
    num_samples: int

    def ids(self, places):
        """The samples at places of the row, (n,) -> (n,)."""
        places = (places + self.rotation) % self.num_samples
        return places + self.shifts[locate(self.first, places)[0]]


def _column(numbers):
    return np.asarray(numbers, np.int64)[:, None]


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
        part = global_batch_size // self.lanes  # of every lane in a global batch
        lane_length = self.steps_per_epoch * part
        self._lanes = _Lanes(part, lane_length, -(-lane_length // window))
        self._forget()

    def _forget(self):
        """Begin with nothing laid out."""
        self._rows: OrderedDict[int, _Row] = OrderedDict()  # by epoch
        self._windows: OrderedDict[tuple[int, int, range], NDArray[np.integer]] = OrderedDict()
        self._kept = 0  # places in these

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k not in ("_rows", "_windows")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget()

    def _check(self, lanes):
        size = self.global_batch_size
        if size < 1 or self.window < 1 or lanes < 0:
            raise UserError(
                f"data.global_batch_size {size} and data.window {self.window} must be at least 1, "
                f"data.lanes {lanes} at least 0"
            )
        if self.num_samples < size:
            fits = 1 << max(self.num_samples.bit_length() - 1, 0)
            raise UserError(
                f"the shard set has {self.num_samples} images, fewer than one global batch of {size}: "
                f"give --data.global_batch_size {fits}, or a larger set"
            )
        if lanes and size % lanes:
            raise UserError(
                f"data.lanes {lanes} does not divide data.global_batch_size {size}: "
                f"use 0 (it picks {auto_lanes(size)}) or a divisor of {size}"
            )

    def epoch(self, epoch: int) -> NDArray[np.int64]:
        """The epoch's sample ids in training order, int64 (T N,), all at once; each N are a global batch."""
        return self._steps(epoch, range(self.steps_per_epoch), range(self.lanes))

    def part(self, epoch: int, start: int, stop: int) -> NDArray[np.int64]:
        """The same from place ``start`` up to ``stop``, int64 (stop - start,)."""
        size = self.global_batch_size
        steps = range(start // size, -(-stop // size))
        return self._steps(epoch, steps, range(self.lanes))[start - steps.start * size :][: stop - start]

    def batch(self, step: int) -> NDArray[np.int64]:
        """Global batch of a step of the whole run, int64 (N,); its epoch is ``step // steps_per_epoch``."""
        return self.share(step, 0, 1)

    def share(self, step: int, rank: int, world_size: int) -> NDArray[np.int64]:
        """:func:`rank_share` of a step's global batch, int64 (N / R,); only the lanes that it is of are laid out."""
        size, (epoch, position) = (
            share_size(self.global_batch_size, world_size),
            divmod(step, self.steps_per_epoch),
        )
        part, start = self._lanes.part, rank * size
        lanes = range(start // part, -(-(start + size) // part))
        return self._steps(epoch, range(position, position + 1), lanes)[start - lanes.start * part :][:size]

    def _steps(self, epoch, steps, lanes):
        """Sample ids of some steps of an epoch, of each from some lanes: by step, then lane; int64."""
        part, length, num_windows = self._lanes
        place, end = steps.start * part, steps.stop * part
        found = [np.empty((len(lanes), 0), np.int64)]  # a mixture may ask for none
        while place < end:  # window by window
            window = ((place + 1) * num_windows - 1) // length
            a, b = (length * w // num_windows for w in (window, window + 1))
            found.append(self._window(epoch, window, a, b, lanes)[:, place - a : end - a] + np.int64(a))
            place = b
        places = np.concatenate(found, axis=1) + _column(lanes) * length
        places = places.reshape(len(lanes), len(steps), part).transpose(1, 0, 2).reshape(-1)
        return self._row(epoch).ids(places)

    def _window(self, epoch, window, a, b, lanes):
        """The permutation of places ``a`` to ``b`` of some lanes, (lanes, b - a), from 0 up."""
        key = epoch, window, lanes
        if key in self._windows:
            self._windows.move_to_end(key)
            return self._windows[key]
        found = np.empty((len(lanes), b - a), np.min_scalar_type(b - a))
        seed = key64(self.seed, epoch, WINDOWS)
        starts = _column(lanes).astype(np.uint64) * np.uint64(self._lanes.length)
        together = max(1, MOST_MIXED // (b - a))  # what argsort makes is four times as large as what is kept
        for row in range(0, len(lanes), together):
            counters = starts[row : row + together] + np.arange(a, b, dtype=np.uint64)
            found[row : row + together] = np.argsort(mix64(counters ^ seed), axis=1, kind="stable")
        self._windows[key] = found
        self._kept += found.size
        while len(self._windows) > 2 and self._kept > MOST_KEPT:
            self._kept -= self._windows.popitem(last=False)[1].size
        return found

    def _row(self, epoch):
        """The epoch's row of shards; at its end those of its successor are fetched ahead."""
        if epoch not in self._rows:
            shards = permutation(len(self.counts), self.seed, epoch, SHARDS)
            rotation = int(key64(self.seed, epoch, ROTATION) % np.uint64(self.num_samples))
            ends = first_ids(self.counts[shards])
            self._rows[epoch] = _Row(self.first[:-1][shards] - ends[:-1], ends, rotation, self.num_samples)
            while len(self._rows) > 2:
                self._rows.popitem(last=False)
        return self._rows[epoch]

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
