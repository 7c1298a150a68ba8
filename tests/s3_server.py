"""A real S3 server (OpenStack Swift with its S3 API, from PyPI) and a proxy in front of it that makes faults.

Swift is installed once, into a virtual environment of its own in the user's cache folder: its pinned dependencies
are no business of the project's. What cannot be had is a reason to skip.
"""

import contextlib
import ctypes
import datetime
import fcntl
import getpass
import hashlib
import hmac
import http.client
import http.server
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections import Counter
from pathlib import Path

ACCESS_KEY, SECRET_KEY, REGION = "test:tester", "testing", "us-east-1"
BUCKET = "shards"
LIBC, PR_SET_PDEATHSIG = ctypes.CDLL(None), 1  # of <sys/prctl.h>

STORAGE_CONF = """[DEFAULT]
bind_ip = 127.0.0.1
bind_port = {port}
workers = 0
user = {user}
swift_dir = {etc}
devices = {root}/dev
mount_check = false
log_address = /dev/nolog
log_level = ERROR
fallocate_reserve = 0
disable_fallocate = true
[pipeline:main]
pipeline = {role}-server
[app:{role}-server]
use = egg:swift#{role}
recon_cache_path = {root}/cache
"""
PROXY_CONF = """[DEFAULT]
bind_ip = 127.0.0.1
bind_port = {port}
workers = 0
user = {user}
swift_dir = {etc}
log_address = /dev/nolog
log_level = ERROR
[pipeline:main]
pipeline = catch_errors gatekeeper healthcheck cache listing_formats bulk s3api tempauth slo dlo proxy-server
[app:proxy-server]
use = egg:swift#proxy
allow_account_management = true
account_autocreate = true
[filter:tempauth]
use = egg:swift#tempauth
user_test_tester = testing .admin
[filter:s3api]
use = egg:swift#s3api
s3_acl = no
location = us-east-1
allow_multipart_uploads = yes
check_bucket_owner = no
auth_pipeline_check = no
[filter:cache]
use = egg:swift#memcache
memcache_servers = 127.0.0.1:9
error_suppression_limit = 1
"""
PLAIN_FILTERS = {"bulk": "bulk", "listing_formats": "listing_formats", "catch_errors": "catch_errors"} | {
    name: name for name in ("healthcheck", "gatekeeper", "slo", "dlo")
}


class CannotStart(Exception):
    """Why there is no server here, for the skip."""


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def cache_of_tests():
    """Where what the tests install once is kept."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "caco_scale-tests"


def swift_programs():
    """The folder of Swift's programs; installs them if need be. CannotStart says why not."""
    beside = Path(sys.executable).parent
    if (beside / "swift-proxy-server").exists():
        return beside
    folder = cache_of_tests() / f"swift-{sys.version_info.major}.{sys.version_info.minor}"
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder.parent / f"{folder.name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two test runs at once
        if not _works(folder):
            _install(folder)
    return folder / "bin"


def _works(folder):
    """Is a finished installation there, and does its Python still run?"""
    if not (folder / "complete").exists():
        return False
    try:
        command = [folder / "bin/python", "-c", "import swift"]
        return subprocess.run(command, capture_output=True, check=False).returncode == 0
    except OSError:
        return False


def _install(folder):
    log = []
    for command in (
        [sys.executable, "-m", "venv", "--clear", str(folder)],
        [str(folder / "bin/python"), "-m", "pip", "install", "-q", "swift", "pyeclib"],
    ):
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
        except subprocess.TimeoutExpired:
            raise CannotStart(f"`{' '.join(command)}` took more than 600 s") from None
        log += (done.stdout + done.stderr).strip().splitlines()[-1:]
        if done.returncode:
            raise CannotStart(f"`pip install swift pyeclib` failed: {' '.join(log)}")
    (folder / "complete").touch()


def end_with_parent():
    """In the child, before its program: killed tests leave no server behind."""
    LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def end_processes(processes):
    for process in processes:
        process.terminate()
    for process in processes:
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()


