"""The batched augmentation equals torchvision's functional operations, sample by sample."""

import colorsys

import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as T

from caco_scale.data.augment import IMAGENET_MEAN, IMAGENET_STD, augment, augment_by_torch, normalise
from caco_scale.data.order import sample_keys
from caco_scale.data.views import ViewSpec, draw_colour

FLAGS = ("jitter", "grayscale", "blur", "solarize", "flip")


def draw(size, num, **spec):
    params = draw_colour(ViewSpec(size, (0.2, 1.0), **spec), sample_keys(0, 0, np.arange(num), 0))
    crops = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (num, size, size, 3), dtype=np.uint8))
    crops[0] = crops[0, :, :, :1]  # one grey image: its hue is undefined
    return crops, {name: torch.from_numpy(values) for name, values in params.items()}


def adjust_hue(image, shift):
    """torchvision's works in float32 whatever it is given; for float64 the standard library's."""
    if image.dtype == torch.float32:
        return T.adjust_hue(image, shift)
    pixels = [colorsys.rgb_to_hsv(*rgb) for rgb in image.flatten(1).T.tolist()]
    pixels = [colorsys.hsv_to_rgb((h + shift) % 1, s, v) for h, s, v in pixels]
    return torch.tensor(pixels, dtype=image.dtype).T.reshape(image.shape)


def torchvision_reference(crop, params, dtype):
    """One sample through torchvision: crop (H, W, 3) uint8, params of that sample."""
    image = crop.permute(2, 0, 1).to(dtype) / 255
    value = {name: v.tolist() for name, v in params.items()}
    if value["jitter"]:
        for operation in value["order"]:
            adjust, factor = (
                (T.adjust_brightness, "brightness"),
                (T.adjust_contrast, "contrast"),
                (T.adjust_saturation, "saturation"),
                (adjust_hue, "hue"),
            )[operation]
            image = adjust(image, value[factor])
    if value["grayscale"]:
        image = T.rgb_to_grayscale(image, num_output_channels=3)
    if value["blur"]:
        image = T.gaussian_blur(image, [len(value["blur_kernel"])] * 2, [value["sigma"]] * 2)
    if value["solarize"]:
        image = T.solarize(image, value["solarize_threshold"])
    if value["flip"]:
        image = T.horizontal_flip(image)
    return T.normalize(image, list(IMAGENET_MEAN), list(IMAGENET_STD))


def references(crops, params, dtype):
    rows = range(len(crops))
    return torch.stack(
        [torchvision_reference(crops[i], {k: v[i] for k, v in params.items()}, dtype) for i in rows]
    )


def assert_close(actual, expected, tolerance):
    # Tolerances are for pixels in [0, 1]; normalising divides by the standard deviation.
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    difference = (actual - expected).abs().max().item() * min(IMAGENET_STD)
    assert difference < tolerance, difference


@pytest.mark.parametrize(("size", "num"), [(32, 64), (96, 32), (224, 16)])
def test_float32_equals_torchvision(size, num):
    crops, params = draw(size, num, solarize_p=0.3)
    assert all(params[name].any() and not params[name].all() for name in FLAGS)
    assert_close(augment(crops, params), references(crops, params, torch.float32), 1e-5)


@pytest.mark.parametrize(("size", "num"), [(32, 40), (96, 6), (224, 2)])
def test_float64_equals_torchvision(size, num):
    crops, params = draw(size, num, solarize_p=0.5, jitter=(0.4, 0.4, 0.4, 0.5), jitter_p=0.9)
    assert_close(augment(crops, params, dtype=torch.float64), references(crops, params, torch.float64), 1e-12)


@pytest.mark.parametrize("name", FLAGS)
@pytest.mark.parametrize("share", ["all", "some", "none"])
def test_each_operation_alone(name, share):
    crops, params = draw(32, 8)
    for flag in FLAGS:
        params[flag] = torch.zeros(8, dtype=torch.bool)
    params[name] = torch.tensor({"all": [True] * 8, "some": [True, False] * 4, "none": [False] * 8}[share])
    before = crops.clone()
    images = augment(crops, params)
    assert_close(images, references(crops, params, torch.float32), 1e-5)
    assert torch.equal(crops, before)
    changed = (images != normalise(crops)).flatten(1).any(dim=1)
    assert not (changed & ~params[name]).any()
    assert changed.any() == params[name].any()


def test_small_images_have_a_smaller_blur_kernel():
    crops, params = draw(8, 16, blur_p=1.0)
    assert params["blur_kernel"].shape == (16, 7)
    assert_close(augment(crops, params), references(crops, params, torch.float32), 1e-5)


def test_solarize_inverts_from_its_threshold_on():
    levels = torch.arange(256, dtype=torch.uint8).view(1, 16, 16, 1).expand(1, 16, 16, 3)
    _, params = draw(16, 1, solarize_p=1.0, jitter_p=0.0, grayscale_p=0.0, blur_p=0.0, flip_p=0.0)
    images = augment(levels, params, mean=(0, 0, 0), std=(1, 1, 1))
    expected = T.solarize(levels.permute(0, 3, 1, 2), 128)
    assert torch.equal((images * 255).round().to(torch.uint8), expected)


def test_a_sample_does_not_depend_on_its_batch():
    crops, params = draw(32, 24, solarize_p=0.3)
    together = augment(crops, params, dtype=torch.float64)
    for i in range(24):
        alone = augment(crops[i : i + 1], {k: v[i : i + 1] for k, v in params.items()}, dtype=torch.float64)
        assert_close(alone, together[i : i + 1], 1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_form_for_gpus_has_one_graph_and_the_same_result(dtype):
    # Traced by torch.compile, whatever the device, every operation covers the whole batch; "eager" compiles no code.
    crops, params = draw(32, 48, solarize_p=0.3)
    compiled = torch.compile(augment, fullgraph=True, backend="eager")
    tolerance = 1e-6 if dtype == torch.float32 else 1e-14
    assert_close(
        compiled(crops, params, dtype=dtype), augment_by_torch(crops, params, dtype=dtype), tolerance
    )


def test_normalise_and_memory_format():
    crops, params = draw(32, 4)
    expected = T.normalize(crops.permute(0, 3, 1, 2).double() / 255, [0.5, 0.4, 0.3], [0.2, 0.3, 0.4])
    images = normalise(crops, (0.5, 0.4, 0.3), (0.2, 0.3, 0.4), torch.float64)
    assert_close(images, expected, 1e-14)
    assert images.is_contiguous()
    for images in (
        normalise(crops, channels_last=True),
        augment_by_torch(crops, params, channels_last=True),
        augment(crops, params, channels_last=True),
    ):
        assert images.is_contiguous(memory_format=torch.channels_last)
    assert normalise(crops, dtype=torch.float64, channels_last=True).is_contiguous()
    assert augment_by_torch(crops, params, dtype=torch.float64, channels_last=True).is_contiguous()
    assert torch.equal(images, augment(crops, params))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_on_a_gpu_as_on_the_cpu(dtype):
    crops, params = draw(96, 32, solarize_p=0.3)
    images = augment(crops.cuda(), {name: values.cuda() for name, values in params.items()}, dtype=dtype)
    assert_close(images.cpu(), augment(crops, params, dtype=dtype), 1e-5 if dtype == torch.float32 else 1e-12)
