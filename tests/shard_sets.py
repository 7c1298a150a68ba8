"""Small shard sets for tests, written with webdataset's own writer."""

import hashlib
import io
import os
import tarfile
from collections import Counter

import numpy as np
from PIL import Image
from webdataset import TarWriter

from caco_scale.data.shard_index import INDEX_SUFFIXES
from caco_scale.data.shard_table import ShardInfo, ShardTable
from caco_scale.data.shards import MANIFEST_NAME, Manifest
from caco_scale.data.tars import index_tar


def smooth_image(generator, height, width):
    """A random image (height, width, 3) uint8 that looks like one to a JPEG coder: four waves per channel."""
    y, x = np.mgrid[:height, :width]
    image = np.full((height, width, 3), 128.0)
    for channel in range(3):
        for _ in range(4):
            rows, columns, phase = generator.uniform(-0.4, 0.4, 3)
            image[:, :, channel] += 30 * np.sin(rows * y + columns * x + 20 * phase)
    return image.clip(0, 255).astype(np.uint8)


def encode(image, kind="JPEG", **options):
    """A PIL image or an array as a file's bytes."""
    file = io.BytesIO()
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    image.save(file, kind, **options)
    return file.getvalue()


def write_tar(path, files, **options):
    """A tar of (name, bytes) at ``path``, by tarfile and its ``options`` -> path."""
    with tarfile.open(path, "w", **options) as tar:
        for name, data in files:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def make_shard_set(
    path, num_images=64, size=32, classes=4, samples_per_shard=16, corrupt=(), vary=0, seed=0, checksums=True
):
    """Write a shard set of JPEGs to directory ``path`` and return it as str. Image i has label i % classes.

    size: the sides are ``size`` to ``size + vary`` pixels. corrupt: numbers of images whose file is cut to its
    half, which the manifest records as any other. Tars are named 000000.tar, ...; keys are the image's number in
    eight digits. checksums: False writes indexes as version 1 did.
    """
    os.makedirs(path, exist_ok=True)
    generator, shards = np.random.default_rng(seed), []
    for first in range(0, num_images, samples_per_shard):
        name = f"{len(shards):06d}.tar"
        members = range(first, min(first + samples_per_shard, num_images))
        with TarWriter(os.path.join(path, name), mtime=0, user="", group="") as tar:
            for number in members:
                height, width = size + generator.integers(0, vary + 1, 2)
                data = encode(smooth_image(generator, height, width), quality=90)
                data = data[: len(data) // 2] if number in corrupt else data
                tar.write({"__key__": f"{number:08d}", "jpg": data, "cls": str(number % classes).encode()})
        shards.append(index_shard(path, name, len(members), checksums))
    counts = Counter(number % classes for number in range(num_images))
    names = tuple(f"class{c}" for c in range(classes))
    write_manifest(path, shards, names, tuple(counts[c] for c in range(classes)))
    return str(path)


def write_manifest(path, shards, classes, class_counts):
    """Write the manifest of indexed shards."""
    manifest = Manifest(
        classes=classes,
        class_counts=class_counts,
        num_samples=sum(shard.num_samples for shard in shards),
        num_bytes=sum(shard.num_bytes for shard in shards),
        shards=ShardTable(shards),
        fixed=[],
        rejected=[],
        build={},
    )
    with open(os.path.join(path, MANIFEST_NAME), "w", encoding="utf-8") as file:
        file.write(manifest.to_json())


def index_shard(path, name, num_samples, checksums=True):
    """Write the index of a tar -> its ShardInfo."""
    index_name = name.replace(".tar", INDEX_SUFFIXES[checksums])
    index = index_tar(os.path.join(path, name))
    index = index.with_checksums(index.checksums if checksums else None).to_bytes()
    with open(os.path.join(path, index_name), "wb") as file:
        file.write(index)
    with open(os.path.join(path, name), "rb") as file:
        tar = file.read()
    sha256 = (hashlib.sha256(data).hexdigest() for data in (tar, index))
    return ShardInfo(name, num_samples, len(tar), next(sha256), index_name, len(index), next(sha256))
