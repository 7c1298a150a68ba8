"""Where shards are read from: a directory, or the same files in an object store, behind one small interface.

A store has ``url``, ``manifest``, ``check()``, ``index(shard)`` and ``read(shard, start, num_bytes)``. It is
picklable and keeps no state that a fork or a forkserver child could share wrongly. What it did is in
``counters``: bytes, requests, retries, hits, misses, evictions, damaged; all of this process, workers add theirs.

A read of a remote shard never waits for a whole shard: it takes the node's cached copy if there is one, else a
range of the object, while ``prefetch`` fetches the shards of coming steps in the background.
"""

import contextlib
import hashlib
import io
import os
import re
import stat
import tempfile
import threading
import warnings
from collections import Counter, OrderedDict

from caco_scale.data.cache import DamagedDownload, ShardCache, UnusableCache
from caco_scale.data.remote import NoRanges, Remote, RetryPolicy, Threads, check_address, is_remote
from caco_scale.data.shards import MANIFEST_NAME, Manifest, ShardIndex, expand_braces
from caco_scale.errors import UserError

MAX_OPEN_FILES = 128
MAX_INDEXES = 1024  # about 50 kB each for shards of 1,000 samples
HASH_BYTES = 16 << 20
PREFETCH_THREADS = 2
DOWNLOADS = 3  # of a shard whose bytes turn out wrong, before that is an error
# What a store counts; "data_..." in the metrics.
COUNTERS = ("bytes", "requests", "retries", "hits", "misses", "evictions", "damaged")


def repair_hint(url):
    """What to do about a damaged shard, in words."""
    return f"`python -m data_prep repair SRC {url}` builds what is bad again from its source"


def open_store(url, cache_dir="auto", cache_bytes=0, retry_policy=None):
    """The store that ``url`` names: a directory or the address of a shard set, or an indexed brace pattern.

    cache_dir: where whole shards of an object store are kept on this node; ``auto`` is a folder of this user's in
    the node's temporary directory, ``none`` reads ranges only, and a range is checked by its size alone: only a
    whole shard has a hash. cache_bytes: its limit, 0: four fifths of what is free there.
    retry_policy: :class:`~caco_scale.data.remote.RetryPolicy`. UserError for what is no shard set.
    """
    url = os.fspath(url)
    if not url:
        raise UserError(
            "data.shards is empty: give the directory or address of a shard set (`python -m data_prep build` makes one)"
        )
    if url.startswith("pipe:") or "|" in url:
        raise UserError(
            f"data.shards {url!r} is a shell pipe: nothing is run to read data, give the directory or address "
            f"that holds {MANIFEST_NAME}"
        )
    if "{" in url or "}" in url:
        return _open_pattern(url, cache_dir, cache_bytes, retry_policy)
    if is_remote(url) and re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", url) and not url.startswith("file://"):
        check_address(url)
        return RemoteStore(url, cache_dir, cache_bytes, retry_policy)
    store = LocalStore(url)
    if is_remote(store.shards_at):
        return RemoteStore(url, cache_dir, cache_bytes, retry_policy, index=store)
    return store


def _open_pattern(pattern, *options):
    """The store of a foreign set by its brace pattern: its manifest lies beside the shards."""
    folder, names = expand_braces(pattern)
    try:
        store = open_store(folder, *options)
    except UserError as error:
        if MANIFEST_NAME not in str(error) and "not exist" not in str(error):
            raise
        raise UserError(
            f"data.shards {pattern} has no {MANIFEST_NAME}: make one with `python -m data_prep index '{pattern}'`, "
            "or if you may not write there, elsewhere with --to, and give that directory"
        ) from None
    there = [shard.name for shard in store.manifest.shards]
    if there != names:
        raise UserError(
            f"data.shards {pattern} means {len(names)} shards, but the {MANIFEST_NAME} there has {len(there)} "
            f"({there[0]} to {there[-1]}): give {folder}, or index the pattern to another directory"
        )
    return store


class DamagedShard(UserError):
    """The bytes of a shard are not the manifest's, however often they are fetched."""


