"""Decoding is strict, crops and colours follow torchvision's rules, resizing is torchvision's."""

import io
import math
import struct

import numpy as np
import pytest
import simplejpeg
import torch
import torchvision.transforms.v2.functional as T
from PIL import Image
from shard_sets import encode, smooth_image
from torchvision.transforms import RandomResizedCrop

from caco_scale.data import views
from caco_scale.data.order import sample_keys
from caco_scale.data.photographs import decode_image
from caco_scale.data.pixels import CorruptSample
from caco_scale.data.views import (
    ViewSpec,
    blur_kernel_size,
    centre_crop,
    crop_resize,
    draw_colour,
    draw_crop,
    usual_resize,
)
from caco_scale.errors import UserError


def image(height=60, width=80, seed=0):
    return smooth_image(np.random.default_rng(seed), height, width)


def keys(num, view=0):
    return sample_keys(0, 0, np.arange(num), view)


def pil_pixels(data):
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(int)


# Decoding


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_jpegs_decode_as_pil_does(mode):
    data = encode(Image.fromarray(image()).convert(mode), quality=90)
    decoded = decode_image(data)
    assert decoded.shape == (60, 80, 3)
    assert decoded.dtype == np.uint8
    assert np.abs(decoded - pil_pixels(data)).max() <= 2


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "P", "1"])
@pytest.mark.parametrize("kind", ["PNG", "GIF", "TIFF"])
def test_other_formats_decode_as_pil_does(mode, kind):
    data = encode(Image.fromarray(image()).convert(mode), kind)
    assert np.array_equal(decode_image(data), pil_pixels(data))


def test_sixteen_bits_are_scaled_not_clipped():
    grey = np.arange(60 * 80, dtype=np.uint16).reshape(60, 80) * 13
    assert np.array_equal(decode_image(encode(Image.fromarray(grey), "PNG"))[:, :, 1], grey >> 8)


def test_exif_orientation_is_ignored():
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees
    assert decode_image(encode(image(), exif=exif)).shape == (60, 80, 3)


def test_a_flipped_byte_is_an_error_wherever_strict_simplejpeg_finds_one():
    data = encode(image(40, 40), quality=90)
    caught = 0
    for position in range(2, len(data), 3):
        damaged = bytearray(data)
        damaged[position] ^= 0x10
        try:
            simplejpeg.decode_jpeg(bytes(damaged))
        except ValueError:
            caught += 1
            with pytest.raises(CorruptSample):
                decode_image(bytes(damaged))
    assert caught > 50


