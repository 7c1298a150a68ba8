"""One cluster for the session, and runs on it."""

import os

import pytest
from cluster import CannotStart, Cluster
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
