"""Building, verifying and drawing shard sets, through the real command line and with real kills."""

import hashlib
import io
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import webdataset as wds
from launch import finished, start_command
from PIL import Image
from s3_server import WebServer

from caco_scale.data.object_store import RetryPolicy
from caco_scale.data.store import open_store
from caco_scale.errors import UserError
from data_prep.build import build
from data_prep.demo import TEXTURES, build_demo
from data_prep.destination import locked
from data_prep.verify import check_shard, verify

CLASSES = ("ant", "bee", "cat")


def encoded(number, kind="JPEG", mode="RGB", size=(40, 30), **options):
    """Bytes of a small image, another one for each number."""
    pixels = np.random.default_rng(number).integers(0, 255, (6, 8, 3)).astype(np.uint8)
    image = Image.fromarray(pixels).resize(size).convert(mode)
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def write_tree(root, images_per_class=10, classes=CLASSES, start=0):
    for c, name in enumerate(classes):
        folder = root / name
        folder.mkdir(parents=True)
        for i in range(images_per_class):
            (folder / f"{i:03d}.jpg").write_bytes(encoded(start + 1000 * c + i))
    return root


def files_of(directory):
    """Every file below a directory with its bytes: what "byte-identical" means here."""
    paths = sorted(path for path in Path(directory).rglob("*") if path.is_file())
    return {str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def command(*arguments, **options):
    arguments = [sys.executable, "-m", "data_prep", *map(str, arguments)]
    if not options:
        return finished(arguments)
    return subprocess.run(arguments, capture_output=True, text=True, timeout=600, check=False, **options)


def samples_of(directory):
    """What plain webdataset reads from a set: {key: sample}."""
    urls = sorted(str(path) for path in Path(directory).glob("*.tar"))
    return {s["__key__"]: s for s in wds.WebDataset(urls, shardshuffle=False, empty_check=False)}


@pytest.fixture
def tree(tmp_path):
    return write_tree(tmp_path / "images")


# ---- what a built set is


def test_a_set_holds_every_image_once_untouched_and_shuffled(tree, tmp_path):
    [(path, manifest, was_there)] = build(tree, tmp_path / "set", samples_per_shard=8, workers=1)
    assert not was_there
    samples = samples_of(path)
    assert sorted(samples) == [f"{i:08d}" for i in range(30)]
    sources = []
    for sample in samples.values():
        note = json.loads(sample["json"])
        assert sample["jpg"] == (tree / note["source"]).read_bytes()
        assert CLASSES[int(sample["cls"])] == note["source"].split("/")[0]
        sources.append(note["source"])
    assert len(set(sources)) == 30
    assert sources != sorted(sources)
    assert manifest.classes == CLASSES
    assert manifest.class_counts == (10, 10, 10)
    assert [shard.num_samples for shard in manifest.shards] == [8, 8, 8, 6]
    assert [shard.name for shard in manifest.shards] == [f"00000{i}.tar" for i in range(4)]
    assert sorted(os.listdir(path)) == sorted(
        ["manifest.json", *(f"00000{i}.{kind}" for i in range(4) for kind in ("tar", "idx2"))]
    )
    assert open_store(path).manifest == manifest
    text = Path(path, "manifest.json").read_text()
    assert str(tmp_path) not in text
    assert verify(path, full=True, workers=1) == [(path, manifest)]


def test_tar_headers_are_ustar_and_say_nothing_of_the_machine(tree, tmp_path):
    [(path, manifest, _)] = build(tree, tmp_path / "set", workers=1)
    data = Path(path, "000000.tar").read_bytes()
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        for member in tar:
            assert data[member.offset + 257 : member.offset + 265] == b"ustar\x0000"
            assert (member.mtime, member.uid, member.gid, member.uname, member.gname) == (0, 0, 0, "", "")
            assert member.mode == 0o444
            assert member.type == tarfile.REGTYPE
    assert manifest.num_bytes == len(data)


def test_a_shard_is_what_the_tar_writer_of_webdataset_writes(tree, tmp_path):
    [(path, _, _)] = build(tree, tmp_path / "set", workers=1)
    out = io.BytesIO()
    with wds.TarWriter(out, encoder=False, mtime=0, user="", group="", mode=0o444) as writer:
        for key, sample in sorted(samples_of(path).items()):
            writer.write({"__key__": key, **{name: sample[name] for name in ("cls", "jpg", "json")}})
    assert Path(path, "000000.tar").read_bytes() == out.getvalue()


def test_tree_and_tars_give_the_same_bytes(tree, tmp_path):
    (tree / "ant" / "deep" / "er").mkdir(parents=True)
    (tree / "ant" / "deep" / "er" / "x.JPEG").write_bytes(encoded(77))
    (tree / "ant" / "notes.txt").write_text("no image")
    (tree / "ant" / ".DS_Store").write_text("hidden")
    build(tree, tmp_path / "tree", samples_per_shard=8, workers=1)
    expected = files_of(tmp_path / "tree")
    for name, mode, inside in (
        ("a.tar", "w", "."),
        ("b.tar", "w", "wrapper"),
        ("c.tar.xz", "w:xz", ""),
        ("d.tgz", "w:gz", "."),
        ("e.tar.bz2", "w:bz2", "wrapper"),
    ):
        with tarfile.open(tmp_path / name, mode) as tar:
            tar.add(tree, inside)
        build(tmp_path / name, tmp_path / f"from-{name}", samples_per_shard=8, workers=1)
        assert files_of(tmp_path / f"from-{name}") == expected, name


def test_worker_counts_give_the_same_bytes_and_other_seeds_do_not(tree, tmp_path):
    done = command("build", tree, tmp_path / "three", "--samples_per_shard", 4, "--workers", 3)
    assert done.returncode == 0, done.stderr
    assert "30/30 images" in done.stderr
    build(tree, tmp_path / "one", samples_per_shard=4, workers=1)
    build(tree, tmp_path / "seed", samples_per_shard=4, workers=1, seed=1)
    assert files_of(tmp_path / "one") == files_of(tmp_path / "three") != files_of(tmp_path / "seed")


def test_splits(tmp_path):
    write_tree(tmp_path / "images" / "train", 6)
    write_tree(tmp_path / "images" / "val", 4, classes=("ant", "cat"), start=500)
    results = build(tmp_path / "images", tmp_path / "sets", workers=1)
    assert [(Path(path).name, manifest.class_counts) for path, manifest, _ in results] == [
        ("train", (6, 6, 6)),
        ("val", (4, 0, 4)),
    ]
    assert results[1][1].classes == CLASSES  # labels are those of train
    assert sorted(os.listdir(tmp_path / "sets")) == ["train", "val"]
    build(tmp_path / "images", tmp_path / "val-only", split="val", workers=1)
    assert files_of(tmp_path / "val-only") == files_of(tmp_path / "sets" / "val")
    assert len(verify(tmp_path / "sets")) == 2
    with tarfile.open(tmp_path / "images.tar.gz", "w:gz") as tar:
        tar.add(tmp_path / "images", "images")
    build(tmp_path / "images.tar.gz", tmp_path / "from-tar", workers=1)
    assert files_of(tmp_path / "from-tar") == files_of(tmp_path / "sets")
    with pytest.raises(UserError, match="no split 'tset', only train, val"):
        build(tmp_path / "images", tmp_path / "x", split="tset")
    write_tree(tmp_path / "images" / "val2", 1)
    shutil.move(tmp_path / "images" / "val2" / "bee", tmp_path / "images" / "val" / "wasp")
    shutil.rmtree(tmp_path / "images" / "val2")
    with pytest.raises(UserError, match=r"val has 1 classes that train lacks \(wasp\)"):
        build(tmp_path / "images", tmp_path / "x")


# ---- images that are not plain JPEGs


def test_images_are_fixed_or_rejected_by_content_and_recorded(tree, tmp_path):
    good = encoded(1, size=(64, 64))
    odd = {
        "png.JPEG": encoded(2, "PNG"),
        "alpha.png": encoded(3, "PNG", "RGBA"),
        "gif.gif": encoded(4, "GIF"),
        "cmyk.jpg": encoded(5, mode="CMYK"),
        "grey.jpg": encoded(6, mode="L"),
        "jpeg.png": good,
        "cut.jpg": good[: len(good) * 2 // 3],
        "cutcmyk.jpg": encoded(7, mode="CMYK", size=(64, 64))[:-200],
        "cut.png": encoded(8, "PNG")[:-60],
        "text.jpg": b"not an image at all",
        "empty.jpg": b"",
        "program.png": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
        "notes.txt": b"notes",
    }
    for name, data in odd.items():
        (tree / "bee" / name).write_bytes(data)
    (tree / "stray.jpg").write_bytes(good)
    [(path, manifest, _)] = build(tree, tmp_path / "set", samples_per_shard=8, workers=1)
    fixed = {Path(note["source"]).name: note["reason"] for note in manifest.fixed}
    assert fixed == {
        "png.JPEG": "PNG re-encoded as JPEG",
        "alpha.png": "PNG re-encoded as JPEG",
        "gif.gif": "GIF re-encoded as JPEG",
        "cmyk.jpg": "CMYK JPEG re-encoded as RGB",
    }
    rejected = {Path(note["source"]).name: note["reason"] for note in manifest.rejected}
    assert set(rejected) == {
        *("cut.jpg", "cutcmyk.jpg", "cut.png", "text.jpg", "empty.jpg", "program.png"),
        *("notes.txt", "stray.jpg"),
    }
    assert rejected["text.jpg"] == rejected["program.png"] == "not an image"
    assert rejected["empty.jpg"] == "empty file"
    assert rejected["stray.jpg"] == "not in a class folder"
    assert manifest.num_samples == 30 + 6
    assert manifest.class_counts == (10, 16, 10)
    samples = {Path(json.loads(s["json"])["source"]).name: s for s in samples_of(path).values()}
    assert samples["grey.jpg"]["jpg"] == odd["grey.jpg"]
    assert samples["jpeg.png"]["jpg"] == good
    for name in fixed:
        image = Image.open(io.BytesIO(samples[name]["jpg"]))
        assert (image.format, image.mode, image.size) == ("JPEG", "RGB", (40, 30))
        assert max(layer[1] for layer in image.layer) == 1  # 4:4:4
        original = np.asarray(Image.open(io.BytesIO(odd[name])).convert("RGB"), np.float64)
        assert np.abs(np.asarray(image, np.float64) - original).mean() < 5, name
    # Keys of rejected images stay empty, and each note names its place.
    for note in manifest.rejected:
        assert note["key"] is None or note["key"].split("/")[1] not in samples_of(path)
    assert sum(note["key"] is None for note in manifest.rejected) == 2
    verify(path, full=True, workers=1)
    # The same with more workers, the messages included.
    build(tree, tmp_path / "again", samples_per_shard=8, workers=2)
    assert files_of(tmp_path / "again") == files_of(path)


def test_a_set_of_rejected_images_only(tmp_path):
    (tmp_path / "images" / "ant").mkdir(parents=True)
    (tmp_path / "images" / "ant" / "x.jpg").write_bytes(b"text")
    with pytest.raises(UserError, match=r"none of the 1 images can be used; ant/x\.jpg: not an image"):
        build(tmp_path / "images", tmp_path / "set", workers=1)


def test_a_shard_may_lose_all_its_images(tree, tmp_path):
    for i in range(9):
        (tree / "ant" / f"{i:03d}.jpg").write_bytes(b"")
    [(path, manifest, _)] = build(tree, tmp_path / "set", samples_per_shard=1, workers=1)
    assert sorted(shard.num_samples for shard in manifest.shards) == [0] * 9 + [1] * 21
    verify(path, full=True, workers=1)


def test_dangerous_tar_members_are_recorded_and_never_touched(tmp_path):
    outside = tmp_path / "outside.jpg"
    outside.write_bytes(encoded(9))
    path = tmp_path / "evil.tar.gz"
    with tarfile.open(path, "w:gz") as tar:

        def add(name, data=b"", **fields):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            for key, value in fields.items():
                setattr(info, key, value)
            tar.addfile(info, io.BytesIO(data))

        add("ant/0.jpg", encoded(0))
        add("ant/1.jpg", encoded(1))
        add("../up.jpg", encoded(2))
        add("ant/../../up.jpg", encoded(2))
        add(f"{tmp_path}/absolute.jpg", encoded(2))
        add("ant/sym.jpg", type=tarfile.SYMTYPE, linkname=str(outside))
        add("ant/hard.jpg", type=tarfile.LNKTYPE, linkname="ant/0.jpg")
        add("ant/fifo.jpg", type=tarfile.FIFOTYPE)
        add("ant/1.jpg", type=tarfile.SYMTYPE, linkname="0.jpg")
        add("ant/1.jpg", encoded(3))  # as `tar -r` would replace it
    before = {p.name for p in tmp_path.iterdir()}
    [(directory, manifest, _)] = build(path, tmp_path / "deep" / "set", workers=1)
    assert {p.name for p in tmp_path.iterdir()} == before | {"deep"}
    assert os.listdir(tmp_path / "deep") == ["set"]
    assert manifest.num_samples == manifest.class_counts[0] == 2
    assert {s["jpg"] for s in samples_of(directory).values()} == {encoded(0), encoded(3)}
    reasons = {note["source"]: note["reason"] for note in manifest.rejected}
    unsafe = {name for name, reason in reasons.items() if reason.startswith("unsafe name")}
    assert unsafe == {"../up.jpg", "ant/../../up.jpg", f"{tmp_path}/absolute.jpg"}
    assert reasons["ant/sym.jpg"] == reasons["ant/hard.jpg"] == "link in the tar"
    assert reasons["ant/fifo.jpg"] == "not a regular file in the tar"


# ---- kills, restarts, damage


def start(*arguments):
    return start_command([sys.executable, "-m", "data_prep", *arguments], stderr=subprocess.PIPE)


def processes_in(session):
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if int(fields[3]) == session and fields[0] != "Z":
                found.append(int(entry.name))
    return found


@pytest.mark.parametrize("packed", [False, True])
def test_killed_and_restarted_with_other_workers(tmp_path, packed):
    source = write_tree(tmp_path / "images", 25)
    (source / "ant" / "bad.jpg").write_bytes(b"bad")
    (source / "bee" / "png.jpg").write_bytes(encoded(3, "PNG"))
    if packed:
        with tarfile.open(tmp_path / "images.tar.xz", "w:xz") as tar:
            tar.add(source, "images")
        source = tmp_path / "images.tar.xz"
    flags = ["--samples-per-shard", 1]
    build(source, tmp_path / "whole", samples_per_shard=1, workers=1)
    target = tmp_path / "killed"
    kept = []
    for workers, until in ((2, 10), (1, 30)):
        process = start("build", source, target, *flags, "--workers", workers)
        while process.poll() is None and len(list(target.glob(".build/0*.json"))) < until:
            time.sleep(0.002)
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
        for _ in range(500):  # its workers end by themselves
            if not processes_in(process.pid):
                break
            time.sleep(0.02)
        assert not processes_in(process.pid)
        assert not (target / "manifest.json").exists()
        recorded = [target / f"{path.stem}.tar" for path in target.glob(".build/0*.json")]
        kept.append({path: path.stat().st_mtime_ns for path in recorded})
    # Debris of a kill in the middle of a write, and a finished shard that has since lost its end.
    (target / "000003.tar.999.tmp").write_bytes(b"half")
    (target / ".build" / "000070.json.9.tmp").write_bytes(b"{")
    cut = sorted(kept[0])[0]
    cut.write_bytes(cut.read_bytes()[:700])
    build(source, target, samples_per_shard=1, workers=3)
    assert files_of(target) == files_of(tmp_path / "whole")
    assert len(kept[1]) >= 30
    for path in kept[1].keys() - {cut}:
        assert path.stat().st_mtime_ns == kept[1][path], f"{path.name} was finished and built again"


def test_a_finished_set_is_left_alone_and_a_damaged_one_is_mended(tree, tmp_path):
    build(tree, tmp_path / "set", samples_per_shard=8, workers=1)
    expected = files_of(tmp_path / "set")
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "set").iterdir()}
    done = command("build", tree, tmp_path / "set", "--samples-per-shard", 8)
    assert done.returncode == 0
    assert "was finished already, by the same build" in done.stdout
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "set").iterdir()} == times
    (tmp_path / "set" / "000001.tar").unlink()
    (tmp_path / "set" / "000002.idx2").write_bytes(b"")
    [(_, _, was_there)] = build(tree, tmp_path / "set", samples_per_shard=8, workers=1)
    assert not was_there
    assert files_of(tmp_path / "set") == expected
    assert (tmp_path / "set" / "000003.tar").stat().st_mtime_ns == times[tmp_path / "set" / "000003.tar"]


