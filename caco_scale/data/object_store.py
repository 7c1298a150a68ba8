"""Objects below one address of S3, GCS, Azure or a web server, through obstore, with retries that are counted.

obstore's own retries are off: ours go on where a body was cut or stalled, end after a budget, and are counted.
A body that is shorter than what was asked for is a failure like any other, never an end.

obstore hangs in a child that was FORKED after its parent used it. A client is therefore made in the process that
uses it, is never pickled, and refuses to work in such a child; the loader's workers come from a fork server.
"""

import os
import random
import re
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from caco_scale.data.addresses import check_address
from caco_scale.data.counters import Counters
from caco_scale.data.object_client import connect, reason_of
from caco_scale.data.small_files import (
    MAX_INDEX_BYTES,
    MAX_MANIFEST_BYTES,
    SMALL_SECONDS,
    refuse_large,
    refuse_slow,
    what_instead,
)
from caco_scale.data.threads import Threads
from caco_scale.errors import UserError

CHUNK_BYTES = 1 << 20
PART_BYTES = 8 << 20  # of a multipart upload
PROGRESS_BYTES = 1 << 16  # a failed attempt that brought this much is not counted against the budget
FIRST_DELAY_SECONDS, LAST_DELAY_SECONDS = 0.1, 20.0
REFUSED = (400, 401, 403, 405, 407)  # statuses that no retry fixes
THREADS = 16  # requests in flight in one process

_user: int | None = None  # the process that has used obstore


@dataclass(frozen=True)
class RetryPolicy:
    """When to give up: failed attempts in a row, and seconds without a byte before an attempt has failed.

    ``small_seconds``: for all of a small file (a manifest, an index), and for all attempts at what a start asks for:
    manifests and sizes.
    """

    retries: int = 8
    stall_seconds: float = 30.0
    small_seconds: float = SMALL_SECONDS


