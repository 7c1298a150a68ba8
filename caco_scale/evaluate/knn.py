"""Weighted k-nearest-neighbour accuracy, exact and equal to the last digit on any number of ranks.

The protocol of Wu et al. (arXiv:1805.01978, section 3.4), which InstDisc, MoCo's demo, DINO and lightly use:
the k training images with the greatest cosine similarity s vote for their class with weight exp(s / T).

How it gets exact: the elements of unit-norm features are rounded to multiples of 2^-25 (an error of 1.5e-8 at
most). Their products are multiples of 2^-50, and every partial sum of a cosine, below 2, fits the 53 bits of
fp64: nothing is rounded, whatever the order of summation, the blocking, the device or the number of ranks.
Equal similarities are then really equal, and the lowest sample id wins.

Shapes: N training and M validation images of all ranks, n and m this rank's, F features, b a block.
"""

import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from caco_scale.data.labels import with_classes_of
from caco_scale.data.loader import evaluation_batches
from caco_scale.data.pipeline import Undecodable
from caco_scale.data.store.base import Store
from caco_scale.distributed import collectives
from caco_scale.errors import UserError
from caco_scale.evaluate.features import extract_features

GRID = 2.0**25
QUERY_ROWS = 1024  # validation images compared at once
NO_ID = torch.iinfo(torch.int64).max  # the id of a place in a candidate list that no training image fills


