"""The trainer on a CUDA device computes what it computes on a CPU. ``pytest -m gpu`` runs these and their kin."""

import json

import pytest
import torch
from launch import SMALL, by, final_state, kill_when, launch, progress, relative_difference, start
from shard_sets import make_shard_set
from test_bank import golden
from test_strategy import ACCUMULATE, LARS, NOT_FINITE, SGD, check, starting, train

from caco_scale.run.files import read_json_lines

# Small rates and a smooth loss, which do not magnify rounding: in bf16 the losses stay within 2% of fp64's.
CALM = {
    "data.global_batch_size": 32,
    "data.window": 32,
    "bank.size": 128,
    "bank.lr": 0.03,
    "bank.temperature": 0.2,
    "loss.temperature": 0.2,
    "model.projector_hidden": 64,
    "model.embedding_dim": 32,
    "optim.lr": 0.001,
    "optim.epochs": 3,
    "run.max_steps": 9,
}

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture(scope="module")
def flags(tmp_path_factory):
    shards = make_shard_set(tmp_path_factory.mktemp("data") / "set", num_images=96, samples_per_shard=20)
    return {**SMALL, "data.shards": shards}


def trained(folder, flags, config="ddp"):
    """The final state of a run, and its losses."""
    launch({**flags, "run.dir": folder}, **by(config, 1))
    environment = json.loads((folder / "environment.json").read_text())
    assert environment["strategy"] == config.removesuffix("_offload")
    return final_state(folder)[0], [line["loss"] for line in read_json_lines(folder / "metrics.jsonl")]


def test_golden_figures_on_a_gpu():
    golden(0, 1, "cuda")


@pytest.mark.parametrize("config", ["ddp", "fsdp2"])
def test_the_gpu_trains_the_model_that_the_cpu_trains(config, flags, tmp_path, monkeypatch):
    """In fp64, over the switch from bank warm-up to CaCo: every tensor of the checkpoint, bank and optimizer too."""
    found, losses = trained(tmp_path / "gpu", flags, config)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    expected, expected_losses = trained(tmp_path / "cpu", flags)
    difference, name = relative_difference(found, expected)
    print(f"{config}: {name} differs by {difference:.1e}")
    assert difference <= 1e-8, f"{name} differs by {difference:.1e}"
    assert losses == pytest.approx(expected_losses, rel=1e-8)


@pytest.fixture(scope="module")
def one_gpu(tmp_path_factory):
    """The tiny model of ``strategy_cases.py`` as one plain process trains it."""
    folder = tmp_path_factory.mktemp("one_gpu")
    train(folder, [{**LARS, "save_at": [0, 2]}, SGD, NOT_FINITE])
    train(folder, [starting(ACCUMULATE, folder)])
    return folder


@pytest.mark.parametrize("config", ["zero1", "zero2", "zero3", "zero3_offload", "fsdp2"])
def test_strategies_on_a_gpu(config, one_gpu, tmp_path):
    """In fp32; DeepSpeed's over NCCL, a group of one."""
    check(config, 1, [LARS, ACCUMULATE, SGD, NOT_FINITE], one_gpu, tmp_path)


def test_killed_and_resumed_on_a_gpu(flags, tmp_path):
    """``kill -9`` after the switch: the state of an uninterrupted run, up to the order of a GPU's sums."""
    expected, _ = trained(tmp_path / "whole", flags)
    flags = {**flags, "run.save_every": 2, "run.dir": tmp_path / "killed"}
    kill_when(start(flags), lambda: progress(tmp_path / "killed")[1] >= 8)
    found, _ = trained(tmp_path / "killed", flags)
    assert progress(tmp_path / "killed")[0] == 2
    difference, name = relative_difference(found, expected)
    assert difference <= 1e-8, f"{name} differs by {difference:.1e}"


def test_bf16_and_compiled_losses_are_the_exact_ones_up_to_rounding(flags, tmp_path):
    """What a GPU trains with unless told otherwise, against fp64, over the switch from bank warm-up to CaCo."""
    flags = {**flags, **CALM}
    _, exact = trained(tmp_path / "fp64", flags)
    for compiled in (False, True):
        rounded = {**flags, "precision.compute": "auto", "precision.compile": compiled}
        _, losses = trained(tmp_path / f"bf16-{compiled}", rounded)
        print(f"compiled {compiled}: {losses}, in fp64 {exact}")
        assert losses != exact
        assert losses == pytest.approx(exact, rel=0.04)
