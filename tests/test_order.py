"""The training order: exactly once, the same at any topology, never changed silently."""

import pickle
import random
import tracemalloc
from itertools import pairwise

import numpy as np
import pytest

from caco_scale.data.order import (
    ROTATION,
    SHARDS,
    WINDOWS,
    Order,
    auto_lanes,
    key64,
    mix64,
    permutation,
    rank_share,
    sample_keys,
    uniform,
)
from caco_scale.errors import UserError

UNEVEN = [7, 1, 0, 13]
GOLDEN_MIX = [16294208416658607535, 10451216379200822465, 16490336266968443936]
GOLDEN_KEY = 15020427595393229491
GOLDEN_PERMUTATION = [0, 4, 5, 3, 2, 7, 1, 6]
GOLDEN_EPOCH = [11, 17, 3, 5, 14, 18, 4, 9, 12, 20, 1, 6, 13, 16, 0, 7, 15, 19, 2, 8]
GOLDEN_WINDOWED = [139, 148, 156, 164, 175, 184, 193, 201, 210, 219, 228, 1]
GOLDEN_SAMPLE_KEYS = [13289276251857160476, 13603916546916530294]
GOLDEN_UNIFORM = [[0.8833108082136426, 0.43152799704850997], [0.386768045983934, 0.7523070158382239]]
GOLDEN_FINGERPRINT = "65f6a17035c9351d"


def make(counts=(100, 100, 37), seed=3, global_batch_size=24, **options):
    return Order(counts, seed=seed, global_batch_size=global_batch_size, **options)


def test_golden_values():
    """These numbers are in every checkpoint's future: a change here breaks the resume of existing runs."""
    assert [int(x) for x in mix64([0, 1, 2**64 - 1])] == GOLDEN_MIX
    assert int(key64(1, 2, 3)) == GOLDEN_KEY
    assert permutation(8, 5, 77).tolist() == GOLDEN_PERMUTATION
    assert make(UNEVEN, seed=0, global_batch_size=4).epoch(0).tolist() == GOLDEN_EPOCH
    assert make(window=4).epoch(2)[:12].tolist() == GOLDEN_WINDOWED
    assert [int(x) for x in sample_keys(1, 2, [0, 9], 1)] == GOLDEN_SAMPLE_KEYS
    np.testing.assert_array_equal(uniform(np.array([0, 5], np.uint64), 2), GOLDEN_UNIFORM)
    assert make().fingerprint(["a", "b", "c"])[:16] == GOLDEN_FINGERPRINT