class SwiftServer:
    """Swift on loopback ports, everything below ``root``; ``endpoint`` speaks S3. Use as a context."""

    def __init__(self, root):
        self.root, self.programs = Path(root), swift_programs()
        self.ports = {role: free_port() for role in ("account", "container", "object", "proxy")}
        self.endpoint = f"http://127.0.0.1:{self.ports['proxy']}"
        self.processes = []

    def __enter__(self):
        etc = self.root / "etc"
        for folder in (etc, self.root / "dev" / "d1", self.root / "cache"):
            folder.mkdir(parents=True, exist_ok=True)
        try:
            os.setxattr(self.root / "dev", "user.probe", b"1")
        except OSError as error:
            raise CannotStart(f"{self.root} has no user xattrs, which Swift needs: {error}") from None
        (etc / "swift.conf").write_text(
            "[swift-hash]\nswift_hash_path_suffix = s\nswift_hash_path_prefix = p\n"
            "[storage-policy:0]\nname = gold\ndefault = yes\n"
        )
        names = {"root": self.root, "etc": etc, "user": getpass.getuser()}
        for role in ("account", "container", "object"):
            self._ring(etc, role)
            conf = STORAGE_CONF.format(role=role, port=self.ports[role], **names)
            (etc / f"{role}-server.conf").write_text(conf)
        filters = "".join(f"[filter:{n}]\nuse = egg:swift#{e}\n" for n, e in PLAIN_FILTERS.items())
        (etc / "proxy-server.conf").write_text(PROXY_CONF.format(port=self.ports["proxy"], **names) + filters)
        self.start()
        return self

    def _ring(self, etc, role):
        steps = (
            ["create", "2", "1", "0"],
            ["add", f"r1z1-127.0.0.1:{self.ports[role]}/d1", "1"],
            ["rebalance"],
        )
        for step in steps:
            command = [str(self.programs / "swift-ring-builder"), str(etc / f"{role}.builder"), *step]
            subprocess.run(command, stdout=subprocess.DEVNULL, check=False)

    def start(self):
        etc = self.root / "etc"
        for role in self.ports:
            program = [str(self.programs / f"swift-{role}-server"), str(etc / f"{role}-server.conf")]
            with open(self.root / f"{role}.log", "ab") as log:
                environment = {**os.environ, "SWIFT_DIR": str(etc)}
                options = {"env": environment, "stdout": log, "stderr": log}
                self.processes.append(subprocess.Popen(program, preexec_fn=end_with_parent, **options))
        deadline = time.monotonic() + 120
        while not self._ready():
            if time.monotonic() > deadline or any(p.poll() is not None for p in self.processes):
                logs = " ".join((self.root / f"{role}.log").read_text()[-200:] for role in self.ports)
                self.__exit__()
                raise CannotStart(f"Swift does not start: {' '.join(logs.split())}")
            time.sleep(0.2)

    def _ready(self):
        try:
            return signed_put(self.endpoint, f"/{BUCKET}") in (200, 409)
        except OSError:
            return False

    def __exit__(self, *_):
        end_processes(self.processes)
        self.processes = []


def signed_put(endpoint, path):
    """Make a bucket: PUT with AWS's signature, version 4; the status."""
    stamp = datetime.datetime.now(datetime.UTC).strftime("%Y%m%dT%H%M%SZ")
    empty, day = hashlib.sha256(b"").hexdigest(), stamp[:8]
    headers = {"host": endpoint.split("//")[1], "x-amz-content-sha256": empty, "x-amz-date": stamp}
    names = ";".join(headers)
    request = "\n".join(["PUT", path, "", *(f"{k}:{v}" for k, v in headers.items()), "", names, empty])
    scope = f"{day}/{REGION}/s3/aws4_request"
    text = "\n".join(["AWS4-HMAC-SHA256", stamp, scope, hashlib.sha256(request.encode()).hexdigest()])
    key = f"AWS4{SECRET_KEY}".encode()
    for part in (*scope.split("/"), text):
        key = hmac.new(key, part.encode(), hashlib.sha256).digest()
    headers["Authorization"] = (
        f"AWS4-HMAC-SHA256 Credential={ACCESS_KEY}/{scope}, SignedHeaders={names}, Signature={key.hex()}"
    )
    request = urllib.request.Request(endpoint + path, method="PUT", headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=20) as response:
            return response.status
    except urllib.error.HTTPError as error:
        return error.code


def credentials(endpoint):
    """The environment variables by which every S3 client finds the server."""
    return {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": ACCESS_KEY,
        "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
        "AWS_REGION": REGION,
    }


# ----------------------------------------------------------------------------------------------------

FAULTS = ("503", "cut", "stall", "truncate", "slow")
MOST_IN_A_ROW = 3


class _Quiet(http.server.ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def __init__(self, *args):
        super().__init__(*args)
        self.connections = []

    def get_request(self):
        connection, address = super().get_request()
        self.connections.append(connection)
        return connection, address

    def handle_error(self, request, client_address):
        pass  # clients that went away


class _Server:
    """A web server in threads of this process; ``url`` is where."""

    def __init__(self, handler, address=("127.0.0.1", 0)):
        self.http = _Quiet(address, handler)
        self.url = f"http://{address[0]}:{self.http.server_address[1]}"
        threading.Thread(target=self.http.serve_forever, args=(0.05,), daemon=True).start()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def close(self):
        self.http.shutdown()
        self.http.server_close()
        for connection in self.http.connections:  # kept alive, a thread of its own would go on answering
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)


