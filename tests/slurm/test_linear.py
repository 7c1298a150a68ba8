"""An evaluation as a job of two nodes: requeued in the middle, it goes on and ends in one process's result."""

import json
import time

import pytest
from evaluation_cases import make_place, words
from launch import ROOT

from caco_scale.evaluate import run_linear
from caco_scale.evaluate.__main__ import parse

pytestmark = pytest.mark.slurm
MORE = ("--epochs", 60, "--batch_size", 16, "--lr", 100)


def until(condition, what, seconds=300):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.2)


def test_a_requeued_evaluation_on_two_nodes_ends_in_one_processs_result(cluster, tmp_path):
    place = make_place(cluster.folder / "linear")
    alone = run_linear.run(parse(words("linear", place, *MORE, "--to", tmp_path)))
    runs, to = cluster.folder / "linear-runs", cluster.folder / "linear-to"
    command = ["sbatch", "--parsable", "--nodes=2", "--gpus-per-node=0", "--cpus-per-task=4", "--time=10"]
    command += [f"--output={cluster.folder}/linear.out", ROOT / "slurm/linear.sh"]
    arguments = words("linear", place, *MORE, "--to", to)[1:]
    variables = {"PROCESSES_PER_NODE": "1", "RUNS": str(runs), "CACO_ROOT": str(ROOT)}
    job = cluster.run([*command, *arguments], cwd=ROOT, **variables).stdout.strip()
    until((to / "state.pt").exists, "the evaluation never saved")
    cluster.run(["scancel", "--batch", "--signal=USR1", job])
    until((to / "result.json").exists, f"it never ended: {(cluster.folder / 'linear.out').read_text()}")
    result = json.loads((to / "result.json").read_text())
    assert result["environment"]["world_size"] == 2
    assert result["top1"] == alone["top1"]
    assert [e["loss"] for e in result["history"]] == pytest.approx(
        [e["loss"] for e in alone["history"]], rel=1e-6
    )
    assert sorted(folder.name for folder in (runs / "evaluate/slurm").iterdir()) == [f"{job}.0", f"{job}.1"]
    assert "resumed at step" in (runs / f"evaluate/slurm/{job}.1/node0.log").read_text()