def test_splitmix64_is_the_published_generator():
    """splitmix64 in plain integers (Steele, Lea, Flood 2014): the n-th output is mix64 of the n-th state."""
    state, outputs = 0, []
    for _ in range(5):
        state = (state + 0x9E3779B97F4A7C15) % 2**64
        z = state
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
        outputs.append(z ^ (z >> 31))
    states = np.arange(5, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    assert [int(x) for x in mix64(states)] == outputs


@pytest.mark.parametrize("counts", [(100, 100, 37), UNEVEN, (240,), (1,) * 50, (0, 0, 24)])
def test_each_sample_at_most_once_and_all_but_the_remainder(counts):
    order = make(counts, global_batch_size=4)
    for epoch in range(4):
        ids = order.epoch(epoch)
        assert len(ids) == sum(counts) // 4 * 4 == order.steps_per_epoch * 4
        assert len(np.unique(ids)) == len(ids)
        assert ids.min() >= 0
        assert ids.max() < sum(counts)


def test_the_dropped_remainder_rotates():
    order = make((50, 50), global_batch_size=32)  # 4 of 100 dropped each epoch
    dropped = [frozenset(range(100)) - frozenset(order.epoch(epoch).tolist()) for epoch in range(100)]
    assert all(len(d) == 4 for d in dropped)
    assert len(set(dropped)) > 50
    assert len(frozenset().union(*dropped)) > 90


def test_a_pure_function_of_its_arguments():
    first = [make().epoch(epoch).copy() for epoch in range(3)]
    backwards = make()
    again = [backwards.epoch(epoch).copy() for epoch in (2, 1, 0)][::-1]
    for a, b in zip(first, again, strict=True):
        np.testing.assert_array_equal(a, b)
    assert not np.array_equal(first[0], first[1])
    assert not np.array_equal(first[0], make(seed=4).epoch(0))
    assert not np.array_equal(first[0], make(lanes=2).epoch(0))
    assert not np.array_equal(first[0], make(window=5).epoch(0))


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 6])
def test_ranks_together_read_the_same_global_batch(world_size):
    order = make()
    for step in (0, 5, order.steps_per_epoch, 3 * order.steps_per_epoch + 2):
        batch = order.batch(step)
        shares = [rank_share(make().batch(step), rank, world_size) for rank in range(world_size)]
        np.testing.assert_array_equal(np.concatenate(shares), batch)
        assert {len(share) for share in shares} == {24 // world_size}


def test_steps_run_over_epochs():
    order = make()
    steps = [order.batch(step) for step in range(2 * order.steps_per_epoch)]
    np.testing.assert_array_equal(np.concatenate(steps), np.concatenate([order.epoch(0), order.epoch(1)]))


def test_every_lane_gives_an_equal_part_of_every_batch():
    """Un-shuffled positions: with a window of 1 a lane is a contiguous run of the rotated row of shards."""
    order = make((60, 60), global_batch_size=12, lanes=4, window=1)
    batches = order.epoch(0).reshape(order.steps_per_epoch, 4, 3)
    for lane in range(4):
        run = batches[:, lane].reshape(-1)
        breaks = np.flatnonzero(np.diff(run) != 1)
        assert len(run) == 30
        assert len(breaks) <= 2  # at most a shard's end and the row's end


def test_windows_bound_how_far_a_sample_moves():
    order = make((4000,), global_batch_size=8, lanes=1, window=100)
    row = order.epoch(0)
    start = (row[:100].min(), row[:100].max())
    far = make((4000,), global_batch_size=8, lanes=1, window=4000).epoch(0)
    assert len(set(row[:100])) == 100
    assert start[1] - start[0] in (99, 3999)  # one run of 100, or one over the end of the row
    assert far[:100].max() - far[:100].min() > 2000


def test_pairs_do_not_meet_again_more_than_by_chance():
    order = make((1000,) * 8, global_batch_size=64)
    batch_of = np.empty((2, 8000), int)
    for epoch in range(2):
        ids = order.epoch(epoch)
        batch_of[epoch, ids] = np.arange(len(ids)) // 64
    again = 0
    for batch in range(order.steps_per_epoch):
        together = np.bincount(batch_of[1, batch_of[0] == batch])
        again += int((together * (together - 1)).sum())
    by_chance = order.steps_per_epoch * 64 * 63 / order.steps_per_epoch
    assert 0.8 < again / by_chance < 1.2


def test_imagenet_is_laid_out():
    order = Order([1000] * 1281 + [167], seed=0, global_batch_size=4096)
    assert order.num_samples == 1_281_167
    assert order.steps_per_epoch == 312
    assert order.lanes == 64
    seen = np.zeros(order.num_samples, bool)
    seen[order.epoch(7)] = True
    assert seen.sum() == 312 * 4096
    shard, _ = order.locate(order.batch(7 * 312))
    assert len(np.unique(shard)) > 64  # a batch mixes far-apart shards


def test_locate():
    order = make(UNEVEN, global_batch_size=4)
    shard, position = order.locate(np.arange(21))
    expected = [(s, p) for s, count in enumerate(UNEVEN) for p in range(count)]
    assert list(zip(shard.tolist(), position.tolist(), strict=True)) == expected


def test_lanes():
    assert [auto_lanes(n) for n in (1, 8, 96, 128, 127, 4096, 60)] == [1, 8, 48, 64, 1, 64, 60]
    assert make(lanes=6).lanes == 6


def test_fingerprint_depends_on_everything():
    hashes = ["a", "b", "c"]
    base = make().fingerprint(hashes)
    others = [
        make().fingerprint(["a", "b", "d"]),
        make((100, 101, 37)).fingerprint(hashes),
        make(seed=4).fingerprint(hashes),
        make(lanes=3).fingerprint(hashes),
        make(window=9).fingerprint(hashes),
        make(global_batch_size=48).fingerprint(hashes),
    ]
    assert len({base, *others}) == 7
    assert make().fingerprint(hashes) == base


def test_random_numbers():
    keys = sample_keys(0, 0, np.arange(5000), 0)
    values = uniform(keys, 4)
    assert values.min() >= 0
    assert values.max() < 1
    np.testing.assert_allclose(values.mean(0), 0.5, atol=0.02)
    np.testing.assert_allclose(np.corrcoef(values.T), np.eye(4), atol=0.05)
    np.testing.assert_array_equal(uniform(keys[7:9], 4), values[7:9])
    np.testing.assert_array_equal(uniform(keys, 2), values[:, :2])
    others = [sample_keys(1, 0, [3], 0), sample_keys(0, 1, [3], 0), sample_keys(0, 0, [3], 1), keys[3:4]]
    assert len({int(x[0]) for x in others}) == 4


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"global_batch_size": 238}, "237 images, fewer than one global batch of 238"),
        ({"lanes": 7}, "data.lanes 7 does not divide data.global_batch_size 24: use 0"),
        ({"global_batch_size": 0}, "data.global_batch_size 0"),
        ({"window": 0}, "data.window 0"),
        ({"lanes": -1}, "data.lanes -1"),
        ({"counts": []}, "0 images"),
    ],
)
def test_errors(options, words):
    with pytest.raises(UserError, match=words):
        make(**options)


def test_a_world_size_that_does_not_divide_the_batch():
    with pytest.raises(UserError, match="24 cannot be divided by 5 processes: give 20 or 25"):
        rank_share(make().batch(0), 0, 5)


