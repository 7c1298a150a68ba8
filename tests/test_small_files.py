"""Manifests, indexes and headers of tars that are hostile or something else: one line, bounded memory and time."""

import gzip
import hashlib
import io
import json
import os
import subprocess
import sys
import tarfile
import threading
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from launch import ROOT
from shard_sets import make_shard_set

from caco_scale.data import small_files
from caco_scale.data.object_store import RetryPolicy
from caco_scale.data.shard_index import ShardIndex
from caco_scale.data.shards import MANIFEST_NAME, Manifest
from caco_scale.data.store import open_store
from caco_scale.data.tars import index_tar
from caco_scale.errors import UserError
from data_prep.index import index
from data_prep.tar import TarSource
from data_prep.verify import verify

PAGE = b"\n<!DOCTYPE html><html><title>Sign in</title></html>"
NOT_IT = {
    "gzip": (gzip.compress(b"{}"), "it is compressed: decompress it (gzip -d)"),
    "bzip2": (b"BZh91AY", "(bzip2 -d)"),
    "zstd": (b"\x28\xb5\x2f\xfd\x00", "(zstd -d)"),
    "page": (PAGE, "it is a web page: the server likely wants a login"),
    "page with a mark": (b"\xef\xbb\xbf" + PAGE, "it is a web page"),
    "xml": (b"<?xml version='1.0'?><Error><Code>NoSuchKey", "it is XML, likely a store's error"),
    "lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:00", "git lfs pull"),
    "utf-16": ('{"format": 1}'.encode("utf-16"), "UTF-16"),
    "latin": (b'{"format": "\xe9"}', "can't decode"),
    "empty": (b"", "it is empty"),
}


@pytest.fixture
def shards(tmp_path):
    return Path(make_shard_set(tmp_path / "set", num_images=8, samples_per_shard=4, size=8))


def refusal(function, *arguments, **options):
    """The one line of the UserError that a call raises."""
    with pytest.raises(UserError) as caught:
        function(*arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("kind", NOT_IT)
def test_what_a_manifest_or_an_index_is_instead_is_said(kind, shards):
    data, words = NOT_IT[kind]
    if kind != "latin":
        name = open_store(shards).manifest.shards[0].index_name
        (shards / name).write_bytes(data)
        line = refusal(open_store(shards).index, 0)
        assert words in line
        assert str(shards / name) in line
    (shards / MANIFEST_NAME).write_bytes(data)
    line = refusal(open_store, shards)
    assert words in line
    assert str(shards / MANIFEST_NAME) in line


@pytest.mark.parametrize("kind", ["fifo", "device", "folder"])
def test_only_regular_files_are_read(kind, shards, tmp_path):
    store = open_store(shards)
    info = store.manifest.shards[0]

    def replace(name):
        (shards / name).unlink()
        if kind == "fifo":
            os.mkfifo(shards / name)
        elif kind == "device":
            (shards / name).symlink_to("/dev/zero")
        else:
            (shards / name).mkdir()

    for name, use in (
        (info.index_name, lambda: open_store(shards).index(0)),
        (info.name, lambda: open_store(shards).read(0, 0, 512)),
        (info.name, lambda: index(shards, to=tmp_path / "index")),
        (MANIFEST_NAME, lambda: open_store(shards)),
        (MANIFEST_NAME, lambda: verify(shards)),
    ):
        if (shards / name).is_file():
            replace(name)
        line = refusal(use)
        assert "it is not a regular file" in line
        assert name in line


def test_a_local_file_too_large_or_too_slow(shards, monkeypatch):
    path = str(shards / MANIFEST_NAME)
    size = os.path.getsize(path)
    assert small_files.read_small(path, size) == Path(path).read_bytes()
    assert f"has {size:,} bytes or more, at most {size - 1:,}" in refusal(
        small_files.read_small, path, size - 1
    )
    clock = iter(range(0, 10**6, 50))
    monkeypatch.setattr(small_files.time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(small_files, "CHUNK_BYTES", 1)
    line = refusal(small_files.read_small, path, size)
    assert "comes too slowly: 3 bytes in 150 seconds, 120 seconds are the limit" in line


# ---- web servers


class Server:
    """A web server whose answer is ``body`` of ``claimed`` bytes, ``pause`` seconds before each byte."""

    def __init__(self, body, pause=0.0, claimed=None, status=200):
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_):
                pass

            def do_GET(self):
                if pause and outer.stop.wait(pause):
                    return
                self.send_response(status)
                self.send_header("Content-Length", str(len(body) if claimed is None else claimed))
                self.send_header("Last-Modified", "Mon, 01 Jan 2024 00:00:00 GMT")
                self.end_headers()
                step = 1 if pause else len(body) or 1
                for at in range(0, len(body), step):
                    if pause and outer.stop.wait(pause):
                        return
                    self.wfile.write(body[at : at + step])

            do_HEAD = do_GET

        self.stop = threading.Event()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}/set"

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_):
        self.stop.set()
        self.server.shutdown()
        self.server.server_close()


