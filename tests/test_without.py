"""``data_prep build --without LIST``: what it names is not built, and a line that names nothing is an error."""

import os

import numpy as np
import pytest
from shard_sets import encode

from caco_scale.data.store.local import LocalStore
from caco_scale.errors import UserError
from data_prep.build import build
from data_prep.repair import repair
from data_prep.without import read_list

NAMES = [f"{c}/{i}.png" for c in ("ant", "bee") for i in range(4)]


def write_images(folder, names):
    for number, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        pixels = np.full((6, 6, 3), 20 * number, np.uint8)
        (folder / name).write_bytes(encode(pixels, "PNG"))
    return folder


def write_list(tmp_path, *lines, end=b"\n"):
    path = tmp_path / "list.txt"
    path.write_bytes(end.join(os.fsencode(line) for line in lines))
    return str(path)


def built(src, dst, **how):
    lines = []
    results = build(src, dst, workers=0, tell=lines.append, **how)
    return [LocalStore(path) for path, *_ in results], lines


def sources(store):
    return {note["source"] for note in store.manifest.fixed}  # PNGs become JPEGs: all of them are noted


def test_what_a_list_names_is_left_out_and_recorded(tmp_path):
    src = write_images(tmp_path / "images", NAMES)
    listed = write_list(tmp_path, "ant/1.png", "", "bee/3.png", "ant/1.png", end=b"\r\n")
    (store,), lines = built(src, tmp_path / "set", without=listed)
    assert sources(store) == set(NAMES) - {"ant/1.png", "bee/3.png"}
    assert store.manifest.class_counts == (3, 3)
    reasons = {note["source"]: note["reason"] for note in store.manifest.rejected}
    assert reasons == dict.fromkeys(("ant/1.png", "bee/3.png"), "left out by a list")
    assert f"{src}: 2 images left out by {listed}" in lines

    with pytest.raises(UserError, match="holds another build"):
        built(src, tmp_path / "set")
    (tmp_path / "set/000000.tar").write_bytes(b"damaged")
    with pytest.raises(UserError, match="holds another build"):
        repair(src, tmp_path / "set", 0)
    assert repair(src, tmp_path / "set", 0, without=listed)[1] == ["000000.tar"]


def test_an_empty_list_leaves_nothing_out(tmp_path):
    src = write_images(tmp_path / "images", NAMES)
    (one,), _ = built(src, tmp_path / "one", without=write_list(tmp_path))
    (two,), _ = built(src, tmp_path / "two")
    assert one.manifest == two.manifest


def test_of_splits_a_name_is_the_whole_one_or_that_in_the_only_split_that_has_it(tmp_path):
    src = write_images(
        tmp_path / "images", [f"train/{n}" for n in NAMES] + ["val/ant/1.png", "val/bee/9.png"]
    )
    with pytest.raises(UserError, match=r"line 1: bee/1.png is no image") as caught:
        built(src, tmp_path / "x", without=write_list(tmp_path, "bee/1.png"), split="val")
    assert "remove that line" in str(caught.value)
    with pytest.raises(UserError, match="val: 1 of 2 class folders have no images"):
        built(src, tmp_path / "x", without=write_list(tmp_path, "bee/9.png", "train/ant/1.png"))
    listed = write_list(tmp_path, "bee/9.png", "train/ant/1.png", "ant/2.png")
    stores, _ = built(src, tmp_path / "set", without=listed, skip_empty_classes=True)
    found = {os.path.basename(store.url): sources(store) for store in stores}
    assert found == {"train": set(NAMES) - {"ant/1.png", "ant/2.png"}, "val": {"ant/1.png"}}
    line = "line 2: ant/1.png is in train and in val: write train/ant/1.png, or take one split with --split train"
    with pytest.raises(UserError, match=line):
        built(src, tmp_path / "y", without=write_list(tmp_path, "", "ant/1.png"))


def test_names_that_are_no_utf_8_and_begin_with_blanks(tmp_path):
    names = [b"ant/ 1.png", b"ant/\xff.png", b"ant/2.png"]
    src = write_images(tmp_path / "images", map(os.fsdecode, names))
    (store,), _ = built(src, tmp_path / "set", without=write_list(tmp_path, *map(os.fsdecode, names[:2])))
    assert sources(store) == {"ant/2.png"}


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["ant/1.png", "ant/9.png"], "line 2: ant/9.png is no image of the source: remove that line"),
        (["ant/1.png "], "line 1: ant/1.png  is no image of the source"),
        (NAMES, "images has no images"),
    ],
)
def test_a_list_that_does_not_fit_is_one_line_before_anything_is_built(tmp_path, lines, message):
    src = write_images(tmp_path / "images", NAMES)
    with pytest.raises(UserError, match=message):
        built(src, tmp_path / "set", without=write_list(tmp_path, *lines))
    assert not (tmp_path / "set").exists()


def test_no_list(tmp_path):
    with pytest.raises(UserError, match=r"--without .*none is not a file: give a text file"):
        build(tmp_path, tmp_path / "set", without=str(tmp_path / "none"))
    assert read_list(write_list(tmp_path, "a", " ", "b")) == {"a": 1, "b": 3}
