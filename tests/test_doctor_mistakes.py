"""The doctor on wrong set-ups, typed as a user types them: never "ready"; and what it says to type puts it right."""

import os
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from launch import SMALL, by, finished, launch
from PIL import Image
from shard_sets import make_shard_set

from caco_scale.config import load_recipe, replace
from caco_scale.doctor import checks as doctor
from caco_scale.run.directory import check_place
from caco_scale.training.checks import Start

# 96 images in global batches of 8 for a tiny encoder: nothing is wrong with it.
FITS = {
    "data.global_batch_size": 8,
    "data.window": 16,
    "data.workers": 0,
    "data.val_shards": "",
    "eval.knn_every": 0,
    "eval.baselines": False,
    "model.arch": "tiny",
    "bank.size": 32,
    "bank.warmup_epochs": 1,
    "optim.epochs": 15,
    "optim.warmup_epochs": 1,
    "ema.momentum": 0.9,
}
PHOTOGRAPHS = {"model.arch": "resnet50", "views.size": 224, "data.global_batch_size": 64}  # 19 GB at once


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """The folder in which the set-ups are typed."""
    folder = tmp_path_factory.mktemp("sets")
    make_shard_set(folder / "train", num_images=96)
    make_shard_set(folder / "few", num_images=6)
    for number in range(4):
        (folder / f"grey pictures/class{number}").mkdir(parents=True)
        picture = Image.fromarray(np.full((32, 32), number, np.uint8))
        picture.save(folder / f"grey pictures/class{number}/a.png")
    words = ["build", folder / "grey pictures", folder / "grey", "--channels", "1"]
    build = finished([sys.executable, "-m", "data_prep", *words])
    assert build.returncode == 0, build.stderr
    make_shard_set(folder / "damaged", num_images=96)
    shard = folder / "damaged/000002.tar"
    shard.write_bytes(shard.read_bytes()[:2000])
    return folder


def typed(sets, changes, recipe="demo", more=(), launcher=()):
    """What the doctor says of a set-up -> (exit code, its lines but ok, what it says on stderr)."""
    flags = {**FITS, "data.shards": "train", "run.dir": "run", **changes}
    words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    launch = ["-m", "accelerate.commands.launch", *launcher] if launcher else []
    done = finished([sys.executable, *launch, "-m", "caco_scale.doctor", recipe, *words, *more], cwd=sets)
    found = [line for line in done.stdout.splitlines() if not line.startswith(("ok ", "note "))]
    return done.returncode, found, done.stderr


