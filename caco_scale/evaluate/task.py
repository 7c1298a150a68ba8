"""What every evaluation begins with: the processes, the encoder, the two sets of images.

:class:`Encoding` is the part without the sets, for other commands that give images to an encoder.
"""

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from caco_scale.data.labels import lacking_classes, with_classes_of
from caco_scale.data.loader import evaluation_batches
from caco_scale.data.pipeline import Undecodable
from caco_scale.data.pixels import RGB8
from caco_scale.data.store import open_store
from caco_scale.data.store.base import Store
from caco_scale.data.store.folder import split_folders
from caco_scale.data.views import describe_crop, usual_resize
from caco_scale.data.workers import too_many_workers
from caco_scale.distributed.collectives import gather_objects
from caco_scale.distributed.launch import launched_strategy, start_processes
from caco_scale.errors import UserError
from caco_scale.evaluate.results import INTERVAL_WORDS, ResultFolder, same_set
from caco_scale.run.environment import describe_environment
from caco_scale.shipped import spelled
from caco_scale.weights.build import gist
from caco_scale.weights.fetch import settled
from caco_scale.weights.load import Weights, describe, load_weights

if TYPE_CHECKING:
    from accelerate import Accelerator

FULL_NAMES = {"knn": "kNN", "linear": "linear evaluation", "finetune": "fine-tuning"}


@dataclass
class Encoding:
    """How images become features on this rank: an encoder, and what it is given.

    ``size``, ``mean``, ``std``: of the images that the encoder is given; ``resize``: their shorter side before the
    centre crop. ``dtype``: of images and parameters; ``autocast_dtype``: of the forward pass, None: the same.
    """

    accelerator: "Accelerator"
    weights: Weights
    size: int
    resize: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    dtype: torch.dtype
    autocast_dtype: torch.dtype | None
    images_at_once: int
    workers: int

    @property
    def device(self) -> torch.device:
        return self.accelerator.device

    @property
    def rank(self) -> int:
        return self.accelerator.process_index

    @property
    def world_size(self) -> int:
        return self.accelerator.num_processes

    @property
    def is_main(self) -> bool:
        return self.accelerator.is_main_process

    def say(self, line: str) -> None:
        if self.is_main:
            print(line, flush=True)

    def extraction(self) -> dict[str, Any]:
        """How :func:`~caco_scale.evaluate.features.extract_features` is to treat images."""
        return {
            "mean": self.mean,
            "std": self.std,
            "device": self.device,
            "dtype": self.dtype,
            "autocast_dtype": self.autocast_dtype,
            "channels_last": True,
        }

    def evaluation_batches(self, store: Store, undecodable: list[Undecodable]) -> Iterable:
        """This process's share of a whole set, centre-cropped; what does not decode goes to ``undecodable``."""
        return evaluation_batches(
            store,
            self.size,
            rank=self.rank,
            world_size=self.world_size,
            batch_size=self.images_at_once,
            workers=self.workers,
            resize=self.resize,
            undecodable=undecodable,
        )

    def describe(self) -> dict[str, Any]:
        """What decides features, besides the images: plain values."""
        pixels = self.weights.pixels
        return {
            "weights": self.weights.sha256,
            "encoder": self.weights.encoder,
            "size": self.size,
            "resize": self.resize,
            "mean": list(self.mean),
            "std": list(self.std),
            **({"channels": pixels.channels, "bits": pixels.bits} if pixels != RGB8 else {}),
            "compute": str(self.autocast_dtype or self.dtype).removeprefix("torch."),
        }


