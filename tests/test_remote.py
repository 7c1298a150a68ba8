"""Shards behind a real S3 server and a web server: same bytes as on disk, whatever the network and the cache do."""

import hashlib
import multiprocessing
import os
import pickle
import resource
import shutil
import tempfile
import threading
import time
from pathlib import Path

import pytest
from gloo import set_environment
from obstore.store import HTTPStore
from s3_server import FAULTS, FaultProxy, WebServer
from shard_sets import make_shard_set
from test_loader import STEPS, assert_same, batches, joined

from caco_scale.data import object_store
from caco_scale.data.cache import ShardCache
from caco_scale.data.loader import evaluation_batches, train_batches
from caco_scale.data.object_store import Remote, RetryPolicy
from caco_scale.data.order import Order
from caco_scale.data.store import open_store
from caco_scale.data.store.base import DamagedShard
from caco_scale.data.store.remote import RemoteStore, cache_directory
from caco_scale.errors import UserError

QUICK = RetryPolicy(retries=6, stall_seconds=1)


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return make_shard_set(tmp_path_factory.mktemp("set") / "train", num_images=50, size=36, vary=20)


@pytest.fixture
def uploaded(shards, s3):
    """The set in the bucket, put there once."""
    folder = Remote(f"{s3}/train")
    if folder.size("manifest.json") is None:
        for path in sorted(Path(shards).iterdir()):
            folder.write(path.name, path)
    return f"{s3}/train"


def contents(store):
    """Every sample's bytes, in order."""
    found = []
    for shard, info in enumerate(store.manifest.shards):
        index = store.index(shard)
        found += [store.read(shard, *index.span(i)) for i in range(info.num_samples)]
    return found


@pytest.fixture(scope="module")
def expected(shards):
    return contents(open_store(shards))


def one_line(caught):
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---- reading


def test_reads_as_from_disk_with_and_without_a_cache(uploaded, shards, expected, tmp_path):
    for cache_dir in ("none", str(tmp_path / "cache")):
        store = open_store(uploaded, cache_dir)
        store.check()
        assert isinstance(store, RemoteStore)
        assert store.manifest == open_store(shards).manifest
        assert contents(pickle.loads(pickle.dumps(store))) == expected
    counters = store.counters.take()
    assert counters["requests"] >= 1
    for shard in range(4):
        store.fetch(shard)
    assert contents(store) == expected
    counters = store.counters.take()
    assert counters["hits"] == 50
    assert counters.get("misses", 0) == 0
    assert counters["bytes"] >= store.manifest.num_bytes
    kinds = sorted(path.suffix for path in (tmp_path / "cache").iterdir())
    assert kinds == ["", *[".ok"] * 4, *[".tar"] * 4]


def test_a_fork_server_child_reads_and_a_forked_one_refuses(uploaded, expected):
    store = open_store(uploaded, "none")
    assert contents(store) == expected  # this process has used obstore
    with multiprocessing.get_context("forkserver").Pool(2, set_environment, (dict(os.environ),)) as pool:
        assert pool.map(contents, [store] * 2) == [expected] * 2
    with multiprocessing.get_context("fork").Pool(1) as pool:
        with pytest.raises(UserError, match="forkserver"):
            pool.apply(contents, (store,))


@pytest.mark.parametrize("ranges", [True, False])
def test_a_web_server(shards, expected, tmp_path, ranges):
    with WebServer(Path(shards).parent, ranges) as server:
        store = open_store(f"{server.url}/train", str(tmp_path / "cache"))
        store.counters.take()
        store.check((1, 3))  # of 4 shards the second
        assert store.counters.take()["requests"] == 2
        store.check()
        assert contents(store) == expected
        store = open_store(f"{server.url}/train", "none", retry_policy=QUICK)
        if ranges:
            assert contents(store) == expected
        else:
            with pytest.raises(UserError) as caught:
                contents(store)
            assert "whole files" in one_line(caught)


def test_what_cannot_be_read_is_one_line(uploaded, s3, monkeypatch):
    def refused(words, url, retry_policy=QUICK):
        with pytest.raises(UserError) as caught:
            open_store(url, "none", retry_policy=retry_policy)
        assert words in one_line(caught)

    refused("has no manifest.json", f"{s3}/nothing")
    refused("has no manifest.json", "s3://no-such-bucket/set")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    refused("may not be read", uploaded)
    monkeypatch.setenv("AWS_SKIP_SIGNATURE", "true")
    refused("may not be read", uploaded)  # the bucket is not public
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    refused("3 attempts in a row failed", uploaded, RetryPolicy(2, 1))
    monkeypatch.setenv("AWS_PROFILE", "nobody")
    monkeypatch.setenv("AWS_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", os.devnull)
    refused("AWS_PROFILE is nobody", uploaded)


