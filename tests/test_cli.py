"""The one command: it lists and runs all, every one has help and answers a typo; the pages' are understood."""

import contextlib
import dataclasses
import importlib
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from accelerate.commands.launch import launch_command_parser
from launch import ROOT, SMALL, environment
from pages import PAGES
from shard_sets import make_shard_set

from caco_scale.__main__ import dispatch
from caco_scale.commands import table as commands
from caco_scale.commands.completion import script
from caco_scale.config import Config, parse
from caco_scale.config.values import flatten
from caco_scale.embed.__main__ import with_command
from caco_scale.errors import UserError
from caco_scale.flags import read as flags
from caco_scale.method.architectures import names, refuse_unknown
from caco_scale.sweep.__main__ import read_arguments
from caco_scale.training.places import look_early

EVERY = list(commands.every_command())
# Module commands that are not the name of a command of ``caco``.
MODULES = {
    "caco_scale.doctor.estimate": "estimate",
    "caco_scale.doctor.preflight": "preflight",
    "data_prep": "shards",
    "caco-shards": "shards",
}


def ended(capsys, arguments):
    """(exit code, stdout, stderr) of ``caco`` in this process."""
    with pytest.raises(SystemExit) as end:
        dispatch(arguments)
    output = capsys.readouterr()
    return end.value.code, output.out, output.err


def test_the_installed_program_is_this_one():
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert scripts == {"caco": "caco_scale.__main__:main", "caco-shards": "data_prep.__main__:main"}
    for place in scripts.values():
        module, _, function = place.partition(":")
        assert callable(getattr(importlib.import_module(module), function))


def test_alone_or_with_help_it_lists_every_command(capsys):
    for arguments in ([], ["--help"], ["-h"]):
        code, out, _ = ended(capsys, arguments)
        assert code == 0
        for name, about in commands.every_command().items():
            assert re.search(rf"^  {name} +{re.escape(about)}$", out, re.MULTILINE)
    assert {name.split()[0] for name in EVERY} == set(commands.COMMANDS)


@pytest.mark.parametrize("name", EVERY)
def test_every_command_has_help_and_answers_a_typo(capsys, name):
    code, out, _ = ended(capsys, [*name.split(), "--help"])
    assert code == 0
    assert f"usage: caco {name}" in out
    code, _, error = ended(capsys, [*name.split(), "--hepl"])
    assert code == 2
    assert error.startswith("error: unknown flag --hepl")
    assert f"caco {name} --help lists them all" in error
    assert error.count("\n") == 1


def test_every_field_of_every_command_has_its_line_of_help(capsys):
    for name in EVERY:
        _, out, _ = ended(capsys, [*name.split(), "--help"])
        if name == "pretrain":
            continue
        kinds = commands.group(name.split()[0])
        kind = kinds[name.split()[1]] if kinds else own_flags(name)
        for flag, hint in flags.flag_types(kind).items():
            line = out[re.search(rf"--{flag}\b", out).end() :] if not flags.is_positional(hint) else out
            assert re.search(r"[a-z]{3,}", line), (name, flag)


def own_flags(name):
    command = commands.COMMANDS[name]
    return getattr(importlib.import_module(command.module), command.flags)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["pretrian"], "'pretrian' is no command (did you mean pretrain?)"),
        (["evaluate"], "give one of knn, linear, finetune; caco evaluate --help"),
        (["shards", "bild"], "'bild' is no command (did you mean build?)"),
        (["evaluate", "knn", "--data", "x"], "give RUN_OR_WEIGHTS: caco evaluate knn --help"),
        (["pretrain", "demoo"], "no recipe 'demoo' (did you mean demo?)"),
        (["doctor", "--proceses", "2"], "(did you mean --processes?): caco doctor --help"),
        (["estimate", "demo"], "give --gpus: caco estimate --help"),
        (["path", "zero2"], "no file 'zero2' comes with caco_scale (did you mean ds_configs/zero2.yaml?)"),
        (["slurm", "inti"], "'inti' is no command (did you mean init?)"),
        (["completion", "tcsh"], "SHELL is 'tcsh': give one of bash, zsh"),
    ],
)
def test_a_typo_names_the_nearest(capsys, arguments, message):
    code, out, error = ended(capsys, arguments)
    assert (code, out, error.count("\n")) == (2, "", 1)
    assert message in error


