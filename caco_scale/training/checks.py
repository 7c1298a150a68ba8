"""What must be right before a run trains. Each thing is checked here, and said here, once.

A check takes a :class:`Start`, adds to it what later ones need, and returns what it found: a line, or None for nothing
worth one. A :class:`~caco_scale.errors.UserError` says what is wrong. Training goes to the first failure, the doctor to
the end (a check whose ground an earlier one did not find returns None). Nothing is written.

Shapes: N global batch, R processes, B = N / R a process's share of it, b a micro-batch.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from caco_scale import config as configuration
from caco_scale.checkpoint.folder import check_files, read_values
from caco_scale.checkpoint.resume import checkpoint_to_resume, goes_on_from
from caco_scale.config import Config
from caco_scale.data.in_memory import memory_here, room_for
from caco_scale.data.labels import lacking_classes, with_classes_of
from caco_scale.data.listed_files import Listings
from caco_scale.data.order import share_size
from caco_scale.data.store.base import ALL
from caco_scale.distributed.collectives import assert_equal_on_all_ranks
from caco_scale.distributed.compilation import lacking
from caco_scale.distributed.recompute import recompute_blocks
from caco_scale.distributed.strategies.build import check_combination
from caco_scale.errors import UserError
from caco_scale.flags.choices import BATCH_RULES
from caco_scale.method.contrast import MIN_TEMPERATURE
from caco_scale.method.encoders import refuse_views, skeleton
from caco_scale.run.directory import check_place
from caco_scale.run.stopping import ControlFiles, check_job_end
from caco_scale.run.trackers import check_trackers
from caco_scale.training.assemble import (
    TrainingData,
    build_schedule,
    encoder_around,
    is_compiled,
    parameter_dtype,
)
from caco_scale.weights.load import Wanted
from caco_scale.weights.start import StartingWeights, load_start


@dataclass
class Start:
    """A run that is about to start: what is settled of it, and what its checks have found.

    Attributes:
        config: with ``precision`` settled.
        strategy: one of :data:`~caco_scale.flags.choices.STRATEGIES`.
        rank, world_size, device: of this process among those that will train.
        newest: the newest complete checkpoint of the run directory, which whoever starts looks for.
        weights: of :func:`check_weights`: what a fresh start begins with; None: random weights, or a run that goes on.
        micro_batch_size: b, of :func:`check_batch`; 0 before.
        data: of :func:`check_data`; None before, or where the demo's is not built yet.
        asked_weights: ``model.weights`` as the user gave it, which on the hub may be a branch.
        listings: of the run's sets, where it keeps them; None: nowhere.
        share_of_node: which of the processes of this node this is, and of how many: they share out the shards' files.
        resumed: of :func:`check_resume`: the checkpoint that the run goes on from; None: a fresh start.
    """

    config: Config
    strategy: str
    rank: int
    world_size: int
    device: torch.device
    newest: Path | None = None
    weights: StartingWeights | None = None
    asked_weights: str = ""
    micro_batch_size: int = 0
    data: TrainingData | None = None
    listings: Listings | None = None
    share_of_node: tuple[int, int] = ALL
    resumed: Path | None = None


Check = Callable[[Start], str | None]


def check_stop(start: Start) -> None:
    """The user's file STOP, on rank 0, and a job's end that is none."""
    ControlFiles(start.config.run.dir, is_main=start.rank == 0).refuse_stop()
    if start.config.run.stop_before_end_seconds:
        check_job_end(os.environ)


def check_run_dir(start: Start) -> str | None:
    """Whether the run directory can be made and written, on rank 0."""
    return check_place(start.config.run.dir) if start.rank == 0 else None


def check_run_trackers(start: Start) -> None:
    """Trackers that accelerate does not have, or that are not installed, on rank 0, which alone has any."""
    if start.rank == 0:
        check_trackers(start.config.run.trackers)


def check_precision(start: Start) -> None:
    """Number formats, and compiled code, that the strategy or this machine cannot do."""
    config = start.config
    compiled = is_compiled(config)
    check_combination(start.strategy, parameter_dtype(config), compiled)
    if compiled and config.model.checkpoint_activations:
        raise UserError(
            "precision.compile chooses by itself what is computed twice: give --model.checkpoint_activations false, or "
            "--precision.compile false"
        )
    if compiled and (lacks := lacking(start.device.type)):
        raise UserError(f"precision.compile needs {lacks}; or give --precision.compile false")
    if (
        start.device.type == "cuda"
        and config.precision.compute == "bf16"
        and not torch.cuda.is_bf16_supported()
    ):
        raise UserError("this GPU does not compute in bf16: give --precision.compute fp32")


def check_temperatures(start: Start) -> None:
    """A temperature that the bank would refuse only at the end of its warm-up."""
    lowest = MIN_TEMPERATURE[parameter_dtype(start.config)]
    for name in ("loss.temperature", "bank.temperature", "bank.warmup_temperature"):
        value = configuration.flatten(start.config)[name]
        if value < lowest:
            raise UserError(f"{name} is {value:g}: give at least {lowest} (exp(-2 / T) must stay a number)")


def check_model(start: Start) -> None:
    """Whether there is such an encoder and it takes the views; tried without memory where that can be."""
    model, views, channels = start.config.model, start.config.views, start.config.data.channels
    backbone, num_features = skeleton(model.arch, model.stem, model.options, channels)
    if model.checkpoint_activations and not recompute_blocks(backbone):
        raise UserError(
            f"model.checkpoint_activations: {model.arch} has no blocks that repeat: give "
            "--model.checkpoint_activations false"
        )
    sizes = [views.size, *[views.local_size] * bool(views.num_local_crops)]
    refuse_views(model.arch, backbone, sizes, channels)
    with torch.device("meta"):
        encoder_around(start.config, backbone, num_features)


def check_weights(start: Start) -> str | None:
    """What the backbones of a fresh start begin with; a run that goes on has its own, and the file may be gone."""
    config = start.config
    if not config.model.weights or goes_on_from(config):
        return None
    model = config.model
    wanted = Wanted(model.arch, model.stem, model.options, config.data.channels)
    start.weights = load_start(model.weights, wanted)
    return "; ".join(line.strip() for line in start.weights.lines(config.views.mean, config.views.std))


def check_batch(start: Start) -> str:
    """How the global batch is shared out."""
    total, processes = start.config.data.global_batch_size, start.world_size
    share = share_size(total, processes)
    micro = min(start.config.data.micro_batch_size or share, share)
    if share % micro:
        raise UserError(
            f"data.micro_batch_size {micro} does not divide the {share} images that each of {processes} process(es) "
            f"has of a global batch of {total}: give a divisor of {share}"
        )
    rule = start.config.bank.rule
    if rule in BATCH_RULES and micro < share:
        raise UserError(
            f"bank.rule {rule} takes its negatives from one forward, which data.micro_batch_size {micro} makes "
            f"{micro * processes} images of {total}: give --data.micro_batch_size 0, or more processes"
        )
    if micro * processes < 2:
        raise UserError(
            "BatchNorm needs at least 2 images in a forward over all processes: raise data.micro_batch_size or "
            f"data.global_batch_size {total}"
        )
    start.micro_batch_size = micro
    steps = f" in {share // micro} micro-batches of {micro:,}" if micro < share else ""
    lr = start.config.optim.lr * total / 256
    return f"global batch {total:,} = {processes} process(es) x {share:,} images{steps}; peak lr {lr:g}"


def check_data(start: Start) -> str | None:
    """The training images, opened as training opens them."""
    shards = start.config.data.shards
    if not start.micro_batch_size:
        return None
    if configuration.makes_its_data(start.config) and not Path(shards, "manifest.json").exists():
        return f"the demo's data will be built in {Path(shards).parent}"
    data = TrainingData(start.config, start.rank, start.world_size, start.listings)
    data.store.check(start.share_of_node)
    start.data, order = data, data.order
    url = data.store.url
    return (
        f"{url}: {order.num_samples:,} images, {order.steps_per_epoch:,} steps an epoch, {order.lanes} lanes"
    )


def check_room(start: Start) -> str | None:
    """Whether this node has the memory that ``data.in_memory`` asks for; a run's processes agree on it instead."""
    wanted = start.config.data.in_memory
    if start.data is None or wanted == "false":
        return None
    return room_for(start.data.store, wanted, memory_here())[1]