def test_two_builds_of_one_destination(tree, tmp_path):
    with locked(str(tmp_path / "set")):
        done = command("build", tree, tmp_path / "set")
    assert done.returncode == 2
    assert "another build is writing" in done.stderr


@pytest.mark.long
def test_parts_share_a_build_and_the_last_writes_the_manifest(tree, tmp_path):
    options = ("--samples-per-shard", "3", "--workers", "1")
    assert command("build", tree, tmp_path / "whole", *options).returncode == 0
    build_part = lambda part: command("build", tree, tmp_path / "set", *options, "--part", f"{part}/3")
    first = build_part(1)
    assert first.returncode == 0
    assert "part 1/3 is finished, others are not" in first.stdout.replace("\n", " ")
    assert not (tmp_path / "set/manifest.json").exists()
    assert sorted(path.name for path in (tmp_path / "set").glob("*.tar")) == [
        f"{n:06d}.tar" for n in (0, 3, 6, 9)
    ]
    with locked(str(tmp_path / "locked")):
        refused("another build is writing", "build", tree, tmp_path / "locked", "--part", "1/3")
    with ThreadPoolExecutor() as pool:
        others = list(pool.map(build_part, (2, 3)))
    assert [part.returncode for part in others] == [0, 0], others
    assert files_of(tmp_path / "set") == files_of(tmp_path / "whole")
    assert "was finished already" in build_part(1).stdout
    for part in ("0/3", "4/3", "1", "a/b"):
        refused(f"--part {part} is not I/N", "build", tree, tmp_path / "set", "--part", part)


