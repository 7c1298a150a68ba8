"""``python WORDS`` for the tests, forked instead of started: what it imports takes some eight seconds of CPU.

One server per process of the tests has imported the package and waits. It forks for each request; the child takes the
caller's words, environment, folder and output, leaves the server's code, and runs the program to the end of its threads
and of what it has registered. To take down the modules, as Python then does, takes two seconds more, for copies of the
server's memory: the programs that are started afresh do it.
``accelerate launch`` is forked as well, and forks its ranks itself: all that it does is its own but the start of a
process. What differs from a fresh start: modules are loaded already, so that an environment in which they would load
otherwise (another PYTHONPATH, other settings of torch) gets a fresh one. A program that sets such things itself before
it imports torch, as the preflight does, is to be started afresh by its tests.
"""

import atexit
import contextlib
import gc
import json
import os
import runpy
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
IMPORTED_WITH = ("PYTHON", "OMP_", "MKL_", "TORCH", "CUDA_", "LD_", "MALLOC_", "TMPDIR", "HOME", "HF_")
ROOM = " " * 16000  # in the server's command line, for those of its children
_servers = {}  # by the process of the tests: a fork of it (xdist's, a fork server's) has its own


def environment():
    """Of what tests start: this checkout, one thread."""
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, paths))}


BASE = environment()  # before any test has changed it for itself


def popen(words, cwd, env, stderr=subprocess.STDOUT):
    """As ``subprocess.Popen`` of Python with these words, in a session of its own, output as text in ``stdout``.

    ``words``: ``-m MODULE ...``, ``-c PROGRAM ...`` or ``FILE ...``. ``stderr``: STDOUT (into ``stdout``) or PIPE
    (``communicate`` returns it).
    """
    server = _servers.get(os.getpid())
    if server is None:
        server = _servers[os.getpid()] = Server(BASE)
    if server.loads_like(env):
        return server.fork(words, cwd or os.getcwd(), env, stderr == subprocess.PIPE)
    return subprocess.Popen(
        [sys.executable, *words],
        cwd=cwd,
        env=env,
        stdout=subprocess.PIPE,
        stderr=stderr,
        text=True,
        start_new_session=True,
    )


class Server:
    """The process that has imported everything; it ends with the one that started it."""

    def __init__(self, env):
        self.env = env
        self.address = os.path.join(tempfile.mkdtemp(prefix="caco-warm-"), "socket")
        words = [sys.executable, __file__, self.address, ROOM]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(words, env=env, stdin=pipe, stdout=pipe, start_new_session=True)
        assert self.process.stdout.readline() == b"ready\n", "the tests' fork server did not start"

    def loads_like(self, env):
        kept = [{k: v for k, v in e.items() if k.startswith(IMPORTED_WITH)} for e in (self.env, env)]
        for (
            each
        ) in kept:  # a compilation in the tests' own process sets it; it is read when something compiles
            each.pop("TORCHINDUCTOR_CACHE_DIR", None)
        return kept[0] == kept[1]

    def fork(self, words, cwd, env, apart):
        connection = socket.socket(socket.AF_UNIX)
        connection.connect(self.address)
        request = json.dumps({"words": list(words), "cwd": str(cwd), "env": dict(env)}).encode()
        pipes = [os.pipe() for _ in range(1 + apart)]
        given = [write for _, write in pipes]
        socket.send_fds(connection, [len(request).to_bytes(4, "big")], [given[0], given[-1]])
        for descriptor in given:
            os.close(descriptor)
        connection.sendall(request)
        return Forked(connection, [read for read, _ in pipes], list(words))


