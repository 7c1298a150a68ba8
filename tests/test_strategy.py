"""Every strategy trains the model of one process: by real launches, the whole state compared.

The tiny model of ``strategy_cases.py`` takes 2 steps of bank warm-up and 10 of CaCo from one checkpoint. In fp64 what
is left is rounding (3e-14); in fp32 (DeepSpeed) 1e-5, while a wrong norm or average is off by 1e-2.
"""

import json
import sys
from pathlib import Path

import pytest
import torch
from launch import ROOT, finished, relative_difference

from caco_scale.checkpoint.folder import latest, step_path
from caco_scale.checkpoint.read import load_tensors

FP32, FP64 = 1e-4, 1e-8
CASES = Path(__file__).with_name("strategy_cases.py")

LARS = {"name": "lars"}
KIN = [  # rules that take their negatives from the batch, or their positives from a queue
    {"name": "nnclr", "rule": "nnclr", "predictor": True},
    {"name": "nearest", "rule": "nearest", "steps": 6},
    {"name": "inbatch", "rule": "inbatch", "predictor": True, "steps": 6},
]
KIN64 = [{**case, "name": f"{case['name']}64", "dtype": "float64"} for case in KIN]
LARS64 = {"name": "lars64", "dtype": "float64"}
ACCUMULATE = {"name": "accumulate", "num_micro": 2}
NOT_FINITE = {"name": "not_finite", "not_finite_step": 5}
BAD_LOSS = {"name": "bad_loss", "bad_loss_step": 1}
SGD = {"name": "sgd", "optimizer": "sgd", "lr": 0.01}
ADAMW = {"name": "adamw", "optimizer": "adamw", "lr": 1e-4}
FEATURES = {"name": "features", "evaluate": True, "steps": 3}
ACCUMULATE64 = {**ACCUMULATE, "dtype": "float64", "name": "accumulate64"}
CROPS = {"name": "crops", "crops": 3, "at_once": True, "steps": 5}  # the reference: a forward for each
CROPS64 = {**CROPS, "name": "crops64", "dtype": "float64"}
NOT_PERSISTENT = {
    "stage": 3,
    "stage3_param_persistence_threshold": 100,
    "sub_group_size": 9000,
    "reduce_bucket_size": 3000,
    "stage3_prefetch_bucket_size": 1000,
}


def train(folder, cases, config=None, num_processes=1):
    """Run the cases in ``folder`` under a launcher's config file (None: as one plain process)."""
    command = [sys.executable, str(CASES)]
    if config:
        launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config)]
        command = [*launcher, "--num_processes", str(num_processes), str(CASES)]
    command += [str(folder), *map(json.dumps, cases)]
    # Not the checkout: what the config file names is found whatever the working directory.
    process = finished(command, cwd=folder)
    assert process.returncode == 0, f"{process.stdout[-4000:]}\n{process.stderr[-8000:]}"


def report(folder, name, rank=0):
    return json.loads((folder / f"{name}.rank{rank}.json").read_text())


def state(folder):
    return load_tensors(latest(folder))


def assert_same(folder, name, reference, tolerance, reference_name=None):
    """Positives agree, the same steps moved, and every tensor is equal within ``tolerance`` relative L2."""
    found, expected = state(folder / name), state(reference / (reference_name or name))
    flips = int((found["bank.assignments"] - expected["bank.assignments"]).abs().sum())
    assert flips == 0, f"{name}: {flips} positives differ"
    difference, tensor = relative_difference(found, expected)
    assert difference <= tolerance, f"{name}: {tensor} differs by {difference:.1e}"
    assert report(folder, name)["moved"] == report(reference, reference_name or name)["moved"]


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """One process, and the checkpoints that the others start from; :func:`complete` adds what a test compares with."""
    folder = tmp_path_factory.mktemp("reference")
    train(folder, [{**LARS, "save_at": [0, 2]}, {**LARS64, "save_at": [0, 2]}])
    return folder


def complete(reference, cases):
    """One process trains those of the cases that it has not trained yet."""
    missing = [case for case in cases if not (reference / f"{case['name']}.rank0.json").exists()]
    if missing:
        train(reference, [of_one_process(case, reference) for case in missing])


def of_one_process(case, reference):
    if case.get("optimizer") == "adamw":
        return {**case, "save_at": [0]}
    from_a_checkpoint = "num_micro" in case or "crops" in case
    return starting({**case, "at_once": False}, reference) if from_a_checkpoint else case


