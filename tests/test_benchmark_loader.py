"""The loader's benchmark runs, reads what it says, and names the machine. No figure is asserted."""

import pytest
from test_benchmarks import run

from caco_scale.benchmark import loader
from caco_scale.errors import UserError


@pytest.mark.long
def test_the_loader_benchmark_writes_its_json(tmp_path):
    import numpy as np
    from PIL import Image
    from shard_sets import smooth_image

    for number in range(12):
        (tmp_path / f"images/c{number % 2}").mkdir(parents=True, exist_ok=True)
        image = smooth_image(np.random.default_rng(number), 60, 80)
        Image.fromarray(image).save(tmp_path / f"images/c{number % 2}/{number}.jpg")
    words = ["loader", "--images", tmp_path / "images", "--rounds", 1, "--batch", 6, "--size", 32]
    saved = run(tmp_path / "saved", *words)
    assert saved["images"] == 12
    assert saved["machine"]["processor"]
    assert len(saved["rows"]) == 6
    assert saved["ratios"]["ImageFolder + PIL"] == 1
    assert all(row["images_per_cpu_second"] > 0 and row["peak_mb"] > 0 for row in saved["rows"])


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
