"""What ``values.json`` of a checkpoint may say: a type and a range for every field that this program reads."""

import math
import re
import reprlib
from collections.abc import Callable, Mapping
from typing import Any

from caco_scale.errors import UserError

MOST = 2**63 - 1  # of a whole number
FILE = re.compile(r"__\d+_\d+\.distcp|\.metadata")


def _whole(value, least=0):
    return type(value) is int and least <= value <= MOST


def _amount(value):
    return type(value) in (int, float) and 0 <= value < math.inf


def _number(value):
    return type(value) in (int, float)  # a figure of a diverged run may be NaN


def _text(value):
    return isinstance(value, str)


def _table(value, holds, keys=_text):
    return isinstance(value, dict) and all(keys(k) and holds(v) for k, v in value.items())


def _shape(value):
    return isinstance(value, list) and all(map(_whole, value))


def _accuracies(value):
    """[[step or "pixels", percent], ...]."""
    return isinstance(value, list) and all(
        isinstance(pair, list) and len(pair) == 2 and (_text(pair[0]) or _whole(pair[0])) and _amount(pair[1])
        for pair in value
    )


FIELDS: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "step": (_whole, "a number of steps"),
    "torch": (_text, "a version"),
    "world_size": (lambda value: _whole(value, 1), "a number of processes"),
    "shapes": (lambda value: _table(value, _shape), "a shape for each tensor"),
    "files": (
        lambda value: _table(value, _whole, lambda name: bool(FILE.fullmatch(name))),
        "the files' sizes",
    ),
}
OF_A_RUN: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "end": (_whole, "a number of steps"),
    "branched_from": (lambda value: value is None or _text(value), "a path or null"),
    "epoch": (_amount, "a number from 0 up"),
    "config": (lambda value: isinstance(value, dict), "a configuration"),
    "fingerprint": (_text, "a word"),
    "num_samples": (_whole, "a number of images"),
    "bank_pointer": (_whole, "a row of the bank"),
    "skipped": (_whole, "a number of steps"),
    "skipped_in_a_row": (_whole, "a number of steps"),
    "corrupt": (lambda value: _table(value, _text), "a reason for each image"),
    "last_epoch_bank": (lambda value: value is None or _table(value, _number), "figures or null"),
    "knn": (_accuracies, "pairs of a step and a percentage"),
    "seconds": (lambda value: _table(value, _amount), "seconds by name"),
}


OF_SOME_RUNS: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "weights_sha256": (_text, "a word"),  # of model.weights
}


def check_values(values: Mapping[str, Any]) -> None:
    """ValueError where a known field is not what it must be; those of a run may be absent."""
    for name, (holds, what) in {**FIELDS, **OF_A_RUN, **OF_SOME_RUNS}.items():
        if name not in values:
            if name in FIELDS:
                raise ValueError(f"it has no {name}")
        elif not holds(values[name]):
            raise ValueError(f"{name} is {reprlib.repr(values[name])}, not {what}")


def check_run(values: Mapping[str, Any], path: object) -> None:
    """UserError where a checkpoint is none of a run that can be continued: it lacks what only runs save."""
    missing = [name for name in OF_A_RUN if name not in values]
    if missing:
        raise UserError(
            f"{path} is no checkpoint of a run, its values.json has no {', '.join(missing)}: give another"
        )
