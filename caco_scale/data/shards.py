"""The format of a shard set: ``manifest.json``, tar shards, and a small binary index beside each shard.

A shard is a plain WebDataset tar. Its index says where every sample lies: one contiguous span of bytes per
sample, tar headers included, so that a sample is one read (or one ranged request) and no tar is ever scanned
in training. The manifest names the shards with counts, sizes and hashes, and is written last: a directory
with one is complete.
"""

import json
import re
from collections import Counter
from dataclasses import asdict, dataclass, fields

from caco_scale.data.pixels import BITS, MOST_CHANNELS, RGB8, Pixels
from caco_scale.data.shard_table import ShardInfo, ShardTable
from caco_scale.data.small_files import what_instead
from caco_scale.errors import UserError, one_line

MANIFEST_NAME = "manifest.json"
FORMAT = "caco_scale shard set"
VERSIONS = (1, 2)  # 2: there are indexes with checksums
MAX_PATTERN_SHARDS = 1_000_000
MAX_VALUES = 16_000_000  # of a manifest, that it cannot take all memory
MAX_NUMBER = 1 << 60
MIN_INDEX_BYTES = 8  # of a sample
MAX_LABEL = 1_000_000  # a manifest counts the images of every class up to the highest label
SHA256 = re.compile(r"[0-9a-f]{64}")
USUAL_NAME = re.compile(r"\w[\w.-]*", re.ASCII)  # plain beyond doubt
LISTS = {"classes": str, "class_counts": int, "shards": dict, "fixed": dict, "rejected": dict}
BUILD_WORDS = {"shards_at", "pattern", "image"}  # what a manifest's "build" may say that is read again
BLOCK = 512  # bytes of a tar block


def plain_name(name: str, fix: str = "in the manifest: make the shard set again") -> str:
    """``name`` if it is a plain file name: no folder, no ``..``, no shell, nothing hidden; else UserError.

    ``fix``: where it stands and what to do about it.
    """
    if isinstance(name, str) and USUAL_NAME.fullmatch(name):
        return name
    bad = not isinstance(name, str) or not name or name.startswith((".", "-"))
    # What is not UTF-8 in a name of a file comes as U+DC80 to U+DCFF.
    if bad or any(
        c in '/\\|:{}*?<>"`$&;' or not (c.isprintable() or "\udc80" <= c <= "\udcff") for c in name
    ):
        raise UserError(f"unsafe shard name {str(name)!r} {fix}")
    return name


def expand_braces(pattern: str) -> tuple[str, list[str]]:
    """A WebDataset brace pattern, ``s3://bucket/set/{000..012}.tar``: (its folder, the shards' plain names).

    One pair of braces in the file name: a range of numbers or a list with commas. UserError for anything else.
    """
    folder, _, name = pattern.rpartition("/")
    match = re.fullmatch(r"([^{}]*)\{([^{}]*)\}([^{}]*)", name)
    if not match or "{" in folder or "}" in folder:
        raise UserError(
            f"{pattern} is not a pattern like s3://bucket/train-{{000..012}}.tar: one pair of braces, in the name"
        )
    numbers = re.fullmatch(r"(\d+)\.\.(\d+)", match[2])
    if numbers:
        first, last = numbers.groups()
        if not int(first) <= int(last) < int(first) + MAX_PATTERN_SHARDS:
            raise UserError(
                f"{pattern}: {first}..{last} is not a range of 1 to {MAX_PATTERN_SHARDS:,} shards"
            )
        inner = [str(number).zfill(len(first)) for number in range(int(first), int(last) + 1)]
    else:
        inner = match[2].split(",")
    names = [plain_name(match[1] + part + match[3], f"in {pattern}: rename it") for part in inner]
    if len(set(names)) != len(names):
        raise UserError(f"{pattern} names a shard twice")
    return folder or ".", names


def _check_pixels(build):
    """TypeError for channels and bits that no image has."""
    if "channels" in build or "bits" in build:
        channels, bits = build.get("channels"), build.get("bits")
        if type(channels) is not int or not 1 <= channels <= MOST_CHANNELS or bits not in BITS:
            raise TypeError(f"channels {channels!r} of bits {bits!r}")


