"""The files that come with the package for its users to pass, read or copy: where they are, how a message names them.

A wheel has the folders inside the package; in a checkout two of them lie beside it, where README and job scripts name
them. A file's name is the same in both: ``ds_configs/zero2.yaml``.
"""

import glob
from pathlib import Path

from caco_scale.errors import UserError, did_you_mean

PACKAGE = Path(__file__).parent
FOLDERS = {  # folder -> which of its files; pyproject.toml says the same to the build
    "ds_configs": ("*.yaml", "*.json", "README.md"),
    "slurm": ("*.sh", "*.py", "*.example", "Dockerfile", "README.md"),
    "recipes": ("*.yaml", "README.md"),
    "examples": ("*.ipynb",),
}
USERS_OWN = "site.sh"  # of a cluster, in a checkout's slurm/: it is not ours to hand on


def folder(name: str) -> Path:
    """Where one of :data:`FOLDERS` is."""
    inside = PACKAGE / name
    return inside if inside.is_dir() else PACKAGE.parent / name


def names() -> list[str]:
    """Every file, as ``folder/file``."""
    return [
        f"{name}/{path.name}"
        for name, patterns in FOLDERS.items()
        for pattern in patterns
        for path in sorted(folder(name).glob(pattern))
        if path.name != USERS_OWN
    ]


def place(name: str) -> Path:
    """Where a file, or one of the folders, is.

    Raises:
        UserError: there is no such file.
    """
    name = name.rstrip("/")
    top, _, file = name.partition("/")
    known = names()
    if name not in known and name not in FOLDERS:
        near = [other for other in known if name and name in other]
        meant = f" (did you mean {near[0]}?)" if near else did_you_mean(name, known)
        raise UserError(f"no file {name!r} comes with caco_scale{meant}: caco path lists those that do")
    return folder(top) / file


def spelled(name: str) -> str:
    """How a message names one of the files, or ``folder/*.yaml``, so that a shell finds it from the current folder.

    As it stands where it is there (in a checkout, and where ``caco slurm init`` has written), else
    ``"$(caco path ds_configs/zero2.yaml)"``.
    """
    if glob.glob(name):
        return name
    top, _, file = name.partition("/")
    return f'"$(caco path {top})"/{file}' if "*" in file else f'"$(caco path {name})"'
