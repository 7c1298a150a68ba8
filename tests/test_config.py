"""Recipes and flags: what is read, what is refused and how it is said."""

import json
import math
import os

import pytest

from caco_scale import config as configuration
from caco_scale.config import (
    check,
    flatten,
    from_dict,
    load_recipe,
    parse,
    recipe_names,
    replace,
    to_dict,
    to_yaml,
)
from caco_scale.errors import UserError
from caco_scale.method.encoders import read_options


def test_flags_win_over_the_recipe_and_the_recipe_over_the_defaults():
    config = parse(["demo", "--bank.size", "131072", "--optim.lr=0.2", "--views.blur-p", "0.5", "0.25"])
    assert (config.bank.size, config.optim.lr, config.views.blur_p) == (131072, 0.2, (0.5, 0.25))
    assert config.model.arch == "tiny"  # the recipe's
    assert config.bank.momentum == 0.9  # the default
    assert config.run.dir == "runs/demo"


def test_underscores_and_hyphens_and_lower_case_booleans():
    for flag in ("--eval.knn_every", "--eval.knn-every"):
        assert parse(["demo", flag, "7"]).eval.knn_every == 7
    assert parse(["--eval.baselines", "false"]).eval.baselines is False
    assert parse(["--eval.baselines=true"]).eval.baselines is True
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
    values, others = flatten(parse([baseline])), flatten(parse([recipe]))
    changed = {name for name in values if values[name] != others[name]} - {"recipe", "run.dir"}
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
        ("bank: {size: }", "bank.size has no value: give one, or leave the line out"),
        ("data: {shards: null}", "data.shards has no value"),
        ("bank: {size: [3, 4]}", "bank.size is .*: give a whole number"),
        ("views: {blur_p: [1, 0, 0]}", "views.blur_p is .*: give 2 numbers"),
        (
            "bank: {size: 3}\noptim: {lr: 1}\nbank: {lr: 2}",
            "bank is given twice, in lines 1 and 3: join the two",
        ),
        (
            "optim:\n  lr: 0.1\n  epochs: 9\n  lr: 0.2",
            "lr is given twice, in lines 2 and 4: keep one of them",
        ),
        ("optim: {lr: 0.1, lr: 0.2}", "lr is given twice, in lines 1 and 1"),
        ("recipe: a\nrecipe: b", "recipe is given twice"),
        ("? [a, b]\n: 3", "is not a YAML file"),
        ("7: 3", "unknown field 7"),
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


def test_values_of_a_recipe_are_the_words_that_stand_there(tmp_path):
    text = "data: {shards: 010, val_shards: -x}\nrun: {dir: 2026-01-01}\neval: {baselines: no}\n"
    text += "views: {jitter: [1, 0.5, 0, 1e-3]}\n"
    (tmp_path / "mine.yaml").write_text(text)
    config = parse([str(tmp_path / "mine.yaml"), "--precision.compile", "on", "--data.audit=-y"])
    assert (config.data.shards, config.data.val_shards, config.data.audit) == ("010", "-x", "-y")
    assert (config.run.dir, config.eval.baselines, config.precision.compile) == ("2026-01-01", False, "true")
    assert config.views.jitter == (1.0, 0.5, 0.0, 0.001)
    assert config.recipe == "mine"


def test_options_of_a_backbone_are_words_or_a_section(tmp_path):
    (tmp_path / "mine.yaml").write_text("model: {options: {depth: 4, layers: [2, 2], rate: 1e-3, act: gelu}}")
    config = parse([str(tmp_path / "mine.yaml")])
    assert config.model.options == ("depth=4", "layers=[2, 2]", "rate=1e-3", "act=gelu")
    assert read_options(config.model.options) == {"depth": 4, "layers": [2, 2], "rate": 0.001, "act": "gelu"}
    (tmp_path / "again.yaml").write_text(to_yaml(config))
    assert parse([str(tmp_path / "again.yaml")]).model == config.model
    assert parse([str(tmp_path / "mine.yaml"), "--model.options", "depth=2"]).model.options == ("depth=2",)
    with pytest.raises(UserError, match=r"model.options is depth: give NAME=VALUE"):
        parse(["demo", "--model.options", "depth"])


