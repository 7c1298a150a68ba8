"""Join the processes of a launch, and refuse a launch that would train otherwise than its user believes.

The launcher's config file (``accelerate launch --config_file .../<strategy>.yaml``) chooses the strategy; it
reaches a process as environment variables. A launch gone wrong ends as N times one process, or as another strategy:
nothing fails, the loss falls, and the result is another one. So all of it is checked before anything is built.
"""

import contextlib
import ctypes
import os
import platform
import signal
import sys
import threading
import warnings
from collections.abc import Generator, Mapping
from datetime import timedelta
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs
from accelerate.utils import KwargsHandler

from caco_scale.distributed.collectives import set_exchange_timeout
from caco_scale.distributed.deepspeed_config import deepspeed_config
from caco_scale.distributed.environment import (
    MPI,
    TORCH,
    Place,
    check_device,
    check_parallelism,
    is_true,
    not_followed,
    only_what_is_handed_on,
    place_of,
)
from caco_scale.errors import UserError, one_line
from caco_scale.shipped import spelled

# torch renames the option; both names mean the same here, and 2.11 knows only this one.
warnings.filterwarnings("ignore", message=".*broadcast_buffers.*", category=FutureWarning)

# What launchers leave in the environment of a process that is one of several.
PROCESS_COUNTS = (*(names.size for names in (TORCH, *MPI)), "SLURM_STEP_NUM_TASKS")
NOTICE_SECONDS = 30  # after which it is said whom a start waits for
GRACE_SECONDS = 15  # beyond the limit, for torch to end the wait itself

# glibc's mallopt: freed memory from whose end on is given back, blocks from which size on are mapped alone.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
LARGEST_KEPT_BLOCK = 2**30


# ----------------------------------------------------------------------------------------------------------
# What the launch asks for


def launched_strategy(environment: Mapping[str, str]) -> str:
    """The strategy that the launcher's config file asks for, one of :data:`~caco_scale.flags.choices.STRATEGIES`.

    Raises:
        UserError: what this program does not train with, and what does the same.
    """
    if is_true(environment, "ACCELERATE_USE_DEEPSPEED"):
        return f"zero{deepspeed_config(environment)['zero_optimization']['stage']}"
    if is_true(environment, "ACCELERATE_USE_FSDP"):
        check_fsdp(environment)
        return "fsdp2"
    check_parallelism(environment)
    return "ddp"


def check_fsdp(environment: Mapping[str, str]) -> None:
    """Refuse the settings of an FSDP launch that would change what is computed, or that are not followed."""
    version = environment.get("FSDP_VERSION", "1")
    if version != "2":
        raise UserError(
            f"the launcher asks for FSDP version {version}, whose flat parameters LARS cannot tell apart: use "
            f"--config_file {spelled('ds_configs/fsdp2.yaml')} (fsdp_version: 2)"
        )
    if is_true(environment, "FSDP_OFFLOAD_PARAMS"):
        raise UserError(
            "the launcher asks for FSDP2 with parameters offloaded to the host, which is not supported: set "
            f"fsdp_offload_params: false, or use --config_file {spelled('ds_configs/zero3_offload.yaml')}"
        )


def offloads(environment: Mapping[str, str]) -> bool:
    """Whether the launch keeps DeepSpeed's master parameters and optimizer state in the host's memory."""
    if not is_true(environment, "ACCELERATE_USE_DEEPSPEED"):
        return False
    offload = deepspeed_config(environment)["zero_optimization"].get("offload_optimizer") or {}
    return offload.get("device", "none") != "none"


# ----------------------------------------------------------------------------------------------------------
# Joining


