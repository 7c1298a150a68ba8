"""Mean and standard deviation of the channels of a set of images, measured on a sample of them."""

import numpy as np

from caco_scale.data.loader import evaluation_batches
from caco_scale.data.pipeline import Undecodable
from caco_scale.data.store.base import Store
from caco_scale.errors import UserError

SAMPLE = 1000  # images; the mean of so many is known to some 0.005
DIGITS = 4
BATCH = 64


def channel_stats(
    store: Store, size: int, *, resize: int = 0, seed: int = 0, workers: int = 0
) -> tuple[tuple[float, ...], tuple[float, ...], int]:
    """Mean (C,) and standard deviation (C,) of each channel on a scale of 0 to 1, and of how many images they are.

    The sample is :data:`SAMPLE` images of the set, or all, drawn by ``seed``; they are cropped as for an evaluation,
    for what an encoder sees is resized, too. Rounded to :data:`DIGITS` digits. Nothing crosses ranks.

    Args:
        size, resize: of :func:`~caco_scale.data.views.centre_crop`, in pixels.
    Raises:
        UserError: no image of the sample decodes, or a channel is the same everywhere.
    """
    total = store.manifest.num_samples
    ids = np.sort(np.random.default_rng(seed).choice(total, min(SAMPLE, total), replace=False))
    lost: list[Undecodable] = []
    batches = evaluation_batches(
        store,
        size,
        rank=0,
        world_size=1,
        batch_size=BATCH,
        workers=workers,
        ids=ids,
        resize=resize,
        undecodable=lost,
    )
    images, pixels = 0, 0
    sums, squares = np.zeros(store.pixels.channels), np.zeros(store.pixels.channels)
    for _, crops, _ in batches:
        values = crops.numpy().reshape(-1, store.pixels.channels).astype(np.float64)
        values /= np.iinfo(store.pixels.dtype).max
        images, pixels = images + len(crops), pixels + len(values)
        sums, squares = sums + values.sum(0), squares + np.square(values).sum(0)
    if not images:
        raise UserError(
            f"views.stats measure: no image of {store.url} decodes; {lost[0].name}: {lost[0].error}"
        )
    mean = sums / pixels
    std = np.sqrt(np.maximum(squares / pixels - np.square(mean), 0)).round(DIGITS)
    if not std.all():
        raise UserError(
            f"views.stats measure: channel {int(np.argmin(std))} of {images:,} images of {store.url} is the same "
            "everywhere: give --views.mean and --views.std"
        )
    return tuple(mean.round(DIGITS).tolist()), tuple(std.tolist()), images