def laid_out(counts, seed, epoch, size, lanes, window):
    """A whole epoch as one array, (T N,): what every batch is compared with. Of versions before 0.2, to the letter."""
    first, total, steps = np.concatenate([[0], np.cumsum(counts)]), sum(counts), sum(counts) // size
    shards = permutation(len(counts), seed, epoch, SHARDS)
    row = np.concatenate([np.arange(first[s], first[s + 1]) for s in shards])
    row = np.roll(row, -int(key64(seed, epoch, ROTATION) % np.uint64(total)))
    part = size // lanes
    length = steps * part
    rows = row[: lanes * length].reshape(lanes, length)
    mixed = mix64(np.arange(rows.size, dtype=np.uint64) ^ key64(seed, epoch, WINDOWS)).reshape(rows.shape)
    num_windows = -(-length // window)
    edges = [length * w // num_windows for w in range(num_windows + 1)]
    windows = [
        np.take_along_axis(rows[:, a:b], np.argsort(mixed[:, a:b], axis=1, kind="stable"), axis=1)
        for a, b in pairwise(edges)
    ]
    return np.concatenate(windows, axis=1).reshape(lanes, steps, part).transpose(1, 0, 2).reshape(-1)


def random_shape(rng):
    """(counts, N, L, window): uneven and empty shards, few and many, windows from 1 to more than a lane."""
    most = rng.choice([1, 5, 40, 300])
    counts = [rng.choice([0, 1, most, rng.randint(0, most)]) for _ in range(rng.choice([1, 2, 3, 7, 20]))]
    counts[rng.randrange(len(counts))] += 1
    size = rng.randint(1, min(sum(counts), rng.choice([4, 24, 64, 200])))
    divisors = [d for d in range(1, size + 1) if size % d == 0]
    return counts, size, rng.choice([1, size, rng.choice(divisors)]), rng.choice([1, 2, 3, 7, 50, 4096])


def test_any_batch_of_any_epoch_is_that_of_the_whole_epoch_laid_out():
    """Any step first, as at a resume; any share of any number of processes; any part of an epoch, as in a mixture."""
    rng = random.Random(0)
    for _ in range(300):
        counts, size, lanes, window = random_shape(rng)
        seed, epoch = rng.choice([0, 5, 2**63 - 1]), rng.choice([0, 1, 90])
        order = Order(counts, seed=seed, global_batch_size=size, lanes=lanes, window=window)
        whole = laid_out(counts, seed, epoch, size, lanes, window)
        for position in rng.sample(range(order.steps_per_epoch), min(3, order.steps_per_epoch)):
            step, batch = epoch * order.steps_per_epoch + position, whole[position * size :][:size]
            world_size = rng.choice([d for d in range(1, size + 1) if size % d == 0])
            rank = rng.randrange(world_size)
            fresh = pickle.loads(pickle.dumps(order))
            for found, wanted in (
                (fresh.share(step, rank, world_size), rank_share(batch, rank, world_size)),
                (order.batch(step), batch),
            ):
                assert found.dtype == np.int64
                assert np.array_equal(found, wanted), (
                    counts,
                    size,
                    lanes,
                    window,
                    seed,
                    step,
                    rank,
                    world_size,
                )
        start, stop = sorted(rng.sample(range(len(whole) + 1), 2))
        assert np.array_equal(order.part(epoch, start, stop), whole[start:stop])
        assert order.part(epoch, start, start).tolist() == []
        assert np.array_equal(order.epoch(epoch), whole)


def test_a_billion_images_take_memory_for_shards_and_windows_alone():
    """A resume in the middle of 100,000 shards: no array is as long as the set; a pickle holds no windows."""
    order = Order(np.full(100_000, 10_000), seed=0, global_batch_size=4096)
    step = 7 * order.steps_per_epoch + order.steps_per_epoch // 2
    tracemalloc.start()
    try:
        batches = [order.batch(later) for later in range(step, step + 3)]
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(np.unique(np.concatenate(batches))) == 3 * 4096
    assert peak < 32e6, f"{peak:,} bytes"
    assert len(pickle.dumps(order)) < 2e6


def test_what_is_laid_out_is_kept_over_an_epochs_end():
    """Workers look over the end of an epoch and back at every step there."""
    order = Order([40, 60], seed=0, global_batch_size=8)
    last = order.steps_per_epoch - 1
    before = [order.batch(step) for step in (last, last + 1)]
    kept, rows = dict(order._windows), dict(order._rows)
    after = [order.batch(step) for step in (last, last + 1)]
    assert np.array_equal(before, after)
    assert all(order._windows[key] is kept[key] for key in kept)
    assert all(order._rows[epoch] is rows[epoch] for epoch in rows)


def test_of_windows_only_so_many_are_kept(monkeypatch):
    monkeypatch.setattr("caco_scale.data.order.MOST_KEPT", 100)
    order = Order([400], seed=0, global_batch_size=8, window=5)
    for step in range(2 * order.steps_per_epoch):
        order.batch(step)
    assert sum(window.size for window in order._windows.values()) == order._kept <= 100
    assert len(order._rows) == 2
