"""A second real S3 server, Ceph's RADOS gateway from Debian's packages, unpacked into the user's cache folder.

Heavier than Swift (some 70 MB of packages, half a minute to start), so it serves only where it is asked for:
``CACO_S3_SERVER=ceph pytest -m '' tests/test_remote.py tests/test_data_prep_remote.py tests/test_remote_training.py``.
"""

import fcntl
import os
import shutil
import subprocess
import time
import uuid
from pathlib import Path

from s3_server import (
    ACCESS_KEY,
    BUCKET,
    SECRET_KEY,
    CannotStart,
    cache_of_tests,
    end_processes,
    end_with_parent,
    free_port,
    signed_put,
)

PACKAGES = ("radosgw", "ceph-mon", "ceph-osd", "ceph-common")
START_SECONDS = 240

CONF = """[global]
fsid = {fsid}
auth cluster required = none
auth service required = none
auth client required = none
mon host = v1:127.0.0.1:{mon_port}
public addr = 127.0.0.1
cluster addr = 127.0.0.1
ms bind msgr2 = false
osd pool default size = 1
osd pool default min size = 1
osd pool default pg num = 1
osd crush chooseleaf type = 0
mon allow pool size one = true
mon warn on pool no redundancy = false
mon data avail crit = 1
osd pool default pg autoscale mode = off
log file = {root}/$name.log
pid file = {root}/$name.pid
admin socket = {root}/$name.asok
run dir = {root}
crash dir = {root}
plugin dir = {lib}/ceph
erasure code dir = {lib}/ceph/erasure-code
osd class dir = {lib}/rados-classes
[mon.a]
mon data = {root}/mon
[osd.0]
osd data = {root}/osd
osd objectstore = memstore
memstore device bytes = 8589934592
[client.rgw]
rgw frontends = beast endpoint=127.0.0.1:{port}
rgw data = {root}/rgw
rgw enable apis = s3
"""


def ceph_programs():
    """The folder into which Ceph's packages are unpacked; fetches them if need be. CannotStart says why not."""
    for program in ("apt-get", "dpkg"):
        if not shutil.which(program):
            raise CannotStart(f"Ceph comes from Debian's packages, and there is no {program} here")
    folder = cache_of_tests() / "ceph"
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder.parent / "ceph.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "complete").exists():
            _unpack(folder)
    return folder / "root"


def _unpack(folder):
    archives = folder / "archives"
    (archives / "partial").mkdir(parents=True, exist_ok=True)
    fetch = ["apt-get", "install", "-y", "--download-only", "--no-install-recommends"]
    fetch += ["-o", f"Dir::Cache::archives={archives}", *PACKAGES]
    for command in (["apt-get", "update"], fetch):
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
            raise CannotStart(f"`{' '.join(command[:2])}` failed: {reason}")
    for package in archives.glob("*.deb"):
        subprocess.run(["dpkg", "-x", str(package), str(folder / "root")], check=True)
    shutil.rmtree(archives)
    (folder / "complete").touch()


class CephServer:
    """One monitor, one object daemon in memory and the gateway; used as :class:`~s3_server.SwiftServer` is."""

    def __init__(self, root):
        self.root, self.programs = Path(root), ceph_programs()
        self.port, self.processes = free_port(), []
        self.endpoint = f"http://127.0.0.1:{self.port}"
        [self.lib] = (self.programs / "usr/lib").glob("*-linux-gnu")
        libraries = [self.lib, self.lib / "ceph", self.programs / "lib" / self.lib.name]
        self.environment = {
            **os.environ,
            "PATH": f"{self.programs}/usr/bin:{os.environ['PATH']}",
            "LD_LIBRARY_PATH": ":".join(map(str, libraries)),
            "PYTHONPATH": f"{self.programs}/usr/lib/python3/dist-packages",
            "CEPH_CONF": f"{self.root}/ceph.conf",
        }

    def __enter__(self):
        for folder in ("mon", "osd", "rgw"):
            (self.root / folder).mkdir(parents=True, exist_ok=True)
        fsid, mon_port = uuid.uuid4(), free_port()
        names = {"fsid": fsid, "mon_port": mon_port, "port": self.port, "root": self.root, "lib": self.lib}
        (self.root / "ceph.conf").write_text(CONF.format(**names))
        try:
            self._start(fsid, mon_port)
        except BaseException:
            self.__exit__()
            raise
        return self

    def _start(self, fsid, mon_port):
        monmap = self.root / "monmap"
        self._run(
            "monmaptool", "--create", "--fsid", fsid, "--addv", "a", f"[v1:127.0.0.1:{mon_port}]", monmap
        )
        self._run("ceph-mon", "-i", "a", "--mkfs", "--monmap", monmap)
        self._serve("ceph-mon", "-f", "-i", "a")
        osd = uuid.uuid4()
        self._run("/usr/bin/python3", self.programs / "usr/bin/ceph", "osd", "new", osd)  # Debian's bindings
        self._run("ceph-osd", "-i", "0", "--mkfs", "--osd-uuid", osd)
        self._serve("ceph-osd", "-f", "-i", "0")
        self._serve("radosgw", "-f", "-n", "client.rgw")
        keys = [f"--access-key={ACCESS_KEY}", f"--secret-key={SECRET_KEY}"]
        self._run("radosgw-admin", "user", "create", "--uid=tester", "--display-name=tester", *keys)
        deadline = time.monotonic() + START_SECONDS
        while not self._ready():
            if time.monotonic() > deadline or any(p.poll() is not None for p in self.processes):
                raise CannotStart(f"Ceph does not start, see {self.root}/*.log")
            time.sleep(0.2)

    def _run(self, *command):
        try:
            done = subprocess.run(
                [str(word) for word in command],
                env=self.environment,
                capture_output=True,
                text=True,
                check=False,
                timeout=START_SECONDS,
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise CannotStart(f"{command[0]}: {error}") from None
        if done.returncode:
            raise CannotStart(f"{command[0]} failed: {' '.join(done.stderr.split())[-300:]}")

    def _serve(self, *command):
        with open(self.root / f"{command[0]}.out", "ab") as log:
            options = {"env": self.environment, "stdout": log, "stderr": log}
            self.processes.append(subprocess.Popen(command, preexec_fn=end_with_parent, **options))

    def _ready(self):
        try:
            return signed_put(self.endpoint, f"/{BUCKET}") in (200, 409)
        except OSError:
            return False

    def __exit__(self, *_):
        end_processes(self.processes)
        self.processes = []
