"""Synchronised BatchNorm on gloo ranks against one process with the whole batch."""

import numpy as np
import pytest
import torch
from functorch.compile import make_boxed_func
from gloo import run_ranks
from timm.layers import BatchNormAct2d
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch.utils._python_dispatch import TorchDispatchMode

from caco_scale.distributed.syncbn import SyncBatchNorm, convert_sync_batchnorm, views_in_batch
from caco_scale.errors import UserError

# Name -> (layer, shape behind the batch dimension). Three steps each, so that running statistics accumulate.
LAYERS = {
    "images": (lambda: nn.BatchNorm2d(4), (4, 3, 2)),
    "vectors": (lambda: nn.BatchNorm1d(4), (4,)),
    "cumulative average": (lambda: nn.BatchNorm1d(4, momentum=None), (4, 5)),
    "without affine": (lambda: nn.BatchNorm2d(4, affine=False, eps=1e-3), (4, 2, 2)),
    "with an activation": (lambda: BatchNormAct2d(4), (4, 3, 2)),
    "without running statistics": (lambda: nn.BatchNorm1d(4, track_running_stats=False), (4,)),
}
NUM_SAMPLES, NUM_STEPS = 9, 3
SHARES = {1: [[9]], 2: [[4, 5], [1, 8], [9, 0]], 3: [[3, 3, 3], [6, 1, 2], [0, 7, 2]]}


def make_layer(name):
    torch.manual_seed(0)
    layer = LAYERS[name][0]().double()
    with torch.no_grad():
        for p in layer.parameters():
            p.normal_()
    return layer


def make_batch(name, step):
    generator = torch.Generator().manual_seed(10 + step)
    shape = (NUM_SAMPLES, *LAYERS[name][1])
    x = torch.randn(shape, dtype=torch.float64, generator=generator) * 2 + 3 + step
    return x, torch.randn(shape, dtype=torch.float64, generator=generator)


def train(layer, name, rows):
    """Outputs, input gradients, parameter gradients and buffers of three steps on these rows of the batch."""
    results = []
    for step in range(NUM_STEPS):
        x, output_weights = (tensor[rows[step]] for tensor in make_batch(name, step))
        x.requires_grad_(True)
        layer.zero_grad()
        output = layer(x)
        (output.sin() * output_weights).sum().backward()
        arrays = {"output": output, "input gradient": x.grad}
        arrays |= {f"gradient of {n}": p.grad for n, p in layer.named_parameters()}
        arrays |= {f"buffer {n}": b for n, b in layer.named_buffers()}
        results.append({key: value.detach().clone().numpy() for key, value in arrays.items()})
    layer.eval()
    results[-1]["output in eval mode"] = layer(make_batch(name, 0)[0]).detach().numpy()
    return results


def rank_train(rank, world_size, shares):
    offsets = [sum(share[:rank]) for share in shares]
    rows = [slice(start, start + share[rank]) for start, share in zip(offsets, shares, strict=True)]
    results = {}
    for name in LAYERS:
        layer = convert_sync_batchnorm(make_layer(name))
        assert isinstance(layer, SyncBatchNorm) == (world_size > 1)
        results[name] = train(layer, name, rows)
    return results


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_equals_batchnorm_of_the_whole_batch(world_size):
    shares = (SHARES[world_size] * NUM_STEPS)[:NUM_STEPS]
    ranks = run_ranks(rank_train, world_size, shares)
    for name in LAYERS:
        expected = train(make_layer(name), name, [slice(None)] * NUM_STEPS)
        for step in range(NUM_STEPS):
            for key, reference in expected[step].items():
                parts = [result[name][step][key] for result in ranks]
                if key in ("output", "input gradient"):
                    value = np.concatenate(parts)
                elif key.startswith("gradient"):
                    value = sum(parts)  # a rank holds its part; the engine reduces it like any gradient
                else:
                    value = parts[0]
                    assert all(np.array_equal(value, part) for part in parts), (name, key)
                np.testing.assert_allclose(value, reference, rtol=1e-12, atol=1e-12, err_msg=f"{name}: {key}")


NUM_VIEWS = 3


