"""The packages that this one needs, and from which versions on: said once, in ``pyproject.toml``, and read from there.

Knows nothing of the rest of the package.
"""

import tomllib
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.version import InvalidVersion, Version

NAME = "caco_scale"


def requirements() -> list[Requirement]:
    """What every installation needs, extras left out; empty for a bare copy of the folder, which says nothing.

    A checkout's ``pyproject.toml`` speaks before the metadata, which are as old as its installation.
    """
    lines = _from_checkout(Path(__file__).parents[2] / "pyproject.toml")
    if lines is None:
        try:
            lines = metadata.requires(NAME) or []
        except metadata.PackageNotFoundError:
            lines = []
    found = [Requirement(line) for line in lines]
    return [r for r in found if r.marker is None or r.marker.evaluate({"extra": ""})]


def _from_checkout(path: Path) -> list[str] | None:
    """The dependencies that a ``pyproject.toml`` names, or None where it is not there or is another project's."""
    try:
        project = tomllib.loads(path.read_text())["project"]
        return project["dependencies"] if project["name"] == NAME else None
    except (OSError, ValueError, KeyError):
        return None


def installed_version(name: str) -> str | None:
    """The installed version of a distribution, or None."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def installed_versions() -> dict[str, str | None]:
    """Of this package and of all that it needs: ``{name: version, or None where it is not installed}``."""
    return {name: installed_version(name) for name in (NAME, *(r.name for r in requirements()))}


def is_new_enough(requirement: Requirement, version: str) -> bool:
    """Whether a version is within the bounds; a vendor's own build of one (2.11.0a0+vendor) counts as that one."""
    try:
        return requirement.specifier.contains(Version(version).base_version, prereleases=True)
    except InvalidVersion:  # a build that follows no rule: its user knows
        return True
