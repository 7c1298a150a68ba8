"""One step of the sharded bank against dense peers: time, memory, and whether all compute the same.

Shapes: N samples in two views, K rows, D embedding.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING, Any

from caco_scale.benchmark.measure import Contender, Measured, Round, in_turn, median
from caco_scale.distributed.compilation import lacking

if TYPE_CHECKING:  # torch is imported by the contenders, in their processes
    from torch import Tensor

BANK_LR = 3.0
PEERS = ("autograd", "gradient written out", "compiled")
KERNELS = {f"sharded bank, Triton, {inputs}": inputs for inputs in ("tf32", "bf16")}  # on CUDA
# Blocks of N×K numbers that a dense peer holds at its peak, at least: for each pair the logits' softmax, for autograd.
DENSE_BLOCKS = 6


def measure(samples: int, size: int, dim: int, rounds: int, threads: int, device: str) -> Measured:
    """``({"rows": [...], "agreement": {...}, ...}, notes)`` of one step (loss, gradients, bank step)."""
    inputs = {"samples": samples, "size": size, "dim": dim, "device": device}
    contenders = {"sharded bank": functools.partial(prepare_sharded, **inputs)}
    for name, kernel_inputs in KERNELS.items() if device == "cuda" else ():
        kernels = {"kernel": "triton", "kernel_inputs": kernel_inputs}
        contenders[name] = functools.partial(prepare_sharded, **kernels, **inputs)
    notes = [
        f"N = {samples:,} samples in two views, K = {size:,} rows, D = {dim}, {threads} thread(s), {device}"
    ]
    needed = DENSE_BLOCKS * samples * size * 4
    if needed < _free_bytes(device):
        for how in PEERS:
            contenders[f"dense, {how}"] = functools.partial(prepare_dense, how=how, **inputs)
        if lacks := lacking(device):
            del contenders["dense, compiled"]
            notes.append(f"the compiled dense peer is left out: torch.compile needs {lacks}")
    else:
        notes.append(f"the dense peers are left out: they would take more than {needed / 1e9:,.0f} GB")
    measured = in_turn(contenders, rounds, threads, values=len(contenders) > 1)
    rows = [_row(name, rounds_of) for name, rounds_of in measured.items()]
    ours = rows[0]
    for row in rows:
        row["cpu_ratio"] = round(row["cpu_seconds"] / ours["cpu_seconds"], 2)
        row["time_ratio"] = round(row["seconds"] / ours["seconds"], 2)
        row["memory_ratio"] = round(row["extra_mb"] / ours["extra_mb"], 2)
    values = {name: rounds_of[0].value for name, rounds_of in measured.items()}
    agreement = {name: compare(values["sharded bank"], values[name]) for name in [*contenders][1:]}
    notes += [f"first step, sharded bank against {name}: {_words(a)}" for name, a in agreement.items()]
    return {**inputs, "threads": threads, "rounds": rounds, "rows": rows, "agreement": agreement}, notes


def _row(name: str, measured: list[Round]) -> dict[str, Any]:
    figures = {name: float(f"{median(measured, name):.4g}") for name in ("cpu_seconds", "seconds")}
    return {"what": name, **figures, "extra_mb": round(measured[0].extra_bytes / 1e6, 1)}


def _free_bytes(device: str) -> int:
    if device == "cuda":
        import torch

        return torch.cuda.mem_get_info()[0]
    meminfo = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    return int(meminfo["MemAvailable"].split()[0]) * 1024


# ---- in a contender's process


def draw_inputs(samples: int, dim: int, device: str) -> tuple[list[Tensor], list[Tensor]]:
    """Queries and keys of two views, unit norm, (N, D) each: the views of one sample are near each other."""
    import torch
    import torch.nn.functional as F

    generator = torch.Generator().manual_seed(0)
    image = torch.randn(samples, dim, generator=generator)
    views = [F.normalize(image + 0.5 * torch.randn(samples, dim, generator=generator)) for _ in range(4)]
    views = [view.to(device) for view in views]
    return views[:2], views[2:]


def prepare_sharded(samples: int, size: int, dim: int, device: str, **kernels: Any) -> Contender:
    """A function that makes one step of the sharded bank; it returns what gives the step's results by value."""
    from caco_scale.method.bank import ShardedBank

    bank = ShardedBank(size, dim, device=device, **kernels)
    queries, keys = draw_inputs(samples, dim, device)

    def step():
        leaves = [q.detach().requires_grad_() for q in queries]
        result = bank.contrast(leaves, keys)
        result.loss.backward()
        bank.step(result, BANK_LR)
        positives, gradient = result.positives, result.bank_gradient
        assert positives is not None  # as of every rule but moco
        assert gradient is not None
        return functools.partial(as_arrays, result.loss, positives[::-1], leaves, gradient)

    return step


def prepare_dense(samples: int, size: int, dim: int, device: str, how: str) -> Contender:
    """As :func:`prepare_sharded`, of one of the PEERS; compiled before it is measured."""
    import torch

    from caco_scale.benchmark.dense import CompiledBank, DenseBank
    from caco_scale.method.bank_rows import initial_rows

    rows = initial_rows(0, size, dim, 0, torch.float32, device)
    bank = CompiledBank(rows) if how == "compiled" else DenseBank(rows, by_autograd=how == "autograd")
    queries, keys = draw_inputs(samples, dim, device)

    def leaves_of(queries):
        return [q.detach().requires_grad_() for q in queries]

    def step():
        leaves = leaves_of(queries)
        loss, positives, gradient = bank.step(leaves, keys, BANK_LR)
        return functools.partial(as_arrays, loss, positives, leaves, gradient)

    if how == "compiled":
        bank.contrast(leaves_of(queries), keys)
    return step


def as_arrays(
    loss: Tensor, positives: list[Tensor], leaves: list[Any], bank_gradient: Tensor
) -> dict[str, Any]:
    """What a step found, by value: it crosses to the parent. ``positives``: in the order of the queries' views."""
    return {
        "loss": loss.item(),
        "positives": [p.cpu().numpy() for p in positives],
        "query_gradient": [q.grad.cpu().numpy() for q in leaves],
        "bank_gradient": bank_gradient.cpu().numpy(),
    }


# ---- whether all compute the same


def compare(ours: dict[str, Any], theirs: dict[str, Any]) -> dict[str, float]:
    """How far two steps are apart: relative for loss and gradients (of norms), a share for positives."""
    import numpy as np

    def apart(a, b):
        return float(np.linalg.norm(np.asarray(a) - np.asarray(b)) / np.linalg.norm(np.asarray(b)))

    same = np.mean(np.asarray(ours["positives"]) == np.asarray(theirs["positives"]))
    figures = {name: apart(ours[name], theirs[name]) for name in ("loss", "query_gradient", "bank_gradient")}
    return {
        "positives_equal": float(same),
        **{f"{k}_difference": float(f"{v:.2e}") for k, v in figures.items()},
    }


def _words(agreement: dict[str, float]) -> str:
    return ", ".join(f"{name.replace('_', ' ')} {value:g}" for name, value in agreement.items())
