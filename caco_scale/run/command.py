"""The command that started this process, so that what a run proposes is what its user typed, with other flags."""

import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from caco_scale.errors import quoted
from caco_scale.run.signals import launcher_words

LAUNCH = {"accelerate.commands.launch": ["accelerate", "launch"], "torch.distributed.run": ["torchrun"]}


def program() -> list[str]:
    """How a user here starts ``caco``."""
    return ["caco"] if shutil.which("caco") else ["python", "-m", "caco_scale"]


def started_as(prog: str, arguments: Sequence[str], launched_by: Sequence[str] | None = None) -> list[str]:
    """The words of this process's command: its launcher with that one's options, the program, the arguments.

    Args:
        prog: ``python -m caco_scale.pretrain`` or ``caco pretrain``.
        arguments: what came after it.
        launched_by: the words of the launcher's own process; None: of this process's parent, if it is one.
    """
    typed, arguments = sys.argv[1:], list(arguments)
    words = list(launcher_words(os.getppid()) if launched_by is None else launched_by)
    if words and words[len(words) - len(typed) :] == typed:
        return _launcher(words[: len(words) - len(typed)]) + typed
    first, *rest = prog.split()
    return [*(program() if first == "caco" else [first]), *rest, *arguments]


def _launcher(words):
    """A launcher's words as they are typed: without the path of Python and of the script."""
    if Path(words[0]).name.startswith("python") and len(words) > 1:
        if words[1] == "-m" and words[2] in LAUNCH:
            return [*LAUNCH[words[2]], *words[3:]]
        if not words[1].startswith("-"):
            return [Path(words[1]).name, *words[2:]]
    return [Path(words[0]).name, *words[1:]]


def with_flags(words: Sequence[str], flags: Mapping[str, object]) -> str:
    """A command with some flags set, others as they were, as a line for a shell. The flags have one value each."""
    kept, skip = [], False
    for word in words:
        name, equals, _ = word.partition("=")
        if skip:
            skip = False
        elif name.startswith("--") and name[2:].replace("-", "_") in flags:
            skip = not equals
        else:
            kept.append(word)
    return " ".join(map(quoted, [*kept, *(w for name, v in flags.items() for w in (f"--{name}", str(v)))]))