@pytest.fixture(scope="module")
def kin_reference(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kin")
    train(folder, [{**LARS, "save_at": [0]}, {**LARS64, "save_at": [0]}, *KIN, *KIN64])
    return folder


def starting(case, reference):
    """The case from the reference's checkpoint; accumulation after the switch.

    In the warm-up the order in which micro-batches enter the bank's queue depends on the number of processes. A case
    with a predictor, which no checkpoint has, begins with its seed.
    """
    if case.get("predictor"):
        return case
    name = (
        "lars64"
        if case.get("dtype") == "float64"
        else "adamw"
        if case.get("optimizer") == "adamw"
        else "lars"
    )
    step = 2 if "num_micro" in case else 0
    return {**case, "start": str(step_path(reference / f"{name}-{step}", step))}


def check(config, num_processes, cases, reference, folder):
    """``config``: a file of ds_configs, named as its strategy or a variant of it (zero3_offload)."""
    complete(reference, cases)
    train(
        folder,
        [starting(case, reference) for case in cases],
        ROOT / "ds_configs" / f"{config}.yaml",
        num_processes,
    )
    for case in cases:
        facts = report(folder, case["name"])
        assert (facts["strategy"], facts["world_size"]) == (config.partition("_")[0], num_processes)
        if case.get("evaluate"):
            expected = report(reference, case["name"])["features"]
            assert facts["features"] == pytest.approx(expected, rel=1e-4)
        else:
            assert_same(folder, case["name"], reference, FP64 if case.get("dtype") == "float64" else FP32)


def test_two_processes_in_fp64(reference, tmp_path):
    check("fsdp2", 2, [LARS64, ACCUMULATE64, CROPS64, NOT_FINITE, FEATURES], reference, tmp_path)


@pytest.mark.long
@pytest.mark.parametrize(("config", "cases"), [("fsdp2", KIN64), ("zero1", KIN)], ids=["fsdp2", "zero1"])
def test_other_rules_on_two_processes(config, cases, kin_reference, tmp_path):
    check(config, 2, cases, kin_reference, tmp_path)


@pytest.mark.parametrize("config", ["zero1", pytest.param("zero3", marks=pytest.mark.long)])
def test_two_processes_under_zero(config, reference, tmp_path):
    check(config, 2, [LARS, ACCUMULATE, CROPS, NOT_FINITE, FEATURES], reference, tmp_path)
    whole = report(reference, "lars")["optimizer_state_bytes"]
    each = [report(tmp_path, "lars", rank)["optimizer_state_bytes"] for rank in range(2)]
    assert sum(each) == pytest.approx(whole, rel=1e-3)
    assert each[0] == each[1]


@pytest.mark.slow
@pytest.mark.parametrize("config", ["ddp", "zero1", "zero2", "zero3", "fsdp2"])
def test_three_processes_and_every_optimizer(config, reference, tmp_path):
    cases = [LARS, SGD, ADAMW, ACCUMULATE, CROPS, NOT_FINITE, BAD_LOSS]
    check(config, 3, cases + [LARS64, CROPS64] * (config in ("ddp", "fsdp2")), reference, tmp_path)


@pytest.mark.long
def test_plain_lars_fails_where_ours_passes_and_engine_settings_change_nothing(reference, tmp_path):
    """A plain LARS takes ZeRO's flat tensors for biases: neither decay nor trust ratio, silently momentum SGD."""
    cases = [
        LARS,
        ACCUMULATE,
        NOT_FINITE,
        KIN[0],
        {"name": "plain", "plain_lars": True, "zero": {"stage": 2}},
        {"name": "not_persistent", "zero": NOT_PERSISTENT},
        {
            "name": "round_robin",
            "zero": {"stage": 2, "round_robin_gradients": True, "reduce_bucket_size": 500},
        },
    ]
    complete(reference, cases[:4])
    train(tmp_path, [starting(case, reference) for case in cases], ROOT / "ds_configs/zero2.yaml", 2)
    difference, name = relative_difference(state(tmp_path / "plain"), state(reference / "lars"))
    assert difference > 0.1, (difference, name)
    for name in ("lars", "accumulate", "not_finite", "nnclr"):
        assert_same(tmp_path, name, reference, FP32)
    for name in ("not_persistent", "round_robin"):
        assert_same(tmp_path, name, reference, FP32, "lars")


@pytest.mark.slow
def test_three_processes_under_unusual_engine_settings(reference, tmp_path):
    buckets = {"reduce_bucket_size": 300, "allgather_bucket_size": 300}
    cases = [
        {"name": "round_robin1", "zero": {"stage": 1, "round_robin_gradients": True, **buckets}},
        {"name": "round_robin2", "zero": {"stage": 2, "round_robin_gradients": True, **buckets}},
        {"name": "no_overlap", "zero": {"stage": 2, "overlap_comm": False, "contiguous_gradients": False}},
        {"name": "all_reduce", "zero": {"stage": 1, "reduce_scatter": False}},
        {"name": "not_persistent", "zero": NOT_PERSISTENT},
        {"name": "accumulate_not_persistent", "num_micro": 2, "zero": NOT_PERSISTENT},
        {"name": "offload", "zero": {"stage": 3, "offload_optimizer": {"device": "cpu"}}},
        {"name": "offload2", "zero": {"stage": 2, "offload_optimizer": {"device": "cpu"}}},
    ]
    complete(reference, [ACCUMULATE])
    train(tmp_path, [starting(case, reference) for case in cases], ROOT / "ds_configs/zero2.yaml", 3)
    for case in cases:
        expected = "accumulate" if "num_micro" in case else "lars"
        assert_same(tmp_path, case["name"], reference, FP32, expected)


def test_ranks_with_empty_shards(tmp_path):
    """Embeddings of 4 dimensions on 3 ranks: the projector's last layer has 2, 2 and 0 rows there under FSDP2."""
    case = {"name": "narrow", "dim": 4, "dtype": "float64", "steps": 6}
    train(tmp_path, [case])
    (tmp_path / "three").mkdir()
    train(tmp_path / "three", [case], ROOT / "ds_configs/fsdp2.yaml", 3)
    assert_same(tmp_path / "three", "narrow", tmp_path, FP64)


@pytest.mark.slow
@pytest.mark.parametrize("config", ["zero2", "zero3"])
def test_ranks_that_hold_nothing_of_a_partition_under_zero(config, tmp_path):
    """Matrices and biases of one element on 3 ranks: nothing else trains, or each is a subgroup beside the rest."""
    alone = {"name": "alone", "gain": "alone"}
    beside = {"name": "beside", "gain": True, "zero": {"stage": 3, "sub_group_size": 1}}
    cases = (
        [alone, beside] if config == "zero3" else [alone, {**alone, "name": "stage1", "zero": {"stage": 1}}]
    )
    train(tmp_path, [{**case, "zero": {}} for case in cases])
    (tmp_path / "three").mkdir()
    train(tmp_path / "three", cases, ROOT / f"ds_configs/{config}.yaml", 3)
    for case in cases:
        assert_same(tmp_path / "three", case["name"], tmp_path, FP32)
        empty = [report(tmp_path / "three", case["name"], rank)["empty_partitions"] for rank in range(3)]
        assert empty == [0, 2, 2], empty


@pytest.mark.slow
def test_parameters_offloaded_to_the_host_by_the_projects_own_file(reference, tmp_path):
    check("zero3_offload", 2, [LARS, ADAMW, ACCUMULATE, NOT_FINITE], reference, tmp_path)


@pytest.mark.long
def test_a_chain_of_resumes_through_every_strategy(reference, tmp_path):
    """DDP(2) -> ZeRO-2(3) -> FSDP2(2) -> ZeRO-3(3) -> ZeRO-1(2) -> DDP(1), two steps each, activations recomputed."""
    chain = [("ddp", 2), ("zero2", 3), ("fsdp2", 2), ("zero3", 3), ("zero1", 2), ("ddp", 1)]
    start = None
    for link, (config, num_processes) in enumerate(chain):
        case = {"name": f"link{link}", "start": start, "steps": 2 * link + 2, "recompute": True}
        train(tmp_path, [case], ROOT / "ds_configs" / f"{config}.yaml", num_processes)
        assert report(tmp_path, case["name"])["world_size"] == num_processes
        start = str(latest(tmp_path / case["name"]))
    found, expected = state(tmp_path / "link5"), state(reference / "lars")
    difference, tensor = relative_difference(found, expected)
    assert difference <= FP32, f"{tensor} differs by {difference:.1e}"
    assert torch.equal(found["bank.assignments"], expected["bank.assignments"])
