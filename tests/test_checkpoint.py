"""Checkpoints: elastic, exact, atomic under kill -9, honest about full disks and damage."""

import itertools
import os
import pickle
import random
import resource
import shutil
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.multiprocessing as mp
from gloo import run_ranks
from run_directories import change_values, sign
from torch import nn

import caco_scale
from caco_scale.checkpoint.contents import restore, training_state
from caco_scale.checkpoint.folder import latest, read_values, step_path, steps
from caco_scale.checkpoint.read import load, load_tensors
from caco_scale.checkpoint.state import Block, State
from caco_scale.checkpoint.write import Checkpointer
from caco_scale.distributed.collectives import shard_range
from caco_scale.errors import UserError
from caco_scale.method.bank import ShardedBank
from caco_scale.optim.build import build_optimizer, init_optimizer_state


def on_ranks(world_size, function, *args):
    """``run_ranks``, and this process itself, without a process group, for one rank."""
    return [function(0, 1, *args)] if world_size == 1 else run_ranks(function, world_size, *args)


# ----------------------------------------------------------------------------------------------------------
# Elastic: the bank's rows


def full_tensors(num_rows):
    generator = torch.Generator().manual_seed(0)
    return {
        "query.weight": torch.randn(7, 3, 2, generator=generator),
        "query.bias": torch.randn(11, generator=generator, dtype=torch.float64),
        "query_buffer.count": torch.tensor(41),
        "bank.rows": torch.randn(num_rows, 3, generator=generator),
        "bank.assignments": torch.arange(num_rows),
    }


def bank_state(full, rank, world_size, fill=None):
    """Parameters replicated, rows split as the bank splits them; ``fill`` overwrites, for a state to load into."""
    num_rows = len(full["bank.rows"])
    start, stop = shard_range(num_rows, world_size, rank)
    local = {name: t.clone() if fill is None else torch.full_like(t, fill) for name, t in full.items()}
    # A transposed copy: same values, not contiguous.
    local["query.weight"] = local["query.weight"].transpose(0, 1).contiguous().transpose(0, 1)
    for name in ("bank.rows", "bank.assignments"):
        offset = (start, *[0] * (local[name].ndim - 1))
        local[name] = Block(local[name][start:stop], offset, full[name].shape)
    return State(local, {"fingerprint": "f00d", "nested": {"lr": 0.25, "names": ["a", None]}})


def save_rows(rank, world_size, folder, num_rows):
    checkpointer = Checkpointer(folder)
    checkpointer.save(3, bank_state(full_tensors(num_rows), rank, world_size), wait=True)
    checkpointer.close()


def load_rows(rank, world_size, folder, num_rows):
    state = bank_state(full_tensors(num_rows), rank, world_size, fill=-1)
    values = load(latest(folder), state)
    return values, {
        name: (t.local if isinstance(t, Block) else t).numpy() for name, t in state.tensors.items()
    }


@pytest.fixture(scope="module")
def saved_by_two(tmp_path_factory):
    """The folder of a checkpoint with 997 rows (499 and 498) that two ranks wrote."""
    folder = tmp_path_factory.mktemp("two")
    run_ranks(save_rows, 2, str(folder), 997)
    return folder


def check_rows(folder, num_rows, saved_by, loaded_by):
    full = full_tensors(num_rows)
    parts = on_ranks(loaded_by, load_rows, str(folder), num_rows)
    for values, tensors in parts:
        assert values["step"] == 3
        assert values["world_size"] == saved_by
        assert values["fingerprint"] == "f00d"
        assert values["nested"] == {"lr": 0.25, "names": ["a", None]}
        for name in ("query.weight", "query.bias", "query_buffer.count"):
            np.testing.assert_array_equal(tensors[name], full[name].numpy())
    for name in ("bank.rows", "bank.assignments"):
        joined = np.concatenate([tensors[name] for _, tensors in parts])
        np.testing.assert_array_equal(joined, full[name].numpy())