class Remote:
    """The objects below ``url``. Picklable; bytes, requests and retries are added to ``counters``.

    Every method raises UserError, one line that names the object: at once for what does not exist or may not be
    read, after the budget of ``retry_policy`` for everything else.
    """

    def __init__(self, url: str, retry_policy: RetryPolicy | None = None, counters: Counters | None = None):
        self.url = url.rstrip("/")
        self.scheme, _ = check_address(self.url)
        self.retry_policy = retry_policy or RetryPolicy()
        self._begin(counters or Counters())

    def _begin(self, counters):
        self.counters = counters
        self._client, self._stop = None, threading.Event()
        self._threads: Threads | None = None
        self._lock = threading.Lock()

    def __getstate__(self):
        return {"url": self.url, "scheme": self.scheme, "retry_policy": self.retry_policy}

    def __setstate__(self, state):
        self.__dict__.update(state)
        self._begin(Counters())

    def client(self) -> Any:
        """obstore's client of this process."""
        global _user
        if _user not in (None, os.getpid()):
            raise UserError(
                "this process was forked from one that had used obstore, where it would hang: "
                "start it with the methods forkserver or spawn"
            )
        _user = os.getpid()
        with self._lock:
            if self._client is None:
                self._client = connect(self.url, self.scheme, self.retry_policy.stall_seconds)
        return self._client

    # Reading

    def read(
        self, name: str, start: int, num_bytes: int, intact: Callable[[bytes], bool] | None = None
    ) -> bytes:
        """``num_bytes`` of an object from ``start``, whatever happens to the bodies on the way.

        Bytes that are not ``intact`` are a failure like any other; :class:`WrongBytes` when the budget is spent.
        """
        attempts = self._attempts(name)
        while True:
            data = b"".join(self.stream(name, start, num_bytes))
            if intact is None or intact(data):
                return data
            try:
                attempts.failed(OSError("its bytes are not the recorded ones"))
            except Unreachable as error:
                raise WrongBytes(str(error)) from None

    def stream(self, name: str, start: int, num_bytes: int, whole: bool = False) -> Iterator[bytes]:
        """The same in chunks, which are not kept. ``whole``: they are the whole object."""
        got = 0

        def more():
            # Not every web server knows ranges.
            part = None if whole and not got else (start + got, start + num_bytes)
            result = self._get(name, part)
            size = result.range[1] - result.range[0]
            if part is None and size != num_bytes:
                if instead := what_instead(
                    bytes(next(iter(result.stream(min_chunk_size=CHUNK_BYTES)), b"?"))
                ):
                    raise UserError(f"cannot read {self.url}/{name}: {instead}")
                raise OSError(f"the body has {size:,} bytes, {num_bytes:,} expected")
            yield from result.stream(min_chunk_size=CHUNK_BYTES)

        attempts = self._attempts(name)
        while got < num_bytes:
            before = got
            try:
                for chunk in more():
                    if got + len(chunk) > num_bytes:
                        raise OSError(f"the body has more than the {num_bytes:,} bytes asked for")
                    got += len(chunk)
                    self.counters.add("bytes", len(chunk))
                    yield chunk
                    if attempts.stop.is_set():
                        raise UserError(f"reading {self.url}/{name} was stopped")
                if got < num_bytes:
                    raise OSError(f"the body ended after {got:,} of {num_bytes:,} bytes")
            except UserError:
                raise
            except Exception as error:
                attempts.failed(error, progress=got - before)

    def read_whole(self, name: str, missing: bytes | None = None, num_bytes: int | None = None) -> bytes:
        """A small object: its bytes; ``missing`` (if not None) where there is none. ``num_bytes``: if it is known.

        UserError for one of more than a gigabyte, or that comes slowly: see :mod:`~caco_scale.data.small_files`.
        """
        where = f"{self.url}/{name}"
        refuse_large(where, num_bytes or 0, MAX_INDEX_BYTES)

        def get():
            start, data = time.monotonic(), bytearray()
            result = self._get(name, None)
            size = result.range[1] - result.range[0]
            if num_bytes is None:
                refuse_large(where, size, MAX_MANIFEST_BYTES)
            for chunk in result.stream(min_chunk_size=1):
                if not data and size != num_bytes and (instead := what_instead(bytes(chunk))):
                    raise UserError(f"cannot read {where}: {instead}")
                if num_bytes not in (None, size):
                    raise OSError(f"the body has {size:,} bytes, {num_bytes:,} expected")
                data += chunk
                refuse_slow(where, len(data), time.monotonic() - start, self.retry_policy.small_seconds)
            if len(data) != size or num_bytes not in (None, size):
                raise OSError(f"the body ended after {len(data):,} of {num_bytes or size:,} bytes")
            self.counters.add("bytes", len(data))
            return bytes(data)

        # An index is read in mid-training, too, where an outage is waited for as with any shard.
        limit = self.retry_policy.small_seconds if num_bytes is None else None
        try:
            return self._retried(name, get, limit=limit)
        except MissingObject:
            if missing is None:
                raise
            return missing

    def _get(self, name, part):
        import obstore

        self.counters.add("requests")
        return obstore.get(self.client(), name, options={"range": part} if part else None)

    def size(self, name: str) -> int | None:
        """The size in bytes of an object, or None where there is none."""
        import obstore

        def head():
            self.counters.add("requests")
            return obstore.head(self.client(), name)["size"]

        try:
            return self._retried(name, head, limit=self.retry_policy.small_seconds)
        except MissingObject:
            return None

    @property
    def can_list(self) -> bool:
        """Does one request tell many sizes?"""
        return self.scheme not in ("http", "https")

    def sizes(self, names: list[str]) -> dict[str, int | None]:
        """``{name: size or None}`` of many objects: by listing, or one by one on a web server."""
        if not self.can_list:
            return dict(zip(names, self.concurrently(self.size, names), strict=True))
        there = self.listing()
        return {name: there.get(name) for name in names}

    def listing(self, folder: str | None = None) -> dict[str, int]:
        """``{name: size}`` of the objects directly below the address, or below a folder of it."""
        if not self.can_list:
            raise UserError(f"{self.url}: a web server cannot be listed, give a pattern {{000..012}}.tar")
        import obstore

        def entries():
            self.counters.add("requests")
            return obstore.list_with_delimiter(self.client(), folder)["objects"]

        return {entry["path"]: entry["size"] for entry in self._retried(folder or "", entries)}

    # Writing

    def check_writable(self) -> None:
        """UserError for an address that never is, before any work is done for it."""
        if self.scheme in ("http", "https"):
            raise UserError(f"{self.url} cannot be written: give s3://, gs:// or az://")

    def write(self, name: str, data: bytes | Path, create: bool = False) -> None:
        """Store bytes, or the file at a Path in parts; it appears complete or not at all.

        ``create``: only if nothing has that name; UserError (:class:`ObjectExists`) otherwise.
        """
        self.check_writable()
        import obstore

        def put():
            self.counters.add("requests")
            mode: dict[str, Any] = (
                {"mode": "create"} if create else {"chunk_size": PART_BYTES, "max_concurrency": 2}
            )
            return obstore.put(self.client(), name, data, **mode)

        self._retried(name, put, verb="written")

    def delete(self, names: Iterable[str]) -> None:
        """Remove objects; names that are not there are no error."""
        self.check_writable()
        import obstore

        names = list(names)

        def delete():
            self.counters.add("requests")
            obstore.delete(self.client(), names)

        if names:
            self._retried(", ".join(names[:2]), delete, verb="deleted")

    # Retries

    def _retried(self, name, action, verb="read", limit=None):
        """``limit``: seconds for all attempts together."""
        attempts = self._attempts(name, verb)
        attempts.limit = limit
        while True:
            try:
                return action()
            except UserError:
                raise
            except Exception as error:
                attempts.failed(error)

    def _attempts(self, name, verb="read"):
        return _Attempts(self, f"{self.url}/{name}".rstrip("/"), verb)

    # Many at once

    def concurrently(self, function: Callable[[Any], Any], items: Iterable[Any]) -> Iterator[Any]:
        """``map(function, items)``, up to 16 calls at once, results in order; the first error ends the others."""
        if self._threads is None:
            self._threads = Threads(THREADS, self.cancel)
        pending: deque = deque()
        try:
            for item in items:
                pending.append(self._threads.submit(function, item))
                if len(pending) == 2 * THREADS:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        except UserError:
            self.cancel()
            raise
        finally:
            for future in pending:
                future.cancel()

    def cancel(self) -> None:
        """Let what is under way end soon, with an error."""
        self._stop.set()
        self._stop = threading.Event()


