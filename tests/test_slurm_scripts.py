"""The job scripts without a SLURM: what submit.sh renders, and what an evaluation's job ends with."""

import os
import shlex
import stat
import subprocess
import sys

import pytest
from launch import ROOT

import caco_scale
from caco_scale.commands.slurm import write

STUBS = {
    "sbatch": """
for word; do [ ! -f "$word" ] || cp "$word" "$STUBS/script"; done
printf "%s\\n" "$@" > "$STUBS/words"
echo 7""",
    "scontrol": """
case "$1 $2" in
  "show hostnames") echo n1 ;;
  "show job") echo "JobId=7 JobState=${STATE:-RUNNING} Reason=None Requeue=1 EndTime=Unknown" ;;
  requeue*) touch "$STUBS/requeued" ;;
esac""",
    "squeue": ":",
    "srun": """
for word; do case $word in --output=*) log=${word#--output=} ;; esac; done
echo "$SAYS" > "${log//%n/0}"
exit "$CODE" """,
}


@pytest.fixture
def run(tmp_path):
    """A function of words and variables: a script under programs that stand in for SLURM's -> the finished process."""
    for name, body in STUBS.items():
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (tmp_path / name).chmod(stat.S_IRWXU)
    (tmp_path / "site.sh").write_text(f"RUNS={tmp_path}/runs\n")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "SBATCH_"))}

    def call(*words, **variables):
        environment = {**kept, "PATH": f"{tmp_path}:{os.environ['PATH']}", "STUBS": str(tmp_path)}
        environment |= {"SITE": str(tmp_path / "site.sh"), **variables}
        return subprocess.run(
            ["bash", *map(str, words)], env=environment, cwd=ROOT, capture_output=True, text=True, timeout=60
        )

    call.folder = tmp_path
    return call


BAD = [
    "a\ntouch ran",
    "a b",
    "a'b",
    'a"b',
    "a$(touch ran)",
    "a`touch ran`",
    "a;touch ran",
    "a%jb",
    "-a",
    "a\\b",
    "a#b",
]


@pytest.mark.parametrize("name", BAD)
def test_a_run_name_that_is_more_than_a_name_submits_nothing(run, name):
    done = run("slurm/submit.sh", "200ep", RUN_NAME=name)
    assert done.returncode == 2, done.stdout
    assert done.stderr.startswith("error: RUN_NAME is ")
    assert done.stderr.count("\n") == 1
    assert not (run.folder / "script").exists()


@pytest.mark.parametrize(
    "variable", ["RUN_DIR", "RECIPE", "STRATEGY", "CACO_CHAIN", "PROCESSES_PER_NODE", "EXTEND"]
)
def test_a_line_end_in_a_variable_submits_nothing(run, variable):
    done = run("slurm/submit.sh", "200ep", **{"RUN_NAME": "a", variable: "/x\ntouch ran"})
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert not (run.folder / "script").exists()


def test_no_option_becomes_shell(run):
    """Each is one #SBATCH line, which sbatch splits as a shell does, and the rendered script runs nothing of it."""
    odd = ["a b", "it's", 'say "x"', "$(touch ran)", "`touch ran`", "a;touch ran", "a\\b", "# no"]
    options = [f"--comment={text}" for text in odd]
    variables = {"RUN_NAME": "lr0.2", "SITE_NOTE": "x\nSBATCH_X=1", "SBATCH_COMMENT": "x\ntouch ran"}
    place = str(run.folder / "my runs/$(touch ran)")
    done = run("slurm/submit.sh", "200ep", *options, "--", "--optim.lr", "0.2", RUN_DIR=place, **variables)
    assert done.returncode == 0, done.stderr
    script = (run.folder / "script").read_text()
    lines = [shlex.split(line) for line in script.splitlines() if line.startswith("#SBATCH")]
    assert all(len(line) == 2 for line in lines), lines
    given = [option for _, option in lines]
    assert given[-len(options) :] == options
    assert {"--job-name=caco-lr0.2", f"--output={place}/slurm/job-%j.out"} <= set(given)
    assert set(options) <= set((run.folder / "words").read_text().splitlines())
    (run.folder / "slurm").mkdir()
    (run.folder / "slurm/lib.sh").write_text("train() { :; }\n")
    text = script.replace(f"CACO_ROOT={ROOT}", f"CACO_ROOT={run.folder}")
    (run.folder / "script").write_text(text)
    done = run(run.folder / "script")
    assert (done.returncode, done.stderr) == (0, "")
    assert not (ROOT / "ran").exists()
    refused = run("slurm/submit.sh", "200ep", "--comment=a\ntouch ran")
    assert (refused.returncode, refused.stderr.count("\n")) == (2, 1)