def test_a_sections_values_may_be_anothers(tmp_path):
    text = "loss: &cool {temperature: 0.5}\nbank: {<<: *cool, size: 9, temperature: 0.7}\n"
    (tmp_path / "mine.yaml").write_text(text)
    config = parse([str(tmp_path / "mine.yaml")])
    assert (config.loss.temperature, config.bank.temperature, config.bank.size) == (0.5, 0.7, 9)


def test_every_number_has_a_rule():
    for name, value in flatten(configuration.Config()).items():
        if isinstance(value, int | float | tuple) and not isinstance(value, bool) and value != ():
            bad = tuple(-1.0 for _ in value) if isinstance(value, tuple) else type(value)(-1)
            with pytest.raises(UserError, match=f"{name} is -1"):
                check(replace(configuration.Config(), **{name.replace(".", "__"): bad}))


def test_a_checkpoints_values_are_read_as_a_recipe_is():
    values = json.loads(json.dumps(to_dict(parse(["demo"]))))
    assert from_dict(values, "x") == parse(["demo"])
    values["bank"]["size"] = "many"
    with pytest.raises(UserError, match=r"^step_1 config: bank.size is 'many', which is not int"):
        from_dict(values, "step_1 config")
    with pytest.raises(UserError, match=r"unknown field bank.color"):
        from_dict({"bank": {"color": 3}}, "x")


def test_what_a_run_keeps_of_its_places_holds_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = [
        "--data.val_shards",
        "s3://bucket/val",
        "--run.dir",
        "r",
        "--model.weights",
        "w.pth",
        "--data.audit",
        "a",
    ]
    config = parse(["demo", "--data.shards", "", "--data.mix", "a=1", "/b=0.5", "gs://c/d=2", *words])
    kept = configuration.with_absolute_places(config)
    assert kept.data.mix == (f"{tmp_path}/a=1", "/b=0.5", "gs://c/d=2")
    assert (kept.data.shards, kept.data.val_shards) == ("", "s3://bucket/val")
    places = (kept.run.dir, kept.model.weights, kept.data.audit)
    assert places == tuple(f"{tmp_path}/{name}" for name in ("r", "w.pth", "a"))
    assert (kept.data.cache_dir, kept.run.resume) == ("auto", "auto")
    assert configuration.with_absolute_places(kept) == kept
    assert configuration.differences(config, kept) == []  # what 0.1 kept is the same place
    monkeypatch.chdir("/")
    assert configuration.differences(kept, config) == [f"model.weights: {tmp_path}/w.pth -> w.pth"]
    assert configuration.makes_its_data(configuration.with_absolute_places(parse(["demo"])))


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


def aliases(levels, wide=10, merge=False):
    """A few short lines that stand for ``wide ** levels`` values."""
    lines = ["a0: &a0 {k0: 1}" if merge else "a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    for level in range(1, levels):
        many = ", ".join([f"*a{level - 1}"] * wide)
        inside = f"{{<<: [{many}], k{level}: 1}}" if merge else f"[{many}]"
        lines.append(f"a{level}: &a{level} {inside}")
    return "\n".join(lines)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (aliases(9), "unknown field a0"),
        (f"bank:\n  size: &a0 [1]\n{aliases(9)}\noptim: *a8", "duplicate anchor"),
        (f"recipe: {{{aliases(9).replace(chr(10), ', ')}}}\nbank: 3", "bank is a section, not a value"),
        ("views:\n  blur_p: [" + "[" * 300 + "]" * 300 + ", 1]", r"views\.blur_p is \[\[|nested too deep"),
        ("bank: {size: {a: 3}}", r"bank\.size is {'a': '3'}: give a whole number"),
        (aliases(7, merge=True), "200 at most|unknown field a0"),
        ("bank: " + "[" * 5000, "nested too deep"),
        ("bank: " + "{a: " * 3000 + "}" * 3000, "nested too deep"),
        ("run: {dir: " + "x" * 100_000 + "}", "100,012 bytes, 100,000 at most"),
        ("run: {dir: " + "x" * 50_000 + "}", r"run\.dir is x+\.\.\. \(50,000 characters\): no file can have"),
        ("x" * 900 + ": 3", "unknown field"),
        ("run: {" + "x" * 900 + ": 3}", "unknown field"),
        ("run: 2020-13-45", "run is a section"),
        ("bank: !!python/object:os.system {}", "is not a YAML file"),
        ("\x00", "is not a YAML file"),
        ("base: &b {lr: 1}\noptim: {<<: *b, lr: 2}", "unknown field base"),
    ],
)
def test_a_file_of_too_much_is_one_short_line(text, message, tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=message) as caught:
        load_recipe(path)
    assert len(str(caught.value)) < 1500


