"""The benchmarks run, their contenders compute the same, and bytes are counted as the formula says.

No figure is asserted that depends on the clock. (``benchmark loader`` has a file of its own.)
"""

import json
import sys

import pytest
import torch
from gloo import run_ranks
from launch import finished
from oracle import oracle_step, random_inputs
from warm import environment

from caco_scale.benchmark import paper
from caco_scale.benchmark.__main__ import main
from caco_scale.benchmark.counts import count_step
from caco_scale.benchmark.dense import CompiledBank, DenseBank, pair_list
from caco_scale.benchmark.measure import in_turn, significant
from caco_scale.config import load_recipe, replace
from caco_scale.distributed.compilation import lacking
from caco_scale.errors import UserError
from caco_scale.method.contrast import pair_weights
from caco_scale.training.assemble import build_encoder


def run(tmp_path, *words, said="", **variables):
    """The JSON that a benchmark saves, which is also its last line."""
    command = [sys.executable, "-m", "caco_scale.benchmark", *map(str, words), "--save", str(tmp_path)]
    done = finished(command, env={**environment(), **variables})
    assert done.returncode == 0, done.stderr
    assert said in done.stdout
    (file,) = tmp_path.glob(f"{words[0]}_*.json")
    saved = json.loads(file.read_text())
    assert json.loads(done.stdout.splitlines()[-1]) == saved
    assert saved["machine"]["cores"] >= 1
    return saved


SMALL_BANK = ("bank", "--samples", 12, "--size", 300, "--dim", 16, "--rounds", 1, "--threads", 1)
BANKS = ["sharded bank", "dense, autograd", "dense, gradient written out", "dense, compiled"]


def test_the_bank_benchmark_measures_three_banks_that_agree(tmp_path):
    """Without a compiler the compiled peer is left out, and that is said."""
    assert_banks(
        run(tmp_path, *SMALL_BANK, said="needs a C++ compiler, and there is no cxx", CXX="cxx"), BANKS[:3]
    )


@pytest.mark.long
@pytest.mark.skipif(lacking("cpu") is not None, reason=f"torch.compile needs {lacking('cpu')}")
def test_the_bank_benchmark_measures_a_compiled_bank_that_agrees(tmp_path):
    assert_banks(run(tmp_path, *SMALL_BANK), BANKS)


def assert_banks(saved, banks):
    assert [row["what"] for row in saved["rows"]] == banks
    assert all(row["cpu_seconds"] > 0 for row in saved["rows"])
    for agreement in saved["agreement"].values():
        assert agreement.pop("positives_equal") == 1
        assert max(agreement.values()) < 1e-5


def test_a_ratio_of_two_saved_figures_is_that_of_what_was_measured():
    """With one digit behind the point the first of these would be 0.9, not 0.83."""
    for ours, peer in ((0.8532, 1.028), (371.41, 290.63), (14.6, 17.9)):
        assert significant(ours) / significant(peer) == pytest.approx(ours / peer, rel=2e-4)
    assert significant(12345.6) == 12350


@pytest.mark.long
def test_the_step_benchmark_takes_a_recipe_and_flags_and_both_steps_have_the_same_loss(tmp_path):
    flags = [
        "--data.global_batch_size",
        8,
        "--bank.size",
        50,
        "--views.num_local_crops",
        1,
        "--views.local_size",
        16,
    ]
    saved = run(tmp_path, "step", "demo", "--steps", 1, "--rounds", 1, "--threads", 1, *flags)
    assert saved["batch"] == 8
    assert saved["loss_apart"] < 1e-5
    assert saved["shares"]["query"] > 0
    assert sum(saved["shares"].values()) == pytest.approx(1, abs=0.01)


def counted(rank, world_size, crops):
    flags = {"data__global_batch_size": 8, "bank__size": 64, "views__num_local_crops": crops}
    flags |= {"views__local_size": 16, "precision__compute": "fp32"}
    counts = count_step(replace(load_recipe("demo"), **flags))
    return counts.waits, counts.exchanges, dict(counts.collectives), dict(counts.operations)


def norms_of_the_demo():
    modules = build_encoder(load_recipe("demo")).modules()
    return sum(isinstance(m, torch.nn.modules.batchnorm._BatchNorm) for m in modules)


def test_the_host_waits_once_in_a_step_of_two_processes_and_they_meet_no_more_than_they_must():
    """What is counted here grows with a network's layers and a step's views, and with nothing else."""
    norms = norms_of_the_demo()
    for waits, exchanges, collectives, operations in run_ranks(counted, 2, 0):
        assert waits == ["_local_scalar_dense"]
        assert exchanges == 1  # a byte
        # Every norm in four forwards and two backwards, the bank's four, and DDP's two buckets.
        assert sum(collectives.values()) == 6 * norms + 4 + 2
        assert operations["other"] <= 8  # the buffers' copies among them


