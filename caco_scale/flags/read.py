"""A command line to frozen dataclasses: the one flag style of every command, by tyro.

A flag is a field's name, dotted where it stands in a section: ``--bank.size 4096``, ``--short_side=160``; ``_`` and
``-`` are alike, no flag is abbreviated, the last of two wins. A switch's flag stands alone or before ``true`` or
``false`` (some take ``auto``, too), and ``--no-FLAG`` is its ``false``. ``~`` at the beginning of a value is the user's
home. The docstring under a field is its line in ``--help``. A mistake is one line that names the nearest flag.

This file knows dataclasses, their rules and errors; which commands there are, and what a recipe is, it does not know.
"""

import contextlib
import dataclasses
import io
import os
import sys
import types
import typing
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Annotated, Any, Literal, TypeVar

import tyro

from caco_scale.errors import UserError, did_you_mean
from caco_scale.flags import rules
from caco_scale.flags.suggest import advice

T = TypeVar("T")
Own = TypeVar("Own")
BOOLS = {  # YAML's words, and Python's
    **dict.fromkeys(("true", "yes", "on"), "True"),
    **dict.fromkeys(("false", "no", "off"), "False"),
}


def shown(metavar: str) -> Any:
    """For ``Annotated``: how ``--help`` shows a value whose docstring says the default itself."""
    return tyro.conf.arg(metavar=metavar, help_behavior_hint="")


Switch = Annotated[bool, shown("")]  # a bool that is off until its flag is given


def read(
    kind: type[T],
    arguments: Iterable[str],
    prog: str,
    *,
    default: T | None = None,
    about: str | None = None,
    usage: str = "",
    name_of: Callable[[str], str] = "--{}".format,
) -> T:
    """The words of a command line as a ``kind``; ``--help`` prints all flags and ends the process with code 0.

    Args:
        default: what flags change; None: the fields' own defaults, and fields without one must be given.
        about: what ``--help`` says first; None: the docstring of ``kind``.
        usage: words that come before the flags and were taken off already, as ``--help`` shows them.
        name_of: a field's dotted name -> as errors call it (in a recipe's file it has no ``--``).
    Raises:
        UserError: an unknown flag, a value missing, too many, of another type, none of the choices, or against the
            field's rules.
    """
    return _read([(kind, default)], arguments, prog, about or kind.__doc__, usage, name_of)[0]


def read_both(
    kind: type[T],
    own: type[Own],
    arguments: Iterable[str],
    prog: str,
    *,
    default: T,
    about: str | None = None,
    usage: str = "",
) -> tuple[T, Own]:
    """As :func:`read`, of two dataclasses whose flags stand side by side: a command's own beside a recipe's."""
    found = _read([(own, None), (kind, default)], arguments, prog, about or own.__doc__, usage, "--{}".format)
    return found[1], found[0]


def read_command(
    commands: Mapping[str, type[Any]], arguments: Sequence[str], prog: str, about: str
) -> tuple[str, Any]:
    """A group's command line, ``COMMAND [--flag value ...]``, as (the command's name, its dataclass).

    ``commands``: name -> dataclass; ``--help`` in the first place lists them with their docstrings' first lines.
    """
    name, rest = pick({name: summary(kind) for name, kind in commands.items()}, arguments, prog, about)
    return name, read(commands[name], rest, f"{prog} {name}")


def pick(
    commands: Mapping[str, str],
    arguments: Sequence[str],
    prog: str,
    about: str,
    listed: Callable[[], Mapping[str, str]] | None = None,
) -> tuple[str, list[str]]:
    """The command (one of the names) that the first word is, and the other words; no other one is a UserError.

    ``listed``: gives what ``--help`` lists, where that is more than ``commands``.
    """
    name, *rest = arguments or [""]
    if name in ("-h", "--help"):
        print(f"usage: {prog} COMMAND ...\n\n{about.strip()}\n")
        print(f"{listing(listed() if listed else commands)}\n\n{prog} COMMAND --help says more.")
        sys.exit(0)
    if name not in commands:
        what = f"{name!r} is no command{did_you_mean(name, commands)}: give" if name else "give"
        raise UserError(f"{what} one of {', '.join(commands)}; {prog} --help says what they do")
    return name, rest


def summary(kind: type[Any]) -> str:
    """The first line of a command's docstring, as a list of commands has it."""
    return (kind.__doc__ or "").strip().splitlines()[0]


def listing(commands: Mapping[str, str]) -> str:
    """Names and what they do, one a line."""
    width = max(map(len, commands))
    return "\n".join(f"  {name:{width}}  {what}" for name, what in commands.items())


