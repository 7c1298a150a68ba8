"""The blocks of an encoder, found in its structure: what FSDP2 gathers at once, and what recomputes its activations."""

from collections import Counter

from torch import nn

CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
LARGE = 4  # the part of a network that is much for one block


def find_blocks(module: nn.Module) -> list[nn.Module]:
    """The repeated parts of a network, in its order: a ResNet's residual blocks, a transformer's layers.

    A block is a module of a class that occurs several times, is no container, and is no stage: it holds no sequence of
    several others of one kind, and if it has a quarter of all parameters, no several others of one kind at all. Where
    nothing is repeated there are none, and the network is one part.
    """
    counts = Counter(type(part) for part in module.modules())
    much = sum(p.numel() for p in module.parameters()) / LARGE
    blocks, waiting, seen = [], [module], set()
    while waiting:
        part = waiting.pop()
        if id(part) in seen or _is_layer(part):
            continue
        seen.add(id(part))
        if counts[type(part)] > 1 and not isinstance(part, CONTAINERS) and not _is_stage(part, much):
            blocks.append(part)
        else:
            waiting += reversed(list(part.children()))
    return blocks


def _is_layer(part):
    """A layer, or a few in a row (convolution, norm, activation); what has no parameters does not count."""
    inner = _inner(part)
    return not inner or (isinstance(part, CONTAINERS) and not any(map(_inner, inner)))


def _inner(part):
    return [child for child in part.children() if next(child.parameters(), None) is not None]


def _is_stage(part, much):
    """Does it hold several modules of one class, that are more than a layer, in a sequence (a large one: at all)?"""
    large = sum(p.numel() for p in part.parameters()) > much
    return any(
        max(Counter(type(child) for child in holder.children() if not _is_layer(child)).values(), default=0)
        > 1
        for holder in part.modules()
        if isinstance(holder, CONTAINERS) or (large and holder is part)
    )
