"""BatchNorm over the global batch, the same on CPU and CUDA.

torch's SyncBatchNorm refuses CPU tensors; on CUDA it makes the host wait three times in every forward (it indexes by a
mask), and breaks a compiled graph there.

Several views may pass in one batch, one behind the other (:func:`views_in_batch`); each has statistics of its own, as
in a forward of its own, and all of them cross ranks together.

Shapes: B this rank's batch, V views in it, C channels, N values per channel and view on all ranks. A statistic is (C,)
for one view and (V, C) for several.
"""

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional
from torch import nn
from torch.autograd.function import once_differentiable

from caco_scale.distributed.collectives import world_size
from caco_scale.errors import UserError

_num_views = 1


@contextmanager
def views_in_batch(number: int) -> Generator[None]:
    """Within it a batch (V B, C, ...) is so many views, one behind the other; :class:`SyncBatchNorm` tells which."""
    global _num_views
    _num_views = number
    try:
        yield
    finally:
        _num_views = 1


def convert_sync_batchnorm(
    module: nn.Module, group: dist.ProcessGroup | None = None, alone: bool = False
) -> nn.Module:
    """``module`` with every BatchNorm synchronised over the ranks of ``group``; untouched on one rank.

    ``alone``: also on one rank, for :func:`views_in_batch`; it then computes as torch's own, view by view.

    Parameters and buffers stay the same objects under the same names. A subclass whose layers follow the
    normalisation (timm's BatchNorm with its activation) keeps them.

    Raises:
        UserError: a subclass of BatchNorm that computes something else.
    """
    if world_size(group) == 1 and not alone:
        return module
    return _convert(module, group)


def _convert(module, group):
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        plain = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm, SyncBatchNorm)
        return _synchronised(module, group, follows=type(module) not in plain)
    for name, child in module.named_children():
        setattr(module, name, _convert(child, group))
    return module


def _synchronised(source, group, follows):
    """The same layer over all ranks; with ``follows``: and then the layers that it holds, compared with it."""
    layer = (_ThenLayers if follows else SyncBatchNorm).from_batchnorm(source, group)
    if not follows:
        return layer
    layer._modules.update(source._modules)
    images = torch.linspace(-3, 3, 4 * source.num_features).view(2, source.num_features, 2, 1)
    images = images.to(next(iter([*source.buffers(), *source.parameters()]), images))
    was_training = source.training
    try:
        with torch.no_grad():
            same = torch.equal(source.eval()(images.clone()), layer.eval()(images.clone()))
    except Exception:  # of a layer that nobody here has written
        same = False
    source.train(was_training)
    if not same:
        raise UserError(
            f"{type(source).__module__}.{type(source).__name__} is no BatchNorm with layers behind it, and cannot be "
            "synchronised over processes: use torch.nn's own, or train with one process"
        )
    return layer.train(was_training)


