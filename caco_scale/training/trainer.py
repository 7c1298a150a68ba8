"""A run from its start to its end: join the processes, refuse what cannot train, build, resume, loop."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from caco_scale.checkpoint.folder import read_values
from caco_scale.checkpoint.resume import checkpoint_to_resume
from caco_scale.checkpoint.write import Checkpointer
from caco_scale.config import Config
from caco_scale.data.workers import start_fork_server
from caco_scale.distributed.collectives import assert_equal_on_all_ranks
from caco_scale.distributed.launch import launched_strategy, start_processes
from caco_scale.distributed.strategies.build import check_combination
from caco_scale.errors import UserError
from caco_scale.run.directory import RunDirectory
from caco_scale.run.signals import Signals
from caco_scale.run.stopping import ControlFiles, check_job_end
from caco_scale.training.assemble import (
    TrainingData,
    build_schedule,
    build_strategy,
    parameter_dtype,
    resolve,
)
from caco_scale.training.loop import Loop


@dataclass(frozen=True)
class Outcome:
    """How a run ended: finished steps in all; what stopped it (SIGTERM, STOP, ...), None at its end; its directory."""

    step: int
    stopped_by: str | None
    directory: Path


def run(
    config: Config, signals: Signals | None = None, on_metrics: Callable[[dict], object] | None = None
) -> Outcome:
    """Train as ``config`` says until the schedule's end, ``run.max_steps``, or a reason to stop before.

    Every process of a launch calls it. A process may call it again when it has returned.

    Args:
        signals: already installed; None: no signal stops the run.
        on_metrics: called on the main rank with every record of metrics.jsonl.
    Raises:
        UserError: what the user can fix, before training where it can be known by then.
    """
    accelerator = start_processes(config.run.world_size, config.run.timeout_seconds)
    name = launched_strategy(os.environ)
    if accelerator.is_main_process:
        print(
            f"training sees {accelerator.num_processes} process(es), {accelerator.device}, {name}", flush=True
        )
    refuse_to_start(config, accelerator.is_main_process)
    config = resolve(config, accelerator)
    check_combination(name, parameter_dtype(config), config.precision.compile)
    if config.data.workers:
        start_fork_server()  # its imports overlap with building the model
    data = TrainingData(config, accelerator.process_index, accelerator.num_processes)
    schedule = build_schedule(config, data.order)
    end = min(schedule.total_steps, config.run.max_steps or schedule.total_steps)
    with RunDirectory(config.run.dir, accelerator.is_main_process) as directory:
        checkpointer = Checkpointer(directory.checkpoints, keep=config.run.keep_checkpoints)
        newest = checkpointer.latest()
        resumed = checkpoint_to_resume(config, newest, data.fingerprint, data.order.num_samples)
        step = read_values(resumed)["step"] if resumed else 0
        # One that was stopped after its last step still has its last evaluation before it.
        if resumed and step >= end and directory.interrupted_step() != step:
            checkpointer.close()
            if resumed == newest and directory.done_step() is None:  # killed between checkpoint and marker
                directory.mark_done(step)
            accelerator.print(
                f"{config.run.dir} has finished its {end:,} steps: a larger --optim.epochs or --run.max_steps "
                "continues it"
            )
            return Outcome(step, None, directory.path)
        strategy = build_strategy(config, name, accelerator)
        with Loop(
            config, strategy, data, schedule, end, directory, checkpointer, resumed, signals, on_metrics
        ) as loop:
            stopped_by = loop.train()
        return Outcome(loop.step, stopped_by, directory.path)


def refuse_to_start(config, is_main):
    """Raise on every rank what speaks against a start on any: the file STOP, a job's end that is none (UserError)."""
    complaint = None
    try:
        ControlFiles(config.run.dir, is_main).refuse_stop()
        if config.run.stop_before_end_seconds:
            check_job_end(os.environ)
    except UserError as error:
        complaint = str(error)
    assert_equal_on_all_ranks({}, "start", error=complaint)
