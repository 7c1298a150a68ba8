"""Check machine, launch, configuration, data and storage before a run, and say what to mend.

    accelerate launch --config_file ds_configs/zero2.yaml --num_processes N -m caco_scale.doctor [RECIPE] [--flags]
    python -m caco_scale.doctor [RECIPE] [--flags]                  as one process would train
    python -m caco_scale.doctor [RECIPE] [--flags] --processes 32 --strategy zero2      as they would, asked of one

One line per finding: ``ok``, ``note``, or ``FAIL`` followed by what mends it. Exit code 1 where the run would fail, so
that a script can ask before it queues a job. All ranks check, rank 0 speaks; nothing is trained, and nothing written.
"""

import os
import re
import shutil
import sys
import time
from dataclasses import dataclass, fields
from importlib import metadata
from pathlib import Path

from caco_scale.errors import UserError, one_line

REQUIRED = (
    *("torch", "torchvision", "accelerate", "webdataset", "obstore", "numpy", "simplejpeg"),
    *("safetensors", "tensorboard", "tyro", "rich", "pyyaml", "pillow"),
)
LOWEST = {"torch": (2, 11), "accelerate": (1, 10), "numpy": (2, 0), "webdataset": (1, 0), "tyro": (1, 0)}
OFFLOADING = "zero3_offload"  # the file of ds_configs/ that is no strategy of its own
MEASURED_IMAGES = 64  # in each of two batches, the second of which is timed
DEEPSPEED = ("deepspeed", "transformers")  # accelerate's DeepSpeed plugin imports transformers at every stage


@dataclass(frozen=True)
class Finding:
    """``status``: ok, note or FAIL. ``text``: what was found, in a failure with what mends it."""

    status: str
    text: str


def ok(text):
    return Finding("ok", text)


def note(text):
    return Finding("note", text)


def fail(text):
    return Finding("FAIL", text)