@pytest.mark.parametrize("loaded_by", [1, 3])
def test_saved_by_two_ranks_loaded_by_others(saved_by_two, loaded_by):
    check_rows(saved_by_two, 997, 2, loaded_by)


@pytest.mark.parametrize(("saved_by", "loaded_by"), [(4, 3), (1, 2)])
def test_ranks_without_rows(tmp_path, saved_by, loaded_by):
    on_ranks(saved_by, save_rows, str(tmp_path), 5)  # four ranks own 2, 2, 1 and 0 rows
    check_rows(tmp_path, 5, saved_by, loaded_by)


def test_whole_tensors_come_back_in_their_shapes_without_a_process_group(saved_by_two):
    full = full_tensors(997)
    tensors = load_tensors(latest(saved_by_two))
    assert set(tensors) == set(full)
    for name, tensor in tensors.items():
        assert tensor.dtype == full[name].dtype
        assert torch.equal(tensor, full[name])
    assert set(load_tensors(latest(saved_by_two), ["query.bias"])) == {"query.bias"}
    with pytest.raises(UserError, match=r"holds no tensor query\.gias"):
        load_tensors(latest(saved_by_two), ["query.gias"])


def test_ranks_share_the_writing_of_replicated_tensors_evenly(tmp_path):
    run_ranks(save_replicated, 2, str(tmp_path))
    sizes = [entry.stat().st_size for entry in latest(tmp_path).glob("*.distcp")]
    assert len(sizes) == 2
    assert max(sizes) < 1.2 * min(sizes)
    assert sum(sizes) < 1.2 * 12 * 40_000  # once, not twice


def save_replicated(rank, world_size, folder):
    save = Checkpointer(folder).save
    save(1, State({f"query.{i}": torch.zeros(100, 100) for i in range(12)}), wait=True)


def test_any_dcp_tool_can_read_the_file(saved_by_two):
    target = {"bank.rows": torch.zeros(997, 3), "query.bias": torch.zeros(11, dtype=torch.float64)}
    dcp.load(target, checkpoint_id=latest(saved_by_two), no_dist=True)
    for name, tensor in target.items():
        assert torch.equal(tensor, full_tensors(997)[name])


# ----------------------------------------------------------------------------------------------------------
# Elastic: flat ranges, as a partitioned optimizer owns them

SHAPES = {"query.a": (13, 7), "query.b": (5,), "query.c": (4, 3, 3, 3), "optimizer.c/momentum_buffer": (108,)}


def flat_values(name):
    return torch.arange(np.prod(SHAPES[name]), dtype=torch.float32) + len(name) / 16


def ranges_state(rank, world_size, fill=None):
    """Each parameter cut at random places; the pieces dealt to the ranks at random, some ranks getting none."""
    rng, tensors = random.Random(world_size), {}
    for name, shape in SHAPES.items():
        numel = int(np.prod(shape))
        cuts = [0, *sorted(rng.sample(range(1, numel), min(6, numel - 1))), numel]
        blocks = []
        for start, stop in itertools.pairwise(cuts):
            if rng.randrange(world_size) == rank:
                local = flat_values(name)[start:stop].clone()
                local = local if fill is None else local.fill_(fill)
                blocks.append(Block(local, (start,), (numel,), shape))
        tensors[name] = blocks or [Block(torch.empty(0), (0,), (numel,), shape)]
    return State(tensors)


def whole_state(fill=None):
    state = {name: flat_values(name).view(shape) for name, shape in SHAPES.items()}
    return State({name: t if fill is None else torch.full_like(t, fill) for name, t in state.items()})


def save_ranges(rank, world_size, folder):
    Checkpointer(folder).save(1, ranges_state(rank, world_size), wait=True)


def load_ranges(rank, world_size, folder):
    state = ranges_state(rank, world_size, fill=-1)
    load(latest(folder), state)
    wanted = ranges_state(rank, world_size)
    num_blocks = 0
    for name, blocks in state.tensors.items():
        for block, expected in zip(blocks, wanted.tensors[name], strict=True):
            assert torch.equal(block.local, expected.local), (rank, name, block.offset)
            num_blocks += block.local.numel() > 0
    return num_blocks


