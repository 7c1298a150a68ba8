"""The batched part of the augmentation, on the training device: jitter, grey, blur, solarize, flip.

Equal, sample by sample, to torchvision's functional operations on float images, with a parameter of its own
for each sample. On a CPU compiled code does it in float32 (``augment_cpu``). What torch does here is the law, by
which that code is tested; it is for float64, for GPUs, and for where there is no compiled code. On a CPU only the
samples that use an operation go through it. On a GPU (and under ``torch.compile``) every operation covers the whole
batch and leaves the samples that do not use it unchanged: static shapes, no look at a value, no wait of the host.

Images come as (B, C, H, W) in memory; with ``channels_last``, in which convolutions are faster, as (B, H, W, C), unless
they are of float64, which gains nothing by it.

Shapes: B this rank's batch, H = W the crop's side, k blur kernel size. Images are (B, C, H, W) in [0, 1]. Hue,
saturation and greyscale are of three channels alone; of others contrast is towards the mean of all.
"""

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F

from caco_scale.data import augment_cpu

BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)  # the numbers in params["order"]
LUMA = (0.2989, 0.587, 0.114)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def augment(
    crops: torch.Tensor,
    params: Mapping[str, torch.Tensor],
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
    dtype: torch.dtype = torch.float32,
    channels_last: bool = False,
) -> torch.Tensor:
    """Jitter, grey, blur, solarize, flip, normalise: (B, H, W, C) uint8 or uint16 -> (B, C, H, W) of ``dtype``.

    params: what ``views.draw_colour`` drew, as tensors with first axis B on the crops' device. Per sample equal to
    ``torchvision.transforms.v2.functional`` (reflect-padded blur of the given kernel) to 1e-5 in float32.
    """
    if _is_compiled(crops, dtype, params["blur_kernel"].shape[1]):
        return augment_cpu.augment(crops, params, mean, std, channels_last).to(dtype)
    return augment_by_torch(crops, params, mean, std, dtype, channels_last)


def augment_by_torch(
    crops: torch.Tensor,
    params: Mapping[str, torch.Tensor],
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
    dtype: torch.dtype = torch.float32,
    channels_last: bool = False,
) -> torch.Tensor:
    """:func:`augment` by torch's operations, on any device: what the compiled code is measured by."""
    images = _to_float(crops, dtype)
    if images.shape[1] == 3:
        images = _jitter(images, params)
        images = _where(params["grayscale"], _grey, images)
    else:
        images = _jitter_light(images, params)
    images = _where(params["blur"], _blur, images, params["blur_kernel"])
    images = _where(params["solarize"], _solarize, images, params["solarize_threshold"])
    images = _where(params["flip"], _flip, images)
    return _normalised(images, mean, std, channels_last)


def normalise(
    crops: torch.Tensor,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
    dtype: torch.dtype = torch.float32,
    channels_last: bool = False,
) -> torch.Tensor:
    """Only to float and normalise, for evaluation: (B, H, W, C) uint8 or uint16 -> (B, C, H, W) of ``dtype``."""
    if _is_compiled(crops, dtype):
        return augment_cpu.augment(crops, None, mean, std, channels_last).to(dtype)
    return _normalised(_to_float(crops, dtype), mean, std, channels_last)


def _is_compiled(crops, dtype, kernel_size=1):
    """Whether :mod:`augment_cpu` does it, and not torch."""
    if torch.compiler.is_compiling() or dtype == torch.float64:
        return False
    return augment_cpu.takes(crops, kernel_size)


def _to_float(crops, dtype):
    images = crops.permute(0, 3, 1, 2).to(dtype, memory_format=torch.contiguous_format)
    return images.div_(255 if crops.dtype == torch.uint8 else 65535)


def _normalised(images, mean, std, channels_last):
    # Channel by channel with plain numbers: a tensor of them would have to travel to the device and make it
    # wait.
    channels = [(images[:, c] - mean[c]).div_(std[c]) for c in range(images.shape[1])]
    if channels_last and images.dtype != torch.float64:
        return torch.stack(channels, dim=3).permute(0, 3, 1, 2)
    return torch.stack(channels, dim=1)


def _where(use, operation, images, *values):
    """``operation(images, *values)`` for the samples that ``use`` (B,) names, the others as they are."""
    values = [value.to(images.dtype) for value in values]
    if images.device.type != "cpu" or torch.compiler.is_compiling():
        use = use.view(-1, 1, 1, 1)
        return torch.where(use, operation(images, *values), images)
    samples = use.nonzero().squeeze(1)
    if len(samples) == 0:
        return images
    if len(samples) == len(images):
        return operation(images, *values)
    changed = operation(images[samples], *(value[samples] for value in values))
    return images.index_copy(0, samples, changed)


