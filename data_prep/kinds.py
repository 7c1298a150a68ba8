"""Of which kind the images of a source are: photographs, or images that keep their channels and bits."""

from collections.abc import Callable, Iterable
from contextlib import suppress

import numpy as np

from caco_scale.data.decode import decode, look
from caco_scale.data.folders import ImageFolder
from caco_scale.data.pixels import RGB8, CorruptSample, Pixels
from caco_scale.errors import UserError
from data_prep.images import mixture
from data_prep.tar import Source

LOOKED_AT = 256  # images


def kind_of(
    source: Source, folders: Iterable[ImageFolder], channels: int, bits: int, tell: Callable[[str], None]
) -> Pixels | None:
    """The :class:`Pixels` that the images of a source keep, or None: they are photographs, which become JPEGs.

    Where neither is given, what 256 images have that are spread over the source decides: if all are of more than 8
    bits, of other channels than a photograph's, arrays, or grey and none of them a JPEG, they are kept. A build refuses
    others as it meets them. channels, bits: what all images must have and keep (one of them 0: what the first has).
    tell: is given a line where images are kept. UserError: images of several kinds, pages that may be channels.
    """
    found, as_rgb = _looks(source, folders)
    if channels or bits:
        first = found[0][1].pixels if found else RGB8
        wanted = Pixels(channels or first.channels, bits or first.bits)
        other = next(((name, it) for name, it in found if not it.fits(wanted)), None)
        if other:
            name, it = other
            raise UserError(
                f"{name} has {it.pixels}, not {wanted}: give --channels {it.pixels.channels} --bits {it.pixels.bits}, "
                "leave both out to have them found, or give --rgb to make 8-bit RGB of all"
            )
        return _told(wanted, as_rgb, tell)
    if not found:
        return None
    name, first = found[0]
    if first.pages > 1 and not first.photograph:
        raise UserError(
            f"{name} is a TIFF of {first.pages} pages of {first.pixels}: give --channels {first.pages} if they are "
            "channels, or --rgb to make 8-bit RGB of the first"
        )
    kinds = {}
    for name, it in found:
        kinds.setdefault(None if it.photograph else it.pixels, (name, it))
    if len(kinds) > 1:
        (kind, (name, _)), (_, (other_name, other)) = sorted(
            kinds.items(), key=lambda kind: kind[0] is not None
        )[:2]
        raise UserError(mixture(kind or "photographs", name, other, other_name))
    kind = next(iter(kinds))
    if kind is None and all(it.pixels.channels == 1 and it.format != "JPEG" for _, it in found):
        kind = Pixels(1, 8)
    return kind and _told(kind, as_rgb, tell)


def _told(pixels, as_rgb, tell):
    rest = "" if pixels == RGB8 else f"; train on them with {pixels.flags}"
    rest += ", or build with --rgb for 8-bit RGB" if rest and as_rgb else ""
    tell(f"images of {pixels}, kept to the last bit{rest}")
    return pixels


def _looks(source, folders):
    """[(name, Look)] of images spread over a source, of those that can be looked at; does the first open as RGB?"""
    images = [image for folder in folders for image in folder.images]
    chosen = np.unique(np.linspace(0, len(images) - 1, min(LOOKED_AT, len(images))).round().astype(int))
    found, first = [], b""
    for number in chosen.tolist():
        data = source.read(images[number].file)
        with suppress(CorruptSample):
            found.append((images[number].name, look(data)))
            first = first or data
    return found, bool(first) and _opens_as_rgb(first)


def _opens_as_rgb(data):
    try:
        decode(data)
    except CorruptSample:
        return False
    return True
