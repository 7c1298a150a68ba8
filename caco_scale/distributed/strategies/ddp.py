"""Every process holds the whole model; also one process alone."""

import contextlib

from caco_scale.distributed.strategies.base import Strategy


class DataParallel(Strategy):
    """Gradients are averaged over ranks by torch's DDP."""

    name = "ddp"

    def __init__(self, accelerator, model, build_optimizer):
        super().__init__(accelerator, model)
        self.optimizer = build_optimizer(self.module.query)
        self._engine = accelerator.prepare_model(self.module)

    def __call__(self, views):
        return self._engine(views)

    @contextlib.contextmanager
    def micro_step(self, is_last):
        """Ranks exchange gradients in the last micro-step only."""
        wait = self.world_size > 1 and not is_last
        with self._engine.no_sync() if wait else contextlib.nullcontext():
            yield

    def step(self, loss, lr):
        gradients = [p.grad for p in self.module.query.parameters() if p.grad is not None]
        return self._step_if_finite(loss, gradients, lr)
