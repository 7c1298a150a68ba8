"""How the processes of a launch train one model: everything that differs between strategies, behind one interface.

``pretrain`` builds a strategy, ``step.train_step`` uses it. :class:`DataParallel` replicates the model on every
process (one process, several gloo processes on CPU, several NCCL processes on CUDA).
"""

import contextlib
import os
import warnings

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs

from caco_scale.distributed import collectives
from caco_scale.distributed.syncbn import convert_sync_batchnorm
from caco_scale.errors import UserError
from caco_scale.method.ema import ema_update
from caco_scale.optim.groups import build_optimizer, init_optimizer_state

# torch renames the option; both names mean the same here, and 2.11 knows only this one.
warnings.filterwarnings("ignore", message=".*broadcast_buffers.*", category=FutureWarning)

# What launchers leave in the environment of a process that is one of several.
PROCESS_COUNTS = ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS")


def start_processes(asked_world_size=0):
    """Join the launch's process group (gloo on CPU, NCCL on CUDA) and check its size.

    Args:
        asked_world_size: ``run.world_size``; 0 = take what comes, but refuse a launch that speaks of several
            processes and trains as one.
    Raises:
        UserError: training would not see the processes that were asked for.
    """
    several = int(os.environ.get("WORLD_SIZE", 1)) > 1
    on_cpu = not torch.cuda.is_available()
    # accelerate 1.15 believes to be rank 0 of 1 on a CPU unless it is told the backend; alone it refuses one.
    handlers = [InitProcessGroupKwargs(backend="gloo" if on_cpu else "nccl")] if several else []
    # Buffers are not broadcast (SyncBN keeps them equal); mixed precision belongs to the model's own forward.
    handlers.append(DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True))
    refuse_other_engines(os.environ)
    accelerator = Accelerator(cpu=on_cpu, mixed_precision="no", dynamo_backend="no", kwargs_handlers=handlers)
    check_world_size(accelerator.num_processes, asked_world_size, os.environ)
    return accelerator


def refuse_other_engines(environment):
    """A launch for DeepSpeed or FSDP is an error, never silently plain data parallelism."""
    for engine, variable in (("DeepSpeed", "ACCELERATE_USE_DEEPSPEED"), ("FSDP", "ACCELERATE_USE_FSDP")):
        if environment.get(variable, "false").lower() == "true":
            raise UserError(
                f"the launcher asks for {engine} ({variable}=true), which this version does not train with: "
                "use --config_file ds_configs/ddp.yaml"
            )


def check_world_size(world_size, asked, environment):
    """Refuse a launch that trains with other processes than its user believes.

    Args:
        world_size: processes in the group that training uses.
        asked: ``run.world_size``, 0 = unchecked.
        environment: the variables that the launcher set.
    """
    if asked:
        if asked != world_size:
            raise UserError(
                f"run.world_size asks for {asked} processes but training sees {world_size}: "
                "launch with accelerate launch --config_file ds_configs/ddp.yaml --num_processes "
                f"{asked}, or correct run.world_size"
            )
        return
    if world_size > 1:
        return
    counts = {name: environment[name] for name in PROCESS_COUNTS if environment.get(name, "1") != "1"}
    # `accelerate launch --cpu --num_processes 2` starts ONE process and leaves only the address of a second.
    if not counts and "MASTER_ADDR" in environment and "WORLD_SIZE" not in environment:
        counts = {"MASTER_ADDR": environment["MASTER_ADDR"]}
    if counts:
        spoken = ", ".join(f"{name}={value}" for name, value in counts.items())
        raise UserError(
            f"the launch speaks of several processes ({spoken}) but training sees 1: launch with accelerate launch "
            "--config_file ds_configs/ddp.yaml --num_processes N, or confirm one process by --run.world_size 1"
        )


class DataParallel:
    """Every process holds the whole model; gradients are averaged over ranks by torch's DDP.

    Attributes:
        device, rank, world_size: of this process.
        module: the :class:`~caco_scale.method.model.QueryKeyModel` itself.
        optimizer: of the query encoder's parameters.
    """

    def __init__(self, accelerator, model, optimizer_name, weight_decay):
        self.device = accelerator.device
        self.rank, self.world_size = accelerator.process_index, accelerator.num_processes
        assert self.world_size == collectives.world_size(), "accelerate and torch see different processes"
        if self.world_size > 1:
            model = convert_sync_batchnorm(model, self.device.type)
        self.module = model.to(self.device)
        self.optimizer = build_optimizer(optimizer_name, self.module.query, weight_decay)
        init_optimizer_state(self.optimizer)
        self._engine = accelerator.prepare_model(self.module)

    def __call__(self, views):
        """Queries of all views and keys of the two global views: see ``QueryKeyModel.forward``."""
        return self._engine(views)

    @contextlib.contextmanager
    def micro_step(self, is_last):
        """Forward and backward of one micro-batch; ranks exchange gradients in the last one only."""
        wait = self.world_size > 1 and not is_last
        with self._engine.no_sync() if wait else contextlib.nullcontext():
            yield

    def backward(self, loss):
        """Add the gradients of ``loss``. The bank's loss is already global: nothing is divided here."""
        loss.backward()

    def step(self, loss, lr):
        """One optimizer step at the learning rate ``lr``; False if it is not finite, and nothing moved.

        The loss is global, and gradients are equal on all ranks after their average: every rank decides alike.
        """
        gradients = [p.grad for p in self.module.query.parameters() if p.grad is not None]
        finite = torch.stack([loss.detach(), *torch._foreach_norm(gradients)]).isfinite().all().item()
        if finite:
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return finite

    def update_key(self, momentum):
        """Exponential moving average: key parameters follow the query's (no communication)."""
        ema_update(self.module.query, self.module.key, momentum)