class Forked:
    """The part of ``subprocess.Popen`` that the tests use."""

    def __init__(self, connection, outputs, args):
        self.args, self.returncode = args, None
        self._connection = connection
        files = [os.fdopen(output, encoding="utf-8", errors="replace") for output in outputs]
        self.stdout, self.stderr = (*files, None)[:2]
        self._texts = dict.fromkeys(files, b"")  # what communicate has read, which it may be asked again
        self.pid = int.from_bytes(_exactly(connection, 4), "big")

    def poll(self):
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(0)
        return self.returncode

    def wait(self, timeout=None):
        if self.returncode is None:
            self._connection.settimeout(timeout)
            try:
                self.returncode = int.from_bytes(_exactly(self._connection, 4), "big", signed=True)
            except (TimeoutError, BlockingIOError):
                raise subprocess.TimeoutExpired(self.args, timeout) from None
            self._connection.close()
        return self.returncode

    def communicate(self, timeout=None):
        deadline = None if timeout is None else time.monotonic() + timeout
        with selectors.DefaultSelector() as selector:
            for file in self._texts:
                if not file.closed:
                    selector.register(file, selectors.EVENT_READ)
            while selector.get_map():
                ready = selector.select(None if deadline is None else max(0, deadline - time.monotonic()))
                if not ready:
                    raise subprocess.TimeoutExpired(self.args, timeout)
                for key, _ in ready:
                    chunk = os.read(key.fd, 1 << 16)
                    self._texts[key.fileobj] += chunk
                    if not chunk:
                        selector.unregister(key.fileobj)
        self.wait(None if deadline is None else max(0.1, deadline - time.monotonic()))
        for file in self._texts:
            file.close()
        decoded = [t.decode("utf-8", "replace").replace("\r\n", "\n") for t in self._texts.values()]
        return (*decoded, None)[:2]

    def send_signal(self, number):
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self):
        self.send_signal(signal.SIGKILL)


def _exactly(connection, count):
    data = b""
    while len(data) < count:
        chunk = connection.recv(count - len(data))
        if not chunk:
            raise EOFError("the tests' fork server is gone")
        data += chunk
    return data


# ----------------------------------------------------------------------------------------------------------
# The server


def modules():
    """The names of the package's modules, as its files tell; not of the kernels, which are interpreted where the
    environment says so as they are imported, nor of _augment_cpu, which is no module of Python."""
    for package in ("caco_scale", "data_prep"):
        for path in sorted((ROOT / package).rglob("*.py")):
            words = path.relative_to(ROOT).with_suffix("").parts
            if words[-1] not in ("__main__", "kernels") and "examples" not in words:
                yield ".".join(words[: -1 if words[-1] == "__init__" else None])


def _import_all():
    import importlib

    outside = ("torch.utils.tensorboard", "accelerate.commands.launch", "torch.distributed.run")
    for name in (*modules(), *outside):
        importlib.import_module(name)
    when_used = ("tyro.constructors", "tyro._backends", "typeguard", "PIL.JpegImagePlugin")
    for name in when_used:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)


def _serve(address):
    """Forks for each request, tells its pid and at its end its exit code. Returns in each child: the request."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address)
    listener.listen(64)
    selector = selectors.DefaultSelector()
    selector.register(sys.stdin.fileno(), selectors.EVENT_READ, "parent")
    selector.register(listener, selectors.EVENT_READ, "request")
    print("ready", flush=True)
    while True:
        for key, _ in selector.select():
            if key.data == "parent":
                os._exit(0)
            elif key.data == "request":
                connection, _ = listener.accept()
                size, descriptors, _, _ = socket.recv_fds(connection, 4, 2)
                request = json.loads(_exactly(connection, int.from_bytes(size, "big")))
                pid = os.fork()
                if not pid:
                    _take(*descriptors)
                    _close(listener, selector, connection)
                    return request
                for descriptor in descriptors:
                    os.close(descriptor)
                connection.sendall(pid.to_bytes(4, "big"))
                selector.register(os.pidfd_open(pid), selectors.EVENT_READ, (pid, connection))
            else:
                pid, connection = key.data
                selector.unregister(key.fd)
                os.close(key.fd)
                code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
                with contextlib.suppress(OSError):  # nobody asks any more
                    connection.sendall(code.to_bytes(4, "big", signed=True))
                connection.close()


def _take(stdout, stderr):
    """A session and standard files of the child's own."""
    os.setsid()
    nothing = os.open(os.devnull, os.O_RDONLY)
    for number, descriptor in enumerate((nothing, stdout, stderr)):
        os.dup2(descriptor, number)
        os.close(descriptor)


