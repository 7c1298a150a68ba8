"""Parameter groups, the choice of an optimizer, and its state by parameter name (what a checkpoint holds)."""

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from caco_scale.distributed.partition import FlatPartition, flat_part, local_part
from caco_scale.errors import UserError, did_you_mean
from caco_scale.flags.choices import OPTIMIZERS
from caco_scale.optim.lars import LARS


def parameter_groups(module: nn.Module) -> list[dict]:
    """Two groups of the parameters that train: more than one dimension, and the rest without weight decay.

    Either may be empty. ``scaled`` tells LARS which is which even after an engine has flattened the tensors.
    """
    params = [p for p in module.parameters() if p.requires_grad]
    return [
        {"params": [p for p in params if p.ndim > 1], "scaled": True},
        {"params": [p for p in params if p.ndim <= 1], "scaled": False, "weight_decay": 0.0},
    ]


def build_optimizer(name: str, module: nn.Module, weight_decay: float) -> torch.optim.Optimizer:
    """LARS, SGD (momentum 0.9) or AdamW (betas 0.9, 0.95) over ``module``'s two parameter groups.

    The learning rate starts at 0: the schedule writes it into ``param_groups`` before every step.
    Raises UserError on a name that is not known.
    """
    groups = parameter_groups(module)
    if name == "lars":
        return LARS(groups, lr=0.0, weight_decay=weight_decay)
    if name == "sgd":
        return torch.optim.SGD(groups, lr=0.0, momentum=0.9, weight_decay=weight_decay)
    if name == "adamw":
        return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95), weight_decay=weight_decay)
    raise UserError(
        f"optim.name: no optimizer {name!r}{did_you_mean(name, OPTIMIZERS)}: give one of {', '.join(OPTIMIZERS)}"
    )


def init_optimizer_state(
    optimizer: torch.optim.Optimizer, partitions: list[FlatPartition] | None = None
) -> None:
    """Create the state that the first step would create; parameters and existing state stay as they are.

    Afterwards a checkpoint can be loaded into it in place, and training goes on bit for bit as without this
    call: a zero momentum buffer plus the first gradient is the buffer that SGD starts with.

    ``partitions``: a strategy's, where its optimizer steps flat tensors.
    """
    if partitions is None:
        stepped = [(group, p) for group in optimizer.param_groups for p in group["params"]]
    else:
        stepped = [(optimizer.param_groups[part.param_group], part.flat) for part in partitions]
    for group, p in stepped:
        if not optimizer.state[p]:
            optimizer.state[p].update(_initial_state(optimizer, group, p))


def _initial_state(optimizer, group, p):
    if isinstance(optimizer, LARS | torch.optim.SGD):
        return {"momentum_buffer": torch.zeros_like(p)}
    assert isinstance(optimizer, torch.optim.AdamW), optimizer
    # torch keeps AdamW's step count on the host unless a kernel reads it.
    step_device = p.device if group["capturable"] or group["fused"] else "cpu"
    return {
        "step": torch.zeros((), dtype=torch.float32, device=step_device),
        "exp_avg": torch.zeros_like(p),
        "exp_avg_sq": torch.zeros_like(p),
    }


def named_state(
    optimizer: torch.optim.Optimizer, module: nn.Module, partitions: list[FlatPartition] | None = None
) -> dict[str, torch.Tensor | list[tuple[torch.Tensor, int]]]:
    """``{"<parameter name>/<state key>": tensor}`` of what trains, AdamW's ``step`` scalars included.

    The tensors are the optimizer's own: loading into them is loading the optimizer. Call
    :func:`init_optimizer_state` first. Names come from ``module``, which is not the engine's wrapper of it.

    ``partitions``: a strategy's, where its optimizer steps flat tensors. State of which a rank holds parts is a list
    of (part (n,), offset in the flat view of the whole) instead of a tensor.
    """
    if partitions is not None:
        return _named_flat_state(optimizer, module, partitions)
    trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
    named = {}
    for name, p in module.named_parameters():
        if id(p) not in trained:
            continue
        assert optimizer.state[p], f"{name} has no optimizer state; call init_optimizer_state first"
        for key, value in optimizer.state[p].items():
            named[f"{name}/{key}"] = [flat_part(value)] if isinstance(value, DTensor) else value
    return named


def _named_flat_state(optimizer, module, partitions):
    names = {id(p): name for name, p in module.named_parameters()}
    named = {}
    for partition in partitions:
        for key, value in optimizer.state[partition.flat].items():
            if value.shape != partition.flat.shape:  # one number for all: AdamW's step
                named.update({f"{names[id(p)]}/{key}": value for p in partition.parameters})
                continue
            parts = [[] for _ in partition.parameters]
            for piece, view in zip(partition.pieces, partition.views(value), strict=True):
                parts[piece.slot].append((view, piece.offset))
            for p, part in zip(partition.parameters, parts, strict=True):
                named[f"{names[id(p)]}/{key}"] = part or [(value[:0], 0)]
    return named


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of optimizer state that this rank holds: tensors of its own, or its parts of partitioned ones."""
    tensors = [t for state in optimizer.state.values() for t in state.values() if isinstance(t, torch.Tensor)]
    return sum(part.numel() * part.element_size() for part in map(local_part, tensors))
