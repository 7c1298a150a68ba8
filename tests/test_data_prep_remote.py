"""Building, verifying, repairing and indexing in a real bucket; ImageNet's archives; parquet; hostile tars."""

import io
import json
import os
import re
import resource
import signal
import tarfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from launch import SMALL, launch
from s3_server import WebServer
from test_data_prep import CLASSES, command, encoded, files_of, processes_in, refused, start, write_tree

from caco_scale.data.object_store import Remote
from caco_scale.data.shard_index import ShardIndex
from caco_scale.data.store import open_store
from caco_scale.data.tars import index_tar
from caco_scale.errors import UserError
from data_prep.build import build
from data_prep.index import index
from data_prep.repair import repair
from data_prep.verify import verify

WNIDS = ("n01440764", "n02119022", "n04005630")


@pytest.fixture
def tree(tmp_path):
    return write_tree(tmp_path / "images")


def objects(url):
    """Every object directly below an address with its bytes."""
    remote = Remote(url)
    return {name: remote.read_whole(name) for name in remote.listing()}


def local_files(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir() if path.is_file()}


# ---- straight into the bucket


def test_a_set_in_the_bucket_is_the_one_on_disk_at_any_number_of_workers(tree, s3, tmp_path):
    build(tree, tmp_path / "set", samples_per_shard=8, workers=1)
    [(place, manifest, was_there)] = build(tree, f"{s3}/one", samples_per_shard=8, workers=1)
    assert (place, was_there) == (f"{s3}/one", False)
    done = command("build", tree, f"{s3}/three", "--samples-per-shard", 8, "--workers", 3)
    assert done.returncode == 0, done.stderr
    expected = local_files(tmp_path / "set")
    assert objects(f"{s3}/one") == objects(f"{s3}/three") == expected
    assert not Remote(f"{s3}/one").listing(".build")
    assert build(tree, f"{s3}/one", samples_per_shard=8)[0][2]  # finished already
    assert verify(f"{s3}/one", full=True, workers=1) == [(f"{s3}/one", manifest)]
    line = refused("another build (seed 0 there, 1 now", "build", tree, f"{s3}/one", "--seed", 1)
    assert "samples per shard 8 there, 1000 now" in line
    refused(
        "is not imagenet1k-train: it has 30 images", "verify", f"{s3}/one", "--expect", "imagenet1k-train"
    )


def test_parts_share_a_build_in_the_bucket(tree, s3, tmp_path):
    options = ("--samples-per-shard", "3", "--workers", "1")
    build(tree, tmp_path / "local", samples_per_shard=3)
    url = f"{s3}/parts"
    with ThreadPoolExecutor() as pool:
        run = lambda part: command("build", tree, url, *options, "--part", f"{part}/2")
        parts = list(pool.map(run, (1, 2)))
    assert [part.returncode for part in parts] == [0, 0], parts
    assert objects(url) == local_files(tmp_path / "local")
    assert "was finished already" in command("build", tree, url, *options, "--part", "2/2").stdout


@pytest.mark.long
def test_killed_twice_on_the_way_into_the_bucket(s3, tmp_path):
    source = write_tree(tmp_path / "images", 20)
    build(source, tmp_path / "whole", samples_per_shard=1, workers=1)
    target, remote = f"{s3}/killed", Remote(f"{s3}/killed")
    for workers, until in ((2, 8), (1, 20)):
        process = start("build", source, target, "--samples-per-shard", 1, "--workers", workers)
        while process.poll() is None and len(remote.listing(".build")) <= until:
            time.sleep(0.05)
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
        for _ in range(500):
            if not processes_in(process.pid):
                break
            time.sleep(0.02)
        assert remote.size("manifest.json") is None
        with pytest.raises(UserError, match=r"has no manifest\.json"):
            open_store(target, "none")
    recorded = len(remote.listing(".build")) - 1
    assert 20 <= recorded < 60
    done = command("build", source, target, "--samples-per-shard", 1, "--workers", 2)
    assert done.returncode == 0, done.stderr
    assert objects(target) == local_files(tmp_path / "whole")


def test_what_a_web_server_cannot_do_is_said_at_once(tree, tmp_path):
    build(tree, tmp_path / "sets" / "train", workers=1)
    with WebServer(tmp_path / "sets") as server:
        cannot = "cannot be written: give s3://, gs:// or az://"
        refused(cannot, "build", tree, f"{server.url}/new")
        refused(cannot, "repair", tree, f"{server.url}/train")
        refused(cannot, "index", f"{server.url}/train/{{000000..000000}}.tar")
        refused("a web server cannot be listed", "index", f"{server.url}/train", "--to", tmp_path / "index")
    refused("a slash is missing: s3://bucket/set", "build", tree, "s3:/bucket/set")


