"""The real training step, by recipe and flags, against the same step as one writes it first: fp32, eager, dense.

Both take the same uint8 crops and start from the same weights, with the recipe's encoder, optimizer and bank. The peer
does as the authors' code: contiguous fp32, nothing compiled, the whole bank with its N×K logits, in optimizer and EMA
one parameter after the other. Reading and decoding images is not in it: that is ``benchmark loader``.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import TYPE_CHECKING, Any

from caco_scale.benchmark.measure import Contender, Measured, Round, in_turn, median, significant
from caco_scale.config import Config

if TYPE_CHECKING:  # torch is imported by the contenders, in their processes
    from caco_scale.data.loader import Batch
    from caco_scale.distributed.strategies.base import Strategy
    from caco_scale.method.bank import ShardedBank
    from caco_scale.optim.schedule import HyperParameters

LR, BANK_LR, KEY_MOMENTUM = 0.01, 3.0, 0.99


def measure(config: Config, steps: int, rounds: int, threads: int, device: str) -> Measured:
    """``({"rows": [...], "shares": {...}, ...}, notes)`` of a resolved config; a round is ``steps`` steps."""
    import torch

    from caco_scale.training.assemble import augmentation_note

    arguments = {"config": config, "steps": steps, "device": device}
    ours, peer = f"this project, {config.precision.compute}", "fp32, eager, dense"
    contenders = {
        ours: functools.partial(prepare_ours, **arguments),
        peer: functools.partial(prepare_peer, **arguments),
    }
    measured = in_turn(contenders, rounds, threads)
    images = steps * config.data.global_batch_size
    rows = [_row(name, images, rounds_of) for name, rounds_of in measured.items()]
    for row in rows:
        for figure in ("images_per_cpu_second", "images_per_second"):
            row[f"{figure.removeprefix('images_per_')}_ratio"] = round(row[figure] / rows[1][figure], 2)
    found = {name: rounds_of[0].value for name, rounds_of in measured.items()}
    parts = found[ours]["parts"]
    shares = {name: round(seconds / parts["total"], 4) for name, seconds in parts.items() if name != "total"}
    apart = abs(found[ours]["loss"] - found[peer]["loss"]) / abs(found[peer]["loss"])
    small = sum(shares[name] for name in ("bank", "bank step", "ema", "optimizer"))
    notes = [
        f"{config.recipe}: {config.model.arch}, batch {config.data.global_batch_size:,}, views {_views(config)}, "
        f"K = {config.bank.size:,}, {config.optim.name}, {threads} thread(s), {device}",
        "share of a step: " + ", ".join(f"{name} {share:.1%}" for name, share in shares.items() if share),
        f"bank, EMA and optimizer together: {small:.1%}; losses of the first step apart by {apart:.1e} of their size",
        *filter(None, [augmentation_note(config, torch.device(device))]),
    ]
    result = {"recipe": config.recipe, "arch": config.model.arch, "batch": config.data.global_batch_size}
    return {
        **result,
        "steps": steps,
        "rounds": rounds,
        "rows": rows,
        "shares": shares,
        "loss_apart": apart,
    }, notes


def _row(name: str, images: int, measured: list[Round]) -> dict[str, Any]:
    figures = {
        "images_per_cpu_second": images / median(measured, "cpu_seconds"),
        "images_per_second": images / median(measured, "seconds"),
        "extra_mb": measured[0].extra_bytes / 1e6,
    }
    return {"what": name, **{figure: significant(value) for figure, value in figures.items()}}


def _views(config: Config) -> str:
    views = config.views
    crops = f" + {views.num_local_crops} x {views.local_size}" if views.num_local_crops else ""
    return f"2 x {views.size}{crops}"


# ---- in a contender's process


def draw_batch(config: Config) -> Batch:
    """A loader's :class:`~caco_scale.data.loader.Batch` of random pixels with the recipe's random parameters."""
    import numpy as np
    import torch

    from caco_scale.data.loader import Batch
    from caco_scale.data.order import sample_keys
    from caco_scale.data.views import draw_colour
    from caco_scale.training.assemble import view_specs

    rng, ids = np.random.default_rng(0), np.arange(config.data.global_batch_size)
    crops, params = [], []
    for view, spec in enumerate(view_specs(config.views, config.data.channels)):
        shape = (len(ids), spec.size, spec.size, config.data.channels)
        deep = config.data.bits == 16
        pixels = rng.integers(0, 65536 if deep else 256, shape, dtype=np.uint16 if deep else np.uint8)
        drawn = draw_colour(spec, sample_keys(config.run.seed, 0, ids, view))
        crops.append(torch.from_numpy(pixels))
        params.append({name: torch.from_numpy(value) for name, value in drawn.items()})
    if config.precision.compute != "fp32" and torch.cuda.is_available():
        crops = [crop.pin_memory() for crop in crops]
    return Batch(step=0, epoch=0, keys=[str(i) for i in ids], crops=crops, params=params, corrupt=[])


def build_ours(config: Config, device: str) -> tuple[Strategy, ShardedBank, HyperParameters]:
    """What a step of ``pretrain`` under DDP consists of, in the processes of the environment."""
    from caco_scale.distributed.launch import start_processes
    from caco_scale.method.bank import ShardedBank
    from caco_scale.optim.schedule import HyperParameters
    from caco_scale.training.assemble import build_strategy, parameter_dtype

    strategy = build_strategy(config, "ddp", start_processes())
    dim, dtype = config.model.embedding_dim, parameter_dtype(config)
    bank = ShardedBank(config.bank.size, dim, device=device, dtype=dtype)
    temperatures = {"temperature": config.loss.temperature, "bank_temperature": config.bank.temperature}
    rates = {"lr": LR, "bank_lr": BANK_LR, "key_momentum": KEY_MOMENTUM}
    hp = HyperParameters(step=0, rule="caco", in_warmup=False, is_switch=False, **temperatures, **rates)
    return strategy, bank, hp


def prepare_ours(config: Config, steps: int, device: str) -> Contender:
    """A function that trains ``steps`` steps as ``pretrain`` would in one process."""
    from caco_scale.data.to_device import on_device
    from caco_scale.run.profiling import PartsClock
    from caco_scale.training.assemble import MicroBatches, build_augment, parameter_dtype
    from caco_scale.training.step import train_step

    (strategy, bank, hp), dtype = build_ours(config, device), parameter_dtype(config)
    batch, augment = draw_batch(config), build_augment(config)
    micro = config.data.micro_batch_size or config.data.global_batch_size
    how = config.views, config.precision.channels_last

    def run():
        batches = on_device((batch for _ in range(steps)), strategy.device)
        losses = [
            train_step(strategy, bank, MicroBatches(b, micro, augment, dtype, *how), hp).loss for b in batches
        ]
        return functools.partial(with_parts, losses[0])

    def with_parts(loss):
        with PartsClock(strategy.device) as clock:
            run()
        return {"loss": loss.item(), "parts": clock.seconds()}

    return run


def prepare_peer(config: Config, steps: int, device: str) -> Contender:
    """As :func:`prepare_ours`, of the peer."""
    import torch

    from caco_scale import config as configuration
    from caco_scale.benchmark.dense import DenseBank, PlainOptimizer
    from caco_scale.data.augment import augment
    from caco_scale.method.bank_rows import initial_rows
    from caco_scale.training.assemble import MicroBatches, build_model

    config = configuration.replace(config, precision__compute="fp32", precision__compile="false")
    model = build_model(config).to(device)
    rows = initial_rows(0, config.bank.size, config.model.embedding_dim, 0, torch.float32, device)
    bank = DenseBank(rows, config.loss.temperature, config.bank.temperature, by_autograd=False)
    optimizer = PlainOptimizer(config.optim.name, model.query, LR, config.optim.weight_decay)
    drawn = draw_batch(config)

    def step():
        crops = [view.to(device) for view in drawn.crops]
        params = [{name: values.to(device) for name, values in p.items()} for p in drawn.params]
        batch = dataclasses.replace(drawn, crops=crops, params=params)
        (views,) = MicroBatches(batch, len(batch.keys), augment, torch.float32, config.views)
        queries = [model.query(view) for view in views]
        with torch.no_grad():
            keys = [model.key(view) for view in views[:2]]
        leaves = [query.detach().requires_grad_() for query in queries]
        loss, _, _ = bank.step(leaves, keys, BANK_LR)
        torch.autograd.backward(queries, [leaf.grad for leaf in leaves])
        optimizer.step()
        with torch.no_grad():
            for query, key in zip(model.query.parameters(), model.key.parameters(), strict=True):
                key.copy_(KEY_MOMENTUM * key + (1 - KEY_MOMENTUM) * query)
        return loss

    def run():
        losses = [step() for _ in range(steps)]
        return lambda: {"loss": losses[0].item()}

    return run
