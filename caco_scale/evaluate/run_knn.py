"""The command ``evaluate knn``: k nearest neighbours of features and embeddings, all k and temperatures in one pass."""

import time
from typing import Any

from caco_scale.errors import UserError
from caco_scale.evaluate.knn import measure_knn
from caco_scale.evaluate.results import CONFIDENCE, interval, result_notes, show
from caco_scale.evaluate.task import build_task
from caco_scale.weights.build import digest

USUAL_NEIGHBOURS = [10, 20, 100, 200]


def run(flags: Any) -> dict[str, Any]:
    """``evaluate knn``: both kinds of features, every k, every temperature in one pass -> the result's content."""
    task = build_task(flags)
    ks = _neighbours(flags.k, task)
    names, projector = ("features",), None
    if task.weights.projector is None:
        task.say("no embeddings: the source has no projector of ours")
    else:
        names, projector = ("features", "embeddings"), digest(task.weights.projector)
    settings = {"k": ks, "temperature": flags.temperature, "projector": projector}
    folder = task.folder(flags, "knn", settings)
    result = folder.finished()
    if result is None:
        result = _evaluate(task, folder, ks, flags.temperature, names)
    else:
        task.say("evaluated before: the figures are those of then")
    if task.is_main:
        show(
            f"kNN top-1 of {task.weights.path}",
            _table(result),
            [*_notes(result), f"written to {folder.path / 'result.json'}"],
        )
    return result


def _neighbours(asked, task):
    """The numbers of neighbours: those asked for, else the usual ones that the training set is large enough for."""
    images = task.train.manifest.num_samples
    if asked and max(asked) > images:
        raise UserError(
            f"--k {max(asked)} needs as many training images, but there are {images}: give at most {images}"
        )
    if asked:
        return asked
    left_out = [k for k in USUAL_NEIGHBOURS if k > images]
    if left_out:
        task.say(f"left out: k = {', '.join(map(str, left_out))}, more than the {images} training images")
    return [k for k in USUAL_NEIGHBOURS if k <= images] or [images]


def _evaluate(task, folder, ks, temperatures, names):
    began = time.monotonic()
    backbone, projector = task.weights.backbone, task.weights.projector

    def encode(images):
        features = backbone(images)
        return (features, projector(features)) if projector is not None else (features,)

    measured = measure_knn(
        encode,
        task.train,
        task.val,
        size=task.size,
        resize=task.resize,
        k=ks,
        temperature=temperatures,
        rank=task.rank,
        world_size=task.world_size,
        workers=task.workers,
        batch_size=task.images_at_once,
        names=names,
        **task.extraction(),
    )
    images = next(iter(measured.counts.values())).images
    total, there = int(images.sum()), images > 0
    rows = [
        {
            "feature": name,
            "k": k,
            "temperature": temperature,
            "top1": counts.top1(k, temperature),
            "interval": interval(int(right.sum()), total),
            "mean_per_class": 100 * (right[there].double() / images[there]).mean().item(),
            "right_per_class": right.tolist(),
        }
        for name, counts in measured.counts.items()
        for (k, temperature), right in counts.right.items()
    ]
    undecodable = {
        which: [(image.name, image.error) for image in found] for which, found in measured.undecodable.items()
    }
    return task.report(
        folder,
        time.monotonic() - began,
        undecodable,
        results=rows,
        images=total,
        images_per_class=images.tolist(),
    )


def _notes(result):
    best = max(result["results"], key=lambda row: row["top1"])
    notes = result_notes(result, best.get("right_per_class") or [])
    which = f"{best['feature']}, k = {best['k']}, T = {best['temperature']:g}"
    return [f"{note} ({which})" if note.startswith("worst") else note for note in notes]


def _table(result):
    return [
        {
            "feature": row["feature"],
            "k": row["k"],
            "T": f"{row['temperature']:g}",
            "top-1 %": row["top1"],
            f"{CONFIDENCE}% interval": row["interval"],
            "mean per class %": row.get("mean_per_class"),
        }
        for row in result["results"]
    ]