def _jitter(images, params):
    """ColorJitter with the operations in an order of its own for every sample.

    Brightness, contrast and saturation are one formula (:func:`_blend`). Each sample's order is: up to three
    of them, hue, the rest. So six rounds of blending, three before hue and three after, hold every order,
    whatever the batch.
    """
    order, use = params["order"], params["jitter"]
    factors = torch.stack([params[name] for name in ("brightness", "contrast", "saturation")], dim=1)
    hue_at = (order == HUE).int().argmax(dim=1)
    for place in range(3):
        images = _blend_at(images, order[:, place], factors, use & (place < hue_at))
    images = _where(use, _hue, images, params["hue"])
    for place in range(1, 4):
        images = _blend_at(images, order[:, place], factors, use & (place > hue_at))
    return images


def _jitter_light(images, params):
    """ColorJitter of other than three channels: brightness and contrast alone, in each sample's order."""
    factors = torch.stack([params["brightness"], params["contrast"]], dim=1)
    for operation in params["order"].unbind(1):
        images = _blend_at(
            images, operation.clamp(max=CONTRAST), factors, params["jitter"] & (operation <= CONTRAST)
        )
    return images


def _blend_at(images, operation, factors, use):
    factor = factors.gather(1, operation.clamp(max=SATURATION)[:, None])[:, 0]
    to_mean, to_luma = (((1 - factor) * (operation == number)) for number in (CONTRAST, SATURATION))
    return _where(use, _blend, images, factor, to_mean, to_luma)


def _blend(images, factor, to_mean, to_luma):
    """``factor * image + to_mean * mean luma + to_luma * luma``, clamped.

    Brightness has neither of the two targets, contrast goes to the mean (weight 1 - factor), saturation to
    the luma.
    """
    factor, to_mean, to_luma = (v.view(-1, 1, 1, 1) for v in (factor, to_mean, to_luma))
    luma = _luma(images)
    target = to_luma * luma + to_mean * luma.mean(dim=(2, 3), keepdim=True)
    return torch.addcmul(target, images, factor).clamp_(0, 1)


def _luma(images):
    if images.shape[1] != 3:
        return images.mean(dim=1, keepdim=True)
    red, green, blue = images.unbind(1)
    return (red * LUMA[0]).add_(green, alpha=LUMA[1]).add_(blue, alpha=LUMA[2]).unsqueeze(1)


def _grey(images):
    return _luma(images).expand_as(images)


def _hue(images, shift):
    """Rotate the hue by ``shift`` (B,) turns through HSV, whose saturation and value stay.

    A channel is ``minimum + chroma * clamp(|6 (hue - offset mod 1) - 3| - 1, 0, 1)`` with offsets 0, 1/3,
    2/3: the hue of a nearly grey pixel is ill-determined, but what depends on it is small.
    """
    red, green, blue = images.unbind(1)
    minimum, maximum = torch.aminmax(images, dim=1)
    chroma = maximum - minimum
    divisor = torch.where(chroma == 0, torch.ones_like(chroma), chroma)
    sector = torch.where(
        maximum == red,
        (green - blue) / divisor,
        torch.where(maximum == green, (blue - red) / divisor + 2, (red - green) / divisor + 4),
    )
    turn = sector / 6 + (shift.view(-1, 1, 1) + 2)  # positive, so that the fraction is the remainder
    turns = torch.stack([turn, turn + 2 / 3, turn + 1 / 3], dim=1)
    weight = turns.frac_().mul_(6).sub_(3).abs_().sub_(1).clamp_(0, 1)
    return torch.addcmul(minimum.unsqueeze(1), chroma.unsqueeze(1), weight)


def _blur(images, kernel):
    """Gaussian blur with a kernel per sample, (B, k): down the columns, along the rows, reflected edges."""
    batch, channels, height, width = images.shape
    size = kernel.shape[1]
    kernel = kernel.repeat_interleave(channels, dim=0)
    rows = F.pad(images.reshape(1, batch * channels, height, width), [size // 2] * 4, mode="reflect")
    columns = F.conv2d(rows, kernel.view(-1, 1, size, 1), groups=batch * channels)
    return F.conv2d(columns, kernel.view(-1, 1, 1, size), groups=batch * channels).view_as(images)


def _solarize(images, threshold):
    return torch.where(images >= threshold.view(-1, 1, 1, 1), 1 - images, images)


def _flip(images):
    return images.flip(3)
