"""One cluster for the session, and runs on it."""

import os
import sys

import pytest
from cluster import CannotStart, Cluster
from launch import ROOT
from shard_sets import make_shard_set
from slurm_run import SlurmRun


@pytest.fixture(scope="session")
def cluster():
    """CACO_REQUIRE_SLURM set: it must start."""
    try:
        with Cluster() as cluster:
            yield cluster
    except CannotStart as error:
        give_up = pytest.fail if os.environ.get("CACO_REQUIRE_SLURM") else pytest.skip
        give_up(f"no SLURM: {error}")


@pytest.fixture(scope="session")
def shards(cluster):
    return make_shard_set(cluster.folder / "set", num_images=96, samples_per_shard=20)


@pytest.fixture(scope="session")
def served_shards(cluster, shards):
    """The address of the shards on a web server that every node reaches."""
    serve = f"import time; from s3_server import WebServer; WebServer({shards!r}, address=('10.77.0.254', 8080)); "
    serve += "time.sleep(1e9)"
    words = ["bash", "-c", 'setsid "$0" -c "$1" > /dev/null 2>&1 &', sys.executable, serve]
    cluster.run(words, cwd=ROOT / "tests")
    return "http://10.77.0.254:8080"


@pytest.fixture
def new_run(cluster, shards, request):
    """A function (name, options of :class:`SlurmRun`) -> a run whose jobs do not outlive the test."""
    runs = []

    def new(name, **options):
        runs.append(SlurmRun(cluster, name, shards, **options))
        return runs[-1]

    yield new
    for run in runs:
        run.cancel()