# ---- errors, each one line through the real command


def refused(words, *arguments, **options):
    done = command(*arguments, **options)
    assert done.returncode == 2, (done.stdout, done.stderr)
    lines = [line for line in done.stderr.splitlines() if " images/s " not in line]
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("error: ")
    assert words in lines[0]
    return lines[0]


def test_bad_sources(tmp_path):
    (tmp_path / "nothing").mkdir()
    (tmp_path / "flat").mkdir()
    (tmp_path / "flat" / "x.jpg").write_bytes(encoded(0))
    (tmp_path / "text.tar").write_text("this is no tar" * 100)
    (tmp_path / "zeros.tar").write_bytes(bytes(10240))
    (tmp_path / "zero.tar").write_bytes(b"")
    (tmp_path / "x.tar.zst").write_bytes(b"\x28\xb5\x2f\xfd0000")
    write_tree(tmp_path / "images", 3)
    with tarfile.open(tmp_path / "good.tar", "w") as tar:
        tar.add(tmp_path / "images", "images")
    with tarfile.open(tmp_path / "good.tar.gz", "w:gz") as tar:
        tar.add(tmp_path / "images", "images")
    cut = (tmp_path / "good.tar").read_bytes()
    (tmp_path / "cut.tar").write_bytes(cut[: len(cut) // 2])
    packed = (tmp_path / "good.tar.gz").read_bytes()
    (tmp_path / "cut.tar.gz").write_bytes(packed[: len(packed) // 2])
    for name, words in (
        ("missing", "does not exist"),
        ("nothing", "has no images (0 other files, 0 folders)"),
        ("flat", "is not an image folder (its 1 images lie directly in it)"),
        ("text.tar", "neither a folder nor a tar (1,400 bytes)"),
        ("zeros.tar", "is an empty tar (10,240 bytes, no files in it)"),
        ("zero.tar", "is an empty file (0 bytes)"),
        ("x.tar.zst", "zstd"),
        ("cut.tar", "is not a whole tar"),
        ("cut.tar.gz", "is damaged or cut short"),
    ):
        with pytest.raises(UserError) as caught:
            build(tmp_path / name, tmp_path / "set")
        assert words in str(caught.value)
        assert str(tmp_path / name) in str(caught.value)
        assert not (tmp_path / "set").exists()
    refused("does not exist", "build", tmp_path / "missing", tmp_path / "set")
    refused("has no images", "build", tmp_path / "nothing", tmp_path / "set")


def test_an_unreadable_image_file(tree, tmp_path):
    (tree / "bee" / "000.jpg").chmod(0)
    if os.access(tree / "bee" / "000.jpg", os.R_OK):
        pytest.skip("this user may read everything")
    refused("bee/000.jpg: Permission denied", "build", tree, tmp_path / "set")


def test_empty_class_folders(tree, tmp_path):
    (tree / "dodo").mkdir()
    (tree / "dodo" / "readme.txt").write_text("gone")
    line = refused("1 of 4 class folders have no images (dodo)", "build", tree, tmp_path / "set")
    assert "--skip-empty-classes" in line
    [(_, manifest, _)] = build(tree, tmp_path / "set", skip_empty_classes=True, workers=1)
    assert manifest.classes == CLASSES
    with tarfile.open(tmp_path / "x.tar.gz", "w:gz") as tar:
        tar.add(tree, ".")
    with pytest.raises(UserError, match="dodo"):
        build(tmp_path / "x.tar.gz", tmp_path / "packed")
    assert not (tmp_path / "packed").exists()  # the decompressed source is not left behind


def test_a_destination_with_another_build(tree, tmp_path):
    build(tree, tmp_path / "set", workers=1)
    expected = files_of(tmp_path / "set")
    refused("another build (seed 0 there, 1 now)", "build", tree, tmp_path / "set", "--seed", 1)
    for options, words in (
        ({"samples_per_shard": 9}, "samples per shard 1000 there, 9 now"),
        ({"seed": 2, "samples_per_shard": 9}, "seed 0 there, 2 now; samples per shard 1000 there, 9 now"),
    ):
        with pytest.raises(UserError, match=words):
            build(tree, tmp_path / "set", **options)
    (tree / "ant" / "new.jpg").write_bytes(encoded(5))
    with pytest.raises(UserError, match="images in the source 30 there, 31 now; source listing"):
        build(tree, tmp_path / "set")
    assert files_of(tmp_path / "set") == expected


def test_destinations_that_cannot_be(tree, tmp_path):
    (tmp_path / "file").write_text("x")
    refused("cannot write to", "build", tree, tmp_path / "file" / "set")
    refused("lies inside the source", "build", tree, tree / "set")
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "000000.tar").write_bytes(b"precious")
    refused("holds 000000.tar, but not from a build", "build", tree, tmp_path / "foreign")
    assert (tmp_path / "foreign" / "000000.tar").read_bytes() == b"precious"
    if os.geteuid():
        (tmp_path / "locked").mkdir(mode=0o500)
        refused("Permission denied", "build", tree, tmp_path / "locked" / "set")


@pytest.mark.parametrize("workers", [1, 2])
def test_a_full_disk_keeps_what_is_finished(tree, tmp_path, workers):
    """A limit on the size of files stands for the disk: one shard is larger than it, the others are not."""
    pixels = np.random.default_rng(0).integers(0, 255, (200, 200, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(tree / "cat" / "large.jpg", quality=95)
    assert (tree / "cat" / "large.jpg").stat().st_size > 40_000

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000))

    flags = ["build", tree, tmp_path / "set", "--samples-per-shard", 2, "--workers", workers]
    line = refused("no space for", *flags, preexec_fn=limit)
    assert "MB are free there, about" in line
    assert "finished and kept" in line
    finished = sorted((tmp_path / "set").glob("*.tar"))
    assert 0 < len(finished) < 16
    assert not list((tmp_path / "set").rglob("*.tmp"))
    times = [path.stat().st_mtime_ns for path in finished]
    build(tree, tmp_path / "set", samples_per_shard=2, workers=1)
    assert [path.stat().st_mtime_ns for path in finished] == times
    build(tree, tmp_path / "whole", samples_per_shard=2, workers=1)
    assert files_of(tmp_path / "set") == files_of(tmp_path / "whole")


def test_a_full_disk_while_decompressing(tree, tmp_path):
    with tarfile.open(tmp_path / "x.tar.gz", "w:gz") as tar:
        tar.add(tree, ".")

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

    refused("no space for", "build", tmp_path / "x.tar.gz", tmp_path / "set", preexec_fn=limit)
    assert not (tmp_path / "set").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["build", "a", "b", "--sed", "1"], "unknown flag --sed (did you mean --seed?)"),
        (["build", "a", "b", "--sample_per_shard=1"], "did you mean --samples_per_shard?"),
        (["build", "a", "b", "--zzz"], "unknown flag --zzz: python -m data_prep build --help lists them all"),
        (["build", "a", "b", "--seed", "x"], "--seed is 'x', which is not int"),
        (["build", "a"], "give DST: python -m data_prep build --help"),
        (["build", "a", "b", "--samples-per-shard", "0"], "--samples-per-shard 0 must be at least 1"),
        (["build", "a", "b", "--workers", "-1"], "--workers -1"),
        (["bild", "a", "b"], "'bild'"),
        ([], "give one of build, verify, repair, index, demo"),
        (["demo", "x", "--train", "3"], "--train is 3: give at least 10"),
        (["verify", "no/such/set"], "does not exist"),
    ],
)
def test_mistakes_on_the_command_line(arguments, words, capsys):
    from data_prep.__main__ import main

    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert len(output.err.splitlines()) == 1
    assert output.err.startswith("error: ")
    assert words in output.err


