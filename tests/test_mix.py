"""Mixtures: shares of every batch, the order as defined, any number of processes, resumed in the middle; mistakes."""

from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
import torch
from launch import SMALL, launch
from shard_sets import encode, smooth_image

import caco_scale
from caco_scale.config import from_dict, load_recipe, parse, replace, to_yaml
from caco_scale.config.yaml_file import read_yaml
from caco_scale.data.loader import train_batches
from caco_scale.data.mixed_order import MixedOrder
from caco_scale.data.order import Order, sample_keys
from caco_scale.data.views import ViewSpec
from caco_scale.errors import UserError
from caco_scale.run.audit import read_audit
from caco_scale.training.assemble import open_training, training_order
from data_prep.build import build

SHARES = {"a": "0.7", "b": "0.3"}


def mixed(counts, weights, size=16, **options):
    weights = [Fraction(str(w)) for w in weights]
    names = [f"set{n}" for n in range(len(weights))]
    return MixedOrder(names, counts, weights, seed=5, global_batch_size=size, **options)


def sets_of(order, ids, counts):
    return np.searchsorted(np.cumsum([sum(c) for c in counts]), ids, side="right")


# ---- the order


@pytest.mark.parametrize(
    ("counts", "weights"),
    [
        ([[300, 200], [1000, 7, 500]], [0.7, 0.3]),
        ([[200], [40, 40], [90, 0, 400]], [2, 1, 3]),
        ([[64] * 4, [700], [100], [300]], ["0.333", "0.333", "0.1", "0.234"]),
    ],
)
def test_shares_are_exact_in_every_batch_and_never_drift(counts, weights):
    order = mixed(counts, weights)
    total, seen, steps = sum(map(Fraction, map(str, weights))), Counter(), 3 * order.steps_per_epoch
    for step in range(steps):
        batch = order.batch(step)
        assert len(batch) == 16
        here = Counter(sets_of(order, batch, counts).tolist())
        seen += here
        for number, weight in enumerate(weights):
            share = Fraction(str(weight)) / total
            assert abs(seen[number] - share * 16 * (step + 1)) <= (Fraction(1, 2) if len(weights) == 2 else 1)
            assert abs(here[number] - share * 16) < (1 if len(weights) == 2 else 2)
        halves = [Counter(sets_of(order, half, counts).tolist()) for half in (batch[:8], batch[8:])]
        assert all(abs(halves[0][n] - halves[1][n]) <= 1 for n in here), "every process has its part of each"
    assert [seen[n] for n in range(len(counts))] == order.drawn(steps)
    assert np.array_equal(
        order.epoch(1),
        np.concatenate([order.batch(order.steps_per_epoch + s) for s in range(order.steps_per_epoch)]),
    )


def test_an_epoch_ends_when_the_set_that_is_exhausted_first_has_been_seen_once():
    counts = [[90, 30], [500]]
    order = mixed(counts, [3, 1])  # 12 and 4 of 16: 120 images are 10 steps, 500 would be 125
    assert order.steps_per_epoch == 10
    small = [i for step in range(10) for i in order.batch(step) if i < 120]
    assert sorted(small) == list(range(120))
    later = [i for step in range(10, 20) for i in order.batch(step) if i < 120]
    assert sorted(later) == list(range(120))
    assert later != small
    # The large set goes through an epoch of its own meanwhile: its images come once before any comes twice.
    length = 500 // 7 * 7  # 7 lanes
    large = [i - 120 for step in range(200) for i in order.batch(step) if i >= 120]
    alone = Order([500], seed=5, global_batch_size=7, lanes=7)
    assert large == [*alone.epoch(0), *alone.epoch(1)][:800]
    assert len(set(large[:length])) == length


def test_the_views_of_an_image_that_comes_twice_in_an_epoch_differ():
    order = mixed([[64], [640]], [1, 1])
    drawn = [
        (int(i), int(r))
        for step in range(80)
        for i, r in zip(order.batch(step), order.rounds(step), strict=True)
    ]
    assert len(set(drawn)) == len(drawn)
    ids, rounds = np.array([3, 9, 3]), np.array([0, 0, 1])
    keys = sample_keys(1, rounds, ids, 0)
    assert keys.tolist() == [sample_keys(1, int(r), [i], 0)[0] for i, r in zip(ids, rounds, strict=True)]
    assert keys[0] != keys[2]


def test_the_fingerprint_holds_shares_seed_and_sets():
    hashes = ["x", "y", "z"]
    one = mixed([[300], [100, 60]], [7, 3]).fingerprint(hashes)
    assert one == mixed([[300], [100, 60]], [0.7, 0.3]).fingerprint(hashes), "weights have no unit"
    others = [
        mixed([[300], [100, 60]], [6, 4]).fingerprint(hashes),
        mixed([[300, 100], [60]], [7, 3]).fingerprint(hashes),
        mixed([[300], [100, 60]], [7, 3]).fingerprint(["x", "y", "w"]),
        mixed([[300], [100, 60]], [7, 3], window=9).fingerprint(hashes),
    ]
    assert len({one, *others}) == 5


def test_sets_that_are_too_small_or_have_too_little_a_share_are_refused():
    with pytest.raises(
        UserError, match=r"set1 has a share of 0\.01, 0\.16 of 16 images: give it a larger weight"
    ):
        mixed([[300], [100]], [99, 1])
    with pytest.raises(UserError, match=r"set0 has 9 images, fewer than its 12 of a global batch of 16"):
        mixed([[9], [100]], [3, 1])


