"""``SHA256SUMS``, a checkpoint's last file: the hash of every other one, checked before any byte of it is parsed.

It is what ``sha256sum -c SHA256SUMS`` reads, too. Checkpoints of version 0.1 have none. Nothing here needs torch.
"""

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path

NAME = "SHA256SUMS"
LINE = re.compile(r"([0-9a-f]{64})  (\S+)")


def file_sha256(path: Path) -> str:
    """The SHA-256 of a file's bytes, in hexadecimal digits."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def text_sha256(text: str) -> str:
    """The SHA-256 of a text file's bytes."""
    return hashlib.sha256(text.encode()).hexdigest()


def write_sums(folder: Path, sums: Mapping[str, str]) -> Path:
    """Write ``{file name: SHA-256}`` -> the file's path; it is not flushed to the disk yet."""
    (folder / NAME).write_text("".join(f"{digest}  {name}\n" for name, digest in sorted(sums.items())))
    return folder / NAME


def read_sums(folder: Path) -> dict[str, str] | None:
    """``{file name: SHA-256}`` of a checkpoint, None where it has none.

    Raises:
        ValueError: a line that is none of ours.
        OSError: it cannot be read.
    """
    if not (folder / NAME).is_file():
        return None
    found = {}
    for number, line in enumerate((folder / NAME).read_text("ascii").splitlines(), 1):
        words = LINE.fullmatch(line)
        if words is None:
            raise ValueError(f"line {number} is damaged")
        found[words[2]] = words[1]
    return found
