"""Export: the trained backbone in a file that its user's own tools load, or one line that says why not."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torchvision
import yaml
from safetensors import safe_open
from safetensors.torch import load_file

from caco_scale import export
from caco_scale.checkpoint import Checkpointer, State, load_tensors
from caco_scale.errors import UserError
from caco_scale.method.encoders import build_backbone
from caco_scale.method.model import Encoder, QueryKeyModel
from caco_scale.method.projector import build_projector

ROOT = Path(__file__).parent.parent


def trained_model(arch, stem, dtype=torch.float32):
    """A model whose parameters and buffers are all different from a fresh one's, and its key from its query."""
    torch.manual_seed(0)
    backbone, num_features = build_backbone(arch, stem)
    model = QueryKeyModel(Encoder(backbone, build_projector(num_features, 8, 4))).to(dtype)
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.is_floating_point():
                tensor.mul_(1 + 0.1 * torch.rand_like(tensor)).add_(0.01 * torch.rand_like(tensor))
            else:
                tensor.add_(17)
    return model


def save_run(folder, arch="tiny", stem="imagenet", numbers=(30,), dtype=torch.float32):
    """A run directory as training writes it, as far as export looks."""
    model = trained_model(arch, stem, dtype)
    folder.mkdir()
    config = {"recipe": "demo", "model": {"arch": arch, "stem": stem}}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    (folder / "environment.json").write_text('{"git_commit": "abc1234"}')
    tensors = {"bank.rows": torch.zeros(4, 4)}
    for side in ("query", "key"):
        module = getattr(model, side)
        tensors.update({f"{side}.{name}": p for name, p in module.named_parameters()})
        tensors.update({f"{side}_buffer.{name}": b for name, b in module.named_buffers()})
    checkpointer = Checkpointer(folder / "checkpoints")
    for step in numbers:
        with torch.no_grad():
            model.query.backbone.conv1.weight.add_(0.5) if step != numbers[0] else None
        checkpointer.save(step, State(tensors, {"epoch": 2}), wait=True)
    return model


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("export") / "run"
    save_run(folder, "resnet18", "imagenet", numbers=(10, 20))
    return folder


@pytest.mark.parametrize("which", ["query", "key"])
@pytest.mark.parametrize("file_format", ["torchvision", "safetensors"])
def test_torchvision_loads_the_file_and_gives_the_trained_features(run, tmp_path, file_format, which):
    export.main([str(run), "--to", str(tmp_path / "w"), "--format", file_format, "--which", which])
    read = load_file if file_format == "safetensors" else torch.load
    state = read(tmp_path / "w")
    model = torchvision.models.resnet18()
    keys = model.load_state_dict(state, strict=False)
    assert set(keys.missing_keys) == {"fc.weight", "fc.bias"}
    assert keys.unexpected_keys == []
    model.fc = torch.nn.Identity()
    images = torch.randn(2, 3, 64, 64)

    wanted = trained_model("resnet18", "imagenet")
    with torch.no_grad():
        wanted.query.backbone.conv1.weight.add_(0.5)  # step 20, the newest
        trained = getattr(wanted, which).backbone.eval()(images)
        other = getattr(wanted, "key" if which == "query" else "query").backbone.eval()(images)
        found = model.eval()(images)
    assert torch.equal(found, trained)
    assert not torch.equal(found, other)


def test_safetensors_say_where_they_come_from(run, tmp_path):
    export.export(run, tmp_path / "w", "safetensors", step=10)
    with safe_open(tmp_path / "w", "pt") as file:
        assert file.metadata() == {
            "format": "pt",
            "arch": "resnet18",
            "stem": "imagenet",
            "encoder": "query",
            "recipe": "demo",
            "step": "10",
            "epoch": "2",
            "git_commit": "abc1234",
        }
        weight = file.get_tensor("conv1.weight")
    assert torch.equal(weight, trained_model("resnet18", "imagenet").query.backbone.conv1.weight)


@pytest.mark.parametrize(
    ("arch", "stem"), [("resnet18", "cifar"), ("tiny", "cifar"), ("vit_b_16", "imagenet")]
)
def test_every_kind_of_backbone(tmp_path, arch, stem):
    save_run(tmp_path / "run", arch, stem) if arch != "vit_b_16" else save_vit(tmp_path / "run")
    export.export(tmp_path / "run", tmp_path / "w", "torchvision")
    state = torch.load(tmp_path / "w", weights_only=True)
    if arch == "vit_b_16":
        with torch.device("meta"):
            model = torchvision.models.vit_b_16()
        keys = model.load_state_dict(state, strict=False, assign=True)
        assert all(key.startswith("heads.") for key in keys.missing_keys)
        assert keys.unexpected_keys == []
    else:
        build_backbone(arch, stem)[0].load_state_dict(state)