@pytest.mark.parametrize(
    ("body", "options", "words"),
    [
        (PAGE, {}, "it is a web page: the server likely wants a login"),
        (gzip.compress(b"{}", mtime=0), {}, "it is compressed"),
        (b"{" + b" " * 5000, {"pause": 0.05}, "1 seconds are the limit"),
        (b"", {"pause": 0.7}, "has no manifest.json"),
        (b"{}", {"claimed": 10**12}, "has 1,000,000,000,000 bytes or more, at most 536,870,912"),
        (b"{}", {"claimed": 100}, "attempts in a row failed"),
        (b"{}", {}, "is not that of a caco_scale shard set"),
        (b"busy", {"status": 503}, "attempts in a row failed"),
        (b"busy", {"status": 503, "pause": 0.6}, "1 s are the limit"),
    ],
)
def test_a_web_servers_manifest_has_a_limit_of_time_and_size(body, options, words):
    with Server(body, **options) as server:
        policy = RetryPolicy(
            2 if "claimed" in options or options == {"status": 503} else 50, 5, small_seconds=1
        )
        line = refusal(open_store, server.url, "none", retry_policy=policy)
    assert words in line
    assert server.url in line


def test_a_login_page_instead_of_an_index_or_a_shard(shards, tmp_path):
    text = (shards / MANIFEST_NAME).read_text()
    with Server(PAGE) as server:
        manifest = json.loads(text)
        manifest["build"] = {"foreign": True, "shards_at": server.url}
        (shards / MANIFEST_NAME).write_text(json.dumps(manifest))
        store = open_store(shards, str(tmp_path / "cache"), retry_policy=RetryPolicy(1, 5))
        assert "it is a web page" in refusal(lambda: list(store.chunks(0)))
        info = store.manifest.shards[0]
        read = store.remote.read_whole
        assert "it is a web page" in refusal(read, info.index_name, num_bytes=info.index_num_bytes)


# ---- hand-made indexes


def made_index(**changes):
    """The bytes of an index of two samples, ``k1`` and ``k2`` with two files each, and what is changed of it."""
    parts = {
        "keys": b"k1k2",
        "extensions": ["cls", "jpg"],
        "starts": [0, 2048],
        "sizes": [2048, 2048],
        "labels": [0, -1],
        "key_ends": [2, 4],
        "member_ends": [2, 4],
        "extension": [0, 1, 0, 1],
        "offset": [512, 1536, 512, 1536],
        "size": [1, 512, 1, 512],
        "names": ShardIndex._ARRAYS,
        "lengths": {},
        "magic": b"CACOIDX1",
        "tail": b"",
        "kind": "<i8",
    } | changes
    arrays = {name: np.array(parts[name], "<i8") for name in ShardIndex._ARRAYS}
    listed = [[name, parts["kind"], parts["lengths"].get(name, len(arrays[name]))] for name in parts["names"]]
    header = {"keys": parts["lengths"].get("keys", len(parts["keys"])), "extensions": parts["extensions"]}
    header = parts.get("header", json.dumps(header | {"arrays": listed}).encode())
    size = parts.get("header_size", len(header)).to_bytes(8, "little")
    body = b"".join(arrays[name].tobytes() for name in parts["names"])
    return parts["magic"] + size + header + parts["keys"] + body + parts["tail"]


