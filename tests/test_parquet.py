"""Parquet files as a source: which files are one split, which columns count, what the labels mean, how much is read."""

import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from caco_scale.data.folders import image_folders
from caco_scale.data.parquet_files import split_of
from caco_scale.data.store import open_store
from caco_scale.errors import UserError
from data_prep.build import build
from data_prep.parquet import ParquetSource

pyarrow = pytest.importorskip("pyarrow", reason="parquet needs pyarrow")
parquet = pytest.importorskip("pyarrow.parquet", reason="parquet needs pyarrow")

BYTES = [f"image {i}".encode() for i in range(6)]  # nothing here decodes them


def write(path, images=BYTES, column="image", card=None, struct=True, **columns):
    """A parquet file of ``images`` and further columns; card: {column: feature} of its metadata."""
    path.parent.mkdir(parents=True, exist_ok=True)
    images = [{"bytes": image, "path": "x.jpg"} for image in images] if struct else list(images)
    table = pyarrow.table({column: images, **columns} if column else columns)
    if card is not None:
        card = {"huggingface": json.dumps({"info": {"features": card}})}
    parquet.write_table(table.replace_schema_metadata(card), path)


def names(*classes):
    return {"label": {"names": list(classes), "_type": "ClassLabel"}, "image": {"_type": "Image"}}


def read(path, tmp_path=None, **options):
    """(classes, {image bytes: class}) of a source."""
    source = ParquetSource(str(path), None, **options)
    folder = image_folders(source.scan(), "SRC")[None]
    return folder.classes, {source.read(image.file): image.class_name for image in folder.images}


def refused(words, path, **options):
    with pytest.raises(UserError) as caught:
        read(path, **options)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---- which files


@pytest.mark.parametrize(
    ("train", "other"),
    [
        ("default/train/0000.parquet", "default/test/0000.parquet"),
        ("train.parquet", "test.parquet"),
        ("train_0.parquet", "val_0.parquet"),
        ("Train.parquet", "Validation.parquet"),
        ("data/train-00000-of-00001.parquet", "data/unlabeled-00000-of-00001.parquet"),
        ("data/train-00000-of-00001-0a1b2c.parquet", "data/test-00000-of-00001-0a1b2c.parquet"),
        ("data/fold1-00000-of-00001.parquet", "data/fold2-00000-of-00001.parquet"),
        ("a/partial-train/0000.parquet", "a/partial-test/0000.parquet"),
    ],
)
def test_splits_are_not_merged(train, other, tmp_path):
    write(tmp_path / train, BYTES[:3])
    write(tmp_path / other, BYTES[3:])
    assert "choose one with --split" in refused("has 2 splits", tmp_path)
    for file, images in ((train, BYTES[:3]), (other, BYTES[3:])):
        assert set(read(tmp_path, split=split_of(file))[1]) == set(images)
        assert set(read(tmp_path / file)[1]) == set(images)
    line = refused("has no parquet files of the split tset", tmp_path, split="tset")
    assert split_of(train) in line


def test_a_split_is_asked_for_by_its_kind(tmp_path):
    write(tmp_path / "Training/0000.parquet", BYTES[:3])
    write(tmp_path / "Validation/0000.parquet", BYTES[3:])
    assert set(read(tmp_path, split="train")[1]) == set(BYTES[:3])
    assert set(read(tmp_path, split="val")[1]) == set(BYTES[3:])


def test_files_beside_a_split_and_two_configurations_are_asked_about(tmp_path):
    write(tmp_path / "one/train.parquet")
    write(tmp_path / "one/more.parquet")
    refused("has files of the split train and others of none (more.parquet)", tmp_path / "one")
    assert len(read(tmp_path / "one", split="train")[1]) == 6
    write(tmp_path / "two/full/train/0000.parquet")
    write(tmp_path / "two/small/train/0000.parquet")
    line = refused("has the split train 2 times (in full/train, small/train)", tmp_path / "two")
    assert line.endswith(f"{tmp_path}/two/full/train")
    refused("2 times", tmp_path / "two", split="train")
    assert len(read(tmp_path / "two/full")[1]) == 6


