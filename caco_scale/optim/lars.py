"""LARS: layer-wise adaptive rate scaling for large batches (You et al., arXiv:1708.03888).

A norm is one of a whole tensor, and engines that partition give the optimizer parts: rows of each tensor (FSDP2),
or flat tensors of one dimension that join pieces of many (DeepSpeed ZeRO). Sums of squares add over pieces, so one
small sum over the ranks makes LARS exact there. Without it, every flat tensor would be one of dimension 1: no decay,
no factor, silently plain momentum SGD. So LARS refuses a flat tensor that nobody has told it the contents of.

Legend: L tensors, P pieces of them on this rank; p parameter, g gradient, u update, mu momentum buffer.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.optim.optimizer import ParamsT

from caco_scale.distributed.partition import (
    FlatPartition,
    flat_partitions,
    local_part,
    shard_group,
    whole_shape,
)
from caco_scale.errors import UserError

Tensors = list[torch.Tensor]
FSDP_FLATTENED = (
    "_fsdp_flattened"  # what FSDP1 marks its flat tensors with, and the parameters that are views of them
)


@dataclass(frozen=True)
class Pieces:
    """Of L tensors, the P pieces that this rank holds: piece i belongs to tensor ``slots[i]``.

    ``slots``: (P,) int64, on the device where the sums over ranks are taken, which is not the pieces' own where an
    engine keeps those on the host. ``group``: the ranks that hold the other pieces.
    """

    slots: torch.Tensor
    num_tensors: int
    group: dist.ProcessGroup


def squared_norms(params: Tensors, updates: Tensors, pieces: Pieces | None = None) -> torch.Tensor:
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


def trust_ratios(squared: torch.Tensor, trust_coefficient: float) -> torch.Tensor:
    """trust_coefficient * |p| / |u| per tensor, (2, L) -> (L,); 1 where either norm is 0."""
    parameter_norm, update_norm = squared.sqrt()
    ratios = trust_coefficient * parameter_norm / update_norm
    return torch.where((parameter_norm > 0) & (update_norm > 0), ratios, 1.0)


def momentum_update(
    params: Tensors, updates: Tensors, buffers: Tensors, *, lr: float, momentum: float
) -> None:
    """mu <- momentum * mu + u; p <- p - lr * mu. In place."""
    if not params:  # a rank without a piece
        return
    torch._foreach_mul_(buffers, momentum)
    torch._foreach_add_(buffers, updates)
    torch._foreach_add_(params, buffers, alpha=-lr)


def lars_update(
    params: Tensors,
    gradients: Tensors,
    buffers: Tensors,
    *,
    lr: float,
    weight_decay: float,
    momentum: float,
    trust_coefficient: float,
    pieces: Pieces | None = None,
) -> None:
    """u = g + weight_decay * p, scaled to trust_coefficient * |p|; the momentum update. g is kept."""
    updates = list(torch._foreach_add(gradients, params, alpha=weight_decay)) if params else []
    ratios = trust_ratios(squared_norms(params, updates, pieces), trust_coefficient)
    if updates:
        if pieces is not None:
            ratios = ratios[pieces.slots].to(params[0].device)
        torch._foreach_mul_(updates, list(ratios.unbind()))
    momentum_update(params, updates, buffers, lr=lr, momentum=momentum)


@dataclass(frozen=True)
class _Share:
    """Of L tensors, what this rank updates at once: all of them (``group`` None), or pieces of them.

    ``tensors``: parameters, gradients and momentum buffers, P pieces of each. ``slots``: which of the L tensors a piece
    belongs to. ``dimensions``: of the L whole tensors.
    """

    tensors: list[Tensors]
    slots: list[int]
    dimensions: list[int]
    group: dist.ProcessGroup | None
    device: torch.device


class LARS(torch.optim.Optimizer):
    """LARS on tensors of two or more dimensions, momentum SGD without weight decay on the others.

        u = g + weight_decay * p;  u <- u * trust_coefficient * |p| / |u|  (factor 1 if either norm is 0)
        mu <- momentum * mu + u;   p <- p - lr * mu

    Biases, BatchNorm and other parameters of one dimension or less take neither the decay nor the factor; a
    group's ``scaled`` (True or False, None by default) decides over the dimensions of all its tensors. No eps, no
    clipping. ``lr`` is read from ``param_groups`` at every step. All on the device: no synchronisation with the
    host. State per parameter: ``momentum_buffer``.

    Under FSDP2 it is exact as it comes: build it after ``fully_shard``. Under DeepSpeed ZeRO-1/2/3, which gives an
    optimizer flat tensors instead of the parameters, call :meth:`attach` once::

        lars = LARS(model.parameters(), lr=4.8)
        engine, *_ = deepspeed.initialize(model=model, optimizer=lars, config=config)
        lars.attach(engine)

    (DeepSpeed clips gradients at a norm of 1 unless ``config`` sets ``gradient_clipping`` to 0.) With either the step
    is collective: one all-reduce of (2, L) float64 for a group.

    Raises:
        UserError: at a step, for flat tensors of an engine that it is not attached to, and for those of torch's older
            FullyShardedDataParallel (FSDP1), whose pieces it cannot tell.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float,
        weight_decay: float = 1.5e-6,
        momentum: float = 0.9,
        trust_coefficient: float = 0.001,
    ):
        self._begin()
        defaults = {
            "lr": lr,
            "weight_decay": weight_decay,
            "momentum": momentum,
            "trust_coefficient": trust_coefficient,
            "scaled": None,
        }
        super().__init__(params, defaults)

    def _begin(self):
        self._own: set[torch.Tensor] = (
            set()
        )  # the parameters that it was given; not what an engine puts there
        self._partitions: dict[int, FlatPartition] = {}  # by id of the flat tensor
        self._reduce_device: torch.device | None = (
            None  # where norms are summed; None: where the parameters lie
        )
        self._pieces: dict[tuple, Pieces] = {}

    def __setstate__(self, state):
        super().__setstate__(state)
        if "_own" not in self.__dict__:  # a copy, or one that was pickled
            self._begin()
            self._own.update(p for group in self.param_groups for p in group["params"])

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters to train, with options of their own: see ``torch.optim.Optimizer.add_param_group``."""
        super().add_param_group(param_group)
        self._own.update(self.param_groups[-1]["params"])

    def attach(self, engine: Any) -> None:
        """Learn what the flat tensors are made of that a DeepSpeed engine steps. Call it once, before the first step.

        Args:
            engine: what ``deepspeed.initialize`` (or accelerate's ``prepare``) made of the model and this optimizer.
        Raises:
            UserError: an engine that steps something else, or flattens in a way that is not known to be exact.
        """
        if engine.optimizer is self:  # no ZeRO: it steps the parameters themselves
            return
        if getattr(engine.optimizer, "optimizer", None) is not self:
            raise UserError(
                "LARS.attach: this engine does not step this optimizer: give the engine that deepspeed.initialize "
                "returned when it was called with optimizer= this one"
            )
        self._partitions = {id(part.flat): part for part in flat_partitions(engine.optimizer)}
        self._reduce_device = (
            engine.device
        )  # offloaded partitions lie on the host, which a GPU's sums cannot cross
        self._pieces.clear()

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update from the parameters' ``.grad``; those without a gradient stay, momentum included."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            for p in params:
                if "momentum_buffer" not in self.state[p]:
                    self.state[p]["momentum_buffer"] = torch.zeros_like(p)
            if self._is_known(params):
                for share in self._shares(params):
                    self._step_share(group, share)
        return loss

    def _is_known(self, params):
        """Whether all tensors are ones that this optimizer can tell the contents of.

        False only for the step without gradients by which an engine has the state made; UserError else.
        """
        if any(getattr(p, FSDP_FLATTENED, False) for p in params):
            raise UserError(
                "LARS cannot tell layers apart in the flat tensors of FullyShardedDataParallel (FSDP1), and would "
                "silently be momentum SGD: shard the model by torch.distributed.fsdp.fully_shard (FSDP2), "
                "under which it is exact"
            )
        foreign = [
            p
            for p in params
            if p.ndim <= 1
            and p not in self._own
            and id(p) not in self._partitions
            and not isinstance(p, DTensor)
        ]
        if any(bool(p.grad.any()) for p in foreign):
            raise UserError(
                f"LARS steps {len(foreign)} flat tensor(s) of {sum(p.numel() for p in foreign):,} elements that an "
                "engine has put in place of its parameters, and would silently be momentum SGD: call "
                "lars.attach(engine) after deepspeed.initialize"
            )
        return not foreign

    def _shares(self, params: Tensors) -> Iterator[_Share]:
        """What this rank holds of the parameters: the whole ones, the rows of DTensors, each flat tensor's pieces."""
        whole, rows = [], {}
        for p in params:
            if id(p) in self._partitions:
                yield self._share_of_flat(p, self._partitions[id(p)])
            elif isinstance(p, DTensor):
                rows.setdefault(shard_group(p), []).append(p)
            else:
                whole.append(p)
        for group, together in ((None, whole), *rows.items()):
            if together:
                tensors = [together, [p.grad for p in together], [self._buffer(p) for p in together]]
                tensors = [[local_part(tensor) for tensor in part] for part in tensors]
                slots, dimensions = list(range(len(together))), [p.ndim for p in together]
                yield _Share(tensors, slots, dimensions, group, together[0].device)

    def _share_of_flat(self, p, partition):
        return _Share(
            [partition.views(flat) for flat in (p, p.grad, self._buffer(p))],
            [piece.slot for piece in partition.pieces],
            [len(whole_shape(parameter)) for parameter in partition.parameters],
            partition.group,
            p.device,
        )

    def _buffer(self, p):
        return self.state[p]["momentum_buffer"]

    def _step_share(self, group, share):
        rates = {"lr": group["lr"], "momentum": group["momentum"]}
        is_scaled = [n > 1 if group["scaled"] is None else group["scaled"] for n in share.dimensions]
        scaled = [i for i, slot in enumerate(share.slots) if is_scaled[slot]]
        if any(is_scaled):  # by every rank alike: one without a piece of them has its part in the sums
            lars_update(
                *([part[i] for i in scaled] for part in share.tensors),
                weight_decay=group["weight_decay"],
                trust_coefficient=group["trust_coefficient"],
                pieces=None if share.group is None else self._pieces_of(share, is_scaled, scaled),
                **rates,
            )
        others = [i for i, slot in enumerate(share.slots) if not is_scaled[slot]]
        momentum_update(*([part[i] for i in others] for part in share.tensors), **rates)

    def _pieces_of(self, share, is_scaled, scaled):
        """The pieces of the scaled tensors alone, whose slots are on the device from the first step on."""
        key = (*is_scaled, *share.slots, share.group, share.device)
        if key not in self._pieces:
            numbers = [sum(is_scaled[:slot]) for slot in share.slots]
            slots = torch.tensor([numbers[i] for i in scaled], dtype=torch.int64)
            slots = slots.to(self._reduce_device or share.device)
            self._pieces[key] = Pieces(slots, sum(is_scaled), share.group)
        return self._pieces[key]
