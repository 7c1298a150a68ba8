"""Sets that are no shards: lists, parquet files; the same images in the same order as a folder's and a shard set's."""

import csv
import json
import shutil

import numpy as np
import pytest
import torch
from launch import SMALL, kill_when, launch, planned_keys, start
from shard_sets import encode, index_shard, smooth_image, write_manifest
from webdataset import TarWriter

from caco_scale.checkpoint.folder import latest
from caco_scale.data.listed_files import Listings
from caco_scale.data.loader import train_batches
from caco_scale.data.order import Order
from caco_scale.data.store import open_store
from caco_scale.data.store import parquet as store_of_parquet
from caco_scale.data.store.folder import split_folders
from caco_scale.data.views import ViewSpec
from caco_scale.errors import UserError
from caco_scale.run.audit import read_audit

pyarrow = pytest.importorskip("pyarrow", reason="parquet needs pyarrow")
parquet = pytest.importorskip("pyarrow.parquet", reason="parquet needs pyarrow")
NAMES = [f"{c}/{i:02d}.jpg" for c in ("ant", "bee", "cat") for i in range(16)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    generator, top = np.random.default_rng(0), tmp_path_factory.mktemp("photographs") / "set"
    for number, name in enumerate(NAMES):
        (top / name).parent.mkdir(parents=True, exist_ok=True)
        (top / name).write_bytes(encode(smooth_image(generator, 28 + number % 7, 32), "JPEG"))
    return top


def write_list(path, rows, header=("path", "label"), separator=","):
    with open(path, "w", newline="") as file:
        csv.writer(file, delimiter=separator).writerows([header, *rows])
    return path


def rows(folder, base):
    return [
        (str((folder / name).relative_to(base)) if base else str(folder / name), name[:3]) for name in NAMES
    ]


def write_parquet(path, images, labels=None, group=1000, classes=("ant", "bee", "cat"), names=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = {"image": [{"bytes": image, "path": None} for image in images]}
    features = {"image": {"_type": "Image"}}
    if labels is not None:
        columns["label"], features["label"] = labels, {"_type": "ClassLabel", "names": list(classes)}
    card = {"huggingface": json.dumps({"info": {"features": features}})}
    parquet.write_table(pyarrow.table(columns).replace_schema_metadata(card), path, row_group_size=group)
    return path


def batches_of(store, steps=6, workers=0):
    order = Order([s.num_samples for s in store.manifest.shards], seed=3, global_batch_size=8)
    views = [ViewSpec(24, (0.2, 1.0)), ViewSpec(24, (0.2, 1.0), blur_p=0.1, solarize_p=0.2)]
    place = {"rank": 0, "world_size": 1, "workers": workers}
    return list(train_batches(store, order, views, start_step=0, num_steps=steps, seed=3, **place))


def refused(address, **options):
    with pytest.raises(UserError) as caught:
        open_store(address, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---- one set in every form


def test_a_folder_a_list_parquet_and_shards_give_the_same_images_in_the_same_order(folder, tmp_path):
    there = open_store(folder)
    names = list(there.index(0).keys)
    in_order = [(folder / name).read_bytes() for name in names]
    labels = [("ant", "bee", "cat").index(name[:3]) for name in names]
    (tmp_path / "shards").mkdir()
    with TarWriter(str(tmp_path / "shards/000000.tar")) as tar:
        for number, data in enumerate(in_order):
            tar.write({"__key__": f"{number:08d}", "jpg": data, "cls": labels[number]})
    write_manifest(
        tmp_path / "shards",
        [index_shard(tmp_path / "shards", "000000.tar", 48)],
        ("ant", "bee", "cat"),
        (16,) * 3,
    )
    beside = write_list(folder.parent / "beside.csv", rows(folder, folder.parent))
    sets = {
        "list": beside,
        "absolute": write_list(tmp_path / "all.tsv", rows(folder, None), ("label", "file_name")[::-1], "\t"),
        "parquet": write_parquet(tmp_path / "hf/data/train-00000-of-00001.parquet", in_order, labels).parents[
            1
        ],
        "file": write_parquet(tmp_path / "one.parquet", in_order, labels),
        "shards": tmp_path / "shards",
    }
    table = {
        "image_path": [name for name, _ in rows(folder, folder.parent)],
        "class": [name[:3] for name in NAMES],
    }
    parquet.write_table(pyarrow.table(table), folder.parent / "list.parquet")
    sets["parquet list"] = folder.parent / "list.parquet"
    ours = batches_of(there)
    for kind, address in sets.items():
        store = open_store(address)
        store.check()
        assert store.manifest.num_samples == 48, kind
        assert (store.manifest.classes, store.manifest.class_counts) == (
            ("ant", "bee", "cat"),
            (16, 16, 16),
        ), kind
        assert store.index(0).labels.tolist() == there.index(0).labels.tolist(), kind
        for a, b in zip(ours, batches_of(store, workers=int(kind in ("list", "file"))), strict=True):
            assert all(map(torch.equal, a.crops, b.crops)), kind
    assert open_store(sets["list"]).names([0]) == [f"000000/set/{names[0]}"]
    assert open_store(sets["parquet"]).names([5]) == ["000000/data/train-00000-of-00001.parquet/5"]
    for path in (beside, folder.parent / "list.parquet"):
        path.unlink()


@pytest.mark.long
def test_a_list_is_killed_and_resumed_by_another_number_of_processes(folder, tmp_path):
    listed = write_list(
        tmp_path / "list.csv", [(*row, "more") for row in rows(folder, None)], ("file", "class", "x")
    )
    flags = {**SMALL, "data.shards": listed, "run.dir": tmp_path / "run", "data.audit": tmp_path / "audit"}
    flags |= {"run.save_every": 4, "bank.size": 16, "optim.epochs": 3, "run.max_steps": 14, "data.workers": 1}
    process = start(flags)
    kill_when(process, lambda: latest(tmp_path / "run/checkpoints") is not None)
    launch(flags, num_processes=2)
    assert read_audit(tmp_path / "audit") == dict(enumerate(planned_keys(listed, flags, 14)))
    with open(listed, "a") as file:
        file.write(f"{folder / 'nowhere.jpg'},ant,more\n")
    error = launch({**flags, "run.max_steps": 15}, code=2)
    assert f"1 of 49 paths lead to no file (the first in line 50: {folder}/nowhere.jpg)" in error


# ---- parquet


def test_groups_of_rows_are_the_shards_of_a_set_of_several_files(folder, tmp_path, monkeypatch):
    images = [(folder / name).read_bytes() for name in NAMES]
    for number in range(3):
        part = slice(16 * number, 16 * number + 16)
        write_parquet(
            tmp_path / f"hf/data/train-{number:05d}-of-00003.parquet",
            images[part],
            [number, None, *[-1] * 14],
            6,
        )
    monkeypatch.setattr("caco_scale.data.store.parquet.KEPT_BYTES", 1)
    store = open_store(tmp_path / "hf")
    assert [shard.num_samples for shard in store.manifest.shards] == [6, 6, 4] * 3
    assert store.manifest.class_counts == (1, 1, 1)
    read = [store.read_sample(*map(int, place)) for place in np.transpose(store.locate(np.arange(48)[::-1]))]
    assert [sample["jpg"] for sample in read] == images[::-1]
    assert store.names([17]) == ["000003/data/train-00001-of-00003.parquet/1"]
    (tmp_path / "hf/data/train-00001-of-00003.parquet").unlink()
    line = refused(tmp_path / "hf")
    assert "has not all files of train: 2 of 3 files; missing: 1" in line
    assert f"`python -m data_prep build --format parquet {tmp_path}/hf SHARDS`" in line


def test_a_run_reads_the_labels_of_parquet_files_once(folder, tmp_path, monkeypatch):
    images, read = [(folder / name).read_bytes() for name in NAMES[:4]], []
    for number in range(2):
        write_parquet(tmp_path / f"hf/train-{number:05d}-of-00002.parquet", images, [2, 0, None, number])
    look = store_of_parquet._look
    monkeypatch.setattr(
        store_of_parquet, "_look", lambda path, columns: read.append(path) or look(path, columns)
    )
    listings = Listings(tmp_path / "run", main=True)
    first, again = (open_store(tmp_path / "hf", listings=listings) for _ in range(2))
    assert len(read) == 2
    assert again.manifest == first.manifest
    assert again.index(1).labels.tolist() == [2, 0, -1, 1]
    open_store(tmp_path / "hf", listings=Listings(tmp_path / "run", main=True))
    assert len(read) == 4, "another start reads them again"


def test_a_split_is_given_as_a_folder_would_be(folder, tmp_path):
    images = [(folder / name).read_bytes() for name in NAMES]
    write_parquet(tmp_path / "hf/data/train-00000-of-00001.parquet", images[:30], [0] * 30)
    write_parquet(tmp_path / "hf/data/validation-00000-of-00001.parquet", images[30:], [1] * 18)
    (tmp_path / "hf/README.md").write_text("a card")
    assert refused(tmp_path / "hf") == (
        f"{tmp_path}/hf has 2 splits (train, validation): give one of them, {tmp_path}/hf/train"
    )
    assert [open_store(tmp_path / "hf" / name).manifest.num_samples for name in ("train", "val")] == [30, 18]
    assert split_folders(str(tmp_path / "hf")) == (f"{tmp_path}/hf/train", f"{tmp_path}/hf/validation")
    assert "does not exist" in refused(tmp_path / "hf/nothing")
    shutil.copy(folder / NAMES[0], tmp_path / "hf/thumbnail.jpg")
    line = refused(tmp_path / "hf")
    assert "holds 1 image files and parquet files with images (data/train-00000-of-00001.parquet)" in line
    assert line.endswith(f"such as {tmp_path}/hf/data")


def test_a_table_beside_images_is_no_set_of_its_own(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "set")
    parquet.write_table(pyarrow.table({"file_name": NAMES}), tmp_path / "set/metadata.parquet")
    assert open_store(tmp_path / "set").manifest.num_samples == 48
    assert open_store(tmp_path / "set/metadata.parquet").manifest.num_samples == 48


# ---- lists


def test_labels_of_a_list_are_names_or_numbers(folder, tmp_path):
    labels = [str(number % 11) if number != 5 else "" for number in range(48)]
    paths = [str(folder / name) for name in NAMES]
    store = open_store(write_list(tmp_path / "numbers.csv", zip(paths, labels, strict=True)))
    assert store.manifest.classes[:3] == ("00000", "00001", "00002")
    assert store.manifest.classes[10] == "00010"
    assert sum(store.manifest.class_counts) == 47
    without = open_store(write_list(tmp_path / "without.csv", [[path] for path in paths], ["path"]))
    assert without.manifest.classes == ()
    same = write_list(tmp_path / "other.csv", zip(paths, ["0"] * 48, strict=True))
    assert open_store(same).fingerprint() != store.fingerprint()
    line = refused(tmp_path / "without.csv", labelled=True)
    assert "without.csv has no column of labels, which an evaluation needs" in line


def test_a_list_with_mistakes_is_one_line(folder, tmp_path):
    good = [str(folder / name) for name in NAMES]
    wrong = [*good[:2], "set/a.jpg", str(folder), *good[4:], "gone.jpg"]
    line = refused(write_list(tmp_path / "wrong.csv", [[path] for path in wrong], ["path"]))
    assert line == (
        f"{tmp_path}/wrong.csv: 3 of 49 paths lead to no file (the first in line 4: set/a.jpg): correct them; those "
        f"that do not begin with / count from {tmp_path}"
    )
    (tmp_path / "blank.csv").write_text(f'path,note\n\n{good[0]},"two\nlines"\n\n\ngone.jpg,\n')
    assert "(the first in line 7: gone.jpg)" in refused(tmp_path / "blank.csv")
    line = refused(write_list(tmp_path / "x.csv", [[1, 2]], ["width", "height"]))
    assert line.startswith(
        f"{tmp_path}/x.csv has no column of paths (its columns: width, height): its first line is to"
    )
    assert "names 1 files more than once" in refused(
        write_list(tmp_path / "d.csv", [[p] for p in [*good, good[3]]], ["path"])
    )
    assert "names no files" in refused(write_list(tmp_path / "e.csv", [], ["path"]))
    (tmp_path / "empty.csv").write_text("")
    assert "(its columns: none)" in refused(tmp_path / "empty.csv")
    (tmp_path / "short.csv").write_text("label,path\nx\n")
    assert "has a row with 1 columns, 2 are needed: x" in refused(tmp_path / "short.csv")
    (tmp_path / "cut.parquet").write_bytes(b"PAR1")
    assert "cannot be read as parquet" in refused(tmp_path / "cut.parquet")
