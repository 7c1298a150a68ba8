"""What a run ran on: versions, commit, command line, the ranks' devices and hosts."""

import platform
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from caco_scale.run.packages import installed_versions


def git_commit(folder: str | Path) -> str | None:
    """The commit of the checkout that tracks the package, ``+changes`` if edited; None if there is none."""

    def git(*arguments):
        command = ["git", "-C", str(folder), *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.strip()

    try:
        # An installed package in a virtual environment within some checkout has no commit of its own.
        git("ls-files", "--error-unmatch", "__init__.py")
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain", "--", ".") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def describe_environment(
    *, world_size: int, devices: Sequence[str], hosts: Sequence[str], **more: Any
) -> dict[str, Any]:
    """What ``environment.json`` holds: versions, commit, command line, and the facts that are passed in.

    ``devices`` and ``hosts`` are lists with one entry per rank, in rank order; gathering them is the caller's
    part.
    """
    return {
        "versions": {"python": platform.python_version(), **installed_versions()},
        "git_commit": git_commit(Path(__file__).parents[1]),
        "command": list(sys.argv),
        "platform": platform.platform(),
        "world_size": world_size,
        "devices": list(devices),
        "hosts": list(hosts),
        **more,
    }
