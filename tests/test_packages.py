"""What the package needs is said in pyproject.toml alone, and is read from there or from an installation's metadata."""

import tomllib
from importlib import metadata

from launch import ROOT
from packaging.requirements import Requirement

from caco_scale.run import packages


def test_a_checkout_says_what_its_pyproject_says():
    dependencies = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    assert packages.requirements() == [Requirement(line) for line in dependencies]
    assert packages.installed_versions().keys() == {"caco_scale", *(r.name for r in packages.requirements())}


def test_an_installation_says_what_its_metadata_say_without_extras(monkeypatch, tmp_path):
    monkeypatch.setattr(packages, "__file__", str(tmp_path / "caco_scale/run/packages.py"))
    lines = ["torch>=2.11", 'pytest; extra == "test"', 'tomli; python_version < "3"']
    monkeypatch.setattr(metadata, "requires", lambda name: lines if name == "caco_scale" else None)
    assert packages.requirements() == [Requirement("torch>=2.11")]
    (tmp_path / "pyproject.toml").write_text('[project]\nname = "other"\ndependencies = ["rich"]')
    assert packages.requirements() == [Requirement("torch>=2.11")]


def test_a_bare_copy_says_nothing(monkeypatch, tmp_path):
    def missing(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(packages, "__file__", str(tmp_path / "caco_scale/run/packages.py"))
    monkeypatch.setattr(metadata, "requires", missing)
    assert packages.requirements() == []


def test_lowest_versions():
    torch = Requirement("torch>=2.11")
    for version in ("2.11", "2.14.1+cpu", "3.0", "2.11.0a0+vendor", "2.12.0.dev20260101", "a vendor's own"):
        assert packages.is_new_enough(torch, version)
    for version in ("2.9.1", "2.10.5+cu128"):
        assert not packages.is_new_enough(torch, version)
