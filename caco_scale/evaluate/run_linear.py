"""The command ``evaluate linear``: a linear classifier on frozen features.

As the paper does (arXiv:2203.14370, section 4; the authors' linear.py): 100 epochs of random resized crops and flips,
batch 4,096, LARS that scales the bias too, momentum 0.9, no weight decay, cosine, the encoder in eval mode. With
``--fast``: 10 epochs of the same images (more of small sets), whose features classifiers with many learning rates
share (SGD with momentum, as DINOv2 does); with ``--crops centre`` of one centre crop an image, extracted once, which
gives other figures. Which rate counts is decided on a tenth of the training images that a second set of classifiers
never sees, so that no validation label chooses anything.

Shapes: H rates, B this rank's batch, N global, F features.
"""

import math
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from caco_scale.data.labels import labels_of
from caco_scale.data.order import Order, permutation
from caco_scale.data.pipeline import Undecodable
from caco_scale.data.store.base import Store
from caco_scale.data.store.subset import Subset
from caco_scale.distributed.collectives import gather_objects
from caco_scale.errors import UserError
from caco_scale.evaluate.feature_cache import Features, features_of, remove_features
from caco_scale.evaluate.heads import LinearHeads, Score, growth, score_features
from caco_scale.evaluate.loop import (
    NO_LABEL,
    LabelledBatch,
    LabelledImages,
    Progress,
    check_batch,
    fit,
    restore,
)
from caco_scale.evaluate.results import CONFIDENCE, interval, result_notes, show
from caco_scale.evaluate.task import Task, build_task

AUTHORS_LR = 0.025  # per 256 images, of the command that the authors publish; their parser's default is 0.1
FAST_LRS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)
EPOCHS, BATCH_SIZE = 100, 4096
FAST_EPOCHS, FAST_BATCH_SIZE = (10, 100), (8, 256)  # least and most
FAST_STEPS = 2000  # at least, as far as FAST_EPOCHS allows
FAST_STEPS_PER_EPOCH = 64  # at least, as far as FAST_BATCH_SIZE allows
HELD_OUT = 83  # keeps these random numbers apart from others
LEAST_GROWTH, FEW_STEPS = 5, 1000


def run(flags: Any) -> dict[str, Any]:
    """``evaluate linear`` -> the result's content."""
    task = build_task(flags)
    usual = (
        fast_lengths(task.train.manifest.num_samples, flags.batch_size)
        if flags.fast
        else (BATCH_SIZE, EPOCHS)
    )
    batch_size, epochs = flags.batch_size or usual[0], flags.epochs or usual[1]
    rates, source = _rates(flags)
    if flags.crops == "centre" and not flags.fast:
        raise UserError("--crops centre goes with --fast: the paper's protocol has random crops")
    check_batch(batch_size, task.train.manifest.num_samples, task.world_size)
    labels = labels_of(task.train, "linear evaluation")
    labels_of(task.val, "linear evaluation")
    name = "linear-fast" if flags.fast else "linear"
    settings = {"lr": rates, "epochs": epochs, "batch_size": batch_size, "seed": flags.seed}
    settings |= {"crops": flags.crops} if flags.fast else {}
    folder = task.folder(flags, name, settings)
    task.say(f"{epochs} epochs, batch {batch_size:,}")
    task.say(f"base learning rate {', '.join(f'{rate:g}' for rate in rates)} per 256 images: {source}")
    result = folder.finished()
    if result is None:
        began = time.monotonic()
        figures = _evaluate(
            task, folder, labels, rates, epochs, batch_size, flags.crops if flags.fast else None
        )
        result = task.report(folder, time.monotonic() - began, lr_source=source, **figures)
        remove_features(folder)
    else:
        task.say("evaluated before: the figures are those of then")
    if task.is_main:
        _show(task, folder, result)
    return result


