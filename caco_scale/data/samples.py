"""What a sample of a tar is, and which of its files are its image and its label: said here, once, for the index, the
loader, the check of a set and the doctor.

The rules are those of webdataset (tariterators.py; importing that would import torch). The key of a file ends at the
first dot of its base name; the rest, in lower case, is its extension: ``a/0001.image.JPG`` is the file ``image.jpg`` of
the sample ``a/0001``. Files in a row that share a key are one sample. Passed over are files whose names have no
extension or are no sample's (``__meta__``), and hidden ones (``._0001.jpg``, ``__MACOSX/``), unlike webdataset.
"""

import functools
import re
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

from caco_scale.data.folders import IMAGE_EXTENSIONS, hidden, is_image

if TYPE_CHECKING:
    from caco_scale.data.shard_index import Samples

KEY_AND_EXTENSION = r"((?:.*/|)[^.]+)[.]([^/]*)"
META_FILES = r"__[^/]*__($|/)"
LABEL = "cls"
SHOWN = 3  # names in a message


class NoImage(ValueError):
    """A sample without a file that can be its image, or with several of which none is plainly it."""


def key_and_extension(name: str) -> tuple[str, str] | None:
    """(key, extension) of a file of a tar by its name; None for one that is no sample's."""
    parts = re.fullmatch(KEY_AND_EXTENSION, name)
    folders = [part for part in name.split("/") if part not in (".", "..")]
    if not parts or re.match(META_FILES, name) or hidden("/".join(folders)):
        return None
    return parts[1], parts[2].lower()


def image_of(extensions: Collection[str]) -> str:
    """Which of a sample's files is its image, by their extensions.

    That which is called plainly so (``jpg``; of several the first in the order of ``IMAGE_EXTENSIONS``), else the only
    one that ends so (``image.jpg``). :class:`NoImage` else. An array (``npy``) counts where nothing else does.
    """
    dotted = images_of(extensions)
    plain = next((kind for kind in IMAGE_EXTENSIONS if kind in dotted), None)
    if plain:
        return plain
    if len(dotted) == 1:
        return dotted[0]
    if dotted:
        raise NoImage(f"{len(dotted)} images ({some(dotted)}) of which none is plainly the one to read")
    raise NoImage(
        f"no image file ({', '.join(IMAGE_EXTENSIONS[:4])}, ...) but {some(sorted(extensions)) or 'nothing'}"
    )


def image_in(sample: Mapping[str, Any]) -> bytes:
    """The bytes of the image in webdataset's sample dict; :class:`NoImage` as of :func:`image_of`."""
    return sample[_image_of(tuple(name for name in sample if not name.startswith("__")))]


_image_of = functools.lru_cache(image_of)  # the samples of a set have few kinds of files


def images_of(extensions: Collection[str]) -> list[str]:
    """All extensions that are an image's, sorted; arrays (``.npy``) only where there is no other."""
    images = sorted(extension for extension in extensions if is_image(f"x.{extension}"))
    return [extension for extension in images if not extension.endswith("npy")] or images


def label_of(extensions: Collection[str]) -> str | None:
    """Which of a sample's files holds its label: ``cls``, else the only one that ends so (``label.cls``)."""
    dotted = [extension for extension in extensions if extension.endswith(f".{LABEL}")]
    return LABEL if LABEL in extensions else dotted[0] if len(dotted) == 1 else None


def problem_of(index: "Samples", num_classes: int) -> str | None:
    """What training or an evaluation would not take of a shard's samples, by its index; None where they take all."""
    labels = index.labels
    if len(labels) and labels.max() >= num_classes:
        return f"label {labels.max()} with {num_classes} classes"
    good = set()
    for position, key in enumerate(index.keys):
        kinds = tuple(extension for extension, _, _ in index.members(position))
        if kinds not in good:
            try:
                image_of(kinds)
            except NoImage as error:
                return f"sample {key} has {error}"
            good.add(kinds)
    return None


def some(names: Collection[str]) -> str:
    """The first names of several, and how many more there are."""
    names = list(names)
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")
