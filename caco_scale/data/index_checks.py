"""What makes an index one: every number that is read from it later is looked at once, when it is parsed."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

MAX_HEADER_BYTES = 16 << 20
KINDS = ("|i1", "<i2", "<i4", "<i8")
PER_SAMPLE = ("starts", "sizes", "labels", "key_ends", "member_ends")
PER_MEMBER = ("extension", "offset", "size")


def read_header(data: bytes) -> tuple[dict[str, Any], int]:
    """(the JSON header behind an index's magic, where it ends); ValueError unless all in it is of its type."""
    size = int.from_bytes(data[8:16], "little")
    if size > min(MAX_HEADER_BYTES, len(data) - 16):
        raise ValueError(f"its header claims {size:,} of {len(data):,} bytes")
    header = json.loads(data[16 : 16 + size])
    if not isinstance(header, dict) or set(header) != {"keys", "extensions", "arrays"}:
        raise ValueError("its header is not that of an index")
    lengths = [header["keys"], *(length for _, _, length in header["arrays"])]
    wrong = [length for length in lengths if type(length) is not int or not 0 <= length <= len(data)]
    if wrong:
        raise ValueError(f"{wrong[0]!r} is no length in {len(data):,} bytes")
    if kinds := {str(kind) for _, kind, _ in header["arrays"] if kind not in KINDS}:
        raise ValueError(f"{min(kinds)!r} is no kind of its numbers")  # numpy would run its parser on any
    names = [name for name, _, _ in header["arrays"]]
    if len(set(names)) < len(names):
        raise ValueError("it has an array twice")
    if not isinstance(header["extensions"], list) or not all(
        isinstance(e, str) for e in header["extensions"]
    ):
        raise ValueError("its extensions are no names")
    return header, 16 + size


def check_arrays(keys: str, extensions: Sequence[str], arrays: Mapping[str, NDArray]) -> None:
    """ValueError unless the samples lie one behind another, each file in its sample, each key in the keys."""
    starts, sizes, labels, key_ends, member_ends = (arrays[name].astype(np.int64) for name in PER_SAMPLE)
    extension, offset, size = (arrays[name].astype(np.int64) for name in PER_MEMBER)
    if (
        len({len(arrays[name]) for name in PER_SAMPLE}) > 1
        or len({len(arrays[name]) for name in PER_MEMBER}) > 1
    ):
        raise ValueError("its arrays have different lengths")
    for name, ends, total in (("keys", key_ends, len(keys)), ("files", member_ends, len(size))):
        if (np.diff(ends, prepend=0) < 0).any() or (int(ends[-1]) if len(ends) else 0) != total:
            raise ValueError(f"its samples do not share out its {total:,} {name}")
    if (
        min(
            (int(values.min()) for values in (starts, sizes, extension, offset, size) if len(values)),
            default=0,
        )
        < 0
    ):
        raise ValueError("a place or a size in it is negative")
    # No sum of two of these numbers can overflow once one of them is below the other.
    if (starts[1:] < starts[:-1]).any() or (np.diff(starts) < sizes[:-1]).any():
        raise ValueError("its samples overlap")
    if len(labels) and labels.min() < -1:
        raise ValueError(f"{labels.min()} is no label")
    if len(extension) and extension.max() >= len(extensions):
        raise ValueError(f"a file has extension number {extension.max()} of {len(extensions)}")
    room = np.repeat(sizes, np.diff(member_ends, prepend=0))
    if (size > room).any() or (offset > room - size).any():
        raise ValueError("a file lies outside of its sample")