def test_six_local_crops_cost_the_collectives_of_one_and_no_forward_of_six():
    norms = norms_of_the_demo()
    (two, _), (eight, _) = (run_ranks(counted, 2, crops) for crops in (0, 6))
    assert (eight[0], eight[1]) == (["_local_scalar_dense"], 1)
    assert sum(eight[2].values()) - sum(two[2].values()) == 2 * norms  # once forward, once backward
    assert eight[3]["query"] < 2 * two[3]["query"]  # of four times as many views


@pytest.mark.long
def test_the_counts_benchmark_takes_a_recipe_and_flags(tmp_path):
    flags = ["--data.global_batch_size", 4, "--bank.size", 50, "--processes", 1, 2]
    one, two = run(tmp_path, "counts", "demo", *flags)["rows"]
    assert (one["waits"], one["collectives"], one["exchanges"]) == (1, 0, 0)
    assert (two["waits"], two["exchanges"]) == (1, 1)
    assert one["query"] == one["key"] > norms_of_the_demo()
    assert one["operations"] < two["operations"]


@pytest.mark.long
def test_the_bytes_of_the_sharded_bank_do_not_grow_with_it_and_are_those_of_the_formula(tmp_path):
    words = ["--ranks", 2, "--samples", 24, "--dim", 16, "--sizes", 100, 1000, "--rounds", 1]
    saved = run(tmp_path, "scale", *words)
    assert saved["independent_of_size"]
    by_size = {(row["ranks"], row["bank_rows"]): row for row in saved["rows"]}
    assert set(by_size) == {(1, 100), (1, 1000), (2, 100), (2, 1000)}
    inputs = paper.Inputs(gpus=2, batch=24, embedding=16)
    checks = by_size[2, 100]["sharded_bytes"] - paper.bank_bytes(inputs)
    assert 0 <= checks < 1000  # small facts between hosts
    assert by_size[2, 1000]["replicated_bytes"] == 1000 * 16 * 4
    assert all(row["sharded_bytes"] == 0 for (ranks, _), row in by_size.items() if ranks == 1)


@pytest.mark.parametrize("how", ["by autograd", "written out", "compiled"])
@pytest.mark.parametrize("num_views", [2, 4])
def test_the_dense_peer_is_the_oracle(num_views, how, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)  # its formulae, in float64
    queries, keys, rows, velocity = random_inputs(12, 40, 8, num_views)
    queries = [q.requires_grad_() for q in queries]
    bank = (
        CompiledBank(rows, 0.1, 0.07)
        if how == "compiled"
        else DenseBank(rows, 0.1, 0.07, by_autograd=how == "by autograd")
    )
    bank.velocity.copy_(velocity)
    expected = oracle_step(queries, keys, rows, velocity, 0.1, 0.07)
    loss, _, gradient = bank.step(queries, keys, lr=3.0)
    torch.testing.assert_close(loss, expected.loss)
    torch.testing.assert_close(gradient, expected.bank_gradient)
    torch.testing.assert_close(bank.rows.detach(), expected.rows)
    for query, dq in zip(queries, expected.dq, strict=True):
        torch.testing.assert_close(query.grad, dq)
    weights = pair_weights(num_views)
    assert {(i, j): w for i, j, w in pair_list(num_views)} == {
        (i, j): weights[i, j].item() for i in range(num_views) for j in range(2) if i != j
    }


def test_the_run_on_paper_counts_this_projects_encoder():
    encoder = build_encoder(load_recipe("caco_r50_800ep"))
    norms = [
        m.num_features for m in encoder.modules() if isinstance(m, torch.nn.modules.batchnorm._BatchNorm)
    ]
    assert sum(p.numel() for p in encoder.parameters()) == paper.PARAMETERS
    assert sum(norms) == paper.NORM_CHANNELS
    rows = {row["what"]: row["value"] for row in paper.work_out(paper.Inputs())}
    assert rows["optimizer steps"] == "249,600"
    at_8 = paper.Inputs(gpus=8)
    assert paper.bank_bytes(at_8) <= paper.replicated_bank_bytes(at_8) / 5


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["bank", "--rounds", "0"], "--rounds is 0"),
        (["bank", "--sizes", "3"], "unknown flag --sizes"),
        (["step", "dmo"], "did you mean demo?"),
        (["step", "demo", "--bank.sise", "3"], "--bank.size"),
        (
            ["counts", "demo", "--processes", "7", "--data.global_batch_size", "8"],
            "--processes 7 does not divide",
        ),
    ],
)
def test_a_typo_is_one_line(words, said, capsys):
    with pytest.raises(SystemExit) as end:
        main(words)
    assert end.value.code == 2
    assert said in capsys.readouterr().err


def prepare_too_large():
    return too_large


def too_large():
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.53 GiB.\nGPU 0 has ...")


def test_a_gpu_that_is_too_small_is_one_line():
    with pytest.raises(UserError, match=r"'peer' needs more memory than is free.*1\.53 GiB\. GPU 0 has"):
        in_turn({"peer": prepare_too_large}, 1)
