"""Choose and build the strategy of a launch, and refuse what it could not train exactly."""

import torch
from accelerate import Accelerator
from torch import nn

from caco_scale.distributed.compilation import compile_blocks, compile_encoders
from caco_scale.distributed.strategies.base import OptimizerBuilder, Strategy
from caco_scale.distributed.strategies.ddp import DataParallel
from caco_scale.distributed.strategies.fsdp2 import FullyShardedDataParallel
from caco_scale.distributed.strategies.zero import Zero
from caco_scale.errors import UserError
from caco_scale.shipped import spelled


def build_strategy(
    name: str,
    accelerator: Accelerator,
    model: nn.Module,
    build_optimizer: OptimizerBuilder,
    compiled: bool = False,
    backend: str = "inductor",
) -> Strategy:
    """The strategy ``name`` (:data:`~caco_scale.flags.choices.STRATEGIES`) around a fresh model. Collective.

    Args:
        accelerator: of :func:`~caco_scale.distributed.launch.start_processes`.
        model: a :class:`~caco_scale.method.model.QueryKeyModel` with the same weights on every rank.
        build_optimizer: makes the optimizer of the query encoder. One that has to know what the flat tensors of
            an engine are made of has a method ``attach(engine)``, as LARS has.
        compiled: whether the encoders are to be compiled, by a ``backend`` of torch.compile.
    Raises:
        UserError: a combination that would not train the same model.
    """
    check_combination(name, next(model.parameters()).dtype, compiled)
    if name == "fsdp2":
        strategy = FullyShardedDataParallel(accelerator, model, build_optimizer)
        if compiled:  # only now: the copy of the encoder that it keeps for evaluations has no compiled parts
            compile_blocks(strategy.module, backend)
        return strategy
    if compiled:
        compile_encoders(model, backend)
    if name == "ddp":
        return DataParallel(accelerator, model, build_optimizer)
    return Zero(accelerator, model, build_optimizer)


def check_combination(name: str, dtype: torch.dtype, compiled: bool) -> None:
    """Refuse by name what a strategy cannot do exactly, with what can.

    Raises:
        UserError: fp64 under ZeRO; compiled encoders under ZeRO-3.
    """
    if name.startswith("zero") and dtype == torch.float64:
        raise UserError(
            "precision.compute fp64 cannot be had from DeepSpeed, which keeps fp32 master parameters: use "
            f"--config_file {spelled('ds_configs/fsdp2.yaml')} or {spelled('ds_configs/ddp.yaml')}"
        )
    if name == "zero3" and compiled:
        raise UserError(
            "precision.compile is not supported where DeepSpeed partitions the parameters (zero3): use --config_file "
            f"{spelled('ds_configs/fsdp2.yaml')}, which partitions them, too, {spelled('ds_configs/zero2.yaml')}, "
            "or give --precision.compile false"
        )