def check_evaluation(start: Start) -> str | None:
    """An evaluation that would fail after many epochs of training."""
    if start.data is None or start.data.val_store is None:
        return None
    manifest, val_store, k = start.data.store.manifest, start.data.val_store, start.config.eval.knn_k
    val_store.check(start.share_of_node)
    unlabelled = manifest.num_samples - sum(manifest.class_counts)
    if unlabelled:
        raise UserError(
            f"{unlabelled:,} of {manifest.num_samples:,} training images have no class: give each one a class folder, "
            "or leave data.val_shards empty"
        )
    absent = lacking_classes(
        with_classes_of(start.data.store, val_store, "kNN while training (data.val_shards)")
    )
    if k > manifest.num_samples:
        raise UserError(f"eval.knn_k {k} is more than the {manifest.num_samples:,} training images: lower it")
    count = f"{val_store.manifest.num_samples:,} images to evaluate on"
    return f"{val_store.url}: {count}; {absent}" if absent else f"{val_store.url}: {count}"


def check_resume(start: Start) -> str | None:
    """What is in the run directory already: whether the run would go on from it."""
    if start.data is None:
        return None
    fingerprint, num_samples = start.data.fingerprint, start.data.order.num_samples
    start.resumed = checkpoint_to_resume(start.config, start.newest, fingerprint, num_samples)
    if start.resumed:
        _check_new_set(start, read_values(start.resumed))
    return f"resumes from {start.resumed}" if start.resumed else "a fresh start"


