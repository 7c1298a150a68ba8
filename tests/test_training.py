"""Whole runs by ``accelerate launch``: any number of processes, killed, resumed, stopped: one result.

Every run crosses the switch from bank warm-up to CaCo: 3 steps before it and 12 after.
"""

import json
import os
import random
import signal
import sys
import time

import pytest
import torch
from launch import (
    REAL,
    SMALL,
    SWITCH,
    by,
    final_state,
    finished,
    kill_when,
    launch,
    planned_keys,
    progress,
    relative_difference,
    start,
)
from safetensors.torch import load_file
from shard_sets import make_shard_set

from caco_scale import config as configuration
from caco_scale.checkpoint.folder import latest, read_values
from caco_scale.checkpoint.read import load_tensors
from caco_scale.run.audit import incomplete_steps, read_audit
from caco_scale.run.files import read_json_lines

STEPS = SMALL["run.max_steps"]


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return make_shard_set(tmp_path_factory.mktemp("data") / "set", num_images=96, samples_per_shard=20)


@pytest.fixture(scope="module")
def flags(shards):
    return {**SMALL, "data.shards": shards}


@pytest.fixture(scope="module")
def uninterrupted(flags, tmp_path_factory):
    """A run on one process from start to end: its folder."""
    folder = tmp_path_factory.mktemp("one")
    launch({**flags, "run.dir": folder / "run", "data.audit": folder / "audit.jsonl"})
    return folder


def losses(folder):
    return {line["step"]: line["loss"] for line in read_json_lines(folder / "run" / "metrics.jsonl")}


def assert_same_run(folder, reference, flags, tolerance=1e-8):
    """Same samples in the same order, same losses, and the whole state within ``tolerance`` relative."""
    planned = planned_keys(flags["data.shards"], flags, STEPS)
    assert incomplete_steps(folder / "audit.jsonl") == {}
    assert read_audit(folder / "audit.jsonl") == dict(enumerate(planned))
    state, values = final_state(folder / "run")
    expected_state, expected_values = final_state(reference / "run")
    assert values["step"] == expected_values["step"] == STEPS
    assert values["bank_pointer"] == expected_values["bank_pointer"]
    difference, name = relative_difference(state, expected_state)
    assert difference <= tolerance, f"{name} differs by {difference:.2e}"
    assert losses(folder) == pytest.approx(losses(reference), rel=1e-8)


def test_the_run_directory_of_a_whole_run(uninterrupted, flags):
    run = uninterrupted / "run"
    assert json.loads((run / "DONE").read_text())["step"] == STEPS
    assert not (run / "INTERRUPTED").exists()
    lines = list(read_json_lines(run / "metrics.jsonl"))
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    phases = [line["phase"] for line in lines]
    assert phases == ["bank warm-up"] * SWITCH + ["caco"] * (STEPS - SWITCH)
    for name in ("loss", "lr", "bank_lr", "key_momentum", "images_per_second", "data_wait", "epoch"):
        assert all(isinstance(line[name], int | float) for line in lines), name
    assert all(line["positive_probability"] >= 0 for line in lines)
    for name in (
        "bank_rows_used",
        "bank_assignment_entropy",
        "bank_row_norm",
    ):  # absent until an epoch is over
        assert [line["step"] for line in lines if name in line] == list(range(12, STEPS + 1)), name
        assert all(line[name] > 0 for line in lines if name in line), name
    assert lines[-1]["bank_rows_used"] <= 1
    assert [line["time"] for line in lines] == sorted(line["time"] for line in lines)
    kept = configuration.load_recipe(run / "config.yaml")
    assert os.path.isabs(kept.data.shards)
    assert os.path.isabs(kept.run.dir)
    assert json.loads((run / "environment.json").read_text())["world_size"] == 1
    assert list((run / "tensorboard").iterdir())


@pytest.mark.parametrize(
    ("num_processes", "workers", "how"),
    [(2, 1, REAL), pytest.param(4, 0, (), marks=pytest.mark.long)],
    ids=["2", "4"],
)
def test_more_processes_train_the_same_model(num_processes, workers, how, flags, uninterrupted, tmp_path):
    folders = {"run.dir": tmp_path / "run", "data.audit": tmp_path / "audit.jsonl"}
    launcher = [*by("ddp", num_processes)["launcher"], *how]
    launch({**flags, **folders, "data.workers": workers}, num_processes, launcher=launcher)
    assert json.loads((tmp_path / "run/environment.json").read_text())["world_size"] == num_processes
    assert_same_run(tmp_path, uninterrupted, flags)


