"""LARS in a stranger's own training loop: DeepSpeed ZeRO-1/2/3 and FSDP2 against one plain process.

The loops are written as their documentation says, without anything of this project but ``LARS`` and ``attach``.
"""

import copy
import os
import pickle

import pytest
import torch
from gloo import run_ranks
from torch import nn
from torch.nn import functional as F

from caco_scale.distributed.launch import import_deepspeed
from caco_scale.errors import UserError
from caco_scale.optim.build import parameter_groups
from caco_scale.optim.lars import LARS

STEPS, LR, DECAY = 5, 0.5, 1e-2
TOLERANCE = 1e-5  # fp32 rounding; a plain LARS on flat tensors is off by 0.1 and more


def make_model():
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8), nn.Tanh(), nn.Flatten(), nn.Linear(128, 7), nn.Tanh()]
    return nn.Sequential(*layers, nn.Linear(7, 4))


def make_lars(model, grouped):
    return LARS(parameter_groups(model) if grouped else model.parameters(), lr=LR, weight_decay=DECAY)


def batch(step, rank=0, world_size=1):
    generator = torch.Generator().manual_seed(step)
    images, labels = torch.randn(8, 3, 6, 6, generator=generator), torch.arange(8) % 4
    return images.chunk(world_size)[rank], labels.chunk(world_size)[rank]


def whole_state(model):
    return {name: p.detach().clone().double().numpy() for name, p in model.named_parameters()}


def one_process(grouped=False):
    model = make_model()
    optimizer = make_lars(model, grouped)
    for step in range(STEPS):
        images, labels = batch(step)
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
    return whole_state(model)


def deepspeed_loop(rank, world_size, stage, grouped, attach, **zero):
    deepspeed = import_deepspeed()
    model = make_model()
    lars = make_lars(model, grouped)
    config = {
        "train_micro_batch_size_per_gpu": 8 // world_size,
        "zero_allow_untested_optimizer": True,
        "gradient_clipping": 0.0,  # by default it clips at a norm of 1
        "zero_optimization": {"stage": stage, **zero},
    }
    engine, *_ = deepspeed.initialize(model=model, optimizer=lars, config=config)
    if attach:
        lars.attach(engine)
    for step in range(STEPS):
        images, labels = batch(step, rank, world_size)
        engine.backward(F.cross_entropy(engine(images), labels))
        engine.step()
    with deepspeed.zero.GatheredParameters(list(model.parameters()), enabled=stage == 3):
        return whole_state(model)


def fsdp2_loop(rank, world_size, grouped):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = make_model()
    for layer in (model[0], model[4], model):
        fully_shard(layer, mesh=init_device_mesh("cpu", (world_size,)))
    optimizer = make_lars(model, grouped)
    for step in range(STEPS):
        images, labels = batch(step, rank, world_size)
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
    return {name: p.full_tensor().detach().double().numpy() for name, p in model.named_parameters()}


def fsdp1_loop(original, first):
    """A step under torch's older wrapper; ``first``: the optimizer is made before the model is wrapped."""
    from torch.distributed.fsdp import FullyShardedDataParallel

    model = make_model()
    lars = make_lars(model, False) if first else None
    model = FullyShardedDataParallel(model, use_orig_params=original, device_id=torch.device("cpu"))
    lars = lars or make_lars(model, False)
    F.cross_entropy(model(batch(0)[0]), batch(0)[1]).backward()
    lars.step()


def every_engine(rank, world_size):
    """All loops, one after the other in the same processes: {name: state or the error's line}."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    found = {}
    for stage in (1, 2, 3):
        for grouped in (False, True):
            found[f"zero{stage}, {grouped=}"] = deepspeed_loop(rank, world_size, stage, grouped, attach=True)
        try:
            found[f"unattached {stage}"] = deepspeed_loop(rank, world_size, stage, False, attach=False)
        except UserError as error:
            found[f"unattached {stage}"] = str(error)
    found["small subgroups"] = deepspeed_loop(rank, world_size, 3, False, attach=True, sub_group_size=50)
    for grouped in (False, True):
        found[f"fsdp2, {grouped=}"] = fsdp2_loop(rank, world_size, grouped)
    for original, first in ((False, False), (True, False), (True, True)):
        try:
            found[f"fsdp1, {original=}, {first=}"] = fsdp1_loop(original, first)
        except UserError as error:
            found[f"fsdp1, {original=}, {first=}"] = str(error)
    return found


def distance(found, expected):
    """The largest relative difference, in L2, of a parameter."""
    assert found.keys() == expected.keys()
    return max(
        float(((found[name] - value) ** 2).sum() ** 0.5 / (value**2).sum() ** 0.5)
        for name, value in expected.items()
    )


def test_a_plain_loop_of_every_engine_is_one_plain_process():
    expected = one_process()
    assert distance(one_process(grouped=True), expected) == 0
    assert distance(whole_state(make_model()), expected) > 0.01  # it did move
    for found in run_ranks(every_engine, 2):
        for stage in (1, 2, 3):
            line = found.pop(f"unattached {stage}")
            assert isinstance(line, str), f"ZeRO-{stage} trained with another optimizer"
            assert "lars.attach(engine)" in line
            assert "\n" not in line
        refused = [found.pop(name) for name in list(found) if name.startswith("fsdp1")]
        assert len(refused) == 3
        for line in refused:
            assert line is not None, "FSDP1 trained with another optimizer"
            assert "fully_shard (FSDP2)" in line
        assert len(found) == 9
        differences = {name: distance(state, expected) for name, state in found.items()}
        assert all(value <= TOLERANCE for value in differences.values()), differences


def test_a_flat_tensor_in_place_of_the_parameters_is_refused():
    """As an engine does it: not with its first step, which has no gradients, but with the next."""
    model = make_model()
    lars = make_lars(model, grouped=False)
    flat = nn.Parameter(torch.cat([p.detach().flatten() for p in model.parameters()]))
    lars.param_groups[0]["params"] = [flat]
    before, flat.grad = flat.detach().clone(), torch.zeros_like(flat)
    lars.step()
    assert torch.equal(flat, before)
    flat.grad[0] = 1.0
    with pytest.raises(UserError, match=r"1 flat tensor.*lars\.attach\(engine\)"):
        lars.step()
    assert torch.equal(flat, before)


class Engine:
    """What ``attach`` looks at of an engine."""

    device = torch.device("cpu")

    def __init__(self, optimizer):
        self.optimizer = optimizer


def test_attach_refuses_an_engine_of_another_optimizer_and_takes_one_that_partitions_nothing():
    lars, other = make_lars(make_model(), False), make_lars(make_model(), False)
    lars.attach(Engine(lars))
    with pytest.raises(UserError, match="does not step this optimizer"):
        lars.attach(Engine(other))
    with pytest.raises(UserError, match=r"Engine makes of parameters is not known.*ZeRO stage 1, 2 or 3"):
        lars.attach(Engine(Engine(lars)))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_a_copied_optimizer_steps_its_own_parameters(duplicate):
    model = make_model()
    both = duplicate((model, make_lars(model, False)))
    for net, optimizer in ((model, make_lars(model, False)), both):
        images, labels = batch(0)
        F.cross_entropy(net(images), labels).backward()
        optimizer.step()
    assert distance(whole_state(both[0]), whole_state(model)) == 0
