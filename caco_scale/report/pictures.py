"""What the bank and the backbone see: nearest images of bank rows, nearest neighbours, a map of the features.

Legend: n training images looked at, m validation images, F features, D embedding, K bank rows, s pixels on a side.
"""

import contextlib
import json
import os
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from caco_scale.checkpoint.read import load_tensors
from caco_scale.data.loader import evaluation_batches
from caco_scale.data.object_store import RetryPolicy
from caco_scale.data.pixels import Pixels, picture_note
from caco_scale.data.store import open_store
from caco_scale.data.thumbnails import data_uri
from caco_scale.errors import UserError, one_line
from caco_scale.evaluate.features import extract_features
from caco_scale.flags.choices import MapMethod
from caco_scale.method.model import Encoder
from caco_scale.report.runs import Run
from caco_scale.weights.load import load_weights

NUM_NEAREST = 8
NUM_QUERIES = 8  # validation images
NUM_ROWS = {"most used": 3, "typical": 3, "least used": 2}  # bank rows shown
BLOCKS = 16  # runs of neighbouring images that a sample of a set is taken from
MEMORY_BYTES = 160 << 20  # of decoded images of a set, held at once
MAX_IMAGES = 5000
MAP_CLASSES = 10
MAP_IMAGES = 2000
RETRY_POLICY = RetryPolicy(2, 10)  # a report waits less for an object store than a training run


@dataclass(frozen=True)
class Images:
    """Images of a shard set: ids (n,), crops (n, s, s, C), labels (n,), class names, size of the whole set."""

    ids: torch.Tensor
    crops: torch.Tensor
    labels: torch.Tensor
    classes: tuple[str, ...]
    total: int

    def name(self, number: int) -> str:
        """The class of an image in words, "" where it has none."""
        label = int(self.labels[number])
        return self.classes[label] if 0 <= label < len(self.classes) else ""


@dataclass
class Pictures:
    """What the page shows of one run's images; ``notes`` says in words what cannot be shown and why."""

    notes: list[str]
    step: int = 0  # of the checkpoint
    num_train: int = 0  # images looked at, and of how many
    total_train: int = 0
    num_val: int = 0
    total_val: int = 0
    rows: list[dict] = field(default_factory=list)
    neighbours: list[dict] = field(default_factory=list)
    map: dict | None = None


def draw_pictures(
    run: Run, limit: int | None = None, arch: str | None = None, map_method: MapMethod = "auto"
) -> Pictures:
    """The :class:`Pictures` of a run's newest checkpoint; what is away or damaged is a note and no error.

    ``limit``: images looked at in each shard set, spread over it; None: as many as fit a moderate memory.
    ``arch``: of :func:`read_encoders`; ``map_method``: of :func:`embed_in_plane`.
    """
    if run.checkpoint is None:
        return Pictures(["No pictures: the run has no complete checkpoint yet."])
    try:
        encoders = read_encoders(run.checkpoint, arch if ":" in run.config.model.arch else None)
        train = read_images(run, run.config.data.shards, limit)
    except UserError as error:
        return Pictures([f"No pictures: {error}"])
    note = picture_note(Pixels(run.config.data.channels, run.config.data.bits))
    drawn = Pictures([note] if note else [], encoders.step, len(train.ids), train.total)
    drawn.rows = bank_rows(encoders, train, run.config.bank.rule)
    val = None
    try:
        if run.config.data.val_shards:
            val = read_images(run, run.config.data.val_shards, limit, "data.val_shards")
        else:
            drawn.notes.append("No neighbours of validation images: data.val_shards is empty.")
    except UserError as error:
        drawn.notes.append(f"No neighbours of validation images: {error}")
    if val is not None:
        drawn.num_val, drawn.total_val = len(val.ids), val.total
        drawn.neighbours = neighbours(encoders, train, val)
    drawn.map, note = feature_map(encoders, train if val is None else val, map_method)
    drawn.notes += [note] if note else []
    return drawn


# ----------------------------------------------------------------------------------------------------
# Data