def start_processes(asked_world_size: int = 0, timeout_seconds: float = 1800) -> Accelerator:
    """Join the launch's process group (gloo on CPU, NCCL on CUDA) and check it.

    Args:
        asked_world_size: ``run.world_size``; 0 = take what comes, but refuse a launch that speaks of several
            processes and trains as one.
        timeout_seconds: ``run.timeout_seconds``: who waits longer for another in one exchange fails (gloo raises,
            NCCL's watchdog aborts the process), so that a rank that hangs ends the run.
    Raises:
        UserError: training would not see the processes or the strategy that were asked for; the processes do not meet
            within ``timeout_seconds``.
    """
    strategy = launched_strategy(os.environ)
    set_exchange_timeout(timeout_seconds)
    # By torch's default convolutions in fp32 read 10 bits of mantissa.
    torch.backends.cudnn.allow_tf32 = False
    on_cpu = not torch.cuda.is_available() or is_true(os.environ, "ACCELERATE_USE_CPU")
    if on_cpu:
        refuse_lost_driver(os.environ)
        keep_freed_memory()
    place = place_of(os.environ, on_cpu, asked_world_size)
    check_device(os.environ, "cpu" if on_cpu else "cuda")
    is_true(os.environ, "ACCELERATE_CPU_AFFINITY")
    if not on_cpu and place.local_rank >= torch.cuda.device_count():
        raise UserError(
            f"LOCAL_RANK is {place.local_rank}, but this machine has {torch.cuda.device_count()} GPU(s): launch as "
            "many processes here (--num_processes), or unset LOCAL_RANK, as another launch's"
        )
    # accelerate 1.15 believes to be rank 0 of 1 on a CPU unless it is told the backend; alone it refuses one.
    grouped = place.is_launched or strategy.startswith("zero")
    backend, timeout = "gloo" if on_cpu else "nccl", timedelta(seconds=timeout_seconds)
    handlers: list[KwargsHandler] = (
        [InitProcessGroupKwargs(backend=backend, timeout=timeout)] if grouped else []
    )
    # Buffers are not broadcast (SyncBN keeps them equal); mixed precision belongs to the model's own forward.
    handlers.append(DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True))
    options: dict[str, Any] = {"mixed_precision": "no", "dynamo_backend": "no", "kwargs_handlers": handlers}
    with _meeting(place, timeout_seconds):
        if strategy.startswith("zero"):
            accelerator = _start_deepspeed(on_cpu, options, place)
        else:
            # FSDP2 is ours: accelerate's does not synchronise gradients on a CPU.
            with only_what_is_handed_on(place):
                accelerator = Accelerator(cpu=on_cpu, **options)
    check_world_size(accelerator.num_processes, asked_world_size, os.environ)
    for line in not_followed(os.environ):
        accelerator.print(f"note: {line}", flush=True)
    return accelerator


@contextlib.contextmanager
def _meeting(place: Place, seconds: float) -> Generator[None]:
    """Processes meet within it, or a UserError says that they did not. It ends whatever torch waits for.

    Args:
        seconds: ``run.timeout_seconds``.
    """
    if not place.is_launched:
        with _named("this process cannot start as the environment says"):
            yield
        return
    whom = (
        f"{place.size} process(es) at {place.address}, for {seconds:g} seconds at most (run.timeout_seconds)"
    )
    unset = " ".join(name for name in (*place.names, "MASTER_ADDR") if name in os.environ)
    where = f"start the others, or correct MASTER_ADDR and MASTER_PORT; to train alone, unset {unset}"

    def give_up():
        print(f"error: rank {place.rank}: waited for {whom}, in vain: {where}", file=sys.stderr, flush=True)
        os._exit(2)

    notice = threading.Timer(NOTICE_SECONDS, lambda: print(f"rank {place.rank} waits for {whom}", flush=True))
    timers = (threading.Timer(seconds + GRACE_SECONDS, give_up), *([] if place.local_rank else [notice]))
    for timer in timers:
        timer.daemon = True
        timer.start()
    main = threading.current_thread() is threading.main_thread()
    # torch waits where Python runs no handler: the kernel's own.
    by_kernel = main and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if by_kernel:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        with _named(f"waited for {whom}, in vain", where):
            yield
    finally:
        if by_kernel:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        for timer in timers:
            timer.cancel()


@contextlib.contextmanager
def _named(what, fix="unset what another launch has left there (ACCELERATE_*, WORLD_SIZE, RANK)"):
    """What torch and accelerate raise while they start, as a UserError."""
    try:
        yield
    except UserError:
        raise
    except (RuntimeError, ValueError, OSError, NotImplementedError) as error:
        raise UserError(f"{what} ({one_line(error)[:400]}): {fix}") from error


