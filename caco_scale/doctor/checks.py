"""Check machine, launch, configuration, data and storage before a run, and say what to fix.

    accelerate launch --config_file "$(caco path ds_configs/zero2.yaml)" --num_processes N -m caco_scale.doctor ...
    python -m caco_scale.doctor [RECIPE] [--flags]                  as one process would train
    python -m caco_scale.doctor [RECIPE] [--flags] --processes 32 --strategy zero2      as they would, asked of one

One line per finding: ``ok``; ``note``; ``warn``, where the run would train, but not well, or perhaps not on the
machines to come; ``FAIL``, where it would fail. The last two say what helps. Exit code 1 with any of these two, so that
a script can ask before it queues a job. All ranks check, rank 0 speaks; nothing is trained, and nothing written.
"""

import os
import shutil
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from caco_scale import config as configuration
from caco_scale.config import Config
from caco_scale.errors import UserError, one_line
from caco_scale.flags.choices import BATCH_RULES, STRATEGIES
from caco_scale.run import packages
from caco_scale.shipped import spelled

if TYPE_CHECKING:  # imported where they are used: a torch that is missing is a finding
    from caco_scale.data.store.base import Store
    from caco_scale.training.assemble import TrainingData
    from caco_scale.training.checks import Start

OFFLOADING = "zero3_offload"  # the file of ds_configs/ that is no strategy of its own
MEASURED_IMAGES = 64  # in each of two batches, the second of which is timed
DEEPSPEED = ("deepspeed", "transformers")  # accelerate's DeepSpeed plugin imports transformers at every stage


@dataclass(frozen=True)
class Finding:
    """``status``: ok, note, warn or FAIL. ``text``: what was found, of the last two with what helps."""

    status: str
    text: str


def ok(text: str) -> Finding:
    return Finding("ok", text)


def note(text: str) -> Finding:
    return Finding("note", text)


def warn(text: str) -> Finding:
    return Finding("warn", text)


def fail(text: str) -> Finding:
    return Finding("FAIL", text)


def look_first(config: Config) -> list[Finding]:
    """What this process sees is not there, as training looks before it imports torch -> findings, one at most."""
    try:
        from caco_scale.training.places import look_early

        look_early(config)
    except UserError as error:
        return [fail(one_line(error))]
    except ModuleNotFoundError:  # of a package that check_versions names
        pass
    return []


def check_versions(
    strategy: str, version: Callable[[str], str | None] = packages.installed_version
) -> list[Finding]:
    """Whether the packages that a strategy needs are there and new enough -> findings. ``version``: name -> str."""
    zero = strategy.startswith("zero")
    findings = [ok(f"python {sys.version.split()[0]}")]
    for requirement in packages.requirements():
        name, found = requirement.name, version(requirement.name)
        if name in DEEPSPEED and not zero:
            continue
        if found is None:
            why = ", which accelerate needs for DeepSpeed" if name == "transformers" else ""
            instead = f", or use {spelled('ds_configs/fsdp2.yaml')}" if name in DEEPSPEED else ""
            findings.append(fail(f"{name} is not installed{why}: pip install {name}{instead}"))
        elif not packages.is_new_enough(requirement, found):
            lowest = str(requirement.specifier).removeprefix(">=")
            findings.append(fail(f"{name} {found} is older than {lowest}: pip install -U '{requirement}'"))
        else:
            findings.append(ok(f"{name} {found}"))
    if zero:
        compiler = version("ninja") and (shutil.which("c++") or shutil.which("g++"))
        findings.append(
            note("ninja and a C++ compiler are there, should DeepSpeed want to build a kernel")
            if compiler
            else note(
                "no ninja or no C++ compiler: DeepSpeed's own kernels cannot be built; none of them is used"
            )
        )
    return findings


def found(check: Callable[..., str | None], *arguments: Any) -> list[Finding]:
    """A check's own words as findings: what it returns, or the error that it raises."""
    try:
        text = check(*arguments)
    except UserError as error:
        return [fail(one_line(error))]
    return [ok(text)] if text else []


