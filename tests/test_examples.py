"""Every example, as a stranger runs it: from an installed wheel, in an empty folder."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from wheel import PIP, build_wheel

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
    subprocess.run(
        [*PIP, "install", "--no-deps", "--target", folder / "packages", build_wheel(folder)], check=True
    )
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


def test_the_wheel_holds_all_that_the_checkout_does(installed):
    """And no more: the builder's own slurm/site.sh stays at home."""
    source = installed.parent / "source"
    folders = {"caco_scale": "caco_scale", "data_prep": "data_prep"}
    folders |= {name: f"caco_scale/{name}" for name in ("ds_configs", "slurm")}
    wanted = {
        f"{inside}/{path.relative_to(source / name)}"
        for name, inside in folders.items()
        for path in (source / name).rglob("*")
        if path.is_file() and path != source / "slurm/site.sh"
    }
    there = {str(path.relative_to(installed)) for path in installed.rglob("*") if path.is_file()}
    there = {name for name in there if "__pycache__" not in name and not name.endswith(".so")}
    assert {name for name in there if name.startswith(("caco_scale/", "data_prep/"))} == wanted
    assert {name.split("/")[0] for name in there} <= {"caco_scale", "data_prep", "bin"} | {
        path.name for path in installed.glob("*.dist-info")
    }


def test_a_wheel_alone_names_and_writes_its_files(installed, tmp_path):
    packaged = str(installed / "caco_scale/ds_configs/zero2.yaml")
    assert run(["-m", "caco_scale", "path", "ds_configs/zero2.yaml"], tmp_path, installed) == f"{packaged}\n"
    listed = run(["-m", "caco_scale", "path"], tmp_path, installed).splitlines()
    assert {"ds_configs/fsdp2.yaml", "slurm/800ep.sh", "recipes/demo.yaml"} <= set(listed)
    words = [sys.executable, "-m", "caco_scale", "pretrain", "demo", "--deepspeed"]
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert '--config_file "$(caco path ds_configs/zero2.yaml)" -m' in done.stderr
    assert list(tmp_path.iterdir()) == []
    said = run(["-m", "caco_scale", "slurm", "init", "jobs"], tmp_path, installed).splitlines()
    files = {f"jobs/{name}" for name in listed if not name.startswith(("recipes/", "examples/"))}
    assert said[0] == f"wrote {len(files)} files to jobs/slurm and jobs/ds_configs"
    assert files == {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}


@pytest.mark.long
def test_a_wheel_alone_trains_under_its_launcher_config(installed, tmp_path):
    config = run(["-m", "caco_scale", "path", "ds_configs/zero2.yaml"], tmp_path, installed).strip()
    launch = ["-m", "accelerate.commands.launch", "--config_file", config, "--num_processes", "1"]
    words = ["-m", "caco_scale.pretrain", "demo", "--run.max_steps", "2", "--eval.knn_every", "0"]
    assert re.search(
        "training sees 1 process.*, zero2$", run([*launch, *words], tmp_path, installed), re.MULTILINE
    )
    assert (tmp_path / "runs/demo/DONE").exists()
