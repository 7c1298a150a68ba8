"""The compiled augmentation equals torch's on random images and parameters and on the edges; how it is missed."""

import hashlib
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest
import torch
from launch import ROOT

from caco_scale import config as configuration
from caco_scale.data import augment as augmentation
from caco_scale.data import augment_cpu
from caco_scale.data.augment import IMAGENET_MEAN, IMAGENET_STD, augment_by_torch
from caco_scale.data.order import sample_keys
from caco_scale.data.views import ViewSpec, draw_colour
from caco_scale.training.assemble import augmentation_note

FLAGS = ("jitter", "grayscale", "blur", "solarize", "flip")
PLAIN = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """The code as an installation builds it."""
    if not (shutil.which("cc") or shutil.which("gcc")):
        pytest.skip("needs a C compiler")
    folder = tmp_path_factory.mktemp("built")
    build(folder)
    library = augment_cpu.load(folder / "caco_scale/data")
    assert not isinstance(library, str), library
    return library


def build(folder, **environment):
    command = [
        "env",
        *(f"{name}={value}" for name, value in environment.items()),
        sys.executable,
        "-c",
        "import setuptools; setuptools.setup()",
        "-q",
        "build_ext",
        f"--build-lib={folder}",
        f"--build-temp={folder}/objects",
    ]
    return subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)


def draw(size, num, seed=0, dtype=np.uint8, channels=3, **spec):
    """Images of every kind and their parameters: noise, smooth ones, greys, blacks and whites."""
    rng, most = np.random.default_rng(seed), np.iinfo(dtype).max
    params = draw_colour(ViewSpec(size, (0.2, 1.0), **spec), sample_keys(seed, 0, np.arange(num), 0))
    images = rng.integers(0, most, (num, size, size, channels), dtype, endpoint=True)
    images[1::4] = (
        images[1::4] // 16 + rng.integers(0, most - most // 16, (len(images[1::4]), 1, 1, channels))
    ).astype(dtype)
    images[2::8] = images[2::8, :, :, :1]
    images[3::16], images[7::16] = 0, most
    return torch.from_numpy(images), {name: torch.from_numpy(values) for name, values in params.items()}


def both(library, crops, params, channels_last=False, **plain):
    plain = plain or PLAIN
    ours = augment_cpu.augment(crops, params, **plain, channels_last=channels_last, library=library)
    return ours, augment_by_torch(crops, params, **plain, channels_last=channels_last)


def assert_equal(library, crops, params, tolerance=1e-5, **plain):
    """Within a hundredth of the promised 1e-3 of the range, but for pixels a rounding from solarize's threshold."""
    ours, oracle = both(library, crops, params, **plain)
    difference = (ours - oracle).abs()
    # A pixel within a rounding of the threshold: inverted by one of the two, 1 - t against t.
    threshold = params["solarize_threshold"].view(-1, 1, 1, 1)
    inverted = (difference - (1 - 2 * threshold).abs()).abs() < tolerance
    difference[inverted & params["solarize"].view(-1, 1, 1, 1)] = 0
    assert difference.max() < tolerance, difference.max()


@pytest.mark.parametrize(
    ("size", "num"), [(1, 64), (2, 64), (3, 64), (7, 256), (32, 512), (33, 512), (97, 48)]
)
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_random_images_and_parameters(library, size, num, dtype):
    strengths = {
        "jitter": (0.9, 0.9, 0.9, 0.5),
        "jitter_p": 0.9,
        "solarize_p": 0.3,
        "blur_sigma": (0.05, 3.0),
    }
    crops, params = draw(size, num, seed=size, dtype=dtype, **strengths)
    assert_equal(library, crops, params)


@pytest.mark.parametrize("size", [8, 31])
@pytest.mark.parametrize("hue", [0.0, 0.5, -0.5, 0.25])
@pytest.mark.parametrize("factor", [0.0, 1.0, 2.0])
def test_edges_of_the_jitter_in_every_order(library, size, hue, factor):
    crops, params = draw(size, 24 * 16, jitter_p=1.0, blur_p=0.0, grayscale_p=0.0)
    orders = torch.tensor(
        [
            [a, b, c, 6 - a - b - c]
            for a in range(4)
            for b in range(4)
            for c in range(4)
            if len({a, b, c}) == 3
        ]
    )
    params["order"] = orders.repeat_interleave(16, dim=0)
    params["hue"][:] = hue
    for name in ("brightness", "contrast", "saturation"):
        params[name][:] = factor
    assert_equal(library, crops, params)


