"""Images of any number of channels, of 8 or 16 bits, to the last bit: PNG, TIFF and ``.npy``.

:func:`look` reads a file's header, :func:`decode` its pixels, :func:`encode` writes them. What Pillow would change
(16-bit RGB becomes 8 bits, more than four channels do not open) goes through imagecodecs and tifffile. Nothing is
converted: an image of other channels or bits than asked for is a :class:`CorruptSample`.

Shapes: H, W of an image, C channels.
"""

import io
import logging
import math
import re
import warnings
from typing import Any, NamedTuple

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image

from caco_scale.data.photographs import (
    FALLBACK_FORMATS,
    MAX_PIXELS,
    check_size,
    decode_image,
    decoding_errors,
    without_padding,
)
from caco_scale.data.pixels import MOST_CHANNELS, RGB8, CorruptSample, Pixels

JPEG, PNG, NPY = b"\xff\xd8", b"\x89PNG\r\n\x1a\n", b"\x93NUMPY"
TIFFS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
PNG_CHANNELS = {0: 1, 2: 3, 3: 3, 4: 2, 6: 4}  # by the colour type; 3 is a palette
PNG_PALETTE = 3
MODES = {"1": 1, "L": 1, "LA": 2, "RGBA": 4}  # of Pillow, that are not shown as RGB; their channels
GREYS, RGB, PALETTE = (0, 1), 2, 3  # photometric interpretations of TIFF
WHITE_IS_ZERO = 0
ALPHA = (1, 2)  # values of TIFF's ExtraSamples
EXACT_PGM = re.compile(rb"P5\s+\d+\s+\d+\s+65535\s")
SAVE = "save uint8 or uint16 of (H, W, C)"
logging.getLogger("tifffile").setLevel(logging.CRITICAL)  # its notes on odd tags, of every image


class Look(NamedTuple):
    """What a file's header says: its own pixels, height and width, and its format's name.

    ``photograph``: Pillow shows it as RGB of 8 bits with no loss of bits or channels but transparency. ``pages``: of a
    TIFF, that may be channels (:func:`decode` with as many takes them so); ``pixels`` are those of the first then.
    """

    pixels: Pixels
    photograph: bool
    height: int
    width: int
    format: str
    pages: int = 1

    def fits(self, pixels: Pixels) -> bool:
        """Whether an image of this kind may have the pixels that are asked for, by its header."""
        return self.photograph if pixels == RGB8 else self.pages > 1 or self.pixels == pixels


def look(data: bytes) -> Look:
    """The :class:`Look` of an image file, by its content. CorruptSample for what is none."""
    with decoding_errors(data):
        return _look(data)


def decode(data: bytes, pixels: Pixels = RGB8, max_pixels: int = MAX_PIXELS) -> NDArray:
    """An image file with these pixels: bytes -> (H, W, C) of uint8 or uint16, the file's own values.

    Three channels of 8 bits are :func:`~caco_scale.data.photographs.decode_image`, which makes RGB of every photograph.
    Others are never converted, but grey of 1, 2 and 4 bits, which is scaled to 8 as PNG defines it, and TIFFs in which
    white is zero, which are inverted. CorruptSample: an image of another kind, or one that does not decode.
    """
    if pixels == RGB8 and not data.startswith(NPY):
        return decode_image(data, max_pixels)
    with decoding_errors(data):
        found = _look(data)
        check_size(found.height, found.width, max_pixels)
        if data.startswith(TIFFS):
            image = _decode_tiff(data, pixels)
        elif found.pixels != pixels:
            raise CorruptSample(f"{found.pixels}, not {pixels}")
        else:
            image = _decode_equal(data, found)
        image = np.ascontiguousarray(image, pixels.dtype)
    assert image.shape == (*image.shape[:2], pixels.channels), (image.shape, pixels)
    return image


def opens_as_rgb(data: bytes) -> bool:
    """Whether RGB of 8 bits can be made of an image file: ``data_prep build --rgb`` takes it."""
    try:
        decode(data)
    except CorruptSample:
        return False
    return True


