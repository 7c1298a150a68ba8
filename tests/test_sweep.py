"""Studies: what a file means, what a directory says, the table; and a sweep that is killed repeats nothing."""

import csv
import json
import random
import signal
import subprocess
import sys
import time

import pytest
import yaml
from launch import SMALL, environment, kill_when, start_command
from rich.console import Console
from shard_sets import make_shard_set

from caco_scale import config as configuration
from caco_scale.config import parse
from caco_scale.errors import UserError
from caco_scale.sweep.__main__ import read_arguments
from caco_scale.sweep.runner import alone_in
from caco_scale.sweep.runs import Result, read_result, refuse_other_values
from caco_scale.sweep.study import read_study
from caco_scale.sweep.table import Entry, lines, to_csv, to_rich


def write_study(folder, **parts):
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump({"recipe": "demo", **parts}, sort_keys=False))
    return path


# ---- a study's file


def test_runs_and_grid_and_seeds_are_every_combination(tmp_path):
    study = read_study(
        write_study(
            tmp_path,
            flags={"optim.epochs": 9, "views.scale": [0.08, 1.0]},
            runs={"caco": None, "moco": {"bank.rule": "moco", "loss.temperature": 0.2}},
            grid={"bank.size": [256, 1024], "bank.temperature": [0.1]},
            seeds=[0, 7],
        )
    )
    plan = study.planned(tmp_path / "out")
    names = [f"{rule},size={size},temperature=0.1" for rule in ("caco", "moco") for size in (256, 1024)]
    assert [p.name for p in plan] == names * 2
    assert [p.seed for p in plan] == [0] * 4 + [7] * 4
    moco = plan[7].config
    assert (moco.bank.rule, moco.bank.size, moco.loss.temperature, moco.run.seed) == ("moco", 1024, 0.2, 7)
    assert (moco.optim.epochs, moco.views.scale, moco.bank.temperature) == (9, (0.08, 1.0), 0.1)
    assert plan[7].directory == tmp_path / "out" / names[3] / "seed_7"
    assert study.varied_fields() == ["bank.size", "bank.temperature", "bank.rule", "loss.temperature"]


def test_a_runs_command_gives_its_very_configuration(tmp_path):
    own = {
        "views.scale": [0.08, 1.0],
        "eval.baselines": False,
        "bank.lr": 1e-7,
        "data.cache_dir": "a b",
        "optim.lr": 1 / 3,
    }
    study = read_study(write_study(tmp_path, runs={"one": own, "two": {"data.val_shards": ""}}, seeds=[3]))
    for planned in study.planned(tmp_path):
        assert parse(planned.command()) == planned.config
        assert planned.config.run.seed == 3


