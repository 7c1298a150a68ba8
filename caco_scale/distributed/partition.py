"""Which part of a parameter this rank holds, whatever engine cut it up, and how to work on that part in place.

Three layouts of a parameter:

    whole       the same on every rank (one process, DDP, ZeRO-1/2)
    DTensor     rows of it: FSDP2's ``Shard(0)`` on a mesh of one dimension
    ZeRO-3      a range of its flat view, padded at the end so that all ranks hold as many elements (``ds_tensor``)

Besides, an optimizer under ZeRO steps flat tensors that join the pieces of many parameters: :class:`FlatPartition`
says what lies where.

Shapes: L parameters in a flat tensor; n elements of a piece.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from caco_scale.distributed.collectives import all_gather_rows, rank, shard_range


@dataclass(frozen=True)
class Piece:
    """``flat[start : start + numel]`` is ``parameter.view(-1)[offset : offset + numel]`` of parameter ``slot``."""

    slot: int
    start: int
    numel: int
    offset: int


@dataclass(frozen=True)
class FlatPartition:
    """What a flat tensor of this rank is made of; what no piece covers is padding.

    ``parameters``: the L whole parameters of which the ranks of ``group`` hold parts between them, the same list
    on every rank. ``pieces``: this rank's, none for a rank that holds padding only.
    """

    parameters: list
    pieces: list[Piece]
    group: object

    def views(self, flat):
        """The pieces of a tensor that lies like ``flat``: a list of (n,), in the order of ``pieces``."""
        return [flat.narrow(0, piece.start, piece.numel) for piece in self.pieces]


def is_zero3(parameter):
    """Whether DeepSpeed ZeRO-3 has partitioned this parameter."""
    return hasattr(parameter, "ds_tensor")


def local_part(tensor):
    """The part of ``tensor`` that this rank holds, to read or to change in place; all of it where it is whole."""
    if isinstance(tensor, DTensor):
        return tensor.detach().to_local()
    if is_zero3(tensor):
        return flat_part(tensor)[0]
    return tensor


def flat_part(tensor):
    """This rank's part as a flat view and its offset in the whole's flat view: ((n,), int)."""
    if isinstance(tensor, DTensor):
        group, ranks = shard_group(tensor), tensor.device_mesh.size()
        first_row, _ = shard_range(tensor.shape[0], ranks, rank(group))
        return tensor.detach().to_local().view(-1), first_row * (tensor.numel() // tensor.shape[0])
    if is_zero3(tensor):
        length = tensor.ds_tensor.ds_numel
        start = min(dist.get_rank(tensor.ds_process_group) * length, tensor.ds_numel)
        # The padding after the end is uninitialised memory: it is never read.
        return tensor.ds_tensor.data[: min(length, tensor.ds_numel - start)], start
    return tensor.detach().view(-1), 0


def whole_shape(tensor):
    """The shape of the whole, of which this rank may hold a part."""
    return tuple(tensor.ds_shape if is_zero3(tensor) else tensor.shape)


def shard_group(tensor):
    """The ranks that hold the parts of a DTensor, as FSDP2 cuts it."""
    assert tensor.device_mesh.ndim == 1, tensor.device_mesh
    assert tensor.placements[0].is_shard(0), tensor.placements
    return tensor.device_mesh.get_group()


@torch.no_grad()
def gather_whole(tensor, device):
    """The whole of a parameter on every rank's ``device``, a copy of its own unless it is whole already. Collective."""
    if isinstance(tensor, DTensor):
        return tensor.full_tensor()
    if is_zero3(tensor):
        rows = all_gather_rows(tensor.ds_tensor.data.to(device), tensor.ds_process_group)
        return rows[: tensor.ds_numel].view(tensor.ds_shape)
    return tensor.detach()


def refresh_gathered(parameters):
    """Gather anew the parameters that ZeRO-3 keeps whole besides their partition, which was changed. Collective.

    It calls small parameters persistent and never gathers them again by itself: they would go stale unseen.
    """
    live = [p for p in parameters if is_zero3(p) and p.ds_status.name == "AVAILABLE"]
    for p in live:
        p.ds_status = type(p.ds_status).NOT_AVAILABLE
    if live:
        live[0].all_gather(live)