def encode(image: NDArray) -> tuple[str, bytes]:
    """Pixels (H, W, C) without loss: ("png", bytes) of one or three channels, else ("npy", bytes)."""
    if image.shape[2] not in (1, 3):
        stream = io.BytesIO()
        np.lib.format.write_array(stream, np.ascontiguousarray(image, image.dtype.newbyteorder("<")))
        return "npy", stream.getvalue()
    import imagecodecs

    pixels = np.ascontiguousarray(image if image.shape[2] == 3 else image[:, :, 0])
    return "png", bytes(imagecodecs.png_encode(pixels))


def _look(data):
    if data.startswith(JPEG):
        height, width, space, _ = simplejpeg.decode_jpeg_header(without_padding(data))
        return Look(Pixels(1 if space == "Gray" else 3), True, int(height), int(width), "JPEG")
    if data.startswith(NPY):
        shape, dtype, _ = npy_header(io.BytesIO(data))
        return Look(Pixels(shape[2], 8 * dtype.itemsize), False, *shape[:2], "npy")
    if data.startswith(PNG) and data[12:16] == b"IHDR":
        width, height = (int.from_bytes(data[at : at + 4], "big") for at in (16, 20))
        depth, colour = data[24], data[25]
        pixels = Pixels(PNG_CHANNELS.get(colour, 3), 16 if depth == 16 else 8)
        return Look(pixels, depth <= 8, height, width, "PNG")
    if data.startswith(TIFFS):
        with _tiff(data) as file:
            return _look_at_tiff(file)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with Image.open(io.BytesIO(data), formats=FALLBACK_FORMATS) as image:
            deep = image.mode in ("I", "F") or image.mode.startswith("I;")
            pixels = Pixels(1, 16) if deep else Pixels(MODES.get(image.mode, 3))
            return Look(pixels, not deep, image.height, image.width, image.format or "image")


def _decode_equal(data, found):
    """The pixels of a file that is no TIFF and has those that are asked for."""
    if data.startswith(JPEG):
        try:
            return simplejpeg.decode_jpeg(data, colorspace="GRAY")
        except ValueError:
            return simplejpeg.decode_jpeg(without_padding(data), colorspace="GRAY")
    if data.startswith(NPY):
        return read_npy(data)
    if data.startswith(PNG):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(data), formats=["PNG"]) as image:
                image.verify()  # the checksums
        if found.pixels.bits == 16:
            import imagecodecs

            image = imagecodecs.png_decode(data)
            return image.reshape(*image.shape[:2], -1)[:, :, : found.pixels.channels]
    elif found.pixels.bits == 16 and not EXACT_PGM.match(data):
        raise CorruptSample(
            f"{found.format} of more than 8 bits, which is not read to the last bit: make it PNG or TIFF"
        )
    return _by_pillow(data)


def _by_pillow(data):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with Image.open(io.BytesIO(data), formats=FALLBACK_FORMATS) as image:
            image = np.array(
                image.convert("L") if image.mode == "1" else image
            )  # a copy, that torch may take
    return image.reshape(*image.shape[:2], -1)


# ----------------------------------------------------------------------------------------------------
# Arrays


def npy_header(stream: io.BytesIO) -> tuple[tuple[int, int, int], np.dtype, bool]:
    """((H, W, C), type, is it in Fortran's order) of a ``.npy`` file; CorruptSample for what is no image."""
    version = np.lib.format.read_magic(stream)
    read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}.get(
        version
    )
    if read is None:
        raise CorruptSample(f"a .npy of version {version}: {SAVE}")
    shape, fortran, dtype = read(stream)
    if dtype.hasobject:
        raise CorruptSample(f"an array of Python objects, which is never unpickled: {SAVE}")
    if dtype.kind != "u" or dtype.itemsize > 2:
        raise CorruptSample(
            f"an array of {dtype.name}, of which nobody knows what is black and white: {SAVE}"
        )
    if len(shape) not in (2, 3) or not math.prod(shape):
        raise CorruptSample(f"an array of shape {shape}: {SAVE}")
    height, width, channels = shape if len(shape) == 3 else (*shape, 1)
    if channels > MOST_CHANNELS:
        raise CorruptSample(f"an array of shape {shape}, which would have {channels:,} channels: {SAVE}")
    return (height, width, channels), dtype, fortran