@pytest.fixture(scope="module")
def ranges_of_three(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranges")
    run_ranks(save_ranges, 3, str(folder))
    return folder


def check_whole(folder):
    state = whole_state(fill=-1)
    load(latest(folder), state)
    for name, tensor in state.tensors.items():
        assert torch.equal(tensor, flat_values(name).view(SHAPES[name]))
    assert {n: t.shape for n, t in load_tensors(latest(folder)).items()} == SHAPES


def test_flat_ranges_become_whole_parameters(ranges_of_three, tmp_path):
    check_whole(ranges_of_three)
    save_ranges(0, 1, tmp_path)  # several blocks of each tensor on one rank
    check_whole(tmp_path)


def test_flat_ranges_become_other_flat_ranges(ranges_of_three):
    assert sum(run_ranks(load_ranges, 2, str(ranges_of_three))) > 8


def test_whole_parameters_become_flat_ranges(tmp_path):
    Checkpointer(tmp_path).save(1, whole_state(), wait=True)
    assert sum(run_ranks(load_ranges, 3, str(tmp_path))) > 8


def test_blocks_that_do_not_tile_a_tensor_are_an_error(tmp_path):
    checkpointer = Checkpointer(tmp_path)
    with pytest.raises(UserError, match=r"query\.w: the ranks give 6 of its 10 elements"):
        checkpointer.save(1, State({"query.w": Block(torch.zeros(6), (4,), (10,))}), wait=True)
    overlap_and_gap = [Block(torch.zeros(6), (0,), (10,)), Block(torch.zeros(4), (4,), (10,))]
    with pytest.raises(UserError, match="Failed to validate global plan"):
        checkpointer.save(1, State({"query.w": overlap_and_gap}), wait=True)
    assert steps(tmp_path) == []


def different_names(rank, world_size, folder):
    checkpointer = Checkpointer(folder)
    state = State({f"query.{rank}": torch.zeros(3)})
    with pytest.raises(UserError, match="do not name the same tensors"):
        checkpointer.save(1, state, wait=True)


def test_ranks_that_name_different_tensors_are_an_error(tmp_path):
    run_ranks(different_names, 2, str(tmp_path))
    assert os.listdir(tmp_path) == []


# ----------------------------------------------------------------------------------------------------------
# The state of a run


def small_run(seed, group=None, optimizer="lars"):
    torch.manual_seed(seed)
    model = nn.Module()
    for side in ("query", "key"):
        model.add_module(side, nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4)))
    for tensor in (*model.parameters(), *(b for b in model.buffers() if b.is_floating_point())):
        nn.init.normal_(tensor)
    optimizer = build_optimizer(optimizer, model.query, 1e-4)
    init_optimizer_state(optimizer)
    for state in optimizer.state.values():
        for tensor in state.values():
            nn.init.normal_(tensor)
    bank = ShardedBank(10, 4, group=group, seed=seed)
    nn.init.normal_(bank.velocity)
    bank.assignments.random_(100)
    bank.pointer = seed
    strategy = SimpleNamespace(module=model, optimizer=optimizer, partitions=None, loading=nullcontext)
    return strategy, bank


def everything(strategy, bank):
    model, optimizer = strategy.module, strategy.optimizer
    rows, velocity = bank.full()
    slots = {f"{i}{k}": v for i, s in enumerate(optimizer.state.values()) for k, v in s.items()}
    tensors = {**model.state_dict(), **slots, "rows": rows, "velocity": velocity}
    return {name: t.numpy().copy() for name, t in tensors.items()}, bank.pointer


def save_run(rank, world_size, folder, optimizer):
    # One seed for all ranks: replicas are equal, and so is each rank's draw for its own rows.
    run = small_run(5, optimizer=optimizer)
    checkpointer = Checkpointer(folder)
    checkpointer.save(9, training_state(*run, {"epoch": 2}), wait=True)
    return everything(*run)


