"""The command ``evaluate linear``: a linear classifier on frozen features.

As the paper does (arXiv:2203.14370, section 4; the authors' linear.py): 100 epochs of random resized crops and flips,
batch 4,096, LARS that scales the bias too, momentum 0.9, no weight decay, cosine, the encoder in eval mode. With
``--fast``: features of centre crops are computed once, and classifiers with many learning rates are trained on them
side by side, as DINOv2 does. Which rate counts is decided on a tenth of the training images that a second set of
classifiers never sees, so that no validation label chooses anything.

Shapes: H heads, B this rank's batch, F features.
"""

import time

import numpy as np
import torch

from caco_scale.data.order import permutation
from caco_scale.distributed import collectives
from caco_scale.errors import UserError
from caco_scale.evaluate.blocks import features_of, remove_features
from caco_scale.evaluate.heads import LinearHeads, growth, score_features
from caco_scale.evaluate.loop import NO_LABEL, LabelledImages, check_batch, fit, restore
from caco_scale.evaluate.results import CONFIDENCE, interval, show
from caco_scale.evaluate.setting import build_setting
from caco_scale.evaluate.stores import labels_of

AUTHORS_LR = 0.025  # per 256 images, of the command that the authors publish; their parser's default is 0.1
FAST_LRS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)
EPOCHS, BATCH_SIZE = 100, 4096
FAST_EPOCHS, FAST_BATCH_SIZE = 100, 1024
HELD_OUT, BATCHES = 83, 89  # keep these random numbers apart from others
LEAST_GROWTH = 5


def run(flags):
    """``evaluate linear`` -> the result's content."""
    setting = build_setting(flags)
    batch_size = flags.batch_size or (FAST_BATCH_SIZE if flags.fast else BATCH_SIZE)
    epochs = flags.epochs or (FAST_EPOCHS if flags.fast else EPOCHS)
    rates, source = _rates(flags)
    check_batch(batch_size, setting.train.manifest.num_samples, setting.world_size)
    labels = labels_of(setting.train, "linear evaluation")
    labels_of(setting.val, "linear evaluation")
    name = "linear-fast" if flags.fast else "linear"
    settings = {"lr": rates, "epochs": epochs, "batch_size": batch_size, "seed": flags.seed}
    folder = setting.folder(flags, name, settings)
    setting.say(f"base learning rate {', '.join(f'{rate:g}' for rate in rates)} per 256 images: {source}")
    result = folder.finished()
    if result is None:
        began = time.monotonic()
        train = _fast if flags.fast else _long
        figures = train(setting, folder, labels, rates, epochs, batch_size)
        result = setting.report(folder, time.monotonic() - began, lr_source=source, **figures)
        remove_features(folder)
    else:
        setting.say("evaluated before: the figures are those of then")
    if setting.is_main:
        _show(setting, folder, result)
    return result


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


def _build_heads(setting, rates, batch_size, optimizer):
    """Heads in fp64 on a CPU, where rounding then hides no difference between numbers of processes; else fp32."""
    return LinearHeads(
        [rate * batch_size / 256 for rate in rates],
        len(setting.train.manifest.classes),
        setting.weights.num_features,
        optimizer,
        device=setting.device,
        dtype=torch.float64 if setting.device.type == "cpu" else torch.float32,
        seed=setting.seed,
    )


# ----------------------------------------------------------------------------------------------------------
# As the paper does


class FrozenEncoder:
    """One head on the features of a frozen encoder, as :func:`fit` trains it."""

    def __init__(self, setting, heads, batch_size):
        self.setting, self.heads, self.batch_size = setting, heads, batch_size

    @torch.no_grad()
    def update(self, batch, factor):
        images, labels = batch
        known = labels != NO_LABEL
        features = self._features(images[known])
        shares = torch.full(
            (1, len(features)), 1 / self.batch_size, device=features.device, dtype=features.dtype
        )
        return self.heads.step(features, labels[known], shares, factor).item()

    def tensors(self):
        return self.heads.tensors()

    def _features(self, images):
        setting = self.setting
        enabled = setting.autocast_dtype is not None
        with torch.autocast(setting.device.type, dtype=setting.autocast_dtype, enabled=enabled):
            parts = [setting.weights.backbone(part) for part in images.split(setting.images_at_once)]
        return torch.cat(parts).to(self.heads.weight.dtype)


