"""Features of a whole set on disk, in blocks that a killed extraction leaves behind and the next start skips.

A block is a run of sample numbers; which ones depends on the set alone, so that any number of processes goes on where
another stopped. Ranks take consecutive blocks.
"""

import json
import shutil
from typing import NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from caco_scale.atomic import write_atomically
from caco_scale.data.loader import evaluation_batches
from caco_scale.data.pipeline import Undecodable
from caco_scale.data.store.base import Store
from caco_scale.data.store.subset import Subset
from caco_scale.errors import UserError
from caco_scale.evaluate.features import feature_batches
from caco_scale.evaluate.results import ResultFolder
from caco_scale.evaluate.task import Task

BLOCK_IMAGES = (16, 512)  # least and most of a block; about a sixteenth of the set between them
FOLDER = "features"


def block_ranges(num_samples: int) -> list[range]:
    """The blocks of a set: list of ranges of sample numbers."""
    size = min(max(num_samples // 16, BLOCK_IMAGES[0]), BLOCK_IMAGES[1])
    return [range(start, min(start + size, num_samples)) for start in range(0, num_samples, size)]


class Features(NamedTuple):
    """This rank's part of a set: features (n, F), labels (n,), sample numbers (n,), and what does not decode."""

    features: Tensor
    labels: Tensor
    ids: Tensor
    undecodable: list[Undecodable]


def features_of(task: Task, store: Store, folder: ResultFolder, name: str) -> Features:
    """This rank's :class:`Features` of ``store``, of centre crops.

    Args:
        folder: keeps the blocks, under ``name``.
    """
    blocks, ranks = block_ranges(store.manifest.num_samples), task.world_size
    mine = blocks[len(blocks) * task.rank // ranks : len(blocks) * (task.rank + 1) // ranks]
    place = folder.path / FOLDER / name
    try:
        place.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write {place}: {error.strerror}; name another place with --to") from None
    missing = [block for block in mine if not _file(place, block).exists()]
    if missing:
        _extract(task, store, place, missing)
    parts = [_load(_file(place, block)) for block in mine]
    if not parts:
        none = torch.empty(0, dtype=torch.int64)
        return Features(torch.empty(0, task.weights.num_features), none, none, [])
    features, labels, ids = (
        torch.cat([part[key] for part in parts]) for key in ("features", "labels", "ids")
    )
    missing_ones = (json.loads(part["undecodable"].numpy().tobytes()) for part in parts)
    return Features(
        features, labels, ids, [Undecodable(*image) for images in missing_ones for image in images]
    )


def remove_features(folder: ResultFolder) -> None:
    """The blocks have served: they can be many gigabytes."""
    if folder.is_main:
        shutil.rmtree(folder.path / FOLDER, ignore_errors=True)


def _file(place, block):
    return place / f"{block.start:09d}.safetensors"


def _extract(task, store, place, blocks):
    numbers = np.concatenate([np.arange(block.start, block.stop) for block in blocks])
    undecodable: list[Undecodable] = []
    batches = evaluation_batches(
        Subset(store, numbers),
        task.size,
        rank=0,
        world_size=1,
        batch_size=task.images_at_once,
        workers=task.workers,
        resize=task.resize,
        undecodable=undecodable,
    )
    rows, waiting = [], list(blocks)
    stream = feature_batches(task.weights.backbone, batches, unit_norm=False, **task.extraction())
    for features, labels, places in stream:
        ids = torch.from_numpy(numbers)[places]
        rows.append((features, labels, ids))
        while waiting and ids[-1] >= waiting[0].stop:
            rows = _write(place, waiting.pop(0), rows, numbers, undecodable)
    for block in waiting:
        rows = _write(place, block, rows, numbers, undecodable)


def _write(place, block, rows, numbers, undecodable):
    """Write one block out of the first of ``rows`` -> the rows that belong to later ones.

    ``undecodable``: so far, by their places among ``numbers``.
    """
    width = rows[0][0].shape[1] if rows else 0
    empty = torch.empty(0, width), *(torch.empty(0, dtype=torch.int64) for _ in range(2))
    features, labels, ids = (torch.cat(part) for part in zip(empty, *rows, strict=True))
    here = int((ids < block.stop).sum())
    content = {"features": features[:here], "labels": labels[:here], "ids": ids[:here]}
    lost = [image._replace(index=int(numbers[image.index])) for image in undecodable]
    text = json.dumps([image for image in lost if image.index in block]).encode()
    content["undecodable"] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    try:
        write_atomically(_file(place, block), save({k: v.contiguous() for k, v in content.items()}))
    except OSError as error:
        raise UserError(f"cannot write {place}: {error.strerror}; free that place and start again") from None
    return [(features[here:], labels[here:], ids[here:])]


def _load(path):
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} cannot be read ({error}): remove it and start again") from None
