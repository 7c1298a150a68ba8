"""The processes that prepare batches: how they start, end, hang and die.

They come from a fork server of their own, which has imported the loader and nothing of the trainer: no CUDA, no fork
of a process with threads. Signals for the process group (Ctrl-C, a scheduler's SIGTERM and SIGUSR1) do not reach them,
because the trainer still wants batches while it saves its last checkpoint; but they die with it, however it dies.

A batch comes in shared memory, ``/dev/shm``, of which containers have little (Docker's 64 MB). One that does not fit
comes through the worker's pipe: torch would drop it, and the trainer wait for ever.
"""

import functools
import multiprocessing
import multiprocessing.queues
import os
import queue
import threading
import warnings
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import cast

import torch
from torch.utils.data import DataLoader, IterableDataset
from webdataset.pipeline import DataPipeline

from caco_scale.data.fork_server import WorkerContext, start_fork_server
from caco_scale.distributed.collectives import exchange_timeout
from caco_scale.distributed.environment import processes_of_node
from caco_scale.errors import UserError, one_line
from caco_scale.run.signals import end_with_trainer, shielded

LAST_WORD_SECONDS = 5  # for workers that were killed
LOOK_SECONDS = (
    2  # between two looks whether a worker has died, or a stop is asked for, while the trainer waits
)
PREFETCH = 2  # batches that a worker has ready
warnings.filterwarnings("ignore", message="This DataLoader will create")  # too_many_workers says it
SHARED_MEMORY = "/dev/shm"
MORE_SHARED_MEMORY = "give the container more (docker run --shm-size 1g)"


class StoppedWaiting(Exception):
    """No batch is there, and the trainer is asked to stop: it need not wait for one."""


def stream(
    stages: Sequence[Callable], workers: int, batch_bytes: int = 0, stop: Callable[[], object] = bool
) -> Generator[dict, None, None]:
    """What a pipeline of ``stages`` yields, with so many workers (0: in this process).

    Workers start now; they end when the iterator is closed.

    Args:
        batch_bytes: of the tensors of a payload, which decide whether it comes in shared memory.
        stop: asked while no payload is there; true: StoppedWaiting is raised.
    Raises:
        UserError: while iterating: a worker has met one, has died, or none gives a batch for
            ``collectives.exchange_timeout()``; at the call: no worker can be started here.
    """
    through_pipes = small_shared_memory(batch_bytes, workers) is not None
    loader = DataLoader(
        cast(IterableDataset, DataPipeline(*stages)),
        batch_size=None,
        collate_fn=_in_the_message if through_pipes else _as_is,
        num_workers=workers,
        multiprocessing_context=WorkerContext() if workers else None,
        worker_init_fn=functools.partial(_start_worker, dict(os.environ)),
        timeout=LOOK_SECONDS if workers else 0,
        prefetch_factor=PREFETCH if workers else None,
        pin_memory=torch.cuda.is_initialized(),  # pages locked for copies to the GPU that the trainer uses
        generator=torch.Generator(),  # else it would draw from the global one, whose state is the trainer's
    )
    if not workers:
        return _unwrap(_Reader(iter(loader)), stop)
    check_semaphores()
    start_fork_server()
    with shielded():
        return _unwrap(iter(loader), stop)


def small_shared_memory(batch_bytes: int, workers: int) -> str | None:
    """Why batches of so many bytes come through pipes instead of shared memory; None: they do not.

    Every process of this machine has its workers' batches there, and two that the trainer holds.
    """
    needed = batch_bytes * (workers * PREFETCH + 2) * processes_of_node()
    try:
        found = os.statvfs(SHARED_MEMORY)
        free = found.f_bavail * found.f_frsize
    except OSError:
        free = 0
    if not workers or needed <= free:
        return None
    return (
        f"{SHARED_MEMORY} has {free / 1e6:,.1f} MB free, the batches of data.workers {workers} take up to "
        f"{needed / 1e6:,.1f} MB: they come through pipes, which costs a copy; {MORE_SHARED_MEMORY}, or fewer "
        "--data.workers"
    )


def cores_here(environment: Mapping[str, str] = os.environ) -> tuple[int, int]:
    """The cores that this process may use, and how many of the launch's processes share the machine."""
    return len(os.sched_getaffinity(0)), processes_of_node(environment)