@dataclass
class Task(Encoding):
    """What is evaluated: an encoder and two sets of images, on this rank."""

    train: Store
    val: Store
    seed: int

    def describe(self) -> dict[str, Any]:
        """What decides an evaluation's result, as far as all evaluations share it: plain values."""
        return {
            **super().describe(),
            "train": self.train.fingerprint(),
            "val": self.val.fingerprint(),
        }

    def folder(self, flags: Any, name: str, settings: dict[str, Any]) -> ResultFolder:
        """The :class:`ResultFolder` of this evaluation with ``settings`` of its own."""
        source = Path(self.weights.path)
        step = f"{source.name}-{self.weights.encoder}"
        base = source.parent.parent / "evaluate" if source.is_dir() else Path("runs/evaluate")
        settings = {"evaluation": name, **self.describe(), **settings}
        return ResultFolder(flags.to, base, f"{name}-{step}", settings, self.is_main)

    def report(
        self,
        folder: ResultFolder,
        seconds: float,
        undecodable: Mapping[str, Sequence[tuple[str, str]]],
        **result: Any,
    ) -> dict[str, Any]:
        """Write ``result.json``: the figures, and all that one needs to trust them -> its content. Collective.

        ``undecodable``: of ``train`` and ``val``, (name, error) of each image that does not decode.
        """
        places = gather_objects((str(self.device), os.uname().nodename))
        content = {
            **result,
            "intervals": INTERVAL_WORDS,
            "undecodable": {which: list(images) for which, images in undecodable.items()},
            "classes": list(self.val.manifest.classes),
            "settings": folder.settings,
            "weights": describe(self.weights),
            "data": {
                name: {
                    "url": store.url,
                    "images": store.manifest.num_samples,
                    "classes": len(store.manifest.classes),
                }
                for name, store in (("train", self.train), ("val", self.val))
            },
            "seconds_of_this_start": round(seconds, 1),
            "environment": describe_environment(
                world_size=self.world_size,
                devices=[device for device, _ in places],
                hosts=[host for _, host in places],
            ),
        }
        folder.write("result.json", content)
        return content


def build_task(flags: Any) -> Task:
    """The :class:`Task` that the flags of a command name. Collective.

    Raises:
        UserError: processes, weights or images that are not as asked for.
    """
    accelerator = processes_of(flags)
    train_url, val_url, weights = _sources(flags)
    weights, train = open_images(weights, train_url, flags.cache_dir, "--data", labelled=True)
    weights, val = open_images(weights, val_url, flags.cache_dir, "--val", labelled=True)
    val = with_classes_of(train, val, FULL_NAMES[flags.command])
    task = Task(**encoding_of(flags, accelerator, weights), train=train, val=val, seed=flags.seed)
    _introduce(task, flags)
    return task


def encoding_of(flags: Any, accelerator: "Accelerator", weights: Weights) -> dict[str, Any]:
    """The fields of an :class:`Encoding` by the flags of a command; the weights' modules move to the device."""
    size = flags.size or weights.size
    for name in ("mean", "std"):
        given = len(getattr(flags, name) or getattr(weights, name))
        if given != weights.pixels.channels:
            raise UserError(
                f"--{name} has {given} numbers: give {weights.pixels.channels} numbers, one a channel"
            )
    compute = {"fp64": torch.float64}.get(flags.precision, torch.float32)
    for module in filter(None, (weights.backbone, weights.projector)):
        module.to(accelerator.device, compute)
    return {
        "accelerator": accelerator,
        "weights": weights,
        "size": size,
        "resize": _resize(flags, weights, size),
        "mean": tuple(flags.mean or weights.mean),
        "std": tuple(flags.std or weights.std),
        "dtype": compute,
        "autocast_dtype": torch.bfloat16 if flags.precision == "bf16" else None,
        "images_at_once": flags.images_at_once,
        "workers": flags.workers,
    }


def open_images(
    weights: Weights, address: str, cache_dir: str, flag: str, labelled: bool = False
) -> tuple[Weights, Store]:
    """A set for an encoder, checked -> the weights and the store. ``cache_dir`` to ``labelled``: of ``open_store``.

    Where the source of the weights does not say how many bits its images have, they are those of a set of as many
    channels: whatever they are, an encoder is given their range as 0 to 1. UserError: images of other channels or bits.
    """
    store = open_store(
        address, cache_dir, labelled=labelled, flag=flag, pixels=weights.pixels if weights.says_bits else None
    )
    if not weights.says_bits:
        pixels = weights.pixels._replace(bits=store.bits_for(weights.pixels.channels))
        store.take_pixels(pixels, flag)
        guess = () if pixels.bits == RGB8.bits else ("bits",)
        weights = replace(weights, pixels=pixels, says_bits=True, assumed=(*weights.assumed, *guess))
    store.check()
    return weights, store