def join_launch(config: Config) -> tuple[list[Finding], "Start | None"]:
    """Join the launch as training does -> (findings, Start or None)."""
    import torch

    from caco_scale.distributed.launch import launched_strategy, start_processes
    from caco_scale.training.assemble import resolve_precision
    from caco_scale.training.checks import Start

    try:
        accelerator = start_processes(config.run.world_size, config.run.timeout_seconds)
        strategy = launched_strategy(os.environ)
    except UserError as error:
        return [fail(one_line(error))], None
    device, processes = accelerator.device, accelerator.num_processes
    backend = torch.distributed.get_backend() if torch.distributed.is_initialized() else "none, one process"
    findings = [ok(f"strategy {strategy}, {processes} process(es), backend {backend}, {device}")]
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        findings.append(ok(f"{properties.name}, {properties.total_memory / 1e9:.1f} GB"))
    config, line = resolve_precision(config, device, strategy)
    return [*findings, ok(line)], Start(config, strategy, accelerator.process_index, processes, device)


@dataclass(frozen=True)
class Planned:
    """A launch to come: its strategy and number of processes; ``gpu_gb``: of a GPU there, None = as here or unknown."""

    strategy: str
    processes: int
    gpu_gb: float | None = None


def plan_launch(config: Config, plan: Planned) -> tuple[list[Finding], "Start | None"]:
    """What of a launch can be known before it -> (findings, Start or None): rank 0 of so many, on a device as here."""
    import torch

    from caco_scale.distributed.launch import refuse_lost_driver
    from caco_scale.training.assemble import resolve_precision
    from caco_scale.training.checks import Start

    processes, strategy = plan.processes, plan.strategy.removesuffix("_offload")
    if strategy not in STRATEGIES:
        return [fail(f"--strategy {strategy}: give one of {', '.join(STRATEGIES)}, {OFFLOADING}")], None
    if config.run.world_size not in (0, processes):
        return [fail(f"run.world_size {config.run.world_size}, but {processes} processes are planned")], None
    cuda = torch.cuda.is_available()
    try:
        if not cuda and not plan.gpu_gb:
            refuse_lost_driver(os.environ)
    except UserError as error:
        return [fail(one_line(error))], None
    device = torch.device("cuda" if cuda else "cpu")
    where = f"{device}"
    if plan.gpu_gb:
        where = f"GPUs of {plan.gpu_gb:g} GB"
        if config.precision.compute == "auto":  # as on those
            config = configuration.replace(config, precision__compute="bf16")
    config, line = resolve_precision(config, device, strategy)
    findings = [ok(f"planned: strategy {strategy}, {processes} process(es), {where}"), ok(line)]
    here = torch.cuda.device_count() if cuda else 0
    if here and processes > here and not plan.gpu_gb:
        findings.append(
            note(
                f"this machine has {here} GPU(s): {processes} processes take {-(-processes // here)} such machines"
            )
        )
    return findings, Start(config, strategy, 0, processes, device)


def bank_rows(config: Config, world_size: int) -> str:
    """How the bank's rows are shared out."""
    from caco_scale.distributed.collectives import shard_range

    ranges = [shard_range(config.bank.size, world_size, rank) for rank in range(world_size)]
    rows = [stop - start for start, stop in ranges]
    return f"bank of {config.bank.size:,} rows: {max(rows):,} to {min(rows):,} on a rank"


def check_samples(store: "Store") -> list[Finding]:
    """Whether every shard's index has samples that training takes -> findings. Reads all indexes."""
    from caco_scale.data.samples import problem_of

    shards, num_classes = store.manifest.shards, len(store.manifest.classes)
    try:
        indexes = store.concurrently(store.index, range(len(shards)))
        for info, index in zip(shards, indexes, strict=True):
            if problem := problem_of(index, num_classes):
                return [fail(f"{store.url}: {info.name}: {problem}: {store.repair_hint}")]
    except UserError as error:
        return [fail(one_line(error))]
    return [ok(f"{store.url}: every sample of {len(shards):,} shard(s) has an image, by their indexes")]


