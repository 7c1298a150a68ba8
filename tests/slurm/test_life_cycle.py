"""What happens to jobs, and to the run that they carry: real SLURM, real trainer, audit logs against the pure order."""

import json
import shutil

import pytest
from launch import SWITCH, final_state, launch, relative_difference
from slurm_run import DIVERGES

pytestmark = pytest.mark.slurm


@pytest.mark.parametrize(("strategy", "name"), [("ddp", "USR2"), ("zero2", "TERM")])
def test_a_signal_has_it_saved_requeued_resumed_and_finished(new_run, tmp_path, strategy, name):
    """Once in the bank warm-up, once beyond the switch; the end is that of a run that nobody disturbed."""
    warmup = 150
    run = new_run(f"usr1-{strategy}", strategy=strategy, **{"bank.size": 8 * warmup, "data.workers": 1})
    job = run.submit()
    run.wait_for_steps(job)
    run.signal(job)
    run.wait_for_event("stopped")
    first = run.saved()
    assert first < warmup
    run.wait_for_steps(job, more=warmup - first + 1)
    run.signal(job, name)
    run.wait_for_event("stopped", times=2)
    second = run.saved()
    assert second > warmup
    run.end_at(second + 12)
    assert run.wait_until_over(job) == "COMPLETED", run.story()
    assert run.restarts(job) == 2
    assert [attempt["resumed_step"] for attempt in run.attempts()] == [None, first, second]  # not a step lost
    events = [event for event in run.events() if event != "terminated"]  # SIGTERM may be SLURM's, too
    assert events == ["start", "stopped", "start", "stopped", "start", "done"]
    run.check_done(second + 12)
    if strategy == "ddp":
        launch({**run.flags, "run.dir": tmp_path / "run", "data.audit": tmp_path / "audit"}, num_processes=2)
        undisturbed, disturbed = final_state(tmp_path / "run")[0], final_state(run.path)[0]
        assert relative_difference(disturbed, undisturbed)[0] < 1e-8


def test_a_node_is_powered_off_and_a_spare_takes_its_place(new_run, cluster):
    run = new_run("power", **{"run.save_every": 5})
    job = run.submit()
    run.wait_for_steps(job, more=SWITCH + 8)
    lost = cluster.run(["squeue", "-h", "-j", job, "-o", "%N"]).stdout
    lost = cluster.run(["scontrol", "show", "hostnames", lost.strip()]).stdout.split()[-1]
    cluster.power_off(lost)
    try:
        run.wait(lambda: run.restarts(job) == 1, "requeued")
        end = run.saved() + 10
        run.end_at(end)
        assert run.wait_until_over(job) == "COMPLETED", run.story()
        nodes = cluster.run(["scontrol", "show", "hostnames", run.field(job, "NodeList")]).stdout.split()
        assert len(nodes) == 2
        assert lost not in nodes
    finally:
        cluster.power_on(lost)
    resumed = run.attempts()[1]["resumed_step"]
    assert resumed % 5 == 0
    run.check_done(end)


def test_time_limits_are_survived(new_run, cluster):
    """Of one minute, where the machine trains a step within it."""
    run = new_run("limit", **{"run.stop_before_end_seconds": 5})
    job, survived = run.submit("--time=1", "--signal=B:USR1@10"), 0
    for restart in range(1, 8):
        run.wait(lambda restart=restart: run.restarts(job) == restart, f"requeued {restart} times")
        progress = run.saved() - survived if run.steps() else 0
        if not progress:  # a slow machine
            cluster.run(["scontrol", "update", f"JobId={job}", f"TimeLimit={restart + 1}"])
            continue
        survived += 1
        if survived == 3:
            break
    assert survived == 3, run.story()
    end = run.saved() + 3
    run.end_at(end)
    assert run.wait_until_over(job) == "COMPLETED", run.story()
    assert set(run.events()) <= {"start", "stopped", "terminated", "failed", "done"}
    run.check_done(end)


