"""Run by ``accelerate launch`` in tests: train a tiny model under the launch's strategy and save its whole state.

    accelerate launch --config_file ds_configs/zero2.yaml --num_processes 2 tests/strategy_cases.py FOLDER CASE ...

Each case is JSON: {"name": ..., and what it changes of :data:`DEFAULTS`}. The state ends in FOLDER/<name>.
"""

import functools
import json
import os
import sys
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

from caco_scale.checkpoint.contents import restore, training_state
from caco_scale.checkpoint.write import Checkpointer
from caco_scale.distributed.launch import launched_strategy, start_processes
from caco_scale.distributed.recompute import recompute_blocks
from caco_scale.distributed.strategies.build import build_strategy
from caco_scale.distributed.syncbn import convert_sync_batchnorm
from caco_scale.method.bank import ShardedBank
from caco_scale.method.encoders import TinyResNet, build_backbone
from caco_scale.method.model import Encoder, QueryKeyModel, synchronise_key
from caco_scale.method.projector import build_predictor, build_projector
from caco_scale.optim.build import build_optimizer, init_optimizer_state, state_bytes
from caco_scale.optim.schedule import HyperParameters
from caco_scale.training.step import train_step

DEFAULTS = {
    "optimizer": "lars",
    "lr": 0.2,
    "bank_lr": 0.05,
    "weight_decay": 1e-2,
    "dtype": "float32",
    "pixels": 16,
    "global_batch_size": 24,
    "num_micro": 1,
    "bank_size": 24,
    "dim": 32,
    "rule": "caco",
    "predictor": False,
    "warmup_steps": 2,
    "steps": 12,
    "start": None,  # checkpoint to begin from
    "not_finite_step": None,  # its gradients are not finite on the last rank, while its loss is
    "bad_loss_step": None,  # an image is not finite: the loss is not either
    "save_at": [],  # steps before which the state is saved too, in FOLDER/<name>-<step>
    "evaluate": False,
    "zero": {},  # DeepSpeed settings that differ from the launch's
    "plain_lars": False,  # LARS as it would be if nobody told it what its flat tensors are made of
    "crops": 0,  # local crops of half the pixels beside the two views
    "at_once": False,  # in one forward
    "recompute": False,  # the blocks' activations in the backward
    "arch": None,  # a backbone by name instead of the smooth one below
    "gain": False,  # parameters of one element, of which most ranks hold nothing; "alone": nothing else trains
}


class SmoothResNet(TinyResNet):
    """Without ReLU's kink: one activation within rounding of 0 would move the gradients by parts in a thousand."""

    def __init__(self, gain=False):
        super().__init__()
        smoothen(self)
        self.gain = nn.Parameter(torch.ones(1, 1)) if gain else None
        self.offset = nn.Parameter(torch.zeros(1)) if gain else None

    def forward(self, images):
        x = self.bn1(self.conv1(images))
        x = F.silu(x if self.gain is None else self.gain * x + self.offset)
        return self.layer4(self.layer3(self.layer2(self.layer1(x)))).mean(dim=(2, 3))


def smoothen(module):
    for name, child in module.named_children():
        if isinstance(child, nn.ReLU):
            setattr(module, name, nn.SiLU())
        else:
            smoothen(child)
    return module


def build(case, strategy_name, accelerator):
    torch.manual_seed(0)
    backbone, num_features = SmoothResNet(bool(case["gain"])), SmoothResNet.num_features
    if case["arch"]:
        backbone, num_features = build_backbone(case["arch"])
    projector = smoothen(build_projector(num_features, 32, case["dim"]))
    predictor = smoothen(build_predictor(case["dim"], 32)) if case["predictor"] else None
    encoder = Encoder(backbone, projector, predictor)
    if case["at_once"]:
        convert_sync_batchnorm(encoder, alone=True)
    model = QueryKeyModel(encoder, crops_at_once=case["at_once"])
    if case["gain"] == "alone":
        for name, parameter in model.query.named_parameters():
            parameter.requires_grad_(name in ("backbone.gain", "backbone.offset"))
    if case["recompute"]:
        assert recompute_blocks(model.query) == 4
    dtype = getattr(torch, case["dtype"])
    optimizer = functools.partial(build_optimizer, case["optimizer"], weight_decay=case["weight_decay"])
    strategy = build_strategy(strategy_name, accelerator, model.to(dtype), optimizer)
    init_optimizer_state(strategy.optimizer, strategy.partitions)
    if case["plain_lars"]:
        strategy.optimizer._partitions = {}
        strategy.optimizer._own.update(part.flat for part in strategy.partitions)
        for group in strategy.optimizer.param_groups:
            group["scaled"] = None
    bank = ShardedBank(case["bank_size"], case["dim"], device=strategy.device, dtype=dtype, seed=0)
    return strategy, bank