def test_a_full_disk_on_the_way_into_the_bucket(tree, s3):
    """The disk that is full is that of the temporary directory; a limit on the size of files stands for it."""
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (4_000, 4_000))
    line = refused("no space for", "build", tree, f"{s3}/full", "--workers", 1, preexec_fn=limit)
    assert re.search(r"no space for /.*caco-build-\S+: .* MB are free there", line)


def test_repair_builds_what_is_bad_again(tree, s3, tmp_path):
    build(tree, f"{s3}/bad", samples_per_shard=8, workers=1)
    expected = objects(f"{s3}/bad")
    remote = Remote(f"{s3}/bad")
    remote.delete(["000001.tar"])
    remote.write("000002.tar", expected["000002.tar"][:-1] + b"?")
    remote.write("000003.idx2", b"?")
    refused("3 of 4 shards are bad, first 000001.tar", "verify", f"{s3}/bad", "--full", "--workers", 1)
    done = command("repair", tree, f"{s3}/bad", "--workers", 1)
    assert done.returncode == 0, done.stderr
    assert "3 of 4 shards built again: 000001.tar, 000002.tar, 000003.tar" in done.stdout
    assert objects(f"{s3}/bad") == expected
    assert repair(tree, f"{s3}/bad", workers=1)[1] == []
    build(tree, tmp_path / "set", samples_per_shard=8, workers=1)
    files = files_of(tmp_path / "set")
    data = bytearray((tmp_path / "set/000001.tar").read_bytes())
    data[700] ^= 1
    (tmp_path / "set/000001.tar").write_bytes(data)
    assert repair(tree, tmp_path / "set", workers=1)[1] == ["000001.tar"]
    assert files_of(tmp_path / "set") == files
    (tree / "ant" / "000.jpg").write_bytes(encoded(999))
    (tmp_path / "set/000001.tar").unlink()
    with pytest.raises(UserError, match=r"another build|another sha256"):
        repair(tree, tmp_path / "set", workers=1)


def test_a_dry_run_writes_nothing(tree, s3, tmp_path):
    for target in (f"{s3}/dry", tmp_path / "dry"):
        done = command("build", tree, target, "--dry-run", "--samples-per-shard", 8)
        assert done.returncode == 0, done.stderr
        assert "would write 30 images in 4 shards, about 0.1 MB" in done.stdout
    assert not (tmp_path / "dry").exists()
    assert not Remote(f"{s3}/dry").listing()


def test_short_side(tree, tmp_path):
    [(path, manifest, _)] = build(tree, tmp_path / "set", short_side=20, workers=1)
    from PIL import Image
    from test_data_prep import samples_of

    sizes = {Image.open(io.BytesIO(s["jpg"])).size for s in samples_of(path).values()}
    assert sizes == {(27, 20)}  # of 40 x 30
    assert manifest.build["short_side"] == 20
    assert len(manifest.fixed) == 30
    with pytest.raises(UserError, match="short side"):
        build(tree, tmp_path / "set", short_side=25, workers=1)


# ---- ImageNet's archives


def add(tar, name, data):
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


def archives(folder, per_class=8):
    """Fakes of the training and validation archives, and of the devkit's labels as text: three paths."""
    train, val, labels = (
        folder / name for name in ("ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar", "labels")
    )
    with tarfile.open(train, "w") as outer:
        for c, wnid in enumerate(reversed(WNIDS)):  # not in sorted order
            inner = io.BytesIO()
            with tarfile.open(fileobj=inner, mode="w") as tar:
                for i in range(per_class):
                    add(tar, f"{wnid}_{i}.JPEG", encoded(100 * c + i, size=(60, 50)))
            add(outer, f"{wnid}.tar", inner.getvalue())
    order = [WNIDS[(2 * i) % 3] for i in range(9)]
    with tarfile.open(val, "w") as tar:
        for i in reversed(range(9)):
            add(tar, f"ILSVRC2012_val_{i + 1:08d}.JPEG", encoded(900 + i))
    labels.write_text("".join(f"{wnid}\n" for wnid in order))
    return train, val, labels


