"""The loader's benchmark runs, reads what it says, and names the machine. No figure is asserted."""

import numpy as np
import pytest
import torch
from PIL import Image
from shard_sets import smooth_image
from test_benchmarks import run

from caco_scale.benchmark import loader
from caco_scale.errors import UserError


def draw(folder):
    for number in range(12):
        (folder / f"c{number % 2}").mkdir(parents=True, exist_ok=True)
        image = smooth_image(np.random.default_rng(number), 60, 80)
        Image.fromarray(image).save(folder / f"c{number % 2}/{number}.jpg")
    return folder


@pytest.mark.long
def test_the_loader_benchmark_writes_its_json(tmp_path):
    words = ["loader", "--images", draw(tmp_path / "images"), "--rounds", 1, "--batch", 6, "--size", 32]
    saved = run(tmp_path / "saved", *words)
    assert saved["images"] == 12
    assert saved["machine"]["processor"]
    rates = {row["what"]: row["images_per_cpu_second"] for row in saved["rows"]}
    assert len(rates) == 8
    for row in saved["rows"]:  # crops with crops, all with all
        work = row["what"].split(":")[0]
        assert row["ratio"] == pytest.approx(
            row["images_per_cpu_second"] / rates[f"{work}: torchvision, PIL"], abs=0.01
        )
    assert saved["peers"]["torchvision"]
    assert all(row["images_per_cpu_second"] > 0 and row["peak_mb"] > 0 for row in saved["rows"])


def test_both_make_crops_of_the_same_kind_from_the_same_images(tmp_path, monkeypatch):
    """What torchvision's rows are asked for is what the loader's row makes: two uint8 views an image, no more."""
    from torchvision import datasets

    folder, made = draw(tmp_path / "images"), []
    kind = datasets.ImageFolder.__getitem__
    monkeypatch.setattr(datasets.ImageFolder, "__getitem__", lambda self, i: made.append(kind(self, i)[0]))
    assert (
        loader.read_image_folder(folder, 12, 32, augmented=False) == loader.read_tensors(folder, 12, 32) == 12
    )
    assert len(made) == 24
    assert all(tuple(v.shape) == (3, 32, 32) and v.dtype == torch.uint8 for views in made for v in views)
    loader.read_image_folder(folder, 2, 32)
    assert all(view.dtype == torch.float32 for views in made[24:] for view in views)


def test_images_that_are_not_measured_are_refused_in_one_line(tmp_path, monkeypatch):
    def refused(words, images):
        with pytest.raises(UserError, match=words):
            loader.measure(images, rounds=1, batch=1, size=32)

    for split in ("train", "val"):
        (tmp_path / "sets" / split / "cat").mkdir(parents=True)
        (tmp_path / "sets" / split / "cat" / "x.jpg").write_bytes(b"x")
        (tmp_path / "sets" / split / "cat" / "y.jpg").write_bytes(b"y")
    (tmp_path / "images.tar").write_bytes(b"")
    refused("has 2 splits: give one folder", tmp_path / "sets")
    refused("is no folder", tmp_path / "images.tar")
    monkeypatch.setattr(loader, "MOST_IMAGES", 1)
    refused("has 2 images, which would be copied", tmp_path / "sets" / "val")