NOWHERE = "/nowhere/at/all"
MISTAKES = [  # in the places and names that flags give
    *(
        ["pretrain", "demo", *f"--data.shards {place}".split()]
        for place in (NOWHERE, "pipe:cat", "s3:/b/x", "{tars}")
    ),
    ["pretrain", "demo", "--data.val_shards", NOWHERE],
    ["pretrain", "demo", "--data.mix", f"{NOWHERE}=1", "{tars}=2"],
    ["pretrain", "demo", "--model.arch", "resnet5000"],
    ["pretrain", "demo", "--model.arch", "timm/resnet5o"],
    ["pretrain", "demo", "--model.arch", "resnet50d"],
    ["pretrain", "demo", "--model.weights", NOWHERE],
    ["pretrain", "demo", "--run.resume", NOWHERE],
    ["pretrain", "demo", "--bank.size", "many"],
    ["pretrain", NOWHERE],
    ["sweep", NOWHERE],
    ["sweep", "{study}", "--data.shards", NOWHERE],
    ["evaluate", "knn", NOWHERE, "--data", "{tars}"],
    ["evaluate", "linear", "{file}", "--data", NOWHERE],
    ["evaluate", "finetune", "{file}", "--val", NOWHERE],
    ["evaluate", "knn", "{file}", "--arch", "resnet5000"],
    ["evaluate", "knn", "{file}", "--step", "3"],
    ["embed", NOWHERE, "--to", "x.npz"],
    ["embed", "{file}", "--data", NOWHERE, "--to", "x.npz"],
    ["export", NOWHERE, "--to", "x.pt", "--format", "torchvision"],
    ["report", NOWHERE],
    ["report", "{tars}"],
    ["doctor", NOWHERE],
    ["path", "ds_configs/zero9.yaml"],
    ["slurm", "init", "{file}"],
    ["slurm", "init", "s3://bucket/jobs"],
    ["shards", "build", NOWHERE, "to"],
    ["shards", "verify", NOWHERE],
    ["shards", "index", NOWHERE],
    ["shards", "repair", NOWHERE],
]


def test_no_command_imports_torch_before_it_has_read_its_flags_and_looked_at_places(tmp_path):
    """What makes --help and a mistake quick: one process asks all. Every mistake is one line, exit code 2."""
    places = {name: str(tmp_path / name) for name in ("tars", "file", "study")}
    Path(places["tars"]).mkdir()
    Path(places["tars"], "0.tar").touch()
    Path(places["file"]).touch()
    Path(places["study"]).write_text("recipe: demo\nseeds: [0, 1]\n")
    words = [[word.format(**places) for word in line] for line in MISTAKES]
    program = f"""
import contextlib, io, sys
from caco_scale.__main__ import dispatch
helps = [[*name.split(), word] for name in {EVERY!r} for word in ("--help", "--hepl")]
for line in [*helps, *{words!r}]:
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            dispatch(line)
    except SystemExit as end:
        assert "--help" in line or (end.code, said.getvalue().count("\\n")) == (2, 1), (line, end.code, said.getvalue())
    else:
        assert False, line
    for heavy in ("torch", "torchvision", "timm", "accelerate", "deepspeed", "webdataset"):
        assert heavy not in sys.modules, (heavy, line)
print("none")
"""
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment(), cwd=tmp_path, capture_output=True, text=True
    )
    assert done.stdout.endswith("none\n"), done.stderr


def test_of_several_nodes_no_process_looks_alone(monkeypatch):
    """A node whose disk lacks the set tells all: its processes meet the others first."""
    config = parse(["demo", "--data.shards", NOWHERE])
    for size, local, speaks in (("4", "2", False), ("4", None, False), ("4", "4", True), ("1", None, True)):
        monkeypatch.setenv("WORLD_SIZE", size)
        monkeypatch.setenv("LOCAL_WORLD_SIZE", local) if local else monkeypatch.delenv(
            "LOCAL_WORLD_SIZE", False
        )
        with pytest.raises(UserError, match=NOWHERE) if speaks else contextlib.nullcontext():
            look_early(config)