def test_a_damaged_png_is_an_error():
    data = bytearray(encode(image(), "PNG"))
    data[len(data) // 2] ^= 1
    with pytest.raises(CorruptSample):
        decode_image(bytes(data))


@pytest.mark.parametrize("name", ["empty", "text", "cut jpeg", "cut cmyk", "cut png", "start only", "eps"])
def test_what_is_no_image_is_a_corrupt_sample(name):
    rgb, cmyk = encode(image()), encode(Image.fromarray(image()).convert("CMYK"))
    png = encode(image(), "PNG")
    data = {
        "empty": b"",
        "text": b"not an image" * 20,
        "cut jpeg": rgb[: len(rgb) // 2],
        "cut cmyk": cmyk[: len(cmyk) // 2],
        "cut png": png[: len(png) // 2],
        "start only": b"\xff\xd8\xff",
        "eps": encode(image(), "EPS"),
    }[name]
    with pytest.raises(CorruptSample) as error:
        decode_image(data)
    assert str(error.value)
    assert "\n" not in str(error.value)


def test_decompression_bombs_are_refused_before_decoding():
    png = encode(Image.new("1", (11_000, 11_000)), "PNG")
    assert len(png) < 100_000
    jpeg = bytearray(encode(image()))
    frame = jpeg.index(b"\xff\xc0")
    jpeg[frame + 5 : frame + 9] = struct.pack(">HH", 60_000, 60_000)
    for data in (png, bytes(jpeg)):
        with pytest.raises(CorruptSample, match="pixels, more than the limit of 100,000,000"):
            decode_image(data)
    with pytest.raises(CorruptSample, match="80 x 60 pixels"):
        decode_image(encode(image()), max_pixels=60 * 80 - 1)
    assert decode_image(encode(image()), max_pixels=60 * 80).shape == (60, 80, 3)


# Crops


def largest_gap(first, second):
    """The two-sample Kolmogorov-Smirnov statistic."""
    points = np.concatenate([first, second])
    shares = (np.searchsorted(np.sort(x), points, side="right") / len(x) for x in (first, second))
    return np.abs(next(shares) - next(shares)).max()


@pytest.mark.parametrize(
    ("height", "width", "scale"), [(375, 500, (0.2, 1.0)), (500, 375, (0.05, 0.14)), (32, 32, (0.2, 1.0))]
)
def test_crops_are_distributed_as_torchvisions(height, width, scale):
    num = 4000
    boxes = draw_crop(ViewSpec(224, scale), keys(num), np.full(num, height), np.full(num, width))
    torch.manual_seed(0)
    blank = torch.empty(3, height, width)
    expected = np.array(
        [RandomResizedCrop.get_params(blank, list(scale), [3 / 4, 4 / 3]) for _ in range(num)]
    )
    limit = 2 * math.sqrt(2 / num)  # by chance exceeded once in 1,500
    for of in (
        lambda box: box[:, 0],
        lambda box: box[:, 1],
        lambda box: box[:, 2],
        lambda box: box[:, 3],
        lambda box: box[:, 2] * box[:, 3],
        lambda box: box[:, 3] / box[:, 2],
        lambda box: box[:, 0] / (height - box[:, 2] + 1),
    ):
        assert largest_gap(of(boxes), of(expected)) < limit
    assert (boxes[:, :2] >= 0).all()
    assert (boxes[:, 2:] > 0).all()
    assert (boxes[:, 0] + boxes[:, 2]).max() == height
    assert (boxes[:, 1] + boxes[:, 3]).max() == width
    area = boxes[:, 2] * boxes[:, 3] / (height * width)
    assert scale[0] * 0.9 < area.min()
    assert area.max() <= min(1, scale[1] * 1.1)


@pytest.mark.parametrize(("height", "width"), [(40, 1000), (1000, 41), (7, 500), (300, 300)])
def test_crops_that_never_fit_fall_back_to_torchvisions_centre(height, width):
    scale, ratio = ((1.0, 1.0), (3 / 4, 4 / 3)) if height != width else ((1.0, 1.0), (1.1, 1.2))
    expected = RandomResizedCrop.get_params(torch.empty(3, height, width), list(scale), list(ratio))
    boxes = draw_crop(ViewSpec(32, scale, ratio), keys(50), np.full(50, height), np.full(50, width))
    assert np.array_equal(boxes, np.tile(expected, (50, 1)))


def test_a_crop_depends_on_its_key_and_image_alone():
    spec, heights, widths = ViewSpec(32, (0.2, 1.0)), np.arange(40, 90), np.arange(140, 90, -1)
    boxes = draw_crop(spec, keys(50), heights, widths)
    alone = [draw_crop(spec, keys(50)[i : i + 1], heights[i : i + 1], widths[i : i + 1]) for i in range(50)]
    assert np.array_equal(boxes, np.concatenate(alone))
    assert not np.array_equal(boxes, draw_crop(spec, keys(50, view=1), heights, widths))


# Colours

SPEC = ViewSpec(224, (0.2, 1.0), jitter=(0.4, 0.3, 0.2, 0.1), blur_p=0.5, solarize_p=0.2)


def test_colours_have_the_probabilities_and_ranges_of_the_spec():
    num = 20_000
    params = draw_colour(SPEC, keys(num))
    probabilities = {"jitter": 0.8, "grayscale": 0.2, "blur": 0.5, "solarize": 0.2, "flip": 0.5}
    for name, p in probabilities.items():
        assert abs(params[name].mean() - p) < 4 * math.sqrt(p * (1 - p) / num), name
    ranges = {
        "brightness": (0.6, 1.4),
        "contrast": (0.7, 1.3),
        "saturation": (0.8, 1.2),
        "hue": (-0.1, 0.1),
        "sigma": (0.1, 2.0),
    }
    for name, (low, high) in ranges.items():
        relative = (params[name] - low) / (high - low)
        assert 0 <= relative.min() < 0.001
        assert 0.999 < relative.max() <= 1
        assert largest_gap(relative, (np.arange(num) + 0.5) / num) < 2 / math.sqrt(num), name
    codes = params["order"] @ [64, 16, 4, 1]
    permutations, counts = np.unique(codes, return_counts=True)
    assert len(permutations) == 24
    assert (np.sort(params["order"], axis=1) == np.arange(4)).all()
    assert np.abs(counts - num / 24).max() < 5 * math.sqrt(num / 24)
    columns = [params[name].astype(float) for name in [*probabilities, *ranges]] + [codes]
    correlation = np.corrcoef(columns) - np.eye(len(columns))
    assert np.abs(correlation).max() < 5 / math.sqrt(num)


def test_strong_jitter_does_not_go_below_zero():
    params = draw_colour(ViewSpec(32, (0.2, 1.0), jitter=(2.0, 0, 0, 0)), keys(2000))
    assert 0 <= params["brightness"].min() < 0.01
    assert 2.99 < params["brightness"].max() <= 3
    assert (params["contrast"] == 1).all()
    assert (params["hue"] == 0).all()


def test_a_probability_changes_no_other_draw():
    other = draw_colour(ViewSpec(224, (0.2, 1.0), jitter=SPEC.jitter, jitter_p=0.1, blur_p=0.9), keys(100))
    params = draw_colour(SPEC, keys(100))
    assert all(np.array_equal(params[name], other[name]) for name in ("hue", "order", "sigma", "flip"))
    assert (params["jitter"] >= other["jitter"]).all()


def test_crop_and_colours_share_no_random_numbers():
    num = 5000
    boxes = draw_crop(SPEC, keys(num), np.full(num, 300), np.full(num, 300))
    params = draw_colour(SPEC, keys(num))
    floats = [params[name] for name in ("brightness", "contrast", "saturation", "hue", "sigma")]
    correlation = np.corrcoef([*floats, *boxes.T])[:5, 5:]
    assert np.abs(correlation).max() < 5 / math.sqrt(num)


def test_blur_kernel_is_about_six_sigma_odd_and_smaller_than_the_image():
    assert [blur_kernel_size(size, 2.0) for size in (224, 96, 32, 14, 13, 12, 2, 1)] == [
        *(13, 13, 13, 13, 11, 11, 1, 1)
    ]
    kernel = draw_colour(SPEC, keys(10))["blur_kernel"]
    assert kernel.shape == (10, 13)
    assert np.allclose(kernel.sum(1), 1)
    assert (kernel.argmax(1) == 6).all()


@pytest.mark.parametrize(
    ("wrong", "what"),
    [
        ({"size": 0}, "size 0"),
        ({"scale": (0.5, 0.2)}, "scale"),
        ({"blur_p": 1.5}, "1.5"),
        ({"blur_sigma": (0, 1)}, "sig"),
    ],
)
def test_wrong_specs_are_named(wrong, what):
    with pytest.raises(UserError, match=what):
        ViewSpec(**{"size": 32, "scale": (0.2, 1.0), **wrong})


# Resizing


def channels_first(pixels):
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


@pytest.mark.parametrize(
    ("box", "size"),
    [((3, 5, 190, 250), 96), ((0, 0, 200, 300), 32), ((20, 30, 40, 50), 96), ((10, 10, 33, 90), 64)],
)
def test_crops_are_resized_as_torchvision_does(box, size):
    noisy = np.random.default_rng(0).integers(0, 256, (200, 300, 3), dtype=np.uint8)
    for pixels in (noisy, image(200, 300)):
        expected = T.resized_crop(channels_first(pixels), *box, [size, size], antialias=True)
        crop = crop_resize(pixels, box, size)
        assert crop.shape == (size, size, 3)
        assert crop.dtype == np.uint8
        assert crop.flags.c_contiguous
        # Not 0: machines without AVX2 round one of the two layouts differently.
        assert np.abs(crop.astype(int) - expected.permute(1, 2, 0).numpy()).max() <= 1


def test_small_crops_are_enlarged_and_whole_images_kept():
    pixels = image(32, 32)
    assert np.array_equal(crop_resize(pixels, (0, 0, 32, 32), 32), pixels)
    expected = T.resized_crop(channels_first(pixels), 2, 3, 20, 25, [32, 32], antialias=True)
    crop = crop_resize(pixels, (2, 3, 20, 25), 32)
    assert np.abs(crop.astype(int) - expected.permute(1, 2, 0).numpy()).max() <= 1


def torchvisions(pixels, resize, size):
    return (
        T.center_crop(T.resize(channels_first(pixels), [resize], antialias=True), [size, size])
        .permute(1, 2, 0)
        .numpy()
    )


@pytest.mark.parametrize(
    ("size", "resize", "shapes"),
    [
        (32, 37, [(60, 80), (301, 200), (20, 45), (32, 41), (32, 32), (37, 37), (31, 33)]),
        (
            224,
            256,
            [(224, 224), (224, 301), (333, 224), (256, 256), (256, 411), (223, 225), (500, 375), (100, 99)],
        ),
        (224, 256, [(57, 900), (2000, 130), (225, 224)]),
        (97, 111, [(97, 97), (97, 160), (240, 111)]),
    ],
)
def test_centre_crop_is_torchvisions_resize_and_centre_crop(size, resize, shapes):
    for height, width in shapes:
        pixels = image(height, width)
        found = centre_crop(pixels, size, resize).astype(int)
        assert np.abs(found - torchvisions(pixels, resize, size)).max() <= 1, (height, width)
        if size > 96:
            assert np.array_equal(found, centre_crop(pixels, size)), (
                "256 for 224 is usual, whatever the image"
            )


def test_small_images_are_evaluated_whole_and_as_they_are():
    pixels = image(32, 41)
    assert np.array_equal(centre_crop(pixels, 32), pixels[:, 4:36])
    assert np.array_equal(centre_crop(pixels[:, :32], 32), pixels[:, :32])
    for shape in ((33, 33), (64, 40)):
        found = centre_crop(image(*shape), 32).astype(int)
        assert np.abs(found - torchvisions(image(*shape), 32, 32)).max() <= 1
    assert [usual_resize(size) for size in (32, 64, 96, 128, 224, 384)] == [32, 64, 96, 146, 256, 439]


@pytest.mark.parametrize("shape", [(17, 400), (8, 4000), (3000, 9), (1, 300), (401, 7), (2, 2000)])
def test_of_thin_images_only_what_the_crop_shows_is_resized(shape):
    """Within one grey level of the whole resized image, of which 65,500 x 8 pixels would fill 1.7 GB."""
    for size, resize in ((32, 37), (6, 6), (48, 64)):
        found = centre_crop(image(*shape), size, resize).astype(int)
        assert np.abs(found - torchvisions(image(*shape), resize, size)).max() <= 1


def test_the_thinnest_image_is_never_resized_whole(monkeypatch):
    monkeypatch.setattr(views, "_resize", None)
    pixels = np.zeros((65_500, 8, 3), np.uint8)
    pixels[32_740:32_760] = 200
    found = centre_crop(pixels, 224)
    assert found.shape == (224, 224, 3)
    assert found.max() == 200
