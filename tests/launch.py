"""Start the trainer as a user does, by ``accelerate launch``, and read what it left."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import warm
from warm import ROOT, environment

from caco_scale.checkpoint.folder import latest, read_values
from caco_scale.checkpoint.read import load_tensors
from caco_scale.data.order import Order
from caco_scale.data.store import open_store
from caco_scale.run.files import read_json_lines

# 96 images in global batches of 8: 12 steps an epoch. A bank of 20 rows: 3 steps of bank warm-up, then CaCo.
SMALL = {
    "data.global_batch_size": 8,
    "data.workers": 0,
    "data.window": 16,
    "views.size": 16,
    "bank.size": 20,
    "bank.warmup_epochs": 0,
    "bank.warmup_ramp_steps": 2,
    "model.projector_hidden": 16,
    "model.embedding_dim": 8,
    "optim.epochs": 2,
    "optim.warmup_epochs": 1,
    "eval.knn_every": 0,
    "eval.baselines": False,
    "run.log_every": 1,
    "run.save_every": 0,
    "run.finish": "none",
    "run.max_steps": 15,
    "precision.compute": "fp64",
}
FORKED = ("caco_scale", "data_prep", "accelerate")
REAL = (
    "--num_cpu_threads_per_process",
    "1",
)  # an option of the launcher that changes nothing here: it starts, not forks
SWITCH = 3  # the first CaCo step of SMALL


def command(flags, num_processes=1, recipe="demo", launcher=()):
    """The command line of a run: ``accelerate launch`` of ``num_processes`` processes with the project's ddp.yaml.

    One process without a launcher's options is started as it is.
    """
    if num_processes > 1 and "--run.world_size" not in flags:
        flags = {"run.world_size": num_processes, **flags}
    words = [word for name, value in flags.items() for word in (f"--{name}", *_words(value))]
    if num_processes > 1 and not launcher:
        launcher = by("ddp", num_processes)["launcher"]
    launch = ["-m", "accelerate.commands.launch", *launcher] if launcher else []
    return [sys.executable, *launch, "-m", "caco_scale.pretrain", recipe, *words]


def by(config, num_processes):
    """Options of :func:`launch` and :func:`start`: so many processes under a file of ds_configs."""
    launcher = [
        "--config_file",
        str(ROOT / f"ds_configs/{config}.yaml"),
        "--num_processes",
        str(num_processes),
    ]
    return {"num_processes": num_processes, "launcher": launcher}


def _words(value):
    return [str(v) for v in value] if isinstance(value, list | tuple) else [str(value)]


def start(flags, num_processes=1, cwd=None, **options):
    """The started run, a process group of its own, its output in a pipe."""
    return start_command(command(flags, num_processes, **options), cwd)


def start_command(words, cwd=None, stderr=subprocess.STDOUT, env=None):
    """A started command; one of Python and its launcher are forked where that is the same (:mod:`warm`).

    Unless :data:`REAL` is among the launcher's options. ``env``: :func:`environment`, unless given.
    """
    env = environment() if env is None else env
    words = [str(word) for word in words]
    if words[0] == sys.executable and REAL[0] not in words and _may_be_forked(words[1:3]):
        return warm.popen(words[1:], cwd, env, stderr)
    return subprocess.Popen(
        words,
        cwd=cwd,
        env=env,
        stdout=subprocess.PIPE,
        stderr=stderr,
        text=True,
        start_new_session=True,
    )


def _may_be_forked(words):
    return (
        words[0].endswith(".py")
        or words[0] == "-c"
        or (words[0] == "-m" and words[1].split(".")[0] in FORKED)
    )


def finished(words, cwd=None, timeout=600, env=None):
    """As ``subprocess.run`` of :func:`start_command`: its exit code, stdout and stderr."""
    process = start_command(words, cwd, subprocess.PIPE, env)
    try:
        stdout, stderr = process.communicate(timeout=timeout)
        return subprocess.CompletedProcess(words, process.returncode, stdout, stderr)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise


def launch(flags, num_processes=1, cwd=None, code=0, **options):
    """Run to the end and return the output; fails the test if the exit code is another than ``code``."""
    process = start(flags, num_processes, cwd, **options)
    try:
        output, _ = process.communicate(timeout=600)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    assert process.returncode == code, f"exit code {process.returncode}, expected {code}:\n{output}"
    return output


def kill_when(process, condition, number=signal.SIGKILL):
    """Signal the whole process group (launcher, ranks, loader workers) as soon as ``condition()`` holds."""
    deadline = time.monotonic() + 600
    try:
        while not condition():
            assert process.poll() is None, f"the run ended by itself:\n{process.stdout.read()}"
            assert time.monotonic() < deadline, "the run never got there"
            time.sleep(0.01)
        os.killpg(process.pid, number)
        return process.communicate(timeout=600)[0]
    except BaseException:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        raise


def progress(run_dir):
    """How far a run is: (number of this attempt, last step in metrics.jsonl)."""
    attempt = sum(1 for _ in read_json_lines(Path(run_dir) / "attempts.jsonl"))
    return attempt, max(
        (line["step"] for line in read_json_lines(Path(run_dir) / "metrics.jsonl")), default=0
    )


def final_state(run_dir):
    """Every tensor of the newest checkpoint, whole, and its values."""
    path = latest(Path(run_dir) / "checkpoints")
    return load_tensors(path), read_values(path)


def relative_difference(a, b):
    """The largest relative L2 difference of two states, tensor by tensor: (difference, name)."""
    assert a.keys() == b.keys()
    worst = (0.0, None)
    for name in a:
        x, y = a[name].double(), b[name].double()
        difference = float((x - y).norm() / y.norm().clamp(min=1e-30))
        worst = max(worst, (difference, name), key=lambda pair: pair[0])
    return worst


def planned_keys(shards, flags, steps):
    """The keys of the first ``steps`` global batches, from the pure order: list of lists."""
    store = open_store(shards)
    infos = store.manifest.shards
    order = Order(
        [info.num_samples for info in infos],
        seed=flags.get("run.seed", 0),
        global_batch_size=flags["data.global_batch_size"],
        window=flags["data.window"],
    )
    batches = []
    for step in range(steps):
        located = zip(*order.locate(np.asarray(order.batch(step))), strict=True)
        batches.append([f"{infos[s].name}/{store.index(int(s)).keys[int(p)]}" for s, p in located])
    return batches
