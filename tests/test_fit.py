"""Values that follow the number of images, and what of a recipe does not fit it."""

import os
import re
import shlex

import numpy as np
import pytest
import torch
import yaml
from launch import SMALL
from PIL import Image
from shard_sets import make_shard_set

import caco_scale
from caco_scale.config import check, flatten, from_dict, load_recipe, parse, replace, to_dict, to_yaml
from caco_scale.config.fit import RULES, auto_fields, fit
from caco_scale.data.channel_stats import channel_stats
from caco_scale.data.order import Order
from caco_scale.data.store import open_store
from caco_scale.data.workers import too_many_workers
from caco_scale.doctor.checks import examine_start
from caco_scale.doctor.estimate import total_steps
from caco_scale.errors import UserError
from caco_scale.training.checks import Start
from caco_scale.training.fit import few_steps_for_lanes, fit_to_set, misfits
from caco_scale.weights.load import load_weights

OWN = ("own_images_small", "own_images")


def values(config):
    return [flatten(config)[name] for name in RULES]


@pytest.mark.parametrize(
    ("recipe", "images", "expected"),
    [  # batch, bank, epochs, lr warm-up, bank warm-up, its ramp
        ("own_images_small", 60, [8, 32, 800, 10, 40, 140]),
        ("own_images_small", 200, [16, 128, 800, 10, 40, 240]),
        ("own_images_small", 1_000, [32, 256, 800, 10, 40, 500]),
        ("own_images_small", 5_000, [64, 512, 800, 10, 40, 500]),
        ("own_images", 20_000, [256, 2048, 500, 10, 25, 500]),
        ("own_images", 100_000, [1024, 8192, 200, 10, 10, 485]),
        ("own_images", 1_281_167, [1024, 65536, 200, 10, 10, 500]),
    ],
)
def test_rules_by_the_number_of_images(recipe, images, expected):
    config, lines = fit(load_recipe(recipe), images)
    assert values(config) == expected
    assert [line.split()[0] for line in lines] == list(RULES)
    assert f"bank.size {expected[1]:,} for {images:,} images: an eighth of the images" in lines[1]
    assert auto_fields(config) == []


def test_every_number_of_images_gives_a_recipe_that_fits():
    recipes = [load_recipe(name) for name in OWN]
    for images in sorted({*range(80, 3000, 7), *(int(640 * 1.3**k) for k in range(35))}):
        for recipe in recipes:
            config, _ = fit(recipe, images)
            order = Order([images], seed=0, global_batch_size=config.data.global_batch_size)
            assert misfits(config, order, 1) == [], images
            assert order.steps_per_epoch * order.global_batch_size > 0.9 * images


def test_what_is_given_wins_and_the_rules_after_it_go_by_it():
    config = parse(["own_images_small", "--optim.epochs", "20", "--data.global_batch_size", "100"])
    config, lines = fit(config, 5_000)
    assert values(config) == [100, 512, 20, 1, 5, 125]
    assert not any(line.startswith(("optim.epochs", "data.global")) for line in lines)
    recipe = load_recipe("own_images")
    for epochs in range(1, 900):
        fit(replace(recipe, optim__epochs=epochs), 30_000)
    queue, lines = fit(parse(["own_images", "--bank.rule", "moco"]), 30_000)
    assert queue.bank.warmup_epochs == 0
    assert "bank.warmup_epochs 0 for 30,000 images: bank.rule moco needs none" in lines
    with pytest.raises(UserError, match=r"optim.warmup_epochs 30 must be below optim.epochs 20"):
        fit(parse(["own_images", "--optim.epochs", "20", "--optim.warmup_epochs", "30"]), 30_000)


def test_the_word_is_read_and_shown_wherever_a_value_is(capsys):
    config = parse(["demo", "--bank.size", "auto", "--optim.warmup_epochs=auto"])
    assert auto_fields(config) == ["bank.size", "optim.warmup_epochs"]
    assert to_dict(config)["bank"]["size"] == yaml.safe_load(to_yaml(config))["bank"]["size"] == "auto"
    assert from_dict(to_dict(config), "it") == config
    check(config)
    with pytest.raises(SystemExit):
        parse(["own_images", "--help"])
    shown = capsys.readouterr().out
    assert len(re.findall(r"\(default: auto\)", " ".join(shown.split()))) >= len(RULES)
    assert "1099511627776" not in shown


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--bank.size", "-1"], "bank.size is -1: give a number above 0"),
        (["--bank.size", "aut"], "--bank.size is 'aut', which is not int: give a whole number"),
        (["--bank.momentum", "auto"], "--bank.momentum is 'auto', which is not float"),
        (["--bank.size", "auto", "--optim.lr", "much"], "--optim.lr is 'much'"),
        (["--optim.epochs", "auto", "--run.max_steps", "auto"], "--run.max_steps is 'auto'"),
    ],
)
def test_what_is_no_number_and_not_auto_is_refused(words, message):
    with pytest.raises(UserError, match=message):
        parse(["demo", *words])


