"""Rules in a field's type: what they refuse, wherever in the type they stand."""

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Annotated

import pytest

from caco_scale.errors import UserError
from caco_scale.flags import rules
from caco_scale.flags.rules import AreaRange, Count, Free, PositiveFloat, PositiveInt, Probability


@dataclass(frozen=True)
class Section:
    rate: Free[PositiveFloat] = 1.0
    name: Free[str] = ""


@dataclass(frozen=True)
class Settings:
    gpus: Count = 0
    seconds: PositiveFloat | None = None
    area: AreaRange = (0.2, 1.0)
    both: tuple[Probability, Probability] = (0.0, 1.0)
    several: tuple[PositiveInt, ...] = ()
    section: Section = field(default_factory=Section)


def test_values_within_their_rules_pass():
    rules.check(Settings())
    rules.check(Settings(gpus=8, seconds=0.1, several=(1, 2), both=(0.5, 0.5)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gpus": -1}, "gpus is -1: give a number from 0 up"),
        ({"seconds": 0.0}, "seconds is 0.0: give a number above 0"),
        ({"seconds": math.nan}, "seconds is nan"),
        ({"seconds": math.inf}, "seconds is inf"),
        ({"area": (0.9, 0.2)}, "area is 0.9 0.2: give two shares"),
        ({"both": (0.0, 1.5)}, "both is 0.0 1.5: a probability"),
        ({"several": (3, 0)}, "several is 3 0: give a number above 0"),
        ({"section": Section(rate=0)}, "section.rate is 0: give a number above 0"),
    ],
)
def test_a_value_against_its_rule_is_an_error_with_the_value(changes, message):
    with pytest.raises(UserError, match=f"^{message}"):
        rules.check(dataclasses.replace(Settings(), **changes))


def test_a_flag_is_called_as_it_is_typed():
    with pytest.raises(UserError, match=r"^--gpus is -1"):
        rules.check(Settings(gpus=-1), "--{}".format)


def test_what_a_resume_may_change_is_said_by_the_type():
    free = [name for name, kind in rules.field_types(Settings).items() if rules.is_free(kind)]
    assert free == ["section.rate", "section.name"]
    assert not rules.is_free(Annotated[int, rules.FROM_0])
    assert not rules.is_free(int)