def load_run(rank, world_size, folder, optimizer):
    run = small_run(6, optimizer=optimizer)
    values = restore(latest(folder), *run)
    assert (values["step"], values["epoch"]) == (9, 2)
    return everything(*run)


@pytest.mark.parametrize(("optimizer", "saved_by", "loaded_by"), [("lars", 2, 3), ("adamw", 2, 1)])
def test_a_whole_run_comes_back_at_another_world_size(tmp_path, optimizer, saved_by, loaded_by):
    (wanted, pointer), *_ = run_ranks(save_run, saved_by, str(tmp_path), optimizer)
    for found, found_pointer in on_ranks(loaded_by, load_run, str(tmp_path), optimizer):
        assert found_pointer == pointer == 5
        assert set(found) == set(wanted)
        for name, value in wanted.items():
            np.testing.assert_array_equal(found[name], value, err_msg=name)


# ----------------------------------------------------------------------------------------------------------
# Asynchronous


def save_and_go_on(rank, world_size, folder):
    """Training changes every tensor as soon as save() returns, six steps in a row."""
    state = State({"query.w": torch.zeros(500, 1000), "bank.rows": None}, {})
    rows = torch.zeros(1000, 100)
    state.tensors["bank.rows"] = Block(rows, (rank * 1000, 0), (world_size * 1000, 100))
    checkpointer = Checkpointer(folder)
    for step in range(1, 7):
        for tensor in (state.tensors["query.w"], rows):
            tensor.fill_(step)
        checkpointer.save(step, state)
        for tensor in (state.tensors["query.w"], rows):
            tensor.fill_(-1)
    checkpointer.close()


def test_the_file_holds_what_was_there_when_save_was_called(tmp_path):
    run_ranks(save_and_go_on, 2, str(tmp_path))
    assert steps(tmp_path) == [1, 2, 3, 4, 5, 6]
    for step in steps(tmp_path):
        for name, tensor in load_tensors(tmp_path / f"step_{step:08d}").items():
            assert (tensor == step).all(), (step, name)


def test_save_returns_before_the_file_is_complete_and_wait_after(tmp_path):
    checkpointer = Checkpointer(tmp_path)
    state = State({"query.w": torch.zeros(4_000_000)})
    checkpointer.save(1, state)
    assert latest(tmp_path) is None  # 16 MB are not on the disk before the next line runs
    checkpointer.wait()
    assert latest(tmp_path) == tmp_path / "step_00000001"


ENDS_MEANWHILE = """
import sys, torch
from caco_scale.checkpoint.state import State
from caco_scale.checkpoint.write import Checkpointer
from caco_scale.errors import UserError, exit_on_user_error

@exit_on_user_error
def main():
    Checkpointer(sys.argv[1]).save(1, State({"query.w": torch.ones(8_000_000)}))
    raise UserError("a mistake that shows at this step")

main()
"""


