"""Pictures for the examples, so that they need no download: waves whose direction is their class."""

from pathlib import Path

import numpy as np
from PIL import Image

CLASSES = 4


def draw_images(num_images: int, size: int = 32, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Images (n, size, size, 3) of uint8 and their classes (n,): wave fronts of four directions, any colours."""
    rng = np.random.default_rng(seed)
    labels = np.arange(num_images) % CLASSES
    angles = np.pi * labels / CLASSES + rng.normal(0, 0.1, num_images)
    rows, columns = np.mgrid[:size, :size]
    along = rows * np.sin(angles)[:, None, None] + columns * np.cos(angles)[:, None, None]
    lengths, phases = rng.uniform(4, 8, (num_images, 1, 1)), rng.uniform(0, 2 * np.pi, (num_images, 1, 1))
    waves = 0.5 + 0.5 * np.sin(2 * np.pi * along / lengths + phases)
    dark, light = rng.uniform(0, 100, (num_images, 1, 1, 3)), rng.uniform(120, 255, (num_images, 1, 1, 3))
    images = dark + (light - dark) * waves[..., None] + rng.normal(0, 10, (*waves.shape, 3))
    return images.clip(0, 255).astype(np.uint8), labels


def draw_folder(folder: Path, num_images: int, size: int = 32, seed: int = 0) -> Path:
    """The same as JPEG files in ``folder/<class>/``; returns the folder."""
    for number, (pixels, label) in enumerate(zip(*draw_images(num_images, size, seed), strict=True)):
        path = folder / f"direction{label}" / f"{number:05d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path, quality=90)
    return folder
