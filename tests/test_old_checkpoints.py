"""Checkpoints of version 0.1 (commit 4b5f358): read to the last bit, continued as that version did, exported."""

import hashlib
import tarfile
from pathlib import Path

import pytest
from launch import by, final_state, launch
from safetensors.torch import load_file

from caco_scale.checkpoint.read import load_tensors
from caco_scale.export.write import export
from caco_scale.run.directory import read_json_lines

GOLDEN = Path(__file__).parent / "golden" / "checkpoints_4b5f358.tar.xz"
WARMUP, ZERO2 = "warmup/checkpoints/step_00000003", "zero2/checkpoints/step_00000009"

# What 4b5f358 itself read and computed. Its losses from step 4 to 8: the switch comes after step 4.
TENSORS = {
    WARMUP: "ad55506036b75991c6b0bcd9dcb7b94b02e6af2d4e76596062c82e5c68d9f099",
    ZERO2: "d2a1c030bcb574d5c3541bc750bdb39819f37b2a4532fe36173c95ba1afeb4b2",
}
BACKBONES = {
    WARMUP: "643d204b8c768aa87829fffa86fa97c2e0224d6d2c045d646007cf3a1f314e90",
    ZERO2: "fbd365e14de5ddde869504e5827d19c40804784700c1f83099ec79aee00bad38",
}
LOSSES = [8.945946016354188, 18.280717573401354, 11.45513799994374, 12.00281617194592, 11.451581249559789]
SQUARES = {  # sums of squares after step 8
    "bank": 2288.943809717977,
    "key": 1029.0972770855649,
    "key_buffer": 3948.845130401268,
    "optimizer": 1127.7773443138028,
    "query": 1032.8645534245,
    "query_buffer": 3949.584758110311,
}
RECIPE = """
recipe: old
data: {shards: shards/train, val_shards: shards/val, global_batch_size: 16, workers: 0}
views: {size: 16, blur_p: [0.0, 0.0], solarize_p: [0.0, 0.0]}
model: {arch: tiny, stem: cifar, projector_hidden: 16, embedding_dim: 8}
bank: {size: 60}
optim: {name: lars, lr: 0.3, epochs: 4, warmup_epochs: 0.5, weight_decay: 1.0e-4}
run: {log_every: 1, save_every: 0}
"""


@pytest.fixture
def old(tmp_path):
    """A folder with the two runs of 4b5f358, their shards, and their recipe."""
    with tarfile.open(GOLDEN) as tar:
        tar.extractall(tmp_path, filter="data")
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    return tmp_path


def digest(tensors):
    total = hashlib.sha256()
    for name in sorted(tensors):
        total.update(name.encode())
        total.update(tensors[name].contiguous().numpy().tobytes())
    return total.hexdigest()


def losses(run):
    return [line["loss"] for line in read_json_lines(run / "metrics.jsonl") if "loss" in line]


@pytest.mark.parametrize("path", [WARMUP, ZERO2])
def test_reads_the_tensors_and_exports_the_backbone_that_4b5f358_did(old, path):
    assert digest(load_tensors(old / path)) == TENSORS[path]
    export(old / path, old / "backbone.safetensors", "safetensors")
    assert digest(load_file(old / "backbone.safetensors")) == BACKBONES[path]


def test_goes_on_over_the_switch_as_4b5f358_did(old):
    flags = {"run.dir": "continued", "run.resume": WARMUP, "run.max_steps": 8, "precision.compute": "fp64"}
    launch(flags, cwd=old, recipe="recipe.yaml")
    assert losses(old / "continued") == pytest.approx(LOSSES, rel=1e-8)
    state, values = final_state(old / "continued")
    squares = dict.fromkeys(SQUARES, 0.0)
    for name, tensor in state.items():
        squares[name.split(".")[0]] += float(tensor.double().square().sum())
    assert squares == pytest.approx(SQUARES, rel=1e-8)
    assert values["step"] == 8


@pytest.mark.parametrize("config", ["ddp", "zero2"])
def test_a_run_of_two_zero2_processes_goes_on_in_place(old, config):
    launch({"run.dir": "zero2", "run.max_steps": 11}, cwd=old, recipe="recipe.yaml", **by(config, 1))
    state, values = final_state(old / "zero2")
    assert values["step"] == 11
    assert values["branched_from"] is None
    assert all(tensor.isfinite().all() for tensor in state.values())
