"""Decoded images in memory: the same batches, each image decoded once, room for small sets only."""

import functools
import itertools
import os

import numpy as np
import pytest
import torch
from gloo import run_ranks
from launch import SMALL
from PIL import Image
from shard_sets import encode, make_shard_set

import caco_scale
from caco_scale.config import Config, parse, replace
from caco_scale.config.fields import Data
from caco_scale.data import in_memory, pipeline
from caco_scale.data.in_memory import DecodedImages, decoded_bytes, free_memory, memory_here, room_for
from caco_scale.data.loader import train_batches
from caco_scale.data.order import Order
from caco_scale.data.photographs import decode_image
from caco_scale.data.store import open_store
from caco_scale.data.views import ViewSpec, crop_resize, crop_resize_into
from caco_scale.errors import UserError
from caco_scale.training import assemble
from caco_scale.training.assemble import TrainingData
from caco_scale.training.checks import CHECKS, Start, check_room

VIEWS = [ViewSpec(32, (0.2, 1.0)), ViewSpec(24, (0.05, 0.5))]
BATCH, STEPS = 12, 10  # 50 images: 4 steps an epoch
CORRUPT = (3, 17, 18, 40)


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return make_shard_set(
        tmp_path_factory.mktemp("set"), num_images=50, size=36, vary=20, corrupt=CORRUPT, samples_per_shard=16
    )


def batches(url, images=None, *, rank=0, world_size=1, start_step=0, workers=0):
    store = open_store(url)
    order = Order([s.num_samples for s in store.manifest.shards], seed=5, global_batch_size=BATCH)
    topology = {"rank": rank, "world_size": world_size, "workers": workers, "images": images}
    yield from train_batches(store, order, VIEWS, start_step=start_step, num_steps=STEPS, seed=5, **topology)


def assert_same(found, expected):
    for batch, reference in itertools.zip_longest(found, expected):
        assert (batch.step, batch.epoch, batch.keys) == (reference.step, reference.epoch, reference.keys)
        assert batch.corrupt == reference.corrupt
        assert all(map(torch.equal, batch.crops, reference.crops))
        for params, others in zip(batch.params, reference.params, strict=True):
            assert all(torch.equal(params[name], values) for name, values in others.items())


@pytest.fixture
def decodes(monkeypatch):
    """The images that were decoded in this process, in order."""
    seen = []
    monkeypatch.setattr(pipeline, "decode", lambda data, _: seen.append(data) or decode_image(data))
    return seen


@pytest.mark.parametrize("capacity", [10**7, 60_000], ids=["room for all", "room for a few"])
@pytest.mark.parametrize(("workers", "world_size"), [(0, 1), (0, 3), (2, 1), (2, 2)])
def test_batches_are_the_same_with_and_without(shards, capacity, workers, world_size):
    for rank in range(world_size):
        place = {"rank": rank, "world_size": world_size}
        expected = list(batches(shards, **place))
        images = DecodedImages(50, capacity)
        assert_same(batches(shards, images, workers=workers, **place), expected)
        held = images.held(np.arange(50))
        assert 0 < held.sum() <= 46
        assert not held[list(CORRUPT)].any()
        # What workers have decoded is here, and serves another start, in the middle of an epoch.
        assert_same(batches(shards, images, workers=workers, start_step=5, **place), expected[5:])


def test_an_image_is_decoded_and_read_once_and_a_corrupt_one_every_time(shards, decodes, monkeypatch):
    reads, read = [], pipeline._read
    monkeypatch.setattr(pipeline, "_read", lambda store, place: reads.append(place) or read(store, place))
    images = DecodedImages(50, 10**7)
    corrupt = sum(len(batch.corrupt) for batch in batches(shards, images))
    assert corrupt > len(CORRUPT)
    good = [data for data in decodes if data[-2:] == b"\xff\xd9"]
    assert len(good) == len(set(good)) == images.held(np.arange(50)).sum()
    assert len(set(reads)) <= len(good) + len(CORRUPT)
    assert len(decodes) - len(good) >= corrupt  # a substitute may be corrupt, too
    decodes.clear()
    list(batches(shards, images, start_step=4))
    assert not [data for data in decodes if data[-2:] == b"\xff\xd9"]


