"""What a figure counts: images that do not decode, classes one by one, validation sets that lack a class."""

import json
import shutil

import numpy as np
import pytest
import torch
from evaluation_cases import make_place, run_of_rank, words
from gloo import run_ranks
from shard_sets import make_shard_set
from test_evaluate_knn import image_folder

from caco_scale.data.labels import lacking_classes, with_classes_of
from caco_scale.data.loader import evaluation_batches
from caco_scale.data.store import open_store
from caco_scale.errors import UserError
from caco_scale.evaluate import run_knn
from caco_scale.evaluate.__main__ import parse
from caco_scale.evaluate.knn import knn_counts
from caco_scale.run.scores import _scores

SHORT = {
    "knn": ("--k", 3, "--temperature", 0.1),
    "linear": ("--batch_size", 16, "--epochs", 1),
    "fast": ("--fast", "--batch_size", 16, "--epochs", 1, "--lr", 1),
    "finetune": ("--batch_size", 16, "--epochs", 1),
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """64 training images, of which number 5 does not decode, and 32 of validation, of which 3 and 9 do not."""
    folder = make_place(tmp_path_factory.mktemp("counts") / "place")
    for name, number, seed, corrupt in (("train", 64, 0, (5,)), ("val", 32, 1, (3, 9))):
        shutil.rmtree(folder / name)
        make_shard_set(folder / name, num_images=number, size=20, seed=seed, corrupt=corrupt)
    return folder


@pytest.mark.parametrize("kind", SHORT)
def test_an_undecodable_validation_image_counts_as_wrong_and_is_named(place, tmp_path, capsys, kind):
    command = "linear" if kind == "fast" else kind
    result = run_of_rank(0, 1, words(command, place, *SHORT[kind], "--to", tmp_path))
    written = json.loads((tmp_path / "result.json").read_text())
    assert [name for name, _ in written["undecodable"]["val"]] == [
        "000000.tar/00000003",
        "000000.tar/00000009",
    ]
    assert [name for name, _ in written["undecodable"]["train"]] == ["000000.tar/00000005"]
    assert result["images"] == 32
    assert result["images_per_class"] == [8, 8, 8, 8]
    figures = result["results"][0] if kind == "knn" else result
    right = figures["right_per_class"]
    assert max(right[3], right[1]) <= 8 - 1, "images 3 and 9 are of these classes"
    assert figures["top1"] == pytest.approx(100 * sum(right) / 32)
    assert figures["mean_per_class"] == pytest.approx(100 * np.mean(np.array(right) / 8))
    low, high = figures["interval" if kind == "knn" else "top1_interval"]
    assert low < figures["top1"] < high
    printed = capsys.readouterr().out
    assert "2 of 32 validation images do not decode, counted as wrong: 000000.tar/00000003 (" in printed
    assert "1 of 64 training images does not decode, left out: 000000.tar/00000005 (" in printed
    assert "worst of 4 classes: class" in printed
    assert "over the validation images, not over seeds" in printed
    assert (
        _scores({**written, "weights": {"encoder": "query", "metadata": {"step": 1}}})[0].top1
        == figures["top1"]
    )


@pytest.mark.parametrize("command", ["knn", "linear"])
def test_undecodable_images_are_the_same_on_two_processes(place, tmp_path, command):
    options = words(command, place, *SHORT[command], "--to")
    one = run_of_rank(0, 1, [*options, str(tmp_path / "1")])
    for two in run_ranks(run_of_rank, 2, [*options, str(tmp_path / "2")]):
        for name in ("undecodable", "images_per_class", "right_per_class", "top1", "results"):
            assert two.get(name) == one.get(name), name


def test_missed_images_are_in_the_denominator_only():
    generator = torch.Generator().manual_seed(0)
    train, features = (torch.randn(n, 6, generator=generator) for n in (40, 15))
    labels = torch.arange(40) % 3
    options = {"k": [1, 5], "temperature": [0.1], "num_classes": 3}
    without = knn_counts(train, labels, features, labels[:15], **options)
    missed = knn_counts(
        train, labels, features, labels[:15], **options, missed_labels=torch.tensor([2, 2, 0])
    )
    assert without.images.tolist() == [5, 5, 5]
    assert missed.images.tolist() == [6, 5, 7]
    for pair, right in without.right.items():
        assert torch.equal(right, missed.right[pair])
        assert missed.top1(*pair) == pytest.approx(100 * int(right.sum()) / 18)


def test_a_validation_set_may_lack_classes_and_keeps_the_training_labels(tmp_path):
    train = open_store(str(image_folder(tmp_path / "train", classes=4)), labelled=True)
    folder = image_folder(tmp_path / "val", classes=4, seed=1)
    whole = open_store(str(folder), labelled=True)
    assert with_classes_of(train, whole, "kNN") is whole
    shutil.rmtree(folder / "class1")
    lacking = with_classes_of(train, open_store(str(folder), labelled=True), "kNN")
    assert lacking.manifest.classes == train.manifest.classes
    assert lacking.manifest.class_counts == (5, 0, 5, 5)
    assert lacking_classes(lacking) == "no validation image of 1 of 4 classes (class1)"
    for workers in (0, 1):  # also where a worker unpickles the store
        for ids, _, labels in evaluation_batches(
            lacking, 16, rank=0, world_size=1, batch_size=99, workers=workers
        ):
            names = lacking.names(ids.numpy())
            assert labels.tolist() == [int(name.split("class")[1][0]) for name in names]
    shutil.copytree(tmp_path / "val/class0", tmp_path / "val/stranger")
    with pytest.raises(
        UserError, match=r"1 of the 4 classes of .*val are not among the 4 of .*train \(stranger\)"
    ):
        with_classes_of(train, open_store(str(folder), labelled=True), "kNN")


def test_an_image_without_a_class_keeps_none(tmp_path):
    make_shard_set(tmp_path / "train", num_images=8, classes=4)
    make_shard_set(tmp_path / "val", num_images=8, classes=3)
    train, val = (open_store(tmp_path / name) for name in ("train", "val"))
    val.index(0)._arrays["labels"] = np.array([0, 1, 2, -1, 3, 1_000_000, 1, 2])  # as of a foreign set
    assert with_classes_of(train, val, "kNN").index(0).labels.tolist() == [0, 1, 2, -1, -1, -1, 1, 2]


def test_evaluate_takes_a_validation_folder_without_a_class(place, tmp_path, capsys):
    image_folder(tmp_path / "set/train", classes=3), image_folder(tmp_path / "set/val", classes=3, seed=1)
    shutil.rmtree(tmp_path / "set/val/class0")
    words = [
        "knn",
        place / "caco.pth.tar",
        "--data",
        tmp_path / "set",
        "--size",
        16,
        "--workers",
        0,
        "--k",
        3,
    ]
    result = run_knn.run(parse([str(word) for word in (*words, "--to", tmp_path / "out")]))
    assert result["images_per_class"] == [0, 5, 5]
    assert result["results"][0]["right_per_class"][0] == 0
    assert "no validation image of 1 of 3 classes (class0)" in capsys.readouterr().out
