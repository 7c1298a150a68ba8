"""What an unknown flag may have meant: what people type for it, not what its letters are near to."""

import importlib

import pytest

from caco_scale.commands import table as commands
from caco_scale.config import Config, parse
from caco_scale.doctor.__main__ import Plan
from caco_scale.doctor.estimate import Estimate
from caco_scale.errors import UserError
from caco_scale.flags.read import flag_types, read
from caco_scale.flags.suggest import MEANT, advice, distance, meant
from caco_scale.sweep.__main__ import read_arguments


def flags_of(command):
    """All that a command takes: flag -> how it is written."""
    name, _, part = command.partition(" ")
    kinds = commands.group(name)
    module = importlib.import_module(commands.COMMANDS[name].module)
    kind = kinds[part] if kinds else getattr(module, commands.COMMANDS[name].flags or "", None)
    own = list(flag_types(kind)) if kind else []
    recipe = list(flag_types(Config)) if kind is None or hasattr(kind, "takes_recipe") else []
    return {flag: f"--{flag}" for flag in own + recipe}


TYPED = {
    "pretrain": {
        "lr": "optim.lr",
        "lr_rate": "optim.lr",
        "learning_rate": "optim.lr",
        "optim.learning_rate": "optim.lr",
        "learing_rate": "optim.lr",
        "batch_size": "data.global_batch_size",
        "data.batch_size": "data.global_batch_size",
        "data": "data.shards",
        "dataset": "data.shards",
        "train_dir": "data.shards",
        "val": "data.val_shards",
        "epochs": "optim.epochs",
        "epcohs": "optim.epochs",
        "output": "run.dir",
        "out": "run.dir",
        "out_dir": "run.dir",
        "arch": "model.arch",
        "model": "model.arch",
        "backbone": "model.arch",
        "workers": "data.workers",
        "num_workers": "data.workers",
        "seed": "run.seed",
        "wd": "optim.weight_decay",
        "momentum": "optimizers' own momentum is fixed",
        "temperature": "--bank.temperature or --loss.temperature?",
        "image_size": "views.size",
        "size": "--views.size or --bank.size?",
        "pretrained": "model.weights",
        "checkpoint": "model.weights",
        "steps": "run.max_steps",
        "resume": "run.resume",
        "moco_k": "bank.size",
        "amp": "precision.compute",
        "gpus": "accelerate launch --num_processes N",
        "num_nodes": "accelerate launch --num_processes N",
        "device": "CUDA_VISIBLE_DEVICES",
        "deepspeed": "--config_file ds_configs/zero2.yaml",
        "bank.sise": "bank.size",
        "warmup_epochs": "--bank.warmup_epochs or --optim.warmup_epochs?",
    },
    "evaluate knn": {"batch_size": "images_at_once", "output": "to", "num_workers": "workers", "dataset": "data"},
    "evaluate linear": {"learning_rate": "lr", "bs": "batch_size", "val_dir": "val"},
    "export": {"out": "to", "output": "to", "overwrite": "force", "epoch": "step", "checkpoint": "run"},
    "report": {"output": "to", "out": "to", "imag": "images"},
    "doctor": {"gpus": "processes", "lr": "optim.lr"},
    "shards build": {"size": "short_side"},
    "estimate": {"num_gpus": "gpus", "batch_size": "data.global_batch_size"},
}  # fmt: skip


@pytest.mark.parametrize("command", TYPED)
def test_what_people_type_is_answered_with_what_they_mean(command):
    flags = flags_of(command)
    for typed, wanted in TYPED[command].items():
        said = advice(typed, flags)
        assert (f"(did you mean --{wanted}?)" if wanted in flags else wanted) in said, (typed, said)


def test_every_target_of_the_table_is_a_flag_of_some_command():
    there = {flag for name in commands.every_command() for flag in flags_of(name)}
    assert {flag for names in MEANT for flag in names.split(" | ")} <= there