def test_checksums_are_compared_at_the_first_read_and_pixels_stay_then(tmp_path):
    url = make_shard_set(tmp_path / "set", num_images=24, size=32)
    images = DecodedImages(24, 10**7)
    expected = list(batches(url))
    assert_same(batches(url, images), expected)
    for shard in (tmp_path / "set").glob("*.tar"):
        shard.write_bytes(bytes(shard.stat().st_size))
    assert_same(batches(url, images), expected)
    with pytest.raises(UserError, match="damaged"):
        list(batches(url, DecodedImages(24, 10**7)))


def test_a_set_that_does_not_fit_is_kept_as_far_as_it_goes():
    images = DecodedImages(4, 1000)
    pixels = [np.full((10, 10, 3), number, np.uint8) for number in range(4)]
    for number in (2, 0, 1, 3):  # 300 bytes each
        images.put(number, pixels[number])
    assert images.held(np.arange(4)).tolist() == [True, True, True, False]
    assert images.get(3) is None
    assert all(np.array_equal(images.get(number), pixels[number]) for number in range(3))


def test_crops_into_a_batch_are_the_crops_of_one_image():
    rng = np.random.default_rng(0)
    shapes = [(40, 40), (33, 64), (1, 50), (50, 1), (2, 300), (24, 24), (7, 5)]
    pixels = [rng.integers(0, 256, (*shape, 3), dtype=np.uint8) for shape in shapes]
    boxes = [(0, 0, *shape) for shape in shapes] + [
        (h // 3, w // 3, h - h // 3, w - w // 3) for h, w in shapes
    ]
    out = torch.zeros(len(boxes), 24, 24, 3, dtype=torch.uint8)
    crop_resize_into(out, pixels * 2, np.array(boxes))
    for found, image, box in zip(out, pixels * 2, boxes, strict=True):
        assert np.array_equal(found.numpy(), crop_resize(image, box, 24))


# ---- how much, and whether


def test_the_decoded_size_is_estimated_from_headers(shards, tmp_path):
    whole = open_store(make_shard_set(tmp_path / "whole", num_images=30, size=30, vary=20))
    places = [(s, p) for s, info in enumerate(whole.manifest.shards) for p in range(info.num_samples)]
    assert decoded_bytes(whole) == sum(
        decode_image(whole.read_sample(*place)["jpg"]).nbytes for place in places
    )
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(200):
        image = Image.new("RGB", (20 + number % 7, 30))
        (folder / f"{number}.png").write_bytes(encode(image, "PNG"))
    (folder / "0.png").write_bytes(b"no image")
    assert decoded_bytes(open_store(folder)) == pytest.approx(200 * 23 * 30 * 3, rel=0.05)


def test_small_sets_are_kept_unasked_and_what_does_not_fit_is_refused(shards, monkeypatch):
    store = open_store(shards)

    def room_of(wanted, processes=1):
        return room_for(store, wanted, memory_here({"LOCAL_WORLD_SIZE": str(processes)}))

    needed = decoded_bytes(store)
    room, line = room_of("auto")
    assert needed < room <= 10**9
    assert "data.in_memory auto: 50 images take about 0.00 GB decoded (estimated from 50)" in line
    assert room_of("false") == (0, None)
    monkeypatch.setattr(in_memory, "free_memory", lambda: 4 * needed)
    assert room_of("auto", 3)[0] == int(3.2 * needed) // 3
    assert room_of("auto", 4) == (0, None)
    with pytest.raises(
        UserError, match=r"50 images x 4 processes take about .* GB .* and .* GB of this machine's"
    ):
        room_of("true", 4)
    monkeypatch.setattr(in_memory, "free_memory", lambda: 10**12)
    monkeypatch.setattr(in_memory, "AUTO_BYTES", needed - 1)
    assert room_of("auto") == (0, None)
    assert room_of("true")[0] == 8 * 10**11
    monkeypatch.setattr(in_memory, "AUTO_BYTES", store.manifest.num_bytes - 1)
    monkeypatch.setattr(in_memory, "decoded_bytes", lambda _: 1 / 0)  # no image of a large set is looked at
    assert room_of("auto") == (0, None)


def settle_room(rank, world_size, shards):
    """Two nodes, of which the second has less memory and more processes; only rank 0 may look at images."""
    store = open_store(shards)
    needed = decoded_bytes(store)
    os.environ["LOCAL_WORLD_SIZE"] = str(1 + rank)
    in_memory.free_memory = lambda: (8 - 3 * rank) * needed
    if rank:
        assemble.decoded_bytes = in_memory.decoded_bytes = lambda _: 1 / 0
    found = []
    for wanted in ("auto", "true", "false"):
        config = Config(data=Data(shards=shards, in_memory=wanted, global_batch_size=BATCH))
        data = TrainingData(config, rank, world_size)
        data.make_room()
        found.append((data.room / needed, data.room_note))
    in_memory.free_memory = lambda: (9 - 7 * rank) * needed
    with pytest.raises(UserError, match="50 images x 2 processes take about") as refused:
        TrainingData(replace(config, data__in_memory="true"), rank, world_size).make_room()
    return found, str(refused.value)


def test_all_processes_keep_as_much_as_the_fullest_node_allows_and_one_looks(shards):
    first, second = run_ranks(settle_room, 2, shards)
    assert first == second
    (auto, line), (asked, _), none = first[0]
    assert auto == pytest.approx(2, rel=1e-3)  # four fifths of five times the set, for two processes
    assert asked == auto
    assert "50 images x 2 processes take about" in line
    assert none == (0, None)


def test_the_doctor_and_a_sweep_look_at_this_node_alone(shards, monkeypatch):
    data = Data(shards=shards, in_memory="true", global_batch_size=BATCH)
    start = Start(Config(data=data), "ddp", 0, 2, torch.device("cpu"))
    assert check_room(start) is None  # no set was found
    start.data = TrainingData(start.config, 0, 2)
    assert "data.in_memory true: 50 images take about" in check_room(start)
    assert check_room in CHECKS
    monkeypatch.setattr(in_memory, "free_memory", lambda: 0)
    with pytest.raises(UserError, match=r"data\.in_memory true: 50 images .* give --data\.in_memory auto"):
        check_room(start)


def test_a_control_groups_limit_counts(tmp_path, monkeypatch):
    everything, real = free_memory(), in_memory.Path.read_text
    for kinds, limit, used, folder in (
        ("", "memory.max", "memory.current", "job"),
        ("cpu,memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "memory/job"),
    ):
        group = tmp_path / folder
        group.mkdir(parents=True)
        (group / limit).write_text("5000000\n")
        (group / used).write_text("3000000\n")
        (group / "memory.stat").write_text("inactive_file 500000\nactive_file 1000\nanon 7\n")
        line = f"0:{kinds}:/job/step\n"
        monkeypatch.setattr(in_memory, "CGROUP", str(tmp_path))
        monkeypatch.setattr(
            in_memory.Path,
            "read_text",
            lambda path, line=line: line if str(path) == "/proc/self/cgroup" else real(path),
        )
        assert free_memory() == 2_501_000
        (group / limit).write_text("max\n")
        assert free_memory() > everything / 2


def test_it_ends_with_its_owner_and_needs_no_memfd(monkeypatch):
    before = len(os.listdir("/proc/self/fd"))
    monkeypatch.delattr(os, "memfd_create")
    images = DecodedImages(3, 10_000)
    images.put(1, np.ones((4, 5, 3), np.uint8))
    assert images.get(1).sum() == 60
    del images
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("word", ["true", "True", "no", "auto"])
def test_the_flag_takes_a_switchs_words(word):
    expected = {"no": "false", "auto": "auto"}.get(word, "true")
    assert parse(["demo", "--data.in_memory", word]).data.in_memory == expected


def test_losses_are_equal_to_the_last_digit(tmp_path, monkeypatch):
    """More than two epochs, across the switch, in fp64, through the whole trainer."""
    shards = make_shard_set(tmp_path / "set", num_images=48, size=36, vary=12, corrupt=(5, 30))
    flags = {
        **SMALL,
        "data.shards": shards,
        "data.val_shards": "",
        "data.max_corrupt": 0.5,
        "run.max_steps": 14,
    }
    found = []
    made = []
    kept = functools.partial(lambda make, *size: made.append(make(*size)) or made[-1], DecodedImages)
    monkeypatch.setattr("caco_scale.training.assemble.DecodedImages", kept)
    for word in ("false", "auto"):
        run = caco_scale.pretrain(**{**flags, "run.dir": tmp_path / word, "data.in_memory": word})
        found.append([(line["step"], line["loss"]) for line in run.metrics() if "loss" in line])
    assert found[0] == found[1]
    assert len(found[0]) == 14
    assert len(made) == 1
    assert made[0].held(np.arange(48)).sum() == 46
