"""The command ``evaluate finetune``: train encoder and classifier on a share of the labels.

The semi-supervised optimizer and schedule of SimCLR (arXiv:2002.05709, appendix B.5): SGD with Nesterov momentum 0.9,
learning rate 0.05 per 256 images with a cosine and no warm-up, no weight decay, random resized crops and flips, 60
epochs on 1% of the labels and 30 on more; BatchNorm trains, over all processes. The batch is 1,024 instead of SimCLR's
4,096, of which 1% of ImageNet would give three steps an epoch.

The share is drawn class by class, at least one image of each, by a seed of our own: it is another one than SimCLR's
(12,811 images for 1% of ImageNet, 128,116 for 10%), which ``--list`` takes as the file that they publish.
``samples.txt`` lists the images in either case.

Shapes: B this rank's batch, C classes, F features.
"""

import os
import time
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from caco_scale.data.labels import labels_of
from caco_scale.data.order import permutation
from caco_scale.data.store.subset import Subset
from caco_scale.distributed import collectives
from caco_scale.distributed.syncbn import convert_sync_batchnorm
from caco_scale.errors import UserError
from caco_scale.evaluate.features import feature_batches
from caco_scale.evaluate.heads import INITIAL_STD, MOMENTUM, Score
from caco_scale.evaluate.listed import find_listed, read_list
from caco_scale.evaluate.loop import NO_LABEL, LabelledBatch, LabelledImages, check_batch, fit, restore
from caco_scale.evaluate.results import CONFIDENCE, result_notes, show
from caco_scale.evaluate.run_linear import figures_of, undecodable_names
from caco_scale.evaluate.task import Task, build_task

LR, BATCH_SIZE = 0.05, 1024
EPOCHS, EPOCHS_OF_FEW, FEW = 30, 60, 0.05
SHARE = 97  # keeps these random numbers apart from others
SAMPLES = "samples.txt"


def run(flags: Any) -> dict[str, Any]:
    """``evaluate finetune`` -> the result's content."""
    task = build_task(flags)
    labels = labels_of(task.train, "fine-tuning")
    labels_of(task.val, "fine-tuning")
    chosen, which = _choose(task, labels, flags)
    share = len(chosen) / len(labels)
    batch_size = flags.batch_size or BATCH_SIZE
    leaves = f"--list {flags.list}" if flags.list else f"--fraction {flags.fraction:g}"
    why = f" that {leaves} leaves of {len(labels):,}" if share < 1 else ""
    check_batch(batch_size, len(chosen), task.world_size, why)
    if batch_size < 2:
        raise UserError("--batch_size is 1: BatchNorm needs at least 2 images")
    epochs = flags.epochs or usual_epochs(share if flags.list else flags.fraction)
    rate = flags.lr or LR
    settings = {**which, "lr": rate, "epochs": epochs, "batch_size": batch_size, "seed": flags.seed}
    folder = task.folder(flags, "finetune-list" if flags.list else f"finetune-{flags.fraction:g}", settings)
    counts = np.bincount(labels[chosen], minlength=len(task.train.manifest.classes))
    task.say(
        f"{len(chosen):,} of {len(labels):,} labels ({_words(which)}; {counts.min()} to {counts.max()} a class), "
        f"{epochs} epochs, base learning rate {rate:g} per 256 images ({'given by --lr' if flags.lr else 'SimCLR'})"
    )
    result = folder.finished()
    if result is None:
        began = time.monotonic()
        names = task.train.names(chosen)
        folder.write_bytes(SAMPLES, ("\n".join(names) + "\n").encode())
        figures = _train(task, folder, labels, chosen, rate, epochs, batch_size)
        more = {"samples": len(chosen), "samples_file": SAMPLES}
        result = task.report(folder, time.monotonic() - began, **figures, **more)
    else:
        task.say("evaluated before: the figures are those of then")
    if task.is_main:
        _show(task, folder, result)
    return result


def _choose(task, labels, flags):
    """(sample numbers to train on, what decides them as settings). Collective."""
    if flags.list is None:  # an empty one is a mistake
        return choose_share(labels, flags.fraction, flags.seed), {"fraction": flags.fraction}
    if flags.fraction != 1:
        raise UserError(
            f"--list {flags.list} and --fraction {flags.fraction:g} both choose images: give one of them"
        )
    names, sha256 = read_list(flags.list)
    task.say(f"looking for {len(names):,} names of {flags.list}")
    chosen = find_listed(task.train, flags.list, names, task.rank, task.world_size)
    return chosen, {"list": os.path.basename(flags.list), "list_sha256": sha256}


def _words(which):
    """Whose choice of images it is."""
    return (
        f"the list {which['list']}" if "list" in which else "drawn by this program's seed, no published list"
    )


def usual_epochs(fraction: float) -> int:
    """SimCLR's number of epochs for a share of the labels."""
    return EPOCHS_OF_FEW if fraction < FEW else EPOCHS