def _close(listener, selector, connection):
    """What a child has of the server and of the other children: an open end would hold their ends up."""
    for key in selector.get_map().values():
        if isinstance(key.data, tuple):
            key.data[1].close()
            os.close(key.fd)
    for each in (selector, listener, connection):
        each.close()


def _become(request):
    os.environ.clear()
    os.environ.update(request["env"])
    os.chdir(request["cwd"])
    time.tzset()
    _show_as([sys.executable, *request["words"]])
    if "accelerate.commands.launch" in request["words"][:2]:
        _fork_ranks(with_deepspeed=any("zero" in word for word in request["words"]))


def _show_as(words):
    """Have the kernel show this command line: programs look for their launcher's, and tests for their ranks'."""
    with open("/proc/self/stat", "rb") as stream:
        start, end = map(
            int, stream.read().rpartition(b")")[2].split()[45:47]
        )  # arg_start, arg_end of proc(5)
    shown = b"".join(word.encode() + b"\0" for word in words)[: end - start - 1]
    with open("/proc/self/mem", "r+b", buffering=0) as memory:
        memory.seek(start)
        memory.write(shown.ljust(end - start, b"\0"))


def _fork_ranks(with_deepspeed):
    """The launcher starts its ranks by a fork, each in a session of its own, as torchrun's subprocess handler."""
    if with_deepspeed:
        import deepspeed  # noqa: F401 (once, for all of them)
    from torch.distributed.elastic.multiprocessing.subprocess_handler import subprocess_handler

    subprocess_handler.Popen = _ForkedRank


class _ForkedRank:
    """The part of ``subprocess.Popen`` that torchrun uses."""

    def __init__(self, args, env, stdout, stderr, start_new_session):
        assert (args[0], stdout, stderr, start_new_session) == (sys.executable, None, None, True)
        sys.stdout.flush()
        sys.stderr.flush()
        self.args, self.returncode = args, None
        self.pid = os.fork()
        if not self.pid:
            os.setsid()
            _run_to_the_end({"words": list(args[1:]), "cwd": os.getcwd(), "env": env})

    def poll(self):
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def wait(self, timeout=None):
        deadline = None if timeout is None else time.monotonic() + timeout
        while self.poll() is None:
            if deadline is not None and time.monotonic() > deadline:
                raise subprocess.TimeoutExpired(self.args, timeout)
            time.sleep(0.02)
        return self.returncode


def _run_to_the_end(request):
    """The program and the end of Python, without the frames and the objects of the launcher that has forked."""
    for number in signal.valid_signals():
        if callable(
            signal.getsignal(number)
        ):  # a handler of the launcher's, which a fresh start would not have
            fresh = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
            signal.signal(number, fresh)
    code, interrupted = 0, False
    try:
        _become(request)
        _run(request["words"])
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        if not isinstance(end.code, int | None):
            print(end.code, file=sys.stderr)
    except BaseException as error:
        sys.excepthook(*sys.exc_info())
        code = 1
        interrupted = isinstance(error, KeyboardInterrupt)
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    if interrupted:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        signal.raise_signal(signal.SIGINT)
    os._exit(code)


def _run(words):
    words = words[words[0] == "-u" :]
    if words[0] == "-m":
        sys.argv, sys.path[0] = words[1:], os.getcwd()
        sys.modules.pop(words[1], None)  # runpy is to execute it, as a fresh start would
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    elif words[0] == "-c":
        sys.argv, sys.path[0] = ["-c", *words[2:]], ""
        sys.modules["__main__"] = main = type(sys)("__main__")
        exec(compile(words[1], "<string>", "exec"), main.__dict__)
    else:
        sys.argv, sys.path[0] = words, os.path.dirname(os.path.abspath(words[0]))
        runpy.run_path(words[0], run_name="__main__")


if __name__ == "__main__":
    sys.path[0] = str(ROOT)
    _import_all()
    gc.freeze()  # nor do its children look through it, which would copy it
    _request = _serve(sys.argv[1])
    _run_to_the_end(_request)
