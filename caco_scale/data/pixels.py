"""Which pixels a set of images has: channels, and bits of each. Plain values, for manifests, flags and messages."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

MOST_CHANNELS = 512
BITS = (8, 16)


class CorruptSample(ValueError):
    """An image that cannot be decoded, or not without guessing. The message is one line."""


class Pixels(NamedTuple):
    """Channels of an image and bits of each (8 or 16), as ``data.channels`` and ``data.bits`` have them."""

    channels: int = 3
    bits: int = 8

    @property
    def dtype(self) -> np.dtype:
        """Of a decoded image (H, W, C)."""
        return np.dtype(np.uint8 if self.bits == 8 else np.uint16)

    @property
    def num_bytes(self) -> int:
        """Of one pixel, all channels."""
        return self.channels * self.bits // 8

    @property
    def flags(self) -> str:
        """The flags of a run that trains on such images."""
        return f"--data.channels {self.channels} --data.bits {self.bits}"

    def __str__(self) -> str:
        return f"{self.channels} channel{'s' * (self.channels != 1)} of {self.bits} bits"


RGB8 = Pixels()


def as_picture(pixels: NDArray) -> NDArray[np.uint8]:
    """Pixels (H, W, C) to look at, (H, W, 3) uint8: three channels of 8 bits as they are.

    Others are stretched from the darkest to the brightest value of the image, of more than three channels the first
    three; one or two are shown as grey by the first.
    """
    if pixels.shape[2] == 3 and pixels.dtype == np.uint8:
        return pixels
    shown = pixels[:, :, : 3 if pixels.shape[2] >= 3 else 1].astype(np.float64)
    if pixels.dtype != np.uint8 or pixels.shape[2] > 3:
        low, high = shown.min(axis=(0, 1)), shown.max(axis=(0, 1))
        shown = (shown - low) * (255 / np.maximum(high - low, 1))
    return np.broadcast_to(shown.round().astype(np.uint8), (*pixels.shape[:2], 3)).copy()


def picture_note(pixels: Pixels) -> str:
    """What :func:`as_picture` shows of such images, in words; empty where it shows them as they are."""
    if pixels == RGB8 or pixels == Pixels(1, 8):
        return ""
    if pixels.channels in (1, 3):
        return f"Pictures show {pixels} stretched to the range of each image."
    which = "the first three" if pixels.channels > 3 else "the first"
    return f"Pictures show {which} of {pixels}, stretched to the range of each image."
