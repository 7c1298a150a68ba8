"""Class labels of whole sets, and what may be asked of them."""

import numpy as np
from numpy.typing import NDArray

from caco_scale.data.store.base import Store
from caco_scale.data.store.subset import Relabelled
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


def with_classes_of(train: Store, val: Store, what: str) -> Store:
    """``val`` with labels that mean the same as those of ``train``; it may lack classes, but not have others.

    UserError for a class that no training image shows: its images could only be wrong.
    """
    classes, own = train.manifest.classes, val.manifest.classes
    if own == classes:
        return val
    strange = sorted(set(own) - set(classes))
    if strange:
        names = ", ".join(strange[:3]) + (", ..." if len(strange) > 3 else "")
        raise UserError(
            f"{what} needs the same classes in both sets, but {len(strange)} of the {len(own)} classes of {val.url} "
            f"are not among the {len(classes)} of {train.url} ({names}): give training images of all classes, or "
            "validation images without these"
        )
    return Relabelled(val, classes)


def lacking_classes(val: Store) -> str:
    """In words, that a validation set has no image of some of its classes; empty where it has of all."""
    absent = [
        n for n, count in zip(val.manifest.classes, val.manifest.class_counts, strict=True) if not count
    ]
    if not absent:
        return ""
    names = ", ".join(absent[:3]) + (", ..." if len(absent) > 3 else "")
    return f"no validation image of {len(absent):,} of {len(val.manifest.classes):,} classes ({names})"
