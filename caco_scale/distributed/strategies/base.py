"""What a strategy offers to the step, to evaluation and to checkpoints, and what the strategies have in common."""

import contextlib
import copy
from collections.abc import Callable, Generator
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import nn

from caco_scale.distributed import collectives
from caco_scale.distributed.buffers import BufferSnapshot
from caco_scale.distributed.partition import FlatPartition, gather_whole
from caco_scale.distributed.syncbn import convert_sync_batchnorm

# Of the query encoder as the strategy has cut it up: an optimizer of its parameters.
OptimizerBuilder = Callable[[nn.Module], torch.optim.Optimizer]


class Strategy:
    """The engine around a query and a key encoder, and the optimizer of the query encoder.

    Attributes:
        name: the file in ds_configs/ that chooses it.
        device, rank, world_size: of this process.
        module: the :class:`~caco_scale.method.model.QueryKeyModel` itself; some strategies partition its parameters.
        optimizer: of the query encoder's parameters; some strategies give it partitioned tensors.
        buffers: of ``module``, for the way back from a step that was not finite.
        partitions: what the optimizer's flat tensors are made of; None: it has none.
        partitioned_gradients: whether each rank holds other gradients, and has to ask whether all are finite.
    """

    name: str
    optimizer: torch.optim.Optimizer
    partitions: list[FlatPartition] | None = None
    partitioned_gradients = False

    def __init__(self, accelerator: Accelerator, model: nn.Module):
        self.device = accelerator.device
        self.rank, self.world_size = accelerator.process_index, accelerator.num_processes
        assert self.world_size == collectives.world_size(), "accelerate and torch see different processes"
        self.module: Any = convert_sync_batchnorm(model).to(self.device)
        self.buffers = BufferSnapshot(self.module)

    def __call__(self, views: list[torch.Tensor]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Queries of all views and keys of the two global views: see ``QueryKeyModel.forward``."""
        raise NotImplementedError

    def micro_step(self, is_last: bool) -> contextlib.AbstractContextManager:
        """Context of the forward and backward of one micro-batch of a step."""
        raise NotImplementedError

    def backward(self, loss: torch.Tensor) -> None:
        """Add the gradients of ``loss``. The bank's loss is already global: nothing is divided here."""
        loss.backward()

    def step(self, loss: torch.Tensor, lr: float) -> bool:
        """One optimizer step at the learning rate ``lr``; False if it is not finite, and nothing moved.

        Every rank decides alike: the loss is global, and of the gradients each rank may hold a part.
        """
        raise NotImplementedError

    @contextlib.contextmanager
    def evaluation_encoder(self) -> Generator[nn.Module, None, None]:
        """The whole query encoder on every rank, to run as each rank likes, ranks apart. Entering is collective."""
        yield self.module.query

    @contextlib.contextmanager
    def loading(self) -> Generator[None, None, None]:
        """Context in which another loads ``module`` and ``optimizer`` in place, what this rank holds of them.

        Copies that an engine keeps of the parameters follow on the way out. Collective.
        """
        yield

    def _step_if_finite(self, loss, gradients, lr):
        """The step of an optimizer that is ours to call. ``gradients``: what this rank holds of them."""
        norms = torch._foreach_norm(gradients) if gradients else []
        finite = torch.stack([loss.detach(), *norms]).isfinite().all()
        if self.partitioned_gradients:
            finite = collectives.all_reduce_(finite.float(), dist.ReduceOp.MIN)
        finite = bool(finite.item())
        if finite:
            set_lr(self.optimizer, lr)
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return finite


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """The learning rate of the next step."""
    for group in optimizer.param_groups:
        group["lr"] = lr


class WholeCopy:
    """A plain copy of an encoder, without memory until it is filled with the parameters of a partitioned one."""

    def __init__(self, encoder: nn.Module):
        self._copy = copy.deepcopy(encoder).to("meta")

    @contextlib.contextmanager
    def of(self, encoder: nn.Module, device: torch.device) -> Generator[nn.Module, None, None]:
        """The copy with all of ``encoder``'s parameters and buffers, on every rank; entering is collective."""
        whole = self._copy.to_empty(device=device)
        for target, source in zip(whole.parameters(), encoder.parameters(), strict=True):
            target.data.copy_(gather_whole(source, device))
        for target, source in zip(whole.buffers(), encoder.buffers(), strict=True):
            target.copy_(source)
        try:
            yield whole
        finally:
            self._copy = whole.to("meta")