@pytest.mark.parametrize(
    ("there", "missing"),
    [
        (["train-00000-of-00003", "train-00002-of-00003"], "1"),
        (["train-00000-of-00003", "train-00001-of-00003"], "2"),
        (["train-00001-of-00003-ab", "train-00002-of-00003-ab"], "0"),
        (["train-00002-of-00003", "train-00003-of-00003"], "1"),
        (["0000", "0002"], "1"),
        (["train_0", "train_1", "train_3"], "2"),
    ],
)
def test_missing_files_are_told(there, missing, tmp_path):
    for number, name in enumerate(there):
        write(tmp_path / f"{name}.parquet", BYTES[number : number + 1])
    line = refused("--missing-files", tmp_path)
    assert f"missing: {missing}" in line
    assert len(read(tmp_path, missing_files=True)[1]) == len(there)


def test_whole_sets_are_whole(tmp_path):
    for number in range(3):
        write(tmp_path / f"a/train-0000{number}-of-00003.parquet", BYTES[number : number + 1])
        write(tmp_path / f"b/train-0000{number + 1}-of-00003.parquet", BYTES[number : number + 1])
        write(tmp_path / f"c/{2019 + 2 * number}.parquet", BYTES[number : number + 1])
        write(tmp_path / f"d/000{number}.parquet", BYTES[number : number + 1])
    for folder in "abcd":
        assert len(read(tmp_path / folder)[1]) == 3
    write(tmp_path / "a/train-00000-of-00002.parquet")
    refused("two versions", tmp_path / "a")
    write(tmp_path / "d/train-00000-of-00001-aa.parquet")
    write(tmp_path / "d/train-00000-of-00001-bb.parquet")
    refused("two versions lie there", tmp_path / "d", split="train")


# ---- which columns


def test_the_column_of_images_is_found_by_what_it_holds(tmp_path):
    path = tmp_path / "x.parquet"
    for column in ("img", "image", "picture of it", "jpg"):
        write(path, column=column, label=[0, 1] * 3, caption=["words"] * 6)
        assert set(read(path)[1]) == set(BYTES)
        write(path, column=column, struct=False, label=[0, 1] * 3)
        assert set(read(path)[1]) == set(BYTES)
    write(path, column="left", right=[{"bytes": b"r", "path": None}] * 6)
    line = refused("several columns of images (left, right): choose one with --image-column", path)
    assert "its columns: left (struct<bytes: binary" in line
    assert set(read(path, image_column="left")[1]) == set(BYTES)
    refused("no column 'lfet' (did you mean left?)", path, image_column="lfet")
    write(path, column="left", card={"right": {"_type": "Image"}}, right=[{"bytes": b"r", "path": None}] * 6)
    assert set(read(path)[1]) == {b"r"}
    write(path, column=None, label=[1, 2], text=["a", "b"])
    assert "its columns: label (int64), text (string)" in refused("no column of images", path)
    refused("is string, which holds no image files", path, image_column="text")
    write(path, images=[b"", None, b"x"], struct=False)
    refused("row 1: no image bytes", path)
    parquet.write_table(pyarrow.table({"image": [{"bytes": None, "path": "a.jpg"}]}), path)
    refused("no column of images", path)


def test_labels_are_found_or_there_are_none(tmp_path):
    path = tmp_path / "x.parquet"
    write(path, caption=["words"] * 6)
    assert read(path) == ((), dict.fromkeys(BYTES, ""))
    for column in ("label", "labels", "Class", "category"):
        write(path, **{column: ["b", "a", "b"] * 2})
        assert read(path)[0] == ("a", "b")
        assert read(path, label_column="none")[0] == ()
    card = {name: {"names": ["x", "y"], "_type": "ClassLabel"} for name in ("fine_label", "coarse_label")}
    write(path, card=card, fine_label=[0, 1] * 3, coarse_label=[1, 0] * 3)
    refused("several columns of labels (fine_label, coarse_label): choose one with --label-column", path)
    assert read(path, label_column="coarse_label")[1][BYTES[0]] == "y"
    write(path, label=[0.5] * 6)
    refused("the labels in 'label' are double, not integers or names", path)
    write(path, label=pyarrow.array(["b", "a", "b"] * 2).dictionary_encode())
    assert read(path)[0] == ("a", "b")