HAND_MADE = [
    {"magic": b"CACOIDX2"},
    {"magic": b"CACOIDX2", "tail": bytes(15)},
    {"tail": b"x"},
    *({"kind": kind} for kind in (",2", "|O", "<f8", "(9,)i4", "i1000000000", ">i8", 8, None, ["<i8"], {})),
    {"magic": b"CACOIDX9"},
    {"magic": b"\x1f\x8b\x00\x00\x00\x00\x00\x00"},
    {"header_size": 1 << 63},
    {"header_size": 0},
    {"header": b"[]"},
    {"header": b"null"},
    {"header": b"{"},
    {"header": b'{"keys": 4}'},
    {"header": b"[" * 100_000},
    {"header": b'{"keys": 4, "extensions": 7, "arrays": []}'},
    {"header": b'{"keys": 4, "extensions": [], "arrays": [[1, 2]]}'},
    {"header": b'{"keys": 4, "extensions": [], "arrays": 3}'},
    {"extensions": [1, 2]},
    {"extensions": "cj"},
    {"extensions": ["jpg"]},
    {"names": ShardIndex._ARRAYS[1:]},
    {"names": (*ShardIndex._ARRAYS, "starts")},
    *({"lengths": {name: wrong}} for name in ("keys", "size") for wrong in (-1, 1e9, True, "2", None, 2**70)),
    {"lengths": {"starts": float("nan")}},
    {"lengths": {"starts": -1}},
    {"starts": [-512, 2048]},
    {"starts": [0, 1024]},
    {"starts": [4096, 0]},
    {"starts": [2**63 - 1, 0]},
    {"sizes": [2**63 - 1, 2048]},
    {"sizes": [2048, -1]},
    {"starts": [0]},
    {"labels": [0, -2]},
    {"key_ends": [4, 2]},
    {"key_ends": [2, 5]},
    {"key_ends": [-1, 4]},
    {"member_ends": [2, 3]},
    {"member_ends": [2, 400]},
    {"member_ends": [4, 2]},
    {"extension": [0, 2, 0, 1]},
    {"extension": [0, -1, 0, 1]},
    {"offset": [512, 2048, 512, 1536]},
    {"offset": [512, 2**63 - 1, 512, 1536]},
    {"offset": [-1, 1536, 512, 1536]},
    {"size": [1, 2**63 - 1, 1, 512]},
    {"size": [1, 512, -1, 512]},
    {"keys": b"k1k2k3"},
]


@pytest.mark.parametrize("changes", HAND_MADE, ids=lambda changes: "-".join(map(str, changes)))
def test_hand_made_indexes_are_refused(changes):
    good = ShardIndex.from_bytes(made_index())
    assert [good.members(i) for i in range(2)] == [[("cls", 512, 1), ("jpg", 1536, 512)]] * 2
    with np.errstate(all="raise"):
        assert refusal(ShardIndex.from_bytes, made_index(**changes)).startswith("not a shard index (")


def test_an_index_that_does_not_fit_its_shard_is_named(shards):
    good = json.loads((shards / MANIFEST_NAME).read_text())
    made = partial(made_index, magic=b"CACOIDX2", tail=bytes(16))
    for data, num_samples, words in (
        (made(starts=[0, 10**9]), 2, "has samples behind the shard's"),
        (made(starts=[0, 1024]), 2, "its samples overlap"),
        (made(), 4, "has 2 samples, 4 expected"),
    ):
        of_index = {"index_num_bytes": len(data), "index_sha256": hashlib.sha256(data).hexdigest()}
        one = good["shards"][0] | of_index | {"num_samples": num_samples}
        counts = {"num_samples": num_samples + 4, "class_counts": [1] * 4}
        (shards / MANIFEST_NAME).write_text(json.dumps(good | counts | {"shards": [one, good["shards"][1]]}))
        (shards / one["index_name"]).write_bytes(data)
        line = refusal(open_store(shards).index, 0)
        assert words in line
        assert str(shards / one["index_name"]) in line