@dataclass
class Candidates:
    """The nearest training images so far, best first: (b, k) each; -inf and NO_ID where there are fewer."""

    similarities: Tensor
    ids: Tensor
    labels: Tensor

    @classmethod
    def none(cls, rows: int, k: int, device: torch.device) -> "Candidates":
        return cls(
            torch.full((rows, k), -torch.inf, dtype=torch.float64, device=device),
            torch.full((rows, k), NO_ID, device=device),
            torch.zeros((rows, k), dtype=torch.int64, device=device),
        )

    def merged(self, other: "Candidates", k: int) -> "Candidates":
        """The k best of two lists: by similarity, the lowest id first among equals."""
        both = [torch.cat(pair, dim=1) for pair in zip(self.packed(), other.packed(), strict=True)]
        by_id = both[1].argsort(dim=1)
        both = [part.gather(1, by_id) for part in both]
        order = both[0].argsort(dim=1, descending=True, stable=True)[:, :k]
        return Candidates(*(part.gather(1, order) for part in both))

    def packed(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.similarities, self.ids, self.labels


def on_grid(features: Tensor) -> Tensor:
    """Unit-norm rows in fp64, rounded to the grid on which cosine similarities are exact."""
    return F.normalize(features.double(), dim=1).mul_(GRID).round_().div_(GRID)


def best_columns(similarities: Tensor, k: int) -> Tensor:
    """Columns of each row's k greatest similarities (b, columns), the lowest columns where equals compete."""
    values, columns = similarities.topk(k, dim=1)
    # topk takes any of several equal values: where not all at the k-th place get in, a stable sort decides.
    ambiguous = (similarities >= values[:, -1:]).sum(1) > k
    if ambiguous.any():
        order = similarities[ambiguous].argsort(dim=1, descending=True, stable=True)
        columns[ambiguous] = order[:, :k]
    return columns


def nearest(
    queries: Tensor, train_features: Tensor, train_labels: Tensor, train_ids: Tensor, k: int, chunk: int
) -> Candidates:
    """Candidates (b, k) for fp32 queries (b, F) among this rank's training images, whose ids ascend.

    The training features may lie on another device than the queries: a chunk of them travels at a time, once.
    """
    device = queries.device
    blocks = [Candidates.none(len(block), k, device) for block in queries.split(QUERY_ROWS)]
    for start in range(0, train_features.shape[0], chunk):
        part = slice(start, start + chunk)
        chunk_features = on_grid(train_features[part].to(device)).T
        chunk_labels, chunk_ids = train_labels[part].to(device), train_ids[part].to(device)
        for number, block in enumerate(queries.split(QUERY_ROWS)):
            found = best_of(on_grid(block), chunk_features, chunk_labels, chunk_ids, k)
            blocks[number] = blocks[number].merged(found, k)
    columns = zip(*(block.packed() for block in blocks), strict=True)
    return Candidates(*(torch.cat(column) for column in columns))


def best_of(queries: Tensor, train: Tensor, labels: Tensor, ids: Tensor, k: int) -> Candidates:
    """Candidates (b, k or fewer) for queries (b, F) among training features (F, n), both of :func:`on_grid`."""
    similarities = queries @ train
    columns = best_columns(similarities, min(k, similarities.shape[1]))
    return Candidates(similarities.gather(1, columns), ids[columns], labels[columns])


def gather_candidates(
    candidates: Candidates, k: int, owner: int, group: dist.ProcessGroup | None
) -> Candidates | None:
    """The best k over all ranks' candidates, on rank ``owner``; None on the others."""
    if collectives.world_size(group) == 1:
        return candidates
    # One message: fp64 similarities travel as the int64 of the same bits.
    packed = torch.stack([candidates.similarities.view(torch.int64), candidates.ids, candidates.labels])
    is_owner = collectives.rank(group) == owner
    received = [torch.empty_like(packed) for _ in range(collectives.world_size(group))] if is_owner else []
    dist.gather(packed, received or None, group=group, group_dst=owner)
    if not is_owner:
        return None
    lists = [Candidates(part[0].view(torch.float64), part[1], part[2]) for part in received]
    return functools.reduce(lambda best, more: best.merged(more, k), lists)


def correct_votes(
    candidates: Candidates, labels: Tensor, ks: list[int], temperature: float, num_classes: int
) -> Tensor:
    """How many of the images (b,) the first k candidates classify rightly, by class: (len(ks), C) int64.

    Votes are added neighbour by neighbour, best first, so that their sums do not depend on the device's
    scheduling; of equal votes the lowest class wins.
    """
    correct = torch.zeros(len(ks), num_classes, dtype=torch.int64, device=labels.device)
    parts = (candidates.similarities, candidates.labels, labels)
    for similarities, neighbours, truth in zip(*(part.split(QUERY_ROWS) for part in parts), strict=True):
        # Relative to the best one's vote, which leaves the winner and cannot overflow.
        weights = ((similarities - similarities[:, :1]) / temperature).exp()
        votes = weights.new_zeros(len(truth), num_classes)
        for voter in range(max(ks)):
            votes.scatter_add_(1, neighbours[:, voter : voter + 1], weights[:, voter : voter + 1])
            if voter + 1 in ks:
                right = (votes.argmax(1) == truth).long()
                correct[ks.index(voter + 1)].index_add_(0, truth, right)
    return correct


def _unique(values):
    """A number or a list of them as a list without repetitions."""
    return list(dict.fromkeys(values)) if isinstance(values, (list, tuple)) else [values]


def check_sizes(sizes: Sequence[dict[str, int]], ks: Sequence[int], temperatures: Sequence[float]) -> None:
    """Refuse what cannot be evaluated; ``sizes``: of all ranks, so that every rank raises the same line."""
    total = {name: sum(part[name] for part in sizes) for name in sizes[0]}
    widths = {part["train_width"] for part in sizes if part["train"]}
    widths |= {part["val_width"] for part in sizes if part["val"]}
    if min(ks) < 1 or min(temperatures) <= 0:
        raise UserError(
            f"kNN needs k >= 1 and a temperature above 0, but got k = {ks}, temperature = {temperatures}"
        )
    if total["val"] == 0:
        of_all = f" (none of {total['missed']:,} decodes)" if total["missed"] else ""
        raise UserError(
            f"kNN has no validation images{of_all}: give a validation shard set with at least one"
        )
    if max(ks) > total["train"]:
        raise UserError(
            f"kNN with k = {max(ks)} needs as many training images, but there are {total['train']}"
        )
    if len(widths) > 1:
        raise UserError(
            f"kNN compares features of one width, but got {' and '.join(map(str, sorted(widths)))}"
        )
    if total["unlabelled"]:
        raise UserError(
            f"kNN needs a class label from 0 to C - 1 on every image, but {total['unlabelled']} of "
            f"{total['train'] + total['val']} have none or another: give shard sets built from class folders"
        )
    if total["not_finite"]:
        raise UserError(
            f"kNN: the features of {total['not_finite']} of {total['train'] + total['val']} images are not "
            "finite, so the encoder's weights or buffers are not either: evaluate an earlier checkpoint"
        )


def _sizes(train_features, train_labels, features, labels, missed, num_classes):
    return {
        "train": len(train_features),
        "val": len(features),
        "train_width": train_features.shape[1],
        "val_width": features.shape[1],
        "unlabelled": sum(int(((y < 0) | (y >= num_classes)).sum()) for y in (train_labels, labels, missed)),
        "missed": len(missed),
        "not_finite": sum(int((~torch.isfinite(x).all(1)).sum()) for x in (train_features, features)),
    }


@dataclass(frozen=True)
class Counts:
    """What a kNN classifier gets right over all ranks: ``right`` {(k, temperature): (C,) by class}, ``images`` (C,)."""

    right: dict[tuple[int, float], Tensor]
    images: Tensor

    def top1(self, k: int, temperature: float) -> float:
        """Accuracy in percent."""
        return 100 * int(self.right[k, temperature].sum()) / int(self.images.sum())


def knn_accuracy(
    train_features: Tensor,
    train_labels: Tensor,
    features: Tensor,
    labels: Tensor,
    *,
    k: int | Sequence[int] = 20,
    temperature: float | Sequence[float] = 0.2,
    **how: Any,
) -> Any:
    """:func:`knn_counts` as top-1 in percent; of a list of k or of temperatures a dict (k, temperature) -> percent."""
    images = train_features, train_labels, features, labels
    return _percent(
        knn_counts(*images, k=_unique(k), temperature=_unique(temperature), **how), k, temperature
    )


def _percent(counts, k, temperature):
    if isinstance(k, (list, tuple)) or isinstance(temperature, (list, tuple)):
        return {pair: counts.top1(*pair) for pair in counts.right}
    return counts.top1(k, temperature)


@torch.no_grad()
def knn_counts(
    train_features: Tensor,
    train_labels: Tensor,
    features: Tensor,
    labels: Tensor,
    *,
    k: Sequence[int],
    temperature: Sequence[float],
    num_classes: int,
    train_ids: Tensor | None = None,
    missed_labels: Tensor | None = None,
    group: dist.ProcessGroup | None = None,
    chunk: int = 8192,
    device: torch.device | str | None = None,
) -> Counts:
    """What a weighted kNN classifier gets right over all ranks' images, the same on every rank.

    Args:
        train_features, train_labels: this rank's part, (n, F) and (n,); uneven or empty too. Rows are
            normalised here; a row of zeros has similarity 0 to everything.
        features, labels: this rank's part of the images to classify, (m, F) and (m,).
        train_ids: (n,) ids over all ranks, which settle ties; None: positions in rank order.
        missed_labels: of this rank's images to classify that have no features; they count as wrong.
        chunk: training images compared at once (memory: 1,024 x ``chunk`` fp64 similarities).
        device: where similarities are computed (with NCCL a GPU); None: where ``features`` lie.

    Crosses ranks: every rank's validation features go to all (one rank's at a time), k candidates an image
    come back; never training features, never N x M similarities.

    Raises:
        UserError: on every rank, for k above N, no validation images, missing labels, features not finite.
    """
    ks, temperatures = list(k), list(temperature)
    device = features.device if device is None else torch.device(device)
    missed = labels[:0] if missed_labels is None else missed_labels
    sizes = collectives.gather_objects(
        _sizes(train_features, train_labels, features, labels, missed, num_classes), group
    )
    check_sizes(sizes, ks, temperatures)
    if train_ids is None:
        first = sum(part["train"] for part in sizes[: collectives.rank(group)])
        train_ids = torch.arange(first, first + len(train_features))
    train = _ascending(train_features, train_labels, train_ids)
    mine = []
    for owner, part in enumerate(sizes):
        if part["val"] == 0:
            continue
        queries = _broadcast_features(features, (part["val"], part["val_width"]), owner, device, group)
        found = gather_candidates(nearest(queries, *train, max(ks), chunk), max(ks), owner, group)
        if found is not None:
            mine.append((found, labels.to(device)))
    truth = torch.cat([labels.cpu(), missed.cpu()])
    return tally(mine, truth, ks, temperatures, num_classes, device, group)


def tally(
    found: Sequence[tuple[Candidates, Tensor]],
    truth: Tensor,
    ks: list[int],
    temperatures: Sequence[float],
    num_classes: int,
    device: torch.device,
    group: dist.ProcessGroup | None = None,
) -> Counts:
    """The votes of this rank's images, added up over all ranks.

    Args:
        found: candidates of some images, and these images' labels.
        truth: labels of all images of this rank, those without features included, (m,).
    """
    counts = torch.zeros(1 + len(temperatures) * len(ks), num_classes, dtype=torch.int64, device=device)
    counts[0] = truth.cpu().bincount(minlength=num_classes)
    correct = counts[1:].view(len(temperatures), len(ks), num_classes)
    for candidates, labels in found:
        for row, t in enumerate(temperatures):
            correct[row] += correct_votes(candidates, labels, ks, t, num_classes)
    images, *right = collectives.all_reduce_(counts, group=group).cpu()
    by_pair = dict(zip(itertools.product(temperatures, ks), right, strict=True))
    return Counts({(k, t): by_pair[t, k] for k in ks for t in temperatures}, images)


def _ascending(features, labels, ids):
    """The training images in the order of their ids, which :func:`nearest` relies on."""
    if (ids.diff() > 0).all():
        return features, labels, ids
    order = ids.argsort()
    return tuple(part[order.to(part.device)] for part in (features, labels, ids))


def _broadcast_features(features, shape, owner, device, group):
    """Rank ``owner``'s validation features on every rank, fp32 on ``device``."""
    if owner == collectives.rank(group):
        features = features.to(device, torch.float32).contiguous()
    else:
        features = torch.empty(shape, device=device)
    if collectives.world_size(group) > 1:
        dist.broadcast(features, group=group, group_src=owner)
    return features


@dataclass(frozen=True)
class Measured:
    """:class:`Counts` by kind of feature; undecodable images of ``train`` vote nowhere, of ``val`` they are wrong."""

    counts: dict[str, Counts]
    undecodable: dict[str, list[Undecodable]]


def measure_knn(
    encode: Callable,
    train_store: Store,
    val_store: Store,
    *,
    size: int,
    resize: int = 0,
    k: Sequence[int],
    temperature: Sequence[float],
    device: torch.device | str = "cpu",
    rank: int = 0,
    world_size: int = 1,
    workers: int = 0,
    batch_size: int = 256,
    group: dist.ProcessGroup | None = None,
    names: Sequence[str] = ("features",),
    **how: Any,
) -> Measured:
    """kNN of ``encode``'s features: training against validation shard set.

    Images are ``centre_crop``'s, without augmentation; ``encode=pixels`` gives the raw images' figure. Every rank calls
    it with its ``rank`` and gets the same numbers; training state is left alone.

    Args:
        names: of the kinds of features that ``encode`` gives in one pass; with one it may give a tensor.
        how: ``mean``, ``std`` and the other settings of :func:`extract_features`.
    UserError: validation classes that the training set lacks, and as :func:`knn_counts`.
    """
    val_store = with_classes_of(train_store, val_store, "kNN")
    undecodable: dict[str, list[Undecodable]] = {"train": [], "val": []}

    def extract(store, which):
        batches = evaluation_batches(
            store,
            size,
            rank=rank,
            world_size=world_size,
            batch_size=batch_size,
            workers=workers,
            resize=resize,
            undecodable=undecodable[which],
        )
        return extract_features(encode, batches, device=device, names=names, **how)

    train_features, train_labels, train_ids = extract(train_store, "train")
    features, labels, _ = extract(val_store, "val")
    counts = {
        name: knn_counts(
            train_features[name],
            train_labels,
            features[name],
            labels,
            k=k,
            temperature=temperature,
            num_classes=len(val_store.manifest.classes),
            train_ids=train_ids,
            missed_labels=torch.tensor([image.label for image in undecodable["val"]], dtype=torch.int64),
            group=group,
            device=device,
        )
        for name in names
    }
    parts = collectives.gather_objects(undecodable, group)
    everywhere = {which: sorted(image for part in parts for image in part[which]) for which in undecodable}
    return Measured(counts, everywhere)


def evaluate_knn(
    encode: Callable,
    train_store: Store,
    val_store: Store,
    *,
    k: int | Sequence[int] = 20,
    temperature: float | Sequence[float] = 0.2,
    names: Sequence[str] | None = None,
    **how: Any,
) -> Any:
    """:func:`measure_knn` as top-1 in percent, in the form of :func:`knn_accuracy`; with ``names`` a dict of them."""
    options: dict[str, Any] = {"k": _unique(k), "temperature": _unique(temperature), **how}
    options |= {"names": names} if names else {}
    counts = measure_knn(encode, train_store, val_store, **options).counts
    percent = {name: _percent(found, k, temperature) for name, found in counts.items()}
    return percent if names else percent["features"]