def test_exchanging_logits_trains_the_same_model(flags, uninterrupted, tmp_path):
    launch(
        {
            **flags,
            "run.dir": tmp_path / "run",
            "data.audit": tmp_path / "audit.jsonl",
            "bank.exchange": "logits",
        },
        num_processes=2,
    )
    assert_same_run(tmp_path, uninterrupted, flags)


def test_config_yaml_is_a_recipe_that_reproduces_the_run_bit_for_bit(flags, uninterrupted, tmp_path):
    changed = {"run.dir": tmp_path / "run", "data.audit": tmp_path / "audit.jsonl"}
    launch(changed, recipe=str(uninterrupted / "run/config.yaml"))
    assert_same_run(tmp_path, uninterrupted, flags, tolerance=0)


def test_kill_minus_nine_before_at_and_after_the_switch_and_resume_elsewhere(flags, uninterrupted, tmp_path):
    flags = {
        **flags,
        "run.dir": tmp_path / "run",
        "data.audit": tmp_path / "audit.jsonl",
        "run.save_every": 1,
        "run.keep_checkpoints": 2,
    }
    for attempt, (num_processes, step) in enumerate(((2, SWITCH - 1), (1, SWITCH), (4, SWITCH + 4)), start=1):
        process = start({**flags, "data.workers": int(num_processes == 2)}, num_processes)
        kill_when(process, lambda wanted=(attempt, step): progress(tmp_path / "run") >= wanted)
        saved_step(tmp_path / "run")
    launch(flags, num_processes=2)
    attempts = list(read_json_lines(tmp_path / "run/attempts.jsonl"))
    assert [attempt["attempt"] for attempt in attempts] == [1, 2, 3, 4]
    assert_same_run(tmp_path, uninterrupted, flags)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_kill_minus_nine_at_random_moments_and_resume_on_a_random_number_of_processes(
    seed, flags, uninterrupted, tmp_path
):
    moments = random.Random(seed)
    flags = {
        **flags,
        "run.dir": tmp_path / "run",
        "data.audit": tmp_path / "audit.jsonl",
        "run.save_every": moments.choice([1, 2, 3]),
    }
    attempt = 0
    while attempt < 5 and saved_step(tmp_path / "run") < STEPS:
        attempt += 1
        process = start({**flags, "data.workers": moments.randint(0, 2)}, moments.choice([1, 2, 4]))
        step, wait = moments.randint(1, STEPS - 2), moments.uniform(0, 0.2)

        def due(wanted=(attempt, step), seconds=wait):
            return progress(tmp_path / "run") >= wanted and not time.sleep(seconds)

        kill_when(process, due)
    launch(flags, num_processes=moments.choice([1, 2, 4]))
    assert_same_run(tmp_path, uninterrupted, flags)


