"""Images that are not plain 8-bit files: deep grey, padding, AVIF; the loader, a build and the API agree on all."""

import io
import random
import re
import struct

import numpy as np
import pytest
import simplejpeg
from PIL import Image

from caco_scale.api.backbone import _pixels
from caco_scale.data.folders import IMAGE_EXTENSIONS
from caco_scale.data.photographs import FALLBACK_FORMATS, decode_image
from caco_scale.data.pixels import CorruptSample
from caco_scale.errors import UserError
from data_prep.images import prepare_image

RAMP = np.arange(256).reshape(16, 16)  # the grey levels that the deep images below have when they have 8 bits
DEEP = (RAMP * 257).astype(np.uint16)


def pgm(values, maximum):
    return b"P5 16 16 %d\n" % maximum + values.astype(">u2").tobytes()


def tiff(data, bits, sample_format=1, photometric=1):
    """A grey TIFF of 16 x 16 pixels; sample_format: 1 unsigned, 2 signed, 3 floating point."""
    tags = [(256, 16), (257, 16), (258, bits), (259, 1), (262, photometric), (273, 8), (277, 1), (278, 16)]
    tags += [(279, len(data)), (339, sample_format)]
    out = b"II*\0" + struct.pack("<I", 8 + len(data)) + data + struct.pack("<H", len(tags))
    return out + b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags) + bytes(4)


def packed12(values):
    a, b = values.reshape(-1, 2).T
    return np.stack([a >> 4, (a & 15) << 4 | b >> 8, b & 255], 1).astype(np.uint8).tobytes()


def saved(pixels, kind, **options):
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, kind, **options)
    return out.getvalue()


KEPT = {
    "PNG 16": lambda: saved(DEEP, "PNG"),
    "PGM 16": lambda: pgm(DEEP, 65535),
    "PGM 12": lambda: pgm(DEEP >> 4, 4095),
    "PGM 9": lambda: pgm(DEEP >> 7, 511),
    "TIFF 16": lambda: tiff(DEEP.tobytes(), 16),
    "TIFF 16, white is zero": lambda: tiff((65535 - DEEP).tobytes(), 16, photometric=0),
    "TIFF 12": lambda: tiff(packed12(DEEP >> 4), 12),
    "JPEG 2000 16": lambda: saved(DEEP, "JPEG2000"),
}
REFUSED = {
    "TIFF 32": lambda: tiff((DEEP.astype(np.uint32) << 16).tobytes(), 32),
    "TIFF 32, small numbers": lambda: tiff(DEEP.astype(np.uint32).tobytes(), 32),
    "TIFF 32, signed": lambda: tiff(DEEP.astype(np.int32).tobytes(), 32, 2),
    "TIFF 16, signed": lambda: tiff(DEEP.astype(np.int16).tobytes(), 16, 2),
    "TIFF of fractions": lambda: tiff((DEEP / 65535).astype(np.float32).tobytes(), 32, 3),
    "PFM": lambda: b"Pf\n16 16\n-1.0\n" + (DEEP / 65535).astype("<f4").tobytes(),
}


@pytest.mark.parametrize("name", KEPT)
def test_deep_grey_is_scaled_to_8_bits(name):
    data = KEPT[name]()
    pixels = decode_image(data)
    assert pixels.shape == (16, 16, 3)
    # PGM of fewer than 16 bits is scaled to 16 by PIL: a rounding more.
    assert np.abs(pixels.astype(int) - RAMP[:, :, None]).max() <= 1
    stored, reason = prepare_image(data)
    assert "re-encoded as JPEG" in reason
    assert np.abs(decode_image(stored).astype(int) - pixels).mean() < 2
    image = Image.open(io.BytesIO(data))
    assert (_pixels(image) == pixels).all()


def test_a_kind_of_tiff_that_is_not_read_is_named():
    for data in (
        tiff((DEEP / 65535).tobytes(), 64, 3),
        tiff((DEEP / 65535).astype(np.float16).tobytes(), 16, 3),
    ):
        with pytest.raises(CorruptSample, match=r"^a TIFF of a kind that Pillow does not read$"):
            prepare_image(data)


