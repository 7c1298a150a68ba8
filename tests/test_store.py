"""The local store: reads what the manifest names, and says in one line what is missing or wrong."""

import hashlib
import multiprocessing
import os
import pickle
import shutil

import pytest
from shard_sets import make_shard_set

from caco_scale.data.shard_index import read_sample
from caco_scale.data.shards import MANIFEST_NAME
from caco_scale.data.store import open_store
from caco_scale.data.store.base import MAX_OPEN_FILES
from caco_scale.data.store.local import LocalStore
from caco_scale.errors import UserError, one_line
from data_prep.demo import build_demo


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    train, _ = build_demo(tmp_path_factory.mktemp("sets"), num_train=20, num_val=10)
    return train


@pytest.fixture
def shards(built, tmp_path):
    return shutil.copytree(built, tmp_path / "train")


def read_all(store):
    samples = []
    for shard, info in enumerate(store.manifest.shards):
        index = store.index(shard)
        spans = [store.read(shard, *index.span(i)) for i in range(info.num_samples)]
        samples += [read_sample(index, i, span) for i, span in enumerate(spans)]
    return samples


def digest(store):
    return hashlib.sha256(b"".join(sample["jpg"] for sample in read_all(store))).hexdigest()


def test_reads_samples(shards):
    store = open_store(shards)
    store.check()
    samples = read_all(store)
    assert len(samples) == store.manifest.num_samples == 20
    assert all(sample["jpg"].startswith(b"\xff\xd8") for sample in samples)
    labels = [int(sample["cls"]) for sample in samples]
    assert labels == store.index(0).labels.tolist()
    assert store.index(0) is store.index(0)


def test_processes_of_a_node_share_out_the_check(tmp_path):
    train = make_shard_set(tmp_path / "train", num_images=50, samples_per_shard=10)
    store = open_store(train)
    for shard, info in enumerate(store.manifest.shards):
        path = os.path.join(train, info.name)
        os.rename(path, path + ".away")
        complain = [process for process in range(3) if raises(store.check, (process, 3))]
        assert complain == [shard % 3]
        assert raises(store.check, (0, 1))
        os.rename(path + ".away", path)
    assert not raises(store.check, (0, 1))


def raises(check, *arguments):
    try:
        check(*arguments)
    except UserError:
        return True
    return False


def test_a_file_address_and_a_home_directory(shards, monkeypatch):
    assert digest(open_store(f"file://{shards}")) == digest(open_store(shards))
    monkeypatch.setenv("HOME", str(shards.parent))
    assert open_store("~/train").manifest.num_samples == 20


@pytest.mark.parametrize("method", ["fork", "forkserver"])
def test_used_by_parent_and_children(shards, method):
    store = open_store(shards)
    expected = digest(store)
    with multiprocessing.get_context(method).Pool(2) as pool:
        assert pool.map(digest, [store] * 4) == [expected] * 4
    assert digest(store) == expected


def test_a_pickle_is_small_and_reads_on(shards):
    store = open_store(shards)
    expected = digest(store)
    again = pickle.loads(pickle.dumps(store))
    assert isinstance(again, LocalStore)
    assert digest(again) == expected


def test_few_files_stay_open(tmp_path):
    from caco_scale.data.folders import image_folders
    from data_prep.build import build_set
    from data_prep.demo import DemoSource
    from data_prep.jobs import Settings

    source = DemoSource("train", MAX_OPEN_FILES + 20)
    folder = image_folders(source.scan(), "demo")[None]
    build_set(source, folder, str(tmp_path / "many"), Settings(1, workers=1), quiet=True)
    store = open_store(tmp_path / "many")
    before = len(os.listdir("/proc/self/fd"))
    read_all(store)
    assert len(os.listdir("/proc/self/fd")) - before <= MAX_OPEN_FILES
    read_all(store)


def fails(words, function, *args):
    with pytest.raises(UserError) as caught:
        function(*args)
    assert words in one_line(caught.value)
    assert "\n" not in str(caught.value)


def test_what_is_not_a_shard_set(tmp_path, shards):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file.tar").write_bytes(b"x")
    (tmp_path / "unfinished" / ".build").mkdir(parents=True)
    fails("python -m data_prep build", open_store, tmp_path / "missing")
    fails("does not exist", open_store, tmp_path / "missing")
    fails("is a file, not a directory", open_store, tmp_path / "file.tar")
    fails("has no manifest.json: it is not a shard set", open_store, tmp_path / "empty")
    fails("its build has not finished", open_store, tmp_path / "unfinished")
    fails(f"did you mean {tmp_path}/train?", open_store, tmp_path)
    fails("is empty", open_store, "")
    (shards / MANIFEST_NAME).write_text("{}")
    fails("is not that of a caco_scale shard set", open_store, shards)
    (shards / MANIFEST_NAME).write_bytes(b"\xff\xfe\x00")
    fails("cannot read", open_store, shards)


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("pipe:cat x.tar", "shell pipe"),
        ("/data/{000..012}.tar", "data_prep index '/data/{000..012}.tar'"),
        ("/data/{a..b/{c}.tar", "not a pattern"),
        ("/data/{12..3}.tar", "12..3 is not a range"),
        ("/data/x | rm", "shell pipe"),
        ("s3://", "is not an address"),
        ("s3:/bucket/set", "a slash is missing: s3://bucket/set"),
        ("s3://bucket/../other", "is not an address"),
        ("https://host/set?token=1", "is not an address"),
        ("https://me:secret@host/set", "put no password"),
        ("ftp://host/train", "unknown kind of address ftp://"),
    ],
)
def test_addresses(url, words):
    fails(words, open_store, url)


def test_damaged_shards(shards):
    store = open_store(shards)
    info = store.manifest.shards[0]
    tar, index = shards / info.name, shards / info.index_name
    good_tar, good_index = tar.read_bytes(), index.read_bytes()

    tar.write_bytes(good_tar[:5000])
    fails(f"{info.name} has 5,000 bytes, {info.num_bytes:,} expected", store.check)
    start, size = store.index(0).span(15)
    fails(
        f"{info.name} has 5,000 bytes, {info.num_bytes:,} expected", open_store(shards).read, 0, start, size
    )
    tar.unlink()
    fails(f"{info.name}: No such file", store.check)
    fails(f"{info.name}: No such file", open_store(shards).read, 0, 0, 512)
    fails("data_prep repair", store.check)
    tar.write_bytes(good_tar)
    store.check()

    index.write_bytes(good_index[:-1] + b"?")
    store.check()  # sizes only
    fails(
        f"{info.index_name} ({len(good_index):,} bytes) differs from the manifest",
        open_store(shards).index,
        0,
    )
    index.unlink()
    fails("No such file", store.check)
    fails("No such file", open_store(shards).index, 0)
