"""What a finished run ends with: files by their own commands, and commands to go on that repeat the user's own."""

import os
import shlex
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
from launch import finished
from PIL import Image

from caco_scale import load_backbone
from caco_scale.api import finish as module
from caco_scale.api.finish import BACKBONE, REPORT, finish, products, proposals
from caco_scale.config import load_recipe, parse
from caco_scale.run.command import started_as, with_flags
from caco_scale.run.signals import launcher_words
from caco_scale.sweep.study import read_study
from caco_scale.training.trainer import Outcome

OWN = ["own_images_small", "--data.shards", "my photos", "--optim.epochs=3"]


def outcome_of(folder, *words, step=10, total=10, **more):
    config = parse(["own_images_small", "--run.dir", str(folder), "--optim.epochs", "3", *words])
    return Outcome(step, None, folder, config, total, **more)


def make_photos(folder, classes=("a", "b", ""), count=8):
    """JPEGs of random colours, some in folders, some at the top."""
    rng = np.random.default_rng(0)
    for name in classes:
        (folder / name).mkdir(parents=True, exist_ok=True)
        for number in range(count):
            small = Image.fromarray(rng.integers(0, 255, (4, 4, 3), np.uint8))
            small.resize((24, 20)).save(folder / name / f"photo {number}.jpg")
    return folder


# ---- the user's own command

ACCELERATE = ["/venv/bin/python3", "/venv/bin/accelerate", "launch", "--config_file", "z.yaml"]
MODULE = ["/usr/bin/python", "-m", "accelerate.commands.launch", "--num_processes", "2"]


@pytest.mark.parametrize(
    ("launcher", "typed", "expected"),
    [
        ([], ["pretrain", *OWN], ["caco", "pretrain"]),
        (
            [*ACCELERATE, "-m", "caco_scale"],
            ["pretrain", *OWN],
            ["accelerate", "launch", "--config_file", "z.yaml", "-m", "caco_scale", "pretrain"],
        ),
        (
            [*MODULE, "-m", "caco_scale.pretrain"],
            OWN,
            ["accelerate", "launch", "--num_processes", "2", "-m", "caco_scale.pretrain"],
        ),
        (["/venv/bin/torchrun", "-m", "caco_scale.pretrain"], OWN, ["torchrun", "-m", "caco_scale.pretrain"]),
        (["/venv/bin/accelerate", "launch", "own_script.py", "7"], None, ["caco", "pretrain"]),
    ],
)
def test_the_users_own_command_is_repeated_with_its_launcher(launcher, typed, expected, monkeypatch):
    """``typed``: what the launcher hands on; None: something else."""
    monkeypatch.setattr(sys, "argv", ["program", *(typed or ["pretrain", *OWN])])
    monkeypatch.setattr("shutil.which", lambda name: f"/venv/bin/{name}")
    assert started_as("caco pretrain", OWN, [*launcher, *(typed or [])] if launcher else []) == [
        *expected,
        *OWN,
    ]


def test_without_the_program_on_the_path_python_starts_it(monkeypatch):
    monkeypatch.setattr("shutil.which", lambda name: None)
    assert started_as("caco pretrain", OWN, [])[:4] == ["python", "-m", "caco_scale", "pretrain"]
    assert started_as("python -m caco_scale.pretrain", OWN, [])[:3] == ["python", "-m", "caco_scale.pretrain"]
    assert launcher_words(os.getpid()) == []


def test_flags_replace_those_that_were_typed_and_the_line_is_quoted():
    words = ["caco", "pretrain", *OWN, "--bank.rule", "caco", "--data.in_memory"]
    line = with_flags(words, {"optim.epochs": 6, "bank.rule": "moco"})
    assert shlex.split(line) == [
        *["caco", "pretrain", "own_images_small", "--data.shards", "my photos", "--data.in_memory"],
        *["--optim.epochs", "6", "--bank.rule", "moco"],
    ]
    assert "'my photos'" in line
    assert (
        with_flags(["caco", "--run.max-steps", "3", "x"], {"run.max_steps": 4}) == "caco x --run.max_steps 4"
    )


# ---- what is written, and what is proposed


def test_the_backbone_has_timms_names_where_timm_has_the_model(tmp_path):
    formats = {"resnet18": ["--format", "timm"], "tiny": [], "own_nets:net": ["--arch", "own_nets:net"]}
    for arch, expected in formats.items():
        backbone, report = products(parse(["own_images_small", "--model.arch", arch]), tmp_path)
        assert backbone.words == ["export", str(tmp_path), "--to", str(tmp_path / BACKBONE), *expected]
        assert report.words == ["report", str(tmp_path), *(expected if ":" in arch else [])]
    for wanted, files in (("none", []), ("export", [BACKBONE]), ("report", [REPORT])):
        config = parse(["own_images_small", "--run.finish", wanted])
        assert [product.file.name for product in products(config, tmp_path)] == files