def save_vit(folder):
    """Backbone only: what export reads of a ViT run, without writing 1 GB of the rest."""
    with torch.device("meta"):
        backbone, _ = build_backbone("vit_b_16")
    generator = torch.Generator().manual_seed(0)
    tensors = {
        f"query.backbone.{name}": 0.02 * torch.randn(p.shape, generator=generator)
        for name, p in backbone.named_parameters()
    }
    folder.mkdir()
    config = {"recipe": "demo", "model": {"arch": "vit_b_16", "stem": "imagenet"}}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    Checkpointer(folder / "checkpoints").save(1, State(tensors), wait=True)


def test_a_checkpoint_directory_and_a_float64_run(tmp_path):
    save_run(tmp_path / "run", numbers=(1, 2), dtype=torch.float64)
    path = tmp_path / "run" / "checkpoints" / "step_00000001"
    metadata = export.export(path, tmp_path / "w", "torchvision")
    assert metadata["step"] == "1"
    found = torch.load(tmp_path / "w", weights_only=True)["conv1.weight"]
    assert found.dtype == torch.float32
    assert torch.equal(found, load_tensors(path)["query.backbone.conv1.weight"].float())


def test_a_file_that_does_not_give_the_features_back_never_appears(run, tmp_path, monkeypatch):
    def write_rounded(path, state, metadata, file_format):
        torch.save({name: t.half().to(t.dtype) for name, t in state.items()}, path)

    monkeypatch.setattr(export, "_write", write_rounded)
    with pytest.raises(UserError, match="does not give the trained features back"):
        export.export(run, tmp_path / "w", "torchvision")
    assert os.listdir(tmp_path) == []


def test_mistakes_are_one_line(run, tmp_path, capsys):
    (tmp_path / "there").write_text("mine")
    (tmp_path / "empty").mkdir()
    to, fmt = ["--to", str(tmp_path / "w")], ["--format", "torchvision"]
    cases = [
        ([str(tmp_path / "none"), *to, *fmt], "no run at"),
        ([str(tmp_path / "empty"), *to, *fmt], "no complete checkpoint in"),
        ([str(run), *to, *fmt, "--step", "15"], "no checkpoint of step 15"),
        ([str(run), *to, "--format", "onnx"], "invalid choice: 'onnx'"),
        ([str(run), *fmt, "--to", str(tmp_path / "there")], "there exists: give another name, or --force"),
        ([str(run), *fmt, "--to", str(tmp_path / "empty")], "is a directory"),
        ([str(run), *fmt, "--to", str(tmp_path / "none" / "w")], "there is no directory"),
        ([str(run), *to, *fmt, "--whihc", "key"], "unrecognized arguments: --whihc key"),
        ([str(run), *fmt], "--to"),
    ]
    for arguments, message in cases:
        with pytest.raises(SystemExit) as caught:
            export.main(arguments)
        assert caught.value.code == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ")
        assert error.count("\n") == 1
        assert message in error
    assert (tmp_path / "there").read_text() == "mine"
    assert not (tmp_path / "w").exists()


def test_force_replaces_and_a_damaged_checkpoint_does_not(run, tmp_path):
    target = tmp_path / "w"
    target.write_text("mine")
    export.export(run, target, "torchvision", force=True)
    before = target.read_bytes()
    broken = tmp_path / "run"
    save_run(broken)
    path = broken / "checkpoints" / "step_00000030" / "__0_0.distcp"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"damaged: __0_0\.distcp"):
        export.export(broken, target, "torchvision", force=True)
    assert target.read_bytes() == before


def test_the_command(tmp_path):
    save_run(tmp_path / "run")
    command = [
        sys.executable,
        "-m",
        "caco_scale.export",
        "run",
        "--to",
        "w.safetensors",
        "--format",
        "safetensors",
    ]
    done = subprocess.run(
        command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("wrote w.safetensors (")
    assert "query backbone tiny (stem imagenet) of step 30; loaded back and equal bit for bit" in done.stdout
    assert "conv1.weight" in load_file(tmp_path / "w.safetensors")
