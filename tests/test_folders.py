"""Folders of images read in place: what is an image, its class, its place in the order; training from one; errors."""

import errno
import io
import os
import pickle
import shutil

import numpy as np
import pytest
import torch
from launch import SMALL, SWITCH, final_state, launch, planned_keys
from shard_sets import encode, index_shard, smooth_image, write_manifest
from webdataset import TarWriter

from caco_scale import config as configuration
from caco_scale.data.listed_files import BLOCK_FILES
from caco_scale.data.loader import evaluation_batches, train_batches
from caco_scale.data.order import Order
from caco_scale.data.store import open_store
from caco_scale.data.store.folder import FolderStore, split_folders
from caco_scale.data.views import ViewSpec
from caco_scale.errors import UserError
from caco_scale.run.audit import read_audit
from caco_scale.run.files import read_json_lines
from caco_scale.training.checks import Start, check_batch, check_data, check_evaluation
from data_prep.build import build
from data_prep.index import index

VIEWS = [ViewSpec(24, (0.2, 1.0)), ViewSpec(24, (0.2, 1.0), blur_p=0.1, solarize_p=0.2)]


def photographs(folder, names, seed=0):
    """Small images of several kinds under the given names below ``folder`` -> folder."""
    generator = np.random.default_rng(seed)
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        kind = "PNG" if name.lower().endswith("png") else "JPEG"
        path.write_bytes(encode(smooth_image(generator, 28 + len(name), 32), kind))
    return folder


def contents(store):
    """{name: (label, bytes)} of every sample."""
    found = {}
    for shard in range(len(store.manifest.shards)):
        there = store.index(shard)
        for place, key in enumerate(there.keys):
            found[key] = int(there.labels[place]), store.read(shard, *there.span(place))
    return found