def test_a_run_keeps_its_numbers_whatever_the_rules_say_later(tmp_path, monkeypatch, capsys):
    shards = make_shard_set(tmp_path / "set", num_images=64, size=32)
    flags = {
        **SMALL,
        "data.shards": shards,
        "data.val_shards": "",
        "run.dir": tmp_path / "run",
        "data.workers": 0,
    }
    flags |= {"bank.size": "auto", "bank.warmup_ramp_steps": "auto", "run.max_steps": 2}
    monkeypatch.setitem(RULES, "bank.size", lambda n, _: (n // 4, "a quarter"))
    run = caco_scale.pretrain(**flags)
    assert "bank.size 16 for 64 images: a quarter" in capsys.readouterr().out
    assert (run.config.bank.size, run.config.bank.warmup_ramp_steps) == (16, 1)
    saved = load_recipe(tmp_path / "run/config.yaml")
    assert auto_fields(saved) == []
    monkeypatch.setitem(RULES, "bank.size", lambda n, _: (n // 2, "a half"))
    assert caco_scale.pretrain(**{**flags, "run.max_steps": 3}).config.bank.size == 16
    assert "bank.size 16, as in " in capsys.readouterr().out
    make_shard_set(tmp_path / "set", num_images=80, size=32)
    with pytest.raises(UserError, match=r"was trained on another data set \(64 images"):
        caco_scale.pretrain(**{**flags, "run.max_steps": 4})


def test_an_auto_without_a_set_is_the_sets_own_error(tmp_path):
    config = replace(load_recipe("own_images"), run__dir=str(tmp_path))
    with pytest.raises(UserError, match=r"data\.shards is empty"):
        fit_to_set(config)
    assert total_steps(config)[::2] == (1251 * 210, 1024)  # of ImageNet, as for every recipe


# ---- by the machine, and by measuring


def test_workers_follow_the_cores_of_a_process_and_too_many_are_one_line(monkeypatch):
    recipe = load_recipe("own_images_small")
    assert to_dict(recipe)["data"]["workers"] == "auto"
    for cores, processes, expected in ((2, 1, 1), (1, 1, 1), (16, 4, 3), (128, 1, 16), (2, 8, 1)):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _, cores=cores: set(range(cores)))
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
        given = replace(recipe, data__global_batch_size=8, bank__size=8, bank__warmup_epochs=0)
        given = replace(given, bank__warmup_ramp_steps=0, optim__epochs=4, optim__warmup_epochs=1)
        config, lines = fit_to_set(given)
        assert config.data.workers == expected
        assert len(lines) == 1
        assert lines[0].startswith(f"data.workers {expected} for {cores} core(s) and {processes} process(es)")
        assert fit_to_set(replace(given, data__workers=5))[0].data.workers == 5
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(4)))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert too_many_workers("data.workers", 2) is None
    line = too_many_workers("data.workers", 3)
    assert line.startswith("data.workers 3 for each of 2 processes here: more than the 4 core(s)")
    assert line.endswith("give --data.workers 1")


def colourful(folder, count=8):
    """Images that are halves of two colours, whose statistics are known."""
    folder.mkdir()
    pixels = np.zeros((32, 32, 3), np.uint8)
    pixels[:16] = (255, 51, 102)
    pixels[16:] = (0, 153, 102)
    pixels[:8, :, 2] = 204
    for number in range(count):
        Image.fromarray(pixels).save(folder / f"{number}.png")
    return pixels


def test_mean_and_deviation_are_measured_once_and_kept(tmp_path, monkeypatch, capsys):
    pixels = colourful(tmp_path / "set").reshape(-1, 3) / 255
    flags = {**SMALL, "data.shards": tmp_path / "set", "data.val_shards": "", "run.dir": tmp_path / "run"}
    flags |= {"views.size": 32, "run.max_steps": 1, "views.stats": "measure"}
    run = caco_scale.pretrain(**flags)
    assert run.config.views.mean == tuple(pixels.mean(0).round(4))
    assert run.config.views.std == tuple(pixels.std(0).round(4))
    assert run.config.views.stats == "given"
    assert "views.std 0.5 0.2 0.1732: measured on 8 of 8 training images" in capsys.readouterr().out
    assert load_recipe(tmp_path / "run/config.yaml").views == run.config.views
    assert load_weights(run.path).mean == run.config.views.mean
    monkeypatch.setattr("caco_scale.training.fit.channel_stats", None)  # nothing is measured at a resume
    assert caco_scale.pretrain(**{**flags, "run.max_steps": 2}).config.views == run.config.views
    assert "views.std 0.5 0.2 0.1732, as in " in capsys.readouterr().out


def test_a_sample_is_measured_by_the_seed_and_a_constant_channel_refused(tmp_path, monkeypatch):
    shards = make_shard_set(tmp_path / "set", num_images=24, size=32)
    monkeypatch.setattr("caco_scale.data.channel_stats.SAMPLE", 8)
    found = [channel_stats(open_store(shards), 32, seed=seed) for seed in (0, 0, 1)]
    assert found[0] == found[1] != found[2]
    assert found[0][2] == 8
    (tmp_path / "grey").mkdir()
    Image.new("RGB", (32, 32), (9, 9, 9)).save(tmp_path / "grey/a.png")
    with pytest.raises(UserError, match=r"channel 0 of 1 images of .*grey is the same everywhere"):
        channel_stats(open_store(str(tmp_path / "grey")), 32)


@pytest.mark.parametrize("name", ["mean", "std"])
def test_a_normalisation_is_given_or_measured(name, tmp_path):
    with pytest.raises(UserError, match=rf"views.{name} is given and views.stats is measure"):
        parse(["own_images", f"--views.{name}", "0.5", "0.4", "0.3", "--views.stats", "measure"])
    (tmp_path / "own.yaml").write_text("views: {stats: measure}\n")
    with pytest.raises(UserError, match=r"--views\.stats given"):
        parse([str(tmp_path / "own.yaml"), f"--views.{name}", "0.5", "0.4", "0.3"])
    assert (
        parse(["demo", "--views.stats", "measure"]).views.stats == "measure"
    )  # a flag overrules the recipe's


# ---- what does not fit

BASE = {"data.global_batch_size": 64, "bank.size": 512, "optim.epochs": 100, "optim.warmup_epochs": 5}


@pytest.mark.parametrize(
    ("images", "changes", "expected"),
    [
        (5_000, {}, None),
        (5_000, {"bank.size": 65536}, "bank.size 65,536 is more than the 5,000 images"),
        (
            5_000,
            {"data.global_batch_size": 512},
            "512 is more than a tenth of the 5,000 images: an epoch has 9 step",
        ),
        (
            5_000,
            {"bank.size": 5_000, "optim.epochs": 1, "optim.warmup_epochs": 0},
            "bank warm-up takes 79 steps",
        ),
        (
            5_000,
            {"bank.warmup_epochs": 101},
            "the bank warm-up takes 7,878 steps and the training after it 7,800",
        ),
        (5_000, {"optim.warmup_epochs": 60}, "optim.warmup_epochs 60 is more than half of optim.epochs 100"),
        (5_000, {"optim.warmup_epochs": 0.1}, "rises to its peak within 7.8 step"),
        (5_000, {"ema.momentum": 0.9999}, "the key encoder averages over 10,000"),
        (1_000, {"optim.epochs": 12}, "the training has 180 steps and the key encoder averages over 100"),
    ],
)
def test_a_misfit_is_named_with_numbers_and_its_flag_mends_it(images, changes, expected):
    words = lambda given: [f"--{name}={value}" for name, value in given.items()]
    arguments = ["demo", *words({**BASE, "bank.warmup_epochs": 1, **changes})]

    def found(arguments):
        config = parse(arguments)
        order = Order([images], seed=0, global_batch_size=config.data.global_batch_size)
        return misfits(config, order, 1)

    lines = found(arguments)
    if expected is None:
        assert lines == []
        return
    (line,) = [line for line in lines if expected in line]
    fix = shlex.split(line.rpartition("give ")[2])
    assert fix[0].startswith("--")
    assert not [line for line in found(arguments + fix) if expected.split(" ")[0] == line.split(" ")[0]]


def test_lanes_are_mentioned_where_an_epoch_has_fewer_steps():
    assert few_steps_for_lanes(Order([4_096], seed=0, global_batch_size=64)) is None
    line = few_steps_for_lanes(Order([4_096], seed=0, global_batch_size=128))
    assert "data.lanes 64 are more than the 32 steps" in line
    assert line.endswith("--data.lanes 32")
    Order([4_096], seed=0, global_batch_size=128, lanes=32)


def test_the_published_recipes_fit_their_sets():
    sets = {"cifar10_r18_200ep": 50_000, "demo": 4_096}
    for name in (
        "demo",
        "cifar10_r18_200ep",
        "caco_r50_200ep",
        "caco_r50_800ep_multicrop",
        "caco_vitb16_300ep",
    ):
        config, images = load_recipe(name), sets.get(name, 1_281_167)
        assert (
            misfits(config, Order([images], seed=0, global_batch_size=config.data.global_batch_size), 1) == []
        )


def test_the_doctor_says_rules_and_misfits(tmp_path):
    shards = make_shard_set(tmp_path / "set", num_images=96, size=32)
    words = [
        "own_images_small",
        "--data.shards",
        shards,
        "--run.dir",
        str(tmp_path / "run"),
        "--bank.size",
        "100",
    ]
    words += ["--model.arch", "tiny", "--views.size", "32", "--data.workers", "0"]
    words += ["--data.global_batch_size", "32"]
    start = Start(parse(words), "ddp", 0, 1, torch.device("cpu"))
    texts = [(finding.status, finding.text) for finding in examine_start(start, offloaded=False)]
    assert (
        "ok",
        "optim.epochs 800 for 96 images: 10 million images seen, 200 to 800 epochs",
    ) in texts
    warnings = [text for status, text in texts if status == "warn"]
    assert any("bank.size 100 is more than the 96 images" in text for text in warnings)
    assert any("data.global_batch_size 32 is more than a tenth" in text for text in warnings)
    assert not [text for status, text in texts if status == "FAIL"]
