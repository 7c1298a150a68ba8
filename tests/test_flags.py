"""The one flag style: a command line to dataclasses, and mistakes in it."""

import subprocess
import sys
from dataclasses import dataclass, field
from typing import Annotated, Literal

import pytest
import tyro
from launch import environment

from caco_scale.errors import UserError
from caco_scale.flags.read import flag_types, read, read_both, shown


@dataclass(frozen=True)
class Section:
    short_side: int = 3
    """Pixels."""
    scale: tuple[float, float] = (0.0, 1.0)
    """Least, most."""
    on: bool = False
    """Switch."""


@dataclass(frozen=True)
class Command:
    """Do something."""

    place: tyro.conf.Positional[str]
    """Where."""
    to: str
    """File."""
    k: Annotated[tuple[int, ...], shown("N [N ...]")] = ()
    """Neighbours (default: 10 20)."""
    kind: Literal["query", "key"] = "query"
    """Encoder."""
    step: Annotated[int | None, shown("N")] = None
    """Checkpoint (default: the newest)."""
    dry_run: bool = False
    """Only say it."""
    hidden: tyro.conf.Suppress[str] = "no flag"
    part: Section = field(default_factory=Section)


def words(text):
    return read(Command, text.split(), "program")


def test_every_spelling_of_a_flag_is_the_same():
    wanted = Command(
        "here", "w", k=(1, 2), dry_run=True, part=Section(short_side=5, scale=(0.1, 0.2), on=True)
    )
    for text in (
        "here --to w --k 1 2 --dry-run --part.short-side 5 --part.scale .1 .2 --part.on true",
        "--dry_run here --to=w --part.short_side=5 --part.scale=.1 .2 --part.on --k 1 2",
        "--part.on=True --to w --dry-run TRUE --part.short-side 4 --part.short_side 5 here --k 1 2 --part.scale .1 .2",
    ):
        assert words(text) == wanted
    assert words("here --to w --step 7").step == 7
    assert read(Section, ["--short-side", "9"], "program", default=Section(on=True)) == Section(9, on=True)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("here --tto w", r"unknown flag --tto \(did you mean --to\?\): program --help lists them all"),
        ("here --part.shrt_side 3", r"did you mean --part.short_side\?"),
        ("here --hidden x", "unknown flag --hidden"),
        ("here --t w", "unknown flag --t"),
        ("here --to w --step x", "--step is 'x', which is not int: give a whole number"),
        ("here --to w --step 1.5", "--step is 1.5, which is not int"),
        ("here --to w --kind both", "--kind is 'both': give one of query, key"),
        ("here --to w --k 1 x", "--k is 1 'x': give whole numbers"),
        ("here --to w --part.scale 1", "--part.scale is 1: give 2 numbers"),
        ("here --to w --part.scale 1 x", "--part.scale is 1 'x': give 2 numbers"),
        ("here --to", "--to has no value"),
        ("here --to --dry-run", "--to has no value"),
        ("here", "give --to: program --help"),
        ("--to w", "give PLACE: program --help"),
        ("", "give --to and PLACE"),
        ("here there --to w", "unknown argument there"),
        ("here --to w -x", "unknown argument -x"),
        ("here --to w --dry-run=maybe", "--dry_run is 'maybe', which is not bool: give true or false"),
    ],
)
def test_a_mistake_is_one_line_that_names_flag_and_fix(text, message):
    with pytest.raises(UserError, match=message) as caught:
        words(text)
    assert "\n" not in str(caught.value)


def test_errors_call_a_field_as_they_are_told():
    with pytest.raises(UserError, match=r"mine\.yaml: short_side is 'x', which is not int"):
        read(Section, ["--short_side", "x"], "program", name_of="mine.yaml: {}".format)


def test_a_commands_own_flags_stand_beside_a_recipes(capsys):
    @dataclass(frozen=True)
    class Own:
        """The command."""

        gpus: int

    section, own = read_both(Section, Own, ["--on", "--gpus", "3"], "program", default=Section(7))
    assert (section, own) == (Section(7, on=True), Own(3))
    with pytest.raises(UserError, match="give --gpus"):
        read_both(Section, Own, [], "program", default=Section(7))
    with pytest.raises(SystemExit) as end:
        read_both(Section, Own, ["--help"], "program", default=Section(7), usage="[RECIPE]")
    shown = capsys.readouterr().out
    assert end.value.code == 0
    for part in ("usage: program [RECIPE]", "The command.", "--gpus", "--short_side", "Pixels.", "7"):
        assert part in shown


def test_the_names_of_all_flags():
    assert list(flag_types(Command)) == [
        *("place", "to", "k", "kind", "step", "dry_run"),
        *("part.short_side", "part.scale", "part.on"),
    ]


def test_help_into_a_pipe_that_nobody_reads_is_silent():
    program = f"{sys.executable} -m caco_scale.pretrain --help | true"
    done = subprocess.run(program, shell=True, env=environment(), capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("", "")