def processes_of(flags: Any) -> "Accelerator":
    """Join the processes of the launch, as many as the flags of a command ask for. Collective."""
    strategy = launched_strategy(os.environ)
    if strategy != "ddp":
        raise UserError(
            f"the launcher asks for {strategy}, but this command partitions nothing: use "
            f"--config_file {spelled('ds_configs/ddp.yaml')}"
        )
    try:
        return start_processes(flags.world_size, flags.timeout_seconds)
    except UserError as error:
        raise UserError(re.sub(r"run\.(world_size|timeout_seconds)", r"\1", str(error))) from None


def weights_of(flags: Any) -> Weights:
    """The encoder that the flags of a command name. Collective."""
    return load_weights(settled(flags.weights), flags.which, flags.step, flags.arch, flags.stem)


def _sources(flags):
    """(address of the training images, of the validation images, weights)."""
    weights = weights_of(flags)
    train, val = flags.data, flags.val
    if train is not None and val is None and (both := split_folders(train)):
        return *both, weights
    of_run = (weights.config or {}).get("data") or {}
    train = of_run.get("shards") if train is None else train
    val = of_run.get("val_shards") if val is None and flags.data is None else val
    if not train:
        raise UserError(
            f"{flags.weights} does not say what it was trained on: give --data TRAIN and --val VAL (shard sets, "
            "image folders, lists or parquet files)"
        )
    if not val:
        raise UserError(
            f"no validation images: give --val VAL (a shard set or an image folder), or as --data a folder with train "
            f"and val in it, which {train} is not"
        )
    return train, val, weights


def _resize(flags, weights, size):
    """The shorter side before the centre crop: as asked, else the run's, else the usual one."""
    resize = flags.resize or (weights.resize if size == weights.size else 0) or usual_resize(size)
    if resize < size:
        raise UserError(
            f"--resize {resize} is less than the {size} pixels that are cut out: give {size} or more"
        )
    return resize


def introduce_encoder(task: Encoding, flags: Any) -> None:
    """Say which encoder is used, what was guessed of it, and what images it is given."""
    weights = task.weights
    task.say(
        f"{task.world_size} process(es), {task.device.type}; {weights.encoder} encoder of {weights.path} "
        f"({weights.kind}, {weights.arch}, stem {weights.stem})"
    )
    guessed = [name for name in weights.assumed if getattr(flags, name, 0) is None]
    if guessed:
        values = ", ".join(f"{name} {str(getattr(task, name)).strip('()')}" for name in guessed)
        task.say(f"assumed, for the file does not say it: {values}; --{', --'.join(guessed)} give others")
    if "bits" in weights.assumed:
        task.say(
            f"the file does not say the bits of its images: {weights.pixels.bits}, as those of the set have"
        )
    if weights.unmatched:
        task.say(f"in the file but not used: {gist(weights.unmatched)}")
    task.say(f"images for evaluation: {describe_crop(task.size, task.resize)}")
    if crowded := too_many_workers("workers", task.workers):
        task.say(crowded)


def _introduce(task, flags):
    introduce_encoder(task, flags)
    for name, store in (("training", task.train), ("validation", task.val)):
        task.say(
            f"{name}: {store.manifest.num_samples:,} images of {len(store.manifest.classes)} classes in {store.url}"
        )
        if store.unchecked:
            task.say(store.unchecked)
    if absent := lacking_classes(task.val):
        task.say(absent)
    if task.train.fingerprint() == task.val.fingerprint():
        task.say(f"warning: {same_set('--data', '--val')}")
