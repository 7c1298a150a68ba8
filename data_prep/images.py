"""What happens to the bytes of one image: kept, made an RGB JPEG, or refused; judged by their content."""

import io

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image

from caco_scale.data.views import FALLBACK_FORMATS, CorruptSample, decode_image, without_padding

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
    pixels = decode_image(data)
    height, width = pixels.shape[:2]
    if short_side and min(height, width) > short_side:
        scale = short_side / min(height, width)
        size = max(short_side, round(width * scale)), max(short_side, round(height * scale))
        small = Image.fromarray(pixels).resize(size, Image.Resampling.LANCZOS)
        return encode_jpeg(np.asarray(small)), f"{width} x {height} made {size[0]} x {size[1]}"
    if not data.startswith(JPEG_MAGIC):
        with Image.open(io.BytesIO(data), formats=FALLBACK_FORMATS) as image:
            return encode_jpeg(pixels), f"{image.format} re-encoded as JPEG"
    if simplejpeg.decode_jpeg_header(without_padding(data))[2] in ("CMYK", "YCCK"):
        return encode_jpeg(pixels), "CMYK JPEG re-encoded as RGB"
    return data, None


def encode_jpeg(pixels: NDArray[np.uint8]) -> bytes:
    """Pixels (H, W, 3) uint8 as an RGB JPEG of quality 95, 4:4:4."""
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "JPEG", quality=JPEG_QUALITY, subsampling=0)
    return out.getvalue()