# ---- a mixture of sets of several kinds


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    top, generator = tmp_path_factory.mktemp("mix"), np.random.default_rng(0)
    for name, number in (("a", 80), ("b", 60)):
        for i in range(number):
            path = top / f"{name}/{name if i % 2 else 'both'}/{i:02d}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(encode(smooth_image(generator, 30, 32), "JPEG"))
    [(built, _, _)] = build(top / "a", top / "shards", workers=1, samples_per_shard=32)
    return built, top / "b"


def config_of(places, **flags):
    values = {
        "data": {"mix": {str(places[0]): 0.7, str(places[1]): 0.3}, "global_batch_size": 8, "window": 16}
    }
    return from_dict(values, "test")


def test_batches_are_the_same_on_1_2_and_4_processes_and_from_any_step(places):
    config = config_of(places)
    store = open_training(config)
    store.check()
    order = training_order(config, store)
    assert order.steps_per_epoch == int(80 // Fraction("5.6"))
    assert store.manifest.classes == ("a", "b", "both")
    labels = np.concatenate([store.index(n).labels for n in range(len(store.manifest.shards))])
    assert np.bincount(labels).tolist() == [40, 30, 70] == list(store.manifest.class_counts)
    views = [ViewSpec(16, (0.2, 1.0)), ViewSpec(16, (0.2, 1.0), blur_p=0.1)]

    def batches(rank, size, start, workers=0):
        steps = {"start_step": start, "num_steps": 20, "seed": 0}
        return list(train_batches(store, order, views, rank=rank, world_size=size, workers=workers, **steps))

    whole = batches(0, 1, 0, workers=1)
    names = [store.names(order.batch(step)) for step in range(20)]
    assert [batch.keys for batch in whole] == names
    assert {name.partition(":")[0] for keys in names for name in keys} == {"0", "1"}
    for size, start in ((2, 11), (4, 16)):
        ranks = [batches(rank, size, start) for rank in range(size)]
        for step, shares in enumerate(zip(*ranks, strict=True), start):
            assert [key for share in shares for key in share.keys] == names[step]
            for view in range(2):
                assert torch.equal(
                    torch.cat([share.crops[view] for share in shares]), whole[step].crops[view]
                )


def test_batches_of_ones_own_loop_are_those_of_the_mixture(places):
    config, weights = config_of(places), dict(zip(map(str, places), (0.7, 0.3), strict=True))
    order, store = training_order(config, open_training(config)), open_training(config)
    options = {"global_batch_size": 8, "window": 16, "views": caco_scale.Views(size=16), "workers": 0}
    loader = caco_scale.batches(weights, rank=1, world_size=2, start_step=12, **options)
    assert loader.steps_per_epoch == order.steps_per_epoch == 14
    assert [batch.keys for batch in loader] == [store.names(order.batch(step))[4:] for step in (12, 13)]
    with pytest.raises(UserError, match=r"data\.mix"):
        caco_scale.batches({str(places[0]): -1.0}, **options)


@pytest.mark.long
def test_a_mixture_is_trained_on_and_resumed_by_another_number_of_processes(places, tmp_path):
    flags = {**SMALL, "data.shards": "", "data.mix": [f"{places[0]}=0.7", f"{places[1]}=0.3"]}
    flags |= {"run.dir": tmp_path / "run", "data.audit": tmp_path / "audit", "bank.size": 16}
    launch({**flags, "run.max_steps": 7})
    launch({**flags, "run.max_steps": 14}, num_processes=2)
    config = replace(config_of(places), run__seed=load_recipe("demo").run.seed)
    store = open_training(config)
    order = training_order(config, store)
    assert read_audit(tmp_path / "audit") == {step: store.names(order.batch(step)) for step in range(14)}
    error = launch(
        {**flags, "data.mix": [f"{places[0]}=0.6", f"{places[1]}=0.4"], "run.max_steps": 15}, code=2
    )
    assert "was trained on another data set" in error


def test_a_mixture_is_written_as_flags_and_as_a_section(tmp_path):
    config = parse(["caco_r50_200ep", "--data.mix", "s3://bucket/a=1", "/data/x=y=.5"], "pretrain")
    assert config.data.mix == ("s3://bucket/a=1", "/data/x=y=.5")
    (tmp_path / "own.yaml").write_text("data:\n  mix: {imagenet: 0.7, mine: 0.3}\n")
    section = load_recipe(tmp_path / "own.yaml")
    assert section.data.mix == ("imagenet=0.7", "mine=0.3")
    (tmp_path / "again.yaml").write_text(to_yaml(section))
    assert load_recipe(tmp_path / "again.yaml").data.mix == section.data.mix
    assert read_yaml(tmp_path / "again.yaml")["data"]["mix"] == list(section.data.mix)
    for word in (
        "/data/a",
        "/data/a=",
        "=1",
        "/data/a=0",
        "/data/a=0.00",
        "/data/a=-1",
        "/data/a=nan",
        "/data/a=1e3",
    ):
        with pytest.raises(UserError, match=r"data\.mix is .*: give ADDRESS=WEIGHT"):
            parse(["caco_r50_200ep", f"--data.mix={word}"], "pretrain")
    with pytest.raises(UserError, match=r"data\.shards and data\.mix are both given"):
        parse(["demo", "--data.mix", "a=1"], "pretrain")
