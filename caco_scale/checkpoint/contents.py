"""The state of a training run: the one file of this room that knows a model, an optimizer and a bank.

Saving and loading are two readings of the same list: :func:`training_state` names every tensor of a run, and
:func:`restore` loads a checkpoint into the very tensors it names.
"""

import math
from pathlib import Path

import torch
from torch.distributed.tensor import DTensor

from caco_scale.checkpoint.folder import VALUES, damaged
from caco_scale.checkpoint.read import load
from caco_scale.checkpoint.state import Block, State
from caco_scale.distributed.partition import flat_part, is_zero3, whole_shape
from caco_scale.optim.build import named_state


def training_state(strategy, bank, values: dict) -> State:
    """The whole state of a run, of each tensor what this rank holds, whole or in part.

    Args:
        strategy: a :class:`~caco_scale.distributed.strategies.base.Strategy`. Of it: ``module``, which has the
            submodules ``query`` and ``key``, replicated, or partitioned by ZeRO-3 or FSDP2; ``optimizer``, with its
            state (:func:`~caco_scale.optim.build.init_optimizer_state`), and its ``partitions``.
        bank: a :class:`~caco_scale.method.bank.ShardedBank`, of which a rank gives its own rows.
        values: step, config, fingerprint, ...: stored with ``bank_pointer`` added.
    """
    tensors, shapes = {}, {}
    for side in ("query", "key"):
        module = getattr(strategy.module, side)
        shapes |= {f"{side}.{name}": whole_shape(p) for name, p in module.named_parameters()}
        tensors.update({f"{side}.{name}": _parameter(p) for name, p in module.named_parameters()})
        tensors.update({f"{side}_buffer.{name}": b for name, b in module.named_buffers()})
    named = named_state(strategy.optimizer, strategy.module.query, strategy.partitions)
    for name, value in named.items():
        if isinstance(value, list):
            shape = shapes[f"query.{name.rsplit('/', 1)[0]}"]
            value = [_flat_block(part, offset, shape) for part, offset in value]
        tensors[f"optimizer.{name}"] = value
    start, _ = bank.rows_range
    tensors["bank.rows"] = Block(bank.rows, (start, 0), (bank.size, bank.dim))
    tensors["bank.velocity"] = Block(bank.velocity, (start, 0), (bank.size, bank.dim))
    tensors["bank.assignments"] = Block(bank.assignments, (start,), (bank.size,))
    return State(tensors, {**values, "bank_pointer": bank.pointer})


@torch.no_grad()
def restore(path: str | Path, strategy, bank) -> dict:
    """Load a checkpoint, of whatever strategy and world size, into a run in place -> its values. Collective.

    Raises:
        UserError: as :func:`~caco_scale.checkpoint.read.load`, the same on every rank.
    """
    with strategy.loading():
        values = load(path, training_state(strategy, bank, {}))
    if values["bank_pointer"] >= bank.size:
        raise damaged(Path(path), VALUES, f"bank_pointer is {values['bank_pointer']} of {bank.size} rows")
    bank.pointer = values["bank_pointer"]
    return values


def _parameter(p):
    """A parameter as it is stored: itself where every rank has it whole, else this rank's block of it."""
    if isinstance(p, DTensor) or is_zero3(p):
        return _flat_block(*flat_part(p), whole_shape(p))
    return p


def _flat_block(part, offset, shape):
    return Block(part, (offset,), (math.prod(shape),), shape)
