"""``model.checkpoint_activations``: the same numbers, fewer of them kept; what cannot be repeated is refused.

Under every strategy: the chain of resumes in ``test_strategy.py``.
"""

import copy

import pytest
import torch
from run_directories import make_config
from torch import nn

from caco_scale.distributed.recompute import NotRepeatable, recompute_blocks
from caco_scale.doctor.memory import estimate_memory
from caco_scale.errors import UserError
from caco_scale.method.encoders import build_backbone
from caco_scale.training.checks import Start, check_model, check_precision


def trained(module, views):
    """Forwards of all views, then the backward -> everything that is moved by it."""
    module.train()
    torch.manual_seed(1)  # of dropout
    outputs = [module(view) for view in views]
    sum(output.square().sum() for output in outputs).backward()
    return [*outputs, *(p.grad for p in module.parameters()), *module.buffers()]


@pytest.mark.parametrize(
    ("arch", "options", "pixels"),
    [
        ("tiny", (), 16),
        ("timm/test_vit", ("drop_path_rate=0.5", "proj_drop_rate=0.3"), 32),
        ("timm/test_efficientnet", (), 32),  # BatchNorm with its activation
    ],
)
def test_outputs_gradients_and_statistics_are_equal_to_the_last_digit(arch, options, pixels):
    torch.manual_seed(0)
    plain = build_backbone(arch, options=options)[0].double()
    twice = copy.deepcopy(plain)
    assert recompute_blocks(twice) >= 4
    twice = copy.deepcopy(twice)  # as a key encoder is one
    assert list(twice.state_dict()) == list(plain.state_dict())
    views = [torch.randn(3, 3, pixels, pixels, dtype=torch.float64) for _ in range(2)]
    calls = []
    block = next(part for part in twice.modules() if "forward" in vars(part))
    next(block.children()).register_forward_hook(lambda *_: calls.append(1))
    for one, other in zip(trained(plain, views), trained(twice, views), strict=True):
        assert torch.equal(one, other)
    assert len(calls) == 4  # two views, twice
    with torch.no_grad():
        assert torch.equal(twice.eval()(views[0]), plain.eval()(views[0]))
    assert len(calls) == 5


class Counting(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.norm = nn.Linear(4, 4), nn.LayerNorm(4)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        return self.norm(self.layer(x))


class InPlace(Counting):
    def forward(self, x):
        return self.norm(self.layer(nn.functional.relu_(x)))


class Followed(Counting):
    def forward(self, x):
        return self.norm(self.layer(x))


@pytest.mark.parametrize(
    ("kind", "after", "message"),
    [
        (Counting, nn.Identity, "changes its calls"),
        (InPlace, nn.Identity, "its input 0"),
        (Followed, nn.ReLU, ""),
    ],
)
def test_a_block_whose_second_forward_would_be_another_one_is_refused(kind, after, message):
    module = nn.Sequential(nn.Linear(4, 4), kind(), after(*[True] * (after is nn.ReLU)), kind())
    assert recompute_blocks(module) == 2
    module = nn.Sequential(module, nn.Linear(4, 1))
    if not message:  # a ReLU in the place of a block's output: nothing of the block's own
        return module(torch.randn(2, 4)).sum().backward()
    with pytest.raises(NotRepeatable, match=message):
        module(torch.randn(2, 4))


def start_of(**changes):
    return Start(make_config(**changes), "ddp", 0, 1, torch.device("cpu"))


def test_what_cannot_be_recomputed_is_one_line_before_training():
    on = {"model__checkpoint_activations": True}
    check_model(start_of(**on))
    with pytest.raises(UserError, match="alexnet has no blocks that repeat"):
        check_model(start_of(**on, model__arch="alexnet", model__stem="imagenet", views__size=64))
    with pytest.raises(
        UserError, match=r"give --model.checkpoint_activations false, or --precision.compile false"
    ):
        check_precision(start_of(**on, precision__compile="true"))


def test_the_doctor_counts_less():
    plain, twice = (
        estimate_memory(make_config(model__checkpoint_activations=on), "ddp", 1, 16).activations
        for on in (False, True)
    )
    assert twice < 0.8 * plain
