"""Command: ``caco completion {bash,zsh}`` prints a script after which a shell completes ``caco``.

    source <(caco completion bash)        # in ~/.bashrc; zsh: in ~/.zshrc, after compinit

The script is made of the commands' own dataclasses and asks nothing when it completes. It knows the commands' modules.
"""

import importlib
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from tyro.conf import Positional

from caco_scale import shipped
from caco_scale.commands import table as commands
from caco_scale.config import Config, recipe_names
from caco_scale.errors import exit_on_user_error
from caco_scale.flags.read import choices, flag_types, is_positional, read

PROG = "caco completion"
SCRIPT = """\
_caco() {{
    local cur="${{COMP_WORDS[COMP_CWORD]}}" prev="${{COMP_WORDS[COMP_CWORD-1]}}" start=2 found=""
    local command="${{COMP_WORDS[1]}}"
    case "$command" in {groups}) start=3 ;; esac
    ((start == 3 && COMP_CWORD > 2)) && command="$command ${{COMP_WORDS[2]}}"
    if ((COMP_CWORD == 1)); then
        found="{commands}"
    elif ((COMP_CWORD < start)); then
        case "$command" in
{parts}
        esac
    elif [[ $cur == -* ]]; then
        case "$command" in
{flags}
        esac
    else
        case "$command $prev" in
{choices}
        esac
    fi
    COMPREPLY=($(compgen -W "$found" -- "$cur"))
}}
complete -o default -F _caco caco
"""
ZSH = "autoload -U +X bashcompinit && bashcompinit\n"


@dataclass(frozen=True)
class Completion:
    """Print a script after which the shell completes these commands: source <(caco completion bash)."""

    shell: Positional[Literal["bash", "zsh"]]
    """Whose script."""


def script(shell: str) -> str:
    """The text that a bash or zsh sources."""
    groups = {name: list(commands.group(name)) for name in commands.COMMANDS if commands.group(name)}
    flags, words = [], []
    for command, kinds in _dataclasses():
        hints = {name: hint for kind in kinds for name, hint in flag_types(kind).items()}
        names = [f"--{name}" for name, hint in hints.items() if not is_positional(hint)]
        flags.append((f'"{command}"', [*names, "--help"]))
        words += [(f'"{command} --{name}"', choices(hint)) for name, hint in hints.items() if choices(hint)]
        if _takes(kinds[:1], "takes_recipe"):
            words.append((f'"{command} {command.split()[-1]}"', recipe_names()))
        if command == "path":
            words.append(('"path path"', [*shipped.FOLDERS, *shipped.names()]))
    return (ZSH if shell == "zsh" else "") + SCRIPT.format(
        groups="|".join(groups),
        commands=" ".join(commands.COMMANDS),
        parts=_cases(groups.items()),
        flags=_cases(flags),
        choices=_cases(words),
    )


def _cases(cases):
    return "\n".join(f'        {pattern}) found="{" ".join(words)}" ;;' for pattern, words in cases)


def _dataclasses() -> Iterator[tuple[str, list[type[Any]]]]:
    """(command, the dataclasses of its flags): a recipe's beside its own where it takes one."""
    for name, command in commands.COMMANDS.items():
        kinds = {f"{name} {part}": [kind] for part, kind in commands.group(name).items()}
        if not kinds:
            module = importlib.import_module(command.module)
            kinds = {name: [getattr(module, command.flags)] if command.flags else []}
        for full, own in kinds.items():
            takes_flags = _takes(own, "takes_recipe") or _takes(own, "takes_flags")
            yield full, own + ([Config] if takes_flags else [])


def _takes(own, what):
    """Does the command take a recipe, or a recipe's flags? One without flags of its own, pretrain, takes both."""
    return own[:1] in ([], [Config]) or getattr(own[0], what, False)


@exit_on_user_error
def main(arguments: Sequence[str] | None = None, prog: str = PROG) -> None:
    """Print the script; exit code 2 for another shell."""
    print(script(read(Completion, sys.argv[1:] if arguments is None else arguments, prog).shell), end="")


if __name__ == "__main__":
    main()