def train_views(layer, name, rows, at_once):
    """As :func:`train`, of three views that pass at once or one after the other: the batches of the steps."""
    views = [tuple(tensor[rows] for tensor in make_batch(name, step)) for step in range(NUM_VIEWS)]
    inputs = [x.requires_grad_(True) for x, _ in views]
    if at_once:
        with views_in_batch(NUM_VIEWS):
            outputs = layer(torch.cat(inputs)).chunk(NUM_VIEWS)
    else:
        outputs = [layer(x) for x in inputs]
    loss = sum(
        (i + 1) * (out.sin() * w).sum() for i, (out, (_, w)) in enumerate(zip(outputs, views, strict=True))
    )
    loss.backward()
    arrays = {f"gradient of {n}": p.grad for n, p in layer.named_parameters()}
    arrays |= {f"buffer {n}": b for n, b in layer.named_buffers()}
    for view, (x, out) in enumerate(zip(inputs, outputs, strict=True)):
        arrays |= {f"output {view}": out, f"input gradient {view}": x.grad}
    return {key: value.detach().clone().numpy() for key, value in arrays.items()}


def rank_train_views(rank, world_size, shares):
    results = []
    for share in shares:
        rows = slice(sum(share[:rank]), sum(share[: rank + 1]))
        for name in LAYERS:
            layer = convert_sync_batchnorm(make_layer(name), alone=True)
            results.append(train_views(layer, name, rows, at_once=True))
    return results


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_views_in_one_batch_are_forwards_of_their_own_over_all_ranks(world_size):
    ranks = run_ranks(rank_train_views, world_size, SHARES[world_size])
    expected = [train_views(make_layer(name), name, slice(None), at_once=False) for name in LAYERS]
    for number, results in enumerate(zip(*ranks, strict=True)):
        for key, reference in expected[number % len(LAYERS)].items():
            parts = [result[key] for result in results]
            if key.startswith(("output", "input gradient")):
                value = np.concatenate(parts)
            else:
                value = sum(parts) if key.startswith("gradient") else parts[0]
            np.testing.assert_allclose(value, reference, rtol=1e-12, atol=1e-12, err_msg=f"{number}: {key}")


def rank_number_formats(rank, world_size):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 3, generator=generator, dtype=torch.float64) + torch.tensor([1e3, 0.0, -1e3])
    x = x.float().chunk(world_size)[rank]
    layer = convert_sync_batchnorm(nn.BatchNorm1d(3, momentum=1.0))
    shifted = layer(x)
    statistics = layer.running_mean.clone().numpy(), layer.running_var.clone().numpy()
    half = {}
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype=dtype):
            half_input = x.to(dtype).requires_grad_(True)
            output = layer(half_input)
        output.square().sum().backward()
        assert (layer.weight.grad.dtype, half_input.grad.dtype) == (torch.float32, dtype)
        half[str(dtype)] = output.dtype == dtype, layer.running_mean.clone().numpy()
    return shifted.detach().numpy(), statistics, half, x.numpy()


def test_large_means_do_not_cancel_and_half_formats_are_normalised_in_fp32():
    ranks = run_ranks(rank_number_formats, 2)
    x = np.concatenate([result[-1] for result in ranks]).astype(np.float64)
    mean, variance = x.mean(0), x.var(0)
    output = np.concatenate([result[0] for result in ranks])
    np.testing.assert_allclose(output, (x - mean) / np.sqrt(variance + 1e-5), atol=2e-4)
    for _, (running_mean, running_var), half, _ in ranks:
        np.testing.assert_allclose(running_mean, mean, rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(running_var, x.var(0, ddof=1), rtol=1e-5)
        for dtype, (same_dtype, half_mean) in half.items():
            rounded = torch.from_numpy(x).float().to(getattr(torch, dtype.removeprefix("torch."))).double()
            assert same_dtype
            np.testing.assert_allclose(half_mean, rounded.numpy().mean(0), rtol=1e-6, atol=1e-6)


def rank_large_means(rank, world_size):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(96, 3, generator=generator, dtype=torch.float64)
    means = torch.tensor([1e3, 3e4, -1e6], dtype=torch.float64)
    shifted = (x + means).float()
    shares = shifted.split([90, 5, 1])[:world_size]
    layer = convert_sync_batchnorm(nn.BatchNorm1d(3, momentum=1.0))
    layer(shares[rank])
    return layer.running_var.numpy(), shifted.double().var(0).numpy()


def test_a_mean_much_larger_than_the_deviation_costs_no_digits():
    for variance, expected in run_ranks(rank_large_means, 3):
        np.testing.assert_allclose(variance, expected, rtol=2e-3)
        np.testing.assert_allclose(variance[:2], expected[:2], rtol=3e-6)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.layers = nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6, momentum=None), nn.ReLU())

    def forward(self, x):
        return self.layers(self.norm(self.conv(x)).relu()).mean((2, 3))


