"""A cache in a place that other users may write: what they put under its names is neither followed nor believed."""

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import socket
import subprocess
from pathlib import Path

import pytest
from s3_server import WebServer
from shard_sets import make_shard_set

from caco_scale.data import cache as cache_module
from caco_scale.data.cache import ShardCache, UnusableCache
from caco_scale.data.object_store import RetryPolicy
from caco_scale.data.store import open_store
from caco_scale.errors import UserError

DATA = b"shard" * 300
SHA256 = hashlib.sha256(DATA).hexdigest()
WRONG = b"other" * 300


def fetched(cache, wait=False):
    return cache.fetch(SHA256, len(DATA), lambda: iter([DATA]), wait)


def read(cache):
    file = cache.open(SHA256, len(DATA))
    return file and file.read()


def link(path, place):
    path.symlink_to(place / "victim")


def hard_link(path, place):
    os.link(place / "victim", path)


def fifo(path, place):
    os.mkfifo(path)


def folder(path, place):
    path.mkdir()


def unix_socket(path, place):
    here = os.getcwd()
    os.chdir(path.parent)  # an address has a hundred characters at most
    try:
        socket.socket(socket.AF_UNIX).bind(path.name)
    finally:
        os.chdir(here)


def loop(path, place):
    path.symlink_to(path.name)


def dangling(path, place):
    path.symlink_to(place / "planted")


PLANTED = {
    link: "a symbolic link",
    loop: "a symbolic link",
    dangling: "a symbolic link",
    fifo: "a FIFO",
    folder: "a directory",
    unix_socket: "a socket",
}


@pytest.fixture
def place(tmp_path):
    (tmp_path / "victim").write_bytes(b"precious" * 1000)
    return tmp_path


@pytest.fixture
def untouched(place):
    before = os.stat(place / "victim")
    yield
    after = os.stat(place / "victim")
    assert (place / "victim").read_bytes() == b"precious" * 1000
    assert (before.st_mtime_ns, before.st_mode) == (after.st_mtime_ns, after.st_mode)
    assert not (place / "planted").exists()


@pytest.mark.usefixtures("untouched")
@pytest.mark.parametrize("plant", PLANTED, ids=lambda plant: plant.__name__)
@pytest.mark.parametrize("name", [f"{SHA256}.tar", f"{SHA256}.part", f"{SHA256}.ok", "lock"])
def test_what_is_planted_under_a_name_is_one_line_and_never_followed(place, plant, name):
    cache = ShardCache(place / "cache", 10_000)
    plant(place / "cache" / name, place)
    with pytest.raises(UnusableCache) as caught:
        cache.check([SHA256])
    message = str(caught.value)
    assert f"{name} is {PLANTED[plant]}" in message
    assert "\n" not in message
    with contextlib.suppress(UnusableCache):  # planted in the middle of a run
        assert not fetched(cache) or read(cache) == DATA
    subprocess.run(message.split("`")[1], shell=True, check=True)  # the advice works
    cache.check([SHA256])
    assert fetched(cache)
    assert read(cache) == DATA


@pytest.mark.usefixtures("untouched")
def test_a_link_to_ones_own_file_is_not_written_through(place):
    cache = ShardCache(place / "cache", 10_000)
    hard_link(cache.path(SHA256, ".part"), place)
    assert fetched(cache)
    hard_link(cache.path("f" * 64, ".ok"), place)
    assert cache.open("f" * 64, 10) is None
    cache.path(SHA256).unlink()
    hard_link(cache.path(SHA256), place)
    assert read(cache) is None
    assert fetched(cache)
    assert read(cache) == DATA


@pytest.mark.parametrize("suffix", [".tar", ".part", ".ok"])
def test_files_of_another_user_are_not_believed(place, monkeypatch, suffix):
    cache = ShardCache(place / "cache", 10_000)
    cache.path(SHA256).write_bytes(WRONG)
    with open(cache.path(SHA256), "rb") as file:
        cache.path(SHA256, ".ok").write_bytes(cache_module._note(file, SHA256))
    cache.path(SHA256, ".part").write_bytes(WRONG)
    for other in {".tar", ".part", ".ok"} - {suffix}:
        cache.path(SHA256, other).unlink()
    user = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: user + 1)
    with pytest.raises(UnusableCache, match=rf"{suffix} is a file of another user \(number {user}\)"):
        cache.check([SHA256])
    if suffix == ".ok":
        assert read(cache) is None
    elif suffix == ".tar":
        with pytest.raises(UnusableCache, match="another user"):
            read(cache)
        assert cache._entries() == []  # neither counted nor evicted
    else:
        with pytest.raises(UnusableCache, match="another user"):
            fetched(cache)
    assert cache.path(SHA256, suffix).read_bytes()


