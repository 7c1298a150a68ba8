"""Batches on their way to the training device: the copies of the next one run while the step before it computes."""

import contextlib
import dataclasses
import itertools
from collections.abc import Generator

import torch

from caco_scale.data.loader import Batch


def on_device(batches: Generator[Batch, None, None], device: torch.device) -> Generator[Batch, None, None]:
    """The :class:`~caco_scale.data.loader.Batch` es of a generator with crops and parameters on ``device``.

    On a CPU as they come. On a GPU one batch ahead, so that two batches of uint8 crops are there at a time. Closing
    it closes the generator.
    """
    with contextlib.closing(batches):
        yield from batches if device.type == "cpu" else _copied_ahead(batches, device)


def _copied_ahead(batches, device):
    """Copy the next batch on a stream of its own before the step of this one is queued.

    The memory belongs to the stream that computes: the copies wait until it is done with what was there before (the
    step that has just been queued), and it waits for the copies, once a step later. No wait of the host.
    """
    streams = torch.get_device_module(device)
    copying = streams.Stream()
    following: Batch | None = None
    for batch in itertools.chain(batches, [None]):
        computing = streams.current_stream()
        computing.wait_stream(copying)
        current = following
        following = batch and _copied(batch, device, computing, copying, streams.stream)
        if current is not None:
            yield current


def _copied(batch, device, computing, copying, stream) -> Batch:
    there = dataclasses.replace(
        batch,
        crops=[torch.empty_like(crops, device=device) for crops in batch.crops],
        params=[{name: torch.empty_like(x, device=device) for name, x in p.items()} for p in batch.params],
    )
    copying.wait_stream(computing)
    with stream(copying):
        for target, source in zip(_tensors(there), _tensors(batch), strict=True):
            target.copy_(source, non_blocking=True)
    return there


def _tensors(batch):
    return [*batch.crops, *(values for params in batch.params for values in params.values())]
