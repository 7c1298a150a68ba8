"""Which part of a parameter this rank holds, whatever engine cut it up, and how to work on that part in place.

Three layouts of a parameter:

    whole       the same on every rank (one process, DDP, ZeRO-1/2)
    DTensor     rows of it: FSDP2's ``Shard(0)`` on a mesh of one dimension
    ZeRO-3      a range of its flat view, padded at the end so that all ranks hold as many elements (``ds_tensor``)

Besides, an optimizer under ZeRO steps flat tensors that join the pieces of many parameters: :class:`FlatPartition`
says what lies where.

Shapes: L parameters in a flat tensor; n elements of a piece.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from caco_scale.distributed.collectives import all_gather_rows, rank, shard_range
from caco_scale.errors import UserError

# A tensor, a DTensor, or a parameter to which DeepSpeed has given attributes of its own (``ds_tensor`` and others).
EngineTensor = Any


@dataclass(frozen=True)
class Piece:
    """``flat[start : start + numel]`` is ``parameter.view(-1)[offset : offset + numel]`` of parameter ``slot``."""

    slot: int
    start: int
    numel: int
    offset: int


@dataclass(frozen=True)
class FlatPartition:
    """A flat tensor of this rank that an optimizer steps, and what it is made of; what no piece covers is padding.

    ``parameters``: the L whole parameters of which the ranks of ``group`` hold parts between them, the same list
    on every rank. ``pieces``: this rank's, none for a rank that holds padding only. ``param_group``: the place, in the
    optimizer's ``param_groups``, of the group that it belongs to.
    """

    flat: torch.Tensor
    parameters: list[torch.Tensor]
    pieces: list[Piece]
    group: dist.ProcessGroup
    param_group: int

    def views(self, flat: torch.Tensor) -> list[torch.Tensor]:
        """The pieces of a tensor that lies like ``self.flat``: (n,) each, in the order of ``pieces``."""
        return [flat.narrow(0, piece.start, piece.numel) for piece in self.pieces]


def is_zero3(parameter: EngineTensor) -> bool:
    """Whether DeepSpeed ZeRO-3 has partitioned this parameter."""
    return hasattr(parameter, "ds_tensor")


def local_part(tensor: EngineTensor) -> torch.Tensor:
    """The part of ``tensor`` that this rank holds, to read or to change in place; all of it where it is whole."""
    if isinstance(tensor, DTensor):
        return tensor.detach().to_local()
    if is_zero3(tensor):
        return flat_part(tensor)[0]
    return tensor


def flat_part(tensor: EngineTensor) -> tuple[torch.Tensor, int]:
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


def whole_shape(tensor: EngineTensor) -> tuple[int, ...]:
    """The shape of the whole, of which this rank may hold a part."""
    return tuple(tensor.ds_shape if is_zero3(tensor) else tensor.shape)


def shard_group(tensor: DTensor) -> dist.ProcessGroup:
    """The ranks that hold the parts of a DTensor, as FSDP2 cuts it.

    Raises:
        UserError: it is cut otherwise.
    """
    if tensor.device_mesh.ndim != 1 or not tensor.placements[0].is_shard(0):
        raise UserError(
            f"a parameter lies as {tensor.placements} on a mesh of {tensor.device_mesh.ndim} dimension(s): use "
            "FSDP2 on a mesh of one dimension, which shards rows"
        )
    return tensor.device_mesh.get_group()


@torch.no_grad()
def gather_whole(tensor: EngineTensor, device: torch.device) -> torch.Tensor:
    """The whole of a parameter on every rank's ``device``, a copy of its own unless it is whole already. Collective."""
    if isinstance(tensor, DTensor):
        return tensor.full_tensor()
    if is_zero3(tensor):
        rows = all_gather_rows(tensor.ds_tensor.data.to(device), tensor.ds_process_group)
        return rows[: tensor.ds_numel].view(tensor.ds_shape)
    return tensor.detach()


def refresh_gathered(parameters: Iterable[EngineTensor]) -> None:
    """Gather anew the parameters that ZeRO-3 keeps whole besides their partition, which was changed. Collective.

    It calls small parameters persistent and never gathers them again by itself: they would go stale unseen.
    """
    live = [p for p in parameters if is_zero3(p) and p.ds_status.name == "AVAILABLE"]
    for p in live:
        p.ds_status = type(p.ds_status).NOT_AVAILABLE
    if live:
        live[0].all_gather(live)


def flat_partitions(zero: Any) -> list[FlatPartition]:
    """The flat tensors that a ZeRO optimizer steps, and what they are made of.

    ``zero``: the engine's ``optimizer``. Not by DeepSpeed's own ``_hp_mapping``, which is wrong under
    ``round_robin_gradients`` (0.19.8).

    Raises:
        UserError: an optimizer of DeepSpeed that is not ZeRO's.
    """
    if hasattr(zero, "fp32_partitioned_groups_flat"):
        return [_flat_of_stage_3(zero, i) for i in range(len(zero.fp16_groups))]
    if not hasattr(zero, "round_robin_bit16_groups"):
        raise UserError(
            f"what DeepSpeed's {type(zero).__name__} makes of parameters is not known here: use ZeRO stage 1, 2 or 3"
        )
    return [_flat_of_stages_1_and_2(zero, i) for i in range(len(zero.bit16_groups))]


def _flat_of_stages_1_and_2(zero, i):
    """Stages 1 and 2 join a group's parameters and cut the whole into equal parts, padded at the end."""
    flat, group = zero.single_partition_of_fp32_groups[i], zero.real_dp_process_group[i]
    first = dist.get_rank(group) * flat.numel()
    parameters, pieces = list(zero.round_robin_bit16_groups[i]), []
    for slot, (p, offset) in enumerate(zip(parameters, zero.round_robin_bit16_offsets[i], strict=True)):
        start, stop = max(offset, first), min(offset + p.numel(), first + flat.numel())
        if start < stop:
            pieces.append(Piece(slot, start - first, stop - start, start - offset))
    return FlatPartition(flat, parameters, pieces, group, i)


def _flat_of_stage_3(zero, i):
    """Stage 3 cuts each parameter into equal parts, padded at the end, and joins a subgroup's parts of a rank."""
    flat, parameters, pieces = zero.fp32_partitioned_groups_flat[i], list(zero.fp16_groups[i]), []
    for slot, p in enumerate(parameters):
        _, start, length = zero.grad_position[zero.get_param_id(p)]
        part, offset = flat_part(p)
        assert length == p.ds_tensor.ds_numel, (length, p.ds_tensor.ds_numel)
        if part.numel():
            pieces.append(Piece(slot, start, part.numel(), offset))
    return FlatPartition(flat, parameters, pieces, zero.dp_process_group, zero.sub_group_to_group_id[i])