def test_a_note_is_of_one_content_and_one_file(place):
    cache = ShardCache(place, 10_000)
    assert fetched(cache)
    note = json.loads(cache.path(SHA256, ".ok").read_text())
    assert note[:2] == [SHA256, len(DATA)]
    wrong = hashlib.sha256(WRONG).hexdigest()
    assert cache.fetch(wrong, len(WRONG), lambda: iter([WRONG]))
    for suffix in (".tar", ".ok"):  # a shard and its note under the name of another
        os.replace(cache.path(wrong, suffix), cache.path(SHA256, suffix))
    assert read(cache) is None
    assert cache.counters["damaged"] == 1


def test_a_note_that_others_could_write_is_not_believed(place):
    cache = ShardCache(place, 10_000)
    assert fetched(cache)
    note = cache.path(SHA256, ".ok")
    cache.path(SHA256).write_bytes(WRONG)
    with open(cache.path(SHA256), "rb") as file:
        note.write_bytes(cache_module._note(file, SHA256))
    assert read(cache) == WRONG  # as far as the cache can know: it is this user's own note
    note.chmod(0o666)
    assert read(cache) is None
    assert fetched(cache)
    cache.path(SHA256).chmod(0o666)
    assert read(cache) is None
    assert fetched(cache)
    assert read(cache) == DATA


def test_new_files_are_this_users_alone(place):
    mask = os.umask(0)
    try:
        cache = ShardCache(place / "some" / "cache", 10_000)
        assert fetched(cache)
    finally:
        os.umask(mask)
    assert cache.directory.stat().st_mode & 0o777 == 0o700
    assert {path.stat().st_mode & 0o777 for path in cache.directory.iterdir()} == {0o600}


def test_a_lock_that_is_never_given_back_is_one_line(place, monkeypatch):
    monkeypatch.setattr(cache_module, "LOCK_SECONDS", 0.1)
    cache = ShardCache(place, 10_000)
    with open(place / "lock", "a") as held:
        fcntl.flock(held, fcntl.LOCK_SH)
        with pytest.raises(UnusableCache, match=r"its lock was held for 0\.1 seconds"):
            fetched(cache)
    assert fetched(cache)


@pytest.mark.parametrize(
    ("mode", "user", "where"),
    [
        (0o755, 0, "."),
        (0o775, 0, "."),
        (0o1777, 0, "caco_scale-cache-{user}"),
        (0o775, 1, "caco_scale-cache-{user}"),
        (0o777, 0, None),
        (0o777, 1, None),
    ],
)
def test_the_folder_in_a_shared_directory(place, monkeypatch, mode, user, where):
    shared = place / "shared"
    shared.mkdir()
    shared.chmod(mode)
    user += os.geteuid()
    if user != os.geteuid():
        make = Path.mkdir  # what another user makes is another's

        def mkdir(path, *arguments, **options):
            make(path, *arguments, **options)
            if path.parent == shared:
                pytest.skip("needs root") if os.getuid() else os.chown(path, user, -1)

        monkeypatch.setattr(Path, "mkdir", mkdir)
        monkeypatch.setattr(os, "geteuid", lambda: user)
    if where is None:
        with pytest.raises(UserError, match=f"{shared} is a folder that every user may write") as caught:
            ShardCache(shared)
        assert ShardCache(str(caught.value).split("such as ")[1].split(",")[0]).directory.parent == shared
        return
    cache = ShardCache(shared)
    assert cache.directory == shared / where.format(user=user)
    if where != ".":
        assert cache.directory.stat().st_mode & 0o777 == 0o700
        for spoil in (lambda d: d.chmod(0o770), replaced_by_a_link):
            spoil(cache.directory)
            with pytest.raises(UserError, match=r"may write|not a directory of this user"):
                ShardCache(shared)


def replaced_by_a_link(path):
    shutil.rmtree(path)
    path.symlink_to(path.parent)


def test_a_run_ends_before_it_starts_and_goes_on_if_it_has(tmp_path):
    made = make_shard_set(tmp_path / "set", num_images=32, size=36)
    with WebServer(made) as server:
        store = open_store(server.url, str(tmp_path / "cache"), retry_policy=RetryPolicy(2, 1))
        store.check()
        store.fetch(0)
        planted = store.cache.path(store.manifest.shards[1].sha256)
        os.mkfifo(planted)
        with pytest.raises(UserError, match="is a FIFO, not this program's own"):
            store.check()
        with pytest.warns(UserWarning, match="nothing more is cached.*is a FIFO"):
            found = [store.read_sample(shard, i)["jpg"] for shard in range(2) for i in range(16)]
    local = open_store(made)
    assert found == [local.read_sample(shard, i)["jpg"] for shard in range(2) for i in range(16)]
