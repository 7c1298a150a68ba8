"""The decoded images of a small set, in memory that a rank's loader workers share: each is decoded once.

Whoever decodes an image puts it there; whoever needs it later, in this worker or another, finds it. What is kept is the
whole image: a view is cut out of the same pixels as without. One that does not decode is not kept, and is met again.

It is a file without a name (memfd), of which only what is written takes memory. It ends with the last of its processes,
however they end, and is not of ``/dev/shm``, of which containers have little.
"""

import contextlib
import fcntl
import io
import mmap
import os
import warnings
from collections.abc import Callable, Mapping
from multiprocessing.reduction import DupFd
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from caco_scale.data.decode import look
from caco_scale.data.own_files import nameless_file
from caco_scale.data.photographs import FALLBACK_FORMATS
from caco_scale.data.pixels import RGB8, Pixels
from caco_scale.data.samples import image_in
from caco_scale.data.store.base import Store
from caco_scale.distributed.environment import processes_of_node
from caco_scale.errors import UserError
from caco_scale.flags.choices import AutoSwitch

AUTO_BYTES = 10**9  # of a node's memory, which are taken unasked
MOST_OF_FREE = 0.8  # of the memory that is free when a run begins
ESTIMATED_FROM = 64  # images
CGROUP = "/sys/fs/cgroup"
V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes")
V2 = ("memory.max", "memory.current")