def views_of(case, step, rank, world_size):
    """This rank's micro-batches of the global batch of a step."""
    n, pixels = case["global_batch_size"], case["pixels"]
    coarse = torch.randn(n, 3, 4, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    images = 2 * torch.nn.functional.interpolate(coarse, size=(pixels, pixels), mode="bilinear")
    generator = torch.Generator().manual_seed(1000 + step)
    both = [
        images + 0.2 * torch.randn(images.shape, generator=generator, dtype=torch.float64) for _ in range(2)
    ]
    small = torch.nn.functional.interpolate(images, size=(pixels // 2, pixels // 2), mode="bilinear")
    both += [
        small + 0.2 * torch.randn(small.shape, generator=generator, dtype=torch.float64)
        for _ in range(case["crops"])
    ]
    if step == case["bad_loss_step"]:
        both[0][-1] = float("nan")
    # Micro-batches are cut from the global batch and then shared, so that BatchNorm sees the same at any world size.
    micro_batches = [[view.to(getattr(torch, case["dtype"])) for view in both]]
    micro_batches = list(zip(*(view.chunk(case["num_micro"]) for view in micro_batches[0]), strict=True))
    return [[view.chunk(world_size)[rank] for view in views] for views in micro_batches]


def hyper_parameters(case, step):
    warm = step < case["warmup_steps"]
    return HyperParameters(
        step=step,
        rule="moco" if warm else case["rule"],
        temperature=0.2,
        bank_temperature=0.2,
        lr=case["lr"] * (1 + step % 3) / 3,
        bank_lr=0.0 if warm else case["bank_lr"],
        key_momentum=0.9 + 0.005 * step,
        in_warmup=warm,
        is_switch=step == case["warmup_steps"],
    )


def run(case, strategy, bank):
    """Train from the start or a checkpoint -> what each rank reports."""
    first = 0
    if case["start"]:
        first = restore(case["start"], strategy, bank)["step"]
    moved, losses = [], []
    for step in range(first, case["steps"]):
        if step in case["save_at"]:
            save(case, strategy, bank, step, f"-{step}")
        hp = hyper_parameters(case, step)
        if hp.is_switch:
            synchronise_key(strategy.module)
            bank.reset_velocity()
        hook = None
        if step == case["not_finite_step"] and strategy.rank == strategy.world_size - 1:
            hook = _poison(strategy)
        micro_batches = [
            [view.to(strategy.device) for view in views]
            for views in views_of(case, step, strategy.rank, strategy.world_size)
        ]
        result = train_step(strategy, bank, micro_batches, hp)
        if hook:
            hook.remove()
        moved.append(bool(result.moved))
        losses.append(result.loss.item())
    return {"moved": moved, "losses": losses, "optimizer_state_bytes": state_bytes(strategy.optimizer)}


def _poison(strategy):
    """Gradients of this rank that are not finite, with a finite loss."""

    def spoil(module, inputs, output):
        if output.requires_grad:
            output.register_hook(lambda grad: grad * float("nan"))

    return strategy.module.query.projector.register_forward_hook(spoil)


def save(case, strategy, bank, step, suffix=""):
    checkpointer = Checkpointer(case["folder"] / (case["name"] + suffix))
    checkpointer.save(step, training_state(strategy, bank, {}), wait=True)
    checkpointer.close()


def main(folder, cases):
    accelerator = start_processes()
    name = launched_strategy(os.environ)
    for given in cases:
        case = DEFAULTS | {"folder": Path(folder)} | given
        if case["zero"]:
            settings = accelerator.state.deepspeed_plugin.deepspeed_config["zero_optimization"]
            settings.clear()
            settings.update(case["zero"])
        strategy, bank = build(case, name, accelerator)
        report = {"strategy": strategy.name, "world_size": strategy.world_size} | run(case, strategy, bank)
        report["empty_partitions"] = sum(not partition.pieces for partition in strategy.partitions or [])
        if case["evaluate"]:
            images = views_of(case, 99, 0, 1)[0][0]
            if strategy.rank == 0:
                images = images[: len(images) // 2]  # ranks may evaluate different numbers of images
            with strategy.evaluation_encoder() as encoder, torch.no_grad():
                encoder.eval()
                report["features"] = encoder.features(images.to(strategy.device)).double().sum(1).tolist()
                encoder.train()
            run(case | {"start": None, "steps": 1}, strategy, bank)  # training goes on afterwards
        else:
            save(case, strategy, bank, case["steps"])
        path = case["folder"] / f"{case['name']}.rank{strategy.rank}.json"
        path.write_text(json.dumps(report))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(sys.argv[1], [json.loads(text) for text in sys.argv[2:]])