@pytest.mark.parametrize("name", REFUSED)
def test_grey_without_a_known_range_is_refused_by_name(name):
    data = REFUSED[name]()
    with pytest.raises(CorruptSample, match="nobody knows what is black and white: make it 8 or 16 bits"):
        decode_image(data)
    with pytest.raises(CorruptSample, match="black and white"):
        prepare_image(data)
    with pytest.raises(UserError, match="black and white"):
        _pixels(Image.open(io.BytesIO(data)))


# ---- JPEGs


def jpeg(progressive=False):
    pixels = np.random.default_rng(0).integers(0, 255, (12, 16, 3)).repeat(4, 0).repeat(4, 1)
    return saved(pixels.astype(np.uint8), "JPEG", quality=90, progressive=progressive)


def segments(data):
    """Where the segments before the picture begin, and where it does."""
    at, starts = 2, []
    while data[at + 1] != 0xDA:
        starts.append(at)
        at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    return [*starts, at]


@pytest.mark.parametrize("progressive", [False, True])
def test_padding_does_no_harm_to_a_jpeg(progressive):
    data = jpeg(progressive)
    starts = segments(data)
    between = b"".join(
        [data[: starts[0]], *(bytes(7) + data[a:b] for a, b in zip(starts, [*starts[1:], None], strict=True))]
    )
    for padded in (
        data[:-2] + bytes(20) + data[-2:],
        data[:-2] + bytes(3000) + data[-2:],
        between,
        between[:-2] + bytes(64) + between[-2:] + bytes(64),
        data + bytes(100),
        data[:-2] + b"\xff" * 9 + data[-2:],
    ):
        assert (decode_image(padded) == simplejpeg.decode_jpeg(data)).all()
        assert prepare_image(padded) == (padded, None)
    for other in (data[:-2] + b"abcdefghij" * 3 + data[-2:], data[:-2], data[:-40] + bytes(40)):
        with pytest.raises(CorruptSample):
            decode_image(other)


def test_padding_is_no_way_in_for_damage():
    """What strict decoding refuses of flipped and zeroed bytes stays refused."""
    generator, refused = random.Random(0), 0
    for data in (jpeg(), jpeg(progressive=True)):
        picture = segments(data)[-1]
        for _ in range(400):
            damaged = bytearray(data)
            at = generator.randrange(picture, len(data) - 2)
            length = generator.choice((1, 1, 2, 30))
            damaged[at : at + length] = bytes(
                generator.choice((0, generator.randrange(256))) for _ in damaged[at : at + length]
            )
            try:
                simplejpeg.decode_jpeg(bytes(damaged))
            except ValueError:
                refused += 1
                with pytest.raises(CorruptSample):
                    decode_image(bytes(damaged))
    assert refused > 100


@pytest.mark.parametrize(
    "tail", [b"", b"\0" * 99, b"\xff" * 99, b"\xff\xe0\0\0" * 9, b"\xff\xe0\xff\xff", b"\0\xff" * 50]
)
def test_looking_for_padding_ends(tail):
    for head in (b"\xff\xd8", jpeg()[:20], jpeg()[:150]):
        with pytest.raises(CorruptSample):
            decode_image(head + tail)


# ---- kinds of files


def test_every_kind_of_file_that_is_read_has_an_ending():
    kinds = {
        "PNG": "png",
        "WEBP": "webp",
        "BMP": "bmp",
        "GIF": "gif",
        "TIFF": "tif",
        "PPM": "ppm",
        "JPEG2000": "jp2",
    }
    kinds |= {"AVIF": "avif", "JPEG": "jpg"}
    assert set(kinds) == {*FALLBACK_FORMATS, "JPEG"}
    assert set(kinds.values()) <= set(IMAGE_EXTENSIONS)
    colours = np.full((16, 24, 3), (200, 100, 50), np.uint8)
    for kind in kinds:
        data = saved(colours, kind)
        tolerance = 60 if kind == "GIF" else 8
        assert np.abs(decode_image(data).astype(int) - colours).max() < tolerance, kind
        assert prepare_image(data)[1] == (None if kind == "JPEG" else f"{kind} re-encoded as JPEG")


def test_a_kind_that_is_not_read_is_no_image():
    for data in (
        saved(np.zeros((8, 8), np.uint8), "EPS"),
        saved(np.zeros((8, 8, 3), np.uint8), "ICO"),
        b"RIFF",
    ):
        with pytest.raises(CorruptSample, match=re.escape("not an image")):
            prepare_image(data)
