"""What a node of a job sees of itself: GPUs, memory errors, room for its loader's workers, what is installed.

Every reason against the node is a line of text. Nothing here knows of other nodes.
"""

import hashlib
import os
import platform
import shutil
import socket
import subprocess
from multiprocessing import get_context
from pathlib import Path
from types import FunctionType
from typing import Any

from caco_scale.errors import one_line
from caco_scale.run import packages

SHM = "/dev/shm"


def package_hash() -> str:
    """sha256 over the names and contents of this package's files (Python and recipes)."""
    folder, total = Path(__file__).parents[1], hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.suffix in (".py", ".yaml"):
            total.update(f"{path.relative_to(folder)}\0".encode())
            total.update(hashlib.sha256(path.read_bytes()).digest())
    return total.hexdigest()


def versions() -> dict[str, str | None]:
    """Versions of Python and of all that this package needs, one environment on every node: {name: version or None}."""
    found = {r.name: packages.installed_version(r.name) for r in packages.requirements()}
    return {"python": platform.python_version(), **found}


def check_shm(wanted_bytes: float) -> list[str]:
    """Reasons against this node: too little free in /dev/shm, through which loader workers hand batches over."""
    if not os.path.isdir(SHM):
        return [f"no {SHM}"] if wanted_bytes else []
    free = shutil.disk_usage(SHM).free
    return (
        [] if free >= wanted_bytes else [f"{free / 1e9:.2f} GB free in {SHM}, not {wanted_bytes / 1e9:.2f}"]
    )


def use_gpus(answer):
    """In a process of its own, for a broken driver hangs: multiply on every GPU, send the number of them."""
    import torch

    count = torch.cuda.device_count()
    for number in range(count):
        ones = torch.ones(256, 256, device=f"cuda:{number}")
        if (ones @ ones).sum().item() != 256**3:
            answer.send(f"GPU {number} multiplies wrongly")
            return
    answer.send(count)


def check_gpus(wanted: int, timeout: float) -> list[str]:
    """Reasons against this node: GPUs that are missing, hang, or miscalculate."""
    found = in_a_process(use_gpus, (), timeout)
    if isinstance(found, int):
        return [] if found == wanted else [f"torch sees {found} GPU(s), not {wanted}"]
    return [found]


def read_ecc(text: str) -> dict[int, int | None]:
    """nvidia-smi's lines ``index, count`` -> {index: uncorrected errors, or None where a GPU does not count them}."""
    pairs = [line.split(",") for line in text.splitlines() if "," in line]
    return {int(i): int(count) if count.strip().isdigit() else None for i, count in pairs}


def check_ecc(timeout: float) -> tuple[list[str], str | None]:
    """-> (reasons against this node: uncorrected memory errors since the driver was loaded; a note for people)."""
    query = "--query-gpu=index,ecc.errors.uncorrected.volatile.total"
    try:
        done = subprocess.run(
            ["nvidia-smi", query, "--format=csv,noheader,nounits"],
            capture_output=True,
            text=True,
            timeout=timeout,
        )
    except FileNotFoundError:
        return [], "no nvidia-smi: memory errors are not checked"
    except subprocess.TimeoutExpired:
        return [f"nvidia-smi does not answer in {timeout:.0f} seconds"], None
    if done.returncode:
        return [f"nvidia-smi fails: {one_line(done.stdout + done.stderr)[:200]}"], None
    counts = read_ecc(done.stdout)
    bad = [f"GPU {gpu} has {count} uncorrected memory error(s)" for gpu, count in counts.items() if count]
    silent = [gpu for gpu, count in counts.items() if count is None]
    return bad, f"GPUs {silent} do not count memory errors" if silent else None


def examine(gpus: int, shm_gb: float, timeout: float) -> dict[str, Any]:
    """This node's facts, of which ``reasons`` speak against it.

    Args:
        gpus: how many it must have; 0 = none are looked at.
        shm_gb: least room in ``/dev/shm``, GB.
        timeout: seconds for its GPUs, or nvidia-smi, to answer.
    """
    reasons, notes = check_shm(shm_gb * 1e9), []
    if gpus:
        reasons += check_gpus(gpus, timeout)
        bad, note = check_ecc(timeout)
        reasons += bad
        notes += [note] if note else []
    software = {"caco_scale": package_hash()[:16], **versions()}
    return {"node": node_name(), "reasons": reasons, "notes": notes, "software": software}


def node_name() -> str:
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def in_a_process(function: FunctionType, arguments: tuple, timeout: float) -> Any:
    """What ``function(answer, *arguments)`` sends by its pipe end ``answer``, or a reason (str) where it does not."""
    context = get_context("spawn")
    receiver, answer = context.Pipe(duplex=False)
    process = context.Process(target=function, args=(answer, *arguments))
    process.start()
    answer.close()
    try:
        return receiver.recv() if receiver.poll(timeout) else f"no answer in {timeout:.0f} seconds"
    except EOFError:
        process.join()
        return f"{function.__name__} died with exit code {process.exitcode}"
    finally:
        process.kill()
        process.join()