@pytest.mark.parametrize("told", [True, False], ids=["batch shell told", "steps alone told"])
def test_a_higher_partition_takes_the_nodes_and_gives_them_back(new_run, cluster, told):
    run = new_run(f"preempted-{told}", strategy="zero2" if told else "ddp")
    cluster.send_user_signal(told)
    job = run.submit("--partition=preemptible", "--nodelist=n1,n2")
    run.wait_for_steps(job, more=SWITCH + 2)
    urgent = ["sbatch", "--parsable", "--partition=urgent", "--nodelist=n1,n2", "--nodes=2", "--exclusive"]
    urgent += ["--output=/dev/null", "--wrap=srun sleep 1"]
    run.jobs.append(cluster.run(urgent).stdout.strip())
    run.wait(lambda: run.restarts(job) == 1, "requeued")
    run.wait_until_over(run.jobs[-1])
    saved = run.saved()
    assert saved > SWITCH + 2
    run.end_at(saved + 5)
    assert run.wait_until_over(job) == "COMPLETED", run.story()
    assert run.attempts()[1]["resumed_step"] == saved
    assert ("asking the trainer" in run.said(job)) == told
    run.check_done(saved + 5)


def test_a_job_stops_before_its_end_and_for_good_when_it_is_told_to(new_run):
    """Its end, the file STOP, and what a run leaves; a second job in its directory is refused."""
    run = new_run("stop", **{"run.stop_before_end_seconds": 100_000})
    job = run.submit()  # of half an hour
    run.wait_for_event("stopped")
    assert json.loads((run.path / "INTERRUPTED").read_text())["reason"] == "SLURM_JOB_END_TIME"
    assert run.saved() == 1
    run.flags["run.stop_before_end_seconds"] = 60
    run.end_at(0)
    run.wait_for_steps(job, more=SWITCH + 2)
    second = run.submit()
    assert run.wait_until_over(second) == "FAILED"
    assert f"error: job {job} trains in {run.path}" in run.said(second)
    (run.path / "STOP").touch()
    assert run.wait_until_over(job) == "COMPLETED", run.story()
    assert run.events() == ["start", "stopped", "start", "stopped"]
    third = run.submit()
    assert run.wait_until_over(third) == "COMPLETED"
    assert "STOP is there: remove it to train on" in run.said(third)
    assert run.events().count("start") == 2
    run.check_audit(run.saved())
    snapshot = {path.name for path in (run.path / "slurm/snapshot").iterdir()}
    assert snapshot == {"command", "commit", "changes.diff", "job.sh", "recipe.yaml", "site.sh", "ddp.yaml"}
    assert {path.name for path in (run.path / f"slurm/{job}.1").iterdir()} == {
        "started",
        "node0.log",
        "node1.log",
    }


def test_scancel_is_final_and_one_node_goes_on_where_two_stopped(new_run):
    run = new_run("scancel")
    job = run.submit()
    run.wait_for_steps(job, more=SWITCH + 2)
    run.cluster.run(["scancel", job])
    assert run.wait_until_over(job) == "CANCELLED"
    assert run.restarts(job) == 0
    assert "terminated" in run.events()
    saved = run.saved()
    run.end_at(saved + 5)
    again = run.submit(nodes=1)
    assert run.wait_until_over(again) == "COMPLETED", run.story()
    assert run.state(job) == "CANCELLED"
    assert [(a["world_size"], a["resumed_step"]) for a in run.attempts()] == [(2, None), (1, saved)]
    run.check_done(saved + 5)
    run.end_at(saved + 8)
    assert run.wait_until_over(run.submit(nodes=1)) == "COMPLETED"
    run.check_done(saved + 5)
    assert run.wait_until_over(run.submit(nodes=1, EXTEND="yes")) == "COMPLETED"
    run.check_done(saved + 8)


def test_an_admin_requeues_the_job(new_run):
    run = new_run("admin")
    job = run.submit()
    run.wait_for_steps(job, more=SWITCH + 2)
    run.cluster.run(["scontrol", "requeue", job])
    run.wait(lambda: run.state(job) == "PENDING", "requeued")
    saved = run.saved()
    run.end_at(saved + 5)
    assert run.wait_until_over(job) == "COMPLETED", run.story()
    assert run.restarts(job) == 1
    assert run.attempts()[1]["resumed_step"] == saved
    run.check_done(saved + 5)


