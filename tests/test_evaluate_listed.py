"""Published lists of images: names to samples, of every kind of set, and what is no such list."""

import os

import numpy as np
import pytest
from evaluation_cases import make_place, run_of_rank, words
from gloo import run_ranks
from test_evaluate_knn import image_folder

from caco_scale.data.store import open_store
from caco_scale.errors import UserError
from caco_scale.evaluate import run_finetune
from caco_scale.evaluate.__main__ import parse
from caco_scale.evaluate.listed import find_listed, read_list
from data_prep.build import build

SHORT = ("--epochs", 1, "--batch_size", 4)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """The shard sets of :func:`make_place`, a folder named as ImageNet's, and a set built of it."""
    folder = make_place(tmp_path_factory.mktemp("listed") / "place")
    image_folder(folder / "images", per_class=5, classes=4)
    for path in (folder / "images").glob("*/*"):  # class1/3.JPEG -> class1/n1_3.JPEG
        path.rename(path.parent / f"n{path.parent.name[-1]}_{path.name}")
    build(folder / "images", folder / "built", samples_per_shard=6, workers=0)
    return folder


def write(path, *lines, end="\n"):
    path.write_text(end.join(lines))
    return str(path)


NAMES = ["n2_0.JPEG", "n0_4.JPEG", "n3_1.JPEG", "n1_2.JPEG", "n1_3.JPEG"]


@pytest.mark.parametrize("kind", ["images", "built"])
@pytest.mark.parametrize("change", ["as published", "with folders", "without endings", "windows", "twice"])
def test_names_are_found_in_folders_and_in_sets_built_of_them(place, tmp_path, kind, change):
    lines, end = list(NAMES), "\n"
    if change == "with folders":
        lines = [f"class{name[1]}/{name}" for name in lines]
    elif change == "without endings":
        lines = [name.removesuffix(".JPEG") for name in lines]
    elif change == "windows":
        end = "\r\n"
    elif change == "twice":
        lines = [*lines, "", *lines]
    store = open_store(str(place / kind), labelled=True)
    names, _ = read_list(write(tmp_path / "list.txt", *lines, end=end))
    chosen = find_listed(store, "list.txt", names, 0, 1)
    labels = np.concatenate([store.index(shard).labels for shard in range(len(store.manifest.shards))])
    assert sorted(labels[chosen]) == [0, 1, 1, 2, 3]
    if kind == "images":
        assert sorted(name.rsplit("/", 1)[1] for name in store.names(chosen)) == sorted(NAMES)


def test_the_list_trains_and_is_named_on_one_and_two_processes(place, tmp_path, capsys):
    listed = write(tmp_path / "my1percent.txt", *NAMES)
    options = words(
        "finetune", place, *SHORT, "--list", listed, "--precision", "fp64", "--images_at_once", 64
    )
    options[options.index("--data") + 1] = str(place / "built")
    options[options.index("--val") + 1] = str(place / "images")
    one = run_of_rank(0, 1, [*options, "--to", str(tmp_path / "1")])
    assert one["samples"] == 5
    assert one["settings"]["list"] == "my1percent.txt"
    assert one["settings"]["epochs"] == 1
    printed = capsys.readouterr().out
    assert "5 of 20 labels (the list my1percent.txt; 1 to 2 a class)" in printed
    two = run_ranks(run_of_rank, 2, [*options, "--to", str(tmp_path / "2")])[0]
    assert two["top1"] == one["top1"]
    assert (tmp_path / "1/samples.txt").read_text() == (tmp_path / "2/samples.txt").read_text()
    with pytest.raises(UserError, match="both choose images"):
        run_finetune.run(parse([*options, "--fraction", "0.1"]))
    with pytest.raises(UserError, match=r"--list +is not a file"):  # of a shell variable that is not set
        run_finetune.run(parse(words("finetune", place, *SHORT, "--list", "")))


def test_a_drawn_share_is_called_our_own(place, tmp_path, capsys):
    run_of_rank(0, 1, words("finetune", place, *SHORT, "--fraction", 0.1, "--to", tmp_path))
    assert "drawn by this program's seed, no published list; 2 to 2 a class" in capsys.readouterr().out


def test_names_that_do_not_fit_are_one_line_with_counts(place, tmp_path):
    store = open_store(str(place / "built"))
    with pytest.raises(
        UserError, match=r"2 of 7 names are not among the 20 images of .*built \(n9_1\.JPEG, x\)"
    ):
        find_listed(store, "list.txt", [*NAMES, "n9_1.JPEG", "x"], 0, 1)
    with pytest.raises(UserError, match=r"1 of 1 names are not among"):  # another folder is another image
        find_listed(store, "list.txt", ["class1/n2_0.JPEG"], 0, 1)
    image_folder(tmp_path / "same")
    same = open_store(str(tmp_path / "same"), labelled=True)
    with pytest.raises(
        UserError, match=r"1 of 2 names fit several images of .*same \(1\.JPEG\): put their folders"
    ):
        find_listed(same, "list.txt", ["1.JPEG", "class0/2.JPEG"], 0, 1)
    assert len(find_listed(same, "list.txt", ["class0/2.JPEG", "class2/2.JPEG"], 0, 1)) == 2
    with pytest.raises(
        UserError, match=r"3 of 3 names are not among the 64 images"
    ):  # no originals are noted there
        find_listed(open_store(place / "train"), "list.txt", NAMES[:3], 0, 1)


@pytest.mark.parametrize("content", [b"", b"\n \n", b"\xff\xfe\x00", None, "folder", "fifo"])
def test_what_is_no_list_is_one_line(tmp_path, content):
    path = tmp_path / "list"
    if content == "folder":
        path.mkdir()
    elif content == "fifo":
        os.mkfifo(path)
    elif content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match="--list") as caught:
        read_list(str(path))
    assert "\n" not in str(caught.value)
