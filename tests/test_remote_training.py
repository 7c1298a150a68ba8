"""Whole runs that read from a real S3 server through faults, kills and a lost server: one result."""

import json
import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
from launch import SMALL, SWITCH, final_state, kill_when, launch, planned_keys, progress, start
from s3_server import FAULTS, FaultProxy
from shard_sets import make_shard_set

from caco_scale.checkpoint.folder import latest, read_values
from caco_scale.checkpoint.read import load_tensors
from caco_scale.data.object_store import Remote
from caco_scale.run.audit import incomplete_steps, read_audit
from caco_scale.run.files import read_json_lines

STEPS = SMALL["run.max_steps"]


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return make_shard_set(tmp_path_factory.mktemp("data") / "set", num_images=96, samples_per_shard=20)


@pytest.fixture(scope="module")
def from_disk(shards, tmp_path_factory):
    """A run on one process that reads local files: its folder."""
    folder = tmp_path_factory.mktemp("disk")
    audit = folder / "audit.jsonl"
    launch({**SMALL, "data.shards": shards, "run.dir": folder / "run", "data.audit": audit})
    return folder


@pytest.fixture
def flags(shards, s3, tmp_path):
    """The run's flags with the set in the bucket; stalls are noticed soon."""
    folder = Remote(f"{s3}/training")
    if folder.size("manifest.json") is None:
        for path in sorted(Path(shards).iterdir()):
            folder.write(path.name, path)
    return {
        **SMALL,
        "data.shards": folder.url,
        "data.cache_dir": tmp_path / "cache",
        "data.stall_seconds": 1,
        "run.dir": tmp_path / "run",
        "data.audit": tmp_path / "audit.jsonl",
    }


@pytest.fixture
def proxy(s3_server, s3, monkeypatch):
    with FaultProxy(s3_server.endpoint, stall_seconds=2) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        yield proxy


def losses(folder):
    return {line["step"]: line["loss"] for line in read_json_lines(folder / "run" / "metrics.jsonl")}


def assert_same_run(folder, from_disk, shards, flags=SMALL):
    assert incomplete_steps(folder / "audit.jsonl") == {}
    assert read_audit(folder / "audit.jsonl") == dict(enumerate(planned_keys(shards, flags, STEPS)))
    assert losses(folder) == pytest.approx(losses(from_disk), rel=1e-8)
    assert final_state(folder / "run")[1]["step"] == STEPS


@pytest.mark.parametrize(
    "faults",
    [
        pytest.param(FAULTS, marks=pytest.mark.long),
        *(pytest.param((fault,), marks=pytest.mark.slow) for fault in FAULTS),
    ],
    ids="+".join,
)
def test_faults_change_nothing_in_a_run(faults, flags, proxy, from_disk, shards, tmp_path):
    proxy.faults = faults
    launch({**flags, "data.cache_dir": "none"}, num_processes=2)
    assert set(proxy.injected) == set(faults)
    assert_same_run(tmp_path, from_disk, shards)
    last = list(read_json_lines(tmp_path / "run/metrics.jsonl"))[-1]
    spoiled = sum(number for fault, number in proxy.injected.items() if fault != "slow")
    # Batches that were prepared but not trained on any more may have met a fault, too.
    assert 0 < last["data_retries"] <= spoiled or faults == ("slow",)
    assert last["data_requests"] > STEPS
    assert last["data_bytes"] > 0


@pytest.mark.long
def test_killed_with_its_cache_damaged_and_resumed_elsewhere(flags, proxy, from_disk, shards, tmp_path):
    proxy.faults = FAULTS
    flags = {**flags, "run.save_every": 1, "run.keep_checkpoints": 2}
    for attempt, (num_processes, step) in enumerate(((2, SWITCH - 1), (4, SWITCH + 3)), start=1):
        process = start({**flags, "data.workers": attempt % 2}, num_processes)
        kill_when(process, lambda wanted=(attempt, step): progress(tmp_path / "run") >= wanted)
        if attempt == 1:
            shutil.rmtree(tmp_path / "cache")
        else:
            for copy in (tmp_path / "cache").glob("*.tar"):
                copy.write_bytes(b"\x00" * copy.stat().st_size)
    launch(flags, num_processes=1)
    assert_same_run(tmp_path, from_disk, shards)
    attempts = list(read_json_lines(tmp_path / "run/attempts.jsonl"))
    assert [attempt["world_size"] for attempt in attempts] == [2, 4, 1]


