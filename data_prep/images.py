"""What happens to the bytes of one image: kept, made an RGB JPEG, or refused; judged by their content.

Photographs become JPEGs of three channels of 8 bits; other images (:class:`~caco_scale.data.pixels.Pixels`) stay as
they are, to the last bit.
"""

import io
from collections.abc import Iterable
from contextlib import suppress

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image

from caco_scale.data.decode import Look, decode, encode, look, opens_as_rgb
from caco_scale.data.photographs import without_padding
from caco_scale.data.pixels import CorruptSample, Pixels
from caco_scale.errors import UserError

JPEG_MAGIC = b"\xff\xd8"
JPEG_QUALITY = 95


def prepare_image(data: bytes, short_side: int = 0) -> tuple[bytes, str | None]:
    """The bytes to store and what was changed: (JPEG bytes, None or a reason). Raises CorruptSample.

    The judge is the strict decoder of training. A JPEG that it reads passes byte for byte; CMYK JPEGs and
    other formats become RGB JPEGs of quality 95 with full colour resolution (4:4:4). ``short_side``: images whose
    shorter side has more pixels are made that small (antialiased), and so re-encoded.
    """
    if not data:
        raise CorruptSample("empty file")
    pixels = decode(data)
    if size := _smaller(pixels, short_side):
        small = Image.fromarray(pixels).resize(size, Image.Resampling.LANCZOS)
        return encode_jpeg(np.asarray(small)), _resized(pixels, size)
    if not data.startswith(JPEG_MAGIC):
        return encode_jpeg(pixels), f"{look(data).format} re-encoded as JPEG"
    if simplejpeg.decode_jpeg_header(without_padding(data))[2] in ("CMYK", "YCCK"):
        return encode_jpeg(pixels), "CMYK JPEG re-encoded as RGB"
    return data, None


def prepare_exact(data: bytes, pixels: Pixels, short_side: int = 0) -> tuple[str, bytes, str | None]:
    """(extension, bytes to store, None or what was changed) of an image that keeps its pixels to the last bit.

    PNG and JPEG of one or three channels pass byte for byte; others become PNG of one or three channels, else ``.npy``.
    ``short_side``: as in :func:`prepare_image`, with bits and channels as they are. Raises CorruptSample.
    """
    if not data:
        raise CorruptSample("empty file")
    image, found = decode(data, pixels), look(data)
    if size := _smaller(image, short_side):
        return *encode(_resize(image, size)), _resized(image, size)
    kept = {"PNG": "png", "JPEG": "jpg"}.get(found.format)
    if kept and pixels.channels in (1, 3):
        return kept, data, None
    extension, stored = encode(image)
    changed = None if stored == data else f"{found.format} re-encoded as {extension}, to the last bit"
    return extension, stored, changed


def refuse_mixture(data: bytes, name: str, pixels: Pixels | None, others: Iterable[bytes]) -> None:
    """UserError for an image of another kind than the source's: ``pixels``, or photographs (None).

    ``others``: images of the source, read only where there is such an error.
    """

    def fits(data):
        with suppress(CorruptSample):
            found = look(data)
            return found.photograph if pixels is None else found.fits(pixels)

    if fits(data) is False:
        like = next(filter(fits, others), b"")
        words = mixture(pixels or "photographs", "others", look(data), name, [data, like])
        raise UserError(f"{words}; to another DST, for this one holds a part of the build")


def mixture(one: object, where: str, other: Look, name: str, examples: Iterable[bytes]) -> str:
    """What is wrong with a source of images of several kinds, and what to do. ``examples``: one of each."""
    return f"the source mixes {one} ({where}) and {other.pixels} ({name}): {each_alone(examples)}"


def each_alone(examples: Iterable[bytes]) -> str:
    """What to do about images of several kinds, of which there are examples."""
    as_rgb = ", or give --rgb to make 8-bit RGB of all" if all(map(opens_as_rgb, examples)) else ""
    return f"build each kind alone, from a folder of its own{as_rgb}"


def _smaller(image, short_side):
    """The (width, height) that an image is made small to; None: it stays."""
    height, width = image.shape[:2]
    if not short_side or min(height, width) <= short_side:
        return None
    scale = short_side / min(height, width)
    return max(short_side, round(width * scale)), max(short_side, round(height * scale))


def _resized(image, size):
    return f"{image.shape[1]} x {image.shape[0]} made {size[0]} x {size[1]}"


def _resize(image, size):
    """Antialiased by Lanczos, channel by channel: (H, W, C) -> (height, width, C) of the same type."""
    channels = [Image.fromarray(image[:, :, c].astype(np.float32)) for c in range(image.shape[2])]
    small = np.stack([np.asarray(c.resize(size, Image.Resampling.LANCZOS)) for c in channels], axis=2)
    return small.round().clip(0, np.iinfo(image.dtype).max).astype(image.dtype)


def encode_jpeg(pixels: NDArray[np.uint8]) -> bytes:
    """Pixels (H, W, 3) uint8 as an RGB JPEG of quality 95, 4:4:4."""
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "JPEG", quality=JPEG_QUALITY, subsampling=0)
    return out.getvalue()
