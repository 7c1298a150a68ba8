"""Linear evaluation: the authors' optimizer in float64, chance on noise, 100 on labels, kills, 1 to 3 processes."""

import json
import re
import signal
import sys

import numpy as np
import pytest
import torch
from evaluation_cases import make_place, run_of_rank, separable, words
from gloo import run_ranks
from launch import ROOT, by, kill_when, start_command
from shard_sets import encode
from torch.nn import functional as F

from caco_scale.data.labels import labels_of
from caco_scale.data.order import permutation
from caco_scale.evaluate import loop, run_linear
from caco_scale.evaluate.__main__ import parse
from caco_scale.evaluate.feature_cache import block_ranges
from caco_scale.evaluate.heads import LinearHeads, Score, growth, score_features
from caco_scale.evaluate.loop import LabelledImages
from caco_scale.evaluate.run_linear import FAST_LRS, choose, choose_held_out, fast_lengths
from caco_scale.evaluate.task import build_task


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return make_place(tmp_path_factory.mktemp("linear") / "place")


def authors_steps(features, labels, lr, num_steps, start):
    """ops/LARS.py and torch's SGD as the authors' linear.py puts them together: LARC without clipping, eps 1e-8."""
    weight, bias = (t.clone().requires_grad_(True) for t in start)
    optimizer = torch.optim.SGD([weight, bias], lr, momentum=0.9)
    for step in range(num_steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * 0.5 * (1 + np.cos(np.pi * step / num_steps))
        optimizer.zero_grad()
        F.cross_entropy(features @ weight.T + bias, labels).backward()
        with torch.no_grad():
            for p in (weight, bias):
                norm, gradient_norm = p.norm(), p.grad.norm()
                if norm != 0 and gradient_norm != 0:
                    p.grad *= 0.001 * norm / (gradient_norm + 1e-8)
        optimizer.step()
    return weight.detach(), bias.detach()


def test_the_long_protocols_optimizer_is_the_authors():
    features, labels = separable(50)
    features = features.double()
    heads = LinearHeads([20.0], 4, 12, "lars", device="cpu", dtype=torch.float64, seed=3)
    start = heads.weight[0].clone(), heads.bias[0].clone()
    shares = torch.full((1, 50), 1 / 50, dtype=torch.float64)
    for step in range(30):
        heads.step(features, labels, shares, loop.cosine_decay(step, 30))
    weight, bias = authors_steps(features, labels, 20.0, 30, start)
    assert torch.allclose(heads.weight[0], weight, rtol=1e-6)
    assert torch.allclose(heads.bias[0], bias, rtol=1e-6)
    assert not torch.allclose(bias, torch.zeros(4).double(), atol=1e-3), "the bias is scaled, not frozen"


def test_heads_side_by_side_are_heads_alone():
    features, labels = separable(40)
    features, rates = features.double(), [0.1, 3.0]
    generator = torch.Generator().manual_seed(0)
    shares = torch.rand(2, 40, generator=generator, dtype=torch.float64) / 40

    def trained(rates, shares):
        heads = LinearHeads(rates, 4, 12, "sgd", device="cpu", dtype=torch.float64, seed=3)
        for _ in range(5):
            heads.step(features, labels, shares, 1.0)
        return heads

    both = trained(rates, shares)
    for head, rate in enumerate(rates):
        alone = trained([rate], shares[head : head + 1])
        assert torch.allclose(both.weight[head], alone.weight[0], rtol=1e-12)
    loss, weight, bias = both.gradients(features, labels, shares)
    w, b = both.weight.clone().requires_grad_(True), both.bias.clone().requires_grad_(True)
    losses = [
        (shares[h] * F.cross_entropy(features @ w[h].T + b[h], labels, reduction="none")).sum()
        for h in range(2)
    ]
    sum(losses).backward()
    assert torch.allclose(loss, torch.stack(losses).detach())
    assert torch.allclose(weight, w.grad)
    assert torch.allclose(bias, b.grad)


def trained_heads(train, rates, num_classes, epochs=30, batch_size=64):
    """Heads trained with SGD and a cosine on features (n, F), as ``--fast`` does."""
    heads = LinearHeads(
        [rate * batch_size / 256 for rate in rates],
        num_classes,
        train[0].shape[1],
        "sgd",
        device="cpu",
        dtype=torch.float64,
        seed=0,
    )
    features, labels = train[0].double(), train[1]
    shares = torch.full((len(rates), batch_size), 1 / batch_size, dtype=torch.float64)
    steps_per_epoch = len(labels) // batch_size
    for step in range(epochs * steps_per_epoch):
        epoch, position = divmod(step, steps_per_epoch)
        order = torch.from_numpy(permutation(len(labels), epoch))[position * batch_size :][:batch_size]
        heads.step(features[order], labels[order], shares, loop.cosine_decay(step, epochs * steps_per_epoch))
    return heads


def best_top1(train, val, num_classes):
    heads = trained_heads(train, FAST_LRS, num_classes)
    score = score_features(heads, *val, num_classes)
    return max(score.percent(head)["top1"] for head in range(len(FAST_LRS)))


def test_features_of_noise_are_near_chance():
    generator = torch.Generator().manual_seed(1)
    train, val = (
        (torch.randn(n, 32, generator=generator), torch.randint(0, 10, (n,), generator=generator))
        for n in (1000, 4000)
    )
    assert 8 < best_top1(train, val, 10) < 12.5


def test_the_labels_themselves_are_near_100():
    labels = torch.arange(1000) % 10
    assert best_top1(*((F.one_hot(labels[:n], 10).float(), labels[:n]) for n in (1000, 300)), 10) == 100


def test_the_sweep_nears_the_best_linear_classifier():
    """On Gaussian classes of one covariance the best classifier is linear and known: the nearest centre."""
    train, val = separable(2000, noise=1.5), separable(4000, seed=1, noise=1.5)
    centres = torch.from_numpy(np.random.default_rng(99).normal(size=(4, 12))).float()
    ideal = 100 * (torch.cdist(val[0], centres).argmin(1) == val[1]).float().mean().item()
    assert 70 < ideal < 98
    assert best_top1(train, val, 4) > ideal - 1


def test_images_whose_labels_say_nothing_are_near_chance(tmp_path):
    place = make_place(tmp_path / "place", num_images=600)
    result = run_linear.run(parse(words("linear", place, "--fast", "--epochs", 5, "--to", tmp_path / "to")))
    assert result["images"] == 300
    assert 15 < result["top1"] < 35
    assert result["top1_interval"][0] < 25 < result["top1_interval"][1]


def test_images_of_the_classes_colours_are_near_100(tmp_path):
    """Through the command, from a folder of PNGs, with an encoder that never trained."""
    place = make_place(tmp_path / "place")
    for split, number in (("train", 30), ("val", 10)):
        for label, colour in enumerate(((220, 40, 40), (40, 220, 40), (40, 40, 220))):
            folder = tmp_path / "colours" / split / f"c{label}"
            folder.mkdir(parents=True)
            for i in range(number):
                noise = np.random.default_rng(i).integers(-20, 21, (18, 18, 3))
                (folder / f"{i}.png").write_bytes(encode((np.array(colour) + noise).astype(np.uint8), "PNG"))
    more = ("--fast", "--epochs", 20, "--batch_size", 16, "--to", tmp_path / "to")
    options = words("linear", place, "--data", tmp_path / "colours", *more)
    del options[options.index("--val") : options.index("--val") + 2]
    result = run_linear.run(parse(options))
    assert (result["top1"], result["images"]) == (100.0, 30)


def scores(right, total=10, loss=None):
    """A :class:`Score` of one class of ``total`` images, of which heads have ``right``."""
    score = Score(len(right), 1)
    score.images[:], score.loss = total, torch.tensor(loss or [0.0] * len(right)).double()
    score.top1[:, 0] = score.top5[:, 0] = torch.tensor(right)
    return score


def test_no_validation_label_chooses_the_rate():
    # The first four never saw these images; of two that are equally right there, the one with the lower loss counts.
    held_out = scores([5, 9, 9, 7, 0, 0, 0, 0], loss=[1.0, 4.0, 3.0, 2.0, 0, 0, 0, 0])
    val = scores([0, 0, 0, 0, 10, 8, 6, 9])
    result = choose([0.1, 1.0, 3.0, 10.0], held_out, val, [True] * 8)
    assert (result["lr"], result["top1"]) == (3.0, 60.0)
    assert result["best_on_validation"] == {"lr": 0.1, "top1": 100.0}
    assert [row["held_out_top1"] for row in result["results"]] == [50.0, 90.0, 90.0, 70.0]


def test_a_classifier_that_diverged_is_left_out_and_all_of_them_are_an_error():
    held_out, val = scores([5, 9, 0, 0]), scores([0, 0, 6, 8])
    finite = [True, False, True, True]
    result = choose([0.1, 1.0], held_out, val, finite)
    assert (result["lr"], result["results"][1]) == (0.1, {"lr": 1.0, "held_out_top1": None})
    with pytest.raises(
        ValueError, match=r"every classifier of the sweep diverged: give lower rates with --lr than 0\.1"
    ):
        choose([0.1, 1.0], held_out, val, [False, True, True, False])


def test_held_out_images_teach_the_first_heads_nothing(place):
    task = build_task(parse(words("linear", place)))
    images = LabelledImages(task, task.train, labels_of(task.train, ""), 16)
    batch = next(images.batches(0, 1))
    held_out = choose_held_out(64, seed=0)
    held_out[batch.ids[:4]] = True

    def trained(batch):
        heads = run_linear._build_heads(task, [1.0, 1.0], 16, "sgd")
        run_linear.FrozenEncoder(task, heads, held_out).update(batch, 1.0)
        return heads.weight

    labels = batch.labels.clone()
    labels[:4] = (labels[:4] + 1) % 4
    one, other = trained(batch), trained(batch._replace(labels=labels))
    assert torch.equal(one[0], other[0])
    assert not torch.allclose(one[1], other[1])


def test_scores_by_hand():
    score = Score(1, 6)
    logits = torch.eye(6)[torch.tensor([0, 1, 1, 2])] + torch.linspace(0.0, 0.5, 6)
    score.add(logits[None], torch.tensor([0, 1, 5, 0]))
    found = score.percent()
    assert found == {
        "top1": 50.0,
        "top5": 75.0,  # the last image's class 0 has the lowest of six logits
        "mean_per_class": pytest.approx(100 * (1 / 2 + 1 + 0) / 3),
        "loss": pytest.approx(F.cross_entropy(logits, torch.tensor([0, 1, 5, 0])).item()),
        "right": 2,
        "right_of_5": 3,
        "images": 4,
    }


def test_growth_is_what_lars_can_reach():
    """A gradient that never turns: the weights grow by nearly the e^growth that the warning speaks of."""
    heads = LinearHeads([1.0], 2, 1, "lars", device="cpu", dtype=torch.float64, seed=0)
    heads.weight[:] = torch.tensor([[0.01], [-0.01]])
    x, y = torch.tensor([[1e-6]], dtype=torch.float64), torch.tensor([0])
    for step in range(200):
        heads.step(x, y, torch.ones(1, 1, dtype=torch.float64), loop.cosine_decay(step, 200))
    reached = np.log(heads.weight.abs().max().item() / 0.01)
    assert 0.8 < reached / growth([1.0], 200)[0] <= 1.0


def test_the_fast_way_takes_more_epochs_of_fewer_images():
    assert fast_lengths(1_281_167) == (256, 10)
    assert fast_lengths(4096) == (64, 32)
    assert fast_lengths(300) == (8, 55)
    assert fast_lengths(5) == (8, 100)
    assert fast_lengths(4096, batch_size=128) == (128, 63)


def test_blocks_cover_a_set_once():
    for total in (1, 15, 61, 4096, 50_000):
        blocks = block_ranges(total)
        assert [i for block in blocks for i in block] == list(range(total))


LONG = ("--epochs", 6, "--batch_size", 12, "--lr", 300)
FAST = ("--fast", "--epochs", 12, "--batch_size", 12, "--lr", 0.1, 1, 10)


CENTRE = (*FAST, "--crops", "centre")


@pytest.mark.parametrize(
    "more",
    [LONG, *(pytest.param(other, marks=pytest.mark.long) for other in (FAST, CENTRE))],
    ids=["long", "fast", "centre"],
)
def test_one_two_and_three_processes_give_the_same_figures(place, tmp_path, more):
    results = []
    for ranks in (1, 2, 3):
        options = words("linear", place, *more, "--images_at_once", 8, "--to", tmp_path / str(ranks))
        results += run_ranks(run_of_rank, ranks, options)
    for result in results[1:]:
        for name in ("top1", "top5", "mean_per_class", "lr", "top1_interval"):
            assert result[name] == results[0][name]
        losses = [[epoch["loss"] for epoch in r.get("history", [])] for r in (result, results[0])]
        assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    assert results[0]["images"] == 32
    assert not (tmp_path / "2/features").exists()


def test_the_learning_rates_origin_stands_in_the_result(place, tmp_path):
    def source(*more):
        options = words(
            "linear", place, "--epochs", 1, "--batch_size", 32, *more, "--to", tmp_path / str(len(more))
        )
        result = run_linear.run(parse(options))
        return result["lr"], result["lr_source"], result["settings"]["lr"]

    assert source() == (0.025, "the authors' command (their parser's default is 0.1)", [0.025])
    assert source("--lr", 0.1)[:2] == (
        0.1,
        "given by --lr (the authors' command has 0.025, their parser's default is 0.1)",
    )


def test_too_few_steps_to_learn_from_are_told(place, tmp_path, capsys):
    run_linear.run(
        parse(words("linear", place, "--epochs", 1, "--batch_size", 32, "--to", tmp_path / "long"))
    )
    assert "warning: in 2 steps LARS lets the classifier grow by e^0.0 at most" in capsys.readouterr().out
    run_linear.run(
        parse(words("linear", place, "--fast", "--epochs", 1, "--batch_size", 32, "--to", tmp_path / "fast"))
    )
    assert "warning: 2 steps are few for a linear classifier" in capsys.readouterr().out


def test_training_images_are_random_resized_crops_and_flips(place, tmp_path):
    task = build_task(parse(words("linear", place)))
    images = LabelledImages(task, task.train, labels_of(task.train, ""), 16)
    epochs = [list(images.batches(start, start + 4)) for start in (0, 4)]
    for epoch in epochs:
        labels = torch.cat([batch.labels for batch in epoch])
        assert sorted(labels.tolist()) == sorted([0, 1, 2, 3] * 16)
        assert epoch[0].images.shape == (16, 3, 16, 16)
    assert not torch.equal(epochs[0][0].images, epochs[1][0].images)
    again = next(images.batches(4, 5))
    assert torch.equal(again.images, epochs[1][0].images), (
        "the same step gives the same images after a resume"
    )


def evaluation(options, num_processes=1):
    """The started command; several processes by accelerate, as a user starts them."""
    launcher = (
        ["-m", "accelerate.commands.launch", *by("ddp", num_processes)["launcher"]]
        if num_processes > 1
        else []
    )
    return start_command([sys.executable, *launcher, "-m", "caco_scale.evaluate", *options], ROOT)


@pytest.mark.parametrize("more", [LONG, pytest.param(FAST, marks=pytest.mark.slow)], ids=["long", "fast"])
def test_a_killed_evaluation_goes_on_and_ends_in_the_same_result(place, tmp_path, more):
    """Killed among the blocks of features and again in the training; 2 processes take over from 1."""
    whole = run_linear.run(parse(words("linear", place, *more, "--to", tmp_path / "whole")))
    folder = tmp_path / "killed"
    options = words("linear", place, *more, "--to", folder)
    kill_when(evaluation(options), lambda: list(folder.glob("features/val/*.safetensors")), signal.SIGKILL)
    kill_when(evaluation(options), lambda: (folder / "state.pt").exists(), signal.SIGKILL)
    state = torch.load(folder / "state.pt", weights_only=True)["progress"]["step"]
    assert state > 0
    resumed = run_ranks(run_of_rank, 2, options)[0]
    for name in ("top1", "top5", "mean_per_class", "lr"):
        assert resumed[name] == whole[name]
    assert json.loads((folder / "result.json").read_text())["environment"]["world_size"] == 2
    if more is LONG:
        assert [e["loss"] for e in resumed["history"]] == pytest.approx(
            [e["loss"] for e in whole["history"]], rel=1e-6
        )


@pytest.mark.long
def test_a_stopped_evaluation_saves_at_that_step_and_ends_in_the_same_result(place, tmp_path):
    many = ("--epochs", 10, "--batch_size", 1, "--lr", 20)  # 64 steps an epoch
    options = words("linear", place, *many, "--to", tmp_path / "stopped")
    process, state = evaluation(options), tmp_path / "stopped/state.pt"
    output = kill_when(process, state.exists, signal.SIGUSR1)
    assert process.returncode == 0, output
    step = int(re.search(r"stopped by SIGUSR1 after step (\d+) of 640: the same command goes on", output)[1])
    assert torch.load(state, weights_only=True)["progress"]["step"] == step < 640, output
    assert not (tmp_path / "stopped/result.json").exists()
    resumed = run_linear.run(parse(options))
    whole = run_linear.run(parse(words("linear", place, *many, "--to", tmp_path / "whole")))
    assert [e["loss"] for e in resumed["history"]] == [e["loss"] for e in whole["history"]]
    assert resumed["top1"] == whole["top1"]


def test_centre_crops_train_on_the_features_that_they_are_judged_on(place, tmp_path, capsys):
    options = words(
        "linear", place, "--fast", "--crops", "centre", "--batch_size", 16, "--lr", 1, "--seed", 3
    )
    task = build_task(parse(options))
    folder = task.folder(parse([*options, "--to", str(tmp_path / "features")]), "centre", {})
    features = run_linear.features_of(task, task.train, folder, "train")
    labels = labels_of(task.train, "")
    images = run_linear.CentreCrops(task, task.train, labels, 16, features)
    random = LabelledImages(task, task.train, labels, 16)
    for centre, other in zip(images.batches(2, 5), random.batches(2, 5), strict=True):
        assert np.array_equal(centre.global_ids, other.global_ids)
        assert torch.equal(centre.labels, other.labels)
        assert torch.equal(centre.images, features.features[torch.from_numpy(centre.ids)])
    result = run_linear.run(parse([*options, "--epochs", "2", "--to", str(tmp_path / "to")]))
    assert result["settings"]["crops"] == "centre"
    printed = capsys.readouterr().out
    assert "fast linear (centre crops) evaluation" in printed
    assert "trained on centre crops, judged on centre crops" in printed
    with pytest.raises(ValueError, match="--crops centre goes with --fast"):
        run_linear.run(parse(words("linear", place, "--crops", "centre")))


def test_a_damaged_state_is_one_line(place, tmp_path):
    options = words("linear", place, *FAST, "--to", tmp_path)
    run_linear.run(parse(options))
    (tmp_path / "result.json").unlink()
    (tmp_path / "state.pt").write_bytes((tmp_path / "state.pt").read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"state\.pt cannot be read .*: remove it to begin anew") as caught:
        run_linear.run(parse(options))
    assert "\n" not in str(caught.value)
