"""Batches do not depend on ranks, workers or the start; corrupt samples, damaged shards, signals and kills."""

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from shard_sets import make_shard_set

from caco_scale.data.loader import evaluation_batches, train_batches
from caco_scale.data.order import Order, sample_keys
from caco_scale.data.photographs import decode_image
from caco_scale.data.pixels import CorruptSample
from caco_scale.data.store import open_store
from caco_scale.data.views import (
    ViewSpec,
    centre_crop,
    crop_resize,
    draw_colour,
    draw_crop,
)
from caco_scale.data.workers import StoppedWaiting, small_shared_memory, stream
from caco_scale.distributed import collectives
from caco_scale.errors import UserError

VIEWS = [ViewSpec(32, (0.2, 1.0)), ViewSpec(24, (0.05, 0.5), blur_p=0.1, solarize_p=0.2)]
BATCH, SEED = 12, 5  # 50 images: 4 steps an epoch and a remainder of 2
STEPS = 10


@pytest.fixture(autouse=True)
def no_worker_stays():
    yield
    assert not multiprocessing.active_children()


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return make_shard_set(tmp_path_factory.mktemp("set"), num_images=50, size=36, vary=20)


@pytest.fixture(scope="module")
def corrupt_shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corrupt")
    return make_shard_set(folder, num_images=50, size=36, vary=20, corrupt=(3, 17, 18, 40))


def batches(url, *, rank=0, world_size=1, start_step=0, num_steps=STEPS, workers=0):
    store = open_store(url)
    order = Order([s.num_samples for s in store.manifest.shards], seed=SEED, global_batch_size=BATCH)
    topology = {"rank": rank, "world_size": world_size, "workers": workers}
    return train_batches(
        store, order, VIEWS, start_step=start_step, num_steps=num_steps, seed=SEED, **topology
    )


def sample(url, name):
    """The file of a sample "shard/key", and the sample's number in the set."""
    store = open_store(url)
    first = 0
    for shard, info in enumerate(store.manifest.shards):
        index = store.index(shard)
        if info.name == name.split("/")[0]:
            position = list(index.keys).index(name.split("/")[1])
            span = store.read(shard, *index.span(position))
            _, offset, size = next(m for m in index.members(position) if m[0] == "jpg")
            return span[offset : offset + size], first + position
        first += info.num_samples
    raise AssertionError(name)


def joined(ranks):
    """One global batch from the ranks' parts, as plain values and numpy arrays."""
    views = range(len(VIEWS))
    return {
        "step": [batch.step for batch in ranks],
        "epoch": [batch.epoch for batch in ranks],
        "keys": [key for batch in ranks for key in batch.keys],
        "corrupt": [report for batch in ranks for report in batch.corrupt],
        "crops": [torch.cat([batch.crops[v] for batch in ranks]).numpy() for v in views],
        "params": [
            {
                name: torch.cat([batch.params[v][name] for batch in ranks]).numpy()
                for name in ranks[0].params[v]
            }
            for v in views
        ],
    }


def assert_same(batch, expected):
    for name in ("keys", "corrupt"):
        assert batch[name] == expected[name]
    assert set(batch["step"]) == set(expected["step"])
    assert set(batch["epoch"]) == set(expected["epoch"])
    for v in range(len(VIEWS)):
        assert np.array_equal(batch["crops"][v], expected["crops"][v])
        assert batch["params"][v].keys() == expected["params"][v].keys()
        assert all(
            np.array_equal(batch["params"][v][k], values) for k, values in expected["params"][v].items()
        )