def _long(setting, folder, labels, rates, epochs, batch_size):
    images = LabelledImages(setting, setting.train, labels, batch_size)
    steps_per_epoch = images.order.steps_per_epoch
    num_steps = epochs * steps_per_epoch
    heads = _build_heads(setting, rates, batch_size, "lars")
    reach = growth(heads.rates, num_steps)[0]
    if reach < LEAST_GROWTH:
        setting.say(
            f"warning: in {num_steps:,} steps LARS lets the classifier grow by e^{reach:.1f} at most, too little to "
            f"learn from weights of 0.01: raise --lr about {LEAST_GROWTH / reach:.0f} times, or lower --batch_size"
        )
    val_features, val_labels, _ = features_of(setting, setting.val, folder, "val")
    learner = FrozenEncoder(setting, heads, batch_size)
    progress = restore(folder, learner)
    if progress.step:
        setting.say(f"resumed at step {progress.step:,} of {num_steps:,}")

    def end_epoch(epoch):
        score = score_features(heads, val_features, val_labels, len(setting.val.manifest.classes)).percent()
        setting.say(f"epoch {epoch} of {epochs}: top-1 {score['top1']:.2f}%, top-5 {score['top5']:.2f}%")
        return {"epoch": epoch, **score}

    fit(
        learner,
        lambda start: images.batches(start, num_steps),
        progress,
        num_steps=num_steps,
        steps_per_epoch=steps_per_epoch,
        folder=folder,
        end_epoch=end_epoch,
    )
    last = progress.history[-1]
    return {
        **with_intervals(last),
        "lr": rates[0],
        "optimizer": "LARS, bias scaled too",
        "history": progress.history,
    }


def with_intervals(score):
    """A score with bootstrap intervals of top-1 and top-5."""
    kept = {name: score[name] for name in ("top1", "top5", "mean_per_class", "images")}
    return {
        **kept,
        "top1_interval": interval(score["right"], score["images"]),
        "top5_interval": interval(score["right_of_5"], score["images"]),
        "confidence": CONFIDENCE,
    }


# ----------------------------------------------------------------------------------------------------------
# The fast way


class StoredFeatures:
    """Twice H heads on stored features: the second H see all samples, the first all but those held out.

    ``features`` (n, F), ``labels``, ``ids`` (n,): this rank's; ``held_out`` (N,) bool: by sample number.
    """

    def __init__(self, heads, features, labels, ids, held_out):
        self.heads, self.features, self.labels, self.held_out = heads, features, labels, held_out
        self.place = np.full(len(held_out), -1)  # of a sample among this rank's features
        self.place[ids.numpy()] = np.arange(len(ids))
        self.diverged = set()

    @torch.no_grad()
    def update(self, ids, factor):
        """``ids``: sample numbers of the global batch, the same on every rank."""
        device, dtype = self.heads.weight.device, self.heads.weight.dtype
        mine = ids[self.place[ids] >= 0]
        rows = torch.from_numpy(self.place[mine])
        half = len(self.heads.rates) // 2
        share = torch.empty(2, len(mine), dtype=dtype)
        share[0] = torch.from_numpy(~self.held_out[mine]) / max(1, int((~self.held_out[ids]).sum()))
        share[1] = 1 / len(ids)
        losses = self.heads.step(
            self.features[rows].to(device, dtype),
            self.labels[rows].to(device),
            share.repeat_interleave(half, dim=0).to(device),
            factor,
        )
        losses = losses[half:]
        finite = losses[losses.isfinite()]
        return finite.min().item() if len(finite) else float("nan")

    def tensors(self):
        return self.heads.tensors()


def feature_order(ids, batch_size, seed):
    """Global batches of the stored samples ``ids`` (n,): function of the first step -> endless iterator of (N,)."""
    steps_per_epoch = len(ids) // batch_size

    def batches(start, end):
        for step in range(start, end):
            epoch, position = divmod(step, steps_per_epoch)
            order = permutation(len(ids), seed, epoch, BATCHES)
            yield ids[order[position * batch_size : (position + 1) * batch_size]]

    return batches, steps_per_epoch


