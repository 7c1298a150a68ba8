"""Class labels of whole sets, and what may be asked of them."""

import numpy as np
from numpy.typing import NDArray

from caco_scale.data.store.base import Store
from caco_scale.errors import UserError


def labels_of(store: Store, what: str) -> NDArray[np.int64]:
    """The label of every image, (n,), by its number in the set; UserError where one has none. ``what`` needs them."""
    indexes = store.concurrently(store.index, range(len(store.manifest.shards)))
    labels = np.concatenate([index.labels for index in indexes])
    num_classes = len(store.manifest.classes)
    wrong = int(((labels < 0) | (labels >= num_classes)).sum())
    if num_classes < 2:
        raise UserError(f"{store.url} has {num_classes} class: {what} needs at least 2")
    if wrong:
        raise UserError(
            f"{what} needs a class label from 0 to {num_classes - 1} on every image, but {wrong:,} of {len(labels):,} "
            f"in {store.url} have none or another: give a set built from class folders"
        )
    return labels


def check_same_classes(train: Store, val: Store, what: str) -> None:
    """Refuse two sets whose labels do not mean the same."""
    if train.manifest.classes != val.manifest.classes:
        raise UserError(
            f"{what} needs the same classes in both sets, but those of {train.url} "
            f"({len(train.manifest.classes)}) and {val.url} ({len(val.manifest.classes)}) differ: "
            "build both from trees with the same class folders"
        )