class MissingObject(UserError):
    """There is no object of that name."""


class Unreachable(UserError):
    """The store does not answer, or not to these credentials: that says nothing of its objects."""


class WrongBytes(UserError):
    """What was read has another checksum than the recorded one."""


class ObjectExists(UserError):
    """There is an object of that name already, and it was to be created."""


class _Attempts:
    """Counts the failures of one read or write, waits between them, and ends in a UserError."""

    def __init__(self, remote, what, verb):
        self.remote, self.what, self.verb = remote, what, verb
        self.in_a_row, self.start, self.stop = 0, time.monotonic(), remote._stop
        self.limit: float | None = None  # seconds for all attempts together

    def failed(self, error, progress=0):
        """Wait before the next attempt, or raise: the error is final or the budget is spent."""
        reason = reason_of(error)
        final = _final_error(error, self.what, self.verb, reason)
        if final:
            raise final from None
        self.in_a_row = 1 if progress >= PROGRESS_BYTES else self.in_a_row + 1
        seconds = time.monotonic() - self.start
        late = self.limit is not None and seconds > self.limit
        if late or self.in_a_row > self.remote.retry_policy.retries:
            limit = f", {self.limit:g} s are the limit" if late else ""
            raise Unreachable(
                f"{self.what} cannot be {self.verb}: {reason} ({self.in_a_row} attempts in a row failed within "
                f"{seconds:.0f} s{limit}): check network, address and endpoint, or raise "
                "data.retries, then run the same command again"
            ) from None
        self.remote.counters.add("retries")
        delay = min(LAST_DELAY_SECONDS, FIRST_DELAY_SECONDS * 2 ** (self.in_a_row - 1))
        if self.stop.wait(delay * random.uniform(0.5, 1.5)):
            raise UserError(f"{self.what} cannot be {self.verb}: {reason}") from None


def _final_error(error, what, verb, reason):
    """The UserError of an error that no retry will fix, or None."""
    from obstore import exceptions

    if isinstance(error, FileNotFoundError | exceptions.NotFoundError) or "NoSuchBucket" in reason:  # ty: ignore[deprecated]
        return MissingObject(f"{what} does not exist ({reason})")
    if isinstance(error, exceptions.AlreadyExistsError | exceptions.PreconditionError):
        return ObjectExists(f"{what} exists already")
    if re.search(r"\b(RequestTimeout|IncompleteBody|BadDigest)\b", reason):
        return None  # S3 says 400 to an upload that stalled or was cut, too
    status = re.search(r"status code: (\d+)", reason)
    refused = exceptions.PermissionDeniedError | exceptions.UnauthenticatedError | PermissionError
    if isinstance(error, refused) or (status and int(status[1]) in REFUSED):
        return Unreachable(
            f"{what} may not be {verb} ({reason}): check the credentials (AWS_ACCESS_KEY_ID, AWS_PROFILE, "
            "AWS_SKIP_SIGNATURE=true for a public bucket, GOOGLE_..., AZURE_...)"
        )
    if isinstance(error, exceptions.NotSupportedError | NotImplementedError) and verb == "read":
        return NoRanges(
            f"{what}: the server serves only whole files, so that a cut body cannot be continued and "
            "data.cache_dir none cannot work: give a data.cache_dir, or use a server that knows ranges"
        )
    if isinstance(
        error,
        exceptions.InvalidPathError
        | exceptions.NotSupportedError
        | exceptions.UnknownConfigurationKeyError
        | RuntimeError,
    ):
        return UserError(f"{what} cannot be {verb}: {reason}")
    if isinstance(error, ValueError | TypeError):
        return UserError(f"{what} cannot be {verb}: {reason}")
    return None


class NoRanges(UserError):
    """A web server that answers every request with the whole file."""