def check_loader(
    config: Config, data: "TrainingData", environment: Mapping[str, str] = os.environ
) -> list[Finding]:
    """How many workers feed a process, by the rate that one has here -> findings. Reads 128 images, caches none."""
    from caco_scale.data.workers import bearable_workers, cores_here

    corrupt: dict[str, str] = {}
    try:
        rate = worker_rate(config, data.store.manifest, corrupt)
    except UserError as error:
        return [fail(one_line(error))]
    cores, processes = cores_here(environment)
    workers, most = config.data.workers, bearable_workers(environment)
    text = (
        f"a loader worker prepares {rate:,.0f} images/s on a core (measured): data.workers {workers} can feed "
        f"{max(workers, 1) * rate:,.0f} images/s to a process; to train X images/s it takes X / {rate:,.0f}"
    )
    if workers > most:
        text += (
            f"; but {cores} core(s) for {processes} process(es) here bear at most {most} each: "
            f"give --data.workers {most}"
        )
    return [note(text), *_undecoded(config, data, corrupt), *check_shared_memory(config, data)]


def check_shared_memory(config: Config, data: "TrainingData") -> list[Finding]:
    """Whether loader workers can be started here, and their batches fit into /dev/shm -> findings."""
    from caco_scale.data.loader import batch_bytes
    from caco_scale.data.workers import check_semaphores, small_shared_memory
    from caco_scale.training.assemble import view_specs

    if config.data.workers and (failure := found(check_semaphores)):
        return failure
    sizes = [view.size for view in view_specs(config.views)]
    small = small_shared_memory(batch_bytes(data.batch_size, sizes, data.store.pixels), config.data.workers)
    return [note(small)] if small else []


def _undecoded(config, data, corrupt):
    """The finding on images that did not decode among the few that were read."""
    if not corrupt:
        return []
    total, limit = data.store.manifest.num_samples, config.data.max_corrupt
    read = min(2 * min(MEASURED_IMAGES, total), total)
    name, why = next(iter(corrupt.items()))
    text = f"{len(corrupt)} of {read} images that were read do not decode, the first {name} ({why})"
    # One or two may be all there are.
    if len(corrupt) > limit * total or (len(corrupt) > 2 and len(corrupt) > limit * read):
        return [fail(f"{text}, more than data.max_corrupt {limit:g}: {data.store.verify_hint}")]
    return [note(f"{text}: {data.store.verify_hint}")]


def worker_rate(config: Config, manifest: Any, corrupt: dict[str, str] | None = None) -> float:
    """Images that one loader worker prepares in a second of CPU time, views included, waiting for a store excluded.

    ``corrupt``: {shard/key: why} of images that do not decode is added there.
    """
    from caco_scale.data.loader import train_batches
    from caco_scale.data.order import Order
    from caco_scale.training.assemble import open_training, view_specs

    sizes = manifest.shards.counts
    batch = min(MEASURED_IMAGES, sum(sizes))
    order = Order(sizes, seed=config.run.seed, global_batch_size=batch)
    store = open_training(configuration.replace(config, data__cache_dir="none"))
    specs = view_specs(config.views, config.data.channels)
    topology: dict[str, Any] = {"rank": 0, "world_size": 1, "workers": 0, "seed": config.run.seed}
    batches = train_batches(store, order, specs, start_step=0, num_steps=2, **topology)
    first = next(batches)  # what is only done once: imports, indices
    start = time.process_time()
    second = next(batches)
    seconds = time.process_time() - start
    if corrupt is not None:
        corrupt.update({entry["key"]: entry["error"] for b in (first, second) for entry in b.corrupt})
    return batch / max(seconds, 1e-6)


