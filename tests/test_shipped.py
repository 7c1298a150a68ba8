"""Files that come with the package: found in a checkout and in a wheel, named so that a shell finds them."""

import ast
import re
import shutil
import subprocess

import pytest
from launch import ROOT

from caco_scale import shipped
from caco_scale.__main__ import dispatch
from caco_scale.commands.slurm import write
from caco_scale.distributed.deepspeed_config import find_deepspeed_json
from caco_scale.errors import UserError
from caco_scale.flags.suggest import advice
from caco_scale.shipped import place, spelled

ZERO2 = "ds_configs/zero2.yaml"
QUOTED = f'"$(caco path {ZERO2})"'


@pytest.fixture
def as_a_wheel(tmp_path, monkeypatch):
    """The package's place as a wheel installs it; the checkout is out of sight."""
    package = tmp_path / "site-packages/caco_scale"
    for name in shipped.FOLDERS:
        shutil.copytree(shipped.folder(name), package / name)
    monkeypatch.setattr(shipped, "PACKAGE", package)
    empty = tmp_path / "empty"
    empty.mkdir()
    monkeypatch.chdir(empty)
    return package


def test_every_file_that_git_has_is_named_and_there():
    names = shipped.names()
    tracked = subprocess.run(
        [
            "git",
            "-C",
            ROOT,
            "ls-files",
            "ds_configs",
            "slurm",
            "caco_scale/recipes",
            "caco_scale/examples/*.ipynb",
        ],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.replace("caco_scale/", "")
    assert sorted(names) == sorted(tracked.split())
    assert all(place(name).is_file() for name in names)
    assert place("ds_configs") == place("ds_configs/") == ROOT / "ds_configs"


def test_a_clusters_own_settings_are_not_handed_on(as_a_wheel):
    (as_a_wheel / "slurm/site.sh").touch()
    assert "slurm/site.sh" not in shipped.names()
    with pytest.raises(UserError):
        place("slurm/site.sh")


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("zero2", ZERO2),
        ("configs/zero2.yaml", ZERO2),
        ("ds_configs/zero22.yaml", ZERO2),
        ("/etc/passwd", None),
        ("ds_configs/../setup.py", None),
        ("slurm/../../x", None),
    ],
)
def test_a_name_that_is_none_says_which_is(name, meant):
    with pytest.raises(UserError, match="caco path lists") as error:
        place(name)
    assert meant is None or f"(did you mean {meant}?)" in str(error.value)


def test_a_message_names_what_the_shell_finds(as_a_wheel, monkeypatch, tmp_path):
    assert spelled(ZERO2) == QUOTED
    assert spelled("ds_configs/*.yaml") == '"$(caco path ds_configs)"/*.yaml'
    assert QUOTED in advice("deepspeed", {"run.world_size": "--run.world_size"})
    monkeypatch.chdir(ROOT)
    assert spelled(ZERO2) == ZERO2
    assert spelled("ds_configs/*.yaml") == "ds_configs/*.yaml"
    assert f"--config_file {ZERO2} " in advice("deepspeed", {"run.world_size": "--run.world_size"})


def test_what_a_message_names_is_a_path_when_a_shell_reads_it(as_a_wheel, tmp_path):
    program = tmp_path / "caco"
    program.write_text(f'#!/bin/sh\necho "{as_a_wheel}/$2"\n')
    program.chmod(0o755)
    for name, count in ((ZERO2, 1), ("ds_configs/*.yaml", 6)):
        line = f"PATH={tmp_path}:$PATH; ls {spelled(name)}"
        listed = subprocess.run(["sh", "-c", line], capture_output=True, text=True, check=True).stdout.split()
        assert len(listed) == count


NAMED = re.compile(r"(?<!caco path )\b(?:ds_configs|slurm)/[\w*]+\.(?:yaml|json|sh|md)\b")


def test_no_message_or_help_names_a_file_of_the_checkout_by_itself():
    """They go through ``spelled``; a docstring, which --help may show, has ``$(caco path ...)``."""
    bare = []
    for path in sorted((ROOT / "caco_scale").rglob("*.py")):
        tree = ast.parse(path.read_text())
        given = {
            id(word)
            for node in ast.walk(tree)
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "spelled"
            for word in node.args
        }
        given |= {id(node.value) for node in tree.body if isinstance(node, ast.Assign)}  # a name for a name
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in given:
                bare += [f"{path.name}:{node.lineno}: {name}" for name in NAMED.findall(node.value)]
    # These speak of the names themselves, or of a folder that has just been written.
    assert [line for line in bare if not line.startswith(("shipped.py", "path.py", "slurm.py"))] == []


def test_a_wheels_deepspeed_files_are_found_from_anywhere(as_a_wheel):
    assert find_deepspeed_json("ds_configs/zero2.json") == as_a_wheel / "ds_configs/zero2.json"
    with pytest.raises(UserError, match="which is not there"):
        find_deepspeed_json("ds_configs/none.json")


def test_job_scripts_are_written_once_and_never_over_the_users(tmp_path, capsys, as_a_wheel):
    folder = tmp_path / "my jobs"
    dispatch(["slurm", "init", str(folder)])
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 3
    assert f"cd '{folder}' && cp slurm/site.sh.example slurm/site.sh" in said[1]
    assert "slurm/submit.sh 800ep --self-test" in said[2]
    assert (folder / "slurm/submit.sh").stat().st_mode & 0o111
    assert not (folder / "slurm/README.md").stat().st_mode & 0o111
    (folder / "slurm/site.sh").write_text("VENV=/mine\n")
    assert write(folder) == 0
    (folder / "slurm/200ep.sh").write_text("mine\n")
    (folder / "ds_configs/ddp.yaml").unlink()
    with pytest.raises(UserError, match=r"has other files by the names slurm/200ep.sh: .*--force"):
        write(folder)
    assert not (folder / "ds_configs/ddp.yaml").exists()
    assert (folder / "slurm/200ep.sh").read_text() == "mine\n"
    assert write(folder, force=True) == 2
    assert (folder / "slurm/200ep.sh").read_bytes() == place("slurm/200ep.sh").read_bytes()
    assert (folder / "slurm/site.sh").read_text() == "VENV=/mine\n"


def test_a_checkout_is_left_as_it_is():
    assert write(ROOT) == 0


def test_a_place_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "slurm").touch()
    with pytest.raises(UserError, match="cannot write the job scripts"):
        write(tmp_path)
    (tmp_path / "slurm").unlink()
    (tmp_path / "slurm/lib.sh").mkdir(parents=True)
    with pytest.raises(UserError, match="cannot write the job scripts"):
        write(tmp_path, force=True)
    assert [path.name for path in tmp_path.rglob("*")] == ["slurm", "lib.sh"]