def test_the_names_of_architectures_are_those_of_the_libraries():
    """They are found in source files, so that a typo needs no torch; the libraries decide what is a model."""
    import timm
    from torchvision import models

    assert names("torchvision") == models.list_models(module=models)
    assert set(names("timm")) == set(timm.list_models())
    for arch in (
        "tiny",
        "resnet50",
        "timm/resnet50.a1_in1k",
        "timm/vit_tiny_patch16_224",
        "own.module:build",
    ):
        refuse_unknown(arch)


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("caco_scale", ""),
        ("caco_scale.pretrain", "pretrain"),
        ("caco_scale.evaluate", "evaluate"),
        ("caco_scale.export", "export"),
        ("caco_scale.report", "report"),
        ("caco_scale.doctor", "doctor"),
        ("caco_scale.doctor.estimate", "estimate"),
        ("caco_scale.doctor.preflight", "preflight"),
        ("caco_scale.benchmark", "benchmark"),
        ("caco_scale.sweep", "sweep"),
        ("data_prep", "shards"),
    ],
)
def test_every_module_is_its_command(tmp_path, module, name):
    words = [sys.executable, "-m", module, "--help"]
    done = subprocess.run(words, env=environment(), cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert f"usage: {f'python -m {module}' if name else 'caco'} " in done.stdout
    done = subprocess.run(
        [*words[:3], "--hepl"], env=environment(), cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1


def test_the_program_trains_with_loader_processes(tmp_path):
    """As pip installs it: a script that imports the entry point, which loader processes import again."""
    program = tmp_path / "caco"
    program.write_text(
        "import sys\nfrom caco_scale.__main__ import main\nif __name__ == '__main__':\n    sys.exit(main())\n"
    )
    shards = make_shard_set(tmp_path / "set", num_images=48, samples_per_shard=20)
    given = {**SMALL, "data.shards": shards, "data.workers": 1, "run.dir": "run", "run.max_steps": 2}
    words = [word for name, value in given.items() for word in (f"--{name}", str(value))]
    done = subprocess.run(
        [sys.executable, program, "pretrain", "demo", *words],
        env=environment(),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run/DONE").exists()


# ---- the pages' commands and names


def pages():
    """The text of the pages and of the recipes' headers, with lines that end in a backslash joined."""
    texts = [(ROOT / name).read_text() for name in PAGES]
    for recipe in sorted((ROOT / "caco_scale/recipes").glob("*.yaml")):
        texts.append("\n".join(re.findall("^#(.*)", recipe.read_text(), re.MULTILINE)))
    return re.sub(r" *\\\n *", " ", "\n".join(texts))


def written_commands():
    """Every command of the pages' blocks and lines, as the words after ``caco``."""
    text = pages()
    module = r"(?:python -m|launch [^\n`]*?-m) (caco_scale[\w.]*|data_prep) ([^\n`#|;]*)"
    pattern = module + r"|\b(caco|caco-shards) ([^\n`#|;)]*)"
    found = []
    for module, words, program, more in re.findall(pattern, text):
        words = shlex.split((words or more).split("  #")[0].rstrip(".,) "))
        if module:
            name = MODULES.get(module, module.removeprefix("caco_scale").lstrip("."))
            words = [name, *words] if name else words
        elif program == "caco-shards":
            words = ["shards", *words]
        if words and words[0] in commands.COMMANDS:
            found.append(words)
    return found


def test_the_fields_and_files_that_the_pages_name_are_there():
    text, known = pages(), flatten(Config())
    sections = "|".join({name.split(".")[0] for name in known})
    named = re.findall(rf"--((?:{sections})\.[a-z_]+)", text)
    # `run.path` is of the front door's Run, `model.safetensors` a file.
    others = sections.replace("run|", "").replace("|run", "")
    named += re.findall(rf"`((?:{others})\.(?!safetensors)[a-z_]+)(?=[`=])", text)
    assert len(set(named)) > 50
    assert set(named) - known.keys() == set()
    paths = re.findall(r"(?<![\w./])((?:caco_scale|data_prep|ds_configs|slurm|tests|\.ci)/[\w./-]*\w)", text)
    assert len(set(paths)) > 20
    assert {path for path in paths if not (ROOT / path).exists()} <= {"slurm/site.sh"}  # the user's own


def test_a_checkout_is_installed_in_place():
    """What a command imports in a checkout is the checkout, which has the compiled augmentation only so."""
    installs = re.findall(r"activate && (pip install .*?)(?= && |$)", pages(), re.MULTILINE)
    assert len(installs) > 2
    assert [words for words in installs if not words.startswith("pip install -e ")] == []


def test_the_launchers_that_the_pages_name_are_read():
    parser = launch_command_parser()
    found = set(re.findall(r'accelerate launch ((?:--\w+ (?:"[^"]+"|\S+) )*-m caco_scale[\w.]*)', pages()))
    assert len(found) > 9
    for words in found:
        given = parser.parse_args(shlex.split(re.sub(r"\$\w+", "1", words)))
        if given.config_file is not None:
            name = re.sub(r"^\$\(caco path (.*)\)$", r"\1", given.config_file)
            assert (ROOT / name).exists(), words


def test_the_pages_commands_are_read(monkeypatch, tmp_path):
    """As far as flags go: nothing is run."""
    monkeypatch.chdir(tmp_path)
    read = set()
    for name, *words in written_commands():
        full, kind, kinds = name, None, commands.group(name)
        words = with_command(words) if name == "embed" else words
        if kinds and (not words or words[0] not in kinds):
            continue  # a list of them: {build,verify}
        if kinds:
            full, kind, words = f"{name} {words[0]}", kinds[words[0]], words[1:]
        elif name != "pretrain":
            kind = own_flags(name)
        if set(words) & {"...", "is", "RUN_OR_WEIGHTS"}:
            continue  # prose, or a pattern
        read.add(full)
        words = ["demo" if word == "RECIPE" else re.sub(r"^\$\w+$", "1", word) for word in words]
        if not words or words[-1] == "--help":
            continue  # it is named, and it is there
        if kind is None:
            parse(words)
        elif name == "sweep":
            read_arguments([str(ROOT / words[0]), *words[1:]])
        elif getattr(kind, "takes_recipe", False):
            parse(words, own=kind)
        else:
            assert dataclasses.is_dataclass(flags.read(kind, words, full))
    assert read >= {"shards build", "shards verify", "evaluate knn", "evaluate finetune", "export", "report"}
    assert read >= {"embed extract", "embed neighbours", "embed duplicates"}
    assert read >= {"doctor", "estimate", "preflight", "benchmark bank", "benchmark step", "pretrain"}
    with pytest.raises(UserError):
        parse(["--samples-per-shard", "3"])


# ---- completion


def completed(line, shell_script):
    """What bash would offer for a command line, its last word unfinished."""
    program = f"""
{shell_script}
COMP_WORDS=({line.rstrip()}{" ''" if line.endswith(" ") else ""})
COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1))
_caco
printf '%s\\n' "${{COMPREPLY[@]}}"
complete -p caco >&2
"""
    done = subprocess.run(["bash", "-c", program], capture_output=True, text=True, check=True)
    assert "-F _caco caco" in done.stderr
    return done.stdout.split()


def test_a_shell_completes_commands_flags_and_choices():
    bash = script("bash")
    assert completed("caco ev", bash) == ["evaluate"]
    assert completed("caco evaluate ", bash) == ["knn", "linear", "finetune"]
    assert completed("caco shards b", bash) == ["build"]
    assert completed("caco evaluate knn --te", bash) == ["--temperature"]
    assert completed("caco evaluate linear runs/x --fa", bash) == ["--fast"]
    assert completed("caco evaluate knn --precision ", bash) == ["fp32", "bf16", "fp64"]
    assert completed("caco pretrain --bank.si", bash) == ["--bank.size"]
    assert completed("caco pretrain demo --bank.ru", bash) == ["--bank.rule"]
    assert completed("caco pretrain --bank.rule a", bash) == ["adco"]
    assert completed("caco pretrain demo_", bash) == ["demo_adco", "demo_moco"]
    assert completed("caco doctor --proc", bash) == ["--processes"]
    assert completed("caco benchmark step --optim.na", bash) == ["--optim.name"]
    assert completed("caco export --format t", bash) == ["torchvision", "timm"]
    assert completed("caco sweep study.yaml --bank.si", bash) == ["--bank.size"]
    assert completed("caco sweep de", bash) == []  # a file, no recipe
    assert completed("caco pretrain demo some/fi", bash) == []  # the shell's own file names
    assert completed("caco path ds_configs/zero2", bash) == ["ds_configs/zero2.yaml", "ds_configs/zero2.json"]
    assert completed("caco path sl", bash)[:2] == ["slurm", "slurm/200ep.sh"]
    assert "bashcompinit" in script("zsh")
