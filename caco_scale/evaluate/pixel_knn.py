"""kNN of raw pixels, the figure that an encoder must beat, without all images as numbers in memory.

The counts are those of ``measure_knn(pixels, ...)`` to the last one, for similarities are exact in whatever blocks they
are computed. Each rank keeps the crops of its own validation images, a byte a value, and goes through the training
images a batch at a time.

Shapes: N training and M validation images of all ranks, F = C x s x s values of an image, b a batch.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from caco_scale.data.labels import with_classes_of
from caco_scale.data.loader import evaluation_batches
from caco_scale.data.pipeline import Undecodable
from caco_scale.data.store.base import Store
from caco_scale.distributed import collectives
from caco_scale.evaluate.features import feature_batches, pixels
from caco_scale.evaluate.knn import Candidates, Measured, best_of, check_sizes, on_grid, tally
from caco_scale.run.progress import now_and_then

# Products of two fp64 numbers, for each process: some minutes of two cores, some seconds of a GPU (estimated).
MOST_PRODUCTS = {"cpu": 4 * 10**12, "cuda": 4 * 10**14}
BATCH = 256


def too_large(
    train: Store, val: Store, size: int, device: torch.device | str, world_size: int = 1
) -> str | None:
    """A line where these sets are too large for it, else None. ``size``: of the crops, in pixels."""
    n, m, values = train.manifest.num_samples, val.manifest.num_samples, train.pixels.channels * size * size
    products, most = n * m * values / world_size, MOST_PRODUCTS.get(torch.device(device).type, 10**12)
    if products <= most:
        return None
    return (
        f"kNN of raw pixels left out: {n:,} x {m:,} images of {values:,} values are {products:.1e} products for each "
        f"process, more than {most:.0e}"
    )


@torch.no_grad()
def measure_pixels(
    train: Store,
    val: Store,
    *,
    size: int,
    resize: int = 0,
    k: Sequence[int],
    temperature: Sequence[float],
    device: torch.device | str = "cpu",
    rank: int = 0,
    world_size: int = 1,
    workers: int = 0,
    batch_size: int = BATCH,
    say: Callable[[str], object] = print,
    **how: Any,
) -> Measured:
    """kNN of the images themselves: training against validation set, the same on every rank. Collective.

    Memory: M / ranks crops of bytes, and two batches of b x F fp64 numbers. What crosses ranks: counts.

    Args:
        say: given a line now and then, how far it is.
        how: ``mean``, ``std``, ``dtype``, ``channels_last`` of :func:`feature_batches`.
    Raises:
        UserError: as :func:`~caco_scale.evaluate.knn.measure_knn`.
    """
    val, device, ks, most = with_classes_of(train, val, "kNN"), torch.device(device), list(k), max(k)
    lost: dict[str, list[Undecodable]] = {"train": [], "val": []}

    def batches(store, which, rank, world_size):
        return evaluation_batches(
            store,
            size,
            rank=rank,
            world_size=world_size,
            batch_size=batch_size,
            workers=workers,
            resize=resize,
            undecodable=lost[which],
        )

    kept = [batch for batch in batches(val, "val", rank, world_size) if len(batch[0])]
    found = [Candidates.none(len(ids), most, device) for ids, *_ in kept]
    advance = now_and_then(say, _line(train.manifest.num_samples))
    num_classes, seen, unlabelled = len(val.manifest.classes), 0, 0
    stream = feature_batches(pixels, batches(train, "train", 0, 1), device=device, **how)
    for features, labels, ids in stream:
        block, labels, ids = on_grid(features.to(device)).T, labels.to(device), ids.to(device)
        for number, batch in enumerate(kept):
            best = best_of(_queries(batch, device, how), block, labels, ids, most)
            found[number] = found[number].merged(best, most)
        seen, unlabelled = seen + len(ids), unlabelled + _without_class(labels, num_classes)
        advance(len(ids))
    missed = torch.tensor([image.label for image in lost["val"]], dtype=torch.int64)
    truth = torch.cat([*(labels for *_, labels in kept), missed])
    sizes = {
        "train": 0 if rank else seen,  # every rank has seen all of them
        "val": len(truth) - len(missed),
        "train_width": train.pixels.channels * size * size,
        "val_width": val.pixels.channels * size * size,
        "unlabelled": (0 if rank else unlabelled) + _without_class(truth, num_classes),
        "missed": len(missed),
        "not_finite": 0,
    }
    check_sizes(collectives.gather_objects(sizes), ks, list(temperature))
    pairs = [(best, labels.to(device)) for best, (*_, labels) in zip(found, kept, strict=True)]
    counts = tally(pairs, truth, ks, temperature, num_classes, device)
    parts = collectives.gather_objects(lost)
    everywhere = {which: sorted({image for part in parts for image in part[which]}) for which in lost}
    return Measured({"features": counts}, everywhere)


def _queries(batch: tuple, device: torch.device, how: dict[str, Any]) -> Tensor:
    """Kept crops as unit rows on the grid (b, F)."""
    ((features, _, _),) = feature_batches(pixels, [batch], device=device, **how)
    return on_grid(features.to(device))


def _without_class(labels, num_classes):
    return int(((labels < 0) | (labels >= num_classes)).sum())


def _line(total):
    def line(done, seconds):
        return f"kNN of raw pixels: {done:,} of {total:,} training images, {done / seconds:,.0f} images/s"

    return line