def read_npy(data: bytes) -> NDArray:
    """The image (H, W, C) in a ``.npy`` file. CorruptSample where it is none, or has other bytes than it claims."""
    stream = io.BytesIO(data)
    shape, dtype, fortran = npy_header(stream)
    rest, wanted = len(data) - stream.tell(), math.prod(shape) * dtype.itemsize
    if rest != wanted:
        raise CorruptSample(f"an array of {wanted:,} bytes with {rest:,} of them")
    values = np.frombuffer(data, dtype, offset=stream.tell())
    return values.reshape(shape, order="F" if fortran else "C").astype(dtype.newbyteorder("="))


# ----------------------------------------------------------------------------------------------------
# TIFF


def _tiff(data) -> Any:
    import tifffile

    return tifffile.TiffFile(
        io.BytesIO(data), _multifile=False
    )  # no other file is opened, whatever its OME says


def _look_at_tiff(file):
    page = file.pages.first
    bits, samples, photometric = page.bitspersample, page.samplesperpixel, int(page.photometric)
    bits = max(bits) if isinstance(bits, tuple) else bits
    colours = samples - sum(int(extra) in ALPHA for extra in page.extrasamples)
    plain = photometric not in (*GREYS, RGB) or colours == {RGB: 3}.get(photometric, 1)
    photograph = plain and bits <= 8 and page.sampleformat in (None, 1)
    pixels = Pixels(3 if photograph and photometric not in (*GREYS, RGB) else samples, 8 if bits <= 8 else 16)
    pages = len(file.pages)
    if pages > 1 and not photograph and len(file.series) == 1 and len(named := _named(file.series[0])) == 1:
        pixels, pages = pixels._replace(channels=file.series[0].shape[named[0]]), 1
    return Look(pixels, photograph, page.imagelength, page.imagewidth, "TIFF", pages)


def _named(series):
    """The axes of a series that are called channels."""
    return [place for place, name in enumerate(series.axes) if name in "CS"]


def _decode_tiff(data, pixels):
    """The pages or samples of a TIFF as (H, W, C)."""
    with _tiff(data) as file:
        page, series = file.pages.first, file.series
        if len(series) > 1:
            raise CorruptSample(f"a TIFF of {len(series)} images of different kinds: save each one alone")
        whole = series[0]
        if page.dtype is None or np.dtype(page.dtype).kind not in "ub" or np.dtype(page.dtype).itemsize > 2:
            raise CorruptSample(
                f"a TIFF of {page.dtype}, of which nobody knows what is black and white: make it 8 or 16 bits"
            )
        if int(page.photometric) not in (*GREYS, RGB):
            raise CorruptSample(
                f"a TIFF of colours ({page.photometric.name}), which is read as RGB8 alone, not {pixels}"
            )
        if page.bitspersample < 8 and len(file.pages) == 1 and pixels == Pixels(1):
            return _by_pillow(data)  # which scales them
        shape, axis = _channels_last(whole, pixels, len(file.pages))
        check_size(*shape[:2], MAX_PIXELS)
        found = Pixels(shape[2], 8 * np.dtype(page.dtype).itemsize)
        if found != pixels:
            raise CorruptSample(f"{found}, not {pixels}")
        image = whole.asarray().reshape(whole.shape)
        image = image[:, :, None] if axis is None else np.moveaxis(image, axis, 2)
        if int(page.photometric) == WHITE_IS_ZERO:
            image = (1 << page.bitspersample) - 1 - image
        return image


def _channels_last(series, pixels, num_pages):
    """((H, W, C), the axis that is the channels or None); CorruptSample where nobody can tell."""
    shape = series.shape
    if len(shape) == 2:
        return (*shape, 1), None
    named = _named(series)
    if len(shape) == 3 and len(named) == 1:
        axis = named[0]
    elif len(shape) == 3 and pixels.channels in (shape[0], shape[2]):  # pages, which the flag calls channels
        axis = 0 if shape[0] == pixels.channels else 2
    else:
        raise CorruptSample(
            f"a TIFF of {num_pages} pages {tuple(shape)}, of which nobody knows whether they are channels: say so by "
            "their number (build --channels, data.channels), or save one page of several samples, or .npy of (H, W, C)"
        )
    rest = [size for place, size in enumerate(shape) if place != axis]
    return (*rest, shape[axis]), axis