# name: (changes, what it says, whether all is well after what it says to type)
MISTAKES = {
    "more bank rows than images": ({"bank.size": 128}, "bank.size 128 is more than the 96 images", False),
    "a bank for ever": (
        {"bank.warmup_epochs": 20},
        r"the bank warm-up takes 240 steps and the training after it 180: give --bank.warmup_epochs 3$",
        True,
    ),
    "fewer images than a batch": (
        {"data.global_batch_size": 512},
        "has 96 images, fewer than one global batch of 512: give --data.global_batch_size 64",
        False,
    ),
    "few images": (
        {"data.shards": "few", "data.global_batch_size": 32},
        "has 6 images, fewer than one global batch of 32: give --data.global_batch_size 4",
        False,
    ),
    "few steps an epoch": (
        {"data.global_batch_size": 48, "data.lanes": 16},
        "48 is more than a tenth of the 96 images: an epoch has 2 .* give --data.global_batch_size 8",
        False,
    ),
    "a learning rate that only rises": (
        {"optim.warmup_epochs": 10},
        r"10 is more than half of optim.epochs 15: give --optim.warmup_epochs 0.75",
        False,
    ),
    "a short training": ({"optim.epochs": 2}, r"the training has 24 steps .* give --optim.epochs \d", True),
    "a micro-batch that divides nothing": (
        {"data.micro_batch_size": 3},
        "3 does not divide the 8 images that each of 1",
        False,
    ),
    "no such set": ({"data.shards": "tarin"}, "data.shards tarin does not exist", False),
    "a damaged shard": ({"data.shards": "damaged"}, "damaged/000002.tar has 2,000 bytes, .* expected", False),
    "other channels": ({"data.channels": 4}, "have 3 channels .* give --data.channels 3 --data.bits 8", True),
    "no such validation set": (
        {"data.val_shards": "vall", "eval.knn_every": 1},
        "data.val_shards vall does not exist",
        False,
    ),
    "a validation set of other channels": (
        {"data.val_shards": "grey", "eval.knn_every": 1},
        "grey have 1 channel of 8 bits, not 3 channels of 8 bits",
        False,
    ),
    "too few neighbours": (
        {"data.val_shards": "train", "eval.knn_every": 1, "eval.knn_k": 200},
        "eval.knn_k 200 is more than the 96 training images",
        False,
    ),
    "processes that are not there": ({"run.world_size": 8}, "8 processes but training sees 1", False),
    "a run directory within a file": ({"run.dir": "train/manifest.json/run"}, "cannot be written", False),
    "no tracker of that name": ({"run.trackers": "wandbb"}, r"did you mean wandb\?", False),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_told_and_what_is_to_be_typed_helps(sets, name):
    changes, message, alone = MISTAKES[name]
    code, (*lines, verdict), errors = typed(sets, changes)
    assert (code, errors) == (1, "")
    assert "ready" not in verdict
    (line,) = [line for line in lines if re.search(message, line)]
    fixes = re.findall(r"give (--\S+ \S+?(?: --\S+ \S+?)*)(?=[,;]|$| or )", line)
    if fixes:
        code, (*lines, verdict), errors = typed(sets, changes, more=fixes[0].split())
        assert [again for again in lines if re.search(message.split(" .*")[0].split(":")[0], again)] == []
    if alone:
        assert (code, lines, verdict) == (0, [], "demo: ready")


def test_nothing_is_said_of_what_is_well(sets):
    assert typed(sets, {}) == (0, ["demo: ready"], "")


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (["--processes", "3"], "8 cannot be divided by 3 processes: give 6 or 9"),
        (["--processes", "16"], "8 cannot be divided by 16 processes: give 16, or another number"),
        (["--processes", "2", "--strategy", "zero9"], "--strategy zero9: give one of ddp, zero1"),
        (["--processes", "2", "--gpu-gb", "0.2"], r"but a GPU there has 0\.2 GB: no smaller"),
    ],
)
def test_a_launch_to_come_that_cannot_be(sets, plan, message):
    code, (line, verdict), errors = typed(sets, {}, more=plan)
    assert (code, verdict, errors) == (1, "demo: 1 finding(s) to fix", "")
    assert re.search(message, line)


def test_memory_of_a_launch_to_come_is_held_against_its_gpus(sets):
    """The GPU is a stand-in: a number."""
    code, lines, _ = typed(sets, PHOTOGRAPHS, more=["--processes", "2", "--gpu-gb", "6"])
    (line,) = [line for line in lines if line.startswith("FAIL")]
    micro = re.search(r"but a GPU there has 6\.0 GB: give --data.micro_batch_size (\d+), which fits", line)[1]
    more = ["--processes", "2", "--gpu-gb", "6", "--data.micro_batch_size", micro]
    _, lines, _ = typed(sets, PHOTOGRAPHS, more=more)
    assert [line for line in lines if line.startswith("FAIL")] == []
    assert code == 1


def start_of(sets, changes, processes=1):
    flags = {**FITS, "data.shards": str(sets / "train"), "run.dir": str(sets / "run"), **changes}
    config = replace(load_recipe("demo"), **{name.replace(".", "__"): v for name, v in flags.items()})
    config = replace(config, precision__compute="fp32", precision__compile="false")
    return Start(config, "ddp", 0, processes, torch.device("cpu"))


def statuses(findings):
    return {status: [f.text for f in findings if f.status == status] for status in ("warn", "FAIL")}


def test_memory_without_a_gpu_is_held_against_this_machines(sets, monkeypatch):
    """Of a launch to come that is a warning: others may train."""
    monkeypatch.setattr("caco_scale.data.in_memory.free_memory", lambda: 2 * 10**8)
    for plan, status in ((None, "FAIL"), (doctor.Planned("ddp", 2), "warn")):
        found = statuses(doctor.examine_start(start_of(sets, {}, 2 if plan else 1), False, plan))
        (text,) = [text for text in found[status] if text.startswith("memory of a rank")]
        assert ("give --gpu-gb and the memory of one of their GPUs in GB" in text) == bool(plan)
        assert ("each of 2 processes here has 0.1 GB free" in text) == bool(plan)


