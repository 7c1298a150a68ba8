"""LARS against its formula in a plain loop, parameter groups, and optimizer state by name."""

import copy

import pytest
import torch
from torch import nn

from caco_scale.errors import UserError
from caco_scale.optim.build import build_optimizer, init_optimizer_state, named_state, parameter_groups
from caco_scale.optim.lars import LARS, squared_norms, trust_ratios

DECAY, MOMENTUM, COEFFICIENT = 1e-2, 0.9, 0.001


def plain_lars(params, gradients, momenta, lr):
    """One step, one parameter at a time, as the formula reads."""
    for i, (p, g) in enumerate(zip(params, gradients, strict=True)):
        u = g.clone()
        if p.ndim > 1:
            u = g + DECAY * p
            p_norm, u_norm = p.pow(2).sum().sqrt().item(), u.pow(2).sum().sqrt().item()
            if p_norm != 0 and u_norm != 0:
                u = u * (COEFFICIENT * p_norm / u_norm)
        momenta[i] = MOMENTUM * momenta[i] + u
        params[i] = p - lr * momenta[i]


def make_params(dtype, zero=None):
    generator = torch.Generator().manual_seed(0)
    shapes = [(7, 5), (7,), (3, 2, 3, 3), (), (1, 1), (64, 33)]
    params = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    if zero is not None:
        params[zero].zero_()
    return [nn.Parameter(p.to(dtype)) for p in params]


def draw_gradients(params, step):
    generator = torch.Generator().manual_seed(100 + step)
    return [10.0**-step * torch.randn(p.shape, generator=generator, dtype=torch.float64) for p in params]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 2e-6)])
def test_steps_follow_the_formula(dtype, tolerance):
    params = make_params(dtype)
    optimizer = LARS(params, lr=0.0, weight_decay=DECAY)
    expected = [p.detach().clone().double() for p in params]
    momenta = [torch.zeros_like(p) for p in expected]
    for step in range(5):
        lr = 0.5 * (step + 1)  # the schedule writes a new one every step
        optimizer.param_groups[0]["lr"] = lr
        gradients = draw_gradients(params, step)
        for p, g in zip(params, gradients, strict=True):
            p.grad = g.to(dtype)
        optimizer.step()
        plain_lars(expected, [p.grad.double() for p in params], momenta, lr)
        for p, reference, mu in zip(params, expected, momenta, strict=True):
            torch.testing.assert_close(p.double(), reference, rtol=tolerance, atol=tolerance)
            buffer = optimizer.state[p]["momentum_buffer"]
            assert buffer.dtype == dtype
            torch.testing.assert_close(buffer.double(), mu, rtol=10 * tolerance, atol=tolerance)
        assert all(torch.equal(p.grad, g.to(dtype)) for p, g in zip(params, gradients, strict=True))


def test_groups_with_the_flag_equal_groups_by_dimension():
    plain, grouped = make_params(torch.float64), make_params(torch.float64)
    module = nn.ParameterList(grouped)
    optimizers = LARS(plain, lr=0.3, weight_decay=DECAY), build_optimizer("lars", module, DECAY)
    for group in optimizers[1].param_groups:
        group["lr"] = 0.3
    for step in range(3):
        for params in (plain, grouped):
            for p, g in zip(params, draw_gradients(params, step), strict=True):
                p.grad = g
        for optimizer in optimizers:
            optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(plain, grouped, strict=True))


def test_the_flag_rules_over_dimensions():
    flat = nn.Parameter(torch.full((4,), 2.0, dtype=torch.float64))
    flat.grad = torch.full((4,), 3.0, dtype=torch.float64)
    LARS([{"params": [flat], "scaled": True}], lr=1.0, weight_decay=0.0).step()
    # |p| = 4, |u| = 6: u <- 3 * 0.001 * 4 / 6 = 0.002
    torch.testing.assert_close(flat.data, torch.full((4,), 1.998, dtype=torch.float64), rtol=1e-14, atol=0)


def test_factor_is_one_where_a_norm_is_zero():
    zero_parameter = nn.Parameter(torch.zeros(2, 2, dtype=torch.float64))
    zero_parameter.grad = torch.ones(2, 2, dtype=torch.float64)
    zero_update = nn.Parameter(torch.ones(2, 2, dtype=torch.float64))
    zero_update.grad = torch.zeros(2, 2, dtype=torch.float64)
    optimizer = LARS([zero_parameter, zero_update], lr=0.5, weight_decay=0.0)
    optimizer.step()
    assert torch.equal(zero_parameter, torch.full((2, 2), -0.5, dtype=torch.float64))
    assert torch.equal(zero_update, torch.ones(2, 2, dtype=torch.float64))


def test_one_dimension_takes_neither_decay_nor_factor():
    bias = nn.Parameter(torch.full((3,), 5.0, dtype=torch.float64))
    bias.grad = torch.full((3,), 2.0, dtype=torch.float64)
    optimizer = LARS([bias], lr=0.1, weight_decay=1.0)
    optimizer.step()
    optimizer.step()
    expected = 5.0 - 0.1 * 2.0 - 0.1 * (0.9 * 2.0 + 2.0)
    torch.testing.assert_close(bias.data, torch.full((3,), expected, dtype=torch.float64), rtol=1e-14, atol=0)


def test_parameters_without_gradient_stay():
    moved, still = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2, 2))
    optimizer = LARS([moved, still], lr=1.0)
    moved.grad = torch.ones(2, 2)
    optimizer.step()
    assert torch.equal(still, torch.ones(2, 2))
    assert not torch.equal(moved, torch.ones(2, 2))