def found_version(package):
    """The installed version of a distribution, or None."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def check_versions(strategy, version=found_version):
    """Whether the packages that a strategy needs are there and new enough -> findings. ``version``: name -> str."""
    findings = [ok(f"python {sys.version.split()[0]}")]
    for package in REQUIRED + (DEEPSPEED if strategy.startswith("zero") else ()):
        found = version(package)
        if found is None:
            why = ", which accelerate needs for DeepSpeed" if package == "transformers" else ""
            instead = ", or use ds_configs/fsdp2.yaml" if package in DEEPSPEED else ""
            findings.append(fail(f"{package} is not installed{why}: pip install {package}{instead}"))
            continue
        lowest = LOWEST.get(package)
        if lowest and tuple(int(n) for n in re.findall(r"\d+", found)[: len(lowest)]) < lowest:
            wanted = ".".join(map(str, lowest))
            findings.append(
                fail(f"{package} {found} is older than {wanted}: pip install -U '{package}>={wanted}'")
            )
        else:
            findings.append(ok(f"{package} {found}"))
    if strategy.startswith("zero"):
        compiler = version("ninja") and (shutil.which("c++") or shutil.which("g++"))
        findings.append(
            note("ninja and a C++ compiler are there, should DeepSpeed want to build a kernel")
            if compiler
            else note(
                "no ninja or no C++ compiler: DeepSpeed's own kernels cannot be built; none of them is used"
            )
        )
    return findings


@dataclass(frozen=True)
class Place:
    """Where this process stands among those that train. ``device``: a torch device."""

    rank: int
    world_size: int
    device: object


def check_launch(config):
    """Join the launch as training does -> (findings, Place or None)."""
    import torch

    from caco_scale.distributed.launch import launched_strategy, start_processes
    from caco_scale.distributed.strategies.build import check_combination

    try:
        accelerator = start_processes(config.run.world_size)
        strategy = launched_strategy(os.environ)
        dtype = torch.float64 if config.precision.compute == "fp64" else torch.float32
        check_combination(strategy, dtype, config.precision.compile)
    except UserError as error:
        return [fail(one_line(error))], None
    backend = torch.distributed.get_backend() if torch.distributed.is_initialized() else "none, one process"
    findings = [
        ok(
            f"strategy {strategy}, {accelerator.num_processes} process(es), backend {backend}, {accelerator.device}"
        )
    ]
    if accelerator.device.type == "cuda":
        properties = torch.cuda.get_device_properties(accelerator.device)
        findings.append(ok(f"{properties.name}, {properties.total_memory / 1e9:.1f} GB"))
        if config.precision.compute == "bf16" and not torch.cuda.is_bf16_supported():
            findings.append(fail("this GPU does not compute in bf16: give --precision.compute fp32"))
    return findings, Place(accelerator.process_index, accelerator.num_processes, accelerator.device)


def check_plan(config, strategy, processes):
    """What of a launch can be known before it -> (findings, Place or None): rank 0 of so many, on a device as here."""
    import torch

    from caco_scale.distributed.launch import STRATEGIES, refuse_lost_driver
    from caco_scale.distributed.strategies.build import check_combination

    if strategy not in STRATEGIES:
        return [fail(f"--strategy {strategy}: give one of {', '.join(STRATEGIES)}, {OFFLOADING}")], None
    cuda = torch.cuda.is_available()
    try:
        if not cuda:
            refuse_lost_driver(os.environ)
        dtype = torch.float64 if config.precision.compute == "fp64" else torch.float32
        check_combination(strategy, dtype, config.precision.compile)
    except UserError as error:
        return [fail(one_line(error))], None
    if config.run.world_size not in (0, processes):
        return [fail(f"run.world_size {config.run.world_size}, but {processes} processes are planned")], None
    place = Place(0, processes, torch.device("cuda" if cuda else "cpu"))
    return [ok(f"planned: strategy {strategy}, {processes} process(es), {place.device}")], place


def check_arithmetic(config, world_size, data=None):
    """How the global batch and the bank are shared out -> findings. ``data``: a ``TrainingData`` if there is one."""
    from caco_scale.data.order import share_size
    from caco_scale.distributed.collectives import shard_range

    total = config.data.global_batch_size
    try:
        share = share_size(total, world_size)
    except UserError as error:
        return [fail(one_line(error))]
    micro = config.data.micro_batch_size or share
    if share % micro:
        return [
            fail(
                f"data.micro_batch_size {micro} does not divide the {share} images of a process: "
                f"give a divisor of {share}"
            )
        ]
    findings = [
        ok(
            f"global batch {total:,} = {world_size} process(es) x {share:,} images"
            + (f" in {share // micro} micro-batches of {micro:,}" if micro < share else "")
            + f"; peak lr {config.optim.lr * total / 256:g}"
        )
    ]
    rows = [
        stop - start
        for start, stop in (shard_range(config.bank.size, world_size, r) for r in range(world_size))
    ]
    findings.append(ok(f"bank of {config.bank.size:,} rows: {max(rows):,} to {min(rows):,} on a rank"))
    if data:
        order = data.order
        findings.append(
            ok(f"{order.num_samples:,} images, {order.steps_per_epoch:,} steps an epoch, {order.lanes} lanes")
        )
    return findings


def check_data(config, rank, world_size):
    """The shard set as training opens it -> (findings, TrainingData or None)."""
    from caco_scale.config import makes_its_data
    from caco_scale.training.assemble import TrainingData

    if makes_its_data(config) and not Path(config.data.shards, "manifest.json").exists():
        return [note(f"the demo's data will be built in {Path(config.data.shards).parent}")], None
    try:
        return [ok(f"shards {config.data.shards}")], TrainingData(config, rank, world_size)
    except UserError as error:
        return [fail(one_line(error))], None


def check_resume(config, data):
    """What is in the run directory already: whether training would go on from it -> findings."""
    from caco_scale.checkpoint.folder import latest
    from caco_scale.checkpoint.resume import checkpoint_to_resume
    from caco_scale.run.stopping import ControlFiles

    newest = latest(Path(config.run.dir, "checkpoints"))
    try:
        ControlFiles(config.run.dir, is_main=True).refuse_stop()
        found = checkpoint_to_resume(config, newest, data.fingerprint, data.order.num_samples)
    except UserError as error:
        return [fail(one_line(error))]
    return [ok(f"resumes from {found}" if found else "a fresh start")]


def check_loader(config, data, environment=os.environ):
    """How many workers feed a process, by the rate that one has here -> findings. Reads 128 images, caches none."""
    try:
        rate = worker_rate(config, data.store.manifest)
    except UserError as error:
        return [fail(one_line(error))]
    cores, processes = len(os.sched_getaffinity(0)), int(environment.get("LOCAL_WORLD_SIZE", 1))
    workers, most = config.data.workers, max(1, cores // processes - 1)
    text = (
        f"a loader worker prepares {rate:,.0f} images/s on a core (measured): data.workers {workers} can feed "
        f"{max(workers, 1) * rate:,.0f} images/s to a process; to train X images/s it takes X / {rate:,.0f}"
    )
    if workers > most:
        text += (
            f"; but {cores} core(s) for {processes} process(es) here bear at most {most} each: "
            f"give --data.workers {most}"
        )
    return [note(text)]


def worker_rate(config, manifest):
    """Images that one loader worker prepares in a second of CPU time, views included, waiting for a store excluded."""
    from caco_scale.data.loader import train_batches
    from caco_scale.data.object_store import RetryPolicy
    from caco_scale.data.order import Order
    from caco_scale.data.store import open_store
    from caco_scale.training.assemble import view_specs

    sizes = [shard.num_samples for shard in manifest.shards]
    batch = min(MEASURED_IMAGES, sum(sizes))
    order = Order(sizes, seed=config.run.seed, global_batch_size=batch)
    store = open_store(
        config.data.shards, "none", 0, RetryPolicy(config.data.retries, config.data.stall_seconds)
    )
    topology = {"rank": 0, "world_size": 1, "workers": 0, "seed": config.run.seed}
    batches = train_batches(store, order, view_specs(config.views), start_step=0, num_steps=2, **topology)
    next(batches)  # what is only done once: imports, indices
    start = time.process_time()
    next(batches)
    return batch / max(time.process_time() - start, 1e-6)


def check_storage(config):
    """Whether the run directory can be made and written, and how much room there is -> findings."""
    path = Path(config.run.dir).absolute()
    existing = next(p for p in (path, *path.parents) if p.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        return [
            fail(f"run.dir {path} cannot be written ({existing}): mend its rights, or give another --run.dir")
        ]
    return [ok(f"run.dir {path}, {shutil.disk_usage(existing).free / 1e9:,.0f} GB free")]


def check_memory(config, strategy, world_size, device, offloaded=False):
    """The estimate of a rank's memory, against the GPU's -> findings. ``offloaded``: as of ``estimate_memory``."""
    import torch

    from caco_scale.doctor.memory import estimate_memory

    share = config.data.global_batch_size // world_size
    try:
        micro_batch_size = config.data.micro_batch_size or share
        estimate = estimate_memory(config, strategy, world_size, micro_batch_size, offloaded)
    except UserError as error:
        return [fail(one_line(error))]
    parts = ", ".join(
        f"{f.name.replace('_', ' ')} {getattr(estimate, f.name) / 1e9:.2f}" for f in fields(estimate)
    )
    name = f"{strategy} with offloading" if offloaded else strategy
    text = f"memory of a rank under {name}, estimated: {estimate.total / 1e9:.2f} GB ({parts})"
    if device.type != "cuda":
        return [note(text)]
    free, total = torch.cuda.mem_get_info(device)
    if estimate.total > 0.95 * total:
        return [
            fail(
                f"{text}, but the GPU has {total / 1e9:.1f} GB: give a smaller --data.micro_batch_size, "
                f"more processes{'' if offloaded else ', or ds_configs/zero2.yaml, fsdp2.yaml, zero3_offload.yaml'}"
            )
        ]
    if estimate.total > free:
        return [note(f"{text}; only {free / 1e9:.1f} GB of the GPU's {total / 1e9:.1f} GB are free now")]
    return [ok(f"{text}; the GPU has {total / 1e9:.1f} GB")]


def examine(config, plan=None):
    """All findings, in the order of a start; what cannot be checked after a failure is left out.

    ``plan``: (strategy, number of processes) of a launch to come; None = this launch.
    """
    from caco_scale.distributed.launch import launched_strategy, offloads

    try:
        strategy = plan[0] if plan else launched_strategy(os.environ)
        offloaded = strategy == OFFLOADING if plan else offloads(os.environ)
    except UserError as error:
        return [fail(one_line(error)), *check_versions("ddp"), *check_storage(config)]
    if plan and offloaded:
        strategy = strategy.removesuffix("_offload")
        plan = strategy, plan[1]
    findings = check_versions(strategy)
    if any(f.status == "FAIL" for f in findings):
        return findings + check_storage(config)
    launch, place = check_plan(config, *plan) if plan else check_launch(config)
    findings += launch
    if place is None:
        return findings + check_storage(config)
    from caco_scale.training.assemble import resolve_precision

    config = resolve_precision(config, place.device)
    arithmetic = check_arithmetic(config, place.world_size)
    if all(f.status != "FAIL" for f in arithmetic):
        found, data = check_data(config, place.rank, place.world_size)
        findings += found + (check_resume(config, data) if data else [])
        arithmetic = check_arithmetic(config, place.world_size, data)
        arithmetic += check_memory(config, strategy, place.world_size, place.device, offloaded)
        arithmetic += check_loader(config, data) if data else []
    return findings + arithmetic + check_storage(config)


def everywhere(findings):
    """This rank's findings, and the failures of other ranks that it does not have itself. Collective."""
    from caco_scale.distributed.collectives import gather_objects

    for rank, others in enumerate(gather_objects(findings)):
        failures = [f for f in others if f.status == "FAIL" and f not in findings]
        findings = findings + [fail(f"rank {rank}: {f.text}") for f in failures]
    return findings
