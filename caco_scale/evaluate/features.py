"""Features of a shard set, computed by every rank for its own share, leaving no trace on the training state.

Shapes: n images of this rank, F features, s pixels on a side.
"""

import contextlib
import random

import numpy as np
import torch
from torch.nn import functional as F

from caco_scale.data.augment import normalise


@contextlib.contextmanager
def evaluation_mode(module):
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
def kept_random_state(device):
    """Python's, numpy's and torch's random states are afterwards as before."""
    python_state, numpy_state = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        try:
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)


@torch.no_grad()
def extract_features(
    encode,
    batches,
    *,
    mean,
    std,
    device,
    module=None,
    autocast_dtype=None,
    dtype=torch.float32,
    channels_last=False,
):
    """Unit-norm features of all images: (features (n, F) fp32, labels (n,), sample ids (n,)), on the CPU.

    Args:
        encode: normalised images (b, 3, s, s) -> (b, F).
        batches: of ``evaluation_batches``: (ids (b,), crops (b, s, s, 3) uint8, labels (b,)).
        module: the module that ``encode`` runs, put in eval mode meanwhile (BatchNorm uses its running
            statistics and leaves them alone); modes, buffers and random states are afterwards as before.
        autocast_dtype: as in training; None: compute in ``dtype``, the type of the images.
        channels_last: the memory format of the images, as in training.

    Nothing crosses ranks, unless ``encode`` itself communicates. A rank without images gets a (0, 0) tensor.
    """
    device = torch.device(device)
    features, labels, ids = [], [], []
    with evaluation_mode(module), kept_random_state(device):
        for batch_ids, crops, batch_labels in batches:
            if len(batch_ids) == 0:
                continue  # none of its images decoded
            crops = torch.as_tensor(crops).to(device, non_blocking=True)
            images = normalise(crops, mean, std, dtype, channels_last)
            with torch.autocast(device.type, dtype=autocast_dtype, enabled=autocast_dtype is not None):
                encoded = encode(images)
            features.append(F.normalize(encoded.float(), dim=1).cpu())
            labels.append(torch.as_tensor(batch_labels))
            ids.append(torch.as_tensor(batch_ids))
    if not features:
        return torch.empty(0, 0), torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.int64)
    return torch.cat(features), torch.cat(labels), torch.cat(ids)


def pixels(images):
    """The images themselves as features (b, 3·s·s): the figure that an encoder must beat."""
    return images.flatten(1)
