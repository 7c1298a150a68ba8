"""A shard set on servers that break HTTP's rules or answer with other bytes: the right bytes or one line."""

import contextlib
import re
import socket
import struct
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest
from shard_sets import make_shard_set

from caco_scale.data.object_store import RetryPolicy
from caco_scale.data.store import open_store
from caco_scale.errors import UserError

IMAGES, IN_SHARD = 12, 6
QUICK = RetryPolicy(retries=2, stall_seconds=1)
LIMIT_SECONDS = 120  # a case that takes longer hangs
END = b"Connection: close\r\n\r\n"


class Answer:
    """What an honest server would send for a request, to be spoiled by a case."""

    def __init__(self, head, files, number):
        self.head, self.number = head, number  # number: of this request among all, from 1
        self.name = head.split(b" ")[1].rsplit(b"/", 1)[-1].decode()
        whole = files[self.name]
        part = re.search(rb"(?i)\r\nrange: *bytes=(\d+)-(\d*)", head)
        self.first, self.total = int(part[1]) if part else 0, len(whole)
        self.body = whole[self.first : int(part[2]) + 1 if part and part[2] else self.total]
        self.status = b"206 Partial Content" if part else b"200 OK"
        self.range = self.of(self.first, self.total) if part else b""

    def of(self, first, total):
        return b"Content-Range: bytes %d-%d/%d\r\n" % (first, first + len(self.body) - 1, total)

    def flipped(self):
        middle = len(self.body) // 2
        return self.body[:middle] + bytes([self.body[middle] ^ 1]) + self.body[middle + 1 :]

    def send(self, connection, length=0, headers=b"", known=True):
        """``length``: added to the one that is told; ``known`` False: none is told."""
        told = b"Content-Length: %d\r\n" % (len(self.body) + length) if known else b""
        head = b"HTTP/1.1 %s\r\n%s%s%s" % (self.status, told, self.range, headers)
        connection.sendall(head + END + (b"" if self.head.startswith(b"HEAD") else self.body))


def changed(when=lambda a: True, **values):
    """A case: fields of the answer are replaced by what these functions make of it."""

    def case(connection, answer):
        if when(answer):
            for name, value in values.items():
                setattr(answer, name, value(answer))
        answer.send(connection)

    return case


def told(**how):
    return lambda connection, answer: answer.send(connection, **how)


def raw(data, repeat=1):
    """A case: these bytes, whatever was asked for; until the client goes away with ``repeat`` None."""

    def case(connection, answer):
        connection.sendall(data)
        while repeat is None:
            connection.sendall(data[-60_000:])

    return case


def resets(connection, answer):
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def silent(connection, answer):
    connection.recv(1)  # until the client goes away


def continues_first(connection, answer):
    connection.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
    answer.send(connection)


