"""The key encoder's moving average."""

import pytest
import torch
from torch import nn

from caco_scale.method.ema import ema_update


def make_pair(dtype=torch.float64):
    torch.manual_seed(0)
    pair = [nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)).to(dtype) for _ in range(2)]
    for module in pair:
        module(torch.randn(8, 5, dtype=dtype) * 3)  # gives the two modules different BatchNorm statistics
    return pair


def snapshot(module):
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def test_parameters_average_and_everything_else_stays():
    query, key = make_pair()
    query_before, key_before = snapshot(query), snapshot(key)
    ema_update(query, key, 0.99)
    parameters = {name for name, _ in key.named_parameters()}
    for name, tensor in key.state_dict().items():
        if name in parameters:
            expected = 0.99 * key_before[name] + 0.01 * query_before[name]
            torch.testing.assert_close(tensor, expected, rtol=1e-14, atol=1e-15)
        else:
            assert torch.equal(tensor, key_before[name]), name
    assert all(torch.equal(tensor, query_before[name]) for name, tensor in query.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_momentum_one_keeps_and_zero_copies_bit_for_bit(dtype):
    query, key = make_pair(dtype)
    before = snapshot(key)
    ema_update(query, key, 1.0)
    assert all(torch.equal(tensor, before[name]) for name, tensor in key.state_dict().items())
    ema_update(query, key, 0.0)
    assert all(torch.equal(q, k) for q, k in zip(query.parameters(), key.parameters(), strict=True))


def test_key_follows_a_resting_query():
    query, key = make_pair()
    start = torch.cat([(k - q).flatten() for q, k in zip(query.parameters(), key.parameters(), strict=True)])
    for _ in range(10):
        ema_update(query, key, 0.9)
    rest = torch.cat([(k - q).flatten() for q, k in zip(query.parameters(), key.parameters(), strict=True)])
    torch.testing.assert_close(rest, start * 0.9**10, rtol=1e-10, atol=1e-14)


def test_modules_of_another_structure_are_refused():
    with pytest.raises(AssertionError):
        ema_update(nn.Linear(2, 2), nn.Linear(2, 2, bias=False), 0.9)
