"""What a user can get wrong is one line of the job's output, before any job step: no GPU waits for it."""

import subprocess

import pytest
from cluster import PATH
from launch import ROOT

pytestmark = pytest.mark.slurm

# What differs from a job that would train: (site file's last lines, environment, sbatch's options, trainer's flags),
# and what the one line says.
MISTAKES = {
    "site.sh is no bash": ({"site": "RUNS=("}, "site.sh is not valid bash"),
    "site.sh fails": ({"site": "false"}, "site.sh fails: its last command must succeed"),
    "site.sh names no venv": ({"site": "VENV=/nowhere"}, "VENV=/nowhere has no bin/activate"),
    "site.sh says maybe": ({"site": "REQUEUE=maybe"}, "REQUEUE is 'maybe': give one of yes no"),
    "site.sh counts in words": (
        {"site": "MAX_FAILURES=few"},
        "MAX_FAILURES is few, which is no whole number",
    ),
    "site.sh measures in words": ({"site": "SHM_GB=1GB"}, "SHM_GB is '1GB', which is no number"),
    "a cache that cannot be": (
        {"site": "CACHE_DIR=/proc/nowhere", "flags": ["--data.shards", "{served}"]},
        "/proc/nowhere",
    ),
    "no site file": ({"variables": {"SITE": "/nowhere/site.sh"}}, "SITE=/nowhere/site.sh is not there"),
    "no such recipe": ({"variables": {"RECIPE": "dem"}}, "no recipe 'dem' (did you mean demo?)"),
    "no such flag": (
        {"flags": ["--bank.sise", "20"]},
        "unknown flag --bank.sise (did you mean --bank.size?)",
    ),
    "no such strategy": ({"variables": {"STRATEGY": "zero9"}}, "STRATEGY=zero9 has no"),
    "run.dir by flag": ({"flags": ["--run.dir", "x"]}, "name the run by RUN_NAME, RUNS or RUN_DIR"),
    "a full disk": ({"site": "RUNS={folder}/full"}, "0 GB free at {folder}/full/"),
    "no room for a file": ({"site": "RUNS=/proc/nowhere"}, "cannot write /proc/nowhere/"),
    "unreadable shards": ({"flags": ["--data.shards", "{folder}/empty"]}, "FAIL {folder}/empty"),
    "a batch that cannot be shared": ({"flags": ["--data.global_batch_size", "7"]}, "cannot be divided by 2"),
    "no GPUs": (
        {"variables": {"PROCESSES_PER_NODE": ""}},
        "the job has no GPUs: give sbatch --gpus-per-node=N",
    ),
    "GPUs without a driver": ({"options": ["--gpus-per-node=2"]}, "but torch "),
    "another seed than the checkpoint's": ({"flags": ["--run.seed", "1"], "resumes": True}, "run.seed: 0"),
}


@pytest.fixture(scope="module")
def outputs(cluster, shards, served_shards, tmp_path_factory):
    """{mistake: (run, job, output)}, all submitted at once."""
    from slurm_run import SlurmRun

    (cluster.folder / "empty").mkdir()
    place = lambda value: value.replace("{folder}", str(cluster.folder)).replace("{served}", served_shards)
    trained = SlurmRun(cluster, "trained", shards, **{"run.max_steps": 4})
    trained.wait_until_over(trained.submit())
    runs = {}
    for number, (mistake, (given, _)) in enumerate(MISTAKES.items()):
        run = trained
        if not given.get("resumes"):
            run = SlurmRun(cluster, f"mistake-{number}", shards, site=place(given.get("site", "")))
        variables, flags = given.get("variables", {}), [place(flag) for flag in given.get("flags", [])]
        extend = {"EXTEND": "yes"} if given.get("resumes") else {}
        runs[mistake] = run, run.submit(*given.get("options", []), flags=flags, **variables, **extend)
    for run, job in runs.values():
        run.wait_until_over(job)
    return runs


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_before_any_step(outputs, cluster, mistake):
    run, job = outputs[mistake]
    said = run.said(job)
    errors = [line for line in said.splitlines() if "error: " in line]
    assert len(errors) == 1, said
    assert MISTAKES[mistake][1].replace("{folder}", str(cluster.folder)) in errors[0]
    assert (run.state(job), run.field(job, "ExitCode"), run.restarts(job)) == ("FAILED", "2:0", 0)
    logs = "\n".join(log.read_text() for log in (cluster.folder / "log").glob("slurmd.*.log"))
    assert f"[{job}.batch]" in logs
    assert f"StepId={job}." not in logs


def test_shellcheck_has_nothing_to_say(cluster):
    scripts = [
        *(ROOT / "slurm").glob("*.sh"),
        ROOT / "slurm/site.sh.example",
        *(ROOT / "tests/slurm").glob("*.sh"),
    ]
    words = [
        "shellcheck",
        "-x",
        *(str(script.relative_to(ROOT)) for script in scripts if script.name != "site.sh"),
    ]
    done = subprocess.run(words, cwd=ROOT, env={"PATH": PATH}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
