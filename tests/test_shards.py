"""The format of shard sets: indexes, foreign tars, damaged tars, manifests."""

import hashlib
import io
import json
import pickle
import tarfile
from dataclasses import asdict, replace

import numpy as np
import pytest
import webdataset as wds
from shard_sets import write_tar

from caco_scale.data.shard_index import INDEX_MAGICS, ShardIndex, read_sample
from caco_scale.data.shard_table import MAX_KEPT, ShardInfo, ShardTable
from caco_scale.data.shards import Manifest, plain_name
from caco_scale.data.tars import index_tar
from caco_scale.errors import UserError

SAMPLES = [
    ("a/0000.cls", b"3"),
    ("a/0000.jpg", b"x" * 700),
    ("a/0000.seg.png", b""),
    ("a/0001.JPG", b"y" * 512),
    ("a/0001.cls", b"12\n"),
    ("b/0000.jpg", b"z"),
]


@pytest.mark.parametrize("tar_format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_spans_hold_the_samples_as_webdataset_reads_them(tmp_path, tar_format):
    files = [*SAMPLES, ("long/" * 30 + "k.jpg", b"long name"), ("u/äöü.jpg", b"not ascii")]
    path = write_tar(tmp_path / "x.tar", files, format=tar_format)
    index = index_tar(path)
    data = path.read_bytes()
    ours = [
        read_sample(index, i, data[start : start + size])
        for i, (start, size) in enumerate(zip(index.starts, index.sizes, strict=True))
    ]
    theirs = [
        {key: value for key, value in sample.items() if key not in ("__url__", "__local_path__")}
        for sample in wds.WebDataset(str(path), shardshuffle=False)
    ]
    assert ours == theirs
    assert len(index) == 5
    assert index.labels.tolist() == [3, 12, -1, -1, -1]
    assert index.span(1) == (index.starts[1], index.sizes[1])
    # A span is whole tar blocks, headers included: webdataset could read it by itself.
    assert not (index.starts % 512).any()
    assert not (index.sizes % 512).any()


def test_members_and_keys(tmp_path):
    index = index_tar(write_tar(tmp_path / "x.tar", SAMPLES))
    assert list(index.keys) == ["a/0000", "a/0001", "b/0000"]
    assert index.keys[1:] == ["a/0001", "b/0000"]
    assert index.keys[-1] == "b/0000"
    assert index.members(0) == [("cls", 512, 1), ("jpg", 1536, 700), ("seg.png", 3072, 0)]
    assert index.starts.dtype == index.sizes.dtype == index.labels.dtype == np.int64
    with pytest.raises(IndexError):
        index.keys[3]


def test_index_round_trip_and_determinism(tmp_path):
    path = write_tar(tmp_path / "x.tar", SAMPLES)
    data = index_tar(path).to_bytes()
    with open(path, "rb") as file:
        assert index_tar(file).to_bytes() == data
    again = ShardIndex.from_bytes(data)
    assert again.to_bytes() == data
    assert again.keys == index_tar(path).keys
    assert [again.members(i) for i in range(3)] == [index_tar(path).members(i) for i in range(3)]


def test_an_index_of_large_offsets():
    far = 5 * 2**40
    index = ShardIndex.from_samples([("k", far, 3 * 2**33, 2**31, [("jpg", 512, 2**33)])])
    again = ShardIndex.from_bytes(index.to_bytes())
    assert (again.starts[0], again.sizes[0], again.labels[0]) == (far, 3 * 2**33, 2**31)
    assert again.members(0) == [("jpg", 512, 2**33)]


def test_a_shard_without_samples(tmp_path):
    index = index_tar(write_tar(tmp_path / "x.tar", []))
    assert len(index) == len(ShardIndex.from_bytes(index.to_bytes())) == 0
    assert list(index.keys) == []


def test_foreign_tar_without_labels_and_with_other_members(tmp_path):
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w") as tar:
        info = tarfile.TarInfo("d")
        info.type = tarfile.DIRTYPE
        tar.addfile(info)
        for name in ("README", "__meta__/x.json", "d/1.jpg", "d/1.txt", "d/2.cls"):
            info = tarfile.TarInfo(name)
            info.size = 3
            tar.addfile(info, io.BytesIO(b"abc"))
    index = index_tar(path)
    assert list(index.keys) == ["d/1"]  # without an image there is no sample
    assert index.labels.tolist() == [-1]


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE])
def test_a_tar_with_a_link_or_a_device_is_refused(tmp_path, kind):
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        info = tarfile.TarInfo("d/1.jpg")
        info.type, info.linkname = kind, "/etc/passwd"
        tar.addfile(info)
    with pytest.raises(UserError, match=r"'d/1\.jpg' is a link or a device"):
        index_tar(tmp_path / "x.tar")


@pytest.mark.parametrize("keep", [1, 511, 512, 600, 1024, 2048, 3072, 5120 - 1])
def test_a_cut_tar_is_an_error_wherever_it_is_cut(tmp_path, keep):
    path = write_tar(tmp_path / "x.tar", SAMPLES)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(UserError, match="not a whole tar"):
        index_tar(path)


def test_a_tar_with_a_damaged_header_is_an_error(tmp_path):
    path = write_tar(tmp_path / "x.tar", SAMPLES)
    data = bytearray(path.read_bytes())
    data[1024 + 100] ^= 1  # in the second header
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"not a whole tar \(cut short or damaged after 1,024 bytes, 1 files"):
        index_tar(path)


def test_two_files_of_one_name_are_an_error(tmp_path):
    with pytest.raises(UserError, match="two files"):
        index_tar(write_tar(tmp_path / "x.tar", [("a.jpg", b"1"), ("a.jpg", b"2")]))