def spread_ids(total: int, limit: int) -> np.ndarray:
    """At most ``limit`` of ``total`` sample ids, ascending: runs of neighbours, evenly spread over the set.

    Runs and not single images, because few shards are read then.
    """
    if total <= limit:
        return np.arange(total)
    blocks = min(BLOCKS, limit)
    sizes = np.diff(np.linspace(0, limit, blocks + 1).astype(int))
    starts = np.linspace(0, total, blocks, endpoint=False).astype(int)
    return np.concatenate([np.arange(start, start + size) for start, size in zip(starts, sizes, strict=True)])


def data_address(run: Run, address: str) -> str:
    """A shard set's address as seen from here: a relative one may count from where the run was started."""
    if "://" in address or os.path.isabs(address) or os.path.exists(address):
        return address
    # runs/demo was made where /here/runs/demo is now: so the start was in /here.
    path, given = run.path.absolute(), Path(run.config.run.dir)
    if not given.is_absolute() and path.parts[-len(given.parts) :] == given.parts:
        there = Path(*path.parts[: -len(given.parts)]) / address
        if there.exists():
            return str(there)
    return address


def read_images(run: Run, address: str, limit: int | None, flag: str = "data.shards") -> Images:
    """A sample of a set as :class:`Images`. ``flag``: what named it. UserError where it is away or damaged."""
    pixels = Pixels(run.config.data.channels, run.config.data.bits)
    store = open_store(
        data_address(run, address), cache_dir="none", retry_policy=RETRY_POLICY, flag=flag, pixels=pixels
    )
    size = run.config.views.size
    limit = limit or min(MAX_IMAGES, max(NUM_NEAREST, MEMORY_BYTES // (pixels.num_bytes * size**2)))
    ids = spread_ids(store.manifest.num_samples, limit)
    reading: dict[str, Any] = {
        "rank": 0,
        "world_size": 1,
        "batch_size": 64,
        "workers": 0,
        "resize": run.config.eval.resize,
    }
    try:
        batches = list(evaluation_batches(store, size, ids=ids, **reading))
    except OSError as error:
        raise UserError(f"{address}: {one_line(error)}") from error
    if not sum(len(ids) for ids, _, _ in batches):
        raise UserError(f"{address}: none of its images decodes")
    parts = [torch.cat([torch.as_tensor(part) for part in parts]) for parts in zip(*batches, strict=True)]
    return Images(*parts, store.manifest.classes, store.manifest.num_samples)


# ----------------------------------------------------------------------------------------------------
# Encoders


class Encoders:
    """Query and key encoder and the bank of a checkpoint, in fp32 on one device.

    ``normalisation``: mean and standard deviation of the images. ``rows`` (K, D) unit norm and ``assignments`` (K,)
    as they were saved; ``step``: finished steps.
    """

    def __init__(
        self,
        normalisation: tuple,
        step: int,
        query: Encoder,
        key: Encoder,
        rows: torch.Tensor,
        assignments: torch.Tensor,
    ):
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.normalisation, self.step = normalisation, step
        self.query, self.key = query.to(self.device), key.to(self.device)
        self.rows, self.assignments = rows, assignments
        self._features = {}

    def features(self, images: Images) -> torch.Tensor:
        """The query encoder's backbone features (n, F), unit norm, computed once per set of images."""
        if id(images) not in self._features:
            self._features[id(images)] = self._extract(self.query, self.query.features, images)
        return self._features[id(images)]

    def keys(self, images: Images) -> torch.Tensor:
        """The key encoder's embeddings (n, D), unit norm: what picks positives in training."""
        return self._extract(self.key, self.key, images)

    def _extract(self, module, encode, images):
        batches = zip(images.ids.split(64), images.crops.split(64), images.labels.split(64), strict=True)
        mean, std = self.normalisation
        return extract_features(encode, batches, mean=mean, std=std, device=self.device, module=module)[0]


def read_encoders(path: Path, arch: str | None = None) -> Encoders:
    """The :class:`Encoders` of a checkpoint's folder. UserError where it is damaged or not finite.

    ``arch``: a function of the user's own that builds the backbone, where one does.
    """
    query, key = (load_weights(path, which, arch=arch) for which in ("query", "key"))
    bank = load_tensors(path, ["bank.rows", "bank.assignments"])
    rows = F.normalize(bank["bank.rows"].float(), dim=1)
    sides = []
    for side in (query, key):
        assert side.projector is not None, path
        sides.append(Encoder(side.backbone, side.projector))
    return Encoders((query.mean, query.std), query.metadata["step"], *sides, rows, bank["bank.assignments"])


# ----------------------------------------------------------------------------------------------------
# Pictures


def choose_rows(assignments: torch.Tensor, rule: str) -> list[tuple[int, str]]:
    """Bank rows to show -> list of (row, words): of the most used, the middle and the least; a queue's evenly."""
    size, count = len(assignments), sum(NUM_ROWS.values())
    if rule != "caco" or not assignments.any():
        rows = np.unique(np.linspace(0, size - 1, min(count, size)).astype(int))
        return [(int(row), "") for row in rows]
    order = assignments.argsort(descending=True, stable=True).tolist()
    middle = int((assignments > 0).sum()) // 2
    starts = {"most used": 0, "typical": middle, "least used": max(0, size - NUM_ROWS["least used"])}
    chosen = {}
    for words, start in starts.items():
        for row in order[start : start + NUM_ROWS[words]]:
            chosen.setdefault(row, words)
    return list(chosen.items())


def bank_rows(encoders: Encoders, train: Images, rule: str) -> list[dict]:
    """For some bank rows the training images whose keys are nearest -> list of dicts for the page."""
    keys = encoders.keys(train)
    total = int(encoders.assignments.sum())
    shown = []
    for row, words in choose_rows(encoders.assignments, rule):
        similarities, nearest = (keys @ encoders.rows[row]).topk(min(NUM_NEAREST, len(keys)))
        count = int(encoders.assignments[row])
        note = f"{words}: {count:,} of {total:,} positives" if words else ""
        shown.append(
            {
                "title": f"row {row:,}",
                "note": note,
                "images": [
                    picture(train, int(i), f"{s:.2f}") for s, i in zip(similarities, nearest, strict=True)
                ],
            }
        )
    return shown


def neighbours(encoders: Encoders, train: Images, val: Images) -> list[dict]:
    """For some validation images their nearest training images in feature space -> list of dicts for the page."""
    train_features, features = encoders.features(train), encoders.features(val)
    shown = []
    for number in spread_over_classes(val.labels, NUM_QUERIES):
        similarities, nearest = (train_features @ features[number]).topk(min(NUM_NEAREST, len(train.ids)))
        own = int(val.labels[number])
        images = [
            picture(train, int(i), f"{s:.2f}", same=None if own < 0 else int(train.labels[i]) == own)
            for s, i in zip(similarities, nearest, strict=True)
        ]
        shown.append(
            {"query": picture(val, number, val.name(number)), "title": val.name(number), "images": images}
        )
    return shown


def spread_over_classes(labels: torch.Tensor, count: int) -> list[int]:
    """Numbers of ``count`` images: of classes evenly spread over those there are, the first image of each."""
    classes = labels.unique().tolist()
    chosen = np.unique(np.linspace(0, len(classes) - 1, min(count, len(classes))).astype(int))
    first = [int((labels == classes[c]).nonzero()[0]) for c in chosen]
    others = (number for number in range(len(labels)) if number not in first)
    return first + [number for number, _ in zip(others, range(count - len(first)), strict=False)]


def picture(images: Images, number: int, caption: str, same: bool | None = None) -> dict:
    """One image for the page. ``same``: whether it is of the class it is compared with, None if unknown."""
    return {
        "uri": data_uri(images.crops[number].numpy()),
        "alt": f"training image {int(images.ids[number])} {images.name(number)}".strip(),
        "name": images.name(number),
        "caption": caption,
        "same": same,
    }


# ----------------------------------------------------------------------------------------------------
# The map


def principal_components(rows: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Rows (m, F) on their two directions of greatest variance -> coordinates (m, 2), shares (2,) of the variance.

    Exact, in float64. A direction's sign is that of its largest component, so that equal features give equal maps.
    """
    centred = (rows - rows.mean(dim=0)).double()
    is_wide = centred.shape[1] > len(centred)
    squares = centred @ centred.T if is_wide else centred.T @ centred
    variances, directions = torch.linalg.eigh(squares)  # ascending
    directions = directions[:, -2:].flip(1)
    if is_wide:
        directions = F.normalize(centred.T @ directions, dim=0)
    largest = directions.gather(0, directions.abs().argmax(dim=0, keepdim=True))
    shares = variances[-2:].flip(0).clamp(min=0) / variances.clamp(min=0).sum().clamp(min=1e-30)
    return (centred @ (directions * largest.sign())).numpy(), shares.numpy()


def embed_in_plane(features: torch.Tensor, method: MapMethod = "auto") -> tuple[np.ndarray, str, list[str]]:
    """(coordinates (m, 2), the method in words, what the two axes are, [] where they mean nothing).

    auto: UMAP if it is installed, else t-SNE if scikit-learn is, else PCA, which needs nothing.
    """
    rows = features.numpy()
    with contextlib.suppress(ImportError):
        if method in ("auto", "umap"):
            from umap import UMAP  # ty: ignore[import-not-found]

            return UMAP(metric="cosine", random_state=0).fit_transform(rows), "UMAP", []
    with contextlib.suppress(ImportError):
        if method in ("auto", "tsne"):
            from sklearn.manifold import TSNE

            perplexity = min(30, (len(rows) - 1) / 3)
            tsne = TSNE(metric="cosine", init="random", perplexity=perplexity, random_state=0)
            return tsne.fit_transform(rows), "t-SNE", []
    places, shares = principal_components(features)
    names = ("first", "second")
    axes = [
        f"{name} component: {share:.1%} of the variance" for name, share in zip(names, shares, strict=True)
    ]
    return places, "PCA", axes


def feature_map(encoders: Encoders, images: Images, method: MapMethod = "auto") -> tuple[dict | None, str]:
    """A map of the images' features as (dict for the page or None, note or "")."""
    if len(images.ids) < 16:
        return None, f"No map of the features: {len(images.ids)} images are too few."
    keep = np.linspace(0, len(images.ids) - 1, min(MAP_IMAGES, len(images.ids))).astype(int)
    places, words, axes = embed_in_plane(encoders.features(images)[keep], method)
    labels = images.labels[keep].tolist()
    shown = [label for label, _ in Counter(x for x in labels if x >= 0).most_common(MAP_CLASSES)]
    shown.sort()
    names = [(f"--class{i}", images.classes[label]) for i, label in enumerate(shown)]
    colours = [f"--class{shown.index(label)}" if label in shown else "--other" for label in labels]
    data = [["image", "class", *(axes or ("x", "y"))]]
    for number, (x, y) in zip(keep, places, strict=True):
        data.append([int(images.ids[number]), images.name(number), f"{x:.5g}", f"{y:.5g}"])
    return {
        "svg": _scatter(places, colours, axes),
        "method": words,
        "has_axes": bool(axes),
        "count": len(keep),
        "classes": names,
        "more_classes": len({x for x in labels if x >= 0}) > len(shown),
        "data": json.dumps(data, separators=(",", ":")),
    }, ""


def _scatter(places, colours, axes):
    """Points as SVG: one path per colour, a dot being a line of length 0 with round ends.

    ``axes``: words of the axes; both have one scale then, for distances mean something.
    """
    low, high = places.min(axis=0), places.max(axis=0)
    extent = np.maximum((high - low).max() if axes else high - low, 1e-9)
    scaled = 250 + 488 * (places - (low + high) / 2) / extent
    scaled[:, 1] = 500 - scaled[:, 1]  # upwards
    paths = []
    for colour in sorted(set(colours), key=lambda name: name != "--other"):
        points = scaled[[c == colour for c in colours]]
        dots = "".join(f"M{x:.0f} {y:.0f}h0" for x, y in points)
        paths.append(f'<path d="{dots}" style="stroke: var({colour})"/>')
    box = "0 0 500 500"
    if axes:
        box = "-34 0 534 534"
        paths.append('<path class="axes" d="M0 0V500H500"/>')
        paths.append(f'<text x="250" y="525">{axes[0]}</text>')
        paths.append(f'<text x="-250" y="-14" transform="rotate(-90)">{axes[1]}</text>')
    return (
        f'<svg viewBox="{box}" class="map" role="img" aria-label="map of the features">{"".join(paths)}</svg>'
    )
