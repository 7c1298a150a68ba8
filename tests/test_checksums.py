"""Bytes that are not the recorded ones are never used, whether they decode or not; older sets get their checksums."""

import hashlib
import os
import random
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from s3_server import WebServer
from shard_sets import make_shard_set
from test_loader import batches

from caco_scale.data import object_store
from caco_scale.data.loader import evaluation_batches
from caco_scale.data.object_store import Remote, RetryPolicy
from caco_scale.data.order import Order
from caco_scale.data.shard_index import ShardIndex, checksum, hash_spans
from caco_scale.data.shard_table import ShardTable
from caco_scale.data.shards import MANIFEST_NAME, Manifest
from caco_scale.data.store import open_store
from caco_scale.data.store.base import DamagedShard
from caco_scale.data.store.subset import Subset
from caco_scale.errors import UserError
from data_prep import checksums as adding
from data_prep.__main__ import main
from data_prep.build import build
from data_prep.index import index
from data_prep.repair import repair
from data_prep.verify import verify

QUICK = RetryPolicy(retries=2, stall_seconds=1)
DAMAGE = (
    r"shard 000001\.tar of .* is damaged: .* its sample 000000\d\d have another checksum .*data_prep repair"
)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A set of 50 images in 4 shards, with and without checksums."""
    folder = tmp_path_factory.mktemp("made")
    for name, checksums in (("new", True), ("old", False)):
        make_shard_set(folder / name, num_images=50, size=36, vary=20, checksums=checksums)
    return folder


@pytest.fixture
def new(made, tmp_path):
    return shutil.copytree(made / "new", tmp_path / "new")


@pytest.fixture
def old(made, tmp_path):
    return shutil.copytree(made / "old", tmp_path / "old")


def read_all(store):
    """Every sample's image, in order."""
    shards = enumerate(store.manifest.shards)
    return [store.read_sample(n, i)["jpg"] for n, info in shards for i in range(info.num_samples)]