def refused(*arguments, **options):
    with pytest.raises(UserError) as caught:
        open_store(*arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---- what is in a folder


def test_a_flat_folder_has_no_classes(tmp_path):
    names = [f"IMG_{i:03d}.{ending}" for i, ending in enumerate(["jpg", "JPG", "png", "jpeg"] * 3)]
    folder = photographs(tmp_path / "photos", names)
    for name in (".DS_Store", "notes.txt", ".hidden.jpg", "__MACOSX/IMG_000.jpg"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"no image")
    store = open_store(folder)
    store.check()
    assert isinstance(store, FolderStore)
    assert (store.manifest.classes, store.manifest.num_samples) == ((), 12)
    found = contents(store)
    assert sorted(found) == sorted(names)
    assert all(found[name] == (-1, (folder / name).read_bytes()) for name in names)
    assert [entry["name"] for entry in store.manifest.rejected] == ["notes.txt"]
    assert list(store.index(0).keys) != sorted(names), "the files stand in a random order"
    assert list(store.index(0).keys) == list(open_store(folder).index(0).keys), "which is always the same"


def test_images_are_found_at_any_depth_and_the_top_folders_are_classes(tmp_path):
    names = ["2019/06/a.jpg", "2019/b.jpg", "2020/07/08/c.jpg", "loose.jpg"]
    folder = photographs(tmp_path / "photos", names)
    (folder / "empty").mkdir()
    store = open_store(folder)
    assert (store.manifest.classes, store.manifest.class_counts) == (("2019", "2020"), (2, 1))
    labels = {name: label for name, (label, _) in contents(store).items()}
    assert labels == {"2019/06/a.jpg": 0, "2019/b.jpg": 0, "2020/07/08/c.jpg": 1, "loose.jpg": -1}
    (folder / "empty").rmdir()
    strict = open_store(folder, labelled=True)
    assert {name: label for name, (label, _) in contents(strict).items()} == {
        name: label for name, label in labels.items() if label >= 0
    }


def test_without_loose_images_both_readings_are_the_same_set(tmp_path):
    folder = photographs(tmp_path / "set", [f"{c}/{i}.jpg" for c in "abc" for i in range(5)])
    one, other = open_store(folder), open_store(folder, labelled=True)
    assert one.manifest == other.manifest
    assert one.fingerprint() == other.fingerprint()
    (folder / "a/0.jpg").write_bytes(b"longer than it was, or shorter")
    assert open_store(folder).fingerprint() != one.fingerprint()


def test_names_follow_numbers_over_several_blocks_and_a_pickle(tmp_path):
    folder = tmp_path / "many"
    folder.mkdir()
    for number in range(BLOCK_FILES + 7):
        (folder / f"{number}.jpg").write_bytes(b"x")
    store = pickle.loads(pickle.dumps(open_store(folder)))
    assert [shard.num_samples for shard in store.manifest.shards] == [BLOCK_FILES, 7]
    ids = [0, BLOCK_FILES - 1, BLOCK_FILES, BLOCK_FILES + 6]
    first, second = store.index(0).keys, store.index(1).keys
    assert store.names(ids) == [
        f"000000/{first[0]}",
        f"000000/{first[-1]}",
        f"000001/{second[0]}",
        f"000001/{second[6]}",
    ]


def test_train_and_val_are_found_below_one_folder(tmp_path):
    photographs(tmp_path, ["train/a/0.jpg", "valid/a/0.jpg", "extra/0.jpg"])
    assert split_folders(str(tmp_path)) == (f"{tmp_path}/train", f"{tmp_path}/valid")
    assert split_folders(str(tmp_path / "train")) is None


# ---- batches


def batches_of(store, steps=6, size=8, workers=0):
    counts = [shard.num_samples for shard in store.manifest.shards]
    order = Order(counts, seed=3, global_batch_size=size)
    topology = {"rank": 0, "world_size": 1, "workers": workers}
    return list(train_batches(store, order, VIEWS, start_step=0, num_steps=steps, seed=3, **topology))


def test_batches_are_those_of_a_shard_set_with_the_files_in_the_same_order(tmp_path):
    folder = photographs(tmp_path / "photos", [f"{i:02d}.jpg" for i in range(30)])
    store = open_store(folder)
    (tmp_path / "set").mkdir()
    with TarWriter(str(tmp_path / "set/000000.tar")) as tar:
        for number, name in enumerate(store.index(0).keys):
            tar.write({"__key__": f"{number:08d}", "jpg": (folder / name).read_bytes()})
    write_manifest(tmp_path / "set", [index_shard(tmp_path / "set", "000000.tar", 30)], (), ())
    built = open_store(tmp_path / "set")
    names = dict(zip(built.names(range(30)), store.names(range(30)), strict=True))
    for ours, theirs in zip(batches_of(store, workers=1), batches_of(built), strict=True):
        assert ours.keys == [names[key] for key in theirs.keys]
        assert all(map(torch.equal, ours.crops, theirs.crops))
        for one, other in zip(ours.params, theirs.params, strict=True):
            assert all(torch.equal(one[name], other[name]) for name in other)


def test_a_file_that_is_no_image_is_replaced_and_reported(tmp_path):
    folder = photographs(tmp_path / "photos", [f"{i:02d}.jpg" for i in range(16)])
    (folder / "05.jpg").write_bytes(b"text with an image's name")
    reports = [report for batch in batches_of(open_store(folder), steps=2) for report in batch.corrupt]
    assert [report["key"] for report in reports] == ["000000/05.jpg"]
    assert reports[0]["substitute"] != "000000/05.jpg"


def test_a_folder_of_damaged_files_is_one_line_that_names_it(tmp_path):
    (tmp_path / "photos").mkdir()
    for number in range(16):
        (tmp_path / f"photos/{number}.jpg").write_bytes(b"text")
    with pytest.raises(UserError, match=f"nor do 16 others .*look at the files of {tmp_path}/photos"):
        batches_of(open_store(tmp_path / "photos"), steps=1)


def test_a_file_that_changes_or_goes_is_an_error(tmp_path):
    folder = photographs(tmp_path / "photos", ["a.jpg", "b.jpg"])
    store = open_store(folder)
    places = {key: place for place, key in enumerate(store.index(0).keys)}
    with open(folder / "a.jpg", "ab") as file:
        file.write(b"more")
    (folder / "b.jpg").unlink()
    with pytest.raises(UserError, match=r"a\.jpg has [\d,]+ bytes and had [\d,]+: it is being changed"):
        store.read(0, *store.index(0).span(places["a.jpg"]))
    with pytest.raises(UserError, match=r"cannot read .*b\.jpg: No such file"):
        store.read(0, *store.index(0).span(places["b.jpg"]))


# ---- training


@pytest.fixture(scope="module")
def class_folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("classes")
    photographs(folder / "train", [f"{c}/{i:02d}.png" for c in "abcd" for i in range(24)])
    photographs(folder / "val", [f"{c}/{i:02d}.png" for c in "abcd" for i in range(8)], seed=1)
    return folder


def test_training_from_a_folder_is_resumed_exactly_and_reads_the_planned_files(class_folders, tmp_path):
    flags = {**SMALL, "data.shards": class_folders / "train", "data.val_shards": class_folders / "val"}
    flags |= {"eval.knn_every": 1, "eval.knn_k": 3}
    launch({**flags, "run.dir": tmp_path / "whole", "data.audit": tmp_path / "whole.audit"})
    parts = {**flags, "run.dir": tmp_path / "parts", "data.audit": tmp_path / "parts.audit"}
    launch({**parts, "run.max_steps": SWITCH + 1})
    launch(parts)
    (whole, values), (resumed, _) = final_state(tmp_path / "whole"), final_state(tmp_path / "parts")
    assert values["step"] == 15
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    planned = dict(enumerate(planned_keys(class_folders / "train", flags, 15)))
    assert read_audit(tmp_path / "whole.audit") == read_audit(tmp_path / "parts.audit") == planned
    assert planned[0][0].startswith("000000/")
    figures = [line for line in read_json_lines(tmp_path / "whole/metrics.jsonl") if "knn_top1" in line]
    assert [line["step"] for line in figures] == [12, 15]
    photographs(class_folders / "train", ["a/one_more.png"])
    try:
        error = launch({**parts, "run.max_steps": 16}, code=2)
        assert "listed it: a/one_more.png is new; put it back as it was" in error
        noted = launch({**parts, "run.max_steps": 16, "data.relist": True})
        assert "data.relist: a new data set from here on, 97 images instead of 96" in " ".join(noted.split())
        new_set = planned_keys(class_folders / "train", flags, 16)
        assert read_audit(tmp_path / "parts.audit") == {**planned, 15: new_set[15]}
    finally:
        (class_folders / "train/a/one_more.png").unlink()


def prepared(shards, val_shards):
    config = configuration.replace(
        configuration.load_recipe("demo"),
        data__shards=str(shards),
        data__val_shards=str(val_shards),
        data__global_batch_size=8,
        eval__knn_k=3,
    )
    start = Start(config, "ddp", 0, 1, torch.device("cpu"))
    for check in (check_batch, check_data, check_evaluation):
        check(start)
    return start.data


def test_an_evaluation_without_labels_is_refused_before_training(class_folders, tmp_path):
    flat = photographs(tmp_path / "flat", [f"{i}.png" for i in range(10)])
    with pytest.raises(UserError, match=r"flat is not an image folder \(its 10 images lie directly in it\)"):
        prepared(class_folders / "train", flat)
    with pytest.raises(UserError, match=r"10 of 10 training images have no class"):
        prepared(flat, class_folders / "val")
    mixed = shutil.copytree(class_folders / "train", tmp_path / "mixed")
    photographs(mixed, ["loose.png"])
    with pytest.raises(UserError, match=r"1 of 97 training images have no class: .*data\.val_shards"):
        prepared(mixed, class_folders / "val")
    assert prepared(class_folders / "train", class_folders / "val").val_store.manifest.num_samples == 32


def test_an_evaluation_reads_the_folder_as_a_set_built_of_it(class_folders, tmp_path):
    [(built, _, _)] = build(class_folders / "val", tmp_path / "set", workers=1)

    def images(store):
        batches = evaluation_batches(store, 24, rank=0, world_size=1, batch_size=16, workers=0)
        return sorted(
            (int(y), x.float().mean().item()) for _, xs, ys in batches for x, y in zip(xs, ys, strict=True)
        )

    ours, theirs = images(open_store(class_folders / "val")), images(open_store(built))
    assert [label for label, _ in ours] == [label for label, _ in theirs]
    assert np.allclose([mean for _, mean in ours], [mean for _, mean in theirs], atol=0.5)  # PNG became JPEG


# ---- what is neither a folder of images nor a shard set


def test_no_mistake_proposes_to_build_over_the_users_own_folder(tmp_path):
    photos = tmp_path / "photos"
    photos.mkdir()
    (photos / "readme.txt").write_text("no images")
    line = refused(photos)
    assert f"{photos} has no manifest.json" in line
    assert "none of its 1 files ends in .jpg" in line
    assert "data_prep build" not in line
    photographs(photos, ["train/a/0.jpg", "val/a/0.jpg"])
    assert refused(photos).endswith(f"give one of them, {photos}/train")


def test_a_missing_folder_and_an_empty_flag_name_the_flag(tmp_path):
    line = refused(tmp_path / "nowhere", flag="data.val_shards")
    assert line.startswith(
        f"data.val_shards {tmp_path}/nowhere does not exist: give a folder of images, or make"
    )
    assert f"`python -m data_prep build IMAGES {tmp_path}/nowhere`" in line
    assert refused("", flag="--val").startswith("--val is empty: give a folder of images")


def test_a_file_in_place_of_a_folder(tmp_path):
    tars = foreign_tars(tmp_path / "tars")
    line = refused(tars / "a.tar")
    assert "is a file, not a directory" in line
    assert f"`python -m data_prep index {tars}`" in line
    (tmp_path / "text").write_text("")
    assert "is a file, not a directory: give a folder of images or a shard set" in refused(tmp_path / "text")
    assert refused(make_set(tmp_path) / "manifest.json").endswith(f"give {tmp_path}/set")


def test_tars_without_a_manifest_are_read_after_the_command_of_the_message(tmp_path):
    tars = foreign_tars(tmp_path / "tars")
    line = refused(tars)
    assert f"has 1 tars but no manifest.json: `python -m data_prep index {tars}`" in line
    index(tars)
    assert open_store(tars).manifest.num_samples == 3


def test_sets_below_the_folder_and_an_unfinished_build(tmp_path):
    make_set(tmp_path)
    assert refused(tmp_path) == f"{tmp_path} has no manifest.json: did you mean {tmp_path}/set?"
    (tmp_path / "new/.build").mkdir(parents=True)
    assert "its build has not finished" in refused(tmp_path / "new")


def test_a_folder_that_may_not_be_read_is_one_line(tmp_path, monkeypatch):
    def refuse(path):
        raise PermissionError(errno.EACCES, "Permission denied", path)

    photographs(tmp_path / "photos", ["a.jpg"])
    monkeypatch.setattr(os, "scandir", refuse)
    assert refused(tmp_path / "photos") == f"cannot read {tmp_path}/photos: Permission denied"


def test_a_labelled_folder_needs_full_class_folders(tmp_path):
    folder = photographs(tmp_path / "set", ["a/0.jpg", "b/0.jpg"])
    (folder / "c").mkdir()
    line = refused(folder, labelled=True)
    assert line.endswith("1 of 3 class folders have no images (c): fill or remove them")
    assert open_store(folder).manifest.classes == ("a", "b")


def foreign_tars(folder):
    folder.mkdir()
    with TarWriter(str(folder / "a.tar")) as tar:
        for number in range(3):
            out = io.BytesIO(encode(smooth_image(np.random.default_rng(number), 16, 16)))
            tar.write({"__key__": f"{number}", "jpg": out.getvalue()})
    return folder


def make_set(folder):
    [(built, _, _)] = build(photographs(folder / "src", ["a/0.jpg"]), folder / "set", workers=1)
    shutil.rmtree(folder / "src")
    return type(folder)(built)