def test_keys_and_endpoint_from_a_profile(uploaded, expected, tmp_path, monkeypatch):
    keys = "aws_access_key_id = test:tester\naws_secret_access_key = testing\n"
    (tmp_path / "credentials").write_text(f"[lab]\n{keys}")
    endpoint = os.environ["AWS_ENDPOINT_URL"]
    (tmp_path / "config").write_text(f"[profile lab]\nregion = us-east-1\nendpoint_url = {endpoint}\n")
    for name in ("AWS_ENDPOINT_URL", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_REGION"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_PROFILE", "lab")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    assert contents(open_store(uploaded, "none")) == expected


@pytest.mark.parametrize(
    "host",
    ["b.s3.eu-west-1.amazonaws.com", "x.r2.cloudflarestorage.com/b", "x.blob.core.windows.net/b", "host"],
)
def test_a_web_address_is_a_web_server_whoever_runs_it(host):
    assert isinstance(Remote(f"https://{host}/set").client(), HTTPStore)


# ---- faults


def test_a_cut_body_that_cannot_be_continued_begins_anew(shards, expected, tmp_path):
    """On a web server without ranges."""
    with (
        WebServer(Path(shards), ranges=False) as server,
        FaultProxy(server.url, ("cut",), every=3) as proxy,
    ):
        store = open_store(proxy.url, str(tmp_path / "cache"), retry_policy=QUICK)
        for shard in range(4):
            store.fetch(shard)
        assert proxy.injected["cut"] >= 1
        proxy.faults = ()
        assert contents(store) == expected


@pytest.mark.parametrize("faults", [*((fault,) for fault in FAULTS), FAULTS], ids="+".join)
@pytest.mark.parametrize("cached", [False, True])
def test_faults_change_nothing_and_are_counted(uploaded, expected, faults, cached, tmp_path, monkeypatch):
    with FaultProxy(
        os.environ["AWS_ENDPOINT_URL"], faults, every=4 if faults == ("stall",) else 2, stall_seconds=2
    ) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        # A busy machine makes the server slow to answer: that is not counted as a fault where none stalls.
        policy = QUICK if "stall" in faults else RetryPolicy(QUICK.retries, stall_seconds=30)
        store = open_store(uploaded, str(tmp_path / "cache") if cached else "none", retry_policy=policy)
        if cached:
            for shard in range(4):
                store.fetch(shard)
        places = [(s, i) for s, info in enumerate(store.manifest.shards) for i in range(info.num_samples)]
        read = lambda place: store.read(place[0], *store.index(place[0]).span(place[1]))
        assert list(store.concurrently(read, places)) == expected
        counters = store.counters.take()
        assert set(proxy.injected) <= set(faults)
        assert sum(proxy.injected.values()) >= 1
        spoiled = sum(number for fault, number in proxy.injected.items() if fault != "slow")
        assert counters.get("retries", 0) == spoiled


def test_a_body_that_stays_short_is_an_error(uploaded, monkeypatch):
    with FaultProxy(os.environ["AWS_ENDPOINT_URL"], ("truncate",), every=1) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        store = open_store(uploaded, "none", retry_policy=RetryPolicy(2, 1))
        with pytest.raises(UserError) as caught:
            contents(store)
        assert "cannot be read" in one_line(caught)
        assert "the body" in one_line(caught) or "range" in one_line(caught).lower()


def test_an_object_that_was_replaced_is_named_with_the_repair_command(shards, s3, tmp_path):
    folder = Remote(f"{s3}/replaced")
    for path in sorted(Path(shards).iterdir()):
        folder.write(path.name, path)
    data = bytearray(Path(shards, "000001.tar").read_bytes())
    data[5000] ^= 1
    folder.write("000001.tar", bytes(data))
    store = open_store(folder.url, str(tmp_path / "cache"))
    store.check()  # sizes only
    for read in (lambda: store.fetch(1), lambda: store._learn(1, store.chunks(1))):
        with pytest.raises(UserError, match=r"shard 000001\.tar .*damaged.*data_prep repair"):
            read()
    folder.write("000001.tar", bytes(data[:-512]))
    with pytest.raises(UserError, match=r"000001\.tar has .* bytes, .* expected"):
        store.check()
    folder.delete(["000001.tar"])
    with pytest.raises(UserError, match=r"000001\.tar does not exist"):
        store.check()
    before = store.counters.take()
    store.check((1, 2))  # one listing tells all sizes, and process 0 of the node has it
    assert "requests" not in store.counters.take(), before


def wait_until_fetched(store):
    for _ in range(1000):
        if not store._queued:
            return
        time.sleep(0.02)
    raise AssertionError("the background is still at it")