def bearable_workers(environment: Mapping[str, str] = os.environ) -> int:
    """Workers that a process can have on this machine: its share of the cores but one, its own; one at least."""
    cores, processes = cores_here(environment)
    return max(1, cores // processes - 1)


def too_many_workers(flag: str, workers: int) -> str | None:
    """A line where the processes here have more workers than there are cores, else None. ``flag``: who asked."""
    cores, processes = cores_here()
    if workers * processes <= cores:
        return None
    each = f" for each of {processes} processes here" if processes > 1 else ""
    return (
        f"{flag} {workers}{each}: more than the {cores} core(s), they take turns and each takes memory; give --{flag} "
        f"{bearable_workers()}"
    )


def check_semaphores() -> None:
    """UserError where no worker can be started: Python's semaphores are files of the shared memory."""
    try:
        multiprocessing.Lock()
    except OSError as error:
        raise UserError(
            f"no loader worker can be started ({error.strerror}; {SHARED_MEMORY} is full or not to be used): free it, "
            f"{MORE_SHARED_MEMORY}, or give --data.workers 0"
        ) from None


def _as_is(payload):
    return payload  # torch would turn the arrays into tensors


def _in_the_message(payload):
    """The payload without tensors: arrays travel in the message itself."""
    if isinstance(payload, torch.Tensor):
        return payload.numpy()
    if isinstance(payload, list):
        return [_in_the_message(value) for value in payload]
    if isinstance(payload, dict):
        return {name: _in_the_message(value) for name, value in payload.items()}
    return payload


def _start_worker(environment, worker_id):
    """In a new worker: the trainer's environment of now (keys of a store, ...), not that of the server's start."""
    os.environ.clear()
    os.environ.update(environment)
    # Of this process alone; Python's own prints a traceback and drops the batch.
    multiprocessing.queues.Queue._on_queue_feeder_error = _send_otherwise  # ty: ignore[missing-attribute]
    end_with_trainer(worker_id)


def _send_otherwise(results, error, item):
    """In the thread of a worker that sends batches: this one was not sent, for lack of shared memory mostly."""
    if not isinstance(item, tuple):  # it was pickled, and the pipe is broken
        os._exit(1)
    number, payload = item
    smaller = _in_the_message(payload)
    if _holds_tensors(payload):
        results.put((number, smaller))
    else:
        results.put((number, {"user_error": f"a loader worker cannot send its batch: {one_line(error)}"}))


def _holds_tensors(payload):
    if isinstance(payload, dict):
        return any(map(_holds_tensors, payload.values()))
    return (
        any(map(_holds_tensors, payload)) if isinstance(payload, list) else isinstance(payload, torch.Tensor)
    )


class _Reader:
    """The payloads of a pipeline of this process, read in a thread: a silent disk would keep the main one for ever."""

    def __init__(self, payloads):
        self._wanted, self._read, self._is_reading = queue.SimpleQueue(), queue.SimpleQueue(), False
        device = torch.cuda.current_device() if torch.cuda.is_initialized() else None
        arguments = (
            payloads,
            self._wanted,
            self._read,
            device,
        )  # not this object, with which the thread ends
        threading.Thread(target=_read, args=arguments, name="reader", daemon=True).start()

    def __next__(self):
        if not self._is_reading:
            self._wanted.put(True)
        self._is_reading = True
        payload, error = self._read.get(timeout=LOOK_SECONDS)
        self._is_reading = False
        if error is not None:
            raise error
        if payload is None:
            raise StopIteration
        return payload

    def __del__(self):
        self._wanted.put(False)


def _read(payloads, wanted, results, device):
    if device is not None:  # a thread begins with the first
        torch.cuda.set_device(device)
    while wanted.get():
        try:
            results.put((next(payloads, None), None))
        except BaseException as error:
            results.put((None, error))


def _unwrap(payloads, stop):
    deadline = _Deadline(getattr(payloads, "_workers", ()))
    try:
        while True:
            with deadline:
                payload = _next(payloads, deadline, stop)
            if payload is None:
                return
            if "user_error" in payload:
                raise UserError(payload["user_error"])
            yield payload
    except (RuntimeError, ConnectionError, EOFError, queue.Empty) as error:
        if deadline.passed:
            deadline.abandon()
            raise UserError(
                f"no batch came for {exchange_timeout().total_seconds():,.0f} seconds: the storage of the shards does "
                "not answer; once it does, the same command goes on from the last checkpoint"
            ) from None
        if "Too many open files" in str(error):
            raise UserError(
                "too many open files for another batch: give a larger limit (ulimit -n 65536), or fewer --data.workers"
            ) from None
        # torch tells of a dead worker by a RuntimeError, and the batch it was sending by the errors of its socket.
        if isinstance(error, RuntimeError) and not str(error).startswith("DataLoader worker"):
            raise
        raise UserError(
            f"a data worker died ({one_line(error)}): the machine may be short of memory or {SHARED_MEMORY}, "
            "lower data.workers"
        ) from None
    finally:
        del payloads  # ends the workers now: the traceback of an error would keep it, and them, alive


def _next(payloads, deadline, stop):
    """The next payload, or None. torch looks for dead workers only when its time limit ends: a short one, many times.

    Else one that was killed with no batch on its way would be noticed after the whole ``exchange_timeout()``.
    """
    while True:
        try:
            return next(payloads, None)
        except (RuntimeError, queue.Empty) as error:
            if deadline.passed or not (
                isinstance(error, queue.Empty) or str(error).startswith("DataLoader timed out")
            ):
                raise
            if stop():
                deadline.abandon()
                raise StoppedWaiting from None


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
            worker.kill()
            worker.join(LAST_WORD_SECONDS)
            if worker.is_alive():
                multiprocessing.process._children.discard(worker)  # ty: ignore[missing-attribute]
