"""What every store of images is and does; where its bytes come from is the kinds' business.

The loader asks a store for ``manifest``, ``index(shard)`` and ``read(shard, start, num_bytes)``; what is called a shard
need not be a tar.
"""

import contextlib
import hashlib
import json
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from caco_scale.data.cache import ShardCache
from caco_scale.data.counters import Counters
from caco_scale.data.object_store import Remote, WrongBytes
from caco_scale.data.order import first_ids, locate
from caco_scale.data.pixels import RGB8, CorruptSample, Pixels
from caco_scale.data.samples import NoImage, image_in
from caco_scale.data.shard_index import Samples, ShardIndex, hash_spans, read_sample
from caco_scale.data.shard_table import ShardInfo
from caco_scale.data.shards import MANIFEST_NAME, Manifest
from caco_scale.data.small_files import what_instead
from caco_scale.errors import UserError, quoted

if TYPE_CHECKING:
    from caco_scale.data.decode import Look

MAX_OPEN_FILES = 128
LOOKED_AT = 16  # images
ALL = (0, 1)  # the share of a process that is alone on its node
MAX_INDEXES = 1024  # about 50 kB each for shards of 1,000 samples


class DamagedShard(UserError):
    """The bytes of a shard are not the recorded ones, however often they are fetched."""


