"""The parts of an extraction on disk: what a killed start leaves behind and the next one skips.

A part is a run of sample numbers, whole batches: which ones depends on the set and the batch alone. So any number of
processes goes on where another stopped, every image is in the same batch, and the numbers are the same.
"""

import hashlib
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from caco_scale.atomic import write_atomically
from caco_scale.errors import UserError
from caco_scale.run.files import cannot_write, to_json

PART_IMAGES = 2048  # at most, or one batch: the rows that are held in memory at once
MANY = 16  # parts of a small set, so that processes have something to share

STRINGS = ("key", "source")  # columns of text: UTF-8 in one piece, and where each ends


def part_ranges(num_samples: int, batch_size: int) -> list[range]:
    """The parts of a set: ranges of sample numbers."""
    batches = -(-num_samples // batch_size)
    size = batch_size * min(max(1, batches // MANY), max(1, PART_IMAGES // batch_size))
    return [range(start, min(start + size, num_samples)) for start in range(0, num_samples, size)]


def part_path(folder: Path, part: range, request: Mapping[str, Any]) -> Path:
    """Where a part lies; its name says of which request it is, whatever else is in the folder."""
    digest = hashlib.sha256(to_json(request, sort_keys=True).encode()).hexdigest()
    return folder / f"{part.start:012d}-{digest[:16]}.safetensors"


def write_part(path: Path, columns: dict[str, Any], undecodable: list[tuple[str, str]]) -> None:
    """Write a part, whole or not at all.

    Args:
        columns: ``key`` and ``source`` (lists of str), ``label`` and ``index`` (n,) int64, ``features`` (n, F).
        undecodable: (key, error) of its images that have no row.
    """
    arrays = {name: column for name, column in columns.items() if name not in STRINGS}
    for name in STRINGS:
        arrays[name], arrays[f"{name}_ends"] = joined(columns[name])
    arrays["undecodable"] = np.frombuffer(json.dumps(undecodable).encode(), np.uint8)
    try:
        write_atomically(path, save({name: np.ascontiguousarray(array) for name, array in arrays.items()}))
    except OSError as error:
        raise cannot_write(path, error) from None


def joined(texts: Sequence[str]) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Texts as UTF-8 in one piece and the place behind the end of each."""
    encoded = [text.encode() for text in texts]
    return np.frombuffer(b"".join(encoded), np.uint8), np.cumsum([len(e) for e in encoded], dtype=np.int64)


def split(data: bytes, ends: Sequence[int]) -> list[str]:
    """The inverse of :func:`joined`."""
    return [data[start:end].decode() for start, end in itertools.pairwise([0, *ends])]


class Parts:
    """Finished parts, in order: column by column, one part in memory at a time."""

    def __init__(self, paths: Sequence[Path]):
        self.paths = list(paths)
        lengths = [
            (len(ends), [int(e[-1]) if len(e) else 0 for e in (ends, sources)])
            for ends, sources in zip(self.arrays("key_ends"), self.arrays("source_ends"), strict=True)
        ]
        self.num_rows = sum(rows for rows, _ in lengths)
        self.num_bytes = {name: sum(sizes[i] for _, sizes in lengths) for i, name in enumerate(STRINGS)}

    def arrays(self, name: str) -> Iterator[NDArray]:
        """One array of every part."""
        for path in self.paths:
            try:
                with safe_open(path, "numpy") as part:
                    array = part.get_tensor(name)
            except (SafetensorError, OSError) as error:
                raise UserError(f"{path} cannot be read ({error}): remove it and start again") from None
            yield array

    def texts(self, name: str) -> Iterator[list[str]]:
        """One column of text of every part."""
        for data, ends in zip(self.arrays(name), self.arrays(f"{name}_ends"), strict=True):
            yield split(data.tobytes(), ends.tolist())

    def undecodable(self) -> Iterator[tuple[str, str]]:
        """(key, error) of every image that has no row."""
        for data in self.arrays("undecodable"):
            yield from (tuple(image) for image in json.loads(data.tobytes()))