def check_memory(start: "Start", offloaded: bool = False, plan: Planned | None = None) -> list[Finding]:
    """The estimate of a rank's memory, against the GPU's or its share of the machine's -> findings.

    ``offloaded``: as of ``estimate_memory``. ``plan``: the launch is to come, maybe on other machines.
    """
    import torch

    from caco_scale.data.in_memory import free_memory
    from caco_scale.distributed.environment import number
    from caco_scale.doctor.memory import estimate_memory

    strategy, device = start.strategy, start.device
    try:
        estimate = estimate_memory(
            start.config, strategy, start.world_size, start.micro_batch_size, offloaded
        )
    except UserError as error:
        return [fail(one_line(error))]
    parts = ", ".join(
        f"{f.name.replace('_', ' ')} {getattr(estimate, f.name) / 1e9:.2f}" for f in fields(estimate)
    )
    name = f"{strategy} with offloading" if offloaded else strategy
    text = f"memory of a rank under {name}, estimated: {estimate.total / 1e9:.2f} GB ({parts})"
    on_gpu = device.type == "cuda" or bool(plan and plan.gpu_gb)
    if on_gpu:
        free, total = (plan.gpu_gb * 1e9,) * 2 if plan and plan.gpu_gb else torch.cuda.mem_get_info(device)
        whose, room = "the GPU has" if device.type == "cuda" else "a GPU there has", 0.95 * total
        has = f"{whose} {total / 1e9:.1f} GB"
    else:
        processes = plan.processes if plan else number(os.environ, "LOCAL_WORLD_SIZE", 1)
        room = free = free_memory() / processes
        whose = f"each of {processes} processes here has" if processes > 1 else "this machine has"
        has = f"{whose} {room / 1e9:.1f} GB free"
    if estimate.total > room:
        fix = _less_memory(start, estimate, room, offloaded, on_gpu)
        if plan and not on_gpu:  # they may train elsewhere
            gpu = "if others train, give --gpu-gb and the memory of one of their GPUs in GB; otherwise"
            return [warn(f"{text}, but {has}: {gpu} {fix}")]
        return [fail(f"{text}, but {has}: {fix}")]
    if estimate.total > free:
        return [note(f"{text}; only {free / 1e9:.1f} GB of the GPU's {total / 1e9:.1f} GB are free now")]
    return [ok(f"{text}; {has}")]


def _less_memory(start, estimate, room, offloaded, on_gpu):
    """What to give for a rank to fit into so many bytes."""
    from caco_scale.doctor.memory import largest_micro_batch

    config, size = start.config, None
    if config.bank.rule not in BATCH_RULES:  # whose negatives are those of one forward
        size = largest_micro_batch(config, start.strategy, start.world_size, estimate, room, offloaded)
    helps = on_gpu and not offloaded
    zero2 = spelled("ds_configs/zero2.yaml")
    more = f"more processes, or {zero2} (fsdp2, zero3_offload)" if helps else "or more processes"
    if size:
        return f"give --data.micro_batch_size {size}, which fits by this estimate, {more}"
    rest = (estimate.total - estimate.activations) / 1e9
    return (
        f"no smaller --data.micro_batch_size can be had, {rest:.2f} GB are not activations: give a smaller model, "
        "--bank.size or --data.global_batch_size, fewer pixels (--views.size), --model.checkpoint_activations "
        f"true, {more}"
    )


def check_disk(start: "Start") -> list[Finding]:
    """Whether the checkpoints that a run keeps, and the one that it writes, fit beside what is there -> findings."""
    from caco_scale.doctor.memory import checkpoint_bytes

    config, folder = start.config, Path(start.config.run.dir).absolute()
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    one, keep = checkpoint_bytes(config), config.run.keep_checkpoints or 1
    there = sum(path.stat().st_size for path in folder.glob("checkpoints/**/*") if path.is_file())
    free, needed = shutil.disk_usage(existing).free, (keep + 1) * one - there
    if needed <= free:
        return [ok(f"a checkpoint takes {_size(one)}, {keep} are kept")]
    fewer = 0 < 2 * one - there <= free
    fix = (
        "give --run.keep_checkpoints 1, or another --run.dir"
        if fewer
        else "free some, or give another --run.dir"
    )
    return [
        fail(
            f"run.dir {folder} has {_size(free)} free, and its checkpoints take up to {_size(needed)} more: {keep} "
            f"kept and one being written, {_size(one)} each: {fix}"
        )
    ]