# Two steps of bank warm-up, then CaCo; a batch that 1, 2, 3 and 4 processes divide.
DIVISIBLE = {"data.global_batch_size": 12}


@pytest.fixture(scope="module")
def divisible_from_disk(shards, tmp_path_factory):
    folder = tmp_path_factory.mktemp("divisible")
    audit = folder / "audit.jsonl"
    launch({**SMALL, **DIVISIBLE, "data.shards": shards, "run.dir": folder / "run", "data.audit": audit})
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("workers", range(4))
@pytest.mark.parametrize("num_processes", range(1, 5))
def test_any_number_of_processes_and_workers_reads_the_same_batches(
    num_processes, workers, flags, divisible_from_disk, shards, tmp_path
):
    launch({**flags, **DIVISIBLE, "data.workers": workers}, num_processes)
    assert_same_run(tmp_path, divisible_from_disk, shards, {**SMALL, **DIVISIBLE})


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_killed_at_random_steps_with_its_cache_deleted_damaged_or_kept(
    seed, flags, divisible_from_disk, shards, tmp_path
):
    chance = random.Random(seed)
    flags = {**flags, **DIVISIBLE, "run.save_every": chance.choice([1, 2])}
    for attempt in range(1, 4):
        process = start({**flags, "data.workers": chance.randint(0, 3)}, chance.randint(1, 4))
        step = chance.randint(1, STEPS - 4)
        kill_when(process, lambda wanted=(attempt, step): progress(tmp_path / "run") >= wanted)
        for copy in (tmp_path / "cache").glob("*.tar"):
            deed = chance.choice(["keep", "delete", "flip", "cut"])
            if deed == "delete":
                copy.unlink()
            elif deed == "flip":
                data = bytearray(copy.read_bytes())
                data[chance.randrange(len(data))] ^= 0xFF
                copy.write_bytes(data)
            elif deed == "cut":
                os.truncate(copy, chance.randrange(copy.stat().st_size))
    launch(flags, num_processes=chance.randint(1, 4))
    assert_same_run(tmp_path, divisible_from_disk, shards, {**SMALL, **DIVISIBLE})


@pytest.mark.long
def test_a_store_that_is_gone_ends_the_run_with_one_line_and_a_whole_checkpoint(
    flags, proxy, from_disk, shards, tmp_path
):
    few = {**flags, "data.cache_dir": "none", "run.save_every": 1, "data.retries": 2}
    process = start(few)
    deadline = time.monotonic() + 600  # its output until then fits into the pipe
    while progress(tmp_path / "run") < (1, SWITCH + 2) and process.poll() is None:
        if time.monotonic() > deadline:
            os.killpg(process.pid, signal.SIGKILL)
            raise AssertionError(f"the run never got there:\n{process.communicate()[0]}")
        time.sleep(0.02)
    proxy.gone = True
    output, _ = process.communicate(timeout=600)
    assert process.returncode != 0, output
    errors = [line for line in output.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, output
    assert "3 attempts in a row failed" in errors[0]
    assert "Traceback" not in output.split("error: ")[0]
    found = latest(tmp_path / "run/checkpoints")
    saved = read_values(found)["step"]
    assert saved >= SWITCH + 1
    load_tensors(found)
    launch({**flags, "data.shards": shards})  # the same set from disk: the order does not depend on the place
    attempts = list(read_json_lines(tmp_path / "run/attempts.jsonl"))
    assert attempts[-1]["resumed_step"] >= saved
    assert json.loads((tmp_path / "run/DONE").read_text())["step"] == STEPS
    assert_same_run(tmp_path, from_disk, shards)