# ---- verify


def test_verify_names_the_first_bad_shard_and_counts(tree, tmp_path):
    build(tree, tmp_path / "set", samples_per_shard=5, workers=1)
    done = command("verify", tmp_path / "set")
    assert done.returncode == 0
    assert "fine, 30 samples in 6 shards" in done.stdout
    done = command("verify", tmp_path / "set", "--full")
    assert done.returncode == 0
    assert [line.split()[:2] for line in done.stdout.splitlines()[:3]] == [[name, "10"] for name in CLASSES]
    tar = tmp_path / "set" / "000002.tar"
    data = bytearray(tar.read_bytes())
    data[2000] ^= 1
    tar.write_bytes(data)
    verify(tmp_path / "set")  # the sizes are right
    with pytest.raises(UserError, match=r"1 of 6 shards are bad, first 000002.tar \(its sha256 differs\)"):
        verify(tmp_path / "set", full=True, workers=2)
    (tmp_path / "set" / "000004.tar").unlink()
    refused("1 of 6 shards are bad, first 000004.tar (000004.tar: No such file", "verify", tmp_path / "set")
    refused("2 of 6 shards are bad, first 000002.tar", "verify", tmp_path / "set", "--full")


def test_verify_cannot_tell_on_a_full_disk_or_without_the_store(tree, tmp_path):
    build(tree, tmp_path / "set", workers=1)
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (4_000, 4_000))
    flags = ["verify", tmp_path / "set", "--full", "--workers", 1]
    line = refused("no space for", *flags, preexec_fn=limit)
    assert "000000.tar" in line
    assert "are bad" not in line
    with WebServer(tmp_path / "set") as server:
        store = open_store(server.url, "none", retry_policy=RetryPolicy(0, 1))
        assert check_shard(store, 0)[0] is None
        (tmp_path / "set" / "000000.tar").unlink()
        assert "no such object" in check_shard(store, 0)[0]
    with pytest.raises(UserError, match="attempts in a row failed"):
        check_shard(store, 0)


