"""Of which kind the images of a source are: photographs, or images that keep their channels and bits."""

from collections.abc import Callable, Iterable
from contextlib import suppress

import numpy as np

from caco_scale.data.decode import look, opens_as_rgb
from caco_scale.data.folders import ImageFolder
from caco_scale.data.pixels import RGB8, CorruptSample, Pixels
from caco_scale.errors import UserError
from data_prep.images import each_alone, mixture
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
    found = _looks(source, folders)
    read = lambda *files: map(source.read, files)
    if channels or bits:
        first = found[0][1].pixels if found else RGB8
        wanted = Pixels(channels or first.channels, bits or first.bits)
        other = next((one for one in found if not one[1].fits(wanted)), None)
        if other:
            name, it, file = other
            unlike = next((file for _, another, file in found if another.pixels != it.pixels), None)
            fix = f"give --channels {it.pixels.channels} --bits {it.pixels.bits}, or leave both out to have them found"
            raise UserError(
                f"{name} has {it.pixels}, not {wanted}: {each_alone(read(file, unlike)) if unlike else fix}"
            )
        return _told(wanted, read(*(file for _, _, file in found[:1])), tell)
    if not found:
        return None
    name, first, first_file = found[0]
    if first.pages > 1 and not first.photograph:
        as_rgb = ", or --rgb to make 8-bit RGB of the first" if opens_as_rgb(source.read(first_file)) else ""
        raise UserError(
            f"{name} is a TIFF of {first.pages} pages of {first.pixels}: give --channels {first.pages} if they are "
            f"channels{as_rgb or ', else save each page alone'}"
        )
    kinds = {}
    for name, it, file in found:
        kinds.setdefault(None if it.photograph else it.pixels, (name, it, file))
    if len(kinds) > 1:
        (kind, (name, _, file)), (_, (other_name, it, other_file)) = sorted(
            kinds.items(), key=lambda kind: kind[0] is not None
        )[:2]
        raise UserError(mixture(kind or "photographs", name, it, other_name, read(file, other_file)))
    kind = next(iter(kinds))
    if kind is None and all(it.pixels.channels == 1 and it.format != "JPEG" for _, it, _ in found):
        kind = Pixels(1, 8)
    return kind and _told(kind, read(first_file), tell)


def _told(pixels, examples, tell):
    rest = "" if pixels == RGB8 else f"; train on them with {pixels.flags}"
    rest += ", or build with --rgb for 8-bit RGB" if rest and any(map(opens_as_rgb, examples)) else ""
    tell(f"images of {pixels}, kept to the last bit{rest}")
    return pixels


def _looks(source, folders):
    """[(name, Look, file)] of images spread over a source, of those that can be looked at."""
    images = [image for folder in folders for image in folder.images]
    chosen = np.unique(np.linspace(0, len(images) - 1, min(LOOKED_AT, len(images))).round().astype(int))
    found = []
    for number in chosen.tolist():
        with suppress(CorruptSample):
            name, file = images[number].name, images[number].file
            found.append((name, look(source.read(file)), file))
    return found