def test_a_job_that_fails_at_every_start_gives_up(new_run, shards, tmp_path):
    """The third time because the shards are away, which the doctor finds before a step."""
    shutil.copytree(shards, tmp_path / "set")
    manifest = tmp_path / "set/manifest.json"
    run = new_run("crash", site="MAX_FAILURES=3", **DIVERGES, **{"data.shards": str(tmp_path / "set")})
    job = run.submit()
    run.wait_for_event("failed", times=2)  # the second time on the same nodes
    manifest.rename(tmp_path / "away")
    run.wait_for_event("failed", times=3)
    (tmp_path / "away").rename(manifest)
    assert run.wait_until_over(job) == "FAILED", run.story()
    assert run.field(job, "ExitCode") == "42:0"
    assert run.restarts(job) == 2
    assert run.events() == ["start", "failed"] * 3 + ["gave-up"]
    assert "3 starts in a row failed at step 0" in run.said(job)
    assert run.said(job).count("steps in a row were not finite") >= 2  # the trainer's own line
    assert run.said(job).count(f"FAIL {tmp_path / 'set'}") == 1


def test_a_hang_ends_the_start_and_the_next_goes_on(new_run, cluster):
    run = new_run("hang", **{"run.timeout_seconds": 45, "run.save_every": 5})
    job = run.submit("--nodelist=n3,n4")
    run.wait_for_steps(job, more=SWITCH + 8)
    cluster.on_node("n4", "pkill -STOP -f '^[^ ]*python[^ ]* .*-m caco_scale.pretrain'")
    run.wait_for_event("failed")
    end = run.saved() + 10
    run.end_at(end)
    assert run.wait_until_over(job) == "COMPLETED", run.story()
    assert run.events() == ["start", "failed", "start", "done"]
    assert run.restarts(job) == 0  # the same nodes, in the same job
    run.check_done(end)


def test_a_last_save_that_fails_is_a_failed_start(new_run):
    """Asked to stop, it cannot write: that is said and counted; the next start, which can, goes on."""
    run = new_run("save-fails", **{"run.save_every": 0})
    job = run.submit()
    run.wait_for_steps(job, more=SWITCH + 2)
    folder = run.path / "checkpoints"
    folder.rmdir()
    folder.touch()
    run.signal(job)
    run.wait_for_event("failed")
    folder.unlink()
    end = SWITCH + 20
    run.end_at(end)
    assert run.wait_until_over(job) == "COMPLETED", run.story()
    assert run.events() == ["start", "failed", "start", "done"]
    assert "asked=USR1" in run.ledger()[1][2]
    assert "error: " in run.said(job)
    run.check_done(end)


def test_a_start_that_no_node_passes_leaves_none_out(new_run):
    """More room is asked for than any node has: after three starts it ends instead of wandering through the cluster."""
    run = new_run("no-node", site="PREFLIGHT=yes\nSHM_GB=1000000")
    job = run.submit()
    assert run.wait_until_over(job) == "FAILED", run.story()
    assert run.field(job, "ExitCode") == "42:0"
    assert run.events() == ["start", "failed"] * 3 + ["gave-up"]
    assert run.said(job).count("error: no node passes the preflight, so none is left out") == 3
    assert run.field(job, "ExcNodeList") in ("", "(null)")


def test_a_bad_node_is_left_out_and_the_others_stage_shards(new_run, cluster, served_shards):
    """The shards come from a web server onto each node's own disk."""
    site = f"PREFLIGHT=yes SHM_GB=0.03 CACHE_DIR={cluster.folder}/scratch/cache"
    end = SWITCH + 20
    run = new_run("bad-node", site=site, **{"run.max_steps": end, "data.shards": served_shards})
    cluster.on_node("n1", "fallocate -l 60M /dev/shm/full")
    try:
        job = run.submit("--exclude=n6")
        assert run.wait_until_over(job) == "COMPLETED", run.story()
    finally:
        cluster.on_node("n1", "rm /dev/shm/full")
    assert "bad node n1: 0.00 GB free in /dev/shm, not 0.03" in run.said(job)
    assert set(run.field(job, "ExcNodeList").split(",")) == {"n1", "n6"}
    assert run.events() == ["start", "bad-nodes", "start", "done"]
    for node in run.cluster.run(["scontrol", "show", "hostnames", run.field(job, "NodeList")]).stdout.split():
        assert any(path.is_file() for path in (cluster.folder / "disk" / node / "cache").rglob("*.tar*")), (
            node
        )
    run.check_done(end)