def test_a_file_that_is_none_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.yaml")
    for name in (tmp_path / "pipe.yaml", "/dev/zero", tmp_path, "x" * 300, "a/" * 3000):
        with pytest.raises(UserError, match="no recipe"):
            load_recipe(name)


def test_merged_keys_are_given_once(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("optim: &o {lr: 0.5, epochs: 30}\nbank: {size: 7}\n")
    assert load_recipe(path).optim.epochs == 30
    path.write_text("optim:\n  <<: {lr: 0.5, epochs: 30}\n  lr: 0.7\n")
    assert (load_recipe(path).optim.lr, load_recipe(path).optim.epochs) == (0.7, 30)
    path.write_text("optim:\n  <<: {lr: 0.5}\n  <<: {epochs: 30}\n")
    with pytest.raises(UserError, match="<< is given twice, in lines 2 and 3"):
        load_recipe(path)


PATHS = ("run.dir", "run.resume", "data.audit", "data.cache_dir")


def test_home_is_written_out_in_flags_and_recipes(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    names, path = (*PATHS, "data.shards", "data.val_shards"), tmp_path / "mine.yaml"
    path.write_text(
        "run: {dir: ~/x, resume: ~/x}\ndata: {audit: ~/x, cache_dir: ~/x, shards: ~/x, val_shards: ~/x}\n"
    )
    one_word, two_words = (
        [f"--{name}=~/x" for name in names],
        [w for name in names for w in (f"--{name}", "~/x")],
    )
    for words in (one_word, two_words, [str(path)], ["~/mine.yaml"]):
        monkeypatch.setenv("HOME", str(tmp_path) if words == ["~/mine.yaml"] else "/home/someone")
        found = flatten(parse(words))
        assert {found[name] for name in names} == {os.path.expanduser("~/x")}, words
    assert parse(["--run.dir=~root/x", "--data.audit=./~"]).run.dir == "/root/x"
    with pytest.raises(UserError, match=r"there is no user 'nobody-here'; write \./~nobody-here/x for"):
        parse(["--run.dir=~nobody-here/x"])


DEMO = configuration.load_recipe("demo")


def refused(name, value):
    """The error for a field's value."""
    with pytest.raises(UserError) as caught:
        check(replace(DEMO, **{name.replace(".", "__"): value}))
    return str(caught.value)


@pytest.mark.parametrize("name", PATHS)
def test_a_path_is_none_of_an_object_store_and_can_be_a_files(name):
    for value in ("s3://bucket/x", "gs://b", "s3:/bucket/x", "https://h/x", "file:///tmp/x"):
        assert f"{name} is {value}: give a path" in refused(name, value)
    for value in ("x" * 256, "a/" * 2100, "\u00fc" * 128, "a\0b"):
        message = refused(name, value)
        assert "no file can have this name" in message
        assert len(message) < 400
    check(replace(DEMO, **{name.replace(".", "__"): "x" * 255}))


@pytest.mark.parametrize("value", ["", " "])
def test_an_empty_run_directory_is_an_error(value):
    with pytest.raises(
        UserError, match=r"run\.dir is empty: give a directory, or leave it out for runs/demo"
    ):
        parse(["demo", f"--run.dir={value}"])


NUMBERS = {n: v for n, v in flatten(configuration.Config()).items() if type(v) in (int, float)}


def test_no_number_is_beyond_what_a_run_can_count():
    for name, default in NUMBERS.items():
        values = (10**30, -1) if isinstance(default, int) else (math.nan, math.inf, -math.inf, 1e300, -1.0)
        for value in values:
            assert refused(name, value).startswith(f"{name} is {value}: ")
    with pytest.raises(UserError, match=r"--run\.timeout_seconds is 1e\+300: give at most 10000000"):
        parse(["--run.timeout_seconds=1e300"])
