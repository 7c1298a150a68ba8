"""LARS: layer-wise adaptive rate scaling for large batches (You et al., arXiv:1708.03888).

A norm is one of a whole tensor, and engines that partition give the optimizer parts: rows of each tensor (FSDP2),
or flat tensors of one dimension that join pieces of many (DeepSpeed ZeRO). Sums of squares add over pieces, so one
small sum over the ranks makes LARS exact there. Without it, every flat tensor would be one of dimension 1: no decay,
no factor, silently plain momentum SGD.

Legend: L tensors in a group, P pieces of them on this rank; p parameter, g gradient, u update, mu momentum buffer.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from caco_scale.distributed.partition import flat_partitions, local_part, shard_group


@dataclass(frozen=True)
class Pieces:
    """Of L tensors, the P pieces that this rank holds: piece i belongs to tensor ``slots[i]``.

    ``slots``: (P,) int64, on the device where the sums over ranks are taken, which is not the pieces' own where an
    engine keeps those on the host. ``group``: the ranks that hold the other pieces.
    """

    slots: torch.Tensor
    num_tensors: int
    group: object


def squared_norms(params, updates, pieces=None):
    """Squared norms of L parameters and of their updates: (2, L) float64, on their device.

    The one place where norms are taken. ``pieces``: params and updates are P pieces of L tensors; then one
    all-reduce of (2, L), which every rank of the group joins, the ranks without pieces too.
    """
    if pieces is None:
        return _squared_norms(params, updates)
    device = pieces.slots.device
    squared = torch.zeros(2, pieces.num_tensors, dtype=torch.float64, device=device)
    if params:
        squared.index_add_(1, pieces.slots, _squared_norms(params, updates).to(device))
    dist.all_reduce(squared, group=pieces.group)
    return squared


def _squared_norms(params, updates):
    # float64: torch's float32 norm on CPU is off by 3e-4 for 10 million elements, and a norm is cheap.
    norms = torch._foreach_norm([*params, *updates], 2, dtype=torch.float64)
    return torch.stack(norms).square().view(2, len(params))


def trust_ratios(squared, trust_coefficient):
    """trust_coefficient * |p| / |u| per tensor, (2, L) -> (L,); 1 where either norm is 0."""
    parameter_norm, update_norm = squared.sqrt()
    ratios = trust_coefficient * parameter_norm / update_norm
    return torch.where((parameter_norm > 0) & (update_norm > 0), ratios, 1.0)


def momentum_update(params, updates, buffers, *, lr, momentum):
    """mu <- momentum * mu + u; p <- p - lr * mu. In place."""
    if not params:  # a rank without a piece
        return
    torch._foreach_mul_(buffers, momentum)
    torch._foreach_add_(buffers, updates)
    torch._foreach_add_(params, buffers, alpha=-lr)


def lars_update(params, gradients, buffers, *, lr, weight_decay, momentum, trust_coefficient, pieces=None):
    """u = g + weight_decay * p, scaled to trust_coefficient * |p|; the momentum update. g is kept."""
    updates = list(torch._foreach_add(gradients, params, alpha=weight_decay)) if params else []
    ratios = trust_ratios(squared_norms(params, updates, pieces), trust_coefficient)
    if updates:
        if pieces is not None:
            ratios = ratios[pieces.slots].to(params[0].device)
        torch._foreach_mul_(updates, list(ratios.unbind()))
    momentum_update(params, updates, buffers, lr=lr, momentum=momentum)


class LARS(torch.optim.Optimizer):
    """LARS on tensors of two or more dimensions, momentum SGD without weight decay on the others.

        u = g + weight_decay * p;  u <- u * trust_coefficient * |p| / |u|  (factor 1 if either norm is 0)
        mu <- momentum * mu + u;   p <- p - lr * mu

    Biases, BatchNorm and other parameters of one dimension or less take neither the decay nor the factor. No
    eps, no clipping. A group's ``scaled`` (True or False) decides for all its tensors where their own
    dimensions cannot tell, because an engine flattened them. ``lr`` is read from ``param_groups`` at every
    step. All on the device: no synchronisation with the host. State per parameter: ``momentum_buffer``.

    ``partitions``: for the flat tensors of an engine, ``{id(tensor): FlatPartition}``, set by the strategy; DTensors
    speak for themselves. With either, the step is collective: one all-reduce of (2, L) float64 for a group.
    ``reduce_device``: where those sums are taken; None: where the parameters lie.
    """

    def __init__(self, params, lr, weight_decay=1.5e-6, momentum=0.9, trust_coefficient=0.001):
        defaults = {
            "lr": lr,
            "weight_decay": weight_decay,
            "momentum": momentum,
            "trust_coefficient": trust_coefficient,
            "scaled": None,
        }
        super().__init__(params, defaults)
        self.partitions, self.reduce_device = {}, None
        self._pieces = {}

    def attach(self, engine):
        """Tell the optimizer what the flat tensors of a DeepSpeed engine are made of."""
        self.partitions = {id(part.flat): part for part in flat_partitions(engine.optimizer)}
        self.reduce_device = engine.device  # where offloaded partitions' norms are summed

    def init_state(self):
        """Zero momentum where there is none yet, so that a checkpoint can be loaded before the first step."""
        for group in self.param_groups:
            for p in group["params"]:
                if "momentum_buffer" not in self.state[p]:
                    self.state[p]["momentum_buffer"] = torch.zeros_like(p)

    @torch.no_grad()
    def step(self, closure=None):
        """One update from the parameters' ``.grad``; those without a gradient stay, momentum included."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.init_state()
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            self._step_group(group, [p for p in params if _is_scaled(group, p)], scaled=True)
            self._step_group(group, [p for p in params if not _is_scaled(group, p)], scaled=False)
        return loss

    def _step_group(self, group, params, scaled):
        if not params:
            return
        buffers = [self.state[p]["momentum_buffer"] for p in params]
        params, gradients, buffers, pieces = self._local(params, [p.grad for p in params], buffers)
        rates = {"lr": group["lr"], "momentum": group["momentum"]}
        if not scaled:
            momentum_update(params, gradients, buffers, **rates)
            return
        lars_update(
            params,
            gradients,
            buffers,
            weight_decay=group["weight_decay"],
            trust_coefficient=group["trust_coefficient"],
            pieces=pieces,
            **rates,
        )

    def _local(self, params, gradients, buffers):
        """What this rank holds of each tensor, and the :class:`Pieces` that say of which; None: they are whole."""
        tensors = params, gradients, buffers
        if isinstance(params[0], DTensor):
            if id(params[0]) not in self._pieces:
                self._pieces[id(params[0])] = self._make_pieces(
                    range(len(params)), len(params), shard_group(params[0]), params[0].device
                )
            assert self._pieces[id(params[0])].num_tensors == len(params), "the parameters that train changed"
            return *([local_part(t) for t in part] for part in tensors), self._pieces[id(params[0])]
        if not self.partitions:
            return *tensors, None
        assert len(params) == 1, "an engine steps one flat tensor of a group at a time"
        partition = self.partitions[id(params[0])]
        if id(params[0]) not in self._pieces:
            slots = [piece.slot for piece in partition.pieces]
            self._pieces[id(params[0])] = self._make_pieces(
                slots, len(partition.parameters), partition.group, params[0].device
            )
        return *(partition.views(part[0]) for part in tensors), self._pieces[id(params[0])]

    def _make_pieces(self, slots, num_tensors, group, device):
        slots = torch.tensor(list(slots), dtype=torch.int64, device=self.reduce_device or device)
        return Pieces(slots, num_tensors, group)


def _is_scaled(group, p):
    return p.ndim > 1 if group["scaled"] is None else group["scaled"]