class Store:
    """What all stores share: manifest, indexes, counters; ``remote`` and ``cache`` where there are any."""

    remote = cache = None

    def _begin(self):
        self._indexes, self._index_locks, self._intact = OrderedDict(), {}, set()
        self.counters = Counter()

    def _parse_manifest(self, text):
        try:
            self.manifest = Manifest.from_json(text)
        except UserError as error:
            raise UserError(f"{self.url}: {error}") from None

    def index(self, shard):
        """The index of shard number ``shard``, checked against the manifest's sha256 and kept."""
        index = self._indexes.get(shard)
        if index is None:
            with self._index_locks.setdefault(shard, threading.Lock()):  # several threads want it at once
                index = self._indexes.get(shard) or self._load_index(shard)
        return index

    def _load_index(self, shard):
        info = self.manifest.shards[shard]
        name = f"{self.url.rstrip('/')}/{info.index_name}"
        data = self._index_bytes(info)
        if hashlib.sha256(data).hexdigest() != info.index_sha256:
            raise UserError(
                f"shard index {name} ({len(data):,} bytes) differs from the manifest: {repair_hint(self.url)}"
            )
        index = ShardIndex.from_bytes(data)
        if len(index) != info.num_samples:
            raise UserError(
                f"shard index {name} has {len(index)} samples, {info.num_samples} expected: {repair_hint(self.url)}"
            )
        self._indexes[shard] = index
        while len(self._indexes) > MAX_INDEXES:
            self._indexes.popitem(last=False)
        return index

    def read_checked(self, shard, start, num_bytes):
        """As ``read``, after the whole shard's sha256 was found to be the manifest's (once per shard).

        UserError if it is another: then nothing in the shard can be believed.
        """
        if shard not in self._intact:
            info = self.manifest.shards[shard]
            digest, got = hashlib.sha256(), 0
            for chunk in self.chunks(shard):
                digest.update(chunk)
                got += len(chunk)
            if digest.hexdigest() != info.sha256:
                raise UserError(
                    f"shard {info.name} of {self.url} is damaged: its {got:,} bytes have another sha256 than "
                    f"the manifest's {info.sha256[:12]}: {repair_hint(self.url)}"
                )
            self._intact.add(shard)
        return self.read(shard, start, num_bytes)

    def take_counters(self):
        """The counters since the last call, as a dict; they begin anew."""
        taken, self.counters = self.counters, Counter()
        return dict(taken)

    def add_counters(self, taken):
        """Add what a worker's store took."""
        self.counters.update(taken)

    # For local files there is nothing to gain below.

    def concurrently(self, function, items):
        """``map(function, items)``; where reading waits for a network, several calls at once."""
        return map(function, items)

    def can_prefetch(self, shards):
        """Is there a cache that holds these shards at once?"""
        return False

    def prefetch(self, shards):
        """Fetch whole shards in the background."""

    def fetch(self, shard):
        """Have a whole shard at hand before going on, if there is a place to keep it."""