def test_an_encoder_that_no_machine_holds_is_counted_all_the_same(sets):
    """By its weights alone: 28 GB, of which none are allocated."""
    code, lines, errors = typed(sets, {**PHOTOGRAPHS, "model.projector_hidden": 2048 * 40})
    assert (code, errors) == (1, "")
    assert any(re.search(r"^FAIL memory of a rank .* 55\.\d+, .* no smaller", line) for line in lines)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 1 MB."""
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", tmp_path]).returncode:
        pytest.skip("no file system can be mounted: needs root")
    yield tmp_path
    subprocess.run(["umount", tmp_path], check=True)


def test_a_full_disk(sets, small_disk):
    run = {"run.dir": small_disk / "run"}
    code, (line, verdict), _ = typed(sets, run)
    assert (code, verdict) == (1, "demo: 1 finding(s) to fix")
    assert re.search(r"FAIL run.dir .* has 1\.0 MB free, and its checkpoints take up to [\d.]+ MB more", line)
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    _, (refused, *_), _ = typed(sets, run)
    assert f"cannot be written ({small_disk})" in refused
    assert check_place(sets / "run").startswith("run.dir ")
    assert not (sets / "run").exists()


def test_room_for_one_checkpoint_beside_the_next(sets, monkeypatch, tmp_path):
    from caco_scale.doctor.memory import checkpoint_bytes

    start = start_of(sets, {"run.dir": str(tmp_path / "run")})
    one, disk = checkpoint_bytes(start.config), doctor.shutil.disk_usage(tmp_path)
    for checkpoints, fix in ((4, ""), (2, "give --run.keep_checkpoints 1"), (1, "free some")):
        monkeypatch.setattr(
            doctor.shutil, "disk_usage", lambda _, n=checkpoints: disk._replace(free=n * one + 1)
        )
        (found,) = doctor.check_disk(start)
        assert found.status == ("FAIL" if fix else "ok")
        assert fix in found.text
    start.config = replace(start.config, run__keep_checkpoints=1)
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda _: disk._replace(free=2 * one))
    assert doctor.check_disk(start)[0].status == "ok"


def test_what_a_run_directory_has_already(sets, tmp_path):
    """An ended run, other values; and what a checkpoint takes is what was counted."""
    run = {
        **FITS,
        **SMALL,
        "run.dir": str(tmp_path / "run"),
        "data.shards": str(sets / "train"),
        "precision.compute": "fp32",
    }
    run |= {"run.max_steps": 4}
    launch(run)
    code, lines, _ = typed(sets, run)
    (line,) = [line for line in lines if "nothing is left to train" in line]
    assert line.startswith("warn ")
    assert "is at step 4 of 4: nothing is left to train; give --run.max_steps 0" in line
    assert code == 1
    _, lines, _ = typed(sets, run, more=["--run.max_steps", "0"])
    assert not [line for line in lines if "nothing is left" in line]
    _, lines, _ = typed(sets, run, more=["--optim.lr", "0.5"])
    assert [line for line in lines if re.search(r"FAIL .*was trained with other values \(optim.lr: ", line)]
    total = sum(path.stat().st_size for path in (tmp_path / "run").glob("checkpoints/**/*") if path.is_file())
    (found,) = doctor.check_disk(start_of(sets, run))
    counted = float(re.search(r"a checkpoint takes ([\d.]+) MB", found.text)[1]) * 1e6
    assert counted == pytest.approx(total, rel=0.2)
    (tmp_path / "run/compile_cache").mkdir()
    (tmp_path / "run/compile_cache/code").write_bytes(bytes(2_000_000))
    (found,) = doctor.compiled_code(start_of(sets, run).config)
    assert "compile_cache: 2.0 MB of compiled code" in found.text


def test_more_processes_than_gpus(sets, monkeypatch):
    """A stand-in: torch believes in one GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for name, value in {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "29500")
    findings, start = doctor.join_launch(start_of(sets, {}).config)
    assert start is None
    assert re.search(r"LOCAL_RANK is 1, but this machine has 1 GPU\(s\)", statuses(findings)["FAIL"][0])
    monkeypatch.setattr(
        "caco_scale.training.assemble.resolve_precision", lambda config, *_: (config, "precision")
    )
    findings, _ = doctor.plan_launch(start_of(sets, {}).config, doctor.Planned("ddp", 4))
    assert [f.text for f in findings if f.status == "note"] == [
        "this machine has 1 GPU(s): 4 processes take 4 such machines"
    ]


def test_a_launch_of_several_that_does_not_share_the_batch(sets):
    code, (line, verdict), _ = typed(sets, {}, launcher=by("ddp", 3)["launcher"])
    assert code == 1
    assert "8 cannot be divided by 3 processes: give 6 or 9" in line
    assert verdict == "demo: 1 finding(s) to fix"
