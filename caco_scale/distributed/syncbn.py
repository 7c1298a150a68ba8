"""BatchNorm over the global batch on any device: torch's own on CUDA, a portable equal on CPU.

torch's SyncBatchNorm refuses CPU tensors, and DDP refuses its subclasses on CPU; the portable one lets
several CPU processes train exactly what one process trains.

Shapes: B this rank's batch, C channels, R ranks; n and N values per channel on this rank and on all.
"""

import torch
import torch.distributed as dist
from torch import nn
from torch.autograd.function import once_differentiable

from caco_scale.distributed.collectives import world_size
from caco_scale.errors import UserError


def convert_sync_batchnorm(
    module: nn.Module, device_type: str, group: dist.ProcessGroup | None = None
) -> nn.Module:
    """``module`` with every BatchNorm synchronised over the ranks of ``group``; untouched on one rank.

    Parameters and buffers stay the same objects under the same names. ``device_type``: "cuda" gives
    ``nn.SyncBatchNorm``, anything else :class:`PortableSyncBatchNorm`. A subclass whose layers follow the
    normalisation (timm's BatchNorm with its activation) keeps them.

    Raises:
        UserError: a subclass of BatchNorm that computes something else.
    """
    if world_size(group) == 1:
        return module
    return _convert(module, device_type == "cuda", group)


def _convert(module, on_cuda, group):
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        plain = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm, PortableSyncBatchNorm)
        return _synchronised(module, on_cuda, group, follows=type(module) not in plain)
    for name, child in module.named_children():
        setattr(module, name, _convert(child, on_cuda, group))
    return module


def _synchronised(source, on_cuda, group, follows):
    """The same layer over all ranks; with ``follows``: and then the layers that it holds, compared with it."""
    if on_cuda:
        layer = nn.SyncBatchNorm.convert_sync_batchnorm(source, group)
    else:
        layer = PortableSyncBatchNorm.from_batchnorm(source, group)
    if not follows:
        return layer
    layer.__class__ = _CudaThenLayers if on_cuda else _PortableThenLayers
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


class _ThenLayers:
    """Normalise, then what the layer holds: timm's dropout and activation."""

    def forward(self, input):
        output = super().forward(input)
        for layer in self.children():
            output = layer(output)
        return output


def combine_statistics(
    counts: torch.Tensor, means: torch.Tensor, second_moments: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Count, mean and sum of squared deviations of a union, from those of its parts (Chan et al., 1979).

    ``counts`` (R, 1), ``means`` and ``second_moments`` (R, C) -> (1,), (C,), (C,). No difference of large
    squares, so no cancellation when the mean is much larger than the deviation. A part may be empty.
    """
    count = counts.sum(0)
    mean = (counts * means).sum(0) / count
    return count, mean, (second_moments + counts * (means - mean).square()).sum(0)


class _SyncBatchNormFunction(torch.autograd.Function):
    """Normalises by the global batch; returns also N (1,), mean (C,) and biased variance (C,)."""

    @staticmethod
    def forward(ctx, x, weight, bias, eps, group):
        shape, dims = _channel_shape(x), _reduced_dims(x)
        values = _at_least_float32(x)
        num_local = x.numel() // x.size(1)
        local_mean = values.sum(dims) / max(num_local, 1)
        local_moment = (values - local_mean.view(shape)).square().sum(dims)
        # Statistics travel and combine in float64: they are small, and float32 cannot count beyond 2^24.
        num_values = torch.tensor([num_local], dtype=torch.float64, device=x.device)
        local = torch.cat([num_values, local_mean.double(), local_moment.double()])
        parts = [torch.empty_like(local) for _ in range(world_size(group))]
        dist.all_gather(parts, local, group=group)
        count, mean, moment = combine_statistics(*torch.stack(parts).split([1, x.size(1), x.size(1)], dim=1))
        variance = moment / count
        inverse_std = torch.rsqrt(variance + eps)

        ctx.save_for_backward(x, weight, mean, inverse_std, count)
        ctx.group = group
        ctx.mark_non_differentiable(count, mean, variance)
        output = values - mean.to(values.dtype).view(shape)
        output *= inverse_std.to(values.dtype).view(shape)
        if weight is not None:
            output = torch.addcmul(bias.view(shape), output, weight.view(shape))
        return output.to(x.dtype), count, mean, variance

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output, *_):
        x, weight, mean, inverse_std, count = ctx.saved_tensors
        shape, dims = _channel_shape(x), _reduced_dims(x)
        grad = _at_least_float32(grad_output)
        mean, inverse_std = mean.to(grad.dtype).view(shape), inverse_std.to(grad.dtype).view(shape)
        normalised = (_at_least_float32(x) - mean) * inverse_std
        local_sums = torch.stack([grad.sum(dims), (grad * normalised).sum(dims)])

        grad_input = grad_weight = grad_bias = None
        if weight is not None:  # this rank's part, like any parameter's gradient: the engine averages it
            grad_bias, grad_weight = local_sums.to(weight.dtype)
        if ctx.needs_input_grad[0]:
            sums = local_sums.clone()
            dist.all_reduce(sums, group=ctx.group)
            average, projection = (sums / count).to(grad.dtype)
            grad_input = (grad - average.view(shape) - normalised * projection.view(shape)) * inverse_std
            if weight is not None:
                grad_input *= weight.view(shape)
            grad_input = grad_input.to(x.dtype)
        return grad_input, grad_weight, grad_bias, None, None


def _channel_shape(x):
    return [1, x.size(1)] + [1] * (x.dim() - 2)


def _reduced_dims(x):
    return [0, *range(2, x.dim())]


def _at_least_float32(x):
    return x if x.dtype == torch.float64 else x.float()


class PortableSyncBatchNorm(nn.modules.batchnorm._BatchNorm):
    """BatchNorm over all ranks' samples for any backend, inputs of 2 or more dimensions (B, C, ...).

    Outputs, gradients and running statistics are those of one process with the whole batch, uneven and empty
    shares included; running statistics are identical on all ranks. fp16 and bf16 inputs are normalised in
    fp32, fp64 stays fp64. Crosses ranks: one all-gather of 2C+1 numbers forward, one all-reduce of 2C
    backward; none in eval mode.
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
        output, *statistics = _SyncBatchNormFunction.apply(
            input, self.weight, self.bias, self.eps, self.group
        )
        if self.track_running_stats:
            self._update_running_statistics(*statistics)
        return output

    @torch.no_grad()
    def _update_running_statistics(self, count, mean, variance):
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        self.num_batches_tracked += 1
        momentum = 1.0 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        unbiased = variance * (count / (count - 1).clamp(min=1))
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), momentum)
        self.running_var.lerp_(unbiased.to(self.running_var.dtype), momentum)


class _PortableThenLayers(_ThenLayers, PortableSyncBatchNorm):
    pass


class _CudaThenLayers(_ThenLayers, nn.SyncBatchNorm):
    pass
