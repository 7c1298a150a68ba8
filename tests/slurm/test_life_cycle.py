"""What happens to jobs, and to the run that they carry: real SLURM, real trainer, audit logs against the pure order."""

import pytest
from launch import SWITCH


@pytest.mark.parametrize("strategy", ["ddp", "zero2"])
def test_a_signal_has_it_saved_requeued_resumed_and_finished(new_run, strategy):
    """Once in the bank warm-up, once beyond the switch."""
    warmup = 150
    run = new_run(f"usr1-{strategy}", strategy=strategy, **{"bank.size": 8 * warmup, "data.workers": 1})
    job = run.submit()
    run.wait_for_steps(job)
    run.signal(job)
    run.wait_for_event("stopped")
    first = run.saved()
    assert first < warmup
    run.wait_for_steps(job, more=warmup - first + 1)
    run.signal(job)
    run.wait_for_event("stopped", times=2)
    second = run.saved()
    assert second > warmup
    run.end_at(second + 12)
    assert run.wait_until_over(job) == "COMPLETED", run.story()
    assert run.restarts(job) == 2
    assert [attempt["resumed_step"] for attempt in run.attempts()] == [None, first, second]  # not a step lost
    assert run.events() == ["start", "stopped", "start", "stopped", "start", "done"]
    run.check_done(second + 12)


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