def test_batches_follow_the_order_and_the_random_keys(shards):
    """Every row against its definition: order, decoder, crop, parameters."""
    store = open_store(shards)
    order = Order([s.num_samples for s in store.manifest.shards], seed=SEED, global_batch_size=BATCH)
    seen = list(batches(shards))
    assert [b.step for b in seen] == list(range(STEPS))
    assert [b.epoch for b in seen] == [0] * 4 + [1] * 4 + [2] * 2
    for batch in seen[::3]:
        ids = order.batch(batch.step)
        for v, spec in enumerate(VIEWS):
            random = sample_keys(SEED, batch.epoch, ids, v)
            params = draw_colour(spec, random)
            assert all(np.array_equal(batch.params[v][k].numpy(), params[k]) for k in params)
            assert batch.crops[v].shape == (BATCH, spec.size, spec.size, 3)
            for i, (key, number) in enumerate(zip(batch.keys, ids, strict=True)):
                data, position = sample(shards, key)
                assert position == number
                image = decode_image(data)
                box = draw_crop(spec, random[i : i + 1], [image.shape[0]], [image.shape[1]])[0]
                assert np.array_equal(batch.crops[v][i].numpy(), crop_resize(image, box, spec.size))


@pytest.mark.parametrize("which", ["shards", "corrupt_shards"])
def test_global_batches_are_the_same_at_any_topology(which, request):
    url = request.getfixturevalue(which)
    expected = [joined([batch]) for batch in batches(url)]
    assert any(batch["corrupt"] for batch in expected) == (which == "corrupt_shards")
    for world_size in (1, 2, 4):
        for workers in (0, 1, 3):
            ranks = [batches(url, rank=r, world_size=world_size, workers=workers) for r in range(world_size)]
            seen = [joined(parts) for parts in zip(*ranks, strict=True)]
            assert len(seen) == STEPS
            for batch, reference in zip(seen, expected, strict=True):
                assert_same(batch, reference)


@pytest.mark.parametrize(
    ("start_step", "workers", "world_size"), [(3, 0, 2), (5, 3, 2), (8, 2, 1), (9, 3, 3)]
)
def test_a_start_in_the_middle_gives_the_same_batches(shards, start_step, workers, world_size):
    expected = list(batches(shards))[start_step:]
    topology = {"world_size": world_size, "workers": workers, "start_step": start_step}
    ranks = [batches(shards, rank=r, **topology) for r in range(world_size)]
    seen = [joined(parts) for parts in zip(*ranks, strict=True)]
    for batch, reference in zip(seen, expected, strict=True):
        assert_same(batch, joined([reference]))


def test_the_trainers_random_state_is_left_alone(shards):
    torch.manual_seed(1)
    np.random.seed(1)
    before = torch.get_rng_state(), np.random.get_state()[1].tolist()
    for workers in (0, 2):
        list(batches(shards, num_steps=2, workers=workers))
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.random.get_state()[1].tolist() == before[1]


