"""Rules that a field carries in its type: which values it may have, and whether a resumed run may change it.

    size: PositiveInt = 65536                 # Annotated[int, ABOVE_0]
    workers: Free[Count] = 4                  # ... and free at resume

tyro reads the type and passes over the rules, but for the word ``auto``; :func:`check` holds any dataclass against
them, its sections included.
"""

import dataclasses
import math
import re
import types
import typing
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar

import tyro

from caco_scale.errors import UserError

T = TypeVar("T")


@dataclass(frozen=True)
class Rule:
    """What a value must be. ``holds``: value -> bool; ``fix``: the end of the error, what to give instead."""

    holds: Callable[[Any], bool]
    fix: str


def at_most(most: float) -> Rule:
    """The rule of a greatest value."""
    return Rule(lambda x: x <= most, f"give at most {most}")


class FreeAtResume:
    """Mark of a field that changes nothing of what is computed: a resumed run may have another value."""


AUTO_WORD = "auto"
AUTO = -(2**40)  # a number that follows the set of images, before that is known (``config/fit.py``)
ABOVE_0 = Rule(lambda x: 0 < x < math.inf, "give a number above 0")
FROM_0 = Rule(lambda x: 0 <= x < math.inf, "give a number from 0 up")
UP_TO_1 = Rule(lambda x: 0 <= x <= 1, "give a number from 0 to 1")
PROBABILITY = Rule(lambda x: 0 <= x <= 1, "a probability is at most 1, at least 0")
MOMENTUM = Rule(lambda x: 0 <= x <= 1, "a momentum is at most 1, at least 0")
SEED = Rule(lambda x: 0 <= x < 2**63, "give a number from 0 up, below 2^63")
AREA = Rule(lambda x: 0 < x[0] <= x[1] <= 1, "give two shares of the area, 0 < least <= most <= 1")


def _number_or_auto(kind):
    """How tyro reads and shows an ``int`` or ``float`` that may be the word auto."""
    return tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar=f"{kind.__name__.upper()}|{AUTO_WORD}",
        instance_from_str=lambda words: AUTO if words[0] == AUTO_WORD else kind(words[0]),
        is_instance=lambda value: isinstance(value, (int, kind)),
        str_from_instance=lambda value: [AUTO_WORD if value == AUTO else str(value)],
    )


ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")
NAME = Rule(
    lambda x: _is_name(x), "no file can have this name: give names of at most 255 bytes, 4,095 in all"
)
PATH_OR_HUB = Rule(
    lambda x: not ADDRESS.match(x) or x.startswith("hf:/"),
    "give a path, or hf://USER/NAME of the Hugging Face hub; of an object store copy it first",
)
NO_ADDRESS = Rule(
    lambda x: not ADDRESS.match(x),
    "give a path: of an object store only data.shards and data.val_shards are read",
)
SHARE = Rule(
    lambda x: bool(re.fullmatch(r"(?s).+=(?=[0.]*[1-9])(\d{1,12}(\.\d{1,12})?|\.\d{1,12})", x)),
    "give ADDRESS=WEIGHT with a number above 0, as in ~/photos=0.3",
)
PAIR = Rule(lambda x: bool(re.match(r"[^\W\d]\w*=", x)), "give NAME=VALUE, as in layers=[2,2]")

INT_OR_AUTO, FLOAT_OR_AUTO = _number_or_auto(int), _number_or_auto(float)
Count = Annotated[int, FROM_0, at_most(10**15)]
PositiveInt = Annotated[int, ABOVE_0, at_most(10**15)]
Size = Annotated[int, ABOVE_0, at_most(2**31 - 1)]
Pixels = Annotated[int, ABOVE_0, at_most(8192)]
Workers = Annotated[int, FROM_0, at_most(1024)]
Seconds = Annotated[float, ABOVE_0, at_most(10**7)]
Place = Annotated[str, NO_ADDRESS, NAME]
Source = Annotated[str, PATH_OR_HUB, NAME]
Seed = Annotated[int, SEED]
Amount = Annotated[float, FROM_0, at_most(10**9)]
PositiveFloat = Annotated[float, ABOVE_0, at_most(10**9)]
Share = Annotated[float, UP_TO_1]
Probability = Annotated[float, PROBABILITY]
Momentum = Annotated[float, MOMENTUM]
AreaRange = Annotated[tuple[float, float], AREA]
Channels = Annotated[int, ABOVE_0, at_most(512)]
Bits = Annotated[int, Rule(lambda x: x in (8, 16), "give 8 or 16")]
Options = tuple[Annotated[str, PAIR], ...]
Mix = tuple[Annotated[str, SHARE], ...]
Words = tuple[str, ...]
Free = Annotated[T, FreeAtResume]


IntOrAuto = Annotated[T, INT_OR_AUTO]  # IntOrAuto[Size]: a Size, or AUTO
FloatOrAuto = Annotated[T, FLOAT_OR_AUTO]


def may_be_auto(kind: Any) -> bool:
    """Whether a field's type takes the word auto."""
    return any(mark is INT_OR_AUTO or mark is FLOAT_OR_AUTO for mark in getattr(kind, "__metadata__", ()))


def _is_name(path):
    parts = path.encode(errors="surrogateescape").split(b"/")
    return max(map(len, parts)) <= 255 and sum(map(len, parts)) + len(parts) <= 4096 and "\0" not in path


def field_types(cls: Any, prefix: str = "") -> dict[str, Any]:
    """``{"section.field": type with its rules}`` of a dataclass and of the dataclasses in it, in their order."""
    found, kinds = {}, typing.get_type_hints(cls, include_extras=True)
    for name in (f.name for f in dataclasses.fields(cls)):
        kind = kinds[name]
        if dataclasses.is_dataclass(kind):
            found |= field_types(kind, f"{prefix}{name}.")
        else:
            found[f"{prefix}{name}"] = kind
    return found


def is_free(kind: Any) -> bool:
    """Whether a field's type says :data:`Free`."""
    return FreeAtResume in getattr(kind, "__metadata__", ())


def check(instance: Any, name_of: Callable[[str], str] = str) -> None:
    """Hold every field of a dataclass against its rules.

    Args:
        name_of: a field's dotted name -> as the error calls it, for a flag ``"--{}".format``.
    Raises:
        UserError: the first field that breaks a rule, with its value and what to give.
    """
    for name, kind in field_types(type(instance)).items():
        value = instance
        for part in name.split("."):
            value = getattr(value, part)
        for rule, part in _rules(kind, value):
            if not rule.holds(part):
                shown = " ".join(map(str, value)) if isinstance(value, tuple) else str(value)
                shown = shown if len(shown) <= 100 else f"{shown[:100]}... ({len(shown):,} characters)"
                raise UserError(f"{name_of(name)} is {shown}: {rule.fix}")


def _rules(kind: Any, value: Any) -> Iterator[tuple[Rule, Any]]:
    """(rule, the value or the part of it that the rule is about) for all rules in a type; None breaks none."""
    if value is None or (may_be_auto(kind) and value == AUTO):
        return
    yield from ((rule, value) for rule in getattr(kind, "__metadata__", ()) if isinstance(rule, Rule))
    if typing.get_origin(kind) is Annotated:
        kind = typing.get_args(kind)[0]
    parts = typing.get_args(kind)
    if typing.get_origin(kind) is tuple:
        parts = parts[:1] * len(value) if parts[-1] is ... else parts
        for part, item in zip(parts, value, strict=True):
            yield from _rules(part, item)
    elif typing.get_origin(kind) in (typing.Union, types.UnionType):
        for part in parts:
            yield from _rules(part, value)