def test_a_process_that_ends_by_an_error_completes_its_save_and_keeps_its_exit_code(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(Path(caco_scale.__file__).parents[1])}
    command = [sys.executable, "-c", ENDS_MEANWHILE, str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 2
    assert done.stderr == "error: a mistake that shows at this step\n"
    assert (load_tensors(latest(tmp_path))["query.w"] == 1).all()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: staging from a GPU")
def test_tensors_on_a_gpu_are_staged_in_stream_order(tmp_path):
    weight = torch.zeros(8000, 1000, device="cuda")
    checkpointer = Checkpointer(tmp_path)
    for step in range(1, 4):
        weight.fill_(step)
        checkpointer.save(step, State({"query.w": weight}))
        weight.fill_(-1)
    checkpointer.wait()
    for step in range(1, 4):
        assert (load_tensors(tmp_path / f"step_{step:08d}")["query.w"] == step).all()


# ----------------------------------------------------------------------------------------------------------
# The folder


def save_steps(folder, numbers, keep=0):
    checkpointer = Checkpointer(folder, keep)
    for step in numbers:
        checkpointer.save(step, State({"query.w": torch.full((10,), float(step))}), wait=True)


def test_only_the_newest_are_kept(tmp_path):
    save_steps(tmp_path, range(1, 6), keep=2)
    assert sorted(os.listdir(tmp_path)) == ["step_00000004", "step_00000005"]


def test_a_resume_from_an_older_checkpoint_never_deletes_what_it_just_wrote(tmp_path):
    save_steps(tmp_path, [100, 200])
    save_steps(tmp_path, [10, 20], keep=1)
    assert steps(tmp_path) == [20, 100, 200]


def test_the_same_step_again_replaces_it(tmp_path):
    save_steps(tmp_path, [7])
    state = State({"query.w": torch.full((10,), 70.0)})
    Checkpointer(tmp_path).save(7, state, wait=True)
    assert (load_tensors(latest(tmp_path))["query.w"] == 70).all()
    assert os.listdir(tmp_path) == ["step_00000007"]


def test_what_killed_saves_left_is_removed_and_a_half_replaced_one_comes_back(tmp_path):
    save_steps(tmp_path, [7])
    os.rename(tmp_path / "step_00000007", tmp_path / "step_00000007.old.tmp")
    (tmp_path / "step_00000008.tmp").mkdir()
    (tmp_path / "step_00000008.tmp" / "__0_0.distcp").write_bytes(b"half")
    assert latest(tmp_path) is None
    assert Checkpointer(tmp_path).latest() == tmp_path / "step_00000007"
    assert os.listdir(tmp_path) == ["step_00000007"]


def test_no_folder_has_no_checkpoint(tmp_path):
    assert latest(tmp_path / "none") is None
    with pytest.raises(UserError, match="no checkpoint at"):
        read_values(tmp_path / "none")


# ----------------------------------------------------------------------------------------------------------
# kill -9


def train_until_killed(rank, world_size, folder, store, numel):
    """Resume, then save at every step without a pause: most moments are inside a save."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(store, world_size), rank=rank, world_size=world_size)
    checkpointer = Checkpointer(folder, keep=3)
    state = kill_state(rank, world_size, numel)
    newest = checkpointer.latest()
    step = load(newest, state)["step"] if newest else 0
    while True:
        step += 1
        for value in state.tensors.values():
            (value.local if isinstance(value, Block) else value).fill_(step)
        checkpointer.save(step, state)


def kill_state(rank, world_size, numel):
    start, stop = shard_range(numel, world_size, rank)
    return State(
        {"query.w": torch.zeros(numel), "bank.rows": Block(torch.zeros(stop - start), (start,), (numel,))}
    )


@pytest.mark.long
def test_kill_9_at_any_moment_leaves_a_readable_latest(tmp_path):
    # The fork server imports torch once, so that 10 jobs start in seconds.
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(["test_checkpoint"])
    folder, rng, numel = tmp_path / "checkpoints", random.Random(0), 500_000
    leftovers, progress = 0, [0]
    for attempt in range(10):
        world_size = 1 + attempt % 2
        ranks = [
            context.Process(
                target=train_until_killed, args=(rank, world_size, folder, f"{tmp_path}/{attempt}", numel)
            )
            for rank in range(world_size)
        ]
        for process in ranks:
            process.start()
        deadline = time.time() + 60
        while not steps(folder)[-1:] > progress[-1:]:  # at least one save by this attempt
            assert time.time() < deadline
            assert all(process.is_alive() for process in ranks)
            time.sleep(0.005)
        time.sleep(rng.uniform(0, 0.2))
        rng.shuffle(ranks)
        for process in ranks:  # the survivor notices for a moment that the other is gone
            process.kill()
            time.sleep(rng.choice([0, 0.05]))
        for process in ranks:
            process.join()
        leftovers += any(name.endswith(".tmp") for name in os.listdir(folder))
        for step in steps(folder)[-2:]:
            state = kill_state(0, 1, numel)
            assert load(step_path(folder, step), state)["step"] == step
            assert (state.tensors["query.w"] == step).all()
            assert (state.tensors["bank.rows"].local == step).all()
        progress.append(step)
    assert leftovers >= 3, "the kills did not hit the window"
    assert progress == sorted(set(progress))


# ----------------------------------------------------------------------------------------------------------
# Full disks


def save_beyond_the_limit(rank, world_size, folder):
    checkpointer = Checkpointer(folder)
    rows = [1000, 1_000_000]
    state = State({"bank.rows": Block(torch.ones(rows[rank]), (rank * rows[0],), (sum(rows),))})
    checkpointer.save(1, state, wait=True)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    if rank == 1:  # rank 0's disk is fine
        resource.setrlimit(resource.RLIMIT_FSIZE, (2_000_000, before[1]))
    checkpointer.save(2, state)
    checkpointer._thread.join()
    messages = []
    for failed in (True, False):
        assert checkpointer.failed == failed
        try:
            checkpointer.wait()
        except UserError as error:
            messages.append(str(error))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    checkpointer.save(3, state, wait=True)
    checkpointer.close()
    return messages


def test_a_rank_that_cannot_write_is_the_same_one_line_error_on_every_rank(tmp_path):
    for messages in run_ranks(save_beyond_the_limit, 2, str(tmp_path)):
        assert len(messages) == 1
        assert "\n" not in messages[0]
        assert (
            f"the checkpoint of step 2 could not be written to {tmp_path}/step_00000002: File too large"
            in messages[0]
        )
        assert " GB)" in messages[0]
    assert sorted(os.listdir(tmp_path)) == ["step_00000001", "step_00000003"]
    for tensor in load_tensors(tmp_path / "step_00000001").values():
        assert (tensor == 1).all()


@pytest.fixture
def small_disk(tmp_path):
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("this user cannot mount a small tmpfs; the file size limit above stands for it")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_is_one_line_and_older_checkpoints_stay(small_disk):
    checkpointer = Checkpointer(small_disk)
    checkpointer.save(1, State({"query.w": torch.ones(1000)}), wait=True)
    with pytest.raises(
        UserError, match=r"step 2 .*: No space left on device \(free there: 0.00 GB\)"
    ) as caught:
        checkpointer.save(2, State({"query.w": torch.ones(1_000_000)}), wait=True)
    assert "\n" not in str(caught.value)
    assert os.listdir(small_disk) == ["step_00000001"]
    checkpointer.save(3, State({"query.w": torch.ones(1000)}), wait=True)
    assert steps(small_disk) == [1, 3]


def test_a_folder_that_cannot_be_made_is_a_users_error(tmp_path):
    (tmp_path / "checkpoints").write_text("a file")
    with pytest.raises(UserError, match="cannot make the checkpoint folder"):
        Checkpointer(tmp_path / "checkpoints")


# ----------------------------------------------------------------------------------------------------------
# Damage, strangers, malice


def test_differences_between_state_and_checkpoint_are_listed(tmp_path):
    tensors = {
        "query.a": torch.zeros(2),
        "query.b": torch.zeros(3),
        "query.c": torch.zeros(4),
        "query.e": torch.zeros(1),
    }
    Checkpointer(tmp_path).save(1, State(tensors), wait=True)
    here = {
        "query.b": torch.zeros(5),
        "query.c": torch.zeros(4).double(),
        "query.d": torch.zeros(1),
        "query.e": torch.ones(1),
    }
    with pytest.raises(UserError) as caught:
        load(latest(tmp_path), State(here))
    message = str(caught.value)
    assert "not in the checkpoint: query.d; only in the checkpoint: query.a; " in message
    assert "query.b: (3,) elements in the checkpoint, (5,) here" in message
    assert "query.c: torch.float32 in the checkpoint, torch.float64 here" in message
    assert "query.e" not in message
    assert here["query.e"] == 1  # nothing was loaded


def damage(path, file, how):
    data = bytearray((path / file).read_bytes())
    if how == "missing":
        (path / file).unlink()
        return
    if how == "cut":
        data = data[: len(data) // 2]
    if how == "flipped":
        data[len(data) // 2] ^= 1
    (path / file).write_bytes(data)


@pytest.mark.parametrize("how", ["cut", "flipped", "missing"])
@pytest.mark.parametrize("file", ["__0_0.distcp", ".metadata", "values.json"])
def test_a_damaged_file_is_named_with_the_next_older_checkpoint(tmp_path, file, how):
    Checkpointer(tmp_path).save(4, State({"query.w": torch.arange(3000.0)}), wait=True)
    Checkpointer(tmp_path).save(5, State({"query.w": torch.arange(3000.0)}), wait=True)
    if how == "flipped" and file == "values.json":
        (tmp_path / "step_00000005" / file).write_text('{"format": 1, "shapes": 3}')
    else:
        damage(tmp_path / "step_00000005", file, how)
    with pytest.raises(UserError) as caught:
        load(latest(tmp_path), State({"query.w": torch.zeros(3000)}))
    message = str(caught.value)
    assert str(tmp_path / "step_00000005") in message
    assert file in message
    assert f"remove {tmp_path}/step_00000005 and the run resumes from step_00000004" in message
    assert "\n" not in message


def load_damaged(rank, world_size, folder):
    try:
        load(latest(folder), bank_state(full_tensors(997), rank, world_size))
    except UserError as error:
        return str(error)


def test_damage_that_one_rank_meets_stops_every_rank(saved_by_two, tmp_path):
    shutil.copytree(latest(saved_by_two), tmp_path / "step_00000003")
    # Only the rank that owns the second half of the rows reads this block.
    path = latest(tmp_path) / "__1_0.distcp"
    data = bytearray(path.read_bytes())
    row = full_tensors(997)["bank.rows"][750].numpy().tobytes()
    assert data.count(row) == 1
    data[data.index(row)] ^= 1
    path.write_bytes(data)
    messages = run_ranks(load_damaged, 2, str(tmp_path))
    assert messages[0] == messages[1]
    assert "__1_0.distcp" in messages[0]


class Malice:
    def __init__(self, call):
        self.call = call

    def __reduce__(self):
        return self.call


def test_metadata_cannot_run_code(tmp_path):
    Checkpointer(tmp_path).save(1, State({"query.w": torch.zeros(3)}), wait=True)
    path, marker = latest(tmp_path) / ".metadata", tmp_path / "ran"
    calls = {
        "posix.system": (os.system, (f"touch {marker}",)),
        "builtins.eval": (eval, (f"open({str(marker)!r}, 'w')",)),
        "builtins.getattr": (getattr, ("", "upper")),
        "torch.serialization.load": (torch.load, (str(marker),)),
    }
    for name, call in calls.items():
        data = pickle.dumps({"state_dict_metadata": Malice(call)})
        values = read_values(path.parent)
        path.write_bytes(data)
        change_values(path.parent, files={**values["files"], ".metadata": len(data)})
        with pytest.raises(UserError, match=rf"\.metadata: it names {name}, which no checkpoint needs"):
            load_tensors(path.parent)
        assert not marker.exists()


def test_metadata_cannot_lead_out_of_the_folder(tmp_path):
    Checkpointer(tmp_path).save(1, State({"query.w": torch.zeros(3)}), wait=True)
    path = latest(tmp_path) / ".metadata"
    path.write_bytes(path.read_bytes().replace(b"__0_0.distcp", b"../../secret"))
    sign(path.parent)
    with pytest.raises(UserError, match="unknown file"):
        load_tensors(path.parent)


def test_another_format_is_an_error_with_the_way_out(tmp_path):
    Checkpointer(tmp_path).save(1, State({}), wait=True)
    change_values(latest(tmp_path), format=2)
    with pytest.raises(UserError, match="has format 2, this version reads 1: update"):
        load(latest(tmp_path), State({}))


def test_no_path_of_this_machine_is_in_the_checkpoint(tmp_path):
    save_steps(tmp_path, [1])
    for entry in latest(tmp_path).iterdir():
        assert str(tmp_path).encode() not in entry.read_bytes()