def take_word(
    arguments: Sequence[str], kinds: Sequence[type[Any]], names: Collection[str] = ()
) -> tuple[str | None, list[str]]:
    """The one word of a command line that belongs to no flag of some dataclasses, and the rest.

    It stands before the flags or after them. ``names``: words that end the values of a flag which takes any number. A
    line with a mistake is left as it is, for :func:`read` to say it.
    """
    if arguments and not arguments[0].startswith("-"):
        return arguments[0], list(arguments[1:])
    hints = {name: hint for kind in kinds for name, hint in flag_types(kind).items()}
    asks = [word for word in arguments if word in ("-h", "--help")]
    try:
        hints["WORD"] = Annotated[str, tyro.conf.Positional]
        words, given = _group([word for word in arguments if word not in asks], hints, "", str)
    except UserError:
        return None, list(arguments)
    if (
        not words
        and given
        and given[-1][-1] in names
        and most_values(hints[given[-1][0][2:]]) == float("inf")
    ):
        words = [given[-1].pop()]
    if not words or words[0].startswith("-"):
        return None, list(arguments)
    return words[0], [word for group in given for word in _joined(group)] + words[1:] + asks


def flag_types(kind: Any) -> dict[str, Any]:
    """``{"section.field": type}`` of what a command line can give; suppressed fields are none of it."""
    return {
        name: hint for name, hint in rules.field_types(kind).items() if tyro.conf.Suppress not in _marks(hint)
    }


def is_positional(hint: Any) -> bool:
    """Is a field with this type given without a flag?"""
    return tyro.conf.Positional in _marks(hint)


def choices(hint: Any) -> tuple[str, ...]:
    """The words that a field with this type may have, where they are few."""
    return typing.get_args(_bare(hint)) if typing.get_origin(_bare(hint)) is Literal else ()


def _marks(hint: Any) -> tuple[Any, ...]:
    return getattr(hint, "__metadata__", ())


def _bare(hint: Any) -> Any:
    """A type without annotations and without ``| None``."""
    while typing.get_origin(hint) is Annotated:
        hint = typing.get_args(hint)[0]
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        (hint,) = (part for part in typing.get_args(hint) if part is not type(None))
        return _bare(hint)
    return hint


def _read(kinds, arguments, prog, about, usage, name_of):
    """An instance of each (dataclass, default), from one command line."""
    parts = [
        (f"part{number}", Annotated[kind, tyro.conf.arg(name="")], *_default(default))
        for number, (kind, default) in enumerate(kinds)
    ]
    joined = dataclasses.make_dataclass("Flags", parts, frozen=True, kw_only=True)
    options: dict[str, Any] = {
        "prog": f"{prog} {usage}".rstrip(),
        "description": about,
        "use_underscores": True,
        "config": (tyro.conf.FlagConversionOff,),
    }
    arguments = list(arguments)
    if "-h" in arguments or "--help" in arguments:
        tyro.cli(joined, args=["--help"], **options)
    hints = {name: hint for kind, _ in kinds for name, hint in flag_types(kind).items()}
    needed = [name for kind, default in kinds if default is None for name in _without_default(kind)]
    words, given = _group(arguments, hints, prog, name_of, usage)
    _check_complete(words, given, hints, needed, prog, usage)
    output = io.StringIO()
    try:
        with contextlib.redirect_stderr(output), contextlib.redirect_stdout(output):
            found = tyro.cli(joined, args=words + [w for group in given for w in _joined(group)], **options)
    except SystemExit:
        _refuse(words, given, hints, name_of)
        raise UserError(f"{_first_paragraph(output.getvalue())} (see {prog} --help)") from None
    read = [getattr(found, name) for name, *_ in parts]
    for one in read:
        rules.check(one, name_of)
    return read


def _joined(group):
    """A flag with its only value in one word, for the value may look like a flag: a negative number, ``-name``."""
    return ["=".join(group)] if len(group) == 2 else group


def _default(value):
    return () if value is None else (dataclasses.field(default=value),)


def _without_default(kind):
    missing = dataclasses.MISSING
    return [f.name for f in dataclasses.fields(kind) if f.default is missing and f.default_factory is missing]


def _group(arguments, hints, prog, name_of, usage=""):
    """The words that belong to no flag, and every flag with its values: ``[["--bank.size", "4096"], ...]``."""
    flags = [name for name, hint in hints.items() if not is_positional(hint)]
    words, given, rest = [], [], list(arguments)
    while rest:
        word, equals, value = rest.pop(0).partition("=")
        if not word.startswith("--"):
            words.append(at_home(word + equals + value))
            continue
        name = word[2:].replace("-", "_")
        if name not in flags and name.startswith("no_") and _is_switch(hints.get(name[3:])) and not equals:
            name, equals, value = name[3:], "=", "false"
        if name not in flags:
            meant = advice(name, _written(hints), usage)
            raise UserError(f"unknown flag {word}{meant}: {prog} --help lists them all")
        hint = hints[name]
        if not equals and _is_switch(hint) and _stands_alone(rest, hint, len(flags) < len(hints)):
            equals, value = "=", "true"
        values = _take_values([value] if equals else [], rest, hint, name_of(name))
        given.append([f"--{name}", *values])
    return words, given