class DecodedImages:
    """Room for the decoded images of a set, shared by this process and the workers that it is handed to.

    Args:
        num_samples: of the set. capacity: bytes of pixels at most; what does not fit is not kept. pixels: of an image.
    Raises:
        UserError: the machine gives no such room.
    """

    def __init__(self, num_samples: int, capacity: int, pixels: Pixels = RGB8):
        self._num_samples, self._capacity, self._kind = num_samples, capacity, pixels
        self._fd = nameless_file()
        try:
            os.ftruncate(self._fd, 8 + 16 * num_samples + capacity)
            self._begin()
        except OSError as error:
            raise UserError(
                f"no room for {capacity / 1e9:,.2f} GB of decoded images ({error.strerror}): give "
                "--data.in_memory false"
            ) from None

    def _begin(self):
        shared, n = mmap.mmap(self._fd, 0), self._num_samples
        self._used = np.frombuffer(shared, np.int64, 1)
        self._ends = np.frombuffer(shared, np.int64, n, 8)  # of an image's bytes; 0: it is not there
        self._sizes = np.frombuffer(shared, np.int32, 2 * n, 8 + 8 * n).reshape(n, 2)  # height, width
        self._pixels = np.frombuffer(shared, np.uint8, offset=8 + 16 * n)

    def __getstate__(self) -> dict[str, Any]:
        sizes = {"num_samples": self._num_samples, "capacity": self._capacity, "kind": self._kind}
        return {**sizes, "fd": DupFd(self._fd)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._num_samples, self._capacity, self._kind = (
            state[n] for n in ("num_samples", "capacity", "kind")
        )
        self._fd = state["fd"].detach()
        self._begin()

    def __del__(self):
        with contextlib.suppress(AttributeError, OSError):
            os.close(self._fd)

    def held(self, ids: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Which of these samples are there: numbers in the set (n,) -> (n,)."""
        return self._ends[ids] > 0

    def get(self, sample_id: int) -> NDArray | None:
        """The image of a sample, (H, W, C), not copied; None: it is not there."""
        end = int(self._ends[sample_id])
        if not end:
            return None
        height, width = self._sizes[sample_id].tolist()
        image = self._pixels[end - height * width * self._kind.num_bytes : end].view(self._kind.dtype)
        return image.reshape(height, width, self._kind.channels)

    def put(self, sample_id: int, image: NDArray) -> None:
        """Keep an image, (H, W, C), if there is room for it."""
        with self._alone():
            end = int(self._used[0]) + image.nbytes
            if end > self._capacity:
                return
            self._used[0] = end
        self._pixels[end - image.nbytes : end] = image.reshape(-1).view(np.uint8)
        self._sizes[sample_id] = image.shape[:2]
        with self._alone():  # who sees the entry sees what was written before it, on any processor
            self._ends[sample_id] = end

    @contextlib.contextmanager
    def _alone(self):
        """No other process at the same time; a lock that the death of its owner frees."""
        fcntl.lockf(self._fd, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.lockf(self._fd, fcntl.LOCK_UN)


class Memory(NamedTuple):
    """Of a node: its processes of this launch, and the bytes that they together may take of it."""

    processes: int
    free: int


def memory_here(environment: Mapping[str, str] = os.environ) -> Memory:
    """Of the node that this process is on."""
    return Memory(processes_of_node(environment), int(MOST_OF_FREE * free_memory()))


def room_for(
    store: Store, wanted: AutoSwitch, memory: Memory, estimate: Callable[[], int] | None = None
) -> tuple[int, str | None]:
    """How many bytes of decoded images each process of a node may keep, and a line about it.

    Follows from the arguments, and from the set, alone. ``estimate``: calls :func:`decoded_bytes`, where it is needed.

    The set's decoded size is estimated: the mean of 64 images that are spread over it, by the sizes that their files
    begin with, times the number of images. "auto" takes sets that are below a gigabyte for all processes of the node
    together (and below four fifths of what is free); reading begins only for those whose files are.

    Returns: 0 where none are kept.
    Raises:
        UserError: ``wanted`` is "true", and the set does not fit.
    """
    (processes, free), images = memory, store.manifest.num_samples
    if wanted == "false" or (wanted == "auto" and store.manifest.num_bytes * processes > AUTO_BYTES):
        return 0, None
    needed = (estimate() if estimate else decoded_bytes(store)) * processes
    node = f"{images:,} images" + (f" x {processes} processes" if processes > 1 else "")
    line = f"{node} take about {needed / 1e9:,.2f} GB decoded (estimated from {min(ESTIMATED_FROM, images)})"
    if wanted == "auto":
        room = min(AUTO_BYTES, free)
        return (room // processes, f"data.in_memory auto: {line}") if 0 < needed <= room else (0, None)
    if needed > free:
        raise UserError(
            f"data.in_memory true: {line}, and {free / 1e9:,.2f} GB of this machine's memory may be taken (four fifths "
            "of what is free): give --data.in_memory auto, or fewer processes a node"
        )
    return free // processes, f"data.in_memory true: {line}"


def decoded_bytes(store: Store) -> int:
    """Bytes of a set's decoded images, estimated (see :func:`room_for`); 0: none of those read is an image."""
    images = store.manifest.num_samples
    chosen = np.unique(np.linspace(0, images - 1, min(ESTIMATED_FROM, images)).round().astype(np.int64))
    places = list(zip(*(part.tolist() for part in store.locate(chosen)), strict=True)) if images else []
    sizes = [size for size in store.concurrently(lambda place: _decoded_size(store, *place), places) if size]
    return int(np.mean(sizes) * images) if sizes else 0


def _decoded_size(store, shard, position):
    """Bytes of a decoded image by its header; 0: unknown. What is wrong with it is said when it is trained on."""
    with contextlib.suppress(Exception), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        data = image_in(store.read_sample(shard, position))
        if store.pixels != RGB8:
            found = look(data)
            return store.pixels.num_bytes * found.height * found.width
        with Image.open(io.BytesIO(data), formats=("JPEG", *FALLBACK_FORMATS)) as image:
            return 3 * image.height * image.width
    return 0


def free_memory() -> int:
    """Bytes that may still be taken: of the machine, and of this process's control groups (a container, a job)."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, kinds, group = line.split(":", 2)
        if kinds and "memory" not in kinds.split(","):
            continue
        folder = Path(CGROUP, "memory" if kinds else "", group.lstrip("/"))
        limit, used = V1 if kinds else V2
        for place in (folder, *folder.parents):
            with contextlib.suppress(OSError, ValueError):  # no limit here
                most, taken = (int((place / name).read_text()) for name in (limit, used))
                free = min(free, max(0, most - taken + _page_cache(place)))
    return free


def _page_cache(group):
    """Bytes of a control group's that go when others want them."""
    stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    return int(stat["inactive_file"]) + int(stat["active_file"])