def test_a_shard_found_damaged_in_the_background_is_an_error_of_the_next_read(shards, tmp_path):
    folder = shutil.copytree(shards, tmp_path / "set")
    data = bytearray((folder / "000001.tar").read_bytes())
    data[5000] ^= 1
    (folder / "000001.tar").write_bytes(data)
    with WebServer(folder) as server:
        store = open_store(server.url, str(tmp_path / "cache"), retry_policy=QUICK)
        store.prefetch([0, 1])
        wait_until_fetched(store)
        assert store.read(0, 0, 512) == (folder / "000000.tar").read_bytes()[:512]
        store.counters.take()
        store.prefetch([1])  # not fetched again and again
        wait_until_fetched(store)
        with pytest.raises(DamagedShard, match=r"shard 000001\.tar .*damaged.*data_prep repair"):
            store.read(1, 0, 512)
        assert "requests" not in store.counters.take()


@pytest.mark.parametrize("ranges", [True, False])
def test_a_full_disk_of_the_cache_ends_the_caching_and_not_the_reading(shards, expected, tmp_path, ranges):
    """A limit on the size of files stands for the disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with WebServer(Path(shards), ranges) as server:
        store = open_store(server.url, str(tmp_path / "cache"), retry_policy=QUICK)
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
        try:
            with pytest.warns(UserWarning, match=r"nothing more is cached: data\.cache_dir .*free or fix"):
                store.fetch(0)
            store.counters.take()
            store.fetch(0)
            store.prefetch([0])
            assert "requests" not in store.counters.take()
            if ranges:
                assert contents(store) == expected
            else:
                with pytest.raises(UserError, match=r"data\.cache_dir .*free or fix"):
                    store.read(0, 0, 512)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert {path.name for path in (tmp_path / "cache").iterdir()} == {"lock"}


# ---- the cache


def filled(cache, data, wait=False):
    sha256 = hashlib.sha256(data).hexdigest()
    assert cache.fetch(sha256, len(data), lambda: iter([data]), wait)
    return sha256


def test_the_longest_unopened_goes_first_and_the_limit_holds(tmp_path):
    cache = ShardCache(tmp_path, 3000)
    names = [filled(cache, bytes([n]) * 1000) for n in range(3)]
    for n, name in enumerate(names):
        os.utime(cache.path(name, ".ok"), (n, n))
    cache.open(names[0], 1000).close()  # now the newest
    fourth = filled(cache, b"4" * 1000)
    assert cache.open(names[1], 1000) is None
    assert [cache.open(name, 1000) is not None for name in (names[0], names[2], fourth)] == [True] * 3
    assert cache.counters["evictions"] == 1
    assert not cache.fetch("f" * 64, 3001, lambda: iter([]))  # never fits
    assert {path.suffix for path in tmp_path.iterdir()} <= {".tar", ".ok", ""}


def test_what_is_not_the_caches_own_is_never_touched(tmp_path):
    shard, part = "0" * 64 + ".tar", "1" * 64 + ".part"
    for name in ("x.tar", "x.part", "x.ok", "lock", shard + ".tar", "A" * 64 + ".tar"):
        (tmp_path / name).write_bytes(b"mine" * 500)
        os.utime(tmp_path / name, (0, 0))
    (tmp_path / shard).symlink_to("x.tar")
    (tmp_path / part).mkdir()
    before = {path.name: path.stat().st_size for path in tmp_path.iterdir()}
    cache = ShardCache(tmp_path, 1500)
    for n in range(3):  # each takes the place of the one before
        filled(cache, bytes([n]) * 1000)
    assert cache.counters["evictions"] == 2
    assert before.items() <= {path.name: path.stat().st_size for path in tmp_path.iterdir()}.items()


def test_a_planted_link_is_no_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    (tmp_path / "theirs").mkdir()
    (tmp_path / f"caco_scale-cache-{os.getuid()}").symlink_to("theirs")
    with pytest.raises(UserError, match="is not a directory of this user"):
        cache_directory("auto")


def test_a_copy_that_was_changed_is_never_believed(tmp_path):
    cache = ShardCache(tmp_path, 10_000)
    name = filled(cache, b"a" * 1000)
    path = cache.path(name)
    times = path.stat().st_mtime_ns
    path.write_bytes(b"b" * 1000)
    os.utime(path, ns=(times, times))  # as if it had not been
    assert ShardCache(tmp_path, 10_000).open(name, 1000) is None
    assert not path.exists()
    assert cache.open(filled(cache, b"a" * 1000), 1000).read() == b"a" * 1000
    path.write_bytes(b"a" * 999)
    assert cache.open(name, 1000) is None
    filled(cache, b"a" * 1000)
    cache.path(name, ".ok").write_text("?")
    assert cache.open(name, 1000).read() == b"a" * 1000  # right after all


def test_wrong_or_broken_downloads_leave_nothing(tmp_path):
    cache = ShardCache(tmp_path, 10_000)

    def breaks():
        yield b"half"
        raise UserError("unreachable")

    for chunks in (lambda: iter([b"x" * 1000]), lambda: iter([b"short"]), breaks):
        with pytest.raises(UserError):
            cache.fetch("a" * 64, 1000, chunks)
    assert {path.name for path in tmp_path.iterdir()} <= {"lock"}
    (tmp_path / f"{'b' * 64}.part").write_bytes(b"left by a killed process" * 300)
    filled(cache, b"c" * 9000)  # room is made of it
    assert {path.suffix for path in tmp_path.iterdir()} == {"", ".tar", ".ok"}


def test_threads_and_processes_share_one_download(tmp_path):
    cache, calls, gate = ShardCache(tmp_path, 10_000), [], threading.Event()
    data = b"z" * 500
    sha256 = hashlib.sha256(data).hexdigest()

    def chunks():
        calls.append(1)
        gate.wait(20)
        yield data

    first = threading.Thread(target=cache.fetch, args=(sha256, 500, chunks))
    first.start()
    while not calls:
        first.join(0.01)
    other = ShardCache(tmp_path, 10_000)
    assert not other.fetch(sha256, 500, chunks)  # busy: not waited for
    waiting = threading.Thread(target=other.fetch, args=(sha256, 500, chunks, True))
    waiting.start()
    gate.set()
    first.join()
    waiting.join()
    assert calls == [1]
    assert other.open(sha256, 500).read() == data


def test_a_cache_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"data\.cache_dir .*file/cache cannot be written"):
        ShardCache(tmp_path / "file" / "cache")


# ---- global batches


@pytest.mark.parametrize(
    ("world_size", "workers", "damages"),
    [(1, 0, [False, True]), (2, 3, [False]), (3, 1, [False]), (4, 2, [False])],
)
def test_global_batches_from_the_bucket_are_those_from_disk(
    uploaded, shards, world_size, workers, damages, tmp_path
):
    """With a cold cache, then with one that was damaged and half deleted."""
    expected = [joined([batch]) for batch in batches(shards)]
    for damage in damages:
        copies = sorted((tmp_path / "cache").glob("*.tar"))
        if damage:
            assert len(copies) == 4
            copies[0].unlink()
            copies[1].write_bytes(b"\xff" * copies[1].stat().st_size)
            copies[2].write_bytes(copies[2].read_bytes()[:700])
        counters = {}
        ranks = []
        for rank in range(world_size):
            store = open_store(uploaded, str(tmp_path / "cache"))
            ranks.append(list(remote_batches(store, rank, world_size, workers)))
            counters = store.counters.take()
        assert counters["hits"] + counters.get("misses", 0) >= 12 * STEPS / world_size
        for parts, reference in zip(zip(*ranks, strict=True), expected, strict=True):
            assert_same(joined(parts), reference)
        for shard in range(4):  # what the background has not fetched yet
            store.fetch(shard)


def remote_batches(store, rank, world_size, workers, start_step=0):
    from test_loader import BATCH, SEED, VIEWS

    order = Order([s.num_samples for s in store.manifest.shards], seed=SEED, global_batch_size=BATCH)
    topology = {"rank": rank, "world_size": world_size, "workers": workers}
    return train_batches(store, order, VIEWS, start_step=start_step, num_steps=STEPS, seed=SEED, **topology)


@pytest.mark.parametrize("cached", [False, True])
def test_evaluation_reads_the_same_and_whole_shards_into_the_cache(uploaded, shards, cached, tmp_path):
    def seen(store):
        stream = evaluation_batches(store, 32, rank=0, world_size=1, batch_size=7, workers=0)
        return [[part.tolist() for part in batch] for batch in stream]

    store = open_store(uploaded, str(tmp_path / "cache") if cached else "none")
    assert seen(store) == seen(open_store(shards))
    assert len(list(tmp_path.glob("cache/*.tar"))) == (4 if cached else 0)
    counters = store.counters.take()
    assert (counters.get("hits", 0), counters.get("misses", 0)) == ((50, 0) if cached else (0, 50))


def test_the_first_batch_costs_the_same_anywhere(uploaded):
    """Requests and bytes until the first batch after a resume, with a cold cache."""
    costs = []
    for start_step in (0, 5, 9):
        store = open_store(uploaded, "none")
        store.counters.take()
        stream = remote_batches(store, 0, 1, 0, start_step)
        next(stream)
        costs.append(store.counters.take()["requests"])
        stream.close()
    assert max(costs) <= 12 + 4  # its images, and the indexes of the four shards
    assert object_store._user == os.getpid()
