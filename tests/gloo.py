"""Run a function on several gloo processes and collect what each rank returns."""

import os
import time
import traceback
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

DEADLINE_SECONDS = 600


def set_environment(environment):
    """For a child of the fork server, whose own environment is that of its start, perhaps an earlier test's."""
    os.environ.clear()
    os.environ.update(environment)


def _rank_main(rank, world_size, store_path, function, args, results, environment):
    torch.set_num_threads(1)
    set_environment(environment)
    # As a launcher would: accelerate takes the world size from here, not from the process group.
    os.environ |= {"RANK": f"{rank}", "LOCAL_RANK": f"{rank}", "WORLD_SIZE": f"{world_size}"}
    os.environ |= {"LOCAL_WORLD_SIZE": f"{world_size}", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    store = dist.FileStore(store_path, world_size)
    dist.init_process_group(
        "gloo", store=store, rank=rank, world_size=world_size, timeout=timedelta(seconds=300)
    )
    dist.barrier()  # one that is done at once would leave before the others have met it
    try:
        results.put((rank, function(rank, world_size, *args), None))
    except BaseException:
        results.put((rank, None, traceback.format_exc()))
    finally:
        dist.destroy_process_group()


def run_ranks(function, world_size, *args, afresh=False):
    """Call ``function(rank, world_size, *args)`` on ``world_size`` gloo ranks; results in rank order.

    ``function`` is a module-level function; what it returns is pickled (numpy arrays, plain Python; a tensor is
    sent by value only if the caller detaches and clones it). A rank that raises fails the caller with its traceback.
    ``afresh``: ranks import all by themselves, for what the environment decides when a module is imported.
    """
    import tempfile

    os.environ.setdefault("OMP_NUM_THREADS", "1")
    # A server that has imported torch forks the ranks: a tenth of a second, where a fresh start takes seconds.
    context = mp.get_context("spawn" if afresh else "forkserver")
    with tempfile.TemporaryDirectory() as folder:
        results = context.SimpleQueue()
        processes = [
            context.Process(
                target=_rank_main,
                args=(rank, world_size, f"{folder}/store", function, args, results, dict(os.environ)),
            )
            for rank in range(world_size)
        ]
        for process in processes:
            process.start()
        collected = {}
        deadline = time.monotonic() + DEADLINE_SECONDS
        while len(collected) < world_size:
            # Asked before the look into the queue: what the last one sent is there then.
            alive = any(p.is_alive() for p in processes)
            if results.empty() and not alive:
                break
            if time.monotonic() > deadline:
                for process in processes:
                    process.kill()
                raise AssertionError(
                    f"ranks {sorted(collected)} of {world_size} reported in {DEADLINE_SECONDS} s"
                )
            if results.empty():
                processes[0].join(0.02)
                continue
            rank, value, error = results.get()
            if error is not None:
                for process in processes:
                    process.kill()
                raise AssertionError(f"rank {rank} of {world_size} raised:\n{error}")
            collected[rank] = value
        for process in processes:
            process.join()
    assert len(collected) == world_size, (
        f"ranks {sorted(collected)} of {world_size} reported; the others died"
    )
    return [collected[rank] for rank in range(world_size)]
