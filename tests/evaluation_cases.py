"""A trained-looking encoder and small sets for the tests of evaluations."""

import importlib

import numpy as np
import torch
from shard_sets import make_shard_set
from weight_files import authors_checkpoint, encoder

from caco_scale.evaluate.__main__ import parse


def make_place(folder, num_images=64, classes=4):
    """Shard sets ``train`` and ``val``, and ``caco.pth.tar`` of tiny random ResNets in the authors' format."""
    folder.mkdir(parents=True, exist_ok=True)
    make_shard_set(folder / "train", num_images=num_images, size=20, classes=classes, seed=0)
    make_shard_set(folder / "val", num_images=num_images // 2, size=20, classes=classes, seed=1)
    pair = encoder("tiny", "cifar"), encoder("tiny", "cifar", seed=2)
    torch.save(authors_checkpoint(*pair), folder / "caco.pth.tar")
    return folder


def words(command, place, *more):
    """The command line of an evaluation of :func:`make_place`, small and without loader processes."""
    options = ["--data", place / "train", "--val", place / "val", "--size", 16, "--workers", 0]
    return [str(word) for word in (command, place / "caco.pth.tar", *options, *more)]


def run_of_rank(rank, world_size, arguments):
    """For ``run_ranks``: the result of an evaluation's command."""
    flags = parse(arguments)
    return importlib.import_module(f"caco_scale.evaluate.run_{flags.command}").run(flags)


def separable(num_images, num_features=12, num_classes=4, seed=0, noise=0.6):
    """Features (n, F) around class centres and labels (n,)."""
    generator = np.random.default_rng(seed)
    centres = np.random.default_rng(99).normal(size=(num_classes, num_features))
    labels = generator.integers(0, num_classes, num_images)
    features = centres[labels] + noise * generator.normal(size=(num_images, num_features))
    return torch.from_numpy(features).float(), torch.from_numpy(labels)