# ---- manifests


def test_manifests_with_wrong_types_and_impossible_claims(shards):
    good = json.loads((shards / MANIFEST_NAME).read_text())
    one = good["shards"][0]
    assert Manifest.from_json(json.dumps(good)).num_samples == 8
    cases = [
        (
            {"num_samples": 10**9, "shards": [one | {"num_samples": 10**9 - 4}, good["shards"][1]]},
            "cannot have",
        ),
        ({"shards": [one, one]}, "is named twice"),
        ({"shards": [one, good["shards"][1] | {"index_name": one["name"]}]}, "is named twice"),
        ({"class_counts": [2, 2, 2, 3]}, "sums disagree"),
        ({"classes": "abcd"}, "classes is no list of str"),
        ({"classes": [1, 2, 3, 4]}, "classes is no list of str"),
        ({"class_counts": {"a": 1}}, "class_counts is no list of int"),
        ({"class_counts": [2.0, 2, 2, 2]}, "class_counts is no list"),
        ({"shards": {"a": one}}, "shards is no list of dict"),
        ({"shards": [[1]]}, "shards is no list of dict"),
        ({"shards": [one | {"more": 1}]}, "damaged"),
        ({"fixed": None}, "fixed is no list"),
        ({"rejected": [1]}, "rejected is no list of dict"),
        ({"build": []}, "build is no dict"),
        ({"build": {"shards_at": 7}}, "7 is no shards_at"),
        ({"build": {"shards_at": "a\0b"}}, "is no shards_at"),
        ({"build": {"image": ["jpg"]}}, "is no image"),
        ({"num_bytes": 2**70, "shards": [one | {"num_bytes": 2**70}]}, "is not a number"),
        ({"num_samples": True}, "damaged"),
        ({"num_samples": float("nan")}, "damaged"),
        *(
            ({"shards": [one | {key: name}, good["shards"][1]]}, "unsafe shard name")
            for key in ("name", "index_name")
            for name in (
                "..",
                "../a.tar",
                "/etc/passwd",
                "a\0b.tar",
                "a\nb.tar",
                "a\ud800.tar",
                "a\u2028b",
                "",
                None,
                7,
            )
        ),
    ]
    for change, words in cases:
        line = refusal(Manifest.from_json, json.dumps(good | change))
        assert words in line, change
        assert MANIFEST_NAME in line or "manifest" in line
    assert "more than 16,000,000 values" in refusal(Manifest.from_json, "[" + "0," * 16_000_000)


# ---- headers of tars


def pax(records, kind=b"x"):
    """An extended header as it lies in a tar."""
    body = b""
    for key, value in records:
        length = len(key) + len(value) + 3
        length += len(str(length + len(str(length))))
        body += b"%d %s=%s\n" % (length, key, value)
    return header("pax", len(body), kind) + body + bytes(-len(body) % 512)


def header(name, size, kind=b"0"):
    info = tarfile.TarInfo(name)
    info.size, info.type = size, kind
    return info.tobuf(tarfile.USTAR_FORMAT)


