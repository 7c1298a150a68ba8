"""slurm/submit.sh on a real SLURM: chains for sites without requeue, the dry run, the self-test."""

import numpy as np
import pytest
from launch import ROOT, SWITCH
from shard_sets import encode, smooth_image
from slurm_run import DIVERGES, SMALL_JOB

from caco_scale.data.store import open_store

pytestmark = pytest.mark.slurm


def submit(run, *words, **variables):
    return run.cluster.run(
        ["slurm/submit.sh", "200ep", *words],
        cwd=ROOT,
        check=False,
        timeout=1800,
        **{**run.variables(), **variables},
    )


@pytest.mark.parametrize("kind", ["array", "singleton"])
def test_the_next_link_of_a_chain_goes_on(new_run, kind):
    run = new_run(f"chain-{kind}", strategy="zero2" if kind == "array" else "ddp", site="REQUEUE=no")
    # Also where sbatch hands no variables on: the script says them itself.
    variables = {"SBATCH_EXPORT": "NONE"} if kind == "array" else {}
    done = submit(run, "--nodes", "2", "--chain", kind, "--links", "3", *SMALL_JOB, **variables)
    assert done.returncode == 0, done.stdout + done.stderr
    first = int(done.stdout.split()[1])
    links = (
        [f"{first}_{link}" for link in (1, 2, 3)] if kind == "array" else [str(first + n) for n in range(3)]
    )
    run.jobs += links
    run.wait_for_steps(links[0], more=SWITCH + 2)
    run.signal(links[0])
    run.wait_for_event("stopped")
    saved = run.saved()
    run.end_at(saved + 5)
    assert [run.wait_until_over(link) for link in links] == ["COMPLETED"] * 3, run.story()
    assert [run.restarts(link) for link in links] == [0] * 3
    assert run.events() == ["start", "stopped", "start", "done"]
    said = [(run.path / f"slurm/job-{link}.out").read_text() for link in links]
    assert "the next link of the chain" in said[0]
    assert f"DONE at step {saved + 5}" in said[1]
    assert "is DONE: nothing to do" in said[2]
    run.check_done(saved + 5)


def test_a_chain_gives_up_too(new_run):
    run = new_run("chain-crash", site="REQUEUE=no\nMAX_FAILURES=1", **DIVERGES)
    done = submit(run, "--nodes=2", "--chain", "array", "--links", "3", *SMALL_JOB)
    links = [f"{done.stdout.split()[1]}_{link}" for link in (1, 2, 3)]
    run.jobs += links
    assert [run.wait_until_over(link) for link in links] == ["FAILED"] * 3, run.story()
    assert run.events() == ["start", "failed", "gave-up", "gave-up"]


def test_a_dry_run_shows_checks_and_estimates(new_run):
    run = new_run("dry", site="PRICE_PER_GPU_HOUR=2.10\nexport SBATCH_PARTITION=main")
    recipe = {"RECIPE": "caco_r50_800ep"}
    done = submit(
        run, "--nodes", "4", "--dry-run", "--images-per-second", "12800", "--chain", "array", **recipe
    )
    assert done.returncode == 0, done.stdout + done.stderr
    header = [line for line in done.stdout.splitlines() if line.startswith("#SBATCH")]
    assert header.index("#SBATCH --nodes=1") < header.index("#SBATCH --nodes=4")
    assert {"#SBATCH --no-requeue", "#SBATCH --array=1-10%1"} <= set(header)
    assert "# from the environment: SBATCH_PARTITION=main" in done.stdout
    assert {"export RECIPE=caco_r50_800ep", "export RUN_NAME=dry"} <= set(done.stdout.splitlines())
    assert "= 710.0 GPU-hours, 1,491.04 at 2.1 each" in done.stdout
    assert "to start at" in done.stderr
    assert run.cluster.run(["squeue", "-h", "-n", "caco-dry"]).stdout == ""
    refused = submit(run, "--nodes", "99", "--dry-run", **recipe)
    assert refused.returncode == 2
    assert "no images/s known: give --images-per-second" in refused.stdout
    assert "error: sbatch refuses the job as it stands" in refused.stderr


def test_a_self_test_interrupts_itself_and_resumes(new_run):
    run = new_run("self-test", **{"bank.size": 800, "optim.epochs": 3})
    done = submit(run, "--self-test", *SMALL_JOB)
    run.jobs.append(done.stdout.split()[2])
    assert done.returncode == 0, done.stdout + done.stderr + run.story()
    assert "self-test passed: interrupted and saved after step " in done.stdout
    resumed = run.attempts()[-1]["resumed_step"]
    assert 0 < resumed < 136
    assert run.events()[:2] == ["start", "stopped"]
    run.check_done(136)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--chain", "loop"], "--chain loop: give array or singleton"),
        (["--nodes", "two"], "--nodes two --links 10: give whole numbers"),
        (["--frob"], "unknown option --frob"),
        (["--nodes"], "--nodes needs a value"),
        (["300ep"], "two names, 200ep and 300ep"),
    ],
)
def test_a_typo_submits_nothing(new_run, words, message, request):
    done = submit(new_run(request.node.callspec.id), *words)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert message in done.stderr


def test_an_array_job_builds_one_shard_set(cluster, new_run, tmp_path):
    """More tasks than shards: every task ends well, and the set is whole."""
    images = tmp_path / "images"
    for number in range(12):
        path = images / f"class{number % 2}" / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode(smooth_image(np.random.default_rng(number), 24, 24), quality=90))
    run = new_run("build")
    options = ["--array=1-4", "--cpus-per-task=1", "--mem=100", f"--output={run.home}/job-%a.out"]
    words = ["sbatch", "--parsable", *options, "slurm/build_shards.sh", images, run.home / "set"]
    done = cluster.run([*words, "--samples-per-shard", "4"], cwd=ROOT, **run.variables())
    run.jobs.append(done.stdout.strip())
    tasks = [f"{run.jobs[-1]}_{task}" for task in range(1, 5)]
    assert [run.wait_until_over(task) for task in tasks] == ["COMPLETED"] * 4, run.story()
    manifest = open_store(run.home / "set", "none").manifest
    assert (manifest.num_samples, len(manifest.shards)) == (12, 3)
    words = [
        "sbatch",
        "--parsable",
        "--array=0-3",
        *options[1:3],
        "--output=/dev/null",
        "slurm/build_shards.sh",
        "a",
        "b",
    ]
    run.jobs.append(cluster.run(words, cwd=ROOT, **run.variables()).stdout.strip())
    assert run.wait_until_over(f"{run.jobs[-1]}_0") == "FAILED"
    assert run.field(f"{run.jobs[-1]}_0", "ExitCode") == "2:0"