@pytest.mark.parametrize("name", FLAGS)
def test_each_operation_alone_and_none(library, name):
    crops, params = draw(32, 32)
    params.update({flag: torch.zeros(32, dtype=torch.bool) for flag in FLAGS})
    ours, oracle = both(library, crops, params)
    assert torch.equal(ours, oracle)
    params[name] = torch.arange(32) % 2 == 0
    assert_equal(library, crops, params)
    changed, _ = both(library, crops, params)
    assert torch.equal(changed[1::2], ours[1::2])
    assert not torch.equal(changed, ours)


def test_solarize_at_its_threshold_on_every_level(library):
    levels = torch.arange(256, dtype=torch.uint8).view(1, 16, 16, 1).expand(1, 16, 16, 3)
    for threshold in (0, 1, 128, 255):
        _, params = draw(
            16, 1, solarize_p=1.0, jitter_p=0, grayscale_p=0, blur_p=0, flip_p=0, solarize_threshold=threshold
        )
        ours, oracle = both(library, levels, params)
        assert torch.equal(ours, oracle)


@pytest.mark.parametrize("channels", [1, 2, 5])
def test_other_channels_have_brightness_and_contrast(library, channels):
    crops, params = draw(16, 64, channels=channels, jitter_p=0.9, solarize_p=0.3)
    assert_equal(library, crops, params, mean=[0.0] * channels, std=[1.0] * channels)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_normalising_is_the_same_to_the_last_bit(library, dtype):
    crops, _ = draw(33, 16, dtype=dtype)
    for channels_last in (False, True):
        ours = augment_cpu.augment(crops, None, IMAGENET_MEAN, IMAGENET_STD, channels_last, library)
        images = augmentation._to_float(crops, torch.float32)
        assert torch.equal(ours, augmentation._normalised(images, IMAGENET_MEAN, IMAGENET_STD, channels_last))
        assert ours.is_contiguous(memory_format=torch.channels_last) == channels_last


def test_threads_layouts_and_slices_change_nothing(library, monkeypatch):
    crops, params = draw(32, 40, solarize_p=0.3)
    one, _ = both(library, crops, params)
    assert torch.equal(both(library, crops, params, channels_last=True)[0], one)
    for threads in (3, 1000):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        assert torch.equal(both(library, crops, params)[0], one)
    strided = {name: values[10:30:2] for name, values in params.items()}
    part = augment_cpu.augment(crops[10:30:2], strided, **PLAIN, channels_last=False, library=library)
    assert torch.equal(part, one[10:30:2])
    none = augment_cpu.augment(
        crops[:0], {n: v[:0] for n, v in params.items()}, **PLAIN, channels_last=False, library=library
    )
    assert none.shape == (0, 3, 32, 32)


def test_without_a_compiler_it_installs_and_torch_augments_which_a_line_says(tmp_path, monkeypatch):
    build(tmp_path, CC="no-such-compiler")
    reason = augment_cpu.load(tmp_path / "caco_scale/data")
    assert isinstance(reason, str)
    assert "not built" in reason
    monkeypatch.setattr(augment_cpu, "load", lambda: reason)
    crops, params = draw(8, 4)
    assert torch.equal(augmentation.augment(crops, params), augment_by_torch(crops, params))
    demo = configuration.load_recipe("demo")
    cpu, fp64 = torch.device("cpu"), configuration.replace(demo, precision__compute="fp64")
    assert reason in augmentation_note(demo, cpu)
    assert "pip install" in augmentation_note(demo, cpu)
    assert augmentation_note(fp64, cpu) is augmentation_note(demo, torch.device("cuda")) is None


def test_pyproject_knows_the_source_of_the_compiled_code():
    source = (ROOT / "caco_scale/data/augment_cpu.c").read_bytes()
    (extension,) = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["ext-modules"]
    assert dict(extension["define-macros"])["SOURCE_SHA256"] == f'"{hashlib.sha256(source).hexdigest()}"'


def test_a_broken_library_is_not_used(tmp_path):
    (tmp_path / augment_cpu.LIBRARY).write_bytes(b"no library")
    assert "cannot be loaded" in augment_cpu.load(tmp_path)


def test_code_of_another_source_is_not_used(library, tmp_path, monkeypatch):
    (tmp_path / "augment_cpu.c").write_text("another version")
    monkeypatch.setattr(augment_cpu, "__file__", str(tmp_path / "augment_cpu.py"))
    (tmp_path / augment_cpu.LIBRARY).write_bytes(Path(library._name).read_bytes())
    assert "another version of its source" in augment_cpu.load(tmp_path)
