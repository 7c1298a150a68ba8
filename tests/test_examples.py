"""Every example, as a stranger runs it: from an installed wheel, in an empty folder."""

import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = sorted(
    path.stem
    for path in (ROOT / "caco_scale" / "examples").glob("*.py")
    if path.stem not in ("__init__", "images")
)
SAYS = {
    "backbone_in_timm": "timm's features differ",
    "bank_in_your_loop": "the nearest neighbour has the same class for 9",
    "lars_under_deepspeed": "ZeRO-2, 1 process(es), 5 steps",
    "lars_under_fsdp2": "1 process(es), 5 steps",
    "loader_alone": "resumed at step 9: the same 3 batches",
    "pretrain_from_python": "finished, step 32",
}
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder with the package as a wheel installs it, without its dependencies."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    tracked = ["git", "-C", str(ROOT), "ls-files", "-co", "--exclude-standard", "--"]
    tracked += ["caco_scale", "data_prep", "pyproject.toml", "README.md", "LICENSE"]
    for name in subprocess.run(tracked, capture_output=True, text=True, check=True).stdout.splitlines():
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, source / name)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    build = [] if find_spec("setuptools") is None else ["--no-build-isolation"]  # nothing to be fetched
    subprocess.run([*pip, "wheel", "--no-deps", *build, "-w", folder, source], check=True)
    (wheel,) = folder.glob("*.whl")
    subprocess.run([*pip, "install", "--no-deps", "--target", folder / "packages", wheel], check=True)
    return folder / "packages"


def run(words, folder, installed):
    environment = {**os.environ, "PYTHONPATH": str(installed), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *words], cwd=folder, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_every_example_is_tried():
    assert sorted(SAYS) == EXAMPLES


# On one process the two of LARS are a part of what they are on two.
ON_TWO = ["lars_under_deepspeed", "lars_under_fsdp2"]


LONG = ["backbone_in_timm", "bank_in_your_loop"]
MARKS = {name: [pytest.mark.long] for name in LONG} | {name: [pytest.mark.slow] for name in ON_TWO}


@pytest.mark.parametrize("name", [pytest.param(name, marks=MARKS.get(name, [])) for name in EXAMPLES])
def test_an_example_from_a_wheel_in_an_empty_folder(name, installed, tmp_path):
    if name == "backbone_in_timm":
        pytest.importorskip("timm", reason="timm is an extra: pip install timm")
    assert SAYS[name] in run(["-m", f"caco_scale.examples.{name}"], tmp_path, installed)
    assert list(tmp_path.iterdir()) == [], "an example leaves nothing behind"


@pytest.mark.parametrize(
    "words",
    [
        pytest.param(["lars_under_fsdp2"], marks=pytest.mark.long),
        pytest.param(["lars_under_deepspeed", "2"], marks=pytest.mark.long),
        # The plain loops of test_lars_engines.py are at all three stages.
        pytest.param(["lars_under_deepspeed", "1"], marks=pytest.mark.slow),
        pytest.param(["lars_under_deepspeed", "3"], marks=pytest.mark.slow),
    ],
    ids=" ".join,
)
def test_an_example_under_two_processes(words, installed, tmp_path):
    module, *arguments = words
    said = run([*TORCHRUN, "-m", f"caco_scale.examples.{module}", *arguments], tmp_path, installed)
    assert "2 process(es), 5 steps" in said


def test_the_wheel_holds_types_and_the_page(installed):
    for name in ("py.typed", "examples/README.md"):
        assert (installed / "caco_scale" / name).is_file()
