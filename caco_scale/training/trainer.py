"""A run from its start to its end: join the processes, refuse what cannot train, build, resume, loop."""

import contextlib
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from caco_scale import config as configuration
from caco_scale.checkpoint.folder import read_values
from caco_scale.checkpoint.write import Checkpointer
from caco_scale.config import Config
from caco_scale.config.fit import auto_fields
from caco_scale.data.fork_server import start_fork_server
from caco_scale.distributed.collectives import assert_equal_on_all_ranks, gather_objects
from caco_scale.distributed.compilation import KEPT_IN, code_kept_in, failures_explained
from caco_scale.distributed.environment import share_of_node
from caco_scale.distributed.launch import launched_strategy, start_processes
from caco_scale.errors import UserError
from caco_scale.run.directory import RunDirectory
from caco_scale.run.patience import Patience
from caco_scale.run.signals import Signals
from caco_scale.training.assemble import (
    build_schedule,
    build_strategy,
    is_compiled,
    make_data,
    resolve_precision,
)
from caco_scale.training.checks import BEFORE_DATA, OF_DATA, OF_RUN, Start, refuse_to_start
from caco_scale.training.evaluations import owes_evaluation
from caco_scale.training.fit import fit_to_set, list_sets, listings_of
from caco_scale.training.loop import Loop
from caco_scale.weights.start import pin_weights


@dataclass(frozen=True)
class Outcome:
    """How a run ended: finished steps in all; what stopped it (SIGTERM, STOP, ...), None at its end; its directory.

    ``config``: with everything settled that was auto. ``total_steps``: of its whole schedule. ``trained``: this start
    did; False where the run had finished before.
    """

    step: int
    stopped_by: str | None
    directory: Path
    config: Config = field(default_factory=Config, compare=False)
    total_steps: int = field(default=0, compare=False)
    trained: bool = field(default=True, compare=False)


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
    with contextlib.ExitStack() as beginning:
        if signals is not None:
            beginning.enter_context(signals.ending_at_once())
        return _run(config, signals, on_metrics, beginning)


def _run(config, signals, on_metrics, beginning):
    """``beginning``: what holds until the first step."""
    accelerator = start_processes(config.run.world_size, config.run.timeout_seconds)
    name = launched_strategy(os.environ)
    if accelerator.is_main_process:
        print(
            f"training sees {accelerator.num_processes} process(es), {accelerator.device}, {name}", flush=True
        )
    config, line = resolve_precision(config, accelerator.device, name)
    accelerator.print(line)
    if auto_fields(config):  # they follow the set
        make_data(config, accelerator)
    listings = listings_of(config, accelerator.print)
    config, lines = fit_to_set(config, listings)
    for line in lines:
        accelerator.print(line)
    start = Start(config, name, accelerator.process_index, accelerator.num_processes, accelerator.device)
    start.listings = listings
    start.share_of_node = share_of_node(os.environ, accelerator.num_processes)
    assert_equal_on_all_ranks(configuration.same_on_all_ranks(config), "start")
    start.asked_weights = config.model.weights
    config, line = pin_weights(config)
    start.config = config
    if line:
        accelerator.print(line)
    refuse_to_start(start, BEFORE_DATA)
    make_data(config, accelerator)
    if config.data.workers:
        start_fork_server()  # its imports overlap with building the model
    list_sets(config, listings)
    refuse_to_start(start, OF_DATA)
    data = start.data
    assert data is not None
    assert_equal_on_all_ranks({"data set (its fingerprint)": data.fingerprint}, "start")
    data.make_room()
    schedule = build_schedule(config, data.order.steps_per_epoch)
    end = min(schedule.total_steps, config.run.max_steps or schedule.total_steps)
    disk = Patience(
        f"run.dir {config.run.dir}",
        config.run.timeout_seconds,
        lambda: signals.requested if signals else None,
    )
    with RunDirectory(config.run.dir, accelerator.is_main_process, disk) as directory:
        checkpointer = Checkpointer(directory.checkpoints, keep=config.run.keep_checkpoints, disk=disk)
        start.newest = checkpointer.latest()
        refuse_to_start(start, OF_RUN)
        resumed = gather_objects(start.resumed)[0]  # another run, if it is one of that, may save meanwhile
        values = read_values(resumed) if resumed else {}
        step = values.get("step", 0)
        killed = resumed is not None and resumed == start.newest and directory.done_step() is None
        # Its last evaluation may still be before it.
        owes = step >= end and killed and owes_evaluation(config, data, directory, values, end)
        if resumed and step >= end and not gather_objects(owes)[0]:
            checkpointer.prune()
            checkpointer.close()
            if killed:  # between its last checkpoint, or evaluation, and the marker
                directory.mark_done(step)
            accelerator.print(
                f"{config.run.dir} has finished its {end:,} steps: a larger --optim.epochs or --run.max_steps "
                "continues it"
            )
            return Outcome(step, None, directory.path, config, schedule.total_steps, trained=False)
        with contextlib.ExitStack() as training:
            if is_compiled(config):
                training.enter_context(failures_explained())
                accelerator.print(training.enter_context(code_kept_in(directory.path / KEPT_IN)))
            strategy, weights_sha256 = _build(config, name, accelerator, start, directory, resumed)
            loop = Loop(
                config,
                strategy,
                data,
                schedule,
                end,
                directory,
                checkpointer,
                resumed,
                signals,
                on_metrics,
                weights_sha256,
            )
            training.enter_context(loop)
            beginning.close()
            stopped_by = loop.train()
        return Outcome(loop.step, stopped_by, directory.path, config, schedule.total_steps)


def _build(config, name, accelerator, start, directory, resumed):
    """The strategy around the run's model, and the sha256 of what a fresh start begins with, None where at random."""
    weights, start.weights = start.weights, None  # as large as a backbone: not held while the run trains
    if resumed or not config.model.weights:
        return build_strategy(config, name, accelerator), None
    sha256 = weights and weights.sha256
    assert_equal_on_all_ranks({"sha256": sha256}, f"model.weights {config.model.weights}")
    if weights is None:
        raise UserError(
            f"the checkpoints of {config.run.dir} have gone while this run started: start it again"
        )
    for line in weights.lines(config.views.mean, config.views.std):
        accelerator.print(line)
    directory.write_weights(weights.facts(start.asked_weights))
    return build_strategy(config, name, accelerator, weights), sha256