def choose_held_out(num_samples, seed):
    """A tenth of the samples, at least one: (n,) bool by sample number."""
    held_out = np.zeros(num_samples, bool)
    held_out[permutation(num_samples, seed, HELD_OUT)[: max(1, num_samples // 10)]] = True
    return held_out


def _fast(setting, folder, labels, rates, epochs, batch_size):
    train, val = (
        features_of(setting, store, folder, name)
        for name, store in (("train", setting.train), ("val", setting.val))
    )
    setting.say(
        f"features of {setting.train.manifest.num_samples:,} and {setting.val.manifest.num_samples:,} images"
    )
    heads = _build_heads(setting, rates * 2, batch_size, "sgd")
    figures = sweep(heads, train, val, epochs, batch_size, setting.seed, folder)
    rows = [{"lr": rate, **row} for rate, row in zip(rates, figures, strict=True)]
    best = max(rows, key=lambda row: row["held_out_top1"])
    best_on_val = max(rows, key=lambda row: row["top1"])
    if not np.isfinite(best["top1"]):
        raise UserError(
            f"every classifier of the sweep diverged: give lower rates with --lr than {min(rates):g}"
        )
    return {
        **with_intervals(best),
        "lr": best["lr"],
        "optimizer": "SGD, momentum 0.9, no weight decay",
        "chosen_by": "top-1 on a tenth of the training images, by classifiers trained without them",
        "best_on_validation": {"lr": best_on_val["lr"], "top1": best_on_val["top1"]},
        "results": rows,
    }


def sweep(heads, train, val, epochs, batch_size, seed, folder):
    """Train twice H heads on stored features -> H records: scores of the second H, and held-out top-1 of the first.

    Args:
        heads: :class:`LinearHeads` of 2H rates, the same H twice.
        train, val: (features (n, F), labels (n,), sample numbers (n,)) of this rank, scaled here in place.
    Collective: sums over the ranks; sample numbers of all ranks go to all.
    """
    device, num_classes = heads.weight.device, heads.bias.shape[1]
    ids = np.sort(np.concatenate(collectives.gather_objects(train[2].numpy())))
    check_batch(batch_size, len(ids), 1)
    scale(train[0], val[0], device)
    held_out = choose_held_out(int(ids[-1]) + 1, seed)
    learner = StoredFeatures(heads, *train, held_out)
    batches, steps_per_epoch = feature_order(ids, batch_size, seed)
    num_steps = epochs * steps_per_epoch
    fit(
        learner,
        lambda start: batches(start, num_steps),
        restore(folder, learner),
        num_steps=num_steps,
        steps_per_epoch=steps_per_epoch,
        folder=folder,
        end_epoch=lambda epoch: {"epoch": epoch},
    )
    unseen = torch.from_numpy(held_out[train[2].numpy()])
    held_out_score = score_features(heads, train[0][unseen], train[1][unseen], num_classes)
    val_score = score_features(heads, val[0], val[1], num_classes)
    finite, half = heads.finite(), len(heads.rates) // 2
    records = []
    for head in range(half):
        record = val_score.percent(half + head)
        record["held_out_top1"] = held_out_score.percent(head)["top1"]
        if not (finite[head] and finite[half + head]):
            record |= dict.fromkeys(("top1", "top5", "mean_per_class", "held_out_top1"), float("-inf"))
        records.append(record)
    return records


def scale(train, val, device):
    """Divide features by one number, the root of their mean square over all ranks, in place.

    It leaves a linear classifier what it is, and lets one list of learning rates serve every encoder.
    """
    total = torch.stack(
        [train.double().square().sum(), torch.tensor(float(train.numel()), dtype=torch.float64)]
    )
    squares, count = collectives.all_reduce_(total.to(device)).tolist()
    root = (squares / max(count, 1)) ** 0.5
    if root > 0:
        train.div_(root)
        val.div_(root)


# ----------------------------------------------------------------------------------------------------------


def _show(setting, folder, result):
    protocol = "fast linear" if "results" in result else "linear (the paper's protocol)"
    rows = result.get("results") or [result]
    table = [
        {
            "lr / 256": f"{row['lr']:g}"
            + (" <- chosen" if "results" in result and row["lr"] == result["lr"] else ""),
            **({"held-out top-1 %": row["held_out_top1"]} if "results" in result else {}),
            "top-1 %": row["top1"],
            "top-5 %": row["top5"],
            "mean per class %": row["mean_per_class"],
        }
        for row in rows
    ]
    notes = [
        f"{CONFIDENCE}% intervals: " + ", ".join(_interval_text(result, name) for name in ("top1", "top5")),
        f"base learning rate {result['lr']:g} per 256 images: {result['lr_source']}",
    ]
    if "results" in result:
        best = result["best_on_validation"]
        notes.append(
            f"chosen by {result['chosen_by']} (the best on the validation images: lr {best['lr']:g}, "
            f"{best['top1']:.2f}%)"
        )
    show(
        f"{protocol} evaluation of {setting.weights.path}",
        table,
        [*notes, f"written to {folder.path / 'result.json'}"],
    )


def _interval_text(result, name):
    low, high = result[f"{name}_interval"]
    return f"{name} {result[name]:.2f}% ({low:.2f} to {high:.2f})"