class Graphs:
    """A backend that runs what it is given, forward and backward graph, and keeps both."""

    def __init__(self):
        self.forward, self.backward = [], []

    def __call__(self, graph, example_inputs):
        keep = lambda kept: lambda g, _: kept.append(g) or make_boxed_func(g.forward)
        return aot_autograd(fw_compiler=keep(self.forward), bw_compiler=keep(self.backward))(
            graph, example_inputs
        )

    @staticmethod
    def collectives(graphs):
        names = [str(node.target) for graph in graphs for node in graph.graph.nodes]
        return sum(name.startswith("_c10d_functional.all_reduce") for name in names)


def rank_compile(rank, world_size, views):
    """Compiled as a whole, with the collectives of its graphs -> equal to eager or not, and the counts."""
    torch.manual_seed(0)
    eager, compiled = (convert_sync_batchnorm(Net().double()) for _ in range(2))
    compiled.load_state_dict(eager.state_dict())
    graphs = Graphs()
    run = torch.compile(compiled, backend=graphs, fullgraph=True)  # a break is an error
    x = torch.randn(3 * views, 3, 7, 7, dtype=torch.float64)
    found = []
    for model in (eager, run):
        images = x.clone().requires_grad_()
        with views_in_batch(views):
            output = model(images)
        output.sin().sum().backward()
        found.append([output, images.grad])
    found[0] += [p.grad for p in eager.parameters()] + list(eager.buffers())
    found[1] += [p.grad for p in compiled.parameters()] + list(compiled.buffers())
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    return len(graphs.forward), graphs.collectives(graphs.forward), graphs.collectives(graphs.backward)


@pytest.mark.parametrize("views", [1, 3])
def test_a_compiled_encoder_is_one_graph_with_one_collective_a_layer_each_way(views):
    assert run_ranks(rank_compile, 2, views) == [(1, 2, 2)] * 2


class Seen(TorchDispatchMode):
    """The names of all operations."""

    def __init__(self):
        super().__init__()
        self.names = []

    @classmethod
    def _should_skip_dynamo(cls):
        return False  # else it imports torch.compile

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = str(function)
        masks = name.startswith("aten.index") and any(
            i is not None and i.dtype == torch.bool for i in args[1]
        )
        self.names.append("mask" if masks else name)
        return function(*args, **(kwargs or {}))


def rank_count(rank, world_size):
    layer = convert_sync_batchnorm(nn.BatchNorm2d(4, momentum=None))
    x = torch.randn(6, 4, 5, 5, requires_grad=True)
    with Seen() as seen:
        layer(x[:3]).sum().backward()
        with views_in_batch(3):
            layer(x).sum().backward()
    waits = [n for n in seen.names if n == "mask" or "_local_scalar_dense" in n or "nonzero" in n]
    return sum("all_reduce" in n for n in seen.names), waits


def test_a_layer_asks_the_ranks_once_each_way_and_the_host_never():
    assert run_ranks(rank_count, 2) == [(4, [])] * 2  # one view, then three in one batch


def rank_convert(rank, world_size):
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Sequential(nn.BatchNorm2d(4), nn.ReLU())).eval()
    before = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    model[1].append(nn.SyncBatchNorm(4).eval())
    before |= {f"1.2.{name}": value for name, value in model[1][2].state_dict(keep_vars=True).items()}
    model = convert_sync_batchnorm(model)
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for layer in (model[1][0], model[1][2]):
        assert (type(layer), layer.training) == (SyncBatchNorm, False)
    assert before.keys() == tensors.keys()
    assert all(before[name] is tensors[name] for name in before)
    return sorted(tensors)


class Doubled(nn.BatchNorm2d):
    def forward(self, x):
        return 2 * super().forward(x)


def rank_refuse(rank, world_size):
    with pytest.raises(UserError, match="Doubled is no BatchNorm with layers behind it"):
        convert_sync_batchnorm(nn.Sequential(Doubled(4)))
    relu = convert_sync_batchnorm(BatchNormAct2d(4)).eval()
    return relu(torch.full((1, 4, 2, 2), -1.0)).max().item()


def test_a_batchnorm_that_computes_something_else_is_refused_and_not_replaced():
    assert run_ranks(rank_refuse, 2) == [0.0, 0.0]


def test_conversion_keeps_names_and_tensors():
    assert "1.0.num_batches_tracked" in run_ranks(rank_convert, 2)[0]


def test_one_process_is_left_alone():
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    layer = model[1]
    assert convert_sync_batchnorm(model) is model
    assert model[1] is layer
