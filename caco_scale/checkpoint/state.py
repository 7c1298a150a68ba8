"""What a checkpoint holds, and how each tensor lies in it: named tensors, whole or in blocks, and plain values."""

import hashlib
import math
from dataclasses import dataclass, field

import torch


@dataclass(frozen=True)
class Block:
    """A contiguous part of a global tensor: ``local`` lies at ``offset`` in an array of ``global_shape``.

    ``local`` has as many dimensions as ``global_shape`` and may be empty (a rank without a part still names
    the tensor). ``shape`` is the tensor's own shape where the global array is its flat view: a parameter of
    shape (F, D) owned from element 10 on is ``Block(flat, (10,), (F * D,), (F, D))``.
    """

    local: torch.Tensor
    offset: tuple[int, ...]
    global_shape: tuple[int, ...]
    shape: tuple[int, ...] | None = None


@dataclass
class State:
    """What a checkpoint holds: tensors by stable name, and values that JSON can say (the same on every rank).

    A plain tensor is the same on every rank; parts are a :class:`Block` or a list of disjoint ones. Every
    rank names every tensor.
    """

    tensors: dict[str, torch.Tensor | Block | list[Block]]
    values: dict = field(default_factory=dict)


@dataclass(frozen=True)
class Stored:
    """One tensor as stored: the global array's ``size``, the tensor's own ``shape``, pieces by offset."""

    size: tuple[int, ...]
    shape: tuple[int, ...]
    dtype: torch.dtype
    replicated: bool
    pieces: dict[tuple[int, ...], torch.Tensor]


def as_stored(name: str, value: torch.Tensor | Block | list[Block]) -> Stored:
    """A tensor of a :class:`State` as it lies in the file; a whole one as its flat view."""
    if isinstance(value, torch.Tensor):
        value = value.detach()
        return Stored((value.numel(),), tuple(value.shape), value.dtype, True, {(0,): value})
    blocks = [value] if isinstance(value, Block) else value
    first = blocks[0]
    size = tuple(first.global_shape)
    shape = size if first.shape is None else tuple(first.shape)
    assert math.prod(shape) == math.prod(size), f"{name}: shape {shape} is not a view of {size}"
    for block in blocks:
        assert (tuple(block.global_shape), block.shape, block.local.dtype) == (
            first.global_shape,
            first.shape,
            first.local.dtype,
        ), f"{name}: its blocks disagree"
        assert block.local.ndim == len(block.offset) == len(size), f"{name}: {block.local.shape} in {size}"
    pieces = {tuple(block.offset): block.local.detach() for block in blocks if block.local.numel()}
    return Stored(size, shape, first.local.dtype, False, pieces)


def owners(stored: dict[str, Stored], world_size: int) -> dict[str, int]:
    """Who writes each replicated tensor, so that every rank writes about as many bytes: {name: rank}.

    Decided from names and sizes alone: every rank comes to the same answer without asking, and copies only
    its share.
    """
    sizes = {name: math.prod(s.size) * s.dtype.itemsize for name, s in stored.items() if s.replicated}
    load, found = [0] * world_size, {}
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        found[name] = load.index(min(load))
        load[found[name]] += sizes[name]
    return found


def signature(stored: dict[str, Stored]) -> str:
    """A hash of what the ranks must agree on: names, shapes, types."""
    lines = [f"{name} {s.size} {s.shape} {s.dtype} {s.replicated}" for name, s in sorted(stored.items())]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()
