"""The loader's own fork server: a process that has imported the loader, and that loader workers are forked from.

multiprocessing has one such server a process, for everybody. Workers must not see a job's signals, so theirs starts
with them blocked; and what came from a shared one, as a pool of the user's, could not be ended by SIGTERM. Python has
the class of its server but no way to choose one; what chooses here is :class:`WorkerContext`.
"""

import io
import multiprocessing.context
import os
from multiprocessing import forkserver, popen_forkserver, reduction, spawn, util

from caco_scale.run.scratch import use_own_names
from caco_scale.run.signals import shielded

PRELOADED = "caco_scale.data.loader"
_servers: dict[
    int, forkserver.ForkServer
] = {}  # by the process that has started it: a fork of it needs its own


def start_fork_server() -> forkserver.ForkServer:
    """Start the process that workers are forked from, if it does not run. Returns while it still imports.

    Worth calling early: its imports then overlap with building the model. It starts with the group's signals
    blocked, and so do the workers: torch's workers take a dead server for a dead trainer.
    """
    use_own_names()
    server = _servers.get(os.getpid())
    if server is None:
        server = _servers[os.getpid()] = forkserver.ForkServer()
        server.set_forkserver_preload([PRELOADED])
    with shielded():
        server.ensure_running()
    return server


class _Popen(popen_forkserver.Popen):
    """As Python's own, but for the server, and for the trainer's main module, which no worker imports.

    It would cost seconds and hundreds of megabytes a worker (DeepSpeed is behind it), and nothing of it is used there.
    """

    _fds: list[int]  # which the process inherits

    def _launch(self, process_obj):
        preparation = spawn.get_preparation_data(process_obj._name)
        preparation = {k: v for k, v in preparation.items() if not k.startswith("init_main_")}
        message = io.BytesIO()
        multiprocessing.context.set_spawning_popen(self)
        try:
            reduction.dump(preparation, message)
            reduction.dump(process_obj, message)
        finally:
            multiprocessing.context.set_spawning_popen(None)
        self.sentinel, writer = start_fork_server().connect_to_new_process(self._fds)
        held = os.dup(writer)  # by its end the worker sees that this process is gone
        self.finalizer = util.Finalize(self, util.close_fds, (held, self.sentinel))  # ty: ignore[missing-attribute]
        with open(writer, "wb") as stream:
            stream.write(message.getbuffer())
        self.pid = forkserver.read_signed(self.sentinel)


class _Process(multiprocessing.context.ForkServerProcess):
    @staticmethod
    def _Popen(process_obj):
        return _Popen(process_obj)


class WorkerContext(multiprocessing.context.ForkServerContext):
    """A context of multiprocessing, as torch's DataLoader takes one, whose processes come from the loader's server."""

    Process = _Process
