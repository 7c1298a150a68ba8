"""A shard set in an object store or on a web server.

A read never waits for a whole shard: it takes the node's cached copy if there is one, else a range of the object,
while ``prefetch`` fetches the shards of coming steps in the background.
"""

import contextlib
import io
import itertools
import os
import tempfile
import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from caco_scale.data.cache import DamagedDownload, ShardCache, UnusableCache
from caco_scale.data.counters import Counters
from caco_scale.data.object_store import NoRanges, Remote, RetryPolicy
from caco_scale.data.own_files import NotOurs, private_folder
from caco_scale.data.shard_index import HASH_BYTES, checksum
from caco_scale.data.shards import MANIFEST_NAME, Manifest
from caco_scale.data.store.base import MAX_OPEN_FILES, DamagedShard, Store
from caco_scale.data.store.local import LocalStore
from caco_scale.data.threads import Threads
from caco_scale.errors import UserError

PREFETCH_THREADS = 2
INDEX_TRIES = 3  # of an index whose bytes are not the recorded ones
DOWNLOADS = 3  # of a shard whose bytes turn out wrong, before that is an error


class RemoteStore(Store):
    """A shard set in an object store or on a web server, with a cache of whole shards on this node's disk.

    index: the :class:`LocalStore` that has manifest and indexes, if they are not beside the shards. Picklable;
    clients, threads and open files belong to the process that uses them.
    """

    pickled = ("url", "local_index", "cache_dir", "cache_bytes", "retry_policy", "manifest", "shards_at")

    def __init__(
        self,
        url: str,
        cache_dir: str = "auto",
        cache_bytes: int = 0,
        retry_policy: RetryPolicy | None = None,
        index: LocalStore | None = None,
        counters: Counters | None = None,
    ):
        self.url, self.local_index = url, index
        self.cache_dir, self.cache_bytes = cache_dir, cache_bytes
        self.retry_policy = retry_policy or RetryPolicy()
        counters = counters or Counters()
        if index is None:
            data = self._manifest_bytes(Remote(url, self.retry_policy, counters))
            self.manifest = Manifest.from_bytes(data, url)
            self.shards_at = self.manifest.build.get("shards_at", url)
            if self.shards_at != url:
                raise UserError(
                    f"{url}: its {MANIFEST_NAME} names shards elsewhere: only one in a local directory may"
                )
        else:
            self.manifest, self.shards_at = index.manifest, index.shards_at
        self._begin(counters)

    def _manifest_bytes(self, folder):
        data = folder.read_whole(MANIFEST_NAME, missing=b"")
        if not data:
            raise UserError(
                f"{self.url} has no {MANIFEST_NAME}: it is not a shard set or its build has not finished; "
                "`python -m data_prep build` makes one of images, `python -m data_prep index` of other tars"
            )
        return data

    def _begin(self, counters):
        super()._begin(counters)
        self._lock = threading.Lock()
        self._files: OrderedDict[int, io.FileIO] = OrderedDict()
        self._queued: set[int] = set()
        self._threads: Threads | None = None
        self._damaged: dict[int, str] = {}  # shard: what its download in the background has found
        self._cache_error: UserError | None = None  # why nothing more is put into the cache
        self._remote = Remote(self.shards_at, self.retry_policy, counters)
        self.cache = None
        if self.cache_dir != "none":
            self.cache = ShardCache(cache_directory(self.cache_dir), self.cache_bytes, counters)

    @property
    def remote(self) -> Remote:
        return self._remote

    def _check_files(self, share):
        """Compare the size of every shard and index of the share with the manifest, and look who else is in the cache.

        A listing tells all sizes at once: process 0 of the node asks for it, and the others have nothing to do.
        """
        if self.cache is not None:
            self.cache.check(self.manifest.shards.sha256s)
        expected, (process, processes) = {}, share
        if self.remote.can_list:
            if process:
                return
            processes = 1
        for shard in itertools.islice(self.manifest.shards, process, None, processes):
            expected[shard.name] = shard.num_bytes
            if not self.local_index:
                expected[shard.index_name] = shard.index_num_bytes
        for name, size in self.remote.sizes(list(expected)).items():
            if size is None:
                raise UserError(f"shard file {self.shards_at}/{name} does not exist: {self.repair_hint}")
            if size != expected[name]:
                raise UserError(
                    f"shard file {self.shards_at}/{name} has {size:,} bytes, {expected[name]:,} expected: "
                    f"{self.repair_hint}"
                )

    def _index_bytes(self, info):
        if self.local_index:
            return self.local_index._index_bytes(info)
        data = b""
        for tries in range(
            INDEX_TRIES
        ):  # wrong bytes may be the way's fault; a file that stays wrong is told at once
            if tries:
                self.counters.add("retries")
            data = self.remote.read_whole(info.index_name, num_bytes=info.index_num_bytes)
            if info.is_index(data):
                break
        return data

    def read(self, shard: int, start: int, num_bytes: int, recorded: int | None = None) -> bytes:
        """``num_bytes`` of a shard from ``start``: from this node's copy, else as a range of the object.

        A copy that is damaged goes, and is fetched again with the next whole shards. UserError
        (:class:`DamagedShard`) once a download has found that the shard is not the manifest's.
        """
        info = self.manifest.shards[shard]
        intact = None if recorded is None else lambda data: checksum(data) == recorded
        data = self._read_copy(shard, info, start, num_bytes, intact)
        if data is not None:
            return data
        if shard in self._damaged:
            raise DamagedShard(self._damaged[shard])
        self.counters.add("misses")
        try:
            return self.remote.read(info.name, start, num_bytes, intact)
        except NoRanges:
            for _ in range(DOWNLOADS):  # another process may evict it before it is read
                if not self._download(shard, wait=True):
                    break
                data = self._read_copy(shard, info, start, num_bytes, intact)
                if data is not None:
                    return data
            if self._cache_error:
                raise self._cache_error from None
            raise

    def _read_copy(self, shard, info, start, num_bytes, intact):
        """The bytes from this node's copy of the shard, None where there is no good one."""
        file = self._cached(shard, info)
        if file is None:
            return None
        with contextlib.suppress(OSError):
            data = os.pread(file.fileno(), num_bytes, start)
            if len(data) == num_bytes and (intact is None or intact(data)):
                self.counters.add("hits")
                return data
        self._drop_copy(shard, file)
        return None

    def _drop_copy(self, shard, file):
        """This copy was cut or written to while it was open, or the disk fails. Another that took its place stays."""
        assert self.cache is not None, "there is a copy"
        with self._lock:
            if self._files.get(shard) is file:
                del self._files[shard]
        if self.cache.drop(self.manifest.shards[shard].sha256, file):
            self.counters.add("damaged")

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

    def chunks(self, shard: int) -> Iterator[bytes]:
        """The bytes of a whole shard as the object store has them."""
        info = self.manifest.shards[shard]
        yield from self.remote.stream(info.name, 0, info.num_bytes, whole=True)

    def _learn(self, shard, chunks):
        file = self._cached(shard, self.manifest.shards[shard])
        if file is not None:
            try:
                parts = (os.pread(file.fileno(), HASH_BYTES, at) for at in itertools.count(step=HASH_BYTES))
                return super()._learn(shard, iter(parts.__next__, b""))
            except (OSError, UserError):
                self._drop_copy(shard, file)
        return super()._learn(shard, chunks)

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
                self.counters.add("retries")
            except DamagedDownload as error:
                if attempt == DOWNLOADS - 1:
                    raise DamagedShard(
                        f"shard {info.name} of {self.url} is damaged: {error}: {self.repair_hint}"
                    ) from None
                self.counters.add("retries")
            except UnusableCache as error:
                self._stop_caching(error)
                return False
        raise AssertionError("the last attempt returns or raises")

    def concurrently(self, function: Callable[[Any], Any], items: Iterable[Any]) -> Iterator[Any]:
        return self.remote.concurrently(function, items)

    def can_prefetch(self, shards: Iterable[int]) -> bool:
        if self.cache is None:
            return False
        return sum(self.manifest.shards[shard].num_bytes for shard in shards) <= self.cache.limit_bytes

    def prefetch(self, shards: Iterable[int]) -> None:
        """Fetch whole shards into the cache in the background; what fails is left to ``read``."""
        if self.cache is None or self._cache_error:
            return
        for shard in map(int, shards):
            known = shard in self._files or shard in self._queued or shard in self._damaged
            if known or self.cache.has(self.manifest.shards[shard].sha256):
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

    def fetch(self, shard: int) -> None:
        if self.cache is not None and self._cached(shard, self.manifest.shards[shard]) is None:
            self._download(shard, wait=True)


def cache_directory(name: str) -> str:
    """The path of ``data.cache_dir``; ``auto`` is this user's folder on the node's own disk."""
    if name not in ("", "auto"):
        return os.path.abspath(os.path.expanduser(name))
    path = Path(tempfile.gettempdir(), f"caco_scale-cache-{os.geteuid()}")
    try:
        private_folder(path)  # a link that another user planted is not followed
    except NotOurs as error:
        raise UserError(f"{path} is {error.strerror}: give another data.cache_dir") from None
    except OSError:
        pass  # what is wrong with the place is said where it is used
    return str(path)
