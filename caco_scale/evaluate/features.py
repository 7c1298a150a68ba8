"""Features of a shard set, computed by every rank for its own share, leaving no trace on the training state.

Shapes: n images of this rank, F features, s pixels on a side.
"""

import contextlib
import random
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from caco_scale.data.augment import normalise


@contextlib.contextmanager
def evaluation_mode(module: nn.Module | None) -> Generator[None, None, None]:
    """``module`` (None: nothing) in eval mode; afterwards every submodule in the mode it was in."""
    modes = [(part, part.training) for part in (module.modules() if module is not None else ())]
    try:
        if module is not None:
            module.eval()
        yield
    finally:
        for part, training in modes:
            part.training = training


@contextlib.contextmanager
def kept_random_state(device: torch.device) -> Generator[None, None, None]:
    """Python's, numpy's and torch's random states are afterwards as before."""
    python_state, numpy_state = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        try:
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)


def extract_features(
    encode: Callable, batches: Iterable, *, names: Sequence[str] | None = None, **how: Any
) -> tuple[Any, Tensor, Tensor]:
    """Features of all images: (features (n, F) fp32, labels (n,), sample ids (n,)), on the CPU.

    Args:
        encode: normalised images (b, 3, s, s) -> (b, F); with several ``names`` a tuple of such, one per name.
        batches: of ``evaluation_batches``: (ids (b,), crops (b, s, s, 3) uint8, labels (b,)).
        names: of several kinds of features; the first result is then a dict of them.
        how: the other settings of :func:`feature_batches`.

    Nothing crosses ranks, unless ``encode`` itself communicates. A rank without images gets (0, 0) tensors.
    """
    parts, labels, ids = {name: [] for name in names or ("features",)}, [], []
    for encoded, batch_labels, batch_ids in feature_batches(encode, batches, **how):
        for part, values in zip(
            parts.values(), encoded if isinstance(encoded, tuple) else (encoded,), strict=True
        ):
            part.append(values)
        labels.append(batch_labels)
        ids.append(batch_ids)
    features = {name: torch.cat(part) if part else torch.empty(0, 0) for name, part in parts.items()}
    labels = torch.cat(labels) if labels else torch.empty(0, dtype=torch.int64)
    ids = torch.cat(ids) if ids else torch.empty(0, dtype=torch.int64)
    return features if names else features["features"], labels, ids


@torch.no_grad()
def feature_batches(
    encode: Callable,
    batches: Iterable,
    *,
    mean: Sequence[float],
    std: Sequence[float],
    device: torch.device | str,
    module: nn.Module | None = None,
    autocast_dtype: torch.dtype | None = None,
    dtype: torch.dtype = torch.float32,
    channels_last: bool = False,
    unit_norm: bool = True,
) -> Iterator[tuple[Any, Tensor, Tensor]]:
    """Yield features fp32, labels and sample ids batch by batch, on the CPU; batches without an image are passed over.

    Args:
        encode, batches: as in :func:`extract_features`.
        module: the module that ``encode`` runs, put in eval mode meanwhile (BatchNorm uses its running
            statistics and leaves them alone); modes, buffers and random states are afterwards as before.
        autocast_dtype: as in training; None: compute in ``dtype``, the type of the images.
        channels_last: of :mod:`~caco_scale.data.augment`, as in training.
        unit_norm: divide every row by its norm.
    """
    device = torch.device(device)

    def finish(features):
        return (F.normalize(features.float(), dim=1) if unit_norm else features.float()).cpu()

    with evaluation_mode(module), kept_random_state(device):
        for ids, crops, labels in batches:
            if len(ids) == 0:
                continue  # none of its images decoded
            crops = torch.as_tensor(crops).to(device, non_blocking=True)
            images = normalise(crops, mean, std, dtype, channels_last)
            with torch.autocast(device.type, dtype=autocast_dtype, enabled=autocast_dtype is not None):
                encoded = encode(images)
            encoded = tuple(map(finish, encoded)) if isinstance(encoded, tuple) else finish(encoded)
            yield encoded, torch.as_tensor(labels), torch.as_tensor(ids)


def pixels(images: Tensor) -> Tensor:
    """The images themselves as features (b, 3·s·s): the figure that an encoder must beat."""
    return images.flatten(1)
