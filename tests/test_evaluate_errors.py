"""Wrong and hostile inputs to every evaluation: one clear line, exit code 2, nothing run, nothing left behind."""

import fcntl
import json
import os
import subprocess
import sys

import pytest
import torch
from evaluation_cases import make_place, words
from launch import environment
from shard_sets import make_shard_set
from test_evaluate_knn import image_folder
from weight_files import Bomb, encoder

from caco_scale.data.shards import MANIFEST_NAME
from caco_scale.errors import UserError
from caco_scale.evaluate.__main__ import main
from caco_scale.evaluate.loop import check_batch
from caco_scale.run import lock


def test_one_set_for_both_is_a_warning(tmp_path, capsys):
    place = make_place(tmp_path, num_images=16)
    main(words("knn", place, "--k", "3", "--to", tmp_path / "result"))
    assert "warning" not in capsys.readouterr().out
    main(words("knn", place, "--k", "3", "--to", tmp_path / "other", "--val", place / "train"))
    assert (
        "warning: --data and --val are the same images: every image finds itself" in capsys.readouterr().out
    )


COMMANDS = {
    "knn": ("--k", "3"),
    "linear": ("--batch_size", "16", "--epochs", "1"),
    "linear-fast": ("--fast", "--batch_size", "16", "--epochs", "1"),
    "finetune": ("--batch_size", "16", "--epochs", "1"),
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Good sets and weights, and all the bad ones, by name."""
    folder = make_place(tmp_path_factory.mktemp("errors") / "place")
    content = torch.load(folder / "caco.pth.tar", weights_only=True)
    backbone = encoder("tiny", "cifar").backbone.state_dict()
    torch.save(backbone, folder / "plain.pth")
    torch.save({**backbone, "conv1.weight": backbone["conv1.weight"] * float("nan")}, folder / "nan.pth")
    torch.save({**content, "epoch": Bomb(folder / "exploded")}, folder / "bomb.pth")
    torch.save({n: t for n, t in backbone.items() if "layer3" not in n}, folder / "part.pth")
    whole = (folder / "caco.pth.tar").read_bytes()
    (folder / "half.pth").write_bytes(whole[: len(whole) // 2])
    (folder / "text.pth").write_text("weights")
    (folder / "empty.pth").write_bytes(b"")
    (folder / "nothing").mkdir()
    (folder / "run/checkpoints/step_00000010").mkdir(parents=True)
    (folder / "run/checkpoints/step_00000010/values.json").write_text("{")
    make_sets(folder)
    return folder


def make_sets(folder):
    """Sets that no evaluation can use."""
    small = {"num_images": 32, "size": 20}
    make_shard_set(folder / "other_classes", classes=5, **small)
    make_shard_set(folder / "one_class", classes=1, **small)
    make_shard_set(folder / "all_corrupt", corrupt=range(32), **small)
    make_shard_set(folder / "no_labels", **small)
    rewrite_manifest(
        folder / "no_labels", lambda m: m.update(classes=m["classes"][:2], class_counts=[16, 16])
    )
    make_shard_set(folder / "cut", **small)
    tar = folder / "cut/000001.tar"
    tar.write_bytes(tar.read_bytes()[:-512])
    make_shard_set(folder / "no_shard", **small)
    (folder / "no_shard/000000.tar").unlink()
    make_shard_set(folder / "no_index", **small)
    (folder / "no_index/000000.idx2").unlink()
    make_shard_set(folder / "bad_manifest", **small)
    (folder / "bad_manifest/manifest.json").write_text("{")
    make_shard_set(folder / "none_in_it", **small)
    rewrite_manifest(
        folder / "none_in_it",
        lambda m: m.update(num_samples=0, num_bytes=0, shards=[], class_counts=[0] * len(m["classes"])),
    )
    image_folder(folder / "folder_of_five", classes=5)
    (folder / "empty_class/a").mkdir(parents=True)
    (folder / "empty_class/b").mkdir()
    (folder / "empty_class/a/0.jpg").write_bytes(b"")


def rewrite_manifest(path, change):
    manifest = json.loads((path / MANIFEST_NAME).read_text())
    change(manifest)
    (path / MANIFEST_NAME).write_text(json.dumps(manifest))


def refused(capsys, arguments):
    """The one line that the command ends with."""
    with pytest.raises(SystemExit) as caught:
        main([str(argument) for argument in arguments])
    error = capsys.readouterr().err
    assert caught.value.code == 2, error
    lines = [line for line in error.splitlines() if line]
    assert len(lines) == 1, error
    assert lines[0].startswith("error: ")
    return lines[0]


def line_of(capsys, tmp_path, place, command, weights="caco.pth.tar", data="train", val="val", more=()):
    options = [*COMMANDS[command], "--size", 16, "--workers", 0, "--to", tmp_path / "to"]
    data = ["--data", place / data] if data else []
    val = ["--val", place / val] if val else []
    return refused(capsys, [command.split("-")[0], place / weights, *data, *val, *options, *more])


WRONG_WEIGHTS = {
    "missing": ("does not exist: give a run directory", {}),
    "nothing": ("no complete checkpoint", {}),
    "run": ("is damaged: values.json", {}),
    "half.pth": ("is cut or damaged", {}),
    "text.pth": ("neither safetensors nor torch.save", {}),
    "empty.pth": ("is empty", {}),
    "nan.pth": ("not finite (conv1.weight)", {}),
    "bomb.pth": ("nothing of it was run", {}),
    "part.pth": ("missing: layer3.", {}),
}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("weights", WRONG_WEIGHTS)
def test_wrong_weights(capsys, tmp_path, place, command, weights):
    message, options = WRONG_WEIGHTS[weights]
    assert message in line_of(capsys, tmp_path, place, command, weights=weights, **options)
    assert not (place / "exploded").exists()
    assert not (tmp_path / "to").exists()


WRONG_SETS = {
    "missing": ("data", "does not exist"),
    "caco.pth.tar": ("data", "is a file, not a directory"),
    "nothing": ("data", "it is not a shard set"),
    "bad_manifest": ("data", "is not JSON"),
    "cut": ("data", "bytes, 8,"),
    "no_shard": ("data", "000000.tar: No such file"),
    "no_index": ("data", "000000.idx2: No such file"),
    "none_in_it": ("val", "holds no images"),
    "other_classes": ("val", "the same classes in both sets"),
    "folder_of_five": ("val", "the same classes in both sets"),
    "empty_class": ("data", "1 of 2 class folders have no images (b)"),
    "all_corrupt": ("val", None),
}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("wrong", WRONG_SETS)
def test_wrong_sets(capsys, tmp_path, place, command, wrong):
    which, message = WRONG_SETS[wrong]
    line = line_of(capsys, tmp_path, place, command, **{which: wrong})
    if wrong == "cut":
        assert "000001.tar has" in line
    elif message is None:
        assert "no validation images" in line if command == "knn" else "none of them decodes" in line
    else:
        assert message in line


@pytest.mark.parametrize("command", COMMANDS)
def test_one_class_and_no_labels(capsys, tmp_path, place, command):
    line = line_of(capsys, tmp_path, place, command, data="no_labels", val="no_labels")
    assert "a class label from 0 to" in line
    assert "have none or another" in line
    if command != "knn":
        line = line_of(capsys, tmp_path, place, command, data="one_class", val="one_class")
        assert "has 1 class" in line


WRONG_FLAGS = [
    (("--size", "0"), "--size is 0: give a number above 0"),
    (("--size", "x"), "--size is 'x', which is not int: give a whole number"),
    (("--size", "100000"), "--size is 100000: give at most 8192"),
    (("--mean", "0.5", "0.5"), "--mean has 2 numbers: give 3 numbers"),
    (("--std", "0.2", "0.2", "0"), "--std is 0.2 0.2 0.0: give a number above 0"),
    (("--mean", "nan", "0", "0"), "--mean is nan"),
    (("--precision", "fp8"), "--precision is 'fp8': give one of fp32, bf16, fp64"),
    (("--workers", "-1"), "--workers is -1: give a number from 0 up"),
    (("--images-at-once", "0"), "--images_at_once is 0"),
    (("--seed", "99999999999999999999"), "--seed is 99999999999999999999"),
    (("--world_size", "2"), "world_size asks for 2 processes but training sees 1"),
    (("--wich", "key"), "unknown flag --wich (did you mean --which?)"),
    (("--step", "3"), "--step chooses one of a run's checkpoints"),
    (("--arch", "resnet5"), "no architecture 'resnet5' (did you mean resnet50?)"),
    (("--arch", "resnet18"), "nearest is resnet18"),
    (("--stem", "vgg"), "--stem is 'vgg': give one of imagenet, cifar"),
    (("--which", "both"), "--which is 'both': give one of query, key"),
    (("--timeout_seconds", "0"), "--timeout_seconds is 0.0"),
    (("--data",), "--data has no value"),
    (("surplus",), "unknown argument surplus"),
]


@pytest.mark.parametrize("command", COMMANDS)
def test_wrong_flags(capsys, tmp_path, place, command):
    for more, message in WRONG_FLAGS:
        assert message in line_of(capsys, tmp_path, place, command, more=more)


WRONG_NUMBERS = [
    ("knn", ("--k", "0"), "--k is 0"),
    ("knn", ("--k", "5", "65"), "--k 65 needs as many training images, but there are 64"),
    ("knn", ("--k", "many"), "--k is 'many': give whole numbers"),
    ("knn", ("--temperature", "0"), "--temperature is 0.0"),
    ("knn", ("--temperature", "inf"), "--temperature is inf"),
    ("knn", ("--fraction", "1"), "unknown flag --fraction"),
    ("linear", ("--lr", "0.1", "0.2"), "--lr names 2 learning rates"),
    ("linear", ("--lr", "0"), "--lr is 0.0"),
    ("linear", ("--lr", "-1"), "--lr is -1.0"),
    ("linear", ("--epochs", "0"), "--epochs is 0"),
    (
        "linear",
        ("--batch_size", "65"),
        "--batch_size 65 is more than the 64 training images: give 64 or less",
    ),
    ("linear", ("--batch_size", "1.5"), "--batch_size is 1.5, which is not int"),
    ("linear-fast", ("--batch_size", "100"), "--batch_size 100 is more than the 64 training images"),
    ("linear-fast", ("--lr", "1e300"), "--lr is 1e+300: give at most 1000000.0"),
    ("finetune", ("--fraction", "0"), "--fraction is 0.0: give a number above 0"),
    ("finetune", ("--fraction", "1.5"), "--fraction is 1.5: give at most 1"),
    ("finetune", ("--fraction", "nan"), "--fraction is nan"),
    (
        "finetune",
        ("--fraction", "0.1"),
        "more than the 8 training images that --fraction 0.1 leaves of 64: give 8 or",
    ),
    ("finetune", ("--batch_size", "1"), "BatchNorm needs at least 2"),
    ("finetune", ("--lr", "1e6", "--epochs", "9"), "the loss is not finite: give a lower --lr"),
    ("finetune", ("--k", "3"), "unknown flag --k"),
]


@pytest.mark.parametrize(("command", "more", "message"), WRONG_NUMBERS)
def test_wrong_numbers(capsys, tmp_path, place, command, more, message):
    assert message in line_of(capsys, tmp_path, place, command, more=more)


@pytest.mark.parametrize("command", COMMANDS)
def test_images_that_nobody_names(capsys, tmp_path, place, command):
    assert "give --data TRAIN and --val VAL" in line_of(capsys, tmp_path, place, command, data=None, val=None)
    assert "give --val VAL" in line_of(capsys, tmp_path, place, command, val=None)
    assert "drop --which key" in line_of(
        capsys, tmp_path, place, command, weights="plain.pth", more=("--which", "key")
    )


@pytest.mark.parametrize("command", COMMANDS)
def test_places_that_cannot_hold_the_result(capsys, tmp_path, place, command):
    (tmp_path / "file").write_text("mine")
    line = line_of(capsys, tmp_path, place, command, more=("--to", tmp_path / "file/there"))
    assert "cannot write" in line
    (tmp_path / "other").mkdir()
    (tmp_path / "other/settings.json").write_text("{}")
    line = line_of(capsys, tmp_path, place, command, more=("--to", tmp_path / "other"))
    assert "holds another evaluation" in line
    (tmp_path / "other/settings.json").write_text("{")
    line = line_of(capsys, tmp_path, place, command, more=("--to", tmp_path / "other"))
    assert "settings.json cannot be read" in line


def test_two_evaluations_in_one_folder(capsys, tmp_path, place, monkeypatch):
    monkeypatch.setattr(lock, "LOCK_SECONDS", 0.5)
    (tmp_path / "to").mkdir()
    with open(tmp_path / "to/.lock", "a") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        assert "is in use by another evaluation" in line_of(capsys, tmp_path, place, "knn")


@pytest.mark.parametrize("arguments", [[], ["knn"], ["linaer", "x"], ["--fast"]])
def test_no_command_or_no_weights(capsys, arguments):
    assert "--help" in refused(capsys, arguments)


def test_through_the_real_command_nothing_but_the_line_is_said(place, tmp_path):
    arguments = ["linear", place / "bomb.pth", "--data", place / "train", "--val", place / "val"]
    words = [sys.executable, "-m", "caco_scale.evaluate", *map(str, arguments)]
    done = subprocess.run(words, env=environment(), cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "nothing of it was run" in done.stderr
    assert (done.stderr.count("\n"), done.stdout) == (1, "")
    assert os.listdir(tmp_path) == []


def test_a_batch_that_processes_cannot_share():
    with pytest.raises(UserError, match="--batch_size 15 cannot be divided by 2 processes: give 14 or 16"):
        check_batch(15, 64, 2)


def test_help_says_what_is_out_of_scope(capsys):
    for arguments in (["--help"], ["linear", "--help"], ["finetune", "--help"]):
        with pytest.raises(SystemExit) as caught:
            main(arguments)
        assert caught.value.code == 0
        assert "VOC07" in capsys.readouterr().out