class FaultProxy(_Server):
    """Passes requests on to ``upstream`` and spoils answers to GETs of shards and indexes.

    ``faults``: which, a tuple of FAULTS; every ``every``-th such GET is spoiled, by each fault in turn. With ``every``
    above 1 the same bytes are spoiled MOST_IN_A_ROW times at most: among several threads one read may otherwise be hit
    by chance until its patience ends.
    ``injected`` counts them; ``requests`` counts all GETs of shards. ``stall_seconds``: how long a stall lasts.
    """

    def __init__(self, upstream, faults=(), every=3, stall_seconds=4):
        self.upstream = urllib.parse.urlsplit(upstream).netloc
        self.faults, self.every, self.stall_seconds = faults, every, stall_seconds
        self.gone = False  # set: no request is answered any more
        self.injected, self.requests, self.lock = Counter(), 0, threading.Lock()
        # By path and last byte: a retry asks for what is missing, up to the same end.
        self.in_a_row = Counter()
        proxy = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_):
                pass

            def _pass_on(self):
                proxy.answer(self)

            do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = _pass_on

        super().__init__(Handler)

    def choose(self, handler):
        """The fault for this request, or None."""
        path = urllib.parse.urlsplit(handler.path).path
        if handler.command != "GET" or not path.endswith((".tar", ".idx", ".idx2")):
            return None
        wanted = path, handler.headers.get("Range", "").rpartition("-")[2]
        with self.lock:
            self.requests += 1
            enough = self.every > 1 and self.in_a_row[wanted] >= MOST_IN_A_ROW
            if not self.faults or self.requests % self.every or enough:
                del self.in_a_row[wanted]
                return None
            self.in_a_row[wanted] += 1
            fault = self.faults[self.requests // self.every % len(self.faults)]
            self.injected[fault] += 1
            return fault

    def answer(self, handler):
        if self.gone:
            handler.close_connection = True
            return handler.connection.shutdown(socket.SHUT_RDWR)
        fault = self.choose(handler)
        body = handler.rfile.read(int(handler.headers.get("Content-Length") or 0))
        if fault == "503":
            return self._send(handler, 503, [], b"<Error><Code>SlowDown</Code></Error>")
        connection = http.client.HTTPConnection(self.upstream, timeout=60)
        try:
            # The host header is the client's: it is part of the signature.
            headers = {k: v for k, v in handler.headers.items() if k.lower() != "connection"}
            connection.request(handler.command, handler.path, body, headers)
            response = connection.getresponse()
            data = response.read()
            passed = [(k, v) for k, v in response.getheaders() if k.lower() not in HOP_HEADERS]
            length = response.getheader("Content-Length")
            self._send(handler, response.status, passed, data, fault, length)
        finally:
            connection.close()

    def _send(self, handler, status, headers, data, fault=None, length=None):
        half = len(data) // 2
        if fault == "truncate":  # a whole answer, that is too short
            data, length = data[:half], None
        handler.send_response_only(status)
        for name, value in headers:
            handler.send_header(name, value)
        head = handler.command == "HEAD"
        handler.send_header("Content-Length", length if head and length else str(len(data)))
        handler.end_headers()
        if head:
            return
        if fault in ("cut", "stall"):
            handler.wfile.write(data[:half])
            handler.wfile.flush()
            if fault == "stall":
                time.sleep(self.stall_seconds)
            handler.close_connection = True
            handler.connection.shutdown(socket.SHUT_RDWR)
        elif fault == "slow":
            for start in range(0, len(data), len(data) // 8 + 1):
                handler.wfile.write(data[start : start + len(data) // 8 + 1])
                handler.wfile.flush()
                time.sleep(0.05)
        else:
            handler.wfile.write(data)


HOP_HEADERS = ("content-length", "connection", "transfer-encoding", "keep-alive")


class WebServer(_Server):
    """A plain web server for the files of a folder. ``ranges`` False: it answers with whole files only."""

    def __init__(self, folder, ranges=True, address=("127.0.0.1", 0)):
        class Handler(http.server.SimpleHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def __init__(self, *args):
                super().__init__(*args, directory=str(folder))

            def log_message(self, *_):
                pass

            def do_GET(self):
                part = self.headers.get("Range")
                path = self.translate_path(self.path)
                if not ranges or not part or not os.path.isfile(path):
                    return super().do_GET()
                first, last = part.removeprefix("bytes=").split("-")
                data, size = Path(path).read_bytes(), os.path.getsize(path)
                data = data[int(first) : int(last) + 1 if last else size]
                self.send_response(206 if data else 416)
                self.send_header("Content-Range", f"bytes {first}-{int(first) + len(data) - 1}/{size}")
                self.send_header("Content-Length", str(len(data)))
                self.send_header("Last-Modified", self.date_time_string(os.path.getmtime(path)))
                self.end_headers()
                self.wfile.write(data)

        super().__init__(Handler, address)
