"""A user's mistakes through the real command: one line, exit code 2, before training, nothing lost."""

import subprocess
import sys

import pytest
import torch
from launch import SMALL, finished
from shard_sets import make_shard_set

from caco_scale.errors import exit_on_user_error, with_article


def pretrain(flags, cwd):
    """(exit code, stderr) of ``python -m caco_scale.pretrain demo`` with SMALL and these flags."""
    words = [word for name, value in {**SMALL, **flags}.items() for word in (f"--{name}", str(value))]
    done = finished([sys.executable, "-m", "caco_scale.pretrain", "demo", *words], cwd)
    return done.returncode, done.stderr


def assert_one_line(result, *parts):
    code, error = result
    assert code == 2, error
    lines = [line for line in error.splitlines() if line]
    assert len(lines) == 1, error
    assert lines[0].startswith("error: ")
    for part in parts:
        assert part in lines[0], error


@pytest.fixture
def flags(tmp_path):
    shards = make_shard_set(tmp_path / "set", num_images=48, samples_per_shard=20)
    return {"data.shards": shards, "run.dir": str(tmp_path / "run"), "run.max_steps": 4}


def test_a_typo_names_the_nearest_flag(tmp_path):
    assert_one_line(pretrain({"bank.sise": 4}, tmp_path), "--bank.sise", "bank.size")


def test_a_missing_shard_directory(flags, tmp_path):
    result = pretrain({**flags, "data.shards": str(tmp_path / "nowhere")}, tmp_path)
    assert_one_line(result, "nowhere", "does not exist", "data_prep build")


def test_a_truncated_shard(flags, tmp_path):
    shard = tmp_path / "set/000001.tar"
    shard.write_bytes(shard.read_bytes()[:-512])
    assert_one_line(pretrain(flags, tmp_path), "000001.tar", "bytes")


def test_micro_batches_that_do_not_divide_the_share(flags, tmp_path):
    result = pretrain({**flags, "data.micro_batch_size": 3}, tmp_path)
    assert_one_line(result, "data.micro_batch_size 3 does not divide the 8 images")


def test_one_image_at_a_time_has_no_batch_statistics(flags, tmp_path):
    assert_one_line(
        pretrain({**flags, "data.micro_batch_size": 1}, tmp_path), "BatchNorm", "at least 2 images"
    )


def test_an_evaluation_that_would_fail_epochs_later(flags, tmp_path):
    flags = {**flags, "eval.knn_every": 5, "data.val_shards": flags["data.shards"]}
    assert_one_line(pretrain({**flags, "eval.knn_k": 49}, tmp_path), "eval.knn_k 49", "48 training images")
    other = make_shard_set(tmp_path / "other", num_images=48, classes=5)
    assert_one_line(
        pretrain({**flags, "data.val_shards": other}, tmp_path),
        "1 of the 5 classes",
        "not among the 4",
        "class4",
    )


def test_a_temperature_that_only_the_main_schedule_would_meet(flags, tmp_path):
    result = pretrain({**flags, "precision.compute": "fp32", "loss.temperature": 0.01}, tmp_path)
    assert_one_line(result, "loss.temperature is 0.01", "at least 0.02")


def test_fewer_images_than_a_batch(flags, tmp_path):
    assert_one_line(pretrain({**flags, "data.global_batch_size": 64}, tmp_path), "48 images", "64")


def test_a_checkpoint_of_another_data_set_or_other_mathematics(flags, tmp_path):
    code, error = pretrain(flags, tmp_path)
    assert code == 0, error
    other = make_shard_set(tmp_path / "other", num_images=48, samples_per_shard=20, seed=1)
    more = {**flags, "run.max_steps": 6}
    assert_one_line(pretrain({**more, "data.shards": other}, tmp_path), "another data set", "48 images")
    assert_one_line(pretrain({**more, "bank.size": 24}, tmp_path), "bank.size: 20 -> 24")
    assert_one_line(
        pretrain({**more, "run.resume": "never"}, tmp_path), "run.resume is never", "step_00000004"
    )
    assert_one_line(pretrain({**more, "run.resume": str(tmp_path / "no")}, tmp_path), "no checkpoint at")
    code, error = pretrain(more, tmp_path)  # nothing was lost
    assert code == 0, error
    back = {**more, "run.max_steps": 8, "run.resume": str(tmp_path / "run/checkpoints/step_00000004")}
    assert_one_line(pretrain(back, tmp_path), "goes back to step 4", "step_00000006")


def test_images_that_do_not_decode_are_replaced_up_to_a_limit(flags, tmp_path):
    shards = make_shard_set(tmp_path / "bad", num_images=48, samples_per_shard=20, corrupt=range(0, 48, 4))
    flags = {**flags, "data.shards": shards, "run.max_steps": 5}
    code, error = pretrain(flags, tmp_path)
    assert code == 2
    last = error.strip().splitlines()[-1]
    assert last.startswith("error: ")
    assert "do not decode, more than data.max_corrupt 0.001" in last
    assert f"python -m data_prep repair SRC {shards}" in last
    assert (tmp_path / "run/corrupt.jsonl").exists()
    code, error = pretrain({**flags, "data.max_corrupt": 0.5, "run.dir": str(tmp_path / "run2")}, tmp_path)
    assert code == 0, error


PROGRAM = """
import atexit, os, sys
from caco_scale.errors import UserError, exit_on_user_error, run_command
atexit.register(os.abort)  # what a thread of gloo does to the interpreter's end
@exit_on_user_error
def main():
    print("all is saved")
    if sys.argv[1] == "error":
        atexit.unregister(os.abort)
        raise UserError("no such thing")
    sys.exit(0) if sys.argv[1] == "exit" else None
run_command(main)
"""


@pytest.mark.parametrize(("how", "code"), [("return", 0), ("exit", 0), ("error", 2)])
def test_a_good_end_does_not_hang_on_the_interpreters_own(how, code):
    run = subprocess.run([sys.executable, "-c", PROGRAM, how], capture_output=True, text=True)
    assert (run.returncode, run.stdout) == (code, "all is saved\n")
    assert run.stderr == ("error: no such thing\n" if code else "")


@pytest.mark.parametrize(
    "ask", [lambda: torch.empty(2**50), lambda: torch.empty(2**40, 2**40), lambda: [0] * 2**60]
)
def test_memory_that_nobody_has_is_one_line(ask, capsys):
    with pytest.raises(SystemExit) as end:
        exit_on_user_error(ask)()
    assert end.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: out of memory (")
    assert error.endswith("caco doctor says what a run needs\n")
    with pytest.raises(RuntimeError, match="another"):
        exit_on_user_error(lambda: (_ for _ in ()).throw(RuntimeError("another")))()


@pytest.mark.parametrize(
    "name", ["an int", "an OrderedDict", "an efficientnet_b0", "a str", "a timm/resnet10t", "a unet"]
)
def test_a_name_has_its_article(name):
    assert with_article(name.split()[1]) == name