MISTAKES = {
    "an unknown part": ({"run": {"a": {}}}, "unknown part run (did you mean runs?)"),
    "an unknown field": ({"flags": {"bank.sizee": 1}, "runs": {"a": {}}}, "(did you mean bank.size?)"),
    "a section": ({"flags": {"bank": {"size": 1}}, "runs": {"a": {}}}, "give dotted names, as in bank.size"),
    "a wrong type": ({"runs": {"a": {"bank.size": "many"}}}, "a: bank.size is 'many'"),
    "too many values": ({"runs": {"a": {"views.scale": [0.1, 0.2, 0.3]}}}, "views.scale is 0.1 0.2 0.3"),
    "against a rule": (
        {"runs": {"a": {}, "b": {"bank.size": 0}}},
        "b: bank.size is 0: give a number above 0",
    ),
    "fields that do not go together": (
        {"runs": {"a": {"optim.epochs": 1}}},
        "a: optim.warmup_epochs 2 must be",
    ),
    "a rule that is none": ({"grid": {"bank.rule": ["caco", "mocco"]}}, "bank.rule is 'mocco'"),
    "a grid without a list": ({"grid": {"bank.size": 256}}, "grid: bank.size is '256': give a list"),
    "no runs": ({}, "has no runs: give runs: or grid:"),
    "no value": ({"runs": {"a": {"bank.size": None}}}, "bank.size has no value"),
    "what the sweep sets": ({"flags": {"run.seed": 1}, "runs": {"a": {}}}, "use seeds: in the study"),
    "no recipe": ({"recipe": None, "runs": {"a": {}}}, "names no recipe"),
    "an unknown recipe": ({"recipe": "dmo", "runs": {"a": {}}}, "no recipe 'dmo' (did you mean demo?)"),
    "a seed twice": ({"runs": {"a": {}}, "seeds": [1, 1]}, "a seed is given twice"),
    "a seed that is none": ({"runs": {"a": {}}, "seeds": ["x"]}, "give whole numbers"),
    "both in run and grid": (
        {"runs": {"a": {"bank.size": 1}}, "grid": {"bank.size": [2]}},
        "bank.size is in the run a and in the grid",
    ),
    "names that fall together": (
        {"grid": {"data.cache_dir": ["a/b", "a-b"]}},
        "two runs would be called cache_dir=a-b",
    ),
    "a name that leads elsewhere": ({"runs": {"..": {}}}, "cannot be the name of a folder"),
    "a name too long": ({"runs": {"x" * 300: {}}}, "cannot be the name of a folder"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_in_a_study_is_one_line(tmp_path, name):
    parts, message = MISTAKES[name]
    with pytest.raises(UserError) as error:
        read_study(write_study(tmp_path, **parts)).planned(tmp_path)
    assert message in str(error.value)


def test_flags_on_the_command_line_are_for_all_runs(tmp_path):
    path = write_study(tmp_path, runs={"a": {"bank.size": 5}, "b": {}})
    study, options = read_arguments([str(path), "--data.shards", "x", "--jobs", "2"])
    assert [p.config.data.shards for p in study.planned("out")] == ["x", "x"]
    assert options.jobs == 2
    for flag, message in (
        (["--bank.size", "7"], "--bank.size: the runs of"),
        (["--run.seed", "7"], "use seeds: in the study"),
        (["--run.dir", "x"], "use --dir of the sweep"),
        (["--bank.sise", "7"], "did you mean --bank.size?"),
    ):
        with pytest.raises(UserError) as error:
            read_arguments([str(path), *flag])
        assert message in str(error.value)
    with pytest.raises(UserError, match="give STUDY"):
        read_arguments([])


# ---- what a run's directory says


def leave(directory, config, records=(), done=None):
    """What a run leaves that the sweep reads."""
    directory.mkdir(parents=True)
    (directory / "config.yaml").write_text(configuration.to_yaml(config))
    (directory / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    if done:
        (directory / "DONE").write_text(json.dumps({"step": done}))


RECORDS = [
    {"step": 0, "knn_top1": 20.0, "knn_top1_raw_pixels": 30.0},
    {"step": 10, "epoch": 1.0, "loss": 1.0, "images_per_second": 64.0},
    {"step": 10, "epoch": 1.0, "knn_top1": 52.0, "knn_seconds": 2.0},
    {"step": 20, "epoch": 2.0, "loss": 1.0, "images_per_second": 128.0},
    {"step": 20, "epoch": 2.0, "knn_top1": 50.0, "knn_seconds": 3.0},
]


def test_a_directory_says_how_good_a_run_is(tmp_path):
    (planned,) = read_study(write_study(tmp_path, runs={"a": {}})).planned(tmp_path)
    assert read_result(planned) == Result(done=None)
    leave(planned.directory, planned.config, RECORDS, done=20)
    # 10 steps of 128 images at 64 a second, 10 at 128 a second, and 5 seconds of evaluation
    assert read_result(planned) == Result(20, 50.0, 52.0, 1.0, 30.0, 20.0, 20.0 + 10.0 + 5.0)
    (planned.directory / "DONE").unlink()
    assert read_result(planned).final is None  # not the last step's, then
    assert read_result(planned).best == 52.0


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("bank.size", 5),
        ("eval.knn_k", 200),
        ("data.shards", "other"),
        ("run.max_steps", 7),
        ("optim.epochs", 99),
    ],
)
def test_a_directory_of_another_run_is_refused(tmp_path, field, value):
    (planned,) = read_study(write_study(tmp_path, runs={"a": {}})).planned(tmp_path)
    settled = configuration.replace(planned.config, precision__compute="fp32", data__workers=7)
    leave(planned.directory, settled, done=20)
    refuse_other_values(planned)  # what the machine has settled, and what changes nothing, is no other value
    (other,) = read_study(write_study(tmp_path, runs={"a": {field: value}})).planned(tmp_path)
    with pytest.raises(UserError, match=rf"begun with other values \({field}: .* -> {value}\)"):
        refuse_other_values(other)


# ---- the table


def test_the_table_has_mean_spread_and_what_is_not_done(tmp_path):
    plan = read_study(write_study(tmp_path, runs={"a": {}, "b": {"bank.size": 5}}, seeds=[0, 1, 2])).planned(
        "out"
    )
    entries = [Entry(planned, Result(done=None)) for planned in plan]
    for name, seed, final in (("a", 0, 50.0), ("a", 2, 53.0), ("b", 1, 40.0)):
        (entry,) = (e for e in entries if (e.planned.name, e.planned.seed) == (name, seed))
        entry.result, entry.state = Result(20, final, final + 1, 1.0, 30.0, 20.0, 60.0), "done"
    entries[2].result, entries[2].state = Result(None), "failed: error: no, thanks"  # a, seed 1
    found = lines(entries)
    a, b = csv.DictReader(to_csv(found, ["bank.size"]).splitlines())
    assert (a["run"], a["bank.size"], a["seeds_done"], a["n"]) == ("a", "", "0 2", "2")
    assert (a["final_mean"], a["final_sd"], a["final"]) == ("51.5", "2.121", "50 53")
    assert (a["best_mean"], a["best_epoch"], a["knn_k"], a["knn_temperature"]) == ("52.5", "1 1", "20", "0.2")
    assert a["not_done"] == "seed 1 failed: error: no, thanks"
    assert (b["bank.size"], b["final_mean"], b["final_sd"], b["n"]) == ("5", "40", "", "1")
    with (console := Console(width=160)).capture() as shown:
        console.print(to_rich(found, "study"))
    assert "51.5 ± 2.1" in shown.get()
    assert "k 20, T 0.2" in shown.get()


# ---- the processes, with a trainer that only counts to 4: it saves each step, and SIGTERM ends it after one

TRAINER = """
import fcntl, json, os, pathlib, signal, sys, time
stop = []
signal.signal(signal.SIGTERM, lambda *_: stop.append(1))
run = pathlib.Path(next(word for word in sys.argv if word.startswith("--run.dir=")).partition("=")[2])
def say(text):
    with open(run.parents[1] / "ledger", "a") as file:
        file.write(f"{run.parent.name} {text}\\n")
own = open(run / "own", "a")
try:
    fcntl.flock(own, fcntl.LOCK_EX | fcntl.LOCK_NB)
except BlockingIOError:
    say("two at once")
if (run / "DONE").exists():
    say("again")
count = run / "count"
step = int(count.read_text()) if count.exists() else 0
while step < 4 and not stop:
    if step == 2 and "bad" in str(run):
        print("Traceback: much text")
        sys.exit("error: it is bad")
    time.sleep(0.05)
    step += 1
    say(f"step {step} {os.environ.get('CUDA_VISIBLE_DEVICES')}")
    count.write_text(str(step))
if step == 4:
    (run / "metrics.jsonl").write_text(json.dumps({"step": 4, "epoch": 1, "knn_top1": 50.0}) + "\\n")
    (run / "DONE").write_text(json.dumps({"step": 4}))
"""
DRIVER = """
import sys
from caco_scale.run import lock
from caco_scale.sweep import __main__ as sweep, runner
runner.PROGRAM = (sys.executable, "-S", "-E", sys.argv[1])
lock.LOCK_SECONDS = 0
sweep.check = sweep.compare = sweep.refuse_other_values = lambda *_: None  # there are no data, and no config.yaml
sweep.main(sys.argv[2:])
"""


def start_counting(folder, names, *words):
    """A started sweep of the counting trainer over ``names``."""
    (folder / "trainer.py").write_text(TRAINER)
    path = write_study(folder, runs=dict.fromkeys(names))
    command = [sys.executable, "-c", DRIVER, folder / "trainer.py", path, "--dir", folder / "out", *words]
    return start_command(command, stderr=subprocess.PIPE)


def ledger(folder):
    path = folder / "out" / "ledger"
    return path.read_text().splitlines() if path.exists() else []


def table(folder):
    return list(csv.DictReader((folder / "out" / "table.csv").read_text().splitlines()))


def test_a_sweep_that_is_killed_again_and_again_repeats_nothing(tmp_path):
    names, rng = ["a", "b", "c", "d", "e"], random.Random(0)
    for _ in range(6):
        process = start_counting(tmp_path, names, "--jobs", "2")
        began, seen = time.monotonic(), len(ledger(tmp_path))
        while len(ledger(tmp_path)) == seen and time.monotonic() < began + 60 and process.poll() is None:
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.15))
        process.kill()
        process.communicate()
    process = start_counting(tmp_path, names, "--jobs", "2")
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    counted = sorted(line.rpartition(" ")[0] for line in ledger(tmp_path))
    assert counted == [f"{name} step {i}" for name in names for i in (1, 2, 3, 4)]
    assert [(row["run"], row["final"], row["not_done"]) for row in table(tmp_path)] == [
        (n, "50", "") for n in names
    ]
    assert "50.0" in output


