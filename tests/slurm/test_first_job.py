"""A stranger's first job: a wheel in an environment of its own, an empty folder, the site file edited as it says."""

import json
import subprocess
import sys
import sysconfig
import time

import pytest
from launch import SMALL
from slurm_run import PATIENCE_SECONDS, SMALL_JOB
from wheel import PIP, build_wheel

pytestmark = pytest.mark.slurm
ACCELERATE = "#!{python}\nfrom accelerate.commands.accelerate_cli import main\n\nmain()\n"


@pytest.fixture
def venv(cluster):
    """The wheel's; what it needs comes from the environment of the tests, by a path."""
    folder = cluster.folder / "stranger"
    folder.mkdir()
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder / "venv"], check=True)
    python = folder / "venv/bin/python"
    subprocess.run(
        [*PIP, "--python", python, "install", "--no-deps", "--no-index", build_wheel(folder / "wheel")],
        check=True,
    )
    place = "import sysconfig; print(sysconfig.get_path('purelib'))"
    packages = subprocess.run([python, "-c", place], capture_output=True, text=True, check=True).stdout
    with open(f"{packages.strip()}/others.pth", "w") as stream:
        stream.write(sysconfig.get_path("purelib") + "\n")
    command = folder / "venv/bin/accelerate"
    command.write_text(ACCELERATE.format(python=python))
    command.chmod(0o755)
    return folder / "venv"


def test_from_a_wheel_to_a_job_that_is_done(cluster, shards, venv):
    home = cluster.folder / "first_job"
    home.mkdir()
    caco = {"PYTHONPATH": "", "PATH": f"{venv}/bin:/usr/bin:/bin:/usr/sbin:/sbin"}
    said = cluster.run(["caco", "slurm", "init"], cwd=home, **caco).stdout
    assert f"VENV={venv}" in said
    cluster.run(["cp", "slurm/site.sh.example", "slurm/site.sh"], cwd=home)
    site = home / "slurm/site.sh"
    edits = {
        "# VENV=$HOME/caco_scale/.venv ": f"VENV={venv} ",
        "# MIN_FREE_GB=20 ": "MIN_FREE_GB=1 ",
        "# PREFLIGHT=no ": "PREFLIGHT=no ",
    }
    text = site.read_text()
    for line, edited in edits.items():
        assert text.count(f"\n{line}") == 1
        text = text.replace(f"\n{line}", f"\n{edited}")
    site.write_text(text)
    flags = {**SMALL, "data.shards": shards, "data.val_shards": "", "run.max_steps": 6}
    flags |= {"precision.compute": "fp32"}  # by default it is ZeRO-2 that trains
    words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    sbatch = ["sbatch", "--parsable", "--nodes=2", *SMALL_JOB, "slurm/200ep.sh", *words]
    variables = {"RECIPE": "demo", "RUN_NAME": "first", "PROCESSES_PER_NODE": "1", **caco}
    job = cluster.run(sbatch, cwd=home, **variables).stdout.strip()
    deadline, state = time.monotonic() + PATIENCE_SECONDS, ""
    while state not in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT"):
        assert time.monotonic() < deadline
        time.sleep(0.5)
        state = cluster.run(["squeue", "-h", "-j", job, "-t", "all", "-o", "%T"]).stdout.strip()
    said = "".join(path.read_text() for path in [*home.glob("*.out"), *home.glob("runs/first/slurm/*/*.log")])
    assert state == "COMPLETED", said
    assert json.loads((home / "runs/first/DONE").read_text())["step"] == 6, said
    (attempt,) = [json.loads(line) for line in (home / "runs/first/attempts.jsonl").open()]
    assert attempt["world_size"] == 2
    assert "DONE at step 6" in said
    assert "warning: " in said  # the doctor's, of a recipe that is made to be short
