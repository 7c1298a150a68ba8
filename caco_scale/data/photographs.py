"""An image file to its pixels, strictly: whatever is damaged is an error, never garbage.

These are photographs, (H, W, 3) uint8 RGB; ``decode`` also reads other channels and bits.
"""

import io
import re
import warnings

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import AvifImagePlugin, Image, UnidentifiedImageError

from caco_scale.data.pixels import CorruptSample
from caco_scale.errors import one_line

MAX_PIXELS = 100_000_000
# Formats that the fallback may open: others of PIL start programs (EPS) or are of no use here.
FALLBACK_FORMATS = ("PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "JPEG2000", "AVIF")
AvifImagePlugin.DEFAULT_MAX_THREADS = 1  # ty: ignore[invalid-assignment] (not one per CPU in every worker)
START_OF_SCAN = 0xDA  # a marker of JPEG
PADDING = re.compile(rb"\0*(?:\xff+(?=\xff))?")  # of a JPEG, before the last 0xff of a marker
WHITE_IS_ZERO, BITS_PER_SAMPLE, SAMPLE_FORMAT, SIGNED = (
    262,
    258,
    339,
    2,
)  # tags of TIFF, and a value of the last


def decode_image(data: bytes, max_pixels: int = MAX_PIXELS) -> NDArray[np.uint8]:
    """Decode an image file: bytes -> (H, W, 3) uint8 RGB. EXIF orientation is ignored, as torchvision does.

    JPEGs go through simplejpeg, where the least irregularity but padding is an error: PIL, torchvision and cv2 turn a
    flipped byte into garbage without a word. The rest (found by content, never by name) goes through PIL, and what has
    more than 8 bits a channel through :func:`rgb_pixels`. Raises CorruptSample for everything that does not decode, and
    for more than ``max_pixels`` pixels before decoding them.
    """
    with decoding_errors(data):
        if data[:2] == b"\xff\xd8":
            return _decode_jpeg(data, max_pixels)
        return _decode_other(data, max_pixels)


class decoding_errors:
    """Whatever decoding raises becomes a CorruptSample: ``with decoding_errors(data):``."""

    def __init__(self, data: bytes):
        self._data = data

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        # PIL's plugins raise nearly every kind: SyntaxError, struct.error, zlib.error, ...
        if not isinstance(error, Exception) or isinstance(error, (CorruptSample, MemoryError)):
            return
        if isinstance(
            error, UnidentifiedImageError
        ):  # its message names an object in memory, another in each run
            tiff = self._data[:4] in (b"II*\0", b"MM\0*")
            why = "a TIFF of a kind that Pillow does not read" if tiff else "not an image"
            raise CorruptSample(why) from None
        raise CorruptSample(one_line(error) or type(error).__name__) from None


def _decode_jpeg(data, max_pixels):
    try:
        return _decode_strictly(data, max_pixels)
    except ValueError as error:
        if "extraneous bytes before marker" not in str(error):
            raise
        unpadded = without_padding(data)
        if unpadded == data:
            raise
        return _decode_strictly(unpadded, max_pixels)


def _decode_strictly(data, max_pixels):
    height, width, colorspace, _ = simplejpeg.decode_jpeg_header(data)
    check_size(height, width, max_pixels)
    if colorspace not in ("CMYK", "YCCK"):
        return simplejpeg.decode_jpeg(data)
    # libjpeg-turbo has no RGB for these. Its strict reading only judges the bytes; PIL knows Adobe's inverted
    # inks.
    simplejpeg.decode_jpeg(data, colorspace="CMYK")
    with Image.open(io.BytesIO(data), formats=["JPEG"]) as image:
        return np.asarray(image.convert("RGB"))


def without_padding(data: bytes) -> bytes:
    """A JPEG without the zeros that some cameras leave before a marker: between its segments and before its end.

    Other bytes there are signs of damage. One zero before the end may belong to the picture and does no harm.
    """
    out, at = [data[:2]], 2
    while True:
        padding = PADDING.match(data, at)
        at = padding.end() if padding else at
        length = 2 + int.from_bytes(data[at + 2 : at + 4], "big")
        if data[at : at + 1] != b"\xff" or length < 4:
            return data
        if data[at + 1] == START_OF_SCAN:
            break
        out.append(data[at : at + length])
        at += length
    scans, mark, rest = data[at:].rpartition(b"\xff\xd9")
    picture = scans.rstrip(b"\0")
    out += [picture, scans[len(picture) :][:1], mark, rest]
    return b"".join(out)


def _decode_other(data, max_pixels):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PIL's notes on odd metadata and on sizes, which are judged here
        with Image.open(io.BytesIO(data), formats=FALLBACK_FORMATS) as image:
            check_size(image.height, image.width, max_pixels)
            if image.format == "PNG":
                image.verify()  # the checksums, which plain decoding skips; it uses the file up
        with Image.open(io.BytesIO(data), formats=FALLBACK_FORMATS) as image:
            return rgb_pixels(image)


def rgb_pixels(image: Image.Image) -> NDArray[np.uint8]:
    """The pixels of an image of PIL: (H, W, 3) uint8 RGB.

    16 bits a channel (12 in some TIFFs) are scaled to 8 by the range of their type; PIL's own conversion would turn
    all but the darkest white. Raises CorruptSample for 32 bits and for fractions, whose black and white nobody knows.
    """
    if image.mode not in ("I", "F") and not image.mode.startswith("I;"):
        return np.array(image.convert("RGB"))  # a copy: PIL's own is read-only, of which torch warns
    tags = getattr(image, "tag_v2", {})
    bits = tags.get(BITS_PER_SAMPLE, (16,))[0]
    # A mode "I" has 32 bits, but for PNG and PPM, whose 16 some versions of PIL read so.
    if image.mode == "F" or (image.mode == "I" and image.format not in ("PNG", "PPM")):
        signed = tags.get(SAMPLE_FORMAT, (1,))[0] == SIGNED
        kind = "fractions" if image.mode == "F" else "signed numbers" if signed else f"{bits}-bit numbers"
        raise CorruptSample(
            f"{image.format or 'image'} of {kind}, of which nobody knows what is black and white: make it 8 or 16 bits"
        )
    grey = (np.asarray(image).astype(np.int64) >> (bits - 8)).clip(0, 255).astype(np.uint8)
    if tags.get(WHITE_IS_ZERO, 1) == 0:
        grey = 255 - grey
    return np.repeat(grey[:, :, None], 3, axis=2)


def check_size(height, width, max_pixels):
    if height * width > max_pixels:
        raise CorruptSample(f"{width} x {height} pixels, more than the limit of {max_pixels:,}")