class LocalStore(Store):
    """A shard set in a local (or mounted) directory.

    ``url`` is the address as given, ``manifest`` its parsed manifest, ``shards_at`` where the shards are if not
    there. Missing directory or manifest: UserError.
    """

    def __init__(self, url):
        self.url = url
        self.path = os.path.abspath(os.path.expanduser(url.removeprefix("file://")))
        self._forget()
        path = os.path.join(self.path, MANIFEST_NAME)
        if not os.path.isdir(self.path):
            what = "is a file, not a directory" if os.path.exists(self.path) else "does not exist"
            raise UserError(
                f"shard directory {url} {what}: make one with `python -m data_prep build SRC {url}`"
            )
        try:
            with open(path, encoding="utf-8") as file:
                text = file.read()
        except FileNotFoundError:
            raise UserError(f"{url} has no {MANIFEST_NAME}: {self._what_instead()}") from None
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"cannot read {path}: {error}") from None
        self._parse_manifest(text)
        self.shards_at = _shards_at(self.manifest, self.path)

    def _what_instead(self):
        if os.path.isdir(os.path.join(self.path, ".build")):
            return "its build has not finished, run the same `python -m data_prep build` again"
        splits = sorted(
            e.name for e in os.scandir(self.path) if os.path.exists(os.path.join(e.path, MANIFEST_NAME))
        )
        if splits:
            return f"did you mean {' or '.join(os.path.join(self.url, s) for s in splits[:3])}?"
        return f"it is not a shard set, make one with `python -m data_prep build SRC {self.url}`"

    def _forget(self):
        self._files = OrderedDict()
        self._begin()

    def __getstate__(self):
        return {name: getattr(self, name) for name in ("url", "path", "manifest", "shards_at")}

    def __setstate__(self, state):
        self.__dict__.update(state)
        self._forget()

    def check(self):
        """Compare the size of every shard and index with the manifest. UserError names the first wrong."""
        for shard in self.manifest.shards:
            sizes = (shard.name, shard.num_bytes), (shard.index_name, shard.index_num_bytes)
            for name, expected in sizes:
                path = os.path.join(self.shards_at if name == shard.name else self.path, name)
                try:
                    size = os.stat(path).st_size
                except OSError as error:
                    raise UserError(f"shard file {path}: {error.strerror}: {repair_hint(self.url)}") from None
                if size != expected:
                    raise UserError(
                        f"shard file {path} has {size:,} bytes, {expected:,} expected: {repair_hint(self.url)}"
                    )

    def _index_bytes(self, info):
        path = os.path.join(self.path, info.index_name)
        try:
            with open(path, "rb") as file:
                return file.read()
        except OSError as error:
            raise UserError(f"shard index {path}: {error.strerror}: {repair_hint(self.url)}") from None

    def read(self, shard, start, num_bytes):
        """``num_bytes`` of a shard from ``start``. UserError when the shard is missing or too short."""
        path = os.path.join(self.shards_at, self.manifest.shards[shard].name)
        try:
            # The reference keeps the file open even if another thread drops it from the table meanwhile.
            file = self._file(shard, path)
            data = os.pread(file.fileno(), num_bytes, start)
        except OSError as error:
            raise UserError(f"shard file {path}: {error.strerror}: {repair_hint(self.url)}") from None
        if len(data) != num_bytes:
            size, expected = os.stat(path).st_size, self.manifest.shards[shard].num_bytes
            raise UserError(
                f"shard file {path} has {size:,} bytes, {expected:,} expected: {repair_hint(self.url)}"
            )
        return data

    def _file(self, shard, path):
        file = self._files.pop(shard, None) or io.FileIO(path)
        self._files[shard] = file
        while len(self._files) > MAX_OPEN_FILES:
            self._files.popitem(last=False)
        return file

    def chunks(self, shard):
        """The bytes of a whole shard."""
        info = self.manifest.shards[shard]
        for start in range(0, info.num_bytes, HASH_BYTES):
            yield self.read(shard, start, min(HASH_BYTES, info.num_bytes - start))


def _shards_at(manifest, path):
    """Where the shards of an indexed foreign set are; ``path`` for all others."""
    at = manifest.build.get("shards_at", path)
    if not isinstance(at, str) or "|" in at or (is_remote(at) and not check_address(at)):
        raise UserError(f"{path}: {MANIFEST_NAME} says that the shards are at {at!r}: index the set again")
    return at if is_remote(at) else os.path.join(path, at)