def chunked(end):
    def case(connection, answer):
        body = b"%x\r\n%s\r\n" % (len(answer.body), answer.body) + end
        connection.sendall(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n" + END + body)

    return case


def status(line):
    return raw(b"HTTP/1.1 " + line + b"\r\nContent-Length: 0\r\nRetry-After: 100000\r\n" + END)


PAGE = b"<!DOCTYPE html><html><title>Sign in</title></html>"
CASES = {
    "honest": told(),
    "closes at once": raw(b""),
    "resets": resets,
    "silent": silent,
    "login page": changed(body=lambda a: PAGE, status=lambda a: b"200 OK", range=lambda a: b""),
    "redirects to itself": raw(b"HTTP/1.1 302 Found\r\nLocation: /000000.tar\r\nContent-Length: 0\r\n" + END),
    **{f"status {line[:3].decode()}": status(line) for line in (b"204 None", b"304 Same", b"401 Who", b"403 No")},
    **{f"status {line[:3].decode()}": status(line) for line in (b"404 Away", b"416 Range", b"418 Tea")},
    **{f"status {line[:3].decode()}": status(line) for line in (b"429 Many", b"500 Oops", b"503 Slow", b"999 Hm")},
    "too short": told(length=1),
    "length too small": told(length=-3),
    "length too large": told(length=1000),
    "length of 10^18": told(length=10**18),
    "length in words": told(known=False, headers=b"Content-Length: many\r\n"),
    "no length": told(known=False),
    "two lengths": told(headers=b"Content-Length: 5\r\n"),
    "chunked": chunked(b"0\r\n\r\n"),
    "chunked without an end": chunked(b""),
    "range of another place": changed(range=lambda a: b"Content-Range: bytes 0-5/6\r\n"),
    "range in words": changed(range=lambda a: b"Content-Range: all of it\r\n"),
    "range of another size": changed(range=lambda a: a.range and a.of(a.first, a.total + 7)),
    "no range told": changed(range=lambda a: b""),
    "bytes one place off": changed(body=lambda a: b"\0" + a.body[:-1]),
    "zeros": changed(body=lambda a: bytes(len(a.body))),
    "a flipped bit": changed(body=Answer.flipped),
    "a flipped bit at times": changed(lambda a: a.number % 3 == 0, body=Answer.flipped),
    "dies": changed(lambda a: a.number > 3, status=lambda a: b"500 Oops"),
    "comes back": changed(lambda a: a.number < 3, status=lambda a: b"500 Oops"),
    "endless body": raw(b"HTTP/1.1 200 OK\r\n" + END + bytes(60_000), repeat=None),
    "endless header": raw(b"HTTP/1.1 200 OK\r\n" + b"X-A: " + b"y" * 59_000 + b"\r\n", repeat=None),
    "another protocol": raw(b"SSH-2.0-OpenSSH_9.2\r\n" * 3),
    "100 Continue first": continues_first,
    "false encoding": told(headers=b"Content-Encoding: gzip\r\n"),
    "nonsense in headers": told(headers=b"Last-Modified: yesterday\r\nETag: \xff\xfe\r\n"),
}  # fmt: skip
RIGHT = (
    "honest",
    "a flipped bit at times",
    "comes back",
    "100 Continue first",
)  # must end in the right bytes
WHERE = {"all": "", "shards": ".tar", "manifest": ".json"}


@contextlib.contextmanager
def server(case, ending, files):
    """A server that answers honestly but for files with ``ending``; gives its address."""
    listening, count, lock = socket.create_server(("127.0.0.1", 0)), Counter(), threading.Lock()

    def answer(connection):
        with connection, contextlib.suppress(OSError, KeyError):
            connection.settimeout(30)
            head = b""
            while b"\r\n\r\n" not in head:
                received = connection.recv(65536)
                if not received:
                    return
                head += received
            made = Answer(head, files, 0)
            if made.name.endswith(ending):
                with lock:
                    count["requests"] += 1
                    made.number = count["requests"]
                case(connection, made)
            else:
                made.send(connection)

    def serve():
        with contextlib.suppress(OSError):
            while True:
                threading.Thread(target=answer, args=(listening.accept()[0],), daemon=True).start()

    threading.Thread(target=serve, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    finally:
        listening.close()


def outcome(name, where, cache, files, expected):
    """ "right", or the error's line; anything else fails the caller."""
    with server(CASES[name], WHERE[where], files) as url:
        try:
            store = open_store(url, cache, retry_policy=QUICK)
            store.check()
            for shard in range(IMAGES // IN_SHARD if cache != "none" else 0):
                store.fetch(shard)
            read = [
                store.read_sample(s, i)["jpg"] for s in range(IMAGES // IN_SHARD) for i in range(IN_SHARD)
            ]
        except UserError as error:
            return str(error)
    assert read == expected, f"{name}, {where}, {cache}: other bytes"
    return "right"


def test_an_odd_server_gives_the_right_bytes_or_one_line(tmp_path):
    folder = tmp_path / "set"
    store = open_store(make_shard_set(folder, IMAGES, samples_per_shard=IN_SHARD))
    expected = [store.read_sample(s, i)["jpg"] for s in range(IMAGES // IN_SHARD) for i in range(IN_SHARD)]
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    cases = [(name, where, cached) for name in CASES for where in WHERE for cached in (False, True)]
    with ThreadPoolExecutor(16) as pool:
        started = {
            case: pool.submit(
                outcome,
                *case[:2],
                str(tmp_path / "-".join(map(str, case))) if case[2] else "none",
                files,
                expected,
            )
            for case in cases
        }
        found = {case: future.result(timeout=LIMIT_SECONDS) for case, future in started.items()}
    for (name, where, _), line in found.items():
        assert "\n" not in line, (name, where, line)
        if name in RIGHT:
            assert line == "right", (name, where, line)
    assert sum(line != "right" for line in found.values()) > 20, "no server was odd"


@pytest.mark.parametrize("name", ["a flipped bit", "zeros", "bytes one place off"])
def test_bytes_that_stay_wrong_are_named(tmp_path, name):
    folder = tmp_path / "set"
    make_shard_set(folder, IMAGES, samples_per_shard=IN_SHARD)
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    for cache in ("none", str(tmp_path / "cache")):
        line = outcome(name, "shards", cache, files, None)
        assert "000000.tar" in line
        assert "damaged" in line or "checksum" in line, line