@torch.no_grad()
def _global_statistics(x, views, group):
    """N (1,), mean and biased variance of all ranks' values, in float64: one all-reduce of 2 V C + 1 numbers.

    A rank adds up its values about its own mean; only means and variances of ranks are combined by squares. As float64
    has more than twice float32's digits, a large mean takes none from a small variance there; of float64 inputs
    the variance is exact to 1e-16 times the square of mean over deviation.
    """
    shape = (x.size(1),) if views == 1 else (views, x.size(1))
    numbers = views * x.size(1)
    if x.numel():
        mean, variance = (part.double().flatten() for part in _local_statistics(x, views))
        sums = torch.cat([mean, torch.addcmul(variance, mean, mean), mean.new_ones(1)])
        sums = sums * (x.numel() // numbers)
    else:
        sums = torch.zeros(2 * numbers + 1, dtype=torch.float64, device=x.device)
    mean, square, count = _summed(sums, group).split([numbers, numbers, 1])
    mean = mean / count
    variance = torch.addcmul(square / count, mean, mean, value=-1).clamp_(min=0)
    return count, mean.view(shape), variance.view(shape)


def _local_statistics(x, views):
    """Mean and biased variance, in float32 at least."""
    if x.is_cuda and not torch.compiler.is_compiling():  # one pass, torch's own
        mean, inverse_std = _joined([torch.batch_norm_stats(part, 0.0) for part in x.chunk(views)])
        return mean, inverse_std.square().reciprocal()
    values, count = _at_least_float32(_by_view(x, views)), x.numel() // x.size(1) // views
    channel = 1 if views == 1 else 2
    dims = [channel - 1, *range(channel + 1, values.dim())]
    if torch.compiler.is_compiling():  # one pass, made by the compiler
        return torch.var_mean(values, dims, correction=0)[::-1]
    mean = values.sum(dims) / count
    # What rounding has left of the mean is the mean of the rest.
    rest = values - mean.view(_channel_shape(x, views))
    shift = rest.sum(dims).double() / count
    return mean + shift, rest.square().sum(dims) / count - shift.square()


def _summed(sums, group):
    """Over the ranks, by the functional collective: dynamo and inductor know it."""
    ranks: Any = group or dist.group.WORLD
    return functional.wait_tensor(functional.all_reduce(sums, "sum", ranks))


class _Normalise(torch.autograd.Function):
    """(x - mean) / std * weight + bias, of which mean and std depend on the ``x`` of all ranks."""

    @staticmethod
    def forward(ctx, x, weight, bias, mean, variance, count, eps, views, group):
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        inverse_std = torch.rsqrt(variance + eps).to(dtype)
        mean, variance = mean.to(dtype), variance.to(dtype)
        ctx.save_for_backward(x, weight, mean, inverse_std, count)
        ctx.views, ctx.group = views, group
        if not x.numel():
            return torch.empty_like(x)
        each = zip(x.chunk(views), mean.view(views, -1), variance.view(views, -1), strict=True)
        outputs = [
            torch.native_batch_norm(part, weight, bias, m, v, False, 0.0, eps)[0] for part, m, v in each
        ]
        return outputs[0] if views == 1 else torch.cat(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output):
        x, weight, mean, inverse_std, count = ctx.saved_tensors
        views, sums = ctx.views, [torch.zeros_like(mean)] * 2
        if x.numel():
            unit = mean.new_ones(x.size(1)) if weight is None else weight  # its type decides the sums'
            sums = _backward_sums(grad_output, x, unit, mean, inverse_std, views)
        # This rank's part, like any parameter's gradient: the engine averages it.
        grads = [None, None] if weight is None else [s if views == 1 else s.sum(0) for s in sums]
        if not ctx.needs_input_grad[0]:
            return None, *grads, *[None] * 6
        projection, average = (_summed(torch.stack(sums), ctx.group) / count).to(mean.dtype).unbind()
        # (grad - average - (x - mean) / std * projection) * weight / std, in two passes
        factor = inverse_std if weight is None else inverse_std * weight
        slope = factor * inverse_std * projection
        shape = _channel_shape(x, views)
        values, grad_output = _by_view(x, views), _by_view(grad_output, views)
        grad = torch.addcmul(
            (slope * mean - factor * average).view(shape), values, slope.view(shape), value=-1
        )
        grad = grad.addcmul_(grad_output, factor.view(shape)).to(x.dtype)
        return grad if views == 1 else grad.flatten(0, 1), *grads, *[None] * 6


def _backward_sums(grad_output, x, unit, mean, inverse_std, views):
    """Sums over this rank's samples of grad (x - mean) / std, and of grad."""
    backward, mask = torch.ops.aten.native_batch_norm_backward, [False, True, True]
    parts = (grad_output.chunk(views), x.chunk(views), mean.view(views, -1), inverse_std.view(views, -1))
    sums = [
        backward(grad, part, unit, None, None, m, i, True, 0.0, mask)[1:]
        for grad, part, m, i in zip(*parts, strict=True)
    ]
    return _joined(sums)


def _joined(pairs):
    """Of one pair of (C,) that; of V pairs two of (V, C)."""
    return pairs[0] if len(pairs) == 1 else [torch.stack(parts) for parts in zip(*pairs, strict=True)]


def _by_view(x, views):
    """(V B, C, ...) -> (V, B, C, ...) for several views."""
    return x if views == 1 else x.unflatten(0, (views, len(x) // views))


def _channel_shape(x, views):
    """What a statistic is to be viewed as beside :func:`_by_view`."""
    places = [1] * (x.dim() - 2)
    return [1, -1, *places] if views == 1 else [views, 1, -1, *places]


def _at_least_float32(x):
    return x if x.dtype == torch.float64 else x.float()


class SyncBatchNorm(nn.modules.batchnorm._BatchNorm):
    """BatchNorm over all ranks' samples on any device, inputs of 2 or more dimensions (B, C, ...).

    Outputs, gradients and running statistics are those of one process with the whole batch, uneven and empty
    shares included; running statistics are identical on all ranks. Statistics of fp16 and bf16 inputs are fp32,
    fp64 stays fp64. Crosses ranks: one all-reduce of 2VC+1 numbers forward, one of 2VC backward; none in eval
    mode. No shape depends on a value, the host waits for nothing, and the compiler sees one graph.

    Several views (:func:`views_in_batch`) are normalised each by its own statistics, which move the running ones view
    after view. A rank brings as many samples of each.
    """

    group = None  # the default process group

    @classmethod
    def from_batchnorm(cls, source, group):
        """The same layer, synchronised over ``group``; parameters and buffers are shared, not copied."""
        layer = cls(
            source.num_features, source.eps, source.momentum, source.affine, source.track_running_stats
        )
        layer._parameters.update(source._parameters)
        layer._buffers.update(source._buffers)
        layer.group = group
        return layer.train(source.training)

    def _check_input_dim(self, input):
        if input.dim() < 2:
            raise ValueError(f"BatchNorm expects inputs of 2 or more dimensions, not {input.dim()}")

    def forward(self, input):
        views = _num_views if self.training else 1
        if not self.training or world_size(self.group) == 1:
            forward = super().forward
            return forward(input) if views == 1 else torch.cat([forward(view) for view in input.chunk(views)])
        self._check_input_dim(input)
        count, mean, variance = _global_statistics(input.detach(), views, self.group)
        if self.track_running_stats:
            self._update_running_statistics(count, mean, variance)
        weight, bias = self.weight, self.bias
        return _Normalise.apply(input, weight, bias, mean, variance, count, self.eps, views, self.group)

    @torch.no_grad()
    def _update_running_statistics(self, count, mean, variance):
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        unbiased = variance * (count / (count - 1).clamp(min=1))
        running, dtype = (self.running_mean, self.running_var), self.running_mean.dtype
        each = [statistic.to(dtype).view(-1, self.num_features) for statistic in (mean, unbiased)]
        for view in zip(*each, strict=True):
            self.num_batches_tracked += 1
            cumulative = self.momentum is None
            momentum = self.num_batches_tracked.to(dtype).reciprocal() if cumulative else self.momentum
            for average, value in zip(running, view, strict=True):
                average.lerp_(value, momentum)


class _ThenLayers(SyncBatchNorm):
    """Normalise, then what the layer holds: timm's dropout and activation."""

    def forward(self, input):
        output = super().forward(input)
        for layer in self.children():
            output = layer(output)
        return output
