"""Figures of the pages that no command of the package measures. One line of JSON each, for ``figures_*.json``.

PYTHONPATH=. python tests/benchmarks/figures.py {listing,strategies,kernels,colours,start,memory}
PYTHONPATH=. python tests/benchmarks/figures.py loader SHARDS PIXELS
"""

import functools
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace

HERE = Path(__file__).resolve()
sys.path.insert(0, str(HERE.parents[1]))  # the tests: their models and comparisons are measured here
MILLION = 10**6


class Made:
    """A file or a folder that is none: a name, a size, a number."""

    def __init__(self, name, number, folder=False):
        self.name, self._number, self._folder = name, number, folder

    is_symlink = lambda self: False
    is_dir = lambda self: self._folder
    is_file = lambda self: not self._folder
    inode = lambda self: self._number
    stat = lambda self: SimpleNamespace(st_size=100_000 + self._number % 1000)


def made_folders(num_files, num_folders):
    """``os`` for a scan that finds so many files without a disk, in folders named as those of ImageNet-21k are."""
    each = -(-num_files // num_folders)

    class Entries(list):
        __enter__ = lambda self: self
        __exit__ = lambda self, *_: None

    def scandir(path):
        if path == "/made":
            return Entries(Made(f"n{c:08d}", c, folder=True) for c in range(num_folders))
        c = int(path[-8:])
        first, last = c * each, min((c + 1) * each, num_files)
        return Entries(Made(f"n{c:08d}_{i - first}.JPEG", num_folders + i) for i in range(first, last))

    def status(path):
        return SimpleNamespace(st_dev=1, st_ino=1 << 40 | (int(path[-8:]) + 1 if path != "/made" else 0))

    return SimpleNamespace(path=os.path, scandir=scandir, stat=status)


def listing():
    """The listing of a folder of 14 million files, by the code that lists one; the files are made up, with no disk."""
    from caco_scale.data import scan
    from caco_scale.data.listed_files import Listings
    from caco_scale.data.store.folder import FolderStore

    peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
    scan.os = made_folders(14 * MILLION, 21841)
    before, start = peak(), time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        store = FolderStore("/made", listings=Listings(folder, main=True))
        found = {"files": store.manifest.num_samples, "cpu_seconds": round(time.process_time() - start)}
        found |= {"peak_mb": round(peak() - before)}
        found["file_mb"] = round(sum(path.stat().st_size for path in Path(folder).iterdir()) / 1e6)
    return found


def strategies():
    """The worst tensor after 2 warm-up and 10 CaCo steps against one process: relative L2 difference, and its name."""
    from launch import relative_difference
    from test_strategy import LARS, LARS64, ROOT, SGD, starting, state, train

    found = []
    with tempfile.TemporaryDirectory() as folder:
        reference = Path(folder, "one")
        reference.mkdir()
        train(reference, [{**LARS, "save_at": [0, 2]}, {**LARS64, "save_at": [0, 2]}, SGD])
        for config in ("ddp", "fsdp2", "zero1", "zero2", "zero3"):
            cases = [LARS64] if config in ("ddp", "fsdp2") else [LARS, SGD]
            for processes in (2, 3):
                place = Path(folder, f"{config}{processes}")
                place.mkdir()
                config_file = ROOT / "ds_configs" / f"{config}.yaml"
                train(place, [starting(case, reference) for case in cases], config_file, processes)
                for case in cases:
                    worst, tensor = relative_difference(
                        state(place / case["name"]), state(reference / case["name"])
                    )
                    row = {"strategy": config, "processes": processes, "case": case["name"]}
                    found.append({**row, "difference": float(f"{worst:.2g}"), "tensor": tensor})
    return {"rows": found}


def kernels():
    """One step by the Triton kernels in Triton's interpreter, and by the chunked path, against the float64 oracle."""
    os.environ["TRITON_INTERPRET"] = "1"
    from test_kernels import errors

    case, found = (64, 1024, 128, 2, 0.08, 0.08, "caco"), []
    for kernel, inputs in (("torch", "fp32"), ("triton", "fp32"), ("triton", "tf32"), ("triton", "bf16")):
        by_name = errors(case, kernel, inputs)
        found.append(
            {"kernel": kernel, "inputs": inputs, **{k: float(f"{v:.2g}") for k, v in by_name.items()}}
        )
    return {"samples": case[0], "rows_of_the_bank": case[1], "dim": case[2], "rows": found}


def colour_views(size, by_torch):
    import numpy as np
    import torch

    from caco_scale.data.augment import augment, augment_by_torch
    from caco_scale.data.views import ViewSpec, draw_colour

    operation = augment_by_torch if by_torch else augment
    specs = [
        ViewSpec(size, (0.2, 1.0), blur_p=1.0),
        ViewSpec(size, (0.2, 1.0), blur_p=0.1, solarize_p=0.2),
    ]
    keys = np.arange(128, dtype=np.uint64)
    params = [{k: torch.from_numpy(v) for k, v in draw_colour(spec, keys).items()} for spec in specs]
    crops = torch.randint(0, 256, (128, size, size, 3), dtype=torch.uint8)

    def once():
        for _ in range(20 if size < 100 else 1):
            for drawn in params:
                operation(crops, drawn)

    return once


def colours():
    """Milliseconds of CPU for colour, blur and normalising of an image's two views: compiled code, torch, in turns."""
    from caco_scale.benchmark.measure import in_turn, median
    from caco_scale.data.augment_cpu import absent

    assert not absent(), absent()
    found = []
    for size in (224, 32):
        contenders = {
            name: functools.partial(colour_views, size, name == "torch") for name in ("compiled", "torch")
        }
        measured = in_turn(contenders, 5, values=False)
        images = 128 * (20 if size < 100 else 1)
        times = {
            name: float(f"{1e3 * median(rounds, 'cpu_seconds') / images:.3g}")
            for name, rounds in measured.items()
        }
        found.append({"pixels": size, **times})
    return {"batch": 128, "threads": 1, "rounds": 5, "unit": "ms of CPU time an image", "rows": found}


def loader(shards, pixels):
    """Images per second of CPU time, two crops each, in this process: decoded at every epoch; kept in memory."""
    from caco_scale.data.in_memory import DecodedImages
    from caco_scale.data.loader import train_batches
    from caco_scale.data.order import Order
    from caco_scale.data.store import open_store
    from caco_scale.data.views import ViewSpec

    store = open_store(shards)
    count = store.manifest.num_samples
    order = Order(store.manifest.shards.counts, seed=0, global_batch_size=128)
    views, epoch = [ViewSpec(int(pixels), (0.2, 1.0))] * 2, order.steps_per_epoch
    kept = DecodedImages(count, 2 * 10**9)

    def rate(images, number):
        start = time.process_time()
        where = {"start_step": number * epoch, "num_steps": (number + 1) * epoch, "images": images}
        seen = sum(
            len(made.keys)
            for made in train_batches(store, order, views, rank=0, world_size=1, seed=0, workers=0, **where)
        )
        return round(seen / (time.process_time() - start))

    rates = [(rate(None, number), rate(kept, number)) for number in range(4)]  # in turns; the first fills
    middle = lambda values: sorted(values)[len(values) // 2]
    found = {
        "decoded": middle([a for a, _ in rates[1:]]),
        "kept": middle([b for _, b in rates[1:]]),
        "all": rates,
    }
    return {
        "images": count,
        "mean_bytes": round(store.manifest.num_bytes / count),
        "pixels": int(pixels),
        **found,
    }


def start():
    """CPU seconds of what a process of the tests imports; the median of three."""
    words = [sys.executable, "-c", "import warm; warm._import_all()"]
    path = os.pathsep.join((str(HERE.parents[2]), str(HERE.parents[1])))
    seconds = []
    for _ in range(4):  # the first reads the files from the disk
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run(words, check=True, env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"})
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(round(after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime, 2))
    return {"cpu_seconds": sorted(seconds[1:])[1], "all": seconds}


def memory():
    """The doctor's estimate in GB for a process of 32 of caco_vitb16_300ep, 128 images in bf16."""
    from caco_scale.config import load_recipe
    from caco_scale.config.values import replace
    from caco_scale.doctor import memory as doctor

    doctor._saved_bytes = functools.cache(doctor._saved_bytes)  # the same for all
    config = replace(load_recipe("caco_vitb16_300ep"), precision__compute="bf16")
    found = []
    for strategy in ("ddp", "zero1", "zero2", "zero3", "fsdp2"):
        e = doctor.estimate_memory(config, strategy, 32, 128)
        states = e.parameters + e.masters + e.gradients + e.optimizer_state
        parts = {"activations": e.activations, "states": states, "buffers": e.buffers, "bank": e.bank}
        found.append({"strategy": strategy, **{name: round(b / 1e9, 2) for name, b in parts.items()}})
    return {"rows": found}


def main(name, *words):
    from caco_scale.benchmark.report import describe_machine

    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=HERE.parent, capture_output=True, text=True
    )
    machine = describe_machine()
    result = globals()[name](*words)
    shown = " ".join(["python tests/benchmarks/figures.py", name, *words])
    date = datetime.now().astimezone().isoformat(timespec="seconds")
    about = {
        "figure": name,
        "command": shown,
        "commit": commit.stdout.strip(),
        "date": date,
        "machine": machine,
    }
    print(json.dumps({**about, **result}))


if __name__ == "__main__":
    main(*sys.argv[1:])