def flip(path, at, bit=0):
    """One bit of a file in place."""
    with open(path, "r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 1 << bit]))


def another_version(path):
    """Other bytes of the same size and layout: every image's pixels differ, as after a build from other images."""
    data = bytearray(Path(path).read_bytes())
    place = data.index(b"\xff\xda") + 20
    while place > 20:
        data[place] ^= 0x10
        place = data.find(b"\xff\xda", place) + 20
    Path(path).write_bytes(data)


# ---- reading


def test_the_spans_of_any_chunks_have_the_same_checksums(made):
    data = (made / "new/000001.tar").read_bytes()
    found = open_store(made / "new").index(1)
    spans = [data[start:][:size] for start, size in map(found.span, range(len(found)))]
    assert [checksum(span) for span in spans] == found.checksums.tolist()
    for size in (1, 511, 7777, len(data)):
        chunks = (data[start : start + size] for start in range(0, len(data), size))
        sha256, num_bytes, sums = hash_spans(found.starts, found.sizes, chunks)
        assert sums.tolist() == found.checksums.tolist()
        assert (sha256, num_bytes) == (open_store(made / "new").manifest.shards[1].sha256, len(data))
    for starts, words in (
        (found.starts[::-1], "overlap"),
        (found.starts + len(data), "the shard ends after"),
    ):
        with pytest.raises(UserError, match=words):
            hash_spans(starts, found.sizes, [data])


def test_any_flipped_bit_of_a_sample_in_a_local_shard_is_an_error(new):
    good, generator = read_all(open_store(new)), random.Random(0)
    sizes = open_store(new).index(1).sizes
    for _ in range(200):
        place = generator.randrange(int(sizes.sum())), generator.randrange(8)
        flip(new / "000001.tar", *place)
        with pytest.raises(DamagedShard, match=DAMAGE):
            read_all(open_store(new))
        flip(new / "000001.tar", *place)
    assert read_all(open_store(new)) == good


def test_wrong_images_that_decode_end_training_and_evaluation(new):
    good = open_store(new).read_sample(1, 0)["jpg"]
    another_version(new / "000001.tar")
    with pytest.raises(UserError, match=DAMAGE):
        list(batches(new))
    store = open_store(new)
    for images in (store, Subset(store, np.arange(10, 30))):
        with pytest.raises(UserError, match=DAMAGE):
            list(evaluation_batches(images, 32, rank=0, world_size=1, batch_size=8, workers=0))
    assert good != bytes(store.read(1, *store.index(1).span(0)))[512:][: len(good)]


def test_an_object_that_was_replaced_is_tried_again_and_then_an_error(new, monkeypatch):
    monkeypatch.setattr(object_store, "FIRST_DELAY_SECONDS", 0.01)
    good = read_all(open_store(new))
    with WebServer(new) as server:
        store = open_store(server.url, "none", retry_policy=QUICK)
        assert read_all(store) == good
        first = (new / "000001.tar").read_bytes()
        another_version(new / "000001.tar")
        store.check()  # of the same size
        store.counters.take()
        with pytest.raises(DamagedShard, match=DAMAGE):
            read_all(store)
        assert store.counters.take()["retries"] == QUICK.retries
        with pytest.raises(UserError, match=DAMAGE):
            list(batches_of(store))
        (new / "000001.tar").write_bytes(first)
        wrong_once(store.remote, monkeypatch)
        store.counters.take()
        assert read_all(store) == good
        assert store.counters.take()["retries"] == 50


def batches_of(store):
    return evaluation_batches(store, 32, rank=0, world_size=1, batch_size=8, workers=0)


def wrong_once(remote, monkeypatch):
    """The first answer for every range has a wrong bit."""
    seen, stream = set(), remote.stream

    def spoiled(name, start, num_bytes, whole=False):
        data = bytearray(b"".join(stream(name, start, num_bytes, whole)))
        if (name, start) not in seen:
            seen.add((name, start))
            data[num_bytes // 2] ^= 1
        yield bytes(data)

    monkeypatch.setattr(remote, "stream", spoiled)


def test_a_cached_copy_that_is_altered_while_it_is_open_goes_and_is_fetched_again(new, tmp_path):
    good = read_all(open_store(new))
    with WebServer(new) as server:
        store, other = (open_store(server.url, str(tmp_path / "cache"), retry_policy=QUICK) for _ in range(2))
        for opened in (store, other):
            for shard in range(4):
                opened.fetch(shard)
            assert read_all(opened) == good
        copy = store.cache.path(store.manifest.shards[1].sha256)
        store.counters.take(), other.counters.take()
        another_version(copy)
        assert read_all(store) == good
        counts = store.counters.take()
        assert (counts["damaged"], counts["misses"], counts["hits"]) == (1, 16, 34)
        assert not copy.exists()
        store.fetch(1)
        assert read_all(store) == good
        assert store.counters.take().get("misses", 0) == 0
        assert read_all(other) == good  # which had the altered file open, and does not drop the new one
        assert other.counters.take().get("damaged", 0) == 0
        assert copy.exists()


def test_a_recorded_image_that_does_not_decode_costs_no_reading_of_its_shard(tmp_path):
    folder = make_shard_set(tmp_path / "set", num_images=50, size=36, vary=20, corrupt=(3, 17))
    with WebServer(folder) as server:
        store = open_store(server.url, "none", retry_policy=QUICK)
        sizes = np.concatenate([store.index(shard).sizes for shard in range(4)])
        store.counters.take()
        with pytest.warns(UserWarning, match="left out"):
            assert sum(len(ids) for ids, _, _ in batches_of(store)) == 48
        assert store.counters.take()["bytes"] == sizes.sum() + sizes[3] + sizes[17]


# ---- sets of version 1


def test_an_old_index_reads_and_says_what_it_lacks(old, new):
    store = open_store(old)
    assert json_version(old), json_version(new) == (1, 2)
    assert open_store(new).unchecked == ""
    assert "no checksums for the images of 4 of its 4 shards" in store.unchecked
    assert f"`python -m data_prep index {old}`" in store.unchecked
    assert read_all(store) == read_all(open_store(new))
    verify(old, full=True, workers=1)
    data = (old / "000001.idx").read_bytes()
    assert ShardIndex.from_bytes(data).to_bytes() == data
    another_version(old / "000001.tar")
    assert read_all(store) != read_all(open_store(new))
    with pytest.raises(DamagedShard, match="another sha256"):  # what a failed decoding asks for
        store.learn_checksums(1)


def json_version(folder):
    return int(Path(folder, MANIFEST_NAME).read_text().split('"version": ')[1][0])


def test_learnt_checksums_guard_the_reads_that_follow(old):
    store = open_store(old)
    good = store.learn_checksums(1)
    assert good.tolist() == store.learn_checksums(1).tolist()
    flip(old / "000001.tar", int(store.index(1).starts[3]) + 700)
    with pytest.raises(DamagedShard, match="another checksum"):
        Subset(store, np.arange(10, 30)).read_sample(1, 3)


@pytest.mark.parametrize("elsewhere", [False, True])
def test_index_adds_checksums_and_changes_nothing_else(old, new, tmp_path, elsewhere):
    store, before = open_store(old), open_store(old).manifest
    good = read_all(store)
    main(["index", str(old), *(["--to", str(tmp_path / "to")] if elsewhere else [])])
    place = tmp_path / "to" if elsewhere else old
    after = open_store(place)
    assert after.unchecked == ""
    assert [info.index_sha256 for info in after.manifest.shards] == [
        info.index_sha256 for info in open_store(new).manifest.shards
    ]
    build = {"shards_at": str(old)} if elsewhere else {}
    assert replace(after.manifest, shards=before.shards, build={}) == before
    assert after.manifest.build == build
    assert after.fingerprint() == store.fingerprint()
    orders = [
        Order([s.num_samples for s in m.shards], seed=0, global_batch_size=10)
        for m in (before, after.manifest)
    ]
    hashes = [[s.sha256 for s in m.shards] for m in (before, after.manifest)]
    assert orders[0].fingerprint(hashes[0]) == orders[1].fingerprint(hashes[1])  # a resume goes on
    assert read_all(after) == read_all(open_store(old)) == good
    verify(place, full=True, workers=1)
    later = open_store(old)
    later.manifest = before
    assert read_all(later) == good  # a run that began before
    with pytest.raises(UserError, match="has no tars" if elsewhere else r"has a manifest\.json already"):
        index(place)
    another_version(old / "000001.tar")
    with pytest.raises(DamagedShard, match=DAMAGE):
        read_all(open_store(place))


def test_a_set_on_a_web_server_gets_its_checksums_elsewhere(old, tmp_path):
    with WebServer(old) as server:
        with pytest.raises(UserError, match="cannot be written"):
            index(server.url)
        assert f"index {server.url} --to DIR" in open_store(server.url, "none").unchecked
        place, _ = index(server.url, tmp_path / "to")
        store = open_store(place, "none", retry_policy=QUICK)
        assert store.unchecked == ""
        assert store.manifest.classes == open_store(old).manifest.classes
        assert read_all(store) == read_all(open_store(old))


def test_a_kill_at_any_write_leaves_the_set_as_it_was_or_complete(old, monkeypatch):
    good, write = read_all(open_store(old)), os.replace
    for number in range(5):  # four indexes and the manifest
        left = iter(range(number))

        def killed(*names, left=left):
            if next(left, None) is None:
                raise KeyboardInterrupt
            write(*names)

        monkeypatch.setattr(os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            index(old)
        monkeypatch.undo()
        assert json_version(old) == 1
        assert read_all(open_store(old)) == good
    index(old)
    assert read_all(open_store(old)) == good


def test_a_damaged_shard_gets_no_checksums(old):
    text = (old / MANIFEST_NAME).read_text()
    another_version(old / "000002.tar")
    with pytest.raises(DamagedShard, match=r"000002\.tar .* another sha256"):
        index(old)
    assert (old / MANIFEST_NAME).read_text() == text


def test_a_set_of_both_kinds(old):
    """Shards that an older version had built when the build was stopped keep their indexes."""
    store = open_store(old)
    manifest = store.manifest
    one = replace(manifest, num_samples=16, num_bytes=0, shards=ShardTable(manifest.shards[:1]))
    store.manifest = one
    added, count = adding.add_checksums(store, str(old))
    assert count == 1
    mixed = replace(manifest, shards=ShardTable([*added.shards, *manifest.shards[1:]]))
    (old / MANIFEST_NAME).write_text(mixed.to_json())
    assert Manifest.from_json(mixed.to_json()) == mixed
    assert "3 of its 4 shards" in open_store(old).unchecked
    assert len(read_all(open_store(old))) == 50
    assert adding.add_checksums(open_store(old), str(old))[1] == 3


def test_verify_notices_checksums_that_are_not_the_tars(new):
    store = open_store(new)
    wrong = store.index(0).with_checksums(store.index(0).checksums ^ np.uint64(1))
    info = adding._written(store.manifest.shards[0], wrong, adding.writer(str(new)))
    manifest = replace(store.manifest, shards=ShardTable([info, *store.manifest.shards[1:]]))
    (new / MANIFEST_NAME).write_text(manifest.to_json())
    with pytest.raises(UserError, match="the checksums of its index are not those of the tar"):
        verify(new, full=True, workers=1)


@pytest.mark.parametrize("damaged", [None, "000001.tar", "000001.idx"])
def test_repair_builds_again_what_an_old_set_names_and_adds_checksums(tmp_path, damaged):
    from shard_sets import encode, smooth_image

    for number in range(12):
        path = tmp_path / "images" / f"class{number % 2}" / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode(smooth_image(np.random.default_rng(number), 24, 30)))
    [(built, new, _)] = build(tmp_path / "images", tmp_path / "set", samples_per_shard=5, workers=1)
    good = read_all(open_store(built))
    made_old(tmp_path / "set", open_store(built))
    if damaged:
        flip(tmp_path / "set" / damaged, 900 if damaged.endswith("tar") else 100)
    manifest, repaired = repair(tmp_path / "images", built, workers=1)
    assert repaired == (["000001.tar"] if damaged else [])
    assert manifest == open_store(built).manifest
    assert [s.index_sha256 for s in manifest.shards] == [s.index_sha256 for s in new.shards]
    assert read_all(open_store(built)) == good
    assert verify(built, full=True, workers=1)[0][1] == new
    assert build(tmp_path / "images", built, samples_per_shard=5, workers=1)[0][2], (
        "it is there, and that build's"
    )


def made_old(folder, store):
    """The set as version 1 would have built it."""
    shards = []
    for number, info in enumerate(store.manifest.shards):
        data = store.index(number).with_checksums(None).to_bytes()
        (folder / info.index_name).unlink()
        name = info.index_name.removesuffix("2")
        (folder / name).write_bytes(data)
        sha256 = hashlib.sha256(data).hexdigest()
        shards.append(replace(info, index_name=name, index_num_bytes=len(data), index_sha256=sha256))
    (folder / MANIFEST_NAME).write_text(replace(store.manifest, shards=ShardTable(shards)).to_json())


def test_a_set_in_a_bucket_gets_its_checksums_there(old, s3):
    remote = Remote(f"{s3}/checksums")
    for path in old.iterdir():
        remote.write(path.name, path)
    running = open_store(remote.url, "none")
    good = read_all(running)
    main(["index", remote.url])
    assert open_store(remote.url, "none").unchecked == ""
    assert read_all(open_store(remote.url, "none")) == read_all(running) == good
    verify(remote.url, full=True, workers=1)