def _check_new_set(start, values):
    """UserError where ``data.relist`` would have a run repeat the bank's switch, or leave it out."""
    step, steps = values["step"], start.data.order.steps_per_epoch
    before = round(step / values["epoch"]) if step else steps
    old, new = (build_schedule(start.config, n).warmup_steps for n in (before, steps))
    if (step >= old) != (step >= new):
        raise UserError(
            f"data.relist: with {steps:,} steps an epoch instead of {before:,} the bank warm-up ends at step {new:,} "
            f"instead of {old:,}, and {start.resumed} is at {step:,}, between them: give another run.dir"
        )


def check_checkpoint(start: Start) -> str | None:
    """Whether every byte of the checkpoint is as it was written; training itself sees that as it reads it."""
    if start.resumed is None:
        return None
    values = read_values(start.resumed)
    check_files(start.resumed, values)
    return f"{start.resumed.name}: {sum(values['files'].values()) / 1e6:,.1f} MB as they were written"


BEFORE_DATA: tuple[Check, ...] = (
    *(
        check_stop,
        check_run_dir,
        check_run_trackers,
        check_precision,
        check_temperatures,
        check_model,
        check_weights,
        check_batch,
    ),
)
OF_DATA: tuple[Check, ...] = (check_data, check_evaluation)
OF_RUN: tuple[Check, ...] = (check_resume,)  # by a process that has the run directory to itself
CHECKS = (*BEFORE_DATA, *OF_DATA, check_room, *OF_RUN, check_checkpoint)


def refuse_to_start(start: Start, checks: tuple[Check, ...]) -> None:
    """Raise the first failure of any rank on every rank, so that none waits for another. Collective.

    Raises:
        UserError: that failure, with the rank's number where there are several.
    """
    complaint = None
    try:
        for check in checks:
            check(start)
    except UserError as error:
        complaint = str(error)
    assert_equal_on_all_ranks({}, "start", error=complaint)