def choose_share(labels: np.ndarray, fraction: float, seed: int) -> np.ndarray:
    """Sample numbers of ``fraction`` of every class, at least one: ascending int64; the same for equal arguments."""
    chosen = []
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        wanted = max(1, round(fraction * len(members)))
        chosen.append(members[permutation(len(members), seed, SHARE, label)[:wanted]])
    return np.sort(np.concatenate(chosen))


class Classifier(nn.Module):
    """A backbone with a linear classifier on its features: images (B, 3, s, s) -> logits (B, C)."""

    def __init__(self, backbone: nn.Module, num_features: int, num_classes: int, seed: int):
        super().__init__()
        self.backbone = backbone
        self.head = nn.Linear(num_features, num_classes)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            self.head.weight.normal_(0, INITIAL_STD, generator=generator)
            self.head.bias.zero_()

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.backbone(images))


class FineTuned:
    """A classifier that trains as a whole, as :func:`fit` trains it; every rank holds all of it."""

    def __init__(self, task: Task, rate: float, batch_size: int):
        self.task, self.rate, self.batch_size = task, rate * batch_size / 256, batch_size
        weights, num_classes = task.weights, len(task.train.manifest.classes)
        model = Classifier(
            weights.backbone.requires_grad_(True), weights.num_features, num_classes, task.seed
        )
        self.model = convert_sync_batchnorm(model.to(task.device, task.dtype))
        self.parameters = list(self.model.parameters())
        self.optimizer = torch.optim.SGD(self.parameters, momentum=MOMENTUM, nesterov=True)
        for p in self.parameters:  # there from the start, so that a resume finds where to load it
            self.optimizer.state[p]["momentum_buffer"] = torch.zeros_like(p)

    def update(self, batch: LabelledBatch, factor: float) -> float:
        """One step; gradients are summed over micro-batches and ranks, each sample counting 1 / global batch."""
        images, labels = batch.images, batch.labels
        self.model.train()
        loss = images.new_zeros(())
        at_once = self.task.images_at_once
        for x, y in zip(images.split(at_once), labels.split(at_once), strict=True):
            part = (
                F.cross_entropy(self._logits(x), y, ignore_index=NO_LABEL, reduction="sum") / self.batch_size
            )
            part.backward()
            loss += part.detach()
        gradients = [p.grad.flatten() for p in self.parameters if p.grad is not None]
        summed = collectives.all_reduce_(torch.cat([loss.view(1), *gradients]))
        loss, *gradients = summed.split([1, *(len(gradient) for gradient in gradients)])
        for p, gradient in zip(self.parameters, gradients, strict=True):
            p.grad = gradient.view_as(p)
        self.optimizer.param_groups[0]["lr"] = self.rate * factor
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.item()

    def _logits(self, images):
        task = self.task
        enabled = task.autocast_dtype is not None
        with torch.autocast(task.device.type, dtype=task.autocast_dtype, enabled=enabled):
            logits = self.model(images)
        return logits if logits.dtype == torch.float64 else logits.float()

    def tensors(self) -> dict[str, Tensor]:
        velocity = {
            f"velocity.{name}": self.optimizer.state[p]["momentum_buffer"]
            for name, p in self.model.named_parameters()
        }
        return {name: tensor.detach() for name, tensor in self.model.state_dict().items()} | velocity


def _train(task, folder, labels, chosen, rate, epochs, batch_size):
    store = Subset(task.train, chosen)
    images = LabelledImages(task, store, labels[chosen], batch_size)
    steps_per_epoch = images.order.steps_per_epoch
    num_steps = epochs * steps_per_epoch
    learner = FineTuned(task, rate, batch_size)
    progress = restore(folder, learner)
    if progress.step:
        task.say(f"resumed at step {progress.step:,} of {num_steps:,}")

    def end_epoch(epoch):
        task.say(f"epoch {epoch} of {epochs}")
        return {"epoch": epoch}

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
    score, undecodable = _score(task, learner.model)
    return {
        **figures_of(score),
        "undecodable": undecodable_names(progress, undecodable),
        "optimizer": "SGD, Nesterov momentum 0.9, no weight decay",
        "history": progress.history,
    }


def _score(task, model):
    """:class:`Score` of the classifier on all validation images, and this rank's undecodable ones. Collective."""
    score, undecodable = Score(1, len(task.val.manifest.classes)), []
    batches = task.evaluation_batches(task.val, undecodable)
    stream = feature_batches(model, batches, module=model, unit_norm=False, **task.extraction())
    for logits, labels, _ in stream:
        score.add(logits[None], labels)
    score.add_undecodable([image.label for image in undecodable])
    return score.over_ranks(task.device), undecodable


def _show(task, folder, result):
    settings = result["settings"]
    row = {
        "images": settings["list"] if "list" in settings else f"{settings['fraction']:g}, drawn",
        "labels": result["samples"],
        "top-1 %": result["top1"],
        f"{CONFIDENCE}% interval": result["top1_interval"],
        "top-5 %": result["top5"],
        "mean per class %": result["mean_per_class"],
    }
    notes = [
        *result_notes(result, result.get("right_per_class") or []),
        f"written to {folder.path / 'result.json'}, the images used to {folder.path / SAMPLES}",
    ]
    show(f"fine-tuning of {task.weights.path}", [row], notes)