@dataclass(frozen=True)
class Manifest:
    """A shard set: classes in label order, counts, shards, and which images were fixed or rejected, why."""

    classes: tuple[str, ...]
    class_counts: tuple[int, ...]
    num_samples: int
    num_bytes: int
    shards: ShardTable
    fixed: list[dict]
    rejected: list[dict]
    build: dict

    @property
    def pixels(self) -> Pixels | None:
        """What pixels its images have; None of a set that ``build`` has not made, which does not say it."""
        if "channels" in self.build:
            return Pixels(self.build["channels"], self.build["bits"])
        return RGB8 if "samples_per_shard" in self.build else None

    def to_json(self) -> str:
        """The text of ``manifest.json``; equal manifests give equal text."""
        version = VERSIONS[any(shard.has_checksums for shard in self.shards)]
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        values["shards"] = [asdict(shard) for shard in self.shards]
        return json.dumps({"format": FORMAT, "version": version, **values}, indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "Manifest":
        """Parse and check a manifest. UserError: not JSON, unknown version, unsafe names, wrong sums or claims."""
        try:
            if sum(text.count(mark) for mark in "[{,") > MAX_VALUES:
                raise ValueError(f"more than {MAX_VALUES:,} values")
            data = json.loads(text)
        except (ValueError, RecursionError, MemoryError) as error:
            raise UserError(
                f"{MANIFEST_NAME} is not JSON ({one_line(error)}): make the shard set again"
            ) from None
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            raise UserError(
                f"{MANIFEST_NAME} is not that of a {FORMAT}: build it with `python -m data_prep build`"
            )
        if data.get("version") not in VERSIONS:
            raise UserError(
                f"{MANIFEST_NAME} has version {data.get('version')}, this program reads version 1 and 2: "
                "update the program or build the shard set again"
            )
        try:
            values = {field.name: data[field.name] for field in fields(cls)}
            for name, kind in LISTS.items():
                if not isinstance(values[name], list) or not all(
                    isinstance(one, kind) for one in values[name]
                ):
                    raise TypeError(f"{name} is no list of {kind.__name__}")
            if not isinstance(values["build"], dict):
                raise TypeError("build is no dict")
            for name in BUILD_WORDS & values["build"].keys():
                if not isinstance(values["build"][name], str) or not values["build"][name].isprintable():
                    raise TypeError(f"{values['build'][name]!r} is no {name}")
            _check_pixels(values["build"])
            values["shards"] = _checked([ShardInfo(**shard) for shard in values["shards"]])
            values["classes"], values["class_counts"] = (
                tuple(values["classes"]),
                tuple(values["class_counts"]),
            )
            manifest = cls(**values)
            consistent = manifest._consistent()
        except (KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{MANIFEST_NAME} is damaged ({error!r}): make the shard set again") from None
        if not consistent:
            raise UserError(f"{MANIFEST_NAME} is damaged (its sums disagree): make the shard set again")
        return manifest

    @classmethod
    def from_bytes(cls, data: bytes, where: str) -> "Manifest":
        """The manifest in the bytes of a file. UserError names ``where`` it is, and says what it is instead."""
        instead = what_instead(data)
        if instead:
            raise UserError(f"cannot read {where}/{MANIFEST_NAME}: {instead}")
        try:
            return cls.from_json(data.decode())
        except UnicodeDecodeError as error:
            raise UserError(f"cannot read {where}/{MANIFEST_NAME}: {error}") from None
        except UserError as error:
            raise UserError(f"{where}: {error}") from None

    def _consistent(self):
        _check_numbers([self.num_samples, self.num_bytes, *self.class_counts])
        return (
            sum(self.shards.counts) == self.num_samples
            and sum(self.shards.sizes) == self.num_bytes
            and len(self.classes) == len(self.class_counts)
            and sum(self.class_counts) <= self.num_samples
        )


def _checked(shards):
    """The shards of a manifest. UserError for an unsafe name, TypeError for what cannot be."""
    for shard in shards:
        plain_name(shard.name), plain_name(shard.index_name)
        # The cache makes them the names of files.
        for sha256 in (shard.sha256, shard.index_sha256):
            if not SHA256.fullmatch(sha256):
                raise TypeError(f"{sha256!r} of {shard.name} is not a sha256")
        _check_numbers((shard.num_samples, shard.num_bytes, shard.index_num_bytes))
        if shard.num_samples > min(shard.num_bytes // BLOCK, shard.index_num_bytes // MIN_INDEX_BYTES):
            raise TypeError(
                f"{shard.name} cannot have {shard.num_samples:,} samples in {shard.num_bytes:,} bytes, "
                f"with {shard.index_num_bytes:,} of its index"
            )
    names = [name for shard in shards for name in (shard.name, shard.index_name)]
    if len(set(names)) < len(names):
        twice = next(name for name, number in Counter(names).items() if number > 1)
        raise TypeError(f"{twice!r} is named twice")
    return ShardTable(shards)


def _check_numbers(numbers):
    for number in numbers:
        if type(number) is not int or not 0 <= number < MAX_NUMBER:
            raise TypeError(f"{number!r} is not a number of samples or bytes")