def test_verify_finds_an_index_or_an_image_that_the_hashes_do_not(tree, tmp_path):
    """A manifest that was made to agree with wrong contents still does not pass."""
    [(path, manifest, _)] = build(tree, tmp_path / "set", workers=1)
    tar = Path(path, "000000.tar")
    text = Path(path, "manifest.json").read_text()
    data = bytearray(tar.read_bytes())
    at = data.index(b"\xff\xd8\xff")
    data[at : at + 2] = b"no"
    tar.write_bytes(data)
    hashes = manifest.shards[0].sha256, hashlib.sha256(data).hexdigest()
    Path(path, "manifest.json").write_text(text.replace(*hashes))
    with pytest.raises(UserError, match=r"sample 00000000: not an image"):
        verify(path, full=True, workers=1)
    shutil.rmtree(path)
    build(tree, tmp_path / "set", workers=1)
    index = Path(path, "000000.idx2")
    wrong = index.read_bytes().replace(b'"jpg"', b'"jpx"')
    Path(path, "manifest.json").write_text(
        text.replace(manifest.shards[0].index_sha256, hashlib.sha256(wrong).hexdigest())
    )
    index.write_bytes(wrong)
    with pytest.raises(UserError, match="its index is not that of the tar"):
        verify(path, full=True, workers=1)


