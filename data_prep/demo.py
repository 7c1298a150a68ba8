"""The demo's data: ten classes of procedural textures, nearly grey, 32 x 32, built like any other shard set.

The colours are nearly grey on purpose: with random colours an encoder learns colour and not texture. Every
image is a function of (split, number) alone, so that any worker can draw it.
"""

import math
import os

import numpy as np
from numpy.typing import NDArray
from PIL import Image as PilImage

from caco_scale.data.folders import File, Listing, image_folders
from caco_scale.data.order import key64
from caco_scale.data.shards import MANIFEST_NAME
from data_prep.build import build_set
from data_prep.images import encode_jpeg
from data_prep.jobs import Settings

SIZE = 32
SPLIT_SEEDS = {"train": 0, "val": 1}
MIN_CONTRAST = 45  # mean distance of the two colours, of 255


def _stripes(angle, rng):
    """A function of the coordinates: waves across ``angle``, slightly turned, of random length and phase."""
    frequency = 2 * math.pi * rng.uniform(0.08, 0.16)
    turn = rng.normal(0, 0.12)
    phases = rng.uniform(0, 2 * math.pi, 2)

    def wave(u, v, right_angle=0):
        direction = angle + turn + right_angle * math.pi / 2
        return np.sin(frequency * (u * math.cos(direction) + v * math.sin(direction)) + phases[right_angle])

    return wave


def _vertical(u, v, rng):
    return _stripes(0, rng)(u, v)


def _horizontal(u, v, rng):
    return _stripes(math.pi / 2, rng)(u, v)


def _diagonal(u, v, rng):
    return _stripes(math.pi / 4 if rng.random() < 0.5 else 3 * math.pi / 4, rng)(u, v)


def _checks(u, v, rng):
    wave = _stripes(0, rng)
    return np.sign(wave(u, v)) * np.sign(wave(u, v, 1))


def _dimples(u, v, rng):
    wave = _stripes(0, rng)
    return wave(u, v) + wave(u, v, 1)


def _rings(u, v, rng):
    frequency = 2 * math.pi * rng.uniform(0.08, 0.16)
    x, y = rng.uniform(-0.2 * SIZE, 1.2 * SIZE, 2)
    return np.sin(frequency * np.hypot(u - x, v - y) + rng.uniform(0, 2 * math.pi))


def _clouds(u, v, rng):
    coarse = rng.normal(0, 1, (SIZE // 8 + 1, SIZE // 8 + 1)).astype(np.float32)
    return np.asarray(PilImage.fromarray(coarse).resize((SIZE, SIZE), PilImage.Resampling.BICUBIC))


def _noise(u, v, rng):
    return rng.normal(0, 1, (SIZE, SIZE))


def _dots(u, v, rng):
    x, y = rng.uniform(0, SIZE, (2, 14, 1, 1))
    return np.exp(-((u - x) ** 2 + (v - y) ** 2) / (2 * (0.04 * SIZE) ** 2)).max(axis=0)


def _lattice(u, v, rng):
    frequency = rng.uniform(0.16, 0.32)
    phases = rng.uniform(0, 2 * math.pi, 2)
    angles = math.pi / 6, -math.pi / 6
    return sum(
        np.abs(((u * math.cos(a) + v * math.sin(a)) * frequency + p) % 2 - 1)
        for a, p in zip(angles, phases, strict=True)
    )


TEXTURES = {
    "checks": _checks,
    "clouds": _clouds,
    "diagonal": _diagonal,
    "dimples": _dimples,
    "dots": _dots,
    "horizontal": _horizontal,
    "lattice": _lattice,
    "noise": _noise,
    "rings": _rings,
    "vertical": _vertical,
}


def draw_texture(name: str, rng: np.random.Generator) -> NDArray[np.uint8]:
    """One image (32, 32, 3) uint8 of a texture: its field blends two nearly grey colours; some noise."""
    u, v = np.meshgrid(np.arange(SIZE, dtype=float), np.arange(SIZE, dtype=float))
    field = TEXTURES[name](u, v, rng)
    field = (field - field.mean()) / (field.std() + 1e-6)
    blend = 1 / (1 + np.exp(-2 * field))[..., None]
    while True:
        dark = rng.uniform(30, 110) + rng.normal(0, 12, 3)
        light = rng.uniform(150, 230) + rng.normal(0, 12, 3)
        if np.abs(dark - light).mean() > MIN_CONTRAST:
            break
    image = dark * (1 - blend) + light * blend + rng.normal(0, 10, (SIZE, SIZE, 3))
    return np.clip(image, 0, 255).astype(np.uint8)


class DemoSource:
    """A source that draws its files: ``num_images`` of one split, the classes equal to within one image."""

    def __init__(self, split: str, num_images: int):
        self.split, self.num_images = split, num_images

    def scan(self) -> Listing:
        names = sorted(TEXTURES)
        listing = Listing()
        for i in range(self.num_images):
            listing.add(File(f"{names[i % len(names)]}/{self.split}_{i:05d}.jpg", 0, offset=i))
        return listing

    def read(self, file: File) -> bytes:
        rng = np.random.default_rng(int(key64(SPLIT_SEEDS[self.split], file.offset)))
        return encode_jpeg(draw_texture(file.name.split("/")[0], rng))


def build_demo(
    dst: str | os.PathLike, num_train: int = 4096, num_val: int = 2000, workers: int | None = 1
) -> tuple[str, str]:
    """Build ``dst/train`` and ``dst/val``, unless they are there; returns the two directories.

    In this process by default: a few seconds, and nothing that could start a training program again. It may
    be called by several processes at once: one builds, the others wait. Raises UserError as ``build`` does.
    """
    dst = os.path.abspath(os.path.expanduser(os.fspath(dst)))
    train, val = os.path.join(dst, "train"), os.path.join(dst, "val")
    built = False
    for split, path, num_images in (("train", train, num_train), ("val", val, num_val)):
        if not built and not os.path.exists(os.path.join(path, MANIFEST_NAME)):
            built = True
            print(
                f"demo: drawing {num_train:,} training and {num_val:,} validation images into {dst}",
                flush=True,
            )
        source = DemoSource(split, num_images)
        folder = image_folders(source.scan(), "the demo")[None]
        build_set(source, folder, path, Settings(workers=workers), wait=True, quiet=True)
    return train, val