@pytest.mark.parametrize("damage", [lambda d: d[:-1], lambda d: d + b"x", lambda d: b"", lambda d: b"PK" + d])
def test_damaged_indexes(tmp_path, damage):
    data = index_tar(write_tar(tmp_path / "x.tar", SAMPLES)).to_bytes()
    with pytest.raises(UserError, match="not a shard index"):
        ShardIndex.from_bytes(damage(data))


@pytest.mark.parametrize("label", ["9" * 32, "1700000000", "1000001"])
def test_a_label_that_no_classes_have_is_refused(tmp_path, label):
    path = write_tar(tmp_path / "x.tar", [("0.jpg", b"x"), ("0.cls", label.encode())])
    with pytest.raises(UserError, match=r"'0\.cls' has the label .*, more than 1,000,000"):
        index_tar(path)


def test_an_index_with_a_bottomless_header():
    header = b"[" * 100_000
    with pytest.raises(UserError, match="not a shard index"):
        ShardIndex.from_bytes(INDEX_MAGICS[False] + len(header).to_bytes(8, "little") + header)


def test_an_index_cannot_hold_objects(tmp_path):
    data = index_tar(write_tar(tmp_path / "x.tar", SAMPLES)).to_bytes()
    with pytest.raises(UserError, match="not a shard index"):
        ShardIndex.from_bytes(data.replace(b'"|i1"', b'"|O8"', 1))


SHARD = ShardInfo("000000.tar", 3, 10240, "ab" * 32, "000000.idx", 300, "cd" * 32)
NOTE = {"key": "000000.tar/00000003", "source": "cat/x.jpg", "reason": "empty file"}
MANIFEST = Manifest(("cat", "dog"), (1, 2), 3, 10240, ShardTable([SHARD]), [], [NOTE], {"seed": 0})


def test_manifest_round_trip():
    assert Manifest.from_json(MANIFEST.to_json()) == MANIFEST
    assert Manifest.from_json(MANIFEST.to_json()).to_json() == MANIFEST.to_json()


def many_shards(number):
    """So many, no two alike."""
    for n in range(number):
        sha256 = [hashlib.sha256(b"%d %d" % (n, part)).hexdigest() for part in (0, 1)]
        yield ShardInfo(f"train-{n:06d}.tar", n % 7, n << 20, sha256[0], f"train-{n:06d}.idx2", n, sha256[1])


def test_a_table_of_shards_is_the_tuple_of_them():
    infos = tuple(many_shards(MAX_KEPT + 500))
    table = ShardTable(infos)
    for one in (table, pickle.loads(pickle.dumps(table)), ShardTable(table)):
        assert one == infos
        assert one == table
        assert one != infos[:-1]
        assert len(one) == len(infos)
        assert [one[n] for n in range(len(infos))] == list(infos)
        assert one[-1] == infos[-1]
        assert one[3:9] == infos[3:9]
        assert infos[7] in one
        assert one.counts == [info.num_samples for info in infos]
        assert one.sha256s == [info.sha256 for info in infos]
        with pytest.raises(IndexError):
            one[len(infos)]
    assert list(ShardTable([])) == ShardTable([]).counts == ShardTable([]).sha256s == []


def test_what_a_loader_worker_gets_of_many_shards_is_small():
    table = ShardTable(many_shards(1000))
    list(map(table.__getitem__, range(1000)))  # what was asked for stays behind
    assert len(pickle.dumps(table)) < 110 * len(table)  # 64 of them are the hashes


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"version": 9}, "version 9, this program reads version 1"),
        ({"format": "other"}, "is not that of a caco_scale shard set"),
        ({"num_samples": 4}, "sums disagree"),
        ({"class_counts": [3]}, "sums disagree"),
        ({"shards": [{"name": "000000.tar"}]}, "damaged"),
        ({"shards": 7}, "damaged"),
        ({"shards": [asdict(SHARD) | {"sha256": "../../" + "a" * 58}]}, "damaged.*is not a sha256"),
        ({"shards": [asdict(SHARD) | {"index_sha256": "A" * 64}]}, "damaged.*is not a sha256"),
        ({"shards": [asdict(SHARD) | {"sha256": 7}]}, "damaged"),
        ({"shards": [asdict(SHARD) | {"index_num_bytes": -1}]}, "damaged.*-1 is not a number"),
        ({"shards": [asdict(SHARD) | {"num_samples": 3.0}]}, r"damaged.*3\.0 is not a number"),
        ({"class_counts": [-1, True]}, "damaged.*-1 is not a number"),
    ],
)
def test_bad_manifests(change, words):
    data = json.loads(MANIFEST.to_json()) | change
    with pytest.raises(UserError, match=words):
        Manifest.from_json(json.dumps(data))


@pytest.mark.parametrize(
    "text", ["", "[]", "{", "null", "[" * 100_000, '{"format": "caco_scale shard set", "version": 1}']
)
def test_not_a_manifest(text):
    with pytest.raises(UserError, match=r"manifest\.json"):
        Manifest.from_json(text)


@pytest.mark.parametrize(
    "name",
    [
        "../x.tar",
        "/etc/passwd",
        "a/b.tar",
        "pipe:rm x",
        "a|b",
        "{0..9}.tar",
        "",
        ".hidden",
        "-x",
        "a\nb",
        "x;y",
    ],
)
def test_unsafe_shard_names(name):
    with pytest.raises(UserError, match="unsafe shard name"):
        plain_name(name)
    for field in ("name", "index_name"):
        with pytest.raises(UserError, match="unsafe shard name"):
            Manifest.from_json(
                replace(MANIFEST, shards=ShardTable([replace(SHARD, **{field: name})])).to_json()
            )