def _size(num_bytes):
    return f"{num_bytes / 1e9:,.1f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:,.1f} MB"


def check_end(start: "Start") -> list[Finding]:
    """A run that has nothing left to train -> findings."""
    from caco_scale.checkpoint.folder import read_values
    from caco_scale.training.assemble import build_schedule

    if not (start.resumed and start.data):
        return []
    step, config = read_values(start.resumed)["step"], start.config
    total = build_schedule(config, start.data.order.steps_per_epoch).total_steps
    end = min(total, config.run.max_steps or total)
    if step < end:
        return []
    more = f"--optim.epochs {2 * config.optim.epochs}" if end == total else "--run.max_steps 0"
    return [
        warn(
            f"{start.resumed} is at step {step:,} of {end:,}: nothing is left to train; give {more} to train on, or "
            "another --run.dir"
        )
    ]


def compiled_code(config: Config) -> list[Finding]:
    """What earlier starts have left of compiled code, of which nothing is removed by itself -> findings."""
    from caco_scale.distributed.compilation import KEPT_IN

    folder = Path(config.run.dir, KEPT_IN)
    total = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    if not total:
        return []
    return [
        note(
            f"{folder}: {_size(total)} of compiled code, which may be removed: a start compiles what it lacks"
        )
    ]


def examine(config: Config, plan: Planned | None = None) -> list[Finding]:
    """All findings, in the order of a start; what cannot be checked after a failure is left out.

    ``plan``: a launch to come; None = this launch.
    """
    from caco_scale.run.directory import check_place

    place = found(check_place, config.run.dir)
    try:
        from caco_scale.distributed.launch import launched_strategy, offloads

        strategy = plan.strategy if plan else launched_strategy(os.environ)
        offloaded = strategy == OFFLOADING if plan else offloads(os.environ)
    except UserError as error:
        return [fail(one_line(error)), *check_versions("ddp"), *place]
    strategy = strategy.removesuffix("_offload")
    findings = check_versions(strategy)
    if any(f.status == "FAIL" for f in findings):
        return findings + place
    launch, start = plan_launch(config, plan) if plan else join_launch(config)
    if start is None:
        return findings + launch + place
    return findings + launch + examine_start(start, offloaded, plan)


def examine_start(start: "Start", offloaded: bool, plan: Planned | None = None) -> list[Finding]:
    """The checks of a start, to the last, and what only the doctor looks at -> findings; as of :func:`check_memory`."""
    from caco_scale.checkpoint.folder import latest
    from caco_scale.training.assemble import augmentation_note
    from caco_scale.training.checks import CHECKS
    from caco_scale.training.fit import few_steps_for_lanes, fit_to_set, misfits

    start.newest = latest(Path(start.config.run.dir, "checkpoints"))
    try:
        start.config, lines = fit_to_set(start.config)
    except UserError as error:
        return [fail(one_line(error))]
    findings = [ok(line) for line in lines]
    findings += [finding for check in CHECKS for finding in found(check, start)]
    slow = augmentation_note(start.config, start.device)
    findings += [note(slow)] if slow else []
    if start.micro_batch_size:
        findings += [ok(bank_rows(start.config, start.world_size)), *check_memory(start, offloaded, plan)]
        findings += check_disk(start)
    if start.data:
        findings += [warn(line) for line in misfits(start.config, start.data.order, start.world_size)]
        lanes = few_steps_for_lanes(start.data.order)
        findings += [note(lanes)] if lanes else []
        findings += check_end(start) + compiled_code(start.config)
        findings += check_samples(start.data.store) + check_loader(start.config, start.data)
    return findings


def everywhere(findings: list[Finding]) -> list[Finding]:
    """This rank's findings, and the failures of other ranks that it does not have itself. Collective."""
    from caco_scale.distributed.collectives import gather_objects

    for rank, others in enumerate(gather_objects(findings)):
        failures = [f for f in others if f.status == "FAIL" and f not in findings]
        findings = findings + [fail(f"rank {rank}: {f.text}") for f in failures]
    return findings