def test_letters_decide_only_where_a_name_is_misspelt():
    flags = flags_of("pretrain")
    for typed in ("bank", "frequency", "nesterov", "data.augmentation", "verbose", "debug", "x"):
        assert meant(typed, flags) == [], typed
    pairs = [("lr", "lr"), ("tto", "to"), ("bnak", "bank"), ("abc", "xyz"), ("sizes", "size"), ("a", "abcd")]
    assert [distance(a, b, 2) for a, b in pairs] == [0, 1, 1, 3, 1, 3]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--lr", "0.1"], r"unknown flag --lr \(did you mean --optim.lr\?\): P --help lists them all"),
        (["demo", "--batch-size", "4"], r"unknown flag --batch-size \(did you mean --data.global_batch_size\?\)"),
        (["--config", "mine.yaml"], r"unknown flag --config \(give RECIPE without a flag\)"),
        (["-lr", "0.1"], r"unknown argument -lr \(did you mean --optim.lr\?\)"),
        (["demo", "-j", "8"], r"unknown argument -j \(did you mean --data.workers\?\)"),
        (["demo", "demo"], "unknown argument demo: P"),
        (["--bank.size", "8", "demo", "more"], "unknown argument more: P"),
    ],
)  # fmt: skip
def test_a_command_line_is_answered_so(words, message):
    with pytest.raises(UserError, match=message):
        parse(words, "P")


def test_an_argument_without_a_flag_is_named():
    from caco_scale.export.__main__ import Export

    with pytest.raises(UserError, match=r"unknown flag --checkpoint \(give RUN_OR_WEIGHTS without a flag\)"):
        read(Export, ["--checkpoint", "x"], "P")


def test_a_recipes_file_and_a_study_are_answered_alike(tmp_path):
    for text, field in (
        ("optim: {learning_rate: 1}", "optim.lr"),
        ("batch_size: 4", "data.global_batch_size"),
    ):
        (tmp_path / "mine.yaml").write_text(text)
        with pytest.raises(UserError, match=rf"unknown field [\w.]+ \(did you mean {field}\?\)"):
            parse([str(tmp_path / "mine.yaml")])
    (tmp_path / "study.yaml").write_text("recipe: demo\nflags: {lr: 1}\nruns: {a: {}}")
    with pytest.raises(UserError, match=r"unknown field lr \(did you mean optim.lr\?\)"):
        read_arguments([str(tmp_path / "study.yaml")])


@pytest.mark.parametrize(
    "flags",
    [
        "--bank.size 99",
        "--bank.size=99 --data.relist",
        "--precision.compile false --bank.size 99",
        "--views.mean 0.1 0.2 0.3 --bank.size 99 --eval.baselines",
        "--bank.size 99 --optim.lr=-0",
        "--bank.size 99 --views.mean 0.1 0.2 0.3",
    ],
)
def test_a_recipe_stands_before_or_after_flags(flags):
    words = flags.split()
    before, after = parse(["cifar10_r18_200ep", *words]), parse([*words, "cifar10_r18_200ep"])
    assert before == after
    assert (after.recipe, after.bank.size) == ("cifar10_r18_200ep", 99)
    assert parse(words).recipe == "demo"


def test_of_commands_with_flags_of_their_own_too(capsys, tmp_path):
    config, plan = parse(["--processes", "2", "cifar10_r18_200ep"], "P", Plan)
    assert (config.recipe, plan.processes) == ("cifar10_r18_200ep", 2)
    config, flags = parse(["--gpus", "2", "cifar10_r18_200ep", "--price", "3"], "P", Estimate)
    assert (config.recipe, flags.price) == ("cifar10_r18_200ep", 3)
    with pytest.raises(SystemExit):
        parse(["--help", "cifar10_r18_200ep"], "P")
    assert "those of cifar10_r18_200ep" in " ".join(capsys.readouterr().out.split())
    (tmp_path / "study.yaml").write_text("recipe: demo\nruns: {a: {}}")
    assert read_arguments(["--jobs", "2", str(tmp_path / "study.yaml")])[1].jobs == 2
