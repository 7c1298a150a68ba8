"""How the processes of a launch train one model: everything that differs between strategies, behind one interface.

``pretrain`` builds a strategy, ``step.train_step`` uses it. All train the same model to the last bits of rounding:

    DataParallel      every process holds everything (torch DDP; also one process alone)
    Zero              DeepSpeed ZeRO-1/2/3, in ``zero.py``: optimizer state, gradients, parameters partitioned
    FullyShardedDataParallel   FSDP2, in ``fsdp2.py``: all three, by torch itself
"""

import contextlib
import copy

import torch
import torch.distributed as dist

from caco_scale import checkpoint
from caco_scale.distributed import collectives
from caco_scale.distributed.partition import gather_whole
from caco_scale.distributed.syncbn import convert_sync_batchnorm
from caco_scale.errors import UserError
from caco_scale.method.ema import ema_update
from caco_scale.method.model import synchronise_key
from caco_scale.optim.build import build_optimizer, init_optimizer_state, state_bytes


def build_strategy(name, accelerator, model, optimizer_name, weight_decay, compiled=False):
    """The strategy ``name`` (:data:`~caco_scale.distributed.launch.STRATEGIES`) around a fresh model. Collective.

    Args:
        accelerator: of :func:`~caco_scale.distributed.launch.start_processes`.
        model: a :class:`~caco_scale.method.model.QueryKeyModel` with the same weights on every rank.
        compiled: whether the encoders are to be compiled.
    Raises:
        UserError: a combination that would not train the same model.
    """
    check_combination(name, next(model.parameters()).dtype, compiled)
    if compiled:
        compile_encoders(model)
    if name == "ddp":
        return DataParallel(accelerator, model, optimizer_name, weight_decay)
    if name == "fsdp2":
        from caco_scale.distributed.strategies.fsdp2 import FullyShardedDataParallel

        return FullyShardedDataParallel(accelerator, model, optimizer_name, weight_decay)
    from caco_scale.distributed.strategies.zero import Zero

    return Zero(accelerator, model, optimizer_name, weight_decay)


def compile_encoders(model, backend="inductor"):
    """Compile both encoders: once for each size of view, whatever follows (a graph of free sizes would be slower)."""
    model.query.compile(backend=backend, dynamic=False)
    model.key.compile(backend=backend, dynamic=False)


def check_combination(name, dtype, compiled):
    """Refuse by name what a strategy cannot do exactly, with what can."""
    if name.startswith("zero") and dtype == torch.float64:
        raise UserError(
            "precision.compute fp64 cannot be had from DeepSpeed, which keeps fp32 master parameters: use "
            "--config_file ds_configs/fsdp2.yaml or ds_configs/ddp.yaml"
        )
    if name in ("zero3", "fsdp2") and compiled:
        raise UserError(
            f"precision.compile is not supported where parameters are partitioned ({name}): use --config_file "
            "ds_configs/zero2.yaml, which still partitions the optimizer, or drop it"
        )


class Strategy:
    """What the step, evaluation and checkpoints need; what the strategies have in common.

    Attributes:
        name: the file in ds_configs/ that chooses it.
        device, rank, world_size: of this process.
        module: the :class:`~caco_scale.method.model.QueryKeyModel` itself; some strategies partition its parameters.
        optimizer: of the query encoder's parameters; some strategies give it partitioned tensors.
        partitions: what the optimizer's flat tensors are made of, ``[(tensor, FlatPartition)]``; None: it has none.
        partitioned_gradients: whether each rank holds other gradients, and has to ask whether all are finite.
    """

    partitions = None
    partitioned_gradients = False

    def __init__(self, accelerator, model):
        self.device = accelerator.device
        self.rank, self.world_size = accelerator.process_index, accelerator.num_processes
        assert self.world_size == collectives.world_size(), "accelerate and torch see different processes"
        self.module = convert_sync_batchnorm(model, self.device.type).to(self.device)

    def __call__(self, views):
        """Queries of all views and keys of the two global views: see ``QueryKeyModel.forward``."""
        raise NotImplementedError

    def micro_step(self, is_last):
        """Context of the forward and backward of one micro-batch of a step."""
        raise NotImplementedError

    def backward(self, loss):
        """Add the gradients of ``loss``. The bank's loss is already global: nothing is divided here."""
        loss.backward()

    def step(self, loss, lr):
        """One optimizer step at the learning rate ``lr``; False if it is not finite, and nothing moved.

        Every rank decides alike: the loss is global, and of the gradients each rank may hold a part.
        """
        raise NotImplementedError

    def update_key(self, momentum):
        """Exponential moving average: key parameters follow the query's, each rank moving what it holds."""
        ema_update(self.module.query, self.module.key, momentum)

    def synchronise_key(self):
        """Key parameters <- query parameters: the switch from the bank warm-up to the main schedule."""
        synchronise_key(self.module)

    @contextlib.contextmanager
    def evaluation_encoder(self):
        """The whole query encoder on every rank, to run as each rank likes, ranks apart. Entering is collective."""
        yield self.module.query

    def training_state(self, bank, values):
        """All that a checkpoint holds, of each tensor the part that this rank has: a ``checkpoint.State``."""
        return checkpoint.training_state(self.module, self.optimizer, bank, values, self.partitions)

    def restore(self, path, bank):
        """Load a checkpoint, of whatever strategy and world size, in place -> its values. Collective."""
        return checkpoint.restore(path, self.module, self.optimizer, bank, partitions=self.partitions)

    def optimizer_state_bytes(self):
        """Bytes of optimizer state on this rank."""
        return state_bytes(self.optimizer)

    def _step_if_finite(self, loss, gradients, lr):
        """The step of an optimizer that is ours to call. ``gradients``: what this rank holds of them."""
        norms = torch._foreach_norm(gradients) if gradients else []
        finite = torch.stack([loss.detach(), *norms]).isfinite().all()
        if self.partitioned_gradients:
            finite = collectives.all_reduce_(finite.float(), dist.ReduceOp.MIN)
        finite = bool(finite.item())
        if finite:
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return finite


class WholeCopy:
    """A plain copy of an encoder, without memory until it is filled with the parameters of a partitioned one."""

    def __init__(self, encoder):
        self._copy = copy.deepcopy(encoder).to("meta")

    @contextlib.contextmanager
    def of(self, encoder, device):
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


class DataParallel(Strategy):
    """Every process holds the whole model; gradients are averaged over ranks by torch's DDP."""

    name = "ddp"

    def __init__(self, accelerator, model, optimizer_name, weight_decay):
        super().__init__(accelerator, model)
        self.optimizer = build_optimizer(optimizer_name, self.module.query, weight_decay)
        init_optimizer_state(self.optimizer)
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