@pytest.mark.parametrize("bad", ["", None])
def test_a_missing_or_empty_label_is_told(bad, tmp_path):
    write(tmp_path / "x.parquet", label=["a", "b", bad, "a", "b", "a"])
    line = refused("row 2: the label in 'label' is " + ("missing" if bad is None else "empty"), tmp_path)
    assert "--label-column none" in line
    assert read(tmp_path, label_column="none")[0] == ()


def test_labels_without_meaning_are_told(tmp_path):
    for labels in ([-1] * 6, [0, 1, 2] * 2, [0, 1, -1] * 2):
        write(tmp_path / "x.parquet", card=names("a", "b"), label=labels)
        refused(f"label {labels[2]} of 2 classes", tmp_path)
    write(tmp_path / "x.parquet", label=[-1] * 6)
    refused("label -1: has this split no labels?", tmp_path)


def test_names_that_stand_in_some_files_only_hold_for_all(tmp_path):
    write(tmp_path / "0000.parquet", BYTES[:3], label=[1, 0, 1])
    write(tmp_path / "0001.parquet", BYTES[3:], card=names("cat", "dog"), label=[1, 0, 1])
    classes, found = read(tmp_path)
    assert classes == ("cat", "dog")
    assert [found[image] for image in BYTES] == ["dog", "cat", "dog"] * 2
    write(tmp_path / "0002.parquet", [b"x"], card=names("dog", "cat"), label=[1])
    refused("names the classes of 'label' otherwise than", tmp_path)
    write(tmp_path / "0002.parquet", [b"x"], label=["cat"])
    refused("labels in 'label' (names), but", tmp_path)
    write(tmp_path / "0002.parquet", [b"x"])
    refused("and no labels, but", tmp_path)


def test_the_order_of_classes_is_that_of_the_labels(tmp_path):
    write(tmp_path / "x.parquet", card=names("zebra", "ant", "x/y"), label=[0, 2] * 3)
    # A class without images here has its number all the same: the training set may have some.
    assert read(tmp_path)[0] == ("00000_zebra", "00001_ant", "00002_x_y")
    write(tmp_path / "x.parquet", label=[5, 100_000, 99_999] * 2)
    assert read(tmp_path)[0] == ("000005", "099999", "100000")
    write(tmp_path / "x.parquet", label=["a/b", "a_b"] * 3)
    refused("several labels that would be one class: a_b", tmp_path)
    write(tmp_path / "x.parquet", card=names("a", "a"), label=[0, 1] * 3)
    refused("empty, doubled or no words", tmp_path)
    write(tmp_path / "x.parquet", label=["train", "val"] * 3)  # classes, whatever their names
    assert read(tmp_path)[0] == ("train", "val")


def test_a_set_without_labels_is_built_and_read(tmp_path):
    images = []
    for number in range(5):
        out = io.BytesIO()
        Image.fromarray(np.full((20, 20, 3), 40 * number, np.uint8)).save(out, "JPEG")
        images.append(out.getvalue())
    write(tmp_path / "data/unlabeled-00000-of-00001.parquet", images)
    lines = []
    options = {"kind": "parquet", "image_column": "image"}
    [(place, manifest, _)] = build(
        tmp_path / "data", tmp_path / "set", workers=1, source_options=options, tell=lines.append
    )
    assert lines == [f"{tmp_path}/set: 5 images without classes"]
    assert (manifest.classes, manifest.num_samples) == ((), 5)
    store = open_store(place)
    store.check()
    assert store.index(0).labels.tolist() == [-1] * 5
    assert {extension for extension, _, _ in store.index(0).members(0)} == {"jpg", "json"}


