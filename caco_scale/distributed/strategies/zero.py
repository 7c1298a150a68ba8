"""DeepSpeed ZeRO through accelerate: optimizer state (1), gradients (2) and parameters (3) partitioned over ranks.

The engine flattens parameters and gives the optimizer one flat partition of many at a time; :func:`flat_partitions`
finds out what lies where, which LARS and checkpoints need. ZeRO-1/2 keep every parameter whole on every rank, and of
it a second fp32 copy of this rank's partition, which the optimizer steps. ZeRO-3 keeps only the partitions.
"""

import contextlib

import torch
import torch.distributed as dist

from caco_scale.distributed.partition import FlatPartition, Piece, flat_part, refresh_gathered
from caco_scale.distributed.strategies.base import Strategy, WholeCopy
from caco_scale.optim.build import build_optimizer, initial_state
from caco_scale.optim.lars import LARS


def flat_partitions(zero):
    """What each flat tensor that a ZeRO optimizer steps is made of -> ``[(tensor, FlatPartition)]``.

    ``zero``: the engine's ``optimizer``. Not by DeepSpeed's own ``_hp_mapping``, which is wrong under
    ``round_robin_gradients`` (0.19.8).
    """
    if hasattr(zero, "fp32_partitioned_groups_flat"):
        return [_zero3_partition(zero, i) for i in range(len(zero.fp16_groups))]
    return [_zero12_partition(zero, i) for i in range(len(zero.bit16_groups))]


def _zero12_partition(zero, i):
    """Stages 1 and 2 join a group's parameters and cut the whole into equal parts, padded at the end."""
    flat, group = zero.single_partition_of_fp32_groups[i], zero.real_dp_process_group[i]
    first = dist.get_rank(group) * flat.numel()
    parameters, pieces = list(zero.round_robin_bit16_groups[i]), []
    for slot, (p, offset) in enumerate(zip(parameters, zero.round_robin_bit16_offsets[i], strict=True)):
        start, stop = max(offset, first), min(offset + p.numel(), first + flat.numel())
        if start < stop:
            pieces.append(Piece(slot, start - first, stop - start, start - offset))
    return flat, FlatPartition(parameters, pieces, group)


def _zero3_partition(zero, i):
    """Stage 3 cuts each parameter into equal parts, padded at the end, and joins a subgroup's parts of a rank."""
    flat, parameters, pieces = zero.fp32_partitioned_groups_flat[i], list(zero.fp16_groups[i]), []
    for slot, p in enumerate(parameters):
        _, start, length = zero.grad_position[zero.get_param_id(p)]
        part, offset = flat_part(p)
        assert length == p.ds_tensor.ds_numel, (length, p.ds_tensor.ds_numel)
        if part.numel():
            pieces.append(Piece(slot, start, part.numel(), offset))
    return flat, FlatPartition(parameters, pieces, zero.dp_process_group)


class Zero(Strategy):
    """DeepSpeed's engine around the model; the optimizer is ours and steps the engine's flat partitions."""

    def __init__(self, accelerator, model, optimizer_name, weight_decay):
        whole_copy = WholeCopy(model.query)  # before SyncBN, whose process group cannot be copied
        super().__init__(accelerator, model)
        self.optimizer = build_optimizer(optimizer_name, self.module.query, weight_decay)
        self._engine, _ = accelerator.prepare(self.module, self.optimizer)
        self._zero = self._engine.optimizer
        self.name = f"zero{self._engine.zero_optimization_stage()}"
        self._whole_copy = whole_copy if self.name == "zero3" else None
        self.partitions = flat_partitions(self._zero)
        if isinstance(self.optimizer, LARS):
            self.optimizer.partitions = {id(flat): partition for flat, partition in self.partitions}
            self.optimizer.reduce_device = self.device  # where offloaded partitions' norms are summed
        self._init_optimizer_state()

    def _init_optimizer_state(self):
        """State as before the first step, so that a checkpoint can be loaded into it in place."""
        self.optimizer.state.clear()
        for i, (flat, _) in enumerate(self.partitions):
            group = self._zero.sub_group_to_group_id[i] if self._zero_3 else i
            self.optimizer.state[flat] = initial_state(
                self.optimizer, self.optimizer.param_groups[group], flat
            )

    @property
    def _zero_3(self):
        return self._whole_copy is not None

    def __call__(self, views):
        return self._engine(views)

    @contextlib.contextmanager
    def micro_step(self, is_last):
        """The engine steps after the last micro-step only; ZeRO-2/3 exchange gradients in every one."""
        self._engine.set_gradient_accumulation_boundary(is_last)
        yield

    def backward(self, loss):
        """Add the gradients of ``loss``; not finite ones where the loss is not finite.

        DeepSpeed leaves out a step whose gradient's norm is not finite, on every rank alike, and looks at nothing
        else. (x * 1 is x, bit for bit; the factor is NaN for a NaN or infinite loss.)
        """
        self._engine.backward(loss * (loss.detach() * 0 + 1))

    def step(self, loss, lr):
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self._engine.step()
        return not self._zero.overflow

    @contextlib.contextmanager
    def evaluation_encoder(self):
        if not self._zero_3:
            yield self.module.query
            return
        with self._whole_copy.of(self.module.query, self.device) as encoder:
            yield encoder

    @torch.no_grad()
    def restore(self, path, bank):
        """As the base's; then the copies that the engine keeps of parameters are made anew from what was loaded."""
        values = super().restore(path, bank)
        self._zero.refresh_fp32_params()
        refresh_gathered(self.module.parameters())
        return values
