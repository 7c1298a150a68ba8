"""Pictures inside an HTML page."""

import base64
import io

from numpy.typing import NDArray
from PIL import Image

from caco_scale.data.pixels import as_picture

THUMBNAIL = 96  # pixels on a side of a picture in a page


def data_uri(pixels: NDArray) -> str:
    """Pixels (s, s, C) as a data URI: small images as they are, others as a JPEG of THUMBNAIL pixels.

    Other than 8-bit RGB as :func:`~caco_scale.data.pixels.as_picture` shows them.
    """
    image, file = Image.fromarray(as_picture(pixels)), io.BytesIO()
    if max(image.size) <= 64:
        image.save(file, "PNG", optimize=True)
        kind = "png"
    else:
        image.resize((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS).save(file, "JPEG", quality=85)
        kind = "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"
