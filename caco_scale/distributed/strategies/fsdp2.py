"""FSDP2: torch's ``fully_shard`` keeps of every parameter, gradient and optimizer tensor one shard a rank.

Called directly and never through ``Accelerator.prepare``, which on a CPU trains without exchanging gradients, and
after ``fully_shard`` mixes up parameters whose shards are empty.
"""

import contextlib

import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from caco_scale.distributed.blocks import find_blocks
from caco_scale.distributed.partition import local_part
from caco_scale.distributed.strategies.base import Strategy, WholeCopy


class FullyShardedDataParallel(Strategy):
    """Parameters are DTensors, rows of which each rank holds; gathered for a unit's forward and backward only."""

    name, partitioned_gradients = "fsdp2", True

    def __init__(self, accelerator, model, build_optimizer):
        whole_copy = WholeCopy(model.query)  # before SyncBN, whose process group cannot be copied
        super().__init__(accelerator, model)
        self._whole_copy = whole_copy
        if not dist.is_initialized():  # one process: a group of one, that the same code runs
            dist.init_process_group(
                "nccl" if self.device.type == "cuda" else "gloo", store=dist.HashStore(), rank=0, world_size=1
            )
        mesh = init_device_mesh(self.device.type, (self.world_size,))
        for encoder in (self.module.query, self.module.key):
            for unit in [
                *find_blocks(encoder),
                encoder,
            ]:  # gathered and freed one at a time, then the rest at once
                # The key encoder has no backward: without the option it would stay whole after its first forward.
                fully_shard(unit, mesh=mesh, reshard_after_forward=True)
        fully_shard(self.module, mesh=mesh)
        self.optimizer = build_optimizer(self.module.query)

    def __call__(self, views):
        return self.module(views)

    @contextlib.contextmanager
    def micro_step(self, is_last):
        """Ranks exchange gradients in the last micro-step only; until then each holds the sum of its own, whole."""
        self.module.set_requires_gradient_sync(is_last)
        yield

    def step(self, loss, lr):
        gradients = [p.grad for p in self.module.query.parameters() if p.grad is not None]
        return self._step_if_finite(loss, [local_part(g) for g in gradients], lr)

    @contextlib.contextmanager
    def evaluation_encoder(self):
        with self._whole_copy.of(self.module.query, self.device) as encoder:
            yield encoder

    @contextlib.contextmanager
    def loading(self):
        self.module.reshard()  # the shards are what is loaded
        yield