@pytest.mark.parametrize("value", ["a[$(touch ran)]", "two", "08", "1 2", ""])
def test_a_number_of_the_environment_runs_nothing(run, value):
    job = {
        "SLURM_JOB_ID": "7",
        "SLURM_NNODES": "1",
        "SLURM_JOB_NODELIST": "n1",
        "SLURM_SUBMIT_DIR": str(ROOT),
    }
    done = run("slurm/200ep.sh", **job, PROCESSES_PER_NODE=value)
    assert done.returncode == 2
    assert done.stderr.count("error: ") == 1
    assert not (ROOT / "ran").exists()


STOPPED = "stopped by SIGTERM after step 3 of 60: the same command goes on from there (to)"


@pytest.mark.parametrize(
    ("says", "code", "variables", "ends_with", "requeued"),
    [
        ("linear top-1 71.3", 0, {}, 0, False),
        ("error: no such run", 2, {}, 2, False),
        (STOPPED, 0, {}, 0, True),
        (STOPPED, 0, {"REQUEUE": "no"}, 1, False),  # FAILED, not COMPLETED: there is no result
        (STOPPED, 0, {"STATE": "CANCELLED"}, 143, False),  # SLURM has decided
        (STOPPED, 1, {}, 1, False),
    ],
)
def test_an_evaluation_that_was_stopped_is_not_completed(run, says, code, variables, ends_with, requeued):
    job = {
        "SLURM_JOB_ID": "7",
        "SLURM_NNODES": "1",
        "SLURM_JOB_NODELIST": "n1",
        "SLURM_SUBMIT_DIR": str(ROOT),
    }
    job |= {"PROCESSES_PER_NODE": "1", "SAYS": says, "CODE": str(code), **variables}
    done = run("slurm/linear.sh", "weights.pth", **job)
    assert done.returncode == ends_with, done.stdout + done.stderr
    assert says in done.stdout
    assert (run.folder / "requeued").exists() == requeued


def test_scripts_of_a_users_own_folder_find_each_other_and_the_package(run):
    """As ``caco slurm init`` writes them, beside an installed package: submitted, and a job's life to its end."""
    folder = run.folder / "my jobs"
    write(folder)
    (folder / "slurm/site.sh").write_text("MIN_FREE_GB=0 PREFLIGHT=no\n")
    python = run.folder / "python"  # the doctor alone takes seconds
    python.write_text(
        f'#!/bin/sh\ncase "$*" in *doctor*) exit 0 ;; esac\nPYTHONPATH={ROOT} exec {sys.executable} "$@"\n'
    )
    python.chmod(stat.S_IRWXU)
    submitted = run(folder / "slurm/submit.sh", "200ep", "--", "--optim.lr", "0.2", SITE="")
    assert submitted.returncode == 0, submitted.stderr
    assert f"--output={folder}/runs/caco_r50_200ep/slurm/job-%j.out" in (run.folder / "words").read_text()
    job = {"SLURM_JOB_ID": "7", "SLURM_NNODES": "1", "SLURM_JOB_NODELIST": "n1", "SLURM_JOB_NAME": "caco"}
    job |= {
        "PROCESSES_PER_NODE": "1",
        "SAYS": "error: stopped",
        "CODE": "2",
        "SITE": "",
        "SLURM_SUBMIT_DIR": "/",
    }
    done = run(run.folder / "script", **job)
    assert "failed at step 0" in done.stdout, done.stdout + done.stderr
    assert done.stderr == ""
    snapshot = folder / "runs/caco_r50_200ep/slurm/snapshot"
    assert (snapshot / "commit").read_text() == f"caco_scale {caco_scale.__version__}\n"
    assert (snapshot / "recipe.yaml").read_text() == (
        ROOT / "caco_scale/recipes/caco_r50_200ep.yaml"
    ).read_text()
    assert (snapshot / "zero2.yaml").read_text() == (folder / "ds_configs/zero2.yaml").read_text()
    assert (run.folder / "requeued").exists()