FILE = header("1.jpg", 1) + b"x" + bytes(511)
END = bytes(1024)
BOMBS = {
    "a long chain": pax([(b"comment", b"x")]) * 5000 + FILE,
    "a chain for all files": pax([(b"comment", b"x")], b"g") * 5000 + FILE,
    "many fields for all files": b"".join(pax([(b"k%d" % i, b"x" * 900)], b"g") + FILE for i in range(2000)),
    "a header of gigabytes": header("pax", 7 << 30, b"x") + FILE,
    "a negative size of a header": header("pax", 0, b"x").replace(b"00000000000\0", b"\xff" * 12, 1) + FILE,
    "a name of gigabytes": header("@LongLink", 7 << 30, b"L") + FILE,
    "a name of megabytes": header("@LongLink", 3 << 20, b"L") + b"a" * (3 << 20) + FILE,
    "a sparse map": pax([(b"GNU.sparse.map", b"0,1," * 2_000_000 + b"0,1")]) + FILE,
    "a sparse map of claims": pax([(b"GNU.sparse.major", b"1"), (b"GNU.sparse.minor", b"0")])
    + header("1.jpg", 1)
    + b"999999999\n"
    + b"1\n" * 4_000_000,
    "a map without an end of line": pax([(b"GNU.sparse.major", b"1"), (b"GNU.sparse.minor", b"0")])
    + header("1.jpg", 1)
    + b"9\n"
    + b"1" * 8_000_000,
    "a sparse file": pax([(b"GNU.sparse.map", b"0,1"), (b"GNU.sparse.size", b"3500000000")]) + FILE,
    "a size of gigabytes": pax([(b"size", b"3500000000")]) + FILE,
    "a size of many digits": pax([(b"size", b"9" * 100_000)]) + FILE,
    "a negative size": pax([(b"size", b"-512")]) + FILE,
    "a number without end": header("pax", 1 << 19, b"x") + b"1" * (1 << 19) + FILE,
    "numbers of zeros": header("pax", 1 << 19, b"x")
    + (b"0" * 298 + b"1 ").ljust((1 << 19) - 1, b"a")
    + b"="
    + FILE,
}
HUNT = """
import resource, sys, time
resource.setrlimit(resource.RLIMIT_AS, (2 << 30, 2 << 30))
from caco_scale.data.tars import index_tar
from caco_scale.errors import UserError
from data_prep.tar import TarSource
for path in sys.argv[1:]:
    for read in (index_tar, lambda path: TarSource(path, path).scan()):
        start = time.process_time()
        try:
            read(path)
        except UserError as error:
            assert "\\n" not in str(error)
            print("refused", path, f"{time.process_time() - start:.1f}", error)
        else:
            print("read", path, f"{time.process_time() - start:.1f}")
"""


def test_headers_of_tars_take_bounded_memory_and_time(tmp_path):
    """In a process of 2 GB, that is ended after two minutes; each of the bombs took gigabytes, or many minutes."""
    for name, data in BOMBS.items():
        (tmp_path / f"{name}.tar").write_bytes(data + END)
    paths = [str(tmp_path / f"{name}.tar") for name in BOMBS]
    done = subprocess.run(
        [sys.executable, "-c", HUNT, *paths],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=ROOT,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 2 * len(BOMBS)
    refused = {line.split(".tar")[0].rpartition("/")[2] for line in lines if line.startswith("refused")}
    harmless = {"numbers of zeros"}
    assert set(BOMBS) - refused <= harmless, done.stdout


def test_long_names_and_ordinary_extended_headers_are_read(tmp_path):
    name = "d/" + "x" * 200 + "/" + "7" * 250 + ".jpg"
    for number, kind in enumerate((tarfile.PAX_FORMAT, tarfile.GNU_FORMAT)):
        path = tmp_path / f"{number}.tar"
        with tarfile.open(path, "w", format=kind, pax_headers={"comment": "of git archive"}) as tar:
            for i in range(300):
                info = tarfile.TarInfo(name.replace(".jpg", f"{i}.jpg"))
                info.size, info.mtime = 1, 0.5
                info.pax_headers = {"SCHILY.xattr.user.note": "x" * 60_000} if i == 7 else {}
                tar.addfile(info, io.BytesIO(b"x"))
        assert len(index_tar(path)) == len(TarSource(path, path).scan().files) == 300