class Store:
    """Images in numbered shards: ``url`` as it was given, ``manifest``, ``counters`` of this process.

    Picklable: what belongs to a process (open files, threads, counts) stays there. ``cache`` is that of whole shards on
    this node, if there is one. ``pixels``: what its images are decoded to, see :meth:`take_pixels`.
    """

    url: str
    manifest: Manifest
    counters: Counters
    cache: ShardCache | None = None
    pixels: Pixels = RGB8
    _flag: str = "data.shards"
    pickled: ClassVar[tuple[str, ...]] = ("url", "manifest")  # the attributes that a pickle takes along

    def __getstate__(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in (*self.pickled, "pixels")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._begin(Counters())

    def _begin(self, counters):
        """Make what belongs to this process."""
        self.counters = counters
        self._indexes: OrderedDict[int, ShardIndex] = OrderedDict()
        self._index_locks: dict[int, threading.Lock] = {}
        self._checksums: dict[int, NDArray[np.uint64]] = {}  # of shards whose index has none, as they are met

    @property
    def remote(self) -> Remote | None:
        """The object store that the shards are in, if they are in one."""
        return None

    @property
    def repair_hint(self) -> str:
        """What to do about damaged shards or images, in words."""
        if self.manifest.build.get("foreign"):
            return (
                "there is no source to build tars of others from: put the good tar back, or remove "
                f"{self.url.rstrip('/')}/{MANIFEST_NAME} and run `{self._index_command()}`"
            )
        return f"`python -m data_prep repair SRC {quoted(self.url)}` builds what is bad again from its source"

    def _index_command(self):
        """What has made this indexed foreign set, and would again."""
        build = self.manifest.build
        tars = build.get("shards_at", self.url)
        words = [f"{tars.rstrip('/')}/{build['pattern']}" if "pattern" in build else tars]
        words += ["--to", self.url] if "shards_at" in build else []
        words += ["--image", build["image"]] if "image" in build else []
        return f"python -m data_prep index {' '.join(map(quoted, words))}"

    @property
    def rgb_command(self) -> str:
        """The command that makes shards of 8-bit RGB of images that are read in place; empty where there is none."""
        return ""

    @property
    def verify_hint(self) -> str:
        """How to find out what is damaged, in words."""
        return f"check the set with `python -m data_prep verify --full {quoted(self.url)}`"

    @property
    def unchecked(self) -> str:
        """What is read without a checksum, in words with what to do; empty where nothing is."""
        without = sum(not shard.has_checksums for shard in self.manifest.shards)
        if not without:
            return ""
        to = " --to DIR" if self.url.startswith("http") and self.remote else ""  # DIR is data.shards then
        return (
            f"{self.url} has no checksums for the images of {without:,} of its {len(self.manifest.shards):,} shards: "
            "wrong bytes that still decode go unnoticed until "
            f"`python -m data_prep index {quoted(self.url)}{to}` has added them"
        )

    @property
    def left_out(self) -> str:
        """Which images are there and are none of the set, in words; empty where none is."""
        return ""

    def check(self, share: tuple[int, int] = ALL) -> None:
        """Compare what is there with the manifest. UserError names the first wrong, and a set without an image.

        share: (i, n): process i of n on this node looks at every n-th shard, from the i-th on. All n call this.
        Of a set whose manifest does not say which pixels its images have, process 0 looks at a few.
        """
        if self.manifest.num_samples == 0:
            raise UserError(f"{self.url} holds no images: give a set with at least one")
        self._check_files(share)
        if share[0] == 0:
            self._check_pixels()

    def _check_files(self, share):
        raise NotImplementedError

    def take_pixels(self, wanted: Pixels | None, flag: str) -> None:
        """Decode images to these pixels, None: those that the manifest says, else RGB of 8 bits. Nothing is converted:
        UserError where the manifest says others. ``flag``: the option that gave this store.
        """
        self._flag = flag
        there = self.manifest.pixels
        self.pixels = wanted or there or RGB8
        if there and there != self.pixels:
            raise UserError(self._other_pixels(there))

    @cached_property
    def looks(self) -> list[tuple[tuple[int, int], "Look"]]:
        """((shard, position), Look) of a few images spread over the set, of those that can be looked at."""
        from caco_scale.data.decode import look  # it imports torch, which a store does not need

        total, found = self.manifest.num_samples, []
        chosen = np.unique(np.linspace(0, total - 1, min(LOOKED_AT, total)).round().astype(np.int64))
        places = list(zip(*(part.tolist() for part in self.locate(chosen)), strict=True))
        # What is wrong with them is said when they are trained on.
        with contextlib.suppress(UserError):
            samples = self.concurrently(lambda place: self.read_sample(*place), places)
            for place, sample in zip(places, samples, strict=True):
                with contextlib.suppress(NoImage, CorruptSample):
                    found.append((place, look(image_in(sample))))
        return found

    def bits_for(self, channels: int) -> int:
        """16 where its images have so many channels of 16 bits, by the manifest, else by a few; 8 otherwise."""
        deep = Pixels(channels, 16)
        if self.manifest.pixels is not None:
            return 16 if self.manifest.pixels == deep else 8
        are_deep = [image.pixels.bits == 16 and image.fits(deep) for _, image in self.looks]
        return 16 if are_deep and all(are_deep) else 8

    def _check_pixels(self):
        """Look at a few images of a store that does not say which pixels they have. UserError where others were taken.

        Of photographs it is enough that one of those is one: what is grey or has more bits becomes RGB of 8 bits.
        """
        if self.manifest.pixels is not None:
            return
        others = [one for one in self.looks if not one[1].fits(self.pixels)]
        if not others or (self.pixels == RGB8 and len(others) < len(self.looks)):
            return
        kind = lambda one: RGB8 if one[1].photograph else one[1].pixels
        first = others[0]
        second = next((one for one in self.looks if kind(one) != kind(first)), None)
        if second is None:
            raise UserError(self._other_pixels(first[1].pixels, [first[0]]))
        shown = (f"{it.pixels} ({self.index(shard).keys[number]})" for (shard, number), it in (first, second))
        raise UserError(
            f"{self.url} mixes images of {' and of '.join(shown)}: give each kind alone"
            + self._as_rgb([first[0], second[0]])
        )

    def _other_pixels(self, there, places=()):
        """What is wrong with images that have other pixels than were taken, and what to do; ``places``: of examples."""
        words = f"the images of {self.url} have {there}, not {self.pixels}: give "
        if self._flag.startswith("--"):  # of a command whose encoder decides
            words += f"images such as the encoder was trained on, or an encoder of images with {there}"
        else:
            words += there.flags if "." in self._flag else f"channels={there.channels}, bits={there.bits}"
        return words + (self._as_rgb(places) if self.pixels == RGB8 else "")

    def _as_rgb(self, places):
        """How to have 8-bit RGB of the set, where that can be made; ``places``: of images that tell."""
        from caco_scale.data.decode import opens_as_rgb

        if (built := self.manifest.pixels) is not None:  # of PNGs as they were, or who knows of what
            kept = not any("re-encoded" in note["reason"] for note in self.manifest.fixed)
            return (
                ", or build it again from its source with --rgb" if kept and built.channels in (1, 3) else ""
            )
        if not self.rgb_command or not all(opens_as_rgb(image_in(self.read_sample(*p))) for p in places):
            return ""
        return f", or make 8-bit RGB of them with `{self.rgb_command}`"

    def fingerprint(self) -> str:
        """sha256 (hex) of what the manifest says of the content."""
        parts = [self.manifest.classes, self.manifest.shards.sha256s]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    # Where samples are

    @cached_property
    def _first(self) -> NDArray[np.int64]:
        return first_ids(self.manifest.shards.counts)

    def locate(self, ids: ArrayLike) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Samples by their numbers in the set: ids (n,) -> (shard (n,), position in the shard (n,))."""
        return locate(self._first, ids)

    def names(self, ids: ArrayLike) -> list[str]:
        """``shard/key`` of samples by their numbers in the set."""
        places = zip(*(part.tolist() for part in self.locate(ids)), strict=True)
        return [f"{self.manifest.shards[s].name}/{self.index(s).keys[p]}" for s, p in places]

    def index(self, shard: int) -> Samples:
        """The index of shard number ``shard``, checked against the manifest and kept."""
        index = self._indexes.get(shard)
        if index is None:
            with self._index_locks.setdefault(shard, threading.Lock()):  # several threads want it at once
                index = self._indexes.get(shard) or self._load_index(shard)
        return index

    def _load_index(self, shard):
        info = self.manifest.shards[shard]
        name = f"{self.url.rstrip('/')}/{info.index_name}"
        data = self._index_bytes(info)
        if not info.is_index(data):
            if instead := what_instead(data):
                raise UserError(f"cannot read shard index {name}: {instead}")
            raise UserError(
                f"shard index {name} ({len(data):,} bytes) differs from the manifest: {self.repair_hint}"
            )
        try:
            index = ShardIndex.from_bytes(data)
        except UserError as error:
            raise UserError(f"{name}: {error}") from None
        if len(index) != info.num_samples:
            raise UserError(
                f"shard index {name} has {len(index)} samples, {info.num_samples} expected: {self.repair_hint}"
            )
        if info.has_checksums and index.checksums is None:
            raise UserError(f"shard index {name} has no checksums: {self.repair_hint}")
        if (index.starts > info.num_bytes - index.sizes).any():
            raise UserError(
                f"shard index {name} has samples behind the shard's {info.num_bytes:,} bytes: {self.repair_hint}"
            )
        return self._keep_index(shard, index)

    def _keep_index(self, shard, index):
        self._indexes[shard] = index
        while len(self._indexes) > MAX_INDEXES:
            self._indexes.popitem(last=False)
        return index

    def _index_bytes(self, info: ShardInfo) -> bytes:
        raise NotImplementedError

    # Reading

    def read_sample(self, shard: int, position: int) -> dict[str, Any]:
        """A sample as webdataset's dict, its bytes the recorded ones wherever the index has a checksum of them.

        UserError where they cannot be had, :class:`DamagedShard` where others come, however often they are fetched.
        """
        index = self.index(shard)
        recorded = index.checksum(position)
        if recorded is None and shard in self._checksums:
            recorded = int(self._checksums[shard][position])
        try:
            return read_sample(index, position, self.read(shard, *index.span(position), recorded))
        except WrongBytes:
            raise self._damaged_shard(
                shard, f"the bytes of its sample {index.keys[position]} have another checksum than its index"
            ) from None

    def _damaged_shard(self, shard, problem):
        name = self.manifest.shards[shard].name
        return DamagedShard(f"shard {name} of {self.url} is damaged: {problem}: {self.repair_hint}")

    def read(self, shard: int, start: int, num_bytes: int, recorded: int | None = None) -> bytes:
        """``num_bytes`` of a shard from ``start``. UserError where they cannot be had.

        ``recorded``: their checksum; :class:`WrongBytes` where others come, however often they are fetched.
        """
        raise NotImplementedError

    def chunks(self, shard: int) -> Iterator[bytes]:
        """The bytes of a whole shard."""
        raise NotImplementedError

    def learn_checksums(self, shard: int) -> NDArray[np.uint64] | None:
        """The checksums of a shard (n,), if its index has none those of its bytes, kept for the reads that follow.

        Its bytes are compared with its sha256; :class:`DamagedShard` where that is not the manifest's. None from a
        store that has recorded nothing to compare with.
        """
        known = self._checksums.get(shard)
        if known is None:
            known = self.index(shard).checksums
        return self._learn(shard, self.chunks(shard)) if known is None else known

    def _learn(self, shard, chunks):
        index, info = self.index(shard), self.manifest.shards[shard]
        assert isinstance(index, ShardIndex), "a subset asks its store"
        sha256, num_bytes, checksums = hash_spans(index.starts, index.sizes, chunks)
        if sha256 != info.sha256:
            raise self._damaged_shard(
                shard, f"its {num_bytes:,} bytes have another sha256 than the manifest's {info.sha256[:12]}"
            )
        self._checksums[shard] = checksums
        return checksums

    # For local files there is nothing to gain below.

    def concurrently(self, function: Callable[[Any], Any], items: Iterable[Any]) -> Iterator[Any]:
        """``map(function, items)``; where reading waits for a network, several calls at once."""
        return map(function, items)

    def can_prefetch(self, shards: Iterable[int]) -> bool:
        """Is there a cache that holds these shards at once?"""
        return False

    def prefetch(self, shards: Iterable[int]) -> None:
        """Fetch whole shards in the background."""

    def fetch(self, shard: int) -> None:
        """Have a whole shard at hand before going on, if there is a place to keep it."""


class InPlaceStore(Store):
    """Files of the user's own, read where they lie: nothing of them is recorded but names and sizes."""

    @property
    def verify_hint(self) -> str:
        return f"look at the files of {self.url}"

    @property
    def unchecked(self) -> str:
        return ""

    def _check_files(self, share):
        """They were looked at, or compared with their listing, when the store was opened."""

    def learn_checksums(self, shard: int) -> None:
        return None