def test_proposals_repeat_the_command_and_say_what_is_there(tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.which", lambda name: name)
    words = ["caco", "pretrain", *OWN, "--run.resume", "never"]
    rows = dict(proposals(outcome_of(tmp_path, "--run.resume", "never", "--data.shards", "photos"), words))
    assert rows["train on"].endswith("--data.shards 'my photos' --optim.epochs 6 --run.resume auto")
    assert rows["export"] == f"caco export {tmp_path} --to {tmp_path / BACKBONE}"
    assert "compare with MoCo" not in rows
    for name in (BACKBONE, REPORT):
        (tmp_path / name).touch()
    rows = dict(proposals(outcome_of(tmp_path, "--data.val_shards", "val", total=99), words))
    assert rows["look"] == f"open {tmp_path / REPORT} in a browser"
    assert rows["train on"].endswith("--run.max_steps 20")
    assert rows["compare with MoCo"].endswith(f"--bank.rule moco --run.dir {tmp_path}_moco")
    assert rows["evaluate"] == f"caco evaluate knn {tmp_path}"
    assert not {"export", "report"} & set(rows)
    of_python = dict(proposals(outcome_of(tmp_path)))
    assert of_python["train on"] == f"caco pretrain {tmp_path / 'config.yaml'} --optim.epochs 6"


def test_a_command_that_fails_is_a_line_with_the_command_to_type(tmp_path, capsys):
    folder = tmp_path / "no run"
    finish(outcome_of(folder, "--run.finish", "export"))
    out = capsys.readouterr().out
    (line,) = [line for line in out.splitlines() if line.startswith("warning: ")]
    assert "the backbone and its model card not written (" in line
    assert str(folder) in line.partition("the run is complete")[0]
    assert line.endswith(f"export '{folder}' --to '{folder / BACKBONE}' --format timm")
    assert "next:" not in out.partition("warning")[0]


def test_nothing_ends_a_finished_run(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(module, "proposals", None)
    finish(outcome_of(tmp_path, "--run.finish", "none"))
    assert capsys.readouterr().err.startswith(f"warning: {tmp_path}: ")


def test_a_stop_signal_a_limit_and_the_jobs_end_leave_files_out(tmp_path, capsys, monkeypatch):
    finish(outcome_of(tmp_path), signals=SimpleNamespace(requested="SIGTERM"))
    assert capsys.readouterr().out.count("not written (stopped by SIGTERM)") == 2
    monkeypatch.setattr(module, "LIMIT_SECONDS", 0.01)
    finish(outcome_of(tmp_path, "--run.finish", "report"))
    assert "not written (it took more than 0 seconds)" in capsys.readouterr().out
    monkeypatch.setenv("SLURM_JOB_END_TIME", "1")
    finish(outcome_of(tmp_path, "--run.finish", "report"))
    assert "not written (the job ends too soon)" in capsys.readouterr().out


def test_a_run_that_was_stopped_or_is_another_ranks_ends_with_nothing(tmp_path, capsys, monkeypatch):
    whole = outcome_of(tmp_path)
    finish(Outcome(5, "SIGTERM", tmp_path, whole.config, 10))
    monkeypatch.setattr(module, "rank", lambda: 1)
    finish(whole)
    assert capsys.readouterr().out == ""


@pytest.mark.long
def test_one_command_on_a_folder_ends_with_a_backbone_its_card_and_a_report(tmp_path):
    photos = make_photos(tmp_path / "my photos")
    words = [sys.executable, "-m", "caco_scale.pretrain", "own_images_small", "--data.shards", photos.name]
    words += ["--views.size=16", "--model.stem=cifar", "--optim.epochs=4", "--run.max_steps=13"]
    done = finished(words, tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    run = tmp_path / "runs/own_images_small"
    assert all((run / name).exists() for name in ("DONE", BACKBONE, f"{BACKBONE}.md", REPORT))
    proposed = done.stdout.partition("next:")[2]
    assert f"own_images_small --data.shards {shlex.quote(photos.name)}" in proposed
    model = timm.create_model("resnet18", num_classes=0)
    model.conv1, model.maxpool = torch.nn.Conv2d(3, 64, 3, padding=1, bias=False), torch.nn.Identity()
    timm.models.load_checkpoint(model, str(run / BACKBONE))
    images = torch.rand(2, 3, 16, 16)
    with torch.no_grad():
        assert torch.allclose(model.eval()(images), load_backbone(run).eval()(images), atol=1e-5)
    (run / REPORT).unlink()
    again = finished(words, tmp_path)
    assert "has finished its 13 steps" in again.stdout
    assert (run / REPORT).exists()
    assert "writing the backbone" not in again.stdout
    assert "next:" not in finished(words, tmp_path).stdout


def test_recipes_finish_and_a_study_does_not_unless_it_says_so(tmp_path):
    assert {load_recipe(name).run.finish for name in ("demo", "own_images", "own_images_small")} == {"all"}
    (tmp_path / "s.yaml").write_text("recipe: demo\nruns: {a: {}, b: {run.finish: report}}\n")
    planned = read_study(tmp_path / "s.yaml").planned(tmp_path / "out")
    assert [one.config.run.finish for one in planned] == ["none", "report"]