def test_what_is_no_parquet_is_one_line(tmp_path):
    for number, data in enumerate((b"", b"PAR1", b"PAR1" + bytes(40) + b"PAR1", b"no parquet")):
        path = tmp_path / f"{number}/x.parquet"
        path.parent.mkdir()
        path.write_bytes(data)
        refused(f"{path} cannot be read as parquet", path.parent)
    write(tmp_path / "a/x.parquet", label=[0, 1] * 3)
    data = (tmp_path / "a/x.parquet").read_bytes()
    (tmp_path / "a/x.parquet").write_bytes(data[:10] + bytes(100) + data[110:])
    refused("x.parquet cannot be read as images with labels: row 0", tmp_path / "a")
    table = pyarrow.table({"image": BYTES, "label": pyarrow.array([2**63 + 5] * 6, pyarrow.uint64())})
    for card in (
        "",
        "[]",
        "{",
        '{"info": 1}',
        "[" * 100_000,
        '{"info": {"features": {"label": {"names": [1]}}}}',
    ):
        parquet.write_table(table.replace_schema_metadata({"huggingface": card}), tmp_path / "a/x.parquet")
        if "names" in card:
            refused("no words (1)", tmp_path / "a")
        elif card in ("{", "", "[" * 100_000):
            refused("cannot be read as parquet", tmp_path / "a")
    parquet.write_table(table, tmp_path / "a/x.parquet")
    assert read(tmp_path / "a")[0] == (str(2**63 + 5),)
    parquet.write_table(pyarrow.table([BYTES, BYTES], names=["image", "image"]), tmp_path / "a/x.parquet")
    refused("several columns with the name 'image'", tmp_path / "a")
    with pytest.raises(UserError, match=r"has no images .*--format parquet"):
        build(tmp_path / "a", tmp_path / "set")


# ---- how much is read


def test_a_small_file_of_large_images_is_refused_in_little_memory(tmp_path):
    """One value that stands in the file once, and in every row of it."""
    image = bytes(40 << 20)
    table = pyarrow.table({"image": pyarrow.DictionaryArray.from_arrays([0] * 200, [image])})
    small, options = tmp_path / "small.parquet", {"store_schema": False, "dictionary_pagesize_limit": 1 << 30}
    parquet.write_table(table, small, compression="zstd", **options)
    assert small.stat().st_size < 100_000
    script = (
        "import sys; from data_prep.parquet import ParquetSource; from caco_scale.errors import UserError\n"
        "import caco_scale.data.parquet_columns, pyarrow.parquet, data_prep.parquet as p\n"
        "p.SMALL_BYTES = 400 << 20\n"
        "try: ParquetSource(sys.argv[1], None).scan()\n"
        "except UserError as error: print(error)\n"
        "print(next(int(line.split()[1]) >> 10 for line in open('/proc/self/status') if line.startswith('VmHWM')))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, small],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    line, peak = done.stdout.splitlines()
    assert "it is no file of stored images" in line
    assert int(peak) < 500, "MB: two hundred times 40 MB are 8 GB"


def test_a_page_that_claims_much_is_not_unpacked(tmp_path, monkeypatch):
    monkeypatch.setattr("data_prep.parquet.SMALL_BYTES", 1 << 20)
    monkeypatch.setattr("caco_scale.data.parquet_files.SMALL_BYTES", 1 << 20)
    table = pyarrow.table({"image": [bytes(1 << 20)] * 4})
    parquet.write_table(table, tmp_path / "x.parquet", compression="zstd", use_dictionary=False)
    line = refused("claim to unpack to 4,19", tmp_path)
    assert "column image" in line
    # Images as they are, which no compression makes smaller, may be as many as there are.
    noise = np.random.default_rng(0).integers(0, 256, 1 << 20, np.uint8).tobytes()
    write(tmp_path / "x.parquet", [noise + bytes([i]) for i in range(4)])
    assert len(read(tmp_path)[1]) == 4
