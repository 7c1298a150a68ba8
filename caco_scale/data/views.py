"""The views of decoded images: draw their random parameters, cut uint8 crops; the central crop for evaluation.

Random parameters come from counters keyed by (seed, epoch, sample, view), see :func:`order.sample_keys`,
never from the state of a generator: a sample looks the same at any number of processes and workers, and after
a resume. Each sample consumes a fixed amount of random numbers, so that a changed probability leaves all
other draws alone.

Everything after the crop (jitter, grey, blur, solarize, flip) is only drawn here; ``augment`` applies it,
batched.

Shapes: n samples, H and W of an image, k blur kernel size.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import ArrayLike, NDArray

from caco_scale.data.order import mix64, uniform
from caco_scale.errors import UserError

_bilinear = torch._C._nn._upsample_bilinear2d_aa  # of F.interpolate(mode="bilinear", antialias=True)
CROP_TRIES = 10
EVALUATION_CROP_SHARE = 0.875  # of the resized shorter side: 224 of 256
WHOLE_UP_TO = (
    96  # pixels of the encoder's images; up to here sets (CIFAR, STL-10) are evaluated on whole images
)
THIN = 16  # long side by short side; of thinner images only what the crop shows is resized
# Two streams of one key: the crop and the colours of a view must not share random numbers.
CROP_STREAM, COLOUR_STREAM = np.uint64(0xC209), np.uint64(0xC0102)


@dataclass(frozen=True)
class ViewSpec:
    """The random transformations of one view, in their order: crop, jitter, grey, blur, solarize, flip.

    size: side of the crop in pixels. scale, ratio: ranges of the crop's share of the image's area and of its
    width/height. jitter: strengths (brightness, contrast, saturation, hue) as in torchvision's ColorJitter.
    ``*_p``: probabilities. blur_sigma: range in pixels of the crop. solarize_threshold: the lowest inverted
    level of 255.
    """

    size: int
    scale: tuple[float, float]
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    jitter: tuple[float, float, float, float] = (0.4, 0.4, 0.2, 0.1)
    jitter_p: float = 0.8
    grayscale_p: float = 0.2
    blur_p: float = 0.5
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    solarize_p: float = 0.0
    solarize_threshold: float = 128
    flip_p: float = 0.5

    def __post_init__(self):
        probabilities = (self.jitter_p, self.grayscale_p, self.blur_p, self.solarize_p, self.flip_p)
        for wrong, what in (
            (self.size < 1, f"size {self.size} must be at least 1"),
            (not 0 < self.scale[0] <= self.scale[1] <= 1, f"scale {self.scale} must rise within (0, 1]"),
            (not 0 < self.ratio[0] <= self.ratio[1], f"ratio {self.ratio} must be positive and rise"),
            (min(self.jitter) < 0 or self.jitter[3] > 0.5, f"jitter {self.jitter}: none below 0, hue to 0.5"),
            (
                min(probabilities) < 0 or max(probabilities) > 1,
                f"a probability of {probabilities} is not one",
            ),
            (
                not 0 < self.blur_sigma[0] <= self.blur_sigma[1],
                f"blur_sigma {self.blur_sigma} must rise from > 0",
            ),
            (
                not 0 <= self.solarize_threshold <= 255,
                f"solarize_threshold {self.solarize_threshold} is of 255",
            ),
        ):
            if wrong:
                raise UserError(f"views: {what}: change it")


def blur_kernel_size(size: int, max_sigma: float) -> int:
    """Size of the blur kernel: three sigma to each side (13 for sigma 2), odd, smaller than the image."""
    return max(1, min(2 * math.ceil(3 * max_sigma) + 1, size - 1 if size % 2 == 0 else size - 2))


def draw_crop(spec: ViewSpec, keys: ArrayLike, heights: ArrayLike, widths: ArrayLike) -> NDArray[np.int64]:
    """Random resized crops: keys, heights, widths (n,) -> (n, 4) int64 top, left, height, width.

    The rule of torchvision's RandomResizedCrop: uniform area, log-uniform aspect ratio, the first of 10 tries
    that fits, else the largest central crop within the ratio limits.
    """
    heights, widths = np.asarray(heights, np.int64), np.asarray(widths, np.int64)
    draws = uniform(mix64(np.asarray(keys, np.uint64) ^ CROP_STREAM), 2 * CROP_TRIES + 2)
    areas, ratios = draws[:, :CROP_TRIES], draws[:, CROP_TRIES : 2 * CROP_TRIES]
    low, high = spec.scale
    areas = (heights * widths)[:, None] * (low + (high - low) * areas)
    low, high = np.log(spec.ratio)
    ratios = np.exp(low + (high - low) * ratios)
    tried_widths = np.rint(np.sqrt(areas * ratios)).astype(np.int64)
    tried_heights = np.rint(np.sqrt(areas / ratios)).astype(np.int64)
    fits = (tried_widths > 0) & (tried_widths <= widths[:, None])
    fits &= (tried_heights > 0) & (tried_heights <= heights[:, None])
    found, first = fits.any(axis=1), (np.arange(len(fits)), fits.argmax(axis=1))
    # Central fallback: an image too wide or too tall keeps its short side.
    fallback_widths = np.minimum(widths, np.rint(heights * max(spec.ratio)).astype(np.int64))
    fallback_heights = np.minimum(heights, np.rint(widths / min(spec.ratio)).astype(np.int64))
    crop_widths = np.where(found, tried_widths[first], fallback_widths)
    crop_heights = np.where(found, tried_heights[first], fallback_heights)
    free_rows, free_columns = heights - crop_heights, widths - crop_widths
    top = np.where(found, np.floor(draws[:, -2] * (free_rows + 1)), free_rows // 2)
    left = np.where(found, np.floor(draws[:, -1] * (free_columns + 1)), free_columns // 2)
    return np.stack([top, left, crop_heights, crop_widths], axis=1).astype(np.int64)


def draw_colour(spec: ViewSpec, keys: ArrayLike) -> dict[str, NDArray]:
    """Random parameters of all after the crop: keys (n,) uint64 -> dict of arrays with first axis n.

    bool (n,): jitter, grayscale, blur, solarize, flip. float64 (n,): brightness, contrast, saturation, hue
    (factors and shift as torchvision's functional ops take them), sigma, solarize_threshold (of 1). order
    int64 (n, 4): a permutation of 0 brightness, 1 contrast, 2 saturation, 3 hue, first to last. blur_kernel
    float64 (n, k): the normalised 1-D Gaussian of sigma.
    """
    draws = uniform(mix64(np.asarray(keys, np.uint64) ^ COLOUR_STREAM), 14)
    names = ("brightness", "contrast", "saturation", "hue")
    limits = [(max(0.0, 1 - x), 1 + x) for x in spec.jitter[:3]] + [(-spec.jitter[3], spec.jitter[3])]
    params = {
        name: low + (high - low) * draws[:, i]
        for i, (name, (low, high)) in enumerate(zip(names, limits, strict=True))
    }
    params["order"] = np.argsort(draws[:, 4:8], axis=1, kind="stable")
    flags = ("jitter", "grayscale", "blur", "solarize", "flip")
    probabilities = (spec.jitter_p, spec.grayscale_p, spec.blur_p, spec.solarize_p, spec.flip_p)
    for i, (name, probability) in enumerate(zip(flags, probabilities, strict=True)):
        params[name] = draws[:, 8 + i] < probability
    low, high = spec.blur_sigma
    params["sigma"] = low + (high - low) * draws[:, 13]
    params["blur_kernel"] = _gaussian(params["sigma"], blur_kernel_size(spec.size, high))
    # Between two grey levels: as on uint8 after rounding, and pixels of exactly that level do not hang on a
    # rounding.
    params["solarize_threshold"] = np.full(len(draws), (spec.solarize_threshold - 0.5) / 255)
    return params


def _gaussian(sigma, kernel_size):
    offsets = np.arange(kernel_size) - kernel_size // 2
    weights = np.exp(-0.5 * (offsets / sigma[:, None]) ** 2)
    return weights / weights.sum(axis=1, keepdims=True)


def _resize(image, height, width):
    """Antialiased bilinear resize, (H, W, C) uint8 or uint16 -> (height, width, C) of the same, contiguous."""
    image = np.ascontiguousarray(image)
    if image.shape[:2] == (height, width):
        return image
    # A batch axis made by torch, and before the permutation, has the strides by which torch knows channels-last
    # images: half the time.
    pixels = torch.from_numpy(image).unsqueeze(0).permute(0, 3, 1, 2)
    is_deep = pixels.dtype != torch.uint8  # torch's kernel is of bytes and of fractions
    resized = F.interpolate(
        pixels.float() if is_deep else pixels, (height, width), mode="bilinear", antialias=True
    )
    resized = resized.round().to(torch.uint16) if is_deep else resized
    return np.ascontiguousarray(resized[0].permute(1, 2, 0).numpy())


def crop_resize(image: NDArray, box: ArrayLike, size: int) -> NDArray:
    """Cut ``box`` (top, left, height, width) out of (H, W, C), resize to (size, size, C), antialiased.

    Equal to torchvision's ``resized_crop(antialias=True)`` on uint8: it is the same torch kernel, in the
    channels-last layout that images are decoded to, where it is quickest. Measured on 240 ImageNet JPEGs of
    118 kB, one crop of scale (0.2, 1) to 224, one core (mean and worst difference from torchvision in grey
    levels):

        torch, antialiased        0.30 ms    0.000      0
        PIL bilinear              0.80 ms    0.036      2
        PIL, reducing_gap=2       0.80 ms    0.039      9
        cv2 INTER_AREA            0.57 ms    0.925    213   (enlarges by the nearest pixel)
        cv2 AREA down, LINEAR up  0.53 ms    0.793     51
        cv2 INTER_LINEAR          0.15 ms    1.699    145   (aliased)

    Decoding costs 1.4 ms, so the aliased crop would win a quarter of a worker's time, and other images.
    """
    top, left, height, width = (int(x) for x in np.asarray(box))
    return _resize(image[top : top + height, left : left + width], size, size)


def crop_resize_into(out: torch.Tensor, images: Sequence[NDArray], boxes: NDArray[np.int64]) -> None:
    """:func:`crop_resize` of n images (H, W, C) by boxes (n, 4) into ``out`` (n, size, size, C), in place.

    The same bytes by the same kernel, called as F.interpolate calls it: small images spend more time in that function,
    and in copies of its result, than in the kernel (two crops of 32 pixels: 83 us by crop_resize, 43 us here).
    """
    size = out.shape[1]
    for place, image, (top, left, height, width) in zip(
        out.permute(0, 3, 1, 2).split(1), images, boxes.tolist(), strict=True
    ):
        crop = torch.from_numpy(image[None, top : top + height, left : left + width].copy()).permute(
            0, 3, 1, 2
        )
        if height == width == size:
            place.copy_(crop)
        elif out.dtype != torch.uint8:
            place.copy_(_bilinear(crop.float(), (size, size), False, None).round_())
        else:
            _bilinear(crop, (size, size), False, None, out=place)  # ty: ignore[unknown-argument]


def usual_resize(size: int) -> int:
    """The shorter side, in pixels, to which images are resized before the central ``size`` is cut out for evaluation.

    256 for 224, and in that proportion for all above 96 pixels; up to there ``size`` itself, so that the small square
    images of CIFAR and its kin are evaluated whole and untouched, as the field does.
    """
    return size if size <= WHOLE_UP_TO else round(size / EVALUATION_CROP_SHARE)


def describe_crop(size: int, resize: int = 0) -> str:
    """What :func:`centre_crop` does to an image, in words."""
    return f"shorter side to {resize or usual_resize(size)} pixels, of which the central {size} x {size}"


def centre_crop(image: NDArray, size: int, resize: int = 0) -> NDArray:
    """The view for evaluation: torchvision's Resize(resize) and CenterCrop(size) -> (size, size, C) of its type.

    ``resize``: pixels of the shorter side, at least ``size``; 0: :func:`usual_resize`. It depends on nothing of the
    image. Equal to torchvision's antialiased resize of uint8 tensors (the same kernel; its resize of PIL images
    differs from it by up to 2 grey levels), but for images thinner than 16 to 1, of which it is off by 1 level at most.
    """
    resize = resize or usual_resize(size)
    assert resize >= size, (resize, size)
    shorter = min(image.shape[:2])
    height, width = (int(resize * side / shorter) if side != shorter else resize for side in image.shape[:2])
    top, left = round((height - size) / 2), round((width - size) / 2)
    if max(height, width) > THIN * resize:
        return _resize_part(image, (height, width), (top, left), size)
    return np.ascontiguousarray(_resize(image, height, width)[top : top + size, left : left + size])


def _resize_part(image, shape, corner, size):
    """The square at ``corner`` of what :func:`_resize` to ``shape`` gives, without making the rest of it."""
    (first_row, rows), (first_column, columns) = (
        _bilinear_weights(*axis, size) for axis in zip(image.shape[:2], shape, corner, strict=True)
    )
    part = image[first_row:, first_column:][: rows.shape[1], : columns.shape[1]].astype(np.float64)
    square = np.einsum("iy,yxc,jx->ijc", rows, part, columns, optimize=True)
    return np.floor(square + 0.5).clip(0, np.iinfo(image.dtype).max).astype(image.dtype)


def _bilinear_weights(old, new, start, count):
    """torch's antialiased bilinear resize of an axis from ``old`` to ``new``, for ``count`` places from ``start``.

    -> (first old place that is needed, weights (count, old places)).
    """
    scale = old / new
    support = max(scale, 1.0)
    centres = scale * (start + np.arange(count) + 0.5)
    low = np.maximum((centres - support + 0.5).astype(int), 0)
    high = np.minimum((centres + support + 0.5).astype(int), old)
    places = np.arange(low.min(), high.max())
    weights = (1 - np.abs(places + 0.5 - centres[:, None]) / support).clip(0)
    weights *= (places >= low[:, None]) & (places < high[:, None])
    return low.min(), weights / weights.sum(axis=1, keepdims=True)
