"""Activation checkpointing: a block keeps only its input, and computes its forward again in the backward.

The numbers are the same to the last digit: dropout draws the same masks again, and what a forward leaves behind, the
running statistics of a BatchNorm, is left behind once. The second forward of a synchronised BatchNorm asks the other
ranks again, in the same order on all of them.
"""

import contextlib
from collections.abc import Callable, Generator
from functools import partial
from types import MethodType

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.checkpoint import checkpoint

from caco_scale.distributed.blocks import find_blocks
from caco_scale.errors import UserError, with_article


class NotRepeatable(UserError):
    """A block whose second forward would not be its first one again."""


def recompute_blocks(encoder: nn.Module) -> int:
    """Have every block of an encoder (:func:`~caco_scale.distributed.blocks.find_blocks`) recomputed -> how many.

    Names, parameters and buffers stay; without gradients nothing changes. FSDP2 and ZeRO may wrap it afterwards. A copy
    of the encoder does the same.
    """
    blocks = find_blocks(encoder)
    for block in blocks:
        block.forward = MethodType(_forward, block)
    return len(blocks)


def _forward(block, *inputs, **named):
    run = partial(type(block).forward, block)
    if not torch.is_grad_enabled():
        return run(*inputs, **named)
    inputs, named = tree_map(lambda x: x, (inputs, named))  # lists of one's own: DenseNet's grow meanwhile
    unchanged = partial(_refuse_changes, block, (inputs, named), _versions(block, (inputs, named)))
    contexts = lambda: (contextlib.nullcontext(), _repeating(block, unchanged))
    output = checkpoint(run, *inputs, use_reentrant=False, context_fn=contexts, **named)
    unchanged()
    return output


def _versions(block, inputs):
    """{name: what changes when the tensor does} of the inputs and of all buffers but those of norms."""
    held = {f"input {n}": x for n, x in enumerate(tree_leaves(inputs)) if isinstance(x, torch.Tensor)}
    for path, part in block.named_modules():
        if not isinstance(part, _NormBase):
            held |= {f"{path}.{name}".strip("."): b for name, b in part.named_buffers(recurse=False)}
    return {name: (id(tensor), tensor._version) for name, tensor in held.items()}


def _refuse_changes(block, inputs, before):
    """NotRepeatable where the inputs of a forward, or its block's state, are no longer what they were."""
    now = _versions(block, inputs)
    if changed := sorted(name for name in before.keys() | now.keys() if before.get(name) != now.get(name)):
        raise NotRepeatable(
            f"model.checkpoint_activations: the forward of {with_article(type(block).__name__)}, or what follows it, "
            f"changes its {', '.join(changed)}, so that it cannot be repeated: "
            "give --model.checkpoint_activations false"
        )


@contextlib.contextmanager
def _repeating(block: nn.Module, check: Callable[[], None]) -> Generator[None, None, None]:
    """Norms go by their batch as ever and move copies of their running statistics, which are then forgotten."""
    check()
    held = [(part, part._buffers) for part in block.modules() if isinstance(part, _NormBase)]
    try:
        for norm, buffers in held:
            norm._buffers = {n: b if b is None else b.clone() for n, b in buffers.items()}
        yield
    finally:
        for norm, buffers in held:
            norm._buffers = buffers
