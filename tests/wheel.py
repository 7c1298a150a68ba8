"""The package as a wheel, of what the checkout tracks."""

import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PARTS = ("caco_scale", "data_prep", "ds_configs", "slurm", "pyproject.toml", "README.md", "LICENSE")
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]


def build_wheel(folder):
    """Build it in a folder -> its path. Nothing is fetched where setuptools is installed."""
    source = folder / "source"
    source.mkdir(parents=True)
    tracked = ["git", "-C", str(ROOT), "ls-files", "-co", "--exclude-standard", "--", *PARTS]
    for name in subprocess.run(tracked, capture_output=True, text=True, check=True).stdout.splitlines():
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, source / name)
    (source / "slurm" / "site.sh").write_text("# of the cluster of who builds\n")
    build = [] if find_spec("setuptools") is None else ["--no-build-isolation"]
    subprocess.run([*PIP, "wheel", "--no-deps", *build, "-w", folder, source], check=True)
    (wheel,) = folder.glob("*.whl")
    return wheel
