"""Launches: what training sees is what was asked for, or one line says how to launch it."""

import pytest
from launch import SMALL, launch
from shard_sets import make_shard_set

from caco_scale.distributed.strategy import check_world_size, refuse_other_engines
from caco_scale.errors import UserError


@pytest.mark.parametrize(
    "environment",
    [
        {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"},  # accelerate launch --cpu --num_processes 2
        {"WORLD_SIZE": "2"},
        {"OMPI_COMM_WORLD_SIZE": "4"},
        {"PMI_SIZE": "4"},
        {"SLURM_STEP_NUM_TASKS": "8"},
    ],
)
def test_several_processes_that_train_as_one_are_an_error(environment):
    with pytest.raises(UserError, match=r"speaks of several processes .* but training sees 1"):
        check_world_size(1, 0, environment)
    check_world_size(1, 1, environment)  # unless one is what the user says


def test_one_process_and_several_that_train_together_pass():
    check_world_size(1, 0, {})
    check_world_size(1, 0, {"WORLD_SIZE": "1", "MASTER_ADDR": "node0", "SLURM_STEP_NUM_TASKS": "1"})
    check_world_size(4, 0, {"WORLD_SIZE": "4", "MASTER_ADDR": "node0"})
    check_world_size(4, 4, {"WORLD_SIZE": "4"})
    with pytest.raises(UserError, match="asks for 8 processes but training sees 4"):
        check_world_size(4, 8, {"WORLD_SIZE": "4"})


@pytest.mark.parametrize("variable", ["ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_FSDP"])
def test_an_engine_that_would_not_train_is_an_error(variable):
    with pytest.raises(UserError, match="the launcher asks for"):
        refuse_other_engines({variable: "true"})
    refuse_other_engines({variable: "false"})


def failure(output):
    """The error's line, and whether a traceback of ours stands in the output."""
    lines = [line for line in output.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, output
    assert "caco_scale/" not in output.replace(lines[0], ""), output
    return lines[0]


def test_the_launch_that_accelerate_turns_into_one_process_says_so():
    output = launch(SMALL, launcher=["--cpu", "--num_processes", "2"], code=1)
    assert "speaks of several processes (MASTER_ADDR=127.0.0.1) but training sees 1" in failure(output)


def test_processes_that_do_not_divide_the_batch_say_so_once(tmp_path):
    shards = make_shard_set(tmp_path / "set", num_images=32)
    output = launch({**SMALL, "data.shards": shards, "run.dir": tmp_path / "run"}, num_processes=3, code=1)
    assert "data.global_batch_size 8" in failure(output)
