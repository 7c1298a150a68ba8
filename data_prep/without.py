"""Images that a build leaves out, by a list: a name a line, as ``embed duplicates`` writes it.

A name is that of the source's listing (``train/cat/1.jpg``), or below the folder of a split (``cat/1.jpg``) where only
one split has it. A line that names nothing is an error: it would be a typo, or a list of another source.
"""

import os
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from caco_scale.data.folders import ImageFolder, Listing, image_folders
from caco_scale.errors import UserError, quoted

REASON = "left out by a list"
MAX_BYTES = 4 << 30


def read_list(path: str) -> dict[str, int]:
    """{name: number of its line} of a list, blank lines passed over; an empty list leaves nothing out."""
    try:
        if not os.path.isfile(path):
            raise UserError(
                f"--without {path} is not a file: give a text file with the name of an image on every line"
            )
        if os.path.getsize(path) > MAX_BYTES:
            raise UserError(f"--without {path} has more than {MAX_BYTES >> 30} GB: it is not a list of names")
        with open(path, "rb") as file:
            lines = file.read().split(b"\n")
    except OSError as error:
        raise UserError(f"cannot read --without {path}: {error.strerror}") from None
    if lines[0].startswith(b"\xef\xbb\xbf"):
        lines[0] = lines[0][3:]
    names: dict[str, int] = {}
    for number, line in enumerate(lines, 1):
        if line.strip():
            names.setdefault(os.fsdecode(line.removesuffix(b"\r")), number)
    return names


def image_folders_without(
    listing: Listing,
    src: str,
    path: str | None,
    *how: Any,
    tell: Callable[[str], None] = lambda line: None,
) -> dict[str | None, ImageFolder]:
    """:func:`~caco_scale.data.folders.image_folders` of a listing without the images that the list at ``path`` names.

    ``how``: the other settings of it. What is left out stands among what is skipped. ``tell``: is given a line.
    UserError: as there, and for a line that names no image, or images of several splits.
    """
    names = read_list(path) if path else {}
    folders = image_folders(listing, src, *how)
    if path is None:
        return folders
    out = _listed(listing, folders, names, path)
    tell(f"{src}: {len(out):,} images left out by {path}")
    kept = [file for file in listing.files if file.name not in out]
    skipped = [*listing.skipped, *((name, REASON) for name in sorted(out))]
    return image_folders(replace(listing, files=kept, skipped=skipped), src, *how) if out else folders


def _listed(listing, folders, names, path):
    """The names in the listing of what a list names."""
    out = {file.name for file in listing.files if file.name in names}
    below: dict[str, dict[str | None, str]] = {}
    for split, folder in folders.items():
        for image in folder.images:
            if image.name in names and image.name not in out:
                below.setdefault(image.name, {})[split] = image.file.name
    for name, line in names.items():
        found = below.get(name, {})
        if not found and name not in out:
            raise UserError(
                f"--without {path}, line {line}: {name} is no image of the source: remove that line"
            )
        if len(found) > 1:
            raise UserError(
                f"--without {path}, line {line}: {name} is in {' and in '.join(map(str, found))}: write "
                f"{next(iter(found.values()))}, or take one split with --split {quoted(str(next(iter(found))))}"
            )
    return out | {name for places in below.values() for name in places.values()}