def saved_step(run_dir):
    """The step of the newest checkpoint, which is whole whatever moment a kill hit; -1 where there is none."""
    found = latest(run_dir / "checkpoints")
    if not found:
        return -1
    load_tensors(found)
    return read_values(found)["step"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_ends_in_a_checkpoint_and_the_resumed_run_is_the_same_bit_for_bit(
    number, flags, uninterrupted, tmp_path
):
    flags = {**flags, "run.dir": tmp_path / "run", "data.audit": tmp_path / "audit.jsonl"}
    process = start(flags, launcher=["--num_processes", "1", "--cpu"])
    output = kill_when(process, lambda: progress(tmp_path / "run") >= (1, SWITCH + 1), number)
    marker = json.loads((tmp_path / "run/INTERRUPTED").read_text())
    assert marker["reason"] == number.name, output
    stopped_at = read_values(latest(tmp_path / "run/checkpoints"))["step"]
    assert SWITCH + 1 <= marker["step"] == stopped_at < STEPS
    launch(flags)
    assert not (tmp_path / "run/INTERRUPTED").exists()
    attempts = list(read_json_lines(tmp_path / "run/attempts.jsonl"))
    assert attempts[-1]["resumed_step"] == stopped_at
    assert_same_run(tmp_path, uninterrupted, flags, tolerance=0)


def test_a_done_run_says_so_and_continues_with_more_steps(flags, tmp_path):
    flags = {**flags, "run.dir": tmp_path / "run", "run.max_steps": 4}
    launch(flags)
    (tmp_path / "run/DONE").unlink()  # as if killed between the last checkpoint and the marker
    assert "has finished its 4 steps" in launch(flags)
    assert json.loads((tmp_path / "run/DONE").read_text())["step"] == 4
    launch({**flags, "run.max_steps": 5})
    assert json.loads((tmp_path / "run/DONE").read_text())["step"] == 5


def test_a_branch_of_another_run_goes_on_by_the_same_command(flags, uninterrupted, tmp_path):
    """Its run.resume names where it began; once it has checkpoints of its own, those are resumed."""
    source = uninterrupted / "run/checkpoints" / f"step_{STEPS:08d}"
    flags = {**flags, "run.dir": tmp_path / "branch", "run.resume": source}
    launch({**flags, "run.max_steps": STEPS + 1})
    launch({**flags, "run.max_steps": STEPS + 2})
    attempts = list(read_json_lines(tmp_path / "branch/attempts.jsonl"))
    assert [attempt["resumed_step"] for attempt in attempts] == [STEPS, STEPS + 1]
    assert json.loads((uninterrupted / "run/DONE").read_text())["step"] == STEPS  # untouched


def test_gradient_accumulation_and_multi_crop_train_on_two_processes(flags, tmp_path):
    flags = {
        **flags,
        "run.dir": tmp_path / "run",
        "data.micro_batch_size": 2,
        "views.num_local_crops": 2,
        "views.local_size": 16,
        "run.max_steps": SWITCH + 10,
        "precision.compute": "fp32",
    }
    launch(flags, num_processes=2)
    state, values = final_state(tmp_path / "run")
    assert values["step"] == SWITCH + 10
    assert all(tensor.isfinite().all() for tensor in state.values() if torch.is_floating_point(tensor))
    assert state["bank.velocity"].norm() > 0


@pytest.mark.parametrize("rule", ["moco", "adco"])
def test_baselines_train_in_the_same_loop(rule, flags, tmp_path):
    launch({**flags, "run.dir": tmp_path / "run", "bank.rule": rule, "run.max_steps": 4})
    lines = list(read_json_lines(tmp_path / "run/metrics.jsonl"))
    assert [line["phase"] for line in lines] == [rule] * 4


@pytest.mark.long
def test_nnclr_goes_on_elsewhere_with_its_queue_and_its_predictor(flags, tmp_path):
    given = {
        **flags,
        "bank.rule": "nnclr",
        "bank.warmup_epochs": 1,
        "run.max_steps": 22,
    }  # the switch: step 12
    launch({**given, "run.dir": tmp_path / "one"})
    launch({**given, "run.dir": tmp_path / "other", "run.max_steps": 14}, **by("fsdp2", 2))
    launch({**given, "run.dir": tmp_path / "other"})
    (expected, values), (found, other_values) = (final_state(tmp_path / name) for name in ("one", "other"))
    difference, name = relative_difference(found, expected)
    assert difference <= 1e-8, f"{name} differs by {difference:.2e}"
    assert values["bank_pointer"] == other_values["bank_pointer"] == 22 * 2 * 8 % 20
    predictor = {name for name in found if "predictor." in name}
    assert "query.predictor.0.weight" in predictor
    assert "optimizer.predictor.0.weight/momentum_buffer" in predictor
    assert not any(name.startswith("key") for name in predictor)
    phases = [line["phase"] for line in read_json_lines(tmp_path / "other" / "metrics.jsonl")]
    assert phases == ["bank warm-up"] * 12 + ["nnclr"] * 10


@pytest.mark.parametrize("format", ["safetensors", "torchvision"])
def test_the_backbone_of_a_run_is_exported_from_any_checkpoint(format, uninterrupted, tmp_path):
    target = tmp_path / "backbone"
    command = [sys.executable, "-m", "caco_scale.export", str(uninterrupted / "run"), "--to", str(target)]
    assert finished([*command, "--format", format]).returncode == 0
    exported = load_file(target) if format == "safetensors" else torch.load(target, weights_only=True)
    state, _ = final_state(uninterrupted / "run")
    for name, tensor in exported.items():
        trained = state.get(f"query.backbone.{name}", state.get(f"query_buffer.backbone.{name}"))
        torch.testing.assert_close(tensor.double(), trained.double(), rtol=1e-6, atol=1e-6)