def test_two_sweeps_in_one_folder_are_refused(tmp_path):
    with alone_in(tmp_path / "out"):
        process = start_counting(tmp_path, ["a"])
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 2
    assert errors.startswith("error: another sweep works in ")
    assert ledger(tmp_path) == []


def test_a_failed_run_is_a_row_and_the_exit_code(tmp_path):
    process = start_counting(tmp_path, ["bad", "good"], "--devices", "3", "5", "--jobs", "2")
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 1
    assert {line.split()[0]: line.split()[-1] for line in ledger(tmp_path)} == {"bad": "3", "good": "5"}
    bad, good = table(tmp_path)
    assert bad["not_done"] == "seed 0 failed: error: it is bad"
    assert (good["not_done"], good["final"]) == ("", "50")
    assert "error: it is bad" in output


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_stops_the_runs_in_good_order(tmp_path, number):
    process = start_counting(tmp_path, ["a", "b"])
    while not ledger(tmp_path):
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(number)
    process.communicate(timeout=60)
    assert process.returncode in (0, 1)  # 0: it had just finished
    if process.returncode:
        assert any("stopped" in row["not_done"] for row in table(tmp_path))
    again = start_counting(tmp_path, ["a", "b"])
    again.communicate(timeout=60)
    assert again.returncode == 0
    assert len(ledger(tmp_path)) == len(set(ledger(tmp_path))) == 8


