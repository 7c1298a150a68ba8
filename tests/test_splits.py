"""Which folders are splits and which are classes: by names, in any case, at any place, or a question."""

import itertools
import tarfile

import numpy as np
import pytest

from caco_scale.data.folders import File, Listing, image_folders
from caco_scale.data.listed_files import ListedFiles
from caco_scale.data.scan import Scan
from caco_scale.data.splits import find_splits, held_out, split_kind
from caco_scale.data.store.folder import rows_of
from caco_scale.data.store.listed import ListedStore
from caco_scale.errors import UserError
from data_prep.tar import TarSource

ANIMALS = ("cat", "dog", "emu")


def listing(*folders, images=2):
    """A listing with some images in every folder; a name with a dot is that file."""
    found = Listing()
    for folder in folders:
        for name in [folder] if "." in folder else [f"{folder}/{i}.jpg" for i in range(images)]:
            found.add(File(name, 5))
    return found


def trees(*splits, classes=ANIMALS):
    return [f"{split}/{name}" for split in splits for name in classes]


def read(*folders, **options):
    """{split: (classes, number of images)} as a build takes it."""
    found = image_folders(listing(*folders), "SRC", **options)
    return {name: (folder.classes, len(folder.images)) for name, folder in found.items()}


def question(*folders, **options):
    with pytest.raises(UserError) as caught:
        read(*folders, **options)
    assert "may be splits or classes" in str(caught.value)
    assert "--no-split-folders" in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    "names",
    [
        *(("train", "val", "unlabeled"), ("Train", "Val"), ("training", "validation"), ("dev", "train")),
        *(("TRAIN", "TEST", "extra"), ("train2017", "val2017", "test2017"), ("train_images", "test_images")),
        *(
            ("TrainSet", "TestSet"),
            ("test", "val"),
            ("train",),
            ("Validation",),
            ("training_set", "test_set"),
        ),
        *(("ILSVRC2012_img_train", "ILSVRC2012_img_val"), ("train1", "eval", "unlabelled")),
    ],
)
@pytest.mark.parametrize("around", ["", "imagenet/", "a/b/c/"])
def test_splits_are_no_classes(names, around):
    place = [around + name for name in names]
    assert {name: found[0] for name, found in read(*trees(*place)).items()} == dict.fromkeys(names, ANIMALS)
    # What holds no images is no stranger.
    assert read(*trees(*place), f"{around}annotations/a.xml", f"{around}README.md").keys() == set(names)
    # Without class folders they are splits, too, which have no classes.
    with pytest.raises(UserError, match=r"is not an image folder \(its 2 images lie directly in it\)"):
        read(*place)


@pytest.mark.parametrize(
    "folders",
    [
        *((*ANIMALS, "train"), (*ANIMALS, "extra"), ("bullet_train", "steam_train", "tram")),
        *(("trainer", "sandal"), ("testudo", "valley", "devil"), ("extra",), ("n01440764", "n01443537")),
        *(("image", "images"), ("2017", "2018"), ("a/b/c", "a/d")),
    ],
)
def test_classes_are_no_splits(folders):
    tops = {folder.split("/")[0] for folder in folders}
    assert read(*folders) == {None: (tuple(sorted(tops)), 2 * len(folders))}


@pytest.mark.parametrize(
    "folders",
    [
        (*trees("train", "val"), "photographs"),
        ("train", "val", *ANIMALS),
        (*trees("train"), *ANIMALS),  # its folders are classes, those beside it are not splits
        ("train", "other"),
        *((*ANIMALS, name) for name in ("val", "test", "unlabeled", "dev")),
        ("seg_train", "seg_test", "seg_pred"),
        ("train_cats", "train_dogs", "val_cats", "val_dogs"),
        (*ANIMALS, "train", "my_test"),
        ("seg_train", "seg_test", "extra"),
    ],
)
def test_in_doubt_the_user_is_asked(folders):
    assert "--split-folders" in question(*folders)
    tops = {folder.split("/")[0] for folder in folders}
    assert read(*folders, split_folders=False)[None][0] == tuple(sorted(tops))
    with pytest.raises(UserError, match=r"rename them or run .*--no-split-folders"):
        store(*folders)


def test_splits_within_every_class_are_asked_for():
    line = question("cat/train", "cat/val", "dog/train", "dog/val")
    assert "SRC holds cat/train, cat/val" in line
    assert "--split-folders" not in line.replace("--no-split-folders", "")
    assert read("cat/train", "cat/val", "dog/train", split_folders=False) == {None: (("cat", "dog"), 6)}
    assert "give one folder of it, SRC/b" in question("a/x", "b/train/x", "b/test/x")


def test_the_answer_decides():
    folders = (*trees("train", "val"), "photographs/x", "loose.jpg")
    assert read(*folders, split_folders=True) == {"train": (ANIMALS, 6), "val": (ANIMALS, 6)}
    assert read(*folders, split="val") == {None: (ANIMALS, 6)}
    found = image_folders(listing(*folders), "SRC", split_folders=True)
    assert found["train"].left_out == found["val"].left_out == ("photographs", "loose.jpg")
    # A folder with a name of its own is a split for who says so.
    assert read(*trees("train", "holdout"), split="holdout", split_folders=True) == {None: (ANIMALS, 6)}
    with pytest.raises(UserError, match="no folders with the names of splits: its top folders are classes"):
        read(*ANIMALS, split_folders=True)
    with pytest.raises(UserError, match=r"no split 'vall' \(did you mean val\?\), only train, val"):
        read(*trees("train", "val"), split="vall")


def test_an_empty_split_is_not_left_out_without_a_word():
    found = listing(*trees("train"))
    found.add_folder("val")
    with pytest.raises(UserError, match=r"SRC/val is not an image folder \(no images in 0 class folders\)"):
        image_folders(found, "SRC")