def test_the_training_archive_is_read_in_place(tmp_path):
    train, _, _ = archives(tmp_path)
    before = set(tmp_path.rglob("*"))
    [(path, manifest, _)] = build(train, tmp_path / "set", samples_per_shard=10, workers=2)
    assert set(tmp_path.rglob("*")) - before == {Path(path), *Path(path).iterdir()}
    assert manifest.classes == WNIDS
    assert manifest.class_counts == (8, 8, 8)
    unpacked = tmp_path / "tree"
    for c, wnid in enumerate(reversed(WNIDS)):
        (unpacked / wnid).mkdir(parents=True)
        for i in range(8):
            (unpacked / wnid / f"{wnid}_{i}.JPEG").write_bytes(encoded(100 * c + i, size=(60, 50)))
    build(unpacked, tmp_path / "from-tree", samples_per_shard=10, workers=1)
    assert files_of(tmp_path / "from-tree") == files_of(path)
    refused("its md5 is", "build", train, tmp_path / "x", "--md5", "0" * 32)
    data = train.read_bytes()
    (tmp_path / "cut.tar").write_bytes(data[: len(data) // 2])
    refused("is not a whole tar", "build", tmp_path / "cut.tar", tmp_path / "x")


@pytest.mark.parametrize("kind", ["wnids", "pairs", "devkit"])
def test_validation_labels_become_positions_of_the_sorted_wnids(kind, tmp_path):
    _, val, labels = archives(tmp_path)
    wnids = labels.read_text().split()
    if kind == "pairs":
        pairs = [f"ILSVRC2012_val_{i + 1:08d}.JPEG {wnid}\n" for i, wnid in enumerate(wnids)]
        labels.write_text("".join(reversed(pairs)))
    if kind == "devkit":
        scipy_io = pytest.importorskip("scipy.io", reason="the devkit's meta.mat needs scipy")
        # Ids in an order that is not that of the WNIDs, and a parent class, as in the devkit.
        ids = {WNIDS[2]: 1, WNIDS[0]: 2, WNIDS[1]: 3, "n00000001": 4}
        rows = [(number, wnid, 3 if number == 4 else 0) for wnid, number in ids.items()]
        types = [("ILSVRC2012_ID", "O"), ("WNID", "O"), ("num_children", "O")]
        labels = tmp_path / "devkit" / "data"
        labels.mkdir(parents=True)
        scipy_io.savemat(labels / "meta.mat", {"synsets": np.array(rows, dtype=types)})
        truth = "".join(f"{ids[wnid]}\n" for wnid in wnids)
        (labels / "ILSVRC2012_validation_ground_truth.txt").write_text(truth)
        labels = labels.parent
    done = command("build", val, tmp_path / "set", "--labels", labels)
    assert done.returncode == 0, done.stderr
    from test_data_prep import samples_of

    manifest = open_store(tmp_path / "set").manifest
    assert manifest.classes == WNIDS
    assert manifest.class_counts == (3, 3, 3)
    for sample in samples_of(tmp_path / "set").values():
        name = Path(json.loads(sample["json"])["source"]).stem
        number = int(name[-8:]) - 1
        assert sample["jpg"] == encoded(900 + number)
        assert WNIDS[int(sample["cls"])] == wnids[number]
    few = tmp_path / "few"
    few.write_text("\n".join(wnids[:-1]))
    refused("8 labels for 9 images", "build", val, tmp_path / "x", "--labels", few)


@pytest.mark.long
def test_archives_into_the_bucket_killed_twice_verified_and_trained_on(s3, tmp_path):
    train, _, _ = archives(tmp_path)
    target, remote = f"{s3}/imagenet/train", Remote(f"{s3}/imagenet/train")
    for until in (2, 5):
        process = start("build", train, target, "--samples-per-shard", 1, "--workers", 1)
        while process.poll() is None and len(remote.listing(".build")) <= until:
            time.sleep(0.02)
        assert process.poll() is None
        process.kill()
        process.communicate()
        assert remote.size("manifest.json") is None
    done = command("build", train, target, "--samples-per-shard", 1)
    assert done.returncode == 0, done.stderr
    done = command("verify", f"{s3}/imagenet", "--full", "--workers", 1)
    assert done.returncode == 0, done.stderr
    assert f"{target}: fine, 24 samples in 24 shards (every byte and image checked)" in done.stdout
    tiny = {  # the recipe's method on a network and images that a CPU trains
        **{
            "data.shards": target,
            "data.global_batch_size": 8,
            "data.workers": 1,
            "run.dir": tmp_path / "run",
        },
        **{name: SMALL[name] for name in ("model.projector_hidden", "model.embedding_dim", "bank.size")},
        **{
            "model.arch": "tiny",
            "views.size": 32,
            "run.max_steps": 2,
            "eval.knn_every": 0,
            "run.log_every": 1,
        },
        "data.cache_dir": tmp_path / "cache",
    }
    launch(tiny, recipe="caco_r50_200ep", num_processes=2)
    assert json.loads((tmp_path / "run/DONE").read_text())["step"] == 2


# ---- parquet


def write_parquet(path, images, labels):
    pyarrow = pytest.importorskip("pyarrow", reason="parquet needs pyarrow")
    import pyarrow.parquet as parquet

    path.parent.mkdir(exist_ok=True)
    card = {"info": {"features": {"label": {"names": list(CLASSES)}}}}
    images = [{"bytes": image, "path": "x.jpg"} for image in images]
    table = pyarrow.table({"image": images, "label": labels})
    parquet.write_table(table.replace_schema_metadata({"huggingface": json.dumps(card)}), path)


def test_parquet_of_several_splits_or_without_labels_is_refused(tmp_path):
    images = [encoded(i) for i in range(3)]
    flags = ["build", tmp_path / "data", tmp_path / "set", "--format", "parquet"]
    write_parquet(tmp_path / "data/train-00000-of-00001.parquet", images, [0, 1, 2])
    write_parquet(tmp_path / "data/test-00000-of-00001.parquet", images, [-1, -1, -1])
    refused("has 2 splits (test, train), which are no one set: choose one with --split", *flags)
    refused("label -1 of 3 classes", *flags, "--split", "test")
    refused("shared among 2 parts into a bucket only", *flags, "--split", "train", "--part", "1/2")
    write_parquet(tmp_path / "data/test-00000-of-00001.parquet", images, [0, 1, 3])
    refused("label 3 of 3 classes", *flags, "--split", "test")
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
    refused("no space for", *flags, "--split", "train", preexec_fn=limit)
    done = command(*flags, "--split", "train")
    assert done.returncode == 0, done.stderr


def test_parquet_bytes_are_kept(tmp_path):
    from test_data_prep import samples_of

    images = [encoded(i) for i in range(12)]
    for part in range(2):
        rows = range(part, 12, 2)
        path = tmp_path / f"data/train-0000{part}-of-00002.parquet"
        write_parquet(path, [images[i] for i in rows], [i % 3 for i in rows])
    done = command(
        "build", tmp_path / "data", tmp_path / "set", "--format", "parquet", "--samples-per-shard", 5
    )
    assert done.returncode == 0, done.stderr
    manifest = open_store(tmp_path / "set").manifest
    assert manifest.classes == CLASSES
    found = {sample["jpg"]: int(sample["cls"]) for sample in samples_of(tmp_path / "set").values()}
    assert found == {image: i % 3 for i, image in enumerate(images)}
    assert not (tmp_path / "set" / ".build").exists()
    refused("no parquet files", "build", tmp_path / "set", tmp_path / "x", "--format", "parquet")


# ---- foreign sets


def foreign_set(folder, shards=3, per_shard=10):
    """Tars as other programs write them: names, extensions and headers unlike ours."""
    folder.mkdir()
    for s in range(shards):
        with tarfile.open(folder / f"pics-{s:03d}.tar", "w", format=tarfile.PAX_FORMAT) as tar:
            for i in range(per_shard):
                number = s * per_shard + i
                add(tar, f"x/{number:05d}.JPEG", encoded(number))
                add(tar, f"x/{number:05d}.cls", str(number % 3).encode())
    return folder


def test_a_foreign_brace_pattern_is_readable_once_indexed(s3, tmp_path):
    folder = foreign_set(tmp_path / "foreign")
    for path in folder.iterdir():
        Remote(f"{s3}/foreign").write(path.name, path)
    pattern = f"{s3}/foreign/pics-{{000..002}}.tar"
    with pytest.raises(UserError, match="data_prep index"):
        open_store(pattern, "none")
    refused("does not exist", "index", f"{s3}/foreign/pics-{{000..004}}.tar", "--to", tmp_path / "no")
    done = command("index", pattern)
    assert done.returncode == 0, done.stderr
    assert "30 samples (30 with a label) in 3 shards" in done.stdout
    done = command("index", pattern, "--to", tmp_path / "elsewhere")
    assert done.returncode == 0, done.stderr
    local = command("index", f"{folder}/pics-{{000..002}}.tar")
    assert local.returncode == 0, local.stderr
    read = []
    for url in (pattern, f"{s3}/foreign", tmp_path / "elsewhere", f"{folder}/pics-{{000..002}}.tar"):
        store = open_store(url, "none")
        store.check()
        assert store.manifest.class_counts == (10, 10, 10)
        spans = [store.read(2, *store.index(2).span(i)) for i in range(10)]
        read.append((spans, list(store.index(2).keys)))
    assert all(one == read[0] for one in read)
    assert encoded(25) in read[0][0][5]
    refused("has a manifest.json already", "index", pattern)
    refused("the manifest.json there has 3 (", "verify", f"{s3}/foreign/pics-{{000..001}}.tar")
    refused("shell pipe", "index", "pipe:cat x.tar")


# ---- hostile tars


def hostile_tars(count=300):
    """(name, bytes): truncated, bit-flipped, mis-named and hostile tars; each another one."""
    rng = np.random.default_rng(0)
    for number in range(count):
        out, kind = io.BytesIO(), number % 6
        with tarfile.open(fileobj=out, mode="w", format=number % 3) as tar:
            for i in range(6):
                name = f"{i:04d}"
                if kind == 3 and i in (1, 4):
                    name = [
                        "../../etc/x",
                        "/abs",
                        "a|b",
                        "pipe:x",
                        "a\nb",
                        "\udcff",
                        "con.fig.jpg",
                        ".hidden",
                        "é",
                    ][int(rng.integers(9))]
                if kind == 4 and i == 3:
                    link = tarfile.TarInfo(f"{name}.jpg")
                    link.type = [
                        tarfile.SYMTYPE,
                        tarfile.LNKTYPE,
                        tarfile.CHRTYPE,
                        tarfile.FIFOTYPE,
                        b"S",
                        b"x",
                    ][int(rng.integers(6))]
                    link.linkname = "/etc/passwd"
                    tar.addfile(link)
                    continue
                add(tar, f"{name}.jpg", encoded(number * 6 + i, size=(12, 9)))
                add(tar, f"{name}.cls", b"x" * 50 if kind == 4 else b"1")
        data = bytearray(out.getvalue())
        if kind == 0:
            data = data[: int(rng.integers(1, len(data)))]
        elif kind in (1, 5):  # anywhere, or in a header
            for _ in range(3):
                at = (
                    int(rng.integers(len(data)))
                    if kind == 1
                    else 512 * int(rng.integers(24)) + int(rng.integers(512))
                )
                data[at % len(data)] ^= 1 << int(rng.integers(8))
        elif kind == 2:  # sizes that lie: huge, negative, not a number
            size = [
                b"77777777777\0",
                b"\x80" + b"\xff" * 11,
                b"\xff" * 12,
                b"-0000000100\0",
                b"garbage!!!!\0",
            ]
            at = data.index(b"0002.jpg")
            data[at + 124 : at + 136] = size[int(rng.integers(5))]
            checksum = 256 + sum(data[at : at + 148]) + sum(data[at + 156 : at + 512])
            data[at + 148 : at + 156] = b"%06o\0 " % checksum
        yield f"{number:03d}", bytes(data)


def test_hostile_tars_are_read_whole_or_refused_in_one_line(tmp_path):
    """Every one of 300: an index of all its samples, or one UserError. Never another exception, a hang, a loss."""
    refusals, read = [], 0
    for name, data in hostile_tars():
        path = tmp_path / f"{name}.tar"
        path.write_bytes(data)
        before = sorted(p.name for p in tmp_path.iterdir())
        try:
            found = index_tar(path)
        except UserError as error:
            refusals.append(str(error))
        else:
            read += 1
            # No file is lost: all of the twelve that have a name and an extension.
            members = sum(len(found.members(i)) for i in range(len(found)))
            with tarfile.open(path) as tar:
                assert members == sum(
                    bool(re.fullmatch(r"(.*/)?[^./]+\.[^/]*", m.name, re.S)) for m in tar
                ), name
            assert list(ShardIndex.from_bytes(found.to_bytes()).keys) == list(found.keys)
            for i in range(len(found)):
                start, size = found.span(i)
                assert 0 <= start <= start + size <= len(data)
        assert sorted(p.name for p in tmp_path.iterdir()) == before
        path.unlink()
    assert len(refusals) + read == 300
    assert not any("\n" in refusal for refusal in refusals)
    assert len(refusals) >= 90
    assert read >= 60


def test_a_foreign_set_with_a_hostile_tar_is_refused_by_name(tmp_path):
    folder = foreign_set(tmp_path / "foreign")
    data = (folder / "pics-001.tar").read_bytes()
    (folder / "pics-001.tar").write_bytes(data[:3000])
    with pytest.raises(UserError, match=r"pics-001\.tar: .*not a whole tar"):
        index(folder)
    assert not (folder / "manifest.json").exists()
