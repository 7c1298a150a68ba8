"""Fine-tuning: the share of labels, SimCLR's optimizer, kills, 1 to 3 processes, one model in fp64."""

import json
import re
import signal

import numpy as np
import pytest
import torch
from evaluation_cases import make_place, run_of_rank, words
from gloo import run_ranks
from launch import kill_when
from test_evaluate_linear import evaluation

from caco_scale.evaluate import run_finetune
from caco_scale.evaluate.__main__ import parse
from caco_scale.evaluate.loop import LabelledBatch
from caco_scale.evaluate.run_finetune import FineTuned, choose_share, usual_epochs
from caco_scale.evaluate.task import build_task
from caco_scale.weights.load import load_weights

SHORT = ("--fraction", 0.5, "--epochs", 3, "--batch_size", 12, "--lr", 0.5, "--precision", "fp64")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return make_place(tmp_path_factory.mktemp("finetune") / "place")


def test_a_share_is_drawn_class_by_class_and_the_same_again():
    labels = np.random.default_rng(0).permutation(np.repeat([0, 1, 2, 3], [1000, 500, 20, 3]))
    chosen = choose_share(labels, 0.1, seed=0)
    assert np.bincount(labels[chosen]).tolist() == [100, 50, 2, 1]
    assert (np.diff(chosen) > 0).all()
    assert np.array_equal(chosen, choose_share(labels, 0.1, seed=0))
    assert not np.array_equal(chosen, choose_share(labels, 0.1, seed=1))
    assert np.array_equal(choose_share(labels, 1.0, seed=0), np.arange(len(labels)))


def test_the_list_of_images_used_stands_beside_the_result(place, tmp_path):
    result = run_finetune.run(parse(words("finetune", place, *SHORT, "--to", tmp_path)))
    lines = (tmp_path / result["samples_file"]).read_text().split()
    assert len(lines) == len(set(lines)) == result["samples"] == 32
    shards, keys = zip(*(line.split("/") for line in lines), strict=True)
    assert all(int(key) // 16 == int(shard[:6]) for shard, key in zip(shards, keys, strict=True))
    assert np.bincount([int(key) % 4 for key in keys]).tolist() == [8, 8, 8, 8]
    assert result["settings"]["lr"] == 0.5
    assert len(result["history"]) == 3


def test_an_update_is_torchs_nesterov_step(place, tmp_path):
    task = build_task(parse(words("finetune", place, "--precision", "fp64", "--images_at_once", 5)))
    learner = FineTuned(task, rate=25.6, batch_size=5)
    reference = FineTuned(
        build_task(parse(words("finetune", place, "--precision", "fp64"))), 25.6, 5
    ).model.train()
    optimizer = torch.optim.SGD(reference.parameters(), lr=0.5, momentum=0.9, nesterov=True)
    generator = torch.Generator().manual_seed(0)
    for factor in (1.0, 0.5, 0.25):
        images = torch.randn(5, 3, 16, 16, generator=generator, dtype=torch.float64)
        labels = torch.tensor([0, 1, 2, 3, 0])
        loss = learner.update(LabelledBatch(images, labels, None, None), factor)
        optimizer.param_groups[0]["lr"] = 0.5 * factor
        optimizer.zero_grad()
        expected = torch.nn.functional.cross_entropy(reference(images), labels)
        expected.backward()
        optimizer.step()
        assert loss == pytest.approx(expected.item(), rel=1e-12)
    for (name, found), wanted in zip(
        learner.model.state_dict().items(), reference.state_dict().values(), strict=True
    ):
        assert torch.allclose(found, wanted, rtol=1e-9, atol=1e-12), name


def test_an_image_that_does_not_decode_counts_nothing(place):
    task = build_task(parse(words("finetune", place, "--precision", "fp64")))
    learner = FineTuned(task, rate=1.0, batch_size=4)
    images = torch.randn(4, 3, 16, 16, dtype=torch.float64)
    loss = learner.update(LabelledBatch(images, torch.tensor([0, -1, 2, -1]), None, None), 0.0)
    with torch.no_grad():
        logits = learner.model.train()(images)[[0, 2]]
    assert loss == pytest.approx(torch.nn.functional.cross_entropy(logits, torch.tensor([0, 2])).item() / 2)


@pytest.mark.long
def test_one_two_and_three_processes_train_one_model(place, tmp_path):
    states, results = [], []
    for ranks in (1, 2, 3):
        results += run_ranks(
            run_of_rank, ranks, words("finetune", place, *SHORT, "--to", tmp_path / str(ranks))
        )
        states.append(torch.load(tmp_path / f"{ranks}/state.pt", weights_only=True)["tensors"])
    for state in states[1:]:
        for name, tensor in states[0].items():
            assert torch.allclose(state[name].double(), tensor.double(), rtol=1e-7, atol=1e-10), name
    assert len({(r["top1"], r["top5"], r["samples"]) for r in results}) == 1
    start = load_weights(place / "caco.pth.tar").backbone.conv1.weight
    assert not torch.allclose(states[0]["backbone.conv1.weight"].float(), start, atol=1e-4), (
        "the encoder trains"
    )


def test_a_killed_fine_tuning_goes_on_and_ends_the_same(place, tmp_path):
    whole = run_finetune.run(parse(words("finetune", place, *SHORT, "--to", tmp_path / "whole")))
    options = words("finetune", place, *SHORT, "--to", tmp_path / "killed")
    kill_when(evaluation(options), lambda: (tmp_path / "killed/state.pt").exists(), signal.SIGKILL)
    assert not (tmp_path / "killed/result.json").exists()
    resumed = run_finetune.run(parse(options))
    assert [e["loss"] for e in resumed["history"]] == [e["loss"] for e in whole["history"]]
    assert resumed["top1"] == whole["top1"]
    ends = [
        torch.load(tmp_path / name / "state.pt", weights_only=True)["tensors"] for name in ("whole", "killed")
    ]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
    assert json.loads((tmp_path / "killed/settings.json").read_text())["fraction"] == 0.5


def test_a_stopped_fine_tuning_saves_at_that_step_and_ends_the_same(place, tmp_path):
    """Two processes get SIGTERM amid the steps between two saves; they end alike, and one process goes on."""
    many = ("--fraction", 1.0, "--epochs", 10, "--batch_size", 4, "--lr", 0.5, "--precision", "fp64")
    options = words("finetune", place, *many, "--to", tmp_path / "stopped")
    state = tmp_path / "stopped/state.pt"
    output = kill_when(evaluation(options, 2), state.exists, signal.SIGTERM)
    (step,) = {
        int(n) for n in re.findall(r"stopped by SIGTERM after step (\d+) of 160: the same command", output)
    }
    assert torch.load(state, weights_only=True)["progress"]["step"] == step < 160, output
    assert not (tmp_path / "stopped/result.json").exists()
    resumed = run_finetune.run(parse(options))
    whole = run_finetune.run(parse(words("finetune", place, *many, "--to", tmp_path / "whole")))
    assert [e["loss"] for e in resumed["history"]] == pytest.approx(
        [e["loss"] for e in whole["history"]], rel=1e-6
    )
    assert resumed["top1"] == whole["top1"]


def test_the_epochs_are_simclrs():
    assert [usual_epochs(fraction) for fraction in (0.01, 0.1, 1.0)] == [60, 30, 30]
