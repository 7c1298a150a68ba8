"""Launches: what training sees is what was asked for, or one line says how to launch it."""

import json
import platform
import subprocess
import sys

import pytest
import torch
import yaml
from launch import ROOT, SMALL, by, finished, launch
from shard_sets import make_shard_set

from caco_scale.distributed.deepspeed_config import deepspeed_config, find_deepspeed_json
from caco_scale.distributed.launch import (
    check_world_size,
    launched_strategy,
    refuse_lost_driver,
)
from caco_scale.distributed.strategies.build import check_combination
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


FSDP = {"ACCELERATE_USE_FSDP": "true"}
DEEPSPEED = {"ACCELERATE_USE_DEEPSPEED": "true"}


def test_the_launchers_config_file_chooses_the_strategy():
    assert launched_strategy({}) == "ddp"
    assert launched_strategy({"ACCELERATE_USE_DEEPSPEED": "false", "ACCELERATE_USE_FSDP": "false"}) == "ddp"
    assert launched_strategy({**FSDP, "FSDP_VERSION": "2"}) == "fsdp2"
    assert launched_strategy({**DEEPSPEED, "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}) == "zero3"
    for name in ("zero1", "zero2", "zero3"):
        environment = {**DEEPSPEED, "ACCELERATE_DEEPSPEED_CONFIG_FILE": f"ds_configs/{name}.json"}
        assert launched_strategy(environment) == name


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        (FSDP, "FSDP version 1.*ds_configs/fsdp2.yaml"),
        ({**FSDP, "FSDP_VERSION": "2", "FSDP_OFFLOAD_PARAMS": "true"}, "zero3_offload"),
        ({"ACCELERATE_USE_MEGATRON_LM": "true"}, "Megatron-LM.*ds_configs"),
        ({"PARALLELISM_CONFIG_TP_SIZE": "2"}, "PARALLELISM_CONFIG_TP_SIZE=2"),
        (
            {**DEEPSPEED, "ACCELERATE_DEEPSPEED_CONFIG_FILE": "no/such.json"},
            "no/such.json, which is not there",
        ),
    ],
)
def test_an_engine_that_would_not_train_is_an_error(environment, words):
    with pytest.raises(UserError, match=words):
        launched_strategy(environment)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"zero_optimization": {"stage": 0}}, "stage 0 .*ddp.yaml"),
        ({"gradient_clipping": 1.0}, "gradient_clipping 1.0 .*set it to 0"),
        ({"gradient_accumulation_steps": 4}, "gradient_accumulation_steps 4 .*micro_batch_size"),
        ({"bf16": {"enabled": True}}, "bf16.enabled .*--precision.compute bf16"),
        ({"fp16": {"enabled": True}}, "fp16.enabled"),
        ({"optimizer": {"type": "AdamW"}}, "optimizer is not known to train the same model"),
        ({"communication_data_type": "fp16"}, "communication_data_type is not known"),
        (
            {"zero_optimization": {"stage": 3, "zero_quantized_weights": True}},
            "zero_quantized_weights is not known",
        ),
        (
            {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "nvme"}}},
            "device nvme .*use cpu",
        ),
        ({"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu", "ratio": 0.5}}}, "ratio"),
        ({"zero_optimization": {}}, "zero_optimization.stage"),
    ],
)
def test_deepspeed_settings_that_train_another_model_are_refused_by_name(config, words, tmp_path):
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 2}, **config}))
    with pytest.raises(UserError, match=words):
        deepspeed_config({"ACCELERATE_DEEPSPEED_CONFIG_FILE": str(path)})


