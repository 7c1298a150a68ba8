"""The step: accumulation is the whole batch, and a step that is not finite moves nothing on any rank."""

import copy
import dataclasses
import functools
import warnings
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs
from gloo import run_ranks
from torch import nn

from caco_scale.benchmark.counts import Counts
from caco_scale.checkpoint.contents import training_state
from caco_scale.checkpoint.state import Block
from caco_scale.distributed.buffers import BufferSnapshot
from caco_scale.distributed.strategies.ddp import DataParallel
from caco_scale.method.bank import ShardedBank
from caco_scale.method.model import Encoder, QueryKeyModel
from caco_scale.optim.build import build_optimizer, init_optimizer_state
from caco_scale.optim.schedule import HyperParameters
from caco_scale.training import step as training_step
from caco_scale.training.step import train_step

HP = HyperParameters(
    step=0,
    rule="caco",
    temperature=0.1,
    bank_temperature=0.1,
    lr=0.5,
    bank_lr=1.0,
    key_momentum=0.9,
    in_warmup=False,
    is_switch=False,
)


class NotDifferentiable(torch.autograd.Function):
    """The identity with a gradient of NaN."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return torch.full_like(grad, torch.nan)


class Backbone(nn.Module):
    def __init__(self, batch_norm):
        super().__init__()
        self.linear = nn.Linear(12, 6)
        self.norm = nn.BatchNorm1d(6) if batch_norm else nn.Identity()
        self.broken = False

    def forward(self, images):
        features = self.norm(self.linear(images.flatten(1)))
        return NotDifferentiable.apply(features) if self.broken else features


def make(batch_norm=True, optimizer="lars", device="cpu"):
    torch.manual_seed(0)
    several = torch.distributed.is_initialized()
    handlers = [InitProcessGroupKwargs(backend="gloo")] if several else []
    handlers.append(DistributedDataParallelKwargs(broadcast_buffers=False))
    accelerator = Accelerator(cpu=device == "cpu", kwargs_handlers=handlers)
    encoder = Encoder(Backbone(batch_norm), nn.Linear(6, 5))
    build = functools.partial(build_optimizer, optimizer, weight_decay=1e-4)
    strategy = DataParallel(accelerator, QueryKeyModel(encoder).double(), build)
    init_optimizer_state(strategy.optimizer)
    return strategy, ShardedBank(7, 5, dtype=torch.float64, device=device)


def views(rows):
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(2, 12, 3, 2, 2, generator=generator, dtype=torch.float64)
    return [view[rows] for view in images]


def state(strategy, bank):
    tensors = training_state(strategy, bank, {}).tensors
    return {
        name: (value.local if isinstance(value, Block) else value).detach().clone()
        for name, value in tensors.items()
    }


def difference(a, b):
    return max(float((a[name].double() - b[name].double()).abs().max()) for name in a if a[name].numel())


@pytest.mark.parametrize("optimizer", ["lars", "sgd", "adamw"])
@pytest.mark.parametrize("rule", ["caco", "moco", "adco"])
def test_accumulation_is_the_whole_batch(rule, optimizer):
    hp = copy.copy(HP)
    object.__setattr__(hp, "rule", rule)
    whole, accumulated = make(False, optimizer), make(False, optimizer)
    for _ in range(3):
        result = train_step(*whole, [views(slice(None))], hp)
        parts = train_step(*accumulated, [views(slice(i, i + 4)) for i in (0, 4, 8)], hp)
        assert result.moved
        assert parts.moved
        torch.testing.assert_close(result.loss, parts.loss, rtol=1e-12, atol=1e-12)
    assert difference(state(*whole), state(*accumulated)) < 1e-12
    assert difference(state(*whole), state(*make(False, optimizer))) > 1e-3  # it did move


def not_finite_steps(rank, world_size):
    """On rank 1 alone: a NaN in an image, then a gradient of NaN under a finite loss, then a good step."""
    strategy, bank = make()
    rows = slice(rank * 12 // world_size, (rank + 1) * 12 // world_size)
    last = rank == world_size - 1
    train_step(strategy, bank, [views(rows)], HP)
    before, facts = state(strategy, bank), []
    poisoned = views(rows)
    if last:
        poisoned[0][0] = torch.nan
    for images, broken in ((poisoned, False), (views(rows), True)):
        strategy.module.query.backbone.broken = broken and last
        result = train_step(strategy, bank, [images], HP)
        same = all(torch.equal(value, before[name]) for name, value in state(strategy, bank).items())
        facts.append((result.moved, bool(result.loss.isfinite()), same))
    strategy.module.query.backbone.broken = False
    facts.append(train_step(strategy, bank, [views(rows)], HP).moved)
    return facts, {name: value.numpy() for name, value in state(strategy, bank).items()}


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_step_that_is_not_finite_moves_nothing_on_every_rank_alike(world_size):
    results = [not_finite_steps(0, 1)] if world_size == 1 else run_ranks(not_finite_steps, world_size)
    strategy, bank = make()
    for _ in range(2):
        train_step(strategy, bank, [views(slice(None))], HP)
    expected = state(strategy, bank)
    for facts, found in results:
        assert facts == [(False, False, True), (False, True, True), True]
        for name, value in found.items():  # as if the two bad steps had never been
            if not name.startswith("bank."):
                torch.testing.assert_close(torch.as_tensor(value), expected[name], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("optimizer", ["lars", "sgd"])
@pytest.mark.parametrize("rule", ["caco", "moco"])
def test_the_host_waits_for_the_device_once_a_step_to_know_whether_it_was_finite(rule, optimizer):
    hp = dataclasses.replace(HP, rule=rule)
    step = make(optimizer=optimizer)
    train_step(*step, [views(slice(None))], hp)
    for micro_batches in (1, 3):
        batches = [views(slice(i, i + 12 // micro_batches)) for i in range(0, 12, 12 // micro_batches)]
        with Counts() as counts:
            train_step(*step, batches, hp)
        assert counts.waits == ["_local_scalar_dense"]


class Keeper(nn.Module):
    """Moves one buffer in place, replaces one, grows one, and makes one that was not there."""

    def __init__(self):
        super().__init__()
        for name in ("moved", "replaced", "grown"):
            self.register_buffer(
                name, torch.zeros(2, dtype=torch.int64 if name == "moved" else torch.float64)
            )
        self.register_buffer("made", None)

    def forward(self, x):
        self.moved += 1
        self.replaced = self.replaced + 1
        self.grown = torch.ones(len(self.grown) + 1)
        self.made = torch.ones(1)
        return x


def test_buffers_are_again_what_they_were_however_a_forward_moved_them():
    module = nn.Sequential(Keeper(), nn.BatchNorm1d(3))
    snapshot = BufferSnapshot(module)
    for _ in range(3):
        snapshot.keep()
        with Counts() as counts:
            snapshot.keep()
        assert counts.operations.total() <= 4  # one for each type, and one more for what has grown
        before = {name: (b, b.clone()) for name, b in module.named_buffers()}
        module(torch.randn(4, 3))
        snapshot.restore()
        after = dict(module.named_buffers())
        assert after.keys() == before.keys()
        assert all(after[name] is b and torch.equal(b, copied) for name, (b, copied) in before.items())
        module(torch.randn(4, 3))  # a step that moves them


def step_of_two(rank, world_size):
    step = make()
    rows = slice(rank * 6, rank * 6 + 6)
    for _ in range(2):  # the second lays out DDP's buckets, the bank has agreed in the first
        train_step(*step, [views(rows)], HP)
    counted = []
    for size in (6, 6, 3, 3):
        micro_batches = list(zip(*(view.split(size) for view in views(rows)), strict=True))
        with Counts() as counts:
            train_step(*step, micro_batches, HP)
        counted.append((counts.waits, sum(counts.collectives.values()), counts.exchanges))
    return counted


def test_two_ranks_exchange_no_facts_between_hosts_in_a_step_and_wait_once():
    # Collectives: BatchNorm of 4 forwards and 2 backwards, the bank's (in float64 the nearest row takes two), DDP's.
    once = (["_local_scalar_dense"], 6 + 5 + 1, 0)
    for first, second, new_shape, accumulated in run_ranks(step_of_two, 2):
        assert first == second == once
        assert new_shape[2] == 2  # agreed on by an exchange of objects, at the first micro-batch
        assert accumulated == (once[0], 2 * 11 + 1, 0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("optimizer", ["lars", "sgd"])
def test_on_a_gpu_torch_itself_sees_no_other_wait(optimizer):
    strategy, bank = make(optimizer=optimizer, device="cuda")
    images = [view.cuda() for view in views(slice(None))]
    train_step(strategy, bank, [images], HP)
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            train_step(strategy, bank, [images], HP)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len([w for w in seen if "synchronizing" in str(w.message)]) == 1


def test_the_encoder_the_bank_and_the_key_move_in_this_order(monkeypatch):
    """Each follows the state that the one before it left: the paper's order of a step."""
    calls = []
    contrast = SimpleNamespace(loss=torch.ones((), requires_grad=True), positive_probability=torch.ones(()))
    bank = SimpleNamespace(
        contrast=lambda *a, **k: calls.append("contrast") or contrast,
        step=lambda *a, **k: calls.append("bank"),
    )
    real, _ = make()

    class Recorder:
        module, buffers = real.module, real.buffers
        micro_step = real.micro_step

        def __call__(self, images):
            return real(images)

        def backward(self, loss):
            calls.append("backward")

        def step(self, loss, lr):
            calls.append("encoder")
            return True

    monkeypatch.setattr(training_step, "ema_update", lambda *moved: calls.append("key"))
    train_step(Recorder(), bank, [views(slice(0, 6)), views(slice(6, 12))], HP)
    assert calls == ["contrast", "backward"] * 2 + ["encoder", "bank", "key"]
