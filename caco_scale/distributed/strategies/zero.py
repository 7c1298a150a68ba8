"""DeepSpeed ZeRO through accelerate: optimizer state (1), gradients (2) and parameters (3) partitioned over ranks.

The engine flattens parameters and gives the optimizer one flat partition of many at a time; ``flat_partitions`` finds
out what lies where, which LARS and checkpoints need. ZeRO-1/2 keep every parameter whole on every rank, and of it a
second fp32 copy of this rank's partition, which the optimizer steps. ZeRO-3 keeps only the partitions.
"""

import contextlib

import torch

from caco_scale.distributed.partition import flat_partitions, refresh_gathered
from caco_scale.distributed.strategies.base import Strategy, WholeCopy, set_lr


class Zero(Strategy):
    """DeepSpeed's engine around the model; the optimizer is ours and steps the engine's flat partitions."""

    def __init__(self, accelerator, model, build_optimizer):
        whole_copy = WholeCopy(model.query)  # before SyncBN, whose process group cannot be copied
        super().__init__(accelerator, model)
        self.optimizer = build_optimizer(self.module.query)
        self._engine, _ = accelerator.prepare(self.module, self.optimizer)
        self._zero = self._engine.optimizer
        self.name = f"zero{self._engine.zero_optimization_stage()}"
        self._whole_copy = whole_copy if self.name == "zero3" else None
        self.partitions = flat_partitions(self._zero)
        if hasattr(self.optimizer, "attach"):
            self.optimizer.attach(self._engine)
        # The engine has stepped once without gradients: the state is as before the first step again.
        self.optimizer.state.clear()

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
        set_lr(self.optimizer, lr)
        self._engine.step()
        return not self._zero.overflow

    @contextlib.contextmanager
    def evaluation_encoder(self):
        if self._whole_copy is None:
            yield self.module.query
            return
        with self._whole_copy.of(self.module.query, self.device) as encoder:
            yield encoder

    @contextlib.contextmanager
    def loading(self):
        yield
        with torch.no_grad():
            self._zero.refresh_fp32_params()
            refresh_gathered(self.module.parameters())