def test_labels_come_from_all_training_folders():
    found = image_folders(listing("train1/a", "train2/b", "val/a", "val/b"), "SRC")
    assert {folder.classes for folder in found.values()} == {("a", "b")}
    with pytest.raises(UserError, match=r"test has 1 classes that Training lacks \(b\)"):
        read("Training/a", "test/b")


def test_an_empty_class_is_seen_below_folders_around_the_splits():
    found = listing(*trees("a/b/train"))
    found.add_folder("a/b/train/dodo")
    with pytest.raises(UserError, match=r"1 of 4 class folders have no images \(dodo\)"):
        image_folders(found, "SRC")


def store(*folders, labelled=False):
    """As data.shards opens a folder, of which it lists what we say."""
    there = listing(*folders)
    names = sorted((file.name for file in there.files), key=lambda name: (name.partition("/")[0], name))
    counts = dict.fromkeys(["", *sorted(there.folders)], 0)
    for name in names:
        counts[name.rpartition("/")[0]] += 1
    lengths, sizes = np.array([len(name) for name in names], np.uint32), np.full(len(names), 5)
    found = Scan("".join(names).encode(), lengths, sizes, counts, [], 0)
    return ListedStore("/SRC", "/SRC", ListedFiles.in_memory(rows_of("/SRC", labelled, found)))


@pytest.mark.parametrize("labelled", [False, True])
def test_a_folder_that_is_trained_on_in_place_holds_no_splits(labelled):
    for folders in (trees("Train", "Val"), ("train", "val"), trees("in/dev", "in/training"), ("train",)):
        with pytest.raises(UserError, match=r"/SRC holds .*: give one of them, /SRC/(in/)?[Tt]rain"):
            store(*folders, labelled=labelled)
    with pytest.raises(UserError, match="give one of its folders, such as /SRC/cat;"):
        store("cat/train", "cat/test", "dog/train", labelled=labelled)
    assert store(*ANIMALS, "train", labelled=labelled).manifest.classes == (*ANIMALS, "train")


def test_the_words_of_an_error_can_be_typed(tmp_path):
    from caco_scale.data.store import open_store

    folder = tmp_path / "my photos; $(id)'"
    for name in trees("train", "val"):
        (folder / name).mkdir(parents=True)
        (folder / name / "0.jpg").write_bytes(b"x")
    with pytest.raises(UserError) as caught:
        open_store(folder)
    assert str(caught.value).endswith("give one of them, '" + str(folder).replace("'", "'\"'\"'") + "/train'")


@pytest.mark.parametrize("around", ["", "imagenet/", "a/b/"])
@pytest.mark.parametrize("extra", [(), ("README.md",)])
def test_tars_are_read_as_the_trees_they_are_of(around, extra, tmp_path):
    for number, folders in enumerate((trees("Training", "Testing"), trees("train"), ANIMALS)):
        path = tmp_path / f"{number}.tar"
        names = [f"{around}{folder}/{i}.jpg" for folder in folders for i in range(2)]
        with tarfile.open(path, "w") as tar:
            for name in (*names, *(around + name for name in extra)):
                tar.addfile(tarfile.TarInfo(name))
        found = image_folders(TarSource(path, path).scan(), "SRC")
        splits = {folder.split("/")[0] for folder in folders if "/" in folder} or {None}
        assert found.keys() == splits
        if around != "a/b/":  # one folder around all is left out, as ever
            assert all(folder.classes == ANIMALS for folder in found.values())


def test_labels_of_a_file_are_believed():
    found = listing("train", "val")
    found.labelled = True
    assert image_folders(found, "SRC")[None].classes == ("train", "val")


def test_every_pair_of_kinds_is_told_apart():
    for first, second in itertools.permutations(("train", "val", "test"), 2):
        assert find_splits({f"{first}/a", f"{second}/a"}).names == tuple(
            sorted((first, second), key=["train", "val", "test"].index)
        )
    assert [split_kind(name) for name in ("Train_Set", "x_train", "train val", "été", "")] == [
        *("train", None, None, None, None)
    ]
    assert held_out(["test", "training", "x"]) == ("training", "test")
    assert held_out(["train1", "train2", "val"]) is None


def test_the_flag_has_two_sides():
    from caco_scale.flags.read import read as read_flags
    from data_prep.__main__ import Build

    asked = lambda *flags: read_flags(Build, ["SRC", "DST", *flags], "build")
    assert asked().split_folders is None
    assert asked("--split-folders").split_folders is True
    assert asked("--no-split-folders").split_folders is asked("--split_folders=false").split_folders is False
    assert asked("--dry-run", "--no-dry-run").dry_run is False
    for wrong in ("--no-split-folder", "--no-short-side", "--no-dry-run=true"):
        with pytest.raises(UserError, match="unknown flag"):
            asked(wrong)


def test_classes_are_said_before_a_build(tmp_path, capsys):
    from data_prep.__main__ import main

    for name in (*trees("in/train", "in/val", classes=[f"c{i:02d}" for i in range(12)]), "in/train"):
        (tmp_path / name).mkdir(parents=True, exist_ok=True)
        (tmp_path / name / "0.jpg").write_bytes(b"x")
    (tmp_path / "in/loose.jpg").write_bytes(b"x")
    main(["build", str(tmp_path), str(tmp_path.parent / "sets"), "--dry-run"])
    lines = capsys.readouterr().out.splitlines()
    place = tmp_path.parent / "sets"
    listed = ", ".join(f"c{i:02d}" for i in range(8))
    for split in ("train", "val"):
        assert f"{place}/{split}: 12 images in 12 classes ({listed} and 4 more)" in lines
        assert f"{place}/{split}: left out, for they are in no split: in/loose.jpg" in lines