def test_closure_runs_with_gradients():
    weight = nn.Parameter(torch.ones(2, 2))
    optimizer = LARS([weight], lr=1.0)

    def closure():
        loss = weight.square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure) == 4.0
    assert weight.grad is not None


def test_fp32_norms_of_large_tensors_are_right_and_add_over_pieces():
    p = 0.02 * torch.randn(3_000_000, generator=torch.Generator().manual_seed(0)) + 0.01
    exact = p.double().square().sum()
    whole = squared_norms([p], [2 * p])
    assert (whole.shape, whole.dtype) == ((2, 1), torch.float64)
    torch.testing.assert_close(whole[:, 0], torch.stack([exact, 4 * exact]), rtol=1e-12, atol=0)
    pieces = sum(squared_norms([piece], [2 * piece]) for piece in p.split(777_777))
    torch.testing.assert_close(whole, pieces, rtol=1e-12, atol=0)
    assert trust_ratios(whole, 0.001).item() == pytest.approx(0.0005, rel=1e-12)


class Net(nn.Module):
    def __init__(self, bias=True):
        super().__init__()
        self.first = nn.Linear(4, 3, bias=bias)
        self.frozen = nn.Linear(3, 3).requires_grad_(False)
        self.last = nn.Linear(3, 2, bias=bias)

    def forward(self, x):
        return self.last(self.frozen(self.first(x)).relu())


def make_net(bias=True):
    torch.manual_seed(0)
    return Net(bias).double()


def take_steps(net, optimizer, num_steps, lr=0.05):
    for group in optimizer.param_groups:
        group["lr"] = lr
    for step in range(num_steps):
        optimizer.zero_grad()
        x = torch.randn(8, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(step))
        net(x).square().mean().backward()
        optimizer.step()


def test_groups_hold_what_trains_and_decay_matrices_only():
    net = make_net()
    matrices, vectors = parameter_groups(net)
    assert [id(p) for p in matrices["params"]] == [id(net.first.weight), id(net.last.weight)]
    assert [id(p) for p in vectors["params"]] == [id(net.first.bias), id(net.last.bias)]
    assert (matrices["scaled"], vectors["scaled"]) == (True, False)
    for name in ("lars", "sgd", "adamw"):
        groups = build_optimizer(name, net, 0.1).param_groups
        assert [group["weight_decay"] for group in groups] == [0.1, 0.0]
        assert [group["lr"] for group in groups] == [0.0, 0.0]
    assert build_optimizer("sgd", net, 0.1).defaults["momentum"] == 0.9
    assert build_optimizer("adamw", net, 0.1).defaults["betas"] == (0.9, 0.95)


@pytest.mark.parametrize("name", ["lars", "sgd", "adamw"])
def test_a_group_may_be_empty(name):
    net = make_net(bias=False)
    before = net.first.weight.clone()
    optimizer = build_optimizer(name, net, 0.1)
    init_optimizer_state(optimizer)
    take_steps(net, optimizer, 2)
    assert optimizer.param_groups[1]["params"] == []
    assert not torch.equal(net.first.weight, before)


def test_unknown_optimizer_names_the_nearest():
    with pytest.raises(UserError, match="no optimizer 'adamv' \\(did you mean adamw\\?\\)"):
        build_optimizer("adamv", make_net(), 0.1)


def states(optimizer, net):
    return {name: value.clone() for name, value in named_state(optimizer, net).items()}


@pytest.mark.parametrize("name", ["lars", "sgd", "adamw"])
def test_state_created_before_the_first_step_changes_nothing(name):
    early, late = make_net(), make_net()
    prepared, plain = build_optimizer(name, early, 0.1), build_optimizer(name, late, 0.1)
    before = copy.deepcopy(early.state_dict())
    init_optimizer_state(prepared)
    assert all(torch.equal(tensor, before[key]) for key, tensor in early.state_dict().items())
    take_steps(early, prepared, 3)
    take_steps(late, plain, 3)
    assert all(torch.equal(a, b) for a, b in zip(early.parameters(), late.parameters(), strict=True))
    state, reference = states(prepared, early), states(plain, late)
    assert state.keys() == reference.keys()
    for key, value in state.items():
        assert value.dtype == reference[key].dtype, key
        assert torch.equal(value, reference[key]), key
    init_optimizer_state(prepared)  # existing state stays
    assert all(torch.equal(value, state[key]) for key, value in states(prepared, early).items())


KEYS = {"lars": ["momentum_buffer"], "sgd": ["momentum_buffer"], "adamw": ["exp_avg", "exp_avg_sq", "step"]}


@pytest.mark.parametrize("name", ["lars", "sgd", "adamw"])
def test_state_by_name_loads_into_a_fresh_optimizer(name):
    net = make_net()
    optimizer = build_optimizer(name, net, 0.1)
    take_steps(net, optimizer, 3)
    saved = states(optimizer, net)
    layers = ("first.weight", "first.bias", "last.weight", "last.bias")
    assert sorted(saved) == sorted(f"{layer}/{key}" for layer in layers for key in KEYS[name])

    resumed_net = make_net()
    resumed_net.load_state_dict(net.state_dict())
    resumed = build_optimizer(name, resumed_net, 0.1)
    init_optimizer_state(resumed)
    for key, value in named_state(resumed, resumed_net).items():
        value.copy_(saved[key])
    take_steps(net, optimizer, 2)
    take_steps(resumed_net, resumed, 2)
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), resumed_net.parameters(), strict=True))


def test_state_by_name_asks_for_its_creation():
    net = make_net()
    with pytest.raises(AssertionError, match="init_optimizer_state"):
        named_state(build_optimizer("sgd", net, 0.1), net)
