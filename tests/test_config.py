"""Recipes and flags: what is read, what is refused and how it is said."""

import json

import pytest

from caco_scale import config as configuration
from caco_scale.config import flatten, from_dict, parse, recipe_names, replace, to_dict, to_yaml
from caco_scale.errors import UserError


def test_flags_win_over_the_recipe_and_the_recipe_over_the_defaults():
    config = parse(["demo", "--bank.size", "131072", "--optim.lr=0.2", "--views.blur-p", "0.5", "0.25"])
    assert (config.bank.size, config.optim.lr, config.views.blur_p) == (131072, 0.2, (0.5, 0.25))
    assert config.model.arch == "tiny"  # the recipe's
    assert config.bank.momentum == 0.9  # the default
    assert config.run.dir == "runs/demo"


def test_underscores_and_hyphens_and_lower_case_booleans():
    for flag in ("--eval.knn_every", "--eval.knn-every"):
        assert parse(["demo", flag, "7"]).eval.knn_every == 7
    assert parse(["--precision.compile", "true"]).precision.compile is True
    assert parse(["--precision.compile=true"]).precision.compile is True
    assert parse(["--data.shards", "true"]).data.shards == "true"


def test_no_recipe_is_the_demo():
    assert parse([]) == parse(["demo"])


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_reads_and_its_saved_config_is_a_recipe_that_reproduces_it(name, tmp_path):
    config = parse([name])
    path = tmp_path / "config.yaml"
    path.write_text(to_yaml(config))
    assert parse([str(path)]) == config == from_dict(json.loads(json.dumps(to_dict(config))), "values")


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_has_a_header_with_source_hardware_command_and_score(name):
    header = [
        line for line in (configuration.RECIPES / f"{name}.yaml").read_text().splitlines() if line[:1] == "#"
    ]
    text = "\n".join(header)
    assert "Command:" in text
    assert ("Score:" in text and "Hardware:" in text) or name == "demo"


@pytest.mark.parametrize(
    ("baseline", "recipe"),
    [
        ("demo_moco", "demo"),
        ("demo_adco", "demo"),
        ("moco_r50_200ep", "caco_r50_200ep"),
        ("adco_r50_200ep", "caco_r50_200ep"),
    ],
)
def test_a_baseline_is_its_recipe_with_another_rule(baseline, recipe):
    changed = {
        name
        for name, value in flatten(parse([baseline])).items()
        if value != flatten(parse([recipe]))[name] and name not in ("recipe", "run.dir")
    }
    lengths = {"optim.epochs", "bank.warmup_epochs", "bank.warmup_ramp_steps"}
    assert "bank.rule" in changed
    assert changed <= {"bank.rule", "bank.temperature", "loss.temperature"} | lengths

    def epochs(name):
        config = parse([name])
        return config.optim.epochs + config.bank.warmup_epochs

    assert epochs(baseline) == epochs(recipe)
    assert configuration.makes_its_data(parse([baseline])) == baseline.startswith("demo")


def test_the_papers_recipes_have_the_papers_numbers():
    expected = {  # arXiv:2203.14370: batch, epochs, local crops
        "caco_r50_200ep": (1024, 200, 0),
        "caco_r50_200ep_b4096": (4096, 200, 0),
        "caco_r50_800ep": (4096, 800, 0),
        "caco_r50_800ep_multicrop": (2048, 800, 6),
    }
    for name, numbers in expected.items():
        c = parse([name])
        assert (c.data.global_batch_size, c.optim.epochs, c.views.num_local_crops) == numbers
        assert (c.model.arch, c.bank.size, c.model.embedding_dim) == ("resnet50", 65536, 256)
        assert (c.loss.temperature, c.bank.temperature, c.bank.lr, c.bank.momentum) == (0.08, 0.08, 3.0, 0.9)
        assert (c.optim.name, c.optim.lr, c.optim.weight_decay, c.ema.momentum) == ("lars", 0.3, 1.5e-6, 0.99)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--bank.sise", "4"], r"unknown flag --bank.sise \(did you mean --bank.size\?\)"),
        (["--bank.size=4", "--optim.learning_rate", "1"], "unknown flag --optim.learning_rate"),
        (["demoo"], r"no recipe 'demoo' \(did you mean demo\?\)"),
        (["--bank.size", "many"], "--bank.size is 'many', which is not int"),
        (["--bank.size"], "--bank.size has no value: give a whole number"),
        (["--bank.rule", "caca"], "--bank.rule is 'caca': give one of caco, adco, moco"),
        (["--bank.size", "0"], "bank.size is 0: give a number above 0"),
        (["--optim.lr", "-1"], "optim.lr"),
        (["--optim.lr", "nan"], "optim.lr is nan"),
        (["--run.seed", str(2**63)], "below 2"),
        (["--views.jitter_p", "1.5"], "a probability is at most 1"),
        (["--views.scale", "0.9", "0.2"], "0 < least <= most <= 1"),
        (["--optim.epochs", "5", "--optim.warmup_epochs", "5"], "must be below optim.epochs 5"),
        (["--ema.momentum", "1.5"], "a momentum is at most 1"),
        (["demo", "stray"], "stray"),
    ],
)
def test_a_wrong_flag_is_one_line_that_names_it(arguments, message):
    with pytest.raises(UserError, match=message) as caught:
        parse(arguments)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("bank: {sise: 3}", r"unknown field bank.sise \(did you mean bank.size\?\)"),
        ("bnak: {size: 3}", r"unknown field bnak \(did you mean bank\?\)"),
        ("bank: 3", "bank is a section"),
        ("bank: {size: three}", "bank.size is 'three', which is not int"),
        ("bank: {size: 2.5}", "bank.size is 2.5, which is not int"),
        ("views: {scale: [0.2]}", "give 2 numbers"),
        ("bank: {rule: caca}", "give one of caco, adco, moco"),
        ("- a list", "holds no sections"),
        ("bank: {size: 3", "is not a YAML file"),
    ],
)
def test_a_wrong_recipe_is_one_line_that_names_file_and_field(text, message, tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=message) as caught:
        parse([str(path)])
    assert "mine.yaml" in str(caught.value)


def test_a_number_that_yaml_reads_as_text_is_a_number(tmp_path):
    (tmp_path / "mine.yaml").write_text("optim: {weight_decay: 1e-6}")  # YAML 1.1 reads 1e-6 as a string
    assert parse([str(tmp_path / "mine.yaml")]).optim.weight_decay == 1e-6


def test_a_resume_may_change_speed_but_not_the_mathematics():
    saved = parse(["demo"])
    free = replace(
        saved, data__workers=9, data__micro_batch_size=2, run__max_steps=5, bank__exchange="logits"
    )
    assert configuration.differences(saved, free) == []
    changed = replace(saved, bank__size=5, run__seed=1, optim__epochs=99)
    assert configuration.differences(saved, changed) == [
        "run.seed: 0 -> 1",
        "bank.size: 1024 -> 5",
        f"optim.epochs: {saved.optim.epochs} -> 99",
    ]


def test_help_shows_every_field_with_its_default(capsys):
    with pytest.raises(SystemExit) as caught:
        parse(["demo", "--help"])
    assert caught.value.code == 0
    shown = capsys.readouterr().out.replace("_", "-")
    assert "--recipe" not in shown
    for name in flatten(parse(["demo"])).keys() - {"recipe"}:
        assert f"--{name}".replace("_", "-") in shown
    assert "1024" in shown
