"""The processes that prepare batches: how they start, end, hang and die.

They come from a fork server that has imported the loader and nothing of the trainer: no CUDA, no fork of a
process with threads. Signals for the process group (Ctrl-C, a scheduler's SIGTERM and SIGUSR1) do not reach them,
because the trainer still wants batches while it saves its last checkpoint; but they die with it, however it dies.
"""

import contextlib
import functools
import multiprocessing
import multiprocessing.forkserver
import multiprocessing.resource_tracker
import os
import sys
import threading
from collections.abc import Callable, Generator, Sequence
from typing import cast

import torch
from torch.utils.data import DataLoader, IterableDataset
from webdataset.pipeline import DataPipeline

from caco_scale.distributed.collectives import exchange_timeout
from caco_scale.errors import UserError, one_line
from caco_scale.run.scratch import use_own_names
from caco_scale.run.signals import end_with_trainer, shielded

LAST_WORD_SECONDS = 5  # for workers that were killed
LOOK_SECONDS = 5  # between two looks whether a worker has died while the trainer waits


def stream(stages: Sequence[Callable], workers: int) -> Generator[dict, None, None]:
    """What a pipeline of ``stages`` yields, with so many workers (0: in this process).

    Workers start now; they end when the iterator is closed. UserError while iterating: a worker has met one, has
    died, or gives no batch for ``collectives.exchange_timeout()``.
    """
    loader = DataLoader(
        cast(IterableDataset, DataPipeline(*stages)),
        batch_size=None,
        collate_fn=_as_is,
        num_workers=workers,
        multiprocessing_context="forkserver" if workers else None,
        worker_init_fn=functools.partial(_start_worker, dict(os.environ)),
        timeout=LOOK_SECONDS if workers else 0,
        pin_memory=torch.cuda.is_initialized(),  # pages locked for copies to the GPU that the trainer uses
        generator=torch.Generator(),  # else it would draw from the global one, whose state is the trainer's
    )
    if workers:
        start_fork_server()
        with shielded(), _main_module_hidden():
            return _unwrap(iter(loader))
    return _unwrap(iter(loader))


def _as_is(payload):
    return payload  # torch would turn the arrays into tensors


def _start_worker(environment, worker_id):
    """In a new worker: the trainer's environment of now (keys of a store, ...), not that of the server's start."""
    os.environ.clear()
    os.environ.update(environment)
    end_with_trainer(worker_id)


def _unwrap(payloads):
    deadline = _Deadline(getattr(payloads, "_workers", ()))
    try:
        while True:
            with deadline:
                payload = _next(payloads, deadline)
            if payload is None:
                return
            if "user_error" in payload:
                raise UserError(payload["user_error"])
            yield payload
    except (RuntimeError, ConnectionError, EOFError) as error:
        if deadline.passed:
            deadline.abandon()
            raise UserError(
                f"no batch came for {exchange_timeout().total_seconds():,.0f} seconds: the storage of the shards does "
                "not answer; once it does, the same command goes on from the last checkpoint"
            ) from None
        # torch tells of a dead worker by a RuntimeError, and the batch it was sending by the errors of its socket.
        if isinstance(error, RuntimeError) and not str(error).startswith("DataLoader worker"):
            raise
        raise UserError(
            f"a data worker died ({one_line(error)}): the machine may be short of memory or /dev/shm, "
            "lower data.workers"
        ) from None
    finally:
        del payloads  # ends the workers now: the traceback of an error would keep it, and them, alive


def _next(payloads, deadline):
    """The next payload, or None. torch looks for dead workers only when its time limit ends: a short one, many times.

    Else one that was killed with no batch on its way would be noticed after the whole ``exchange_timeout()``.
    """
    while True:
        try:
            return next(payloads, None)
        except RuntimeError as error:
            if deadline.passed or not str(error).startswith("DataLoader timed out"):
                raise


class _Deadline:
    """Ends workers that let the trainer wait for a batch for longer than ``collectives.exchange_timeout()``.

    By SIGKILL: a worker may hang as a whole, and then the trainer waits for it in a place that has no time limit of its
    own (the shared memory that a finished batch comes in). One that the kernel keeps, as while a disk is silent,
    hears nothing of it; then the DataLoader's next look ends the wait.
    """

    def __init__(self, workers):
        self.workers, self.passed = workers, False

    def __enter__(self):
        self._timer = threading.Timer(exchange_timeout().total_seconds(), self._end)
        self._timer.daemon = True
        if self.workers:
            self._timer.start()

    def __exit__(self, *exception):
        self._timer.cancel()

    def _end(self):
        self.passed = True
        for worker in self.workers:
            worker.kill()

    def abandon(self):
        """This process's end is not to wait for workers that the kernel keeps."""
        for worker in self.workers:
            worker.join(LAST_WORD_SECONDS)
            if worker.is_alive():
                multiprocessing.process._children.discard(worker)  # ty: ignore[missing-attribute]


def start_fork_server() -> None:
    """Start the process that workers are forked from, if it does not run. Returns while it still imports.

    Worth calling early: its imports then overlap with building the model. It starts with the group's signals
    blocked, and so do the workers: torch's workers take a dead server for a dead trainer.
    """
    use_own_names()
    multiprocessing.set_forkserver_preload(["caco_scale.data.loader"])
    with shielded(), _main_module_hidden():
        multiprocessing.forkserver.ensure_running()


@contextlib.contextmanager
def _main_module_hidden():
    """Keep new workers from importing the trainer's main module, as multiprocessing would have each do.

    It costs seconds and hundreds of megabytes a worker (DeepSpeed is behind it), and nothing of it is used
    there.
    """
    main = sys.modules["__main__"]
    hidden = {name: getattr(main, name) for name in ("__spec__", "__file__") if hasattr(main, name)}
    try:
        main.__spec__ = None
        if "__file__" in hidden:
            del main.__file__
        yield
    finally:
        for name, value in hidden.items():
            setattr(main, name, value)