def _take_values(values, rest, hint, called):
    """Move a flag's values from ``rest`` behind those that it has; UserError where there are too few."""
    most = most_values(hint)
    while rest and len(values) < most and not rest[0].startswith("--"):
        values.append(rest.pop(0))
    if not values or len(values) < most < float("inf"):
        what = f"is {' '.join(values)}" if values else "has no value"
        raise UserError(f"{called} {what}: {wanted(hint)}")
    if _bare(hint) is bool:
        return [BOOLS.get(word.lower(), word) for word in values]
    if _is_switch(hint):
        return [BOOLS.get(word.lower(), word).lower() for word in values]
    return [at_home(word) for word in values]


def at_home(word: str) -> str:
    """A value with the ``~`` or ``~user`` that it begins with written out, as a shell does only for a word of its own.

    Raises:
        UserError: there is no such user.
    """
    if not word.startswith("~"):
        return word
    path = os.path.expanduser(word)
    if path == word:
        raise UserError(
            f"{word}: there is no user {word[1:].split('/')[0]!r}; write ./{word} for a name that begins so"
        )
    return path


def _written(hints):
    """A command's flags as a user writes them, and its arguments without a flag by what stands for them."""
    return {
        name: _metavar(name, hints) if is_positional(hint) else f"--{name}" for name, hint in hints.items()
    }


def _check_complete(words, given, hints, needed, prog, usage):
    """UserError: words that nobody asked for, or something needed that is not given."""
    positional = [name for name, hint in hints.items() if is_positional(hint)]
    if len(words) > sum(most_values(hints[name]) for name in positional):
        word = next((w for w in words if w[:1] == "-" and w[1:2].isalpha()), words[-1])
        meant = advice(word[1:].replace("-", "_"), _written(hints), usage) if word[0:1] == "-" else ""
        raise UserError(f"unknown argument {word}{meant}: {prog} --help says what there is")
    there = {flag for flag, *_ in given}
    missing = [f"--{name}" for name in needed if name not in positional and f"--{name}" not in there]
    missing += [
        _metavar(name, hints) for name in [name for name in needed if name in positional][len(words) :]
    ]
    if missing:
        raise UserError(f"give {' and '.join(missing)}: {prog} --help says what they are")


def _is_switch(hint):
    """A bool, or ``true``, ``false`` and other words."""
    return _bare(hint) is bool or "true" in choices(hint)


def _stands_alone(rest, hint, has_positionals):
    """Is a switch before these words without one of its values? Another word may be a positional argument."""
    values = {*BOOLS, *choices(hint)}
    return not rest or rest[0].startswith("--") or (has_positionals and rest[0].lower() not in values)


def _metavar(name, hints):
    return next((m.metavar for m in _marks(hints[name]) if getattr(m, "metavar", None)), name.upper())


def most_values(hint: Any) -> float:
    """How many words a flag of this type takes at most."""
    hint = _bare(hint)
    if typing.get_origin(hint) is not tuple:
        return 1
    parts = typing.get_args(hint)
    return float("inf") if parts[-1] is ... else len(parts)


def wanted(hint: Any) -> str:
    """What to give for a value of this type, in words."""
    hint = _bare(hint)
    parts = typing.get_args(hint)
    if typing.get_origin(hint) is Literal:
        return f"give one of {', '.join(map(str, parts))}"
    if typing.get_origin(hint) is tuple:
        if _bare(parts[0]) is str:
            return "give one or more words"
        count = "" if parts[-1] is ... else f"{len(parts)} "
        return f"give {count}{'whole ' if _bare(parts[0]) is int else ''}numbers"
    return {int: "give a whole number", float: "give a number", bool: "give true or false"}.get(
        hint, "give one"
    )


def _refuse(words, given, hints, name_of):
    """UserError for the first flag or argument whose values tyro does not take."""
    positional = [name for name, hint in hints.items() if is_positional(hint)]
    found = [(name_of(flag[2:]), hints[flag[2:]], values) for flag, *values in given]
    found += [(_metavar(n, hints), hints[n], [w]) for n, w in zip(positional, words, strict=False)]
    for called, hint, values in found:
        takes, hint = hint if rules.may_be_auto(hint) else _bare(hint), _bare(hint)
        one = dataclasses.make_dataclass("One", [("value", takes)])
        try:
            with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
                tyro.cli(one, args=["--value", *values], config=(tyro.conf.FlagConversionOff,))
        except SystemExit:
            what = "" if typing.get_args(hint) else f", which is not {hint.__name__}"
            raise UserError(f"{called} is {' '.join(map(_quoted, values))}{what}: {wanted(hint)}") from None


def _quoted(word):
    """A number as it is, another word in quotes."""
    try:
        float(word)
        return word
    except ValueError:
        return repr(word)


def _first_paragraph(message):
    """What is wrong, out of tyro's message: a title, then paragraphs between rules, in a box or not."""
    paragraphs = [[]]
    for line in message.splitlines()[1:]:
        words = line.strip(" │╭╮╰╯─-")
        if words:
            paragraphs[-1].append(words)
        else:
            paragraphs.append([])
    return next((" ".join(paragraph) for paragraph in paragraphs if paragraph), "the flags cannot be read")
