"""BatchNorm over the global batch, the same on CPU and CUDA.

torch's SyncBatchNorm refuses CPU tensors; on CUDA it makes the host wait three times in every forward (it indexes by a
mask), and breaks a compiled graph there.

Shapes: B this rank's batch, C channels, N values per channel on all ranks.
"""

from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional
from torch import nn
from torch.autograd.function import once_differentiable

from caco_scale.distributed.collectives import world_size
from caco_scale.errors import UserError


def convert_sync_batchnorm(module: nn.Module, group: dist.ProcessGroup | None = None) -> nn.Module:
    """``module`` with every BatchNorm synchronised over the ranks of ``group``; untouched on one rank.

    Parameters and buffers stay the same objects under the same names. A subclass whose layers follow the
    normalisation (timm's BatchNorm with its activation) keeps them.

    Raises:
        UserError: a subclass of BatchNorm that computes something else.
    """
    if world_size(group) == 1:
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
def _global_statistics(x, group):
    """N (1,), mean (C,) and biased variance (C,) of all ranks' values, in float64: one all-reduce of 2C+1 numbers.

    A rank adds up its values about its own mean; only means and variances of ranks are combined by squares. As float64
    has more than twice float32's digits, a large mean takes none from a small variance there; of float64 inputs
    the variance is exact to 1e-16 times the square of mean over deviation.
    """
    if x.numel():
        mean, variance = (part.double() for part in _local_statistics(x))
        sums = torch.cat([mean, torch.addcmul(variance, mean, mean), mean.new_ones(1)])
        sums = sums * (x.numel() // x.size(1))
    else:
        sums = torch.zeros(2 * x.size(1) + 1, dtype=torch.float64, device=x.device)
    mean, square, count = _summed(sums, group).split([x.size(1), x.size(1), 1])
    mean = mean / count
    return count, mean, torch.addcmul(square / count, mean, mean, value=-1).clamp_(min=0)


def _local_statistics(x):
    """Mean and biased variance (C,), in float32 at least."""
    if torch.compiler.is_compiling():  # one pass, made by the compiler
        return torch.var_mean(_at_least_float32(x), _reduced_dims(x), correction=0)[::-1]
    if x.is_cuda:  # one pass, torch's own
        mean, inverse_std = torch.batch_norm_stats(x, 0.0)
        return mean, inverse_std.square().reciprocal()
    values, dims, count = _at_least_float32(x), _reduced_dims(x), x.numel() // x.size(1)
    mean = values.sum(dims) / count
    rest = values - mean.view(_channel_shape(x))  # what rounding has left of the mean is the mean of these
    shift = rest.sum(dims).double() / count
    return mean + shift, rest.square().sum(dims) / count - shift.square()


def _summed(sums, group):
    """Over the ranks, by the functional collective: dynamo and inductor know it."""
    ranks: Any = group or dist.group.WORLD
    return functional.wait_tensor(functional.all_reduce(sums, "sum", ranks))


class _Normalise(torch.autograd.Function):
    """(x - mean) / std * weight + bias, of which mean and std depend on the ``x`` of all ranks."""

    @staticmethod
    def forward(ctx, x, weight, bias, mean, variance, count, eps, group):
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        inverse_std = torch.rsqrt(variance + eps).to(dtype)
        mean, variance = mean.to(dtype), variance.to(dtype)
        ctx.save_for_backward(x, weight, mean, inverse_std, count)
        ctx.group = group
        if not x.numel():
            return torch.empty_like(x)
        return torch.native_batch_norm(x, weight, bias, mean, variance, False, 0.0, eps)[0]

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output):
        x, weight, mean, inverse_std, count = ctx.saved_tensors
        sums = [torch.zeros_like(mean)] * 2
        if x.numel():
            unit = torch.ones_like(mean) if weight is None else weight  # its type decides the sums'
            backward = torch.ops.aten.native_batch_norm_backward
            mask = [False, True, True]
            sums = backward(grad_output, x, unit, None, None, mean, inverse_std, True, 0.0, mask)[1:]
        # This rank's part, like any parameter's gradient: the engine averages it.
        grad_weight, grad_bias = sums if weight is not None else (None, None)
        if not ctx.needs_input_grad[0]:
            return None, grad_weight, grad_bias, None, None, None, None, None
        projection, average = (_summed(torch.cat(sums), ctx.group) / count).to(mean.dtype).chunk(2)
        # (grad - average - (x - mean) / std * projection) * weight / std, in two passes
        factor = inverse_std if weight is None else inverse_std * weight
        slope = factor * inverse_std * projection
        shape = _channel_shape(x)
        grad = torch.addcmul((slope * mean - factor * average).view(shape), x, slope.view(shape), value=-1)
        grad = grad.addcmul_(grad_output, factor.view(shape)).to(x.dtype)
        return grad, grad_weight, grad_bias, None, None, None, None, None


def _channel_shape(x):
    return [1, -1] + [1] * (x.dim() - 2)


def _reduced_dims(x):
    return [0, *range(2, x.dim())]


def _at_least_float32(x):
    return x if x.dtype == torch.float64 else x.float()


class SyncBatchNorm(nn.modules.batchnorm._BatchNorm):
    """BatchNorm over all ranks' samples on any device, inputs of 2 or more dimensions (B, C, ...).

    Outputs, gradients and running statistics are those of one process with the whole batch, uneven and empty
    shares included; running statistics are identical on all ranks. Statistics of fp16 and bf16 inputs are fp32,
    fp64 stays fp64. Crosses ranks: one all-reduce of 2C+1 numbers forward, one of 2C backward; none in eval
    mode. No shape depends on a value, the host waits for nothing, and the compiler sees one graph.
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
        if not self.training or world_size(self.group) == 1:
            return super().forward(input)
        self._check_input_dim(input)
        count, mean, variance = _global_statistics(input.detach(), self.group)
        if self.track_running_stats:
            self._update_running_statistics(count, mean, variance)
        return _Normalise.apply(input, self.weight, self.bias, mean, variance, count, self.eps, self.group)

    @torch.no_grad()
    def _update_running_statistics(self, count, mean, variance):
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        self.num_batches_tracked += 1
        unbiased = variance * (count / (count - 1).clamp(min=1))
        for running, now in ((self.running_mean, mean), (self.running_var, unbiased)):
            cumulative = self.momentum is None
            momentum = self.num_batches_tracked.to(running).reciprocal() if cumulative else self.momentum
            running.lerp_(now.to(running.dtype), momentum)


class _ThenLayers(SyncBatchNorm):
    """Normalise, then what the layer holds: timm's dropout and activation."""

    def forward(self, input):
        output = super().forward(input)
        for layer in self.children():
            output = layer(output)
        return output
