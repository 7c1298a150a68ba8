"""Runs of the trainer itself, killed in the middle of saving and resumed under another strategy: one result."""

import json

import pytest
import torch
from launch import (
    SMALL,
    SWITCH,
    by,
    final_state,
    kill_when,
    launch,
    planned_keys,
    relative_difference,
    start,
)
from shard_sets import make_shard_set

from caco_scale.export.write import export
from caco_scale.run.audit import incomplete_steps, read_audit

STEPS = SMALL["run.max_steps"]


@pytest.fixture(scope="module")
def flags(tmp_path_factory):
    shards = make_shard_set(tmp_path_factory.mktemp("data") / "set", num_images=96, samples_per_shard=20)
    return {**SMALL, "data.shards": shards, "run.save_every": 1, "run.keep_checkpoints": 2}


def saving(folder, step):
    """Whether the checkpoint of a step, or a later one, is being written now."""
    folder = folder / "run/checkpoints"
    return lambda: any(int(path.name[5:13]) >= step for path in folder.glob("step_*.tmp"))


def killed_and_resumed(folder, flags, strategies):
    """``kill -9`` in a save before, at and after the switch, each time another strategy goes on; then to the end."""
    flags = {**flags, "run.dir": folder / "run", "data.audit": folder / "audit.jsonl"}
    for (config, num_processes), step in zip(strategies, (SWITCH - 1, SWITCH, SWITCH + 4, None), strict=True):
        if step is None:
            launch(flags, **by(config, num_processes))
        else:
            kill_when(start(flags, **by(config, num_processes)), saving(folder, step))
    environment = json.loads((folder / "run/environment.json").read_text())
    assert (environment["strategy"], environment["world_size"]) == strategies[-1]
    assert len(environment["optimizer_state_bytes"]) == strategies[-1][1]
    assert incomplete_steps(folder / "audit.jsonl") == {}
    planned = planned_keys(flags["data.shards"], flags, STEPS)
    assert read_audit(folder / "audit.jsonl") == dict(enumerate(planned))
    state, values = final_state(folder / "run")
    assert values["step"] == STEPS
    return state


@pytest.mark.slow
def test_killed_in_a_save_and_resumed_under_fsdp2_and_ddp(flags, tmp_path):
    """In fp64, so that nothing but rounding is left of four launches on 2, 2, 4 and 1 processes."""
    launch({**flags, "run.dir": tmp_path / "one/run"})
    expected, _ = final_state(tmp_path / "one/run")
    (tmp_path / "killed").mkdir()
    strategies = [("fsdp2", 2), ("ddp", 2), ("fsdp2", 4), ("fsdp2", 1)]
    state = killed_and_resumed(tmp_path / "killed", flags, strategies)
    difference, name = relative_difference(state, expected)
    assert difference <= 1e-8, f"{name} differs by {difference:.1e}"
    export(tmp_path / "killed/run", tmp_path / "backbone.safetensors", "safetensors")


@pytest.mark.slow
@pytest.mark.parametrize("config", ["zero2", "zero3"])
def test_killed_in_a_save_and_resumed_under_zero(config, flags, tmp_path):
    """The same bits as without a kill; kNN evaluation, with its gathered parameters, runs on the way."""
    flags = {
        **flags,
        "precision.compute": "fp32",
        "data.val_shards": flags["data.shards"],
        "eval.knn_every": 1,
    }
    whole = {**flags, "run.dir": tmp_path / "whole/run"}
    launch(whole, **by(config, 2))
    expected, _ = final_state(tmp_path / "whole/run")
    (tmp_path / "killed").mkdir()
    state = killed_and_resumed(tmp_path / "killed", flags, [(config, 2)] * 4)
    assert all(torch.equal(state[name], expected[name]) for name in expected)
    export(tmp_path / "killed/run", tmp_path / "backbone.safetensors", "safetensors")
