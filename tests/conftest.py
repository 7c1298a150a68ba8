"""Fixtures that several files share."""

import multiprocessing.forkserver
import os
import signal

# Before torch and numpy: two processes of the tests with a thread a core each wait for each other in OpenMP's loops, at
# three times the CPU time of one thread each.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
from ceph_server import CephServer
from s3_server import BUCKET, CannotStart, SwiftServer, credentials

from caco_scale.run.signals import STOP_SIGNALS


def pytest_configure(config):
    """GPUs are for ``-m gpu``: the other tests start several processes, perhaps more than this machine has GPUs."""
    if "gpu" not in config.option.markexpr.replace("not gpu", ""):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    # What the tests start gets a user's signals: a job in the background has SIGINT ignored, one under nohup SIGHUP.
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    from warm import modules  # it takes the environment of its import for that of the tests

    # A process of the tests has one fork server, of whoever needs it first: it is to suit all of them. What it starts
    # reads a file of the tests, and would import what that imports by itself: up to two seconds of CPU a process.
    multiprocessing.set_forkserver_preload(["pytest", "functorch.compile", *modules()])
    multiprocessing.forkserver.set_forkserver_preload = lambda names: None


# The files that take longest, first: a long one at the end would leave the other processes of the tests without work.
LONG = [
    "strategy",
    "training",
    "data_prep_remote",
    "report",
    "weights",
    "examples",
    "export",
    "evaluate_linear",
    "remote",
    "api",
    "data_prep",
    "checkpoint",
    "doctor",
    "loader",
    "embed",
    "channels",
]


def pytest_collection_modifyitems(items):
    places = {f"test_{name}.py": place for place, name in enumerate(LONG)}
    items.sort(key=lambda item: places.get(item.path.name, len(places)))


@pytest.fixture(autouse=True)
def signal_handlers():
    """A command that is called instead of started keeps its handlers; a fork of the tests would outlive SIGTERM."""
    found = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    yield
    for number, handler in found.items():
        signal.signal(number, handler)


S3_SERVERS = {"swift": SwiftServer, "ceph": CephServer}


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory):
    """A real S3 server with an empty bucket, for the whole session; CACO_REQUIRE_S3 set: it must start.

    ``CACO_S3_SERVER``: swift (the default) or ceph.
    """
    name = os.environ.get("CACO_S3_SERVER", "swift")
    try:
        with S3_SERVERS[name](tmp_path_factory.mktemp(name)) as server:
            yield server
    except CannotStart as error:
        give_up = pytest.fail if os.environ.get("CACO_REQUIRE_S3") else pytest.skip
        give_up(f"no S3 server: {error}")


@pytest.fixture
def s3(s3_server, monkeypatch):
    """The address of the bucket; the environment names the server and its keys."""
    for name, value in credentials(s3_server.endpoint).items():
        monkeypatch.setenv(name, value)
    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL_S3", "AWS_SKIP_SIGNATURE"):
        monkeypatch.delenv(name, raising=False)
    return f"s3://{BUCKET}"