# ---- the trainer itself


@pytest.mark.long
def test_a_killed_sweep_goes_on_in_the_middle_of_a_run(tmp_path):
    shards = make_shard_set(tmp_path / "set", num_images=96, samples_per_shard=20)
    small = {**SMALL, "run.save_every": 3, "precision.compute": "fp32"}
    flags = {name: value for name, value in small.items() if name != "run.max_steps"}
    path = write_study(
        tmp_path, flags=flags, runs={"a": {}, "b": {"optim.lr": 1e8, "optim.weight_decay": 1e6}}
    )  # soon not finite
    command = [
        sys.executable,
        "-m",
        "caco_scale.sweep",
        path,
        "--dir",
        tmp_path / "out",
        "--data.shards",
        shards,
    ]
    run = tmp_path / "out" / "a" / "seed_0"
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "env": environment()}
    process = subprocess.Popen(command, start_new_session=True, **pipes)
    kill_when(process, lambda: (run / "checkpoints" / "step_00000006").exists(), signal.SIGKILL)
    done = subprocess.run(command, **pipes, check=False, timeout=300)
    assert done.returncode == 1, done.stdout
    attempts = [json.loads(line) for line in (run / "attempts.jsonl").read_text().splitlines()]
    assert [attempt["attempt"] for attempt in attempts] == [1, 2]
    assert attempts[1]["resumed_step"] >= 6
    assert json.loads((run / "DONE").read_text())["step"] == 27
    a, b = table(tmp_path)
    assert (a["n"], a["not_done"], b["n"]) == ("1", "", "0")
    assert b["not_done"].startswith("seed 0 failed: error: ")