def test_corrupt_samples_are_replaced_and_reported(corrupt_shards):
    seen = list(batches(corrupt_shards))
    reports = [(batch, report) for batch in seen for report in batch.corrupt]
    assert {report["key"] for _, report in reports} <= {f"{n // 16:06d}.tar/{n:08d}" for n in (3, 17, 18, 40)}
    assert len({report["substitute"] for _, report in reports}) > 1
    for batch, report in reports:
        assert report["error"]
        assert "\n" not in report["error"]
        row = batch.keys.index(report["key"])
        with pytest.raises(CorruptSample):
            decode_image(sample(corrupt_shards, report["key"])[0])
        image = decode_image(sample(corrupt_shards, report["substitute"])[0])
        planned = sample(corrupt_shards, report["key"])[1]
        for v, spec in enumerate(VIEWS):
            random = sample_keys(SEED, batch.epoch, [planned], v)
            box = draw_crop(spec, random, [image.shape[0]], [image.shape[1]])[0]
            assert np.array_equal(batch.crops[v][row].numpy(), crop_resize(image, box, spec.size))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_set_without_readable_images_is_an_error(tmp_path, workers):
    url = make_shard_set(tmp_path, num_images=24, size=40, corrupt=range(24))
    with pytest.raises(UserError, match=r"16 others .*data_prep verify --full") as error:
        list(batches(url, num_steps=2, workers=workers))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_truncated_shard_is_the_same_error_with_workers(tmp_path, workers):
    url = make_shard_set(tmp_path, num_images=48, size=40)
    size = os.path.getsize(tmp_path / "000001.tar")
    os.truncate(tmp_path / "000001.tar", size // 3)
    with pytest.raises(UserError, match=rf"000001\.tar has {size // 3:,} bytes, {size:,} expected") as error:
        list(batches(url, workers=workers))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("words", ["another sha256", "another checksum"])
def test_bytes_that_differ_from_the_manifest_are_an_error_not_a_corrupt_sample(tmp_path, words):
    url = make_shard_set(tmp_path, num_images=48, size=40, checksums=words == "another checksum")
    with open(tmp_path / "000001.tar", "r+b") as file:
        data = file.read()
        file.seek(data.index(b"\xff\xd8"))
        file.write(bytes(300))
    with pytest.raises(UserError, match=rf"shard 000001\.tar .*{words}"):
        list(batches(url, num_steps=4))


def test_ranks_that_do_not_divide_the_batch_are_an_error_at_the_call(shards):
    with pytest.raises(UserError, match="12 cannot be divided by 5 processes"):
        batches(shards, world_size=5)


def test_closing_the_iterator_ends_the_workers(shards):
    stream = batches(shards, num_steps=1000, workers=2)
    next(stream)
    workers = multiprocessing.active_children()
    assert len(workers) == 2
    stream.close()
    for worker in workers:
        worker.join(60)
        assert worker.exitcode is not None


def test_a_worker_that_hangs_is_a_users_error(shards):
    """As one does whose disk does not answer; it is stopped here, and hears nothing but SIGKILL."""
    before = collectives.exchange_timeout()
    collectives.set_exchange_timeout(3)
    try:
        stream = batches(shards, num_steps=100_000, workers=2)
        next(stream)
        workers = multiprocessing.active_children()
        for worker in workers:
            os.kill(worker.pid, signal.SIGSTOP)
        with pytest.raises(UserError, match="no batch came for 3 seconds: the storage"):
            for _ in stream:
                pass
        assert not any(worker.is_alive() for worker in workers)
    finally:
        collectives.set_exchange_timeout(before.total_seconds())


def one_payload_and_no_other():
    yield {"number": 1}
    time.sleep(3600)


def test_a_worker_killed_with_no_batch_on_its_way_is_noticed_at_once():
    before = collectives.exchange_timeout()
    collectives.set_exchange_timeout(60)
    try:
        payloads = stream([one_payload_and_no_other], workers=1)
        assert next(payloads) == {"number": 1}
        (worker,) = multiprocessing.active_children()
        threading.Timer(1, worker.kill).start()  # by then the trainer waits
        with pytest.raises(UserError, match=r"a data worker died .*lower data.workers"):
            next(payloads)
    finally:
        collectives.set_exchange_timeout(before.total_seconds())


def a_payload_and_then_silence():
    yield {"payload": 1}
    time.sleep(600)


def test_a_read_of_this_process_that_hangs_has_an_end():
    """Also for the signal that stops a run: it need not wait for a batch."""
    before = collectives.exchange_timeout()
    collectives.set_exchange_timeout(1)
    try:
        payloads = stream([a_payload_and_then_silence], workers=0)
        assert next(payloads) == {"payload": 1}
        with pytest.raises(UserError, match="no batch came for 1 seconds: the storage of the shards"):
            next(payloads)
    finally:
        collectives.set_exchange_timeout(before.total_seconds())
    asked = []
    payloads = stream([a_payload_and_then_silence], workers=0, stop=lambda: asked)
    assert next(payloads) == {"payload": 1}
    asked.append("SIGTERM")
    with pytest.raises(StoppedWaiting):
        next(payloads)


def test_a_stop_ends_the_wait_for_workers():
    asked = []
    payloads = stream([a_payload_and_then_silence], workers=1, stop=lambda: asked)
    assert next(payloads) == {"payload": 1}
    asked.append("SIGTERM")
    with pytest.raises(StoppedWaiting):
        next(payloads)


def readers():
    return {thread for thread in threading.enumerate() if thread.name == "reader"}


def test_the_readers_thread_ends_with_its_stream(shards):
    before = readers()
    stream_of_batches = batches(shards)
    next(stream_of_batches)
    (reader,) = readers() - before
    stream_of_batches.close()
    reader.join(60)
    assert not reader.is_alive()


def test_shared_memory_is_measured_against_all_batches_of_the_machine(monkeypatch):
    free = os.statvfs_result((4096, 4096, 0, 4096, 4096, 0, 0, 0, 0, 255))  # 16 MiB
    monkeypatch.setattr(os, "statvfs", lambda path: free)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert small_shared_memory(2 << 20, workers=3) is None  # 8 x 2 MiB
    text = small_shared_memory((2 << 20) + 1, workers=3)
    assert text.startswith("/dev/shm has 16.8 MB free, the batches of data.workers 3 take up to 16.8 MB")
    assert "--shm-size" in text
    assert small_shared_memory(1 << 30, workers=0) is None
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert small_shared_memory(2 << 20, workers=3)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "two")
    with pytest.raises(UserError, match="LOCAL_WORLD_SIZE is 'two', which is no whole number"):
        small_shared_memory(2 << 20, workers=3)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setattr(os, "statvfs", lambda path: (_ for _ in ()).throw(FileNotFoundError(2, "none")))
    assert "has 0.0 MB free" in small_shared_memory(1, workers=1)


