"""Pictures inside an HTML page."""

import base64
import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image

THUMBNAIL = 96  # pixels on a side of a picture in a page


def data_uri(pixels: NDArray[np.uint8]) -> str:
    """Pixels (s, s, 3) uint8 as a data URI: small images as they are, others as a JPEG of THUMBNAIL pixels."""
    image, file = Image.fromarray(pixels), io.BytesIO()
    if max(image.size) <= 64:
        image.save(file, "PNG", optimize=True)
        kind = "png"
    else:
        image.resize((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS).save(file, "JPEG", quality=85)
        kind = "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"