# ---- the demo


def test_demo_is_balanced_deterministic_and_differs_between_splits(tmp_path, capsys):
    train, val = build_demo(tmp_path / "demo", num_train=200, num_val=50)
    assert len(capsys.readouterr().out.splitlines()) == 1
    assert open_store(train).manifest.class_counts == (20,) * 10
    assert open_store(val).manifest.class_counts == (5,) * 10
    assert open_store(train).manifest.classes == tuple(sorted(TEXTURES))
    images = [sample["jpg"] for split in (train, val) for sample in samples_of(split).values()]
    assert len(set(images)) == 250
    pixels = np.stack([np.asarray(Image.open(io.BytesIO(data))) for data in images]).astype(float)
    assert pixels.shape == (250, 32, 32, 3)
    means = pixels.mean((1, 2))
    assert np.abs(means - means.mean(1, keepdims=True)).mean() < 15  # nearly grey
    assert (pixels.std((1, 2, 3)) > 20).all()  # with a texture in it
    assert build_demo(tmp_path / "demo", num_train=200, num_val=50) == (train, val)
    assert capsys.readouterr().out == ""
    done = command("demo", tmp_path / "again", "--train", 200, "--val", 50)
    assert done.returncode == 0, done.stderr
    assert files_of(tmp_path / "again") == files_of(tmp_path / "demo")
    verify(tmp_path / "demo", full=True, workers=1)
    with pytest.raises(UserError, match="another build"):
        build_demo(tmp_path / "demo", num_train=210, num_val=50)


def test_demo_built_by_two_processes_at_once(tmp_path):
    code = "import sys; from data_prep.demo import build_demo; print(build_demo(sys.argv[1], 300, 50))"
    both = [
        subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "demo")], stderr=subprocess.PIPE)
        for _ in range(2)
    ]
    errors = [process.communicate()[1].decode() for process in both]
    assert [process.returncode for process in both] == [0, 0], errors
    assert len(verify(tmp_path / "demo", full=True, workers=1)) == 2
    assert not list((tmp_path / "demo").rglob(".build"))