def test_our_deepspeed_files_are_found_from_anywhere_and_exact(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for name, stage in (("zero1", 1), ("zero2", 2), ("zero3", 3), ("zero3_offload", 3)):
        text = (ROOT / f"ds_configs/{name}.yaml").read_text()
        path = yaml.safe_load(text)["deepspeed_config"]["deepspeed_config_file"]
        assert find_deepspeed_json(path) == ROOT / path
        config = deepspeed_config({"ACCELERATE_DEEPSPEED_CONFIG_FILE": path})
        assert config["zero_optimization"]["stage"] == stage
        assert (config["gradient_clipping"], config["gradient_accumulation_steps"]) == (0.0, 1)
        assert not config["zero_force_ds_cpu_optimizer"]


def test_what_a_strategy_cannot_do_is_refused_with_what_can():
    for name in ("zero1", "zero2", "zero3"):
        with pytest.raises(UserError, match=r"fp64 .* ds_configs/fsdp2.yaml"):
            check_combination(name, torch.float64, False)
    with pytest.raises(UserError, match=r"precision.compile .* ds_configs/fsdp2.yaml"):
        check_combination("zero3", torch.float32, True)
    check_combination("fsdp2", torch.float64, True)
    check_combination("ddp", torch.float64, True)


def test_a_lost_driver_is_an_error(tmp_path):
    refuse_lost_driver({}, tmp_path)
    for environment in (
        {"CUDA_VISIBLE_DEVICES": "0,1"},
        {"SLURM_JOB_GPUS": "0"},
        {"SLURM_GPUS_ON_NODE": "4"},
    ):
        with pytest.raises(UserError, match="sees none: repair the driver"):
            refuse_lost_driver(environment, tmp_path)
    (tmp_path / "nvidia0").touch()
    with pytest.raises(UserError, match="nvidia0"):
        refuse_lost_driver({}, tmp_path)
    for meant in (
        {"CUDA_VISIBLE_DEVICES": ""},
        {"CUDA_VISIBLE_DEVICES": "-1"},
        {"ACCELERATE_USE_CPU": "true"},
    ):
        refuse_lost_driver(meant, tmp_path)


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


def test_deepspeed_that_accelerate_would_leave_out_says_so(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    launcher = ["--config_file", str(ROOT / "ds_configs/zero2.yaml"), "--num_processes", "2"]
    assert "ACCELERATE_USE_CPU" in failure(launch(SMALL, launcher=launcher, code=1))


def test_fp64_under_deepspeed_says_what_can(tmp_path):
    shards = make_shard_set(tmp_path / "set", num_images=32)
    launcher = ["--config_file", str(ROOT / "ds_configs/zero1.yaml"), "--num_processes", "1"]
    flags = {**SMALL, "data.shards": shards, "run.dir": tmp_path / "run"}
    assert "fp64 cannot be had from DeepSpeed" in failure(launch(flags, launcher=launcher, code=1))
    assert not (tmp_path / "run").exists()


PAGES_OF_FREED_MEMORY = """
import resource, sys, torch
from caco_scale.distributed.launch import keep_freed_memory
if sys.argv[1] == "kept":
    keep_freed_memory()
def pages():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
torch.ones(12 << 20)
before = pages()
for _ in range(10):
    torch.ones(12 << 20)  # 48 MiB, 12,288 pages
print(pages() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's allocator")
def test_a_step_takes_the_memory_that_the_one_before_it_freed():
    pages = {}
    for how in ("kept", "as it comes"):
        run = subprocess.run(
            [sys.executable, "-c", PAGES_OF_FREED_MEMORY, how], capture_output=True, text=True
        )
        pages[how] = int(run.stdout)
    assert pages["kept"] <= 2 * 12_288
    assert pages["as it comes"] >= 9 * 12_288


NODES_THAT_DIFFER = """
import os, sys
from caco_scale.errors import run_command
from caco_scale.pretrain import main
rank = os.environ["RANK"]
os.chdir(os.path.join(sys.argv[1], "node" + rank))
run_command(lambda: main(["demo", *sys.argv[2:], *(["--bank.size", "2" + rank] if sys.argv[1] == "." else [])]))
"""


@pytest.mark.parametrize(
    ("folder", "differs"),
    [
        ("sets", "data set (its fingerprint)"),
        (".", "bank.size must be the same on every rank, but is 20 on rank 0"),
    ],
)
def test_nodes_with_other_settings_or_images_end_in_one_line(folder, differs, tmp_path):
    """The same command on two nodes, each in a folder of its own; of what is compared, one of each kind."""
    for rank in range(2):
        make_shard_set(tmp_path / f"sets/node{rank}/set", num_images=96, seed=rank)
        (tmp_path / f"node{rank}").symlink_to(tmp_path / "sets/node0")
    script = tmp_path / "nodes.py"
    script.write_text(NODES_THAT_DIFFER)
    flags = {**SMALL, "data.shards": "set", "data.val_shards": "", "run.dir": tmp_path / "run"}
    words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    launcher = ["-m", "accelerate.commands.launch", *by("ddp", 2)["launcher"]]
    done = finished([sys.executable, *launcher, script, folder, *words], cwd=tmp_path)
    error = failure(done.stderr)
    assert f"error: start: the {differs}" in error
    assert "on rank 1" in error
    assert "exitcode  : 2" in done.stderr
    assert not (tmp_path / "run").exists()