BIG_PAYLOADS = """
import sys, torch

def payloads():
    for number in range(6):
        yield {"crops": [torch.full((1 << 20,), number, dtype=torch.uint8) for _ in range(3)], "name": "x"}

if __name__ == "__main__":
    from big_payloads import payloads
    from caco_scale.data.workers import stream
    from caco_scale.distributed import collectives
    from caco_scale.errors import UserError
    collectives.set_exchange_timeout(120)
    try:
        for number, payload in enumerate(stream([payloads], workers=1, batch_bytes=int(sys.argv[1]))):
            crops = [torch.as_tensor(crops) for crops in payload["crops"]]
            assert len(crops) == 3 and all((crop == number).all() for crop in crops), number
        print("all", number + 1, "came, in", type(payload["crops"][0]).__name__)
    except UserError as error:
        print("error:", error)
"""


@pytest.mark.parametrize(
    ("fill", "batch_bytes", "words"),
    [
        (0, 3 << 20, "all 6 came, in ndarray"),  # known at the start
        (0, 0, "all 6 came, in ndarray"),  # found out by the worker that sends: torch would drop the batch
        (2, 3 << 20, "error: no loader worker can be started (No space left on device; /dev/shm is full"),
    ],
)
def test_a_shared_memory_that_is_too_small_loses_no_batch(tmp_path, fill, batch_bytes, words):
    (tmp_path / "big_payloads.py").write_text(BIG_PAYLOADS)
    place = f"mount -t tmpfs -o size=2m tmpfs /dev/shm && head -c {fill}M /dev/zero > /dev/shm/full"
    try:
        subprocess.run(["unshare", "-m", "sh", "-c", place], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no mount of one's own here: {error}")
    root = str(Path(__file__).parent.parent)
    words_of_it = f"{place} && exec {sys.executable} {tmp_path}/big_payloads.py {batch_bytes}"
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", words_of_it],
        env={**os.environ, "PYTHONPATH": f"{root}:{tmp_path}", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.stdout.startswith(words), done.stdout + done.stderr
    assert "Traceback" not in done.stderr


def test_a_killed_worker_is_a_users_error(shards):
    stream = batches(shards, num_steps=100_000, workers=1)
    next(stream)
    os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
    with pytest.raises(UserError, match=r"a data worker died .*lower data.workers"):
        for _ in stream:
            pass


# Evaluation


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_sees_every_sample_once(shards, world_size, workers):
    topology = {"world_size": world_size, "batch_size": 7, "workers": workers}
    parts = [list(evaluation_batches(open_store(shards), 32, rank=r, **topology)) for r in range(world_size)]
    counts = [sum(len(indices) for indices, _, _ in part) for part in parts]
    assert sum(counts) == 50
    assert max(counts) - min(counts) <= 1
    seen = [batch for part in parts for batch in part]
    indices, crops, labels = (torch.cat(column) for column in zip(*seen, strict=True))
    assert indices.tolist() == list(range(50))
    assert labels.tolist() == [number % 4 for number in range(50)]
    assert labels.dtype == torch.int64
    for number in (0, 21, 49):
        image = decode_image(sample(shards, f"{number // 16:06d}.tar/{number:08d}")[0])
        assert np.array_equal(crops[number].numpy(), centre_crop(image, 32))


@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_names_what_it_leaves_out(corrupt_shards, workers):
    stream = evaluation_batches(
        open_store(corrupt_shards), 32, rank=0, world_size=1, batch_size=1, workers=workers
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        seen = list(stream)
    assert [int(i) for indices, _, _ in seen for i in indices] == sorted({*range(50)} - {3, 17, 18, 40})
    assert len(seen) == 50
    assert seen[3][1].shape == (0, 32, 32, 3)
    assert seen[3][2].shape == (0,)
    messages = [str(warning.message) for warning in caught]
    assert sum("left out of the evaluation: 000000.tar/00000003" in message for message in messages) == 1


# Processes: a trainer in a session of its own. It has no `if __name__ == "__main__"`: workers do not import it.

TRAINER = """
import multiprocessing, signal, sys
sys.path[:0] = sys.argv[2:]
import torch
from caco_scale.data.fork_server import start_fork_server
from test_loader import batches

received = []
for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
    signal.signal(number, lambda number, frame: received.append(number))
server = start_fork_server()
stream = batches(sys.argv[1], num_steps=60, workers=2)
next(stream)
pids = [p.pid for p in multiprocessing.active_children()] + [server._forkserver_pid]
print("pids", *pids, flush=True)
sys.stdin.readline()
print("finished", 1 + sum(1 for _ in stream), sorted(received), flush=True)
"""


@pytest.fixture
def trainer(shards):
    paths = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
    command = [sys.executable, "-c", TRAINER, shards, *paths]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, start_new_session=True, **pipes)
    word, *pids = process.stdout.readline().split()
    assert word == "pids"
    assert len(pids) == 3
    yield process, [int(pid) for pid in pids]
    process.kill()
    process.communicate()


def running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait_until_gone(pids, seconds=60):
    for _ in range(seconds * 20):
        if not any(map(running, pids)):
            return True
        time.sleep(0.05)
    return False


needs_proc = pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="needs /proc to see processes")


BESIDE = """
import multiprocessing, sys
sys.path[:0] = sys.argv[2:]
from test_loader import batches

stream = batches(sys.argv[1], num_steps=60, workers=1)
next(stream)
(worker,) = multiprocessing.active_children()
with multiprocessing.get_context("forkserver").Pool(1) as pool:
    print(pool.apply(abs, (-3,)), flush=True)
print(worker.is_alive(), sum(1 for _ in stream), flush=True)
"""


def test_a_pool_of_the_users_beside_the_loader_ends_by_sigterm(shards):
    """As Pool.terminate asks: what comes from multiprocessing's own fork server has no signal blocked."""
    paths = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
    command = [sys.executable, "-c", BESIDE, shards, *paths]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout, done.stderr) == (0, "3\nTrue 59\n", "")


@needs_proc
def test_no_worker_outlives_a_killed_trainer(trainer):
    process, pids = trainer
    assert all(map(running, pids))
    process.kill()
    assert wait_until_gone(pids)


@needs_proc
def test_signals_to_the_process_group_reach_the_trainer_only(trainer):
    process, pids = trainer
    numbers = [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT]
    for number in numbers:
        os.killpg(process.pid, number)
    process.stdin.write("go\n")
    process.stdin.flush()
    assert process.stdout.read().strip() == f"finished 60 {sorted(int(number) for number in numbers)}"
    assert process.wait() == 0
    assert wait_until_gone(pids)
