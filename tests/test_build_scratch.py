"""What a build needs for a while in the temporary directory, and that nothing of it is left."""

import fcntl
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import pytest

from data_prep.destination import SCRATCH_LOCK, scratch_folder
from data_prep.sources import open_source

ROOT = Path(__file__).parents[1]


@pytest.fixture
def temporary(tmp_path, monkeypatch):
    folder = tmp_path / "tmp"
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def packed(path):
    """A compressed tar of one image's bytes."""
    image = path.parent / "0.jpg"
    image.write_bytes(b"picture")
    with tarfile.open(path, "w:gz") as tar:
        tar.add(image, "cat/0.jpg")
        tar.add(image, "dog/0.jpg")
    return path


def read_first(source):
    return source.read(source.scan().files[0])


def test_an_unpacked_source_has_no_name_and_is_read_by_other_processes(temporary, tmp_path):
    source = open_source(packed(tmp_path / "x.tar.gz"), None)
    assert os.listdir(temporary) == []
    assert read_first(source) == read_first(pickle.loads(pickle.dumps(source))) == b"picture"
    with multiprocessing.get_context("forkserver").Pool(1) as pool:
        assert pool.apply(read_first, (source,)) == b"picture"


def test_a_killed_dry_run_leaves_nothing(temporary, tmp_path):
    """Killed while its source is unpacked, as ``kill -9`` does."""
    script = (
        "import os, signal, sys; from data_prep import sources, build\n"
        "class Killed(sources.TarSource):\n"
        "    def scan(self): os.kill(os.getpid(), signal.SIGKILL)\n"
        "sources.UnpackedSource.scan = Killed.scan\n"
        "build.build(sys.argv[1], sys.argv[2], dry_run=True)"
    )
    source = packed(tmp_path / "x.tar.gz")
    done = subprocess.run([sys.executable, "-c", script, source, tmp_path / "set"], cwd=ROOT, check=False)
    assert done.returncode == -signal.SIGKILL
    assert os.listdir(temporary) == []
    assert not (tmp_path / "set").exists()


def test_a_folder_that_a_killed_start_left_is_removed_by_the_next(temporary, tmp_path):
    left, alive, making, other, linked = (
        temporary / name
        for name in ("caco-build-left", "caco-repair-alive", "caco-build-new", "else", "caco-build-link")
    )
    for folder in (left, alive, making, other):
        folder.mkdir()
        (folder / "000000.tar").write_bytes(b"shard")
    for folder in (left, alive, other):
        (folder / SCRATCH_LOCK).touch()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / SCRATCH_LOCK).touch()
    linked.symlink_to(tmp_path / "mine")
    with open(alive / SCRATCH_LOCK) as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with scratch_folder("build") as own, scratch_folder("build") as second:
            assert {Path(own), Path(second), alive, making, other, linked} == set(temporary.iterdir())
            assert not left.exists()
    assert {alive, making, other, linked} == set(temporary.iterdir())
    assert (tmp_path / "mine" / SCRATCH_LOCK).exists()