class RemoteStore(Store):
    """A shard set in an object store or on a web server, with a cache of whole shards on this node's disk.

    index: the :class:`LocalStore` that has manifest and indexes, if they are not beside the shards. Picklable;
    clients, threads and open files belong to the process that uses them.
    """

    def __init__(self, url, cache_dir="auto", cache_bytes=0, retry_policy=None, index=None):
        self.url, self.local_index = url, index
        self.cache_dir, self.cache_bytes, self.retry_policy = (
            cache_dir,
            cache_bytes,
            retry_policy or RetryPolicy(),
        )
        if index is None:
            folder = Remote(url, self.retry_policy)
            self._parse_manifest(self._manifest_text(folder))
            self.shards_at = self.manifest.build.get("shards_at", url)
            if self.shards_at != url:
                raise UserError(
                    f"{url}: its {MANIFEST_NAME} names shards elsewhere: only one in a local directory may"
                )
        else:
            self.manifest, self.shards_at = index.manifest, index.shards_at
        self._forget()
        if index is None:
            self.counters.update(folder.counters)

    def _manifest_text(self, folder):
        data = folder.read_whole(MANIFEST_NAME, missing=b"")
        if not data:
            raise UserError(
                f"{self.url} has no {MANIFEST_NAME}: it is not a shard set or its build has not finished, "
                f"make one with `python -m data_prep build SRC {self.url}`"
            )
        try:
            return data.decode()
        except UnicodeDecodeError as error:
            raise UserError(f"cannot read {self.url}/{MANIFEST_NAME}: {error}") from None

    def _forget(self):
        self._begin()
        self._lock = threading.Lock()
        self._files, self._queued, self._threads = OrderedDict(), set(), None
        self._damaged = {}  # shard: what its download in the background has found
        self._cache_error = None  # why nothing more is put into the cache
        self.remote = Remote(self.shards_at, self.retry_policy)
        self.cache = None
        if self.cache_dir != "none":
            self.cache = ShardCache(_cache_directory(self.cache_dir), self.cache_bytes)

    def __getstate__(self):
        names = ("url", "local_index", "cache_dir", "cache_bytes", "retry_policy", "manifest", "shards_at")
        return {name: getattr(self, name) for name in names}

    def __setstate__(self, state):
        self.__dict__.update(state)
        self._forget()

    def check(self):
        """Compare the size of every shard and index with the manifest. UserError names the first wrong."""
        expected = {}
        for shard in self.manifest.shards:
            expected[shard.name] = shard.num_bytes
            if not self.local_index:
                expected[shard.index_name] = shard.index_num_bytes
        for name, size in self.remote.sizes(list(expected)).items():
            if size is None:
                raise UserError(f"shard file {self.shards_at}/{name} does not exist: {repair_hint(self.url)}")
            if size != expected[name]:
                raise UserError(
                    f"shard file {self.shards_at}/{name} has {size:,} bytes, {expected[name]:,} expected: "
                    f"{repair_hint(self.url)}"
                )

    def _index_bytes(self, info):
        if self.local_index:
            return self.local_index._index_bytes(info)
        return b"".join(self.remote.stream(info.index_name, 0, info.index_num_bytes, whole=True))

    def read(self, shard, start, num_bytes):
        """``num_bytes`` of a shard from ``start``: from this node's copy, else as a range of the object.

        UserError (:class:`DamagedShard`) once a download has found that the shard is not the manifest's.
        """
        info = self.manifest.shards[shard]
        data = self._read_copy(shard, info, start, num_bytes)
        if data is not None:
            return data
        if shard in self._damaged:
            raise DamagedShard(self._damaged[shard])
        self._count("misses")
        try:
            return self.remote.read(info.name, start, num_bytes)
        except NoRanges:
            for _ in range(DOWNLOADS):  # another process may evict it before it is read
                if not self._download(shard, wait=True):
                    break
                data = self._read_copy(shard, info, start, num_bytes)
                if data is not None:
                    return data
            if self._cache_error:
                raise self._cache_error from None
            raise

    def _read_copy(self, shard, info, start, num_bytes):
        """The bytes from this node's copy of the shard, None where there is no good one."""
        file = self._cached(shard, info)
        if file is None:
            return None
        with contextlib.suppress(OSError):
            data = os.pread(file.fileno(), num_bytes, start)
            if len(data) == num_bytes:
                self._count("hits")
                return data
        with self._lock:
            self._files.pop(shard, None)
        self.cache.drop(info.sha256)  # cut by someone while it was open, or the disk fails
        return None

    def _count(self, name):
        with self._lock:
            self.counters[name] += 1

    def _cached(self, shard, info):
        """The open file of a cached shard, or None."""
        if self.cache is None:
            return None
        with self._lock:
            file = self._files.pop(shard, None)
            if file is None:
                try:
                    file = self.cache.open(info.sha256, info.num_bytes)
                except UnusableCache as error:
                    self._stop_caching(error)
                if file is None:
                    return None
                # What was evicted takes its space until it is closed.
                for other in [n for n, f in self._files.items() if not os.fstat(f.fileno()).st_nlink]:
                    del self._files[other]
            self._files[shard] = file
            while len(self._files) > MAX_OPEN_FILES:
                self._files.popitem(last=False)
            return file

    def chunks(self, shard):
        """The bytes of a whole shard as the object store has them; this node's copy goes if it is damaged."""
        info = self.manifest.shards[shard]
        yield from self.remote.stream(info.name, 0, info.num_bytes, whole=True)

    def read_checked(self, shard, start, num_bytes):
        # The copy is not believed either: whoever asks has seen bytes that make no sense.
        info = self.manifest.shards[shard]
        if shard not in self._intact and self._has_copy(info):
            with self._lock:
                self._files.pop(shard, None)
            with contextlib.suppress(OSError):
                self.cache.path(info.sha256, ".ok").unlink()
            if self._cached(shard, info) is not None:  # hashed again
                self._intact.add(shard)
        return super().read_checked(shard, start, num_bytes)

    def _has_copy(self, info):
        return self.cache is not None and os.path.exists(self.cache.path(info.sha256))

    def _stop_caching(self, error):
        """A full or failing disk ends no training: from now on shards without a copy are read as ranges."""
        if self._cache_error is None:
            self._cache_error = error
            warnings.warn(f"nothing more is cached: {error}", stacklevel=2)

    def _download(self, shard, wait=False):
        """Fetch a shard into the cache; is it there now? Again if its bytes are wrong, DamagedShard if they stay so."""
        info = self.manifest.shards[shard]
        if self.cache is None or self._cache_error:
            return False
        for attempt in range(DOWNLOADS):
            try:
                chunks = lambda: self.remote.stream(info.name, 0, info.num_bytes, whole=True)
                return self.cache.fetch(info.sha256, info.num_bytes, chunks, wait)
            except NoRanges:  # a body was cut, and cannot be continued there: once more from its start
                if attempt == DOWNLOADS - 1:
                    raise
                self.remote.count("retries")
            except DamagedDownload as error:
                if attempt == DOWNLOADS - 1:
                    raise DamagedShard(
                        f"shard {info.name} of {self.url} is damaged: {error}: {repair_hint(self.url)}"
                    ) from None
                self.remote.count("retries")
            except UnusableCache as error:
                self._stop_caching(error)
                return False

    def concurrently(self, function, items):
        return self.remote.concurrently(function, items)

    def can_prefetch(self, shards):
        if self.cache is None:
            return False
        return sum(self.manifest.shards[shard].num_bytes for shard in shards) <= self.cache.limit_bytes

    def prefetch(self, shards):
        """Fetch whole shards into the cache in the background; what fails is left to ``read``."""
        if self.cache is None or self._cache_error:
            return
        for shard in map(int, shards):
            known = shard in self._files or shard in self._queued or shard in self._damaged
            if known or self._has_copy(self.manifest.shards[shard]):
                continue
            if self._threads is None:
                self._threads = Threads(PREFETCH_THREADS, self.remote.cancel)
            self._queued.add(shard)
            self._threads.submit(self._prefetch, shard)

    def _prefetch(self, shard):
        try:
            self._download(shard)
        except DamagedShard as error:
            self._damaged[shard] = str(error)  # the next read raises it: a range alone would not show it
        except UserError:
            pass  # a read of this shard will meet the same and say it
        finally:
            self._queued.discard(shard)

    def fetch(self, shard):
        if self.cache is not None and self._cached(shard, self.manifest.shards[shard]) is None:
            self._download(shard, wait=True)

    def take_counters(self):
        with self._lock:  # threads count meanwhile
            self.counters.update(self.remote.take_counters())
            if self.cache is not None:
                taken, self.cache.counters = self.cache.counters, Counter()
                self.counters.update(taken)
            return super().take_counters()


def _cache_directory(name):
    """The path of ``data.cache_dir``; ``auto`` is this user's folder on the node's own disk."""
    if name not in ("", "auto"):
        return os.path.abspath(os.path.expanduser(name))
    path = os.path.join(tempfile.gettempdir(), f"caco_scale-cache-{os.getuid()}")
    with contextlib.suppress(OSError):  # what is wrong with the place is said where it is used
        os.makedirs(path, mode=0o700, exist_ok=True)
    with contextlib.suppress(OSError):
        status = os.lstat(path)  # a link that another user planted is not followed
        if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid():
            raise UserError(f"{path} is not a directory of this user: give another data.cache_dir")
    return path
