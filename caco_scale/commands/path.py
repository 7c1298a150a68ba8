"""Command: ``caco path [NAME]`` prints where a file is that comes with the package, for a shell to use.

    accelerate launch --config_file "$(caco path ds_configs/zero2.yaml)" -m caco_scale.pretrain ...
    cp "$(caco path recipes/own_images.yaml)" mine.yaml

Without a name it lists all. So the same commands work with an installed wheel, in any folder.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

from tyro.conf import Positional

from caco_scale import shipped
from caco_scale.errors import exit_on_user_error
from caco_scale.flags.read import read, shown

PROG = "caco path"


@dataclass(frozen=True)
class Named:
    """Where a file is that comes with the package: launcher configs, recipes, job scripts."""

    name: Positional[Annotated[str, shown("NAME")]] = ""
    """As ds_configs/zero2.yaml, or a folder of them as ds_configs (default: the names of all are listed)."""


@exit_on_user_error
def main(arguments: Sequence[str] | None = None, prog: str = PROG) -> None:
    """Print one path, or all names; exit code 2 where there is no such file."""
    name = read(Named, sys.argv[1:] if arguments is None else arguments, prog).name
    print(shipped.place(name) if name else "\n".join(shipped.names()))