def fast_lengths(num_images: int, batch_size: int | None = None) -> tuple[int, int]:
    """The usual (batch size, epochs) of ``--fast``: 256 and 10 on ImageNet, smaller batches and more epochs of less.

    ``batch_size``: the one that is asked for, if any.
    """
    least, most = FAST_BATCH_SIZE
    if batch_size is None:
        batch_size = most
        while batch_size > least and num_images // batch_size < FAST_STEPS_PER_EPOCH:
            batch_size //= 2
    least, most = FAST_EPOCHS
    return batch_size, min(max(least, math.ceil(FAST_STEPS / max(1, num_images // batch_size))), most)


def _rates(flags):
    """(learning rates per 256 images, whose they are in words)."""
    if flags.fast:
        if flags.lr:
            return flags.lr, "given by --lr"
        return list(FAST_LRS), "the sweep of --fast"
    if flags.lr and len(flags.lr) > 1:
        raise UserError(f"--lr names {len(flags.lr)} learning rates: give one, or --fast, which sweeps many")
    if flags.lr:
        return (
            flags.lr,
            f"given by --lr (the authors' command has {AUTHORS_LR}, their parser's default is 0.1)",
        )
    return [AUTHORS_LR], "the authors' command (their parser's default is 0.1)"


def _build_heads(task, rates, batch_size, optimizer):
    """Heads in fp64 on a CPU, where rounding then hides no difference between numbers of processes; else fp32."""
    return LinearHeads(
        [rate * batch_size / 256 for rate in rates],
        len(task.train.manifest.classes),
        task.weights.num_features,
        optimizer,
        device=task.device,
        dtype=torch.float64 if task.device.type == "cpu" else torch.float32,
        seed=task.seed,
    )


class FrozenEncoder:
    """Classifiers on the features of a frozen encoder, as :func:`fit` trains them.

    ``held_out`` (n,) bool by sample number, or None. With it the heads are H rates twice: the first H do not learn
    from those samples, the second H learn from all.
    """

    def __init__(self, task: Task, heads: LinearHeads, held_out: np.ndarray | None = None):
        self.task, self.heads, self.held_out = task, heads, held_out

    @torch.no_grad()
    def update(self, batch: LabelledBatch, factor: float) -> float:
        """-> the lowest loss of the heads that learn from all samples."""
        known = batch.labels != NO_LABEL
        features = self._features(batch.images[known])
        shares = torch.from_numpy(self._shares(batch)).to(features)[:, known]
        losses = self.heads.step(features, batch.labels[known], shares, factor)
        losses = losses[-self.num_rates :]
        finite = losses[losses.isfinite()]
        return finite.min().item() if len(finite) else float("nan")

    @property
    def num_rates(self) -> int:
        return len(self.heads.rates) // (1 if self.held_out is None else 2)

    def tensors(self) -> dict[str, torch.Tensor]:
        return self.heads.tensors()

    def _shares(self, batch):
        """What each sample counts in the mean over the global batch of each head: (heads, B)."""
        everything = np.full((self.num_rates, len(batch.ids)), 1 / len(batch.global_ids))
        if self.held_out is None:
            return everything
        seen = int((~self.held_out[batch.global_ids]).sum())
        without = np.tile(~self.held_out[batch.ids] / max(1, seen), (self.num_rates, 1))
        return np.concatenate([without, everything])

    def _features(self, images):
        task = self.task
        enabled = task.autocast_dtype is not None
        with torch.autocast(task.device.type, dtype=task.autocast_dtype, enabled=enabled):
            parts = [task.weights.backbone(part) for part in images.split(task.images_at_once)]
        return torch.cat(parts).to(self.heads.weight.dtype)


class CentreCrops:
    """Features of centre crops, extracted once, in batches of the same samples as :class:`LabelledImages` has.

    A rank has those samples of a global batch whose features it holds: any number of them.
    """

    def __init__(self, task: Task, store: Store, labels: np.ndarray, batch_size: int, features: Features):
        counts = store.manifest.shards.counts
        self.order = Order(counts, seed=task.seed, global_batch_size=batch_size)
        self.undecodable = {image.name: image.error for image in features.undecodable}
        self._features, self._labels, self._device = features.features, torch.from_numpy(labels), task.device
        self._rows = np.full(len(labels), -1)
        self._rows[features.ids.numpy()] = np.arange(len(features.ids))

    def batches(self, start: int, end: int) -> Iterator[LabelledBatch]:
        """This rank's part of every step from ``start`` up to ``end``; "images" are features (B, F)."""
        for step in range(start, end):
            global_ids = self.order.batch(step)
            ids = global_ids[self._rows[global_ids] >= 0]
            features = self._features[torch.from_numpy(self._rows[ids])]
            labels = self._labels[torch.from_numpy(ids)]
            yield LabelledBatch(features.to(self._device), labels.to(self._device), ids, global_ids)


class FrozenFeatures(FrozenEncoder):
    """As :class:`FrozenEncoder`, of the features that a batch already holds."""

    def _features(self, images):
        return images.to(self.heads.weight.dtype)


def _evaluate(task, folder, labels, rates, epochs, batch_size, crops):
    """Train the classifiers, or go on where a former start stopped -> the figures of the result.

    ``crops``: None: the long protocol; of --fast: random or centre.
    """
    fast, centre = crops is not None, crops == "centre"
    train = features_of(task, task.train, folder, "train") if centre else None
    images = LabelledImages(task, task.train, labels, batch_size)
    if train is not None:
        images = CentreCrops(task, task.train, labels, batch_size, train)
    steps_per_epoch = images.order.steps_per_epoch
    num_steps = epochs * steps_per_epoch
    heads = _build_heads(task, rates * 2 if fast else rates, batch_size, "sgd" if fast else "lars")
    _warn_of_few_steps(task, heads.rates[0], num_steps, fast)
    num_classes = len(task.val.manifest.classes)
    val = features_of(task, task.val, folder, "val")
    wrong = [image.label for image in val.undecodable]
    held_out = choose_held_out(len(labels), task.seed) if fast else None
    learner = (FrozenFeatures if centre else FrozenEncoder)(task, heads, held_out)
    progress = restore(folder, learner)
    if progress.step:
        task.say(f"resumed at step {progress.step:,} of {num_steps:,}")

    def end_epoch(epoch):
        if fast:
            task.say(f"epoch {epoch} of {epochs}")
            return {"epoch": epoch}
        score = score_features(heads, *val[:2], num_classes, wrong).percent()
        task.say(f"epoch {epoch} of {epochs}: top-1 {score['top1']:.2f}%, top-5 {score['top5']:.2f}%")
        return {"epoch": epoch, **score, "val_loss": score["loss"]}

    fit(
        learner,
        lambda start: images.batches(start, num_steps),
        progress,
        num_steps=num_steps,
        steps_per_epoch=steps_per_epoch,
        folder=folder,
        end_epoch=end_epoch,
        undecodable=images.undecodable,
    )
    score = score_features(heads, *val[:2], num_classes, wrong)
    if held_out is not None:
        features, truth = _held_out_features(task, folder, held_out, train)
        figures = choose(rates, score_features(heads, features, truth, num_classes), score, heads.finite())
    else:
        figures = {
            **figures_of(score),
            "lr": rates[0],
            "optimizer": "LARS, bias scaled too",
        }
    undecodable = undecodable_names(progress, val.undecodable)
    return {**figures, "history": progress.history, "undecodable": undecodable}


def _held_out_features(task, folder, held_out, train):
    """Features (n, F) and labels (n,) of centre crops of this rank's held-out images, out of ``train`` if there."""
    if train is None:
        unseen = features_of(task, Subset(task.train, np.flatnonzero(held_out)), folder, "held_out")
        return unseen.features, unseen.labels
    chosen = torch.from_numpy(held_out)[train.ids]
    return train.features[chosen], train.labels[chosen]


def undecodable_names(progress: Progress, val: Sequence[Undecodable]) -> dict[str, list[tuple[str, str]]]:
    """(name, error) of all images that do not decode: those met in training, and of the validation set. Collective."""
    of_val = sorted(image for part in gather_objects(list(val)) for image in part)
    return {
        "train": sorted(progress.undecodable.items()),
        "val": [(image.name, image.error) for image in of_val],
    }


def _warn_of_few_steps(task, rate, num_steps, fast):
    """Say so where so few steps, or for LARS such small ones, cannot train a classifier to its end."""
    reach = growth([rate], num_steps)[0]
    if fast and num_steps < FEW_STEPS:
        task.say(
            f"warning: {num_steps:,} steps are few for a linear classifier: raise --epochs, or lower --batch_size, to "
            f"{FEW_STEPS:,} or more"
        )
    if not fast and reach < LEAST_GROWTH:
        task.say(
            f"warning: in {num_steps:,} steps LARS lets the classifier grow by e^{reach:.1f} at most, too little to "
            f"learn from weights of 0.01: raise --lr about {LEAST_GROWTH / reach:.0f} times, or lower --batch_size"
        )


def choose_held_out(num_samples: int, seed: int) -> np.ndarray:
    """A tenth of the samples, at least one: (n,) bool by sample number."""
    held_out = np.zeros(num_samples, bool)
    held_out[permutation(num_samples, seed, HELD_OUT)[: max(1, num_samples // 10)]] = True
    return held_out


def choose(rates: Sequence[float], held_out: Score, val: Score, finite: Sequence[bool]) -> dict[str, Any]:
    """The figures of a sweep; the rate is the one whose first head is best on the images that it never saw.

    ``held_out``, ``val``: :class:`~caco_scale.evaluate.heads.Score` of 2H heads; ``finite``: of each, whether it still
    is numbers. Of equal ones the one with the lowest loss there. UserError: every head diverged.
    """
    num_rates = len(rates)
    rows: list[dict[str, Any]] = []
    for head, rate in enumerate(rates):
        row: dict[str, Any] = {"lr": rate, "held_out_top1": None}
        if finite[head] and finite[num_rates + head]:
            unseen = held_out.percent(head)
            row |= {"held_out_top1": unseen["top1"], "held_out_loss": unseen["loss"]}
            row |= val.percent(num_rates + head)
        rows.append(row)
    usable = [row for row in rows if row["held_out_top1"] is not None]
    if not usable:
        raise UserError(
            f"every classifier of the sweep diverged: give lower rates with --lr than {min(rates):g}"
        )
    best = max(usable, key=lambda row: (row["held_out_top1"], -row["held_out_loss"]))
    best_on_val = max(usable, key=lambda row: row["top1"])
    return {
        **figures_of(val, num_rates + list(rates).index(best["lr"])),
        "lr": best["lr"],
        "optimizer": "SGD, momentum 0.9, no weight decay",
        "chosen_by": "top-1 on a tenth of the training images, by classifiers trained without them",
        "best_on_validation": {"lr": best_on_val["lr"], "top1": best_on_val["top1"]},
        "results": rows,
    }


def figures_of(score: Score, head: int = 0) -> dict[str, Any]:
    """A head's :meth:`Score.percent`, with intervals of top-1 and top-5 and the right answers by class."""
    found = score.percent(head)
    return {
        **{name: found[name] for name in ("top1", "top5", "mean_per_class", "images")},
        "top1_interval": interval(found["right"], found["images"]),
        "top5_interval": interval(found["right_of_5"], found["images"]),
        "confidence": CONFIDENCE,
        "images_per_class": score.images.tolist(),
        "right_per_class": score.top1[head].tolist(),
    }


def _show(task, folder, result):
    crops = result["settings"].get("crops", "random")
    protocol = f"fast linear ({crops} crops)" if "results" in result else "linear (the paper's protocol)"
    rows = result.get("results") or [result]
    table = [
        {
            "lr / 256": f"{row['lr']:g}"
            + (" <- chosen" if "results" in result and row["lr"] == result["lr"] else ""),
            **({"held-out top-1 %": row["held_out_top1"]} if "results" in result else {}),
            "top-1 %": row.get("top1"),
            "top-5 %": row.get("top5"),
            "mean per class %": row.get("mean_per_class"),
        }
        for row in rows
    ]
    notes = [
        ", ".join(_interval_text(result, name) for name in ("top1", "top5")),
        *result_notes(result, result.get("right_per_class") or []),
        f"base learning rate {result['lr']:g} per 256 images: {result['lr_source']}",
    ]
    if "results" in result:
        notes.append(
            f"trained on {crops} crops, judged on centre crops: a figure of the other crops is another figure"
        )
        best = result["best_on_validation"]
        notes.append(
            f"chosen by {result['chosen_by']} (the best on the validation images: lr {best['lr']:g}, "
            f"{best['top1']:.2f}%)"
        )
    show(
        f"{protocol} evaluation of {task.weights.path}",
        table,
        [*notes, f"written to {folder.path / 'result.json'}"],
    )


def _interval_text(result, name):
    low, high = result[f"{name}_interval"]
    return f"{name} {result[name]:.2f}% ({low:.2f} to {high:.2f})"