def keep_freed_memory() -> None:
    """Let this process keep what its tensors free for the next ones, as torch does by itself on a GPU.

    By default glibc gives large blocks back to the system, which hands them out again page by page, zeroed: that was a
    sixth of the demo's CPU time. Memory stays at its peak instead of falling between steps.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_THRESHOLD, LARGEST_KEPT_BLOCK)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def _start_deepspeed(on_cpu, options, place):
    """An Accelerator with DeepSpeed's engine, or a UserError that says why there would be none."""
    if is_true(os.environ, "ACCELERATE_USE_CPU"):
        raise UserError(
            "the launcher asks for DeepSpeed and for ACCELERATE_USE_CPU, under which accelerate leaves DeepSpeed out: "
            f"drop --cpu (use_cpu); {spelled('ds_configs/zero*.yaml')} run on a CPU without it"
        )
    if "LOCAL_RANK" not in os.environ:
        raise UserError(
            "ACCELERATE_USE_DEEPSPEED is set but no launcher gave this process a rank: launch with accelerate launch "
            f"--config_file {spelled('ds_configs/zero2.yaml')} --num_processes N -m caco_scale.pretrain ..."
        )
    if on_cpu:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import_deepspeed()
    from accelerate import DeepSpeedPlugin
    from accelerate.state import AcceleratorState

    config = deepspeed_config(os.environ)
    with only_what_is_handed_on(place):
        if not AcceleratorState._shared_state:  # a second run of one process has the first one's plugin
            options["deepspeed_plugin"] = DeepSpeedPlugin(hf_ds_config=config, zero3_init_flag=False)
            # Only a word for DeepSpeed's log: the loader gives the batches.
            options["deepspeed_plugin"].deepspeed_config["train_micro_batch_size_per_gpu"] = 1
        accelerator = Accelerator(**options)
    if accelerator.distributed_type.value != "DEEPSPEED":
        raise UserError(
            f"the launcher asks for DeepSpeed but accelerate trains with {accelerator.distributed_type.value}: launch "
            f"with accelerate launch --config_file {spelled('ds_configs/zero2.yaml')} --num_processes N "
            "-m caco_scale.pretrain ..."
        )
    return accelerator


def import_deepspeed() -> ModuleType:
    """DeepSpeed, without the all-reduce over shared memory that it would compile on a CPU for a minute.

    That one serves tensor-parallel inference alone, and needs a compiler and ninja.

    Raises:
        UserError: DeepSpeed, or what accelerate needs beside it, is not installed.
    """
    os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "error")
    try:
        import deepspeed
        import deepspeed.ops
        import transformers  # noqa: F401, accelerate's DeepSpeed plugin imports it at every stage
    except ImportError as error:
        raise UserError(
            f"the launcher asks for DeepSpeed, but {error.name or error} is not installed: pip install {error.name}, "
            f"or use --config_file {spelled('ds_configs/fsdp2.yaml')}"
        ) from None
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


# ----------------------------------------------------------------------------------------------------------
# What came of it


def refuse_lost_driver(environment: Mapping[str, str], devices: Path = Path("/dev")) -> None:
    """An NVIDIA machine on which torch sees no GPU trains on its CPU, hundreds of times more slowly: say so.

    ``CUDA_VISIBLE_DEVICES=""`` (or -1), or ``accelerate launch --cpu``, says that the CPU is meant.
    """
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    if visible in ("", "-1", "NoDevFiles") or is_true(environment, "ACCELERATE_USE_CPU"):
        return
    signs = [f"CUDA_VISIBLE_DEVICES={visible}"] if visible else []
    signs += [str(device) for device in sorted(devices.glob("nvidia[0-9]*"))]
    # The one is a number of GPUs, the other a list of theirs, in which 0 is the first.
    for name, none in (("SLURM_GPUS_ON_NODE", ("", "0")), ("SLURM_JOB_GPUS", ("",))):
        if environment.get(name, "") not in none:
            signs.append(f"{name}={environment[name]}")
    if signs:
        raise UserError(
            f"this machine speaks of GPUs ({', '.join(signs[:3])}) but torch {torch.__version__} sees none: repair the "
            "driver (nvidia-smi) or install a torch for it, or set CUDA_VISIBLE_DEVICES= to train on the CPU"
        )


def check_world_size(world_size: int, asked: int, environment: Mapping[str, str]) -> None:
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
                f"launch with accelerate launch --config_file {spelled('ds_configs/ddp.yaml')} --num_processes "
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
            f"--config_file {spelled('ds_configs/ddp.yaml')} --num_processes N, or confirm one process by "
            "--run.world_size 1"
        )
