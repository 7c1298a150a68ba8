"""Export: the trained backbone in a file that its user's own tools load, or one line that says why not."""

import json
import os
import pickle
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
import torchvision
import yaml
from launch import finished
from PIL import Image
from run_directories import change_values as rewrite_values
from run_directories import (
    make_config,
    metrics_lines,
    save_checkpoint,
    save_run,
    trained_model,
    write_records,
    write_results,
)
from safetensors import safe_open
from safetensors.torch import load_file
from weight_files import noise

import caco_scale
from caco_scale.checkpoint.read import load_tensors
from caco_scale.checkpoint.state import State
from caco_scale.checkpoint.write import Checkpointer
from caco_scale.data.pixels import RGB8
from caco_scale.errors import UserError
from caco_scale.export import model_card
from caco_scale.export import write as export
from caco_scale.export.__main__ import main
from caco_scale.export.library_names import library_of, to_timm
from caco_scale.method.encoders import RESNETS, build_backbone
from caco_scale.weights.load import load_weights

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("export") / "run"
    save_run(folder, "resnet18", "imagenet", numbers=(10, 20))
    return folder


@pytest.mark.parametrize("which", ["query", "key"])
@pytest.mark.parametrize("file_format", ["torchvision", "safetensors"])
def test_torchvision_loads_the_file_and_gives_the_trained_features(run, tmp_path, file_format, which):
    main([str(run), "--to", str(tmp_path / "w"), "--format", file_format, "--which", which])
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


@pytest.mark.parametrize(
    ("name", "file_format"),
    [("w.safetensors", "safetensors"), ("w.pth", "torchvision"), ("w", "huggingface")],
)
def test_the_name_of_the_file_says_the_format(run, tmp_path, capsys, name, file_format):
    main([str(run), "--to", str(tmp_path / name)])
    assert f"MB, {file_format})" in capsys.readouterr().out
    assert (tmp_path / name).is_dir() == (file_format == "huggingface")


def test_a_torch_file_of_a_timm_backbone_is_timms(tmp_path):
    save_run(tmp_path / "run", "timm/test_vit")
    assert export.export(tmp_path / "run", tmp_path / "w.pth")["format"] == "timm"


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


# What a script with one library alone must load: (format, architecture, stem, the file's name).
EXPORTS = {
    "torchvision": [
        ("torchvision", "resnet18", "imagenet", "a.pth"),
        ("torchvision", "resnet18", "cifar", "b.pth"),
        ("safetensors", "resnet18", "cifar", "c.safetensors"),
    ],
    "timm": [
        ("timm", "resnet18", "imagenet", "d.pth"),
        ("timm", "resnet18", "cifar", "e.safetensors"),
        ("timm", "vit_b_16", "imagenet", "f.safetensors"),
    ],
    "torchvision's ViT": [("torchvision", "vit_b_16", "imagenet", "g.pth")],
}

# Runs the lines that the model cards give; what it knows of this project is nothing.
STRANGER = """
import json, sys, torch
for name, code in json.load(open("cards.json")).items():
    scope = {}
    exec(code, scope)
    images = torch.load(f"{name}.images", weights_only=True)
    with torch.no_grad():
        torch.save(scope["model"].eval()(images), f"{name}.features")
assert not any(module.split(".")[0] in ("caco_scale", sys.argv[1]) for module in sys.modules)
"""


@pytest.fixture(scope="module")
def backbones(tmp_path_factory):
    """(arch, stem) -> (a run's directory, its query backbone), made when it is first asked for."""
    folder, made = tmp_path_factory.mktemp("backbones"), {}

    def get(arch, stem):
        path = folder / f"{arch}-{stem}"
        if (arch, stem) not in made:
            vit = arch == "vit_b_16"
            backbone = save_vit(path) if vit else save_run(path, arch, stem).query.backbone.eval()
            made[arch, stem] = path, backbone
        return made[arch, stem]

    return get


@pytest.mark.parametrize(
    ("exports", "other"),
    [
        ("torchvision", "timm"),
        pytest.param("timm", "nothing else", marks=pytest.mark.long),
        pytest.param("torchvision's ViT", "timm", marks=pytest.mark.slow),
    ],
)
def test_the_lines_of_the_model_card_give_the_features_with_the_library_alone(
    backbones, exports, other, tmp_path
):
    if exports == "timm":
        pytest.importorskip("timm", reason="timm is not installed")
    cards, wanted = {}, {}
    for file_format, arch, stem, name in EXPORTS[exports]:
        run, backbone = backbones(arch, stem)
        export.export(run, tmp_path / name, file_format)
        cards[name] = re.search(r"```python\n(.*?)```", (tmp_path / f"{name}.md").read_text(), re.DOTALL)[1]
        images = torch.randn(2, 3, 32 if stem == "cifar" else 224, 32 if stem == "cifar" else 224)
        torch.save(images, tmp_path / f"{name}.images")
        with torch.no_grad():
            wanted[name] = backbone(images)
    (tmp_path / "cards.json").write_text(json.dumps(cards))
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "-c", STRANGER, other]
    done = subprocess.run(command, cwd=tmp_path, env=clean, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    for name, features in wanted.items():
        found = torch.load(tmp_path / f"{name}.features", weights_only=True)
        assert found.shape == features.shape
        assert (found - features).abs().max() <= 1e-5 * features.abs().max().clamp(min=1), name


def test_the_file_of_a_resnet_fits_torchvisions_detectors(backbones, tmp_path):
    export.export(backbones("resnet18", "imagenet")[0], tmp_path / "w.pth", "torchvision")
    body = torchvision.models.detection.backbone_utils.resnet_fpn_backbone(
        backbone_name="resnet18", weights=None, trainable_layers=5
    ).body
    keys = body.load_state_dict(torch.load(tmp_path / "w.pth", weights_only=True))
    assert not keys.missing_keys


@pytest.mark.parametrize("arch", [*RESNETS, "vit_b_16"])
def test_timm_has_every_backbone_under_the_same_shapes(arch):
    timm = pytest.importorskip("timm", reason="timm is not installed")
    with torch.device("meta"):
        state = build_backbone(arch)[0].state_dict()
        model = timm.create_model("vit_base_patch16_224" if arch == "vit_b_16" else arch, num_classes=0)
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert {name: tuple(tensor.shape) for name, tensor in to_timm(state, arch).items()} == wanted


@pytest.mark.parametrize("file_format", ["safetensors", "torchvision"])
def test_the_demos_own_resnet_loads_by_this_project_alone_and_the_card_says_so(tmp_path, file_format, capsys):
    model = save_run(tmp_path / "run", "tiny", "cifar")
    main([str(tmp_path / "run"), "--to", str(tmp_path / "w"), "--format", file_format])
    assert "loaded back into caco_scale's tiny, features equal bit for bit" in capsys.readouterr().out
    loaded, _ = build_backbone("tiny", "cifar")
    loaded.load_state_dict((load_file if file_format == "safetensors" else torch.load)(tmp_path / "w"))
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(loaded.eval()(images), model.query.backbone.eval()(images))
    assert 'model, _ = build_backbone("tiny", "cifar")' in (tmp_path / "w.md").read_text()


@pytest.mark.parametrize(
    ("arch", "file_format"), [("timm/test_vit", "timm"), ("own_nets:net", "safetensors")]
)
def test_a_backbone_of_timm_or_of_the_users_own_loads_by_what_built_it(tmp_path, arch, file_format):
    backbone = save_run(tmp_path / "run", arch).query.backbone.eval()
    export.export(tmp_path / "run", tmp_path / "w.safetensors", file_format, arch=arch)
    images = torch.randn(2, 3, 224, 224)  # what a run that says nothing has; test_vit's own is 160
    card = re.search(r"```python\n(.*?)```", (tmp_path / "w.safetensors.md").read_text(), re.DOTALL)[1]
    scope = {}
    exec(card.replace("w.safetensors", str(tmp_path / "w.safetensors")), scope)
    with torch.no_grad():
        wanted, found = backbone(images), scope["model"].eval()(images)
    found = found if found.ndim == 2 else found.mean(dim=(2, 3))
    assert (found - wanted).abs().max() <= 1e-5 * wanted.abs().max().clamp(min=1)

    if file_format == "safetensors":  # code of its own: no file may say that it is to run
        with pytest.raises(UserError, match=r"is the backbone of own_nets:net.*give --arch own_nets:net"):
            load_weights(tmp_path / "w.safetensors")
    again = load_weights(tmp_path / "w.safetensors", arch=arch)
    assert (again.arch, again.num_features) == (arch, wanted.shape[1])
    with torch.no_grad():
        assert torch.equal(again.backbone(images), wanted)
    with pytest.raises(UserError, match="torchvision has no model"):
        export.export(tmp_path / "run", tmp_path / "w.pth", "torchvision", arch=arch)


def test_timms_format_is_refused_for_a_model_whose_tensors_are_torchvisions_alone():
    with pytest.raises(UserError, match="timm has no convnext_tiny with torchvision's tensors"):
        library_of("convnext_tiny", "timm")
    assert library_of("convnext_tiny", "torchvision") == "torchvision"


def test_a_file_of_weights_is_exported_as_a_run_is(backbones, tmp_path):
    timm = pytest.importorskip("timm", reason="timm is not installed")
    _, backbone = backbones("resnet18", "imagenet")
    torch.save(
        {"state_dict": {f"module.encoder_q.{n}": t for n, t in backbone.state_dict().items()}},
        tmp_path / "moco",
    )
    export.export(tmp_path / "moco", tmp_path / "w.safetensors", "timm")
    model = timm.create_model(
        "resnet18", num_classes=0, checkpoint_path=str(tmp_path / "w.safetensors")
    ).eval()
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert (model(images) - backbone(images)).abs().max() < 1e-5 * backbone(images).abs().max()
    card = (tmp_path / "w.safetensors.md").read_text()
    assert "| source | MoCo v1 or v2, `moco` |" in card
    assert "| command | unknown |" in card


def test_the_model_card_says_what_how_and_how_good(tmp_path):
    run = tmp_path / "run"
    config = make_config(data__shards="/home/me/mine/train", data__val_shards="/home/me/mine/val")
    write_records(run, config, metrics_lines())
    save_checkpoint(run, trained_model("tiny", "cifar"), 32, epoch=4.0, num_samples=4096)
    save_checkpoint(run, trained_model("tiny", "cifar"), 8, epoch=1.0, num_samples=4096)
    write_results(run, step=32)
    export.export(run, tmp_path / "w.safetensors", "safetensors")
    card = (tmp_path / "w.safetensors.md").read_text()
    for words in (
        "| recipe | demo |",
        "# tiny, pre-trained without labels (caco)",
        "4 epochs, 32 steps (schedule: bank warm-up of 1 steps (until the bank is full), then 20 epochs; batch 16)",
        "; 32 pixels |",
        "`mine/train`, 4,096 images",
        "pretrain.py demo --run.dir",
        "| commit | abc1234 |",
        "k 20, T 0.2, step 32 | `mine/val` | 66.00% |",
        "untrained | `mine/val` | 20.00% |",
        "raw pixels, k 20, T 0.2 | `mine/val` | 25.50% |",
        "| kNN, backbone, k 10, T 0.07 | `/other/val` | 71.25% | 70.00 to 72.50 |",
        "| linear, lr 0.1 per 256 images | `/other/val` | 73.50% | 72.00 to 75.00 |",
        "features equal bit for bit",
    ):
        assert words in card, card
    assert "/home/me" not in card
    export.export(run, tmp_path / "early", "safetensors", step=8)  # before the first evaluation
    assert "None was measured" in (tmp_path / "early.md").read_text()


def save_vit(folder):
    """Backbone only: what export reads of a ViT run, without writing 1 GB of the rest -> the backbone."""
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
    backbone.load_state_dict({n.removeprefix("query.backbone."): t for n, t in tensors.items()}, assign=True)
    return backbone.eval()


def test_a_checkpoint_directory_and_a_float64_run(tmp_path):
    save_run(tmp_path / "run", numbers=(1, 2), dtype=torch.float64)
    path = tmp_path / "run" / "checkpoints" / "step_00000001"
    metadata = export.export(path, tmp_path / "w", "safetensors")
    assert metadata["step"] == "1"
    found = load_file(tmp_path / "w")["conv1.weight"]
    assert found.dtype == torch.float32
    assert torch.equal(found, load_tensors(path)["query.backbone.conv1.weight"].float())


def test_a_file_that_does_not_give_the_features_back_never_appears(run, tmp_path, monkeypatch):
    def write_rounded(path, state, metadata, container):
        torch.save({name: t.half().to(t.dtype) for name, t in state.items()}, path)

    monkeypatch.setattr(export, "_write", write_rounded)
    with pytest.raises(UserError, match="does not give the trained features back"):
        export.export(run, tmp_path / "w", "torchvision")
    assert os.listdir(tmp_path) == []


class Large(torch.nn.Module):
    """Large features; ``rough``: by a way whose last digits in float32 are lost."""

    def __init__(self, rough=False, weight=1.0):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor([weight]))
        self.rough = rough

    def forward(self, images):
        features = images.flatten(1).sum(1, keepdim=True) * self.weight * 1000
        return features + 1e9 - 1e9 if self.rough else features


def test_rounding_of_large_features_is_no_difference_of_weights():
    weights = SimpleNamespace(backbone=Large(), pixels=RGB8, size=32, config={}, arch="own:net")
    said = export._compared(Large(rough=True), weights, "")
    assert "in float64" in said, said
    with pytest.raises(UserError, match=r"does not give the trained features back .* in float64"):
        export._compared(Large(rough=True, weight=1.0001), weights, "")


def damage(name, data=None, cut=None):
    """A change of one file of the run's newest checkpoint: other bytes, cut to a length, or (neither) removed."""

    def change(run):
        path = run / "checkpoints/step_00000030" / name
        if data is None and cut is None:
            path.unlink()
        else:
            path.write_bytes(data if cut is None else path.read_bytes()[:cut])

    return change


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("exploded",)


def change_values(**changes):
    return lambda run: rewrite_values(run / "checkpoints/step_00000030", **changes)


def change_config(text):
    return lambda run: (run / "config.yaml").write_text(text)


def spoil(value, name="conv1.weight"):
    """A checkpoint of a run that has diverged."""

    def change(run):
        model = trained_model("tiny", "imagenet")
        with torch.no_grad():
            model.query.backbone.state_dict()[name].view(-1)[0] = value
        save_checkpoint(run, model, 31)

    return change


def remove_checkpoints(run):
    shutil.rmtree(run / "checkpoints")


def leave_half_a_checkpoint(run):
    (run / "checkpoints/step_00000030").rename(run / "checkpoints/step_00000030.tmp")


def model_config(arch, stem="imagenet"):
    return yaml.safe_dump({"recipe": "demo", "model": {"arch": arch, "stem": stem}})


# name: (what is done to the run, words of the command line, what the line says). RUN, TO and FORMAT stand for
# the run, a file to write and --format safetensors.
MISTAKES = {
    "no run": (None, "none TO FORMAT", "none does not exist"),
    "a file that holds no weights": (None, "mine TO FORMAT", "mine is no file of weights"),
    "a step of a file": (None, "mine TO FORMAT --step 3", "--step chooses one of a run's checkpoints"),
    "a name that no file can have": (None, f"{'x' * 300} TO FORMAT", "does not exist"),
    "a directory without a run": (None, "empty TO FORMAT", "no complete checkpoint in"),
    "no run at all": (None, "TO FORMAT", "give RUN_OR_WEIGHTS: python -m caco_scale.export --help"),
    "two runs": (None, "RUN RUN TO FORMAT", "unknown argument"),
    "no target": (None, "RUN FORMAT", "--to"),
    "a name that says no format": (
        None,
        "RUN --to w.onnx",
        "w.onnx: .onnx says no format: name it .safetensors",
    ),
    "an unknown format": (
        None,
        "RUN TO --format onnx",
        "--format is 'onnx': give one of safetensors, torchvision, timm, huggingface",
    ),
    "a detectron2 file": (
        None,
        "RUN TO --format detectron2",
        "--format is 'detectron2': give one of safetensors",
    ),
    "an unknown encoder": (None, "RUN TO FORMAT --which both", "--which is 'both': give one of query, key"),
    "a typo": (None, "RUN TO FORMAT --whihc key", "unknown flag --whihc (did you mean --which?)"),
    "an abbreviated flag": (None, "RUN TO FORMAT --forc", "unknown flag --forc (did you mean --force?)"),
    "a step that is no number": (None, "RUN TO FORMAT --step last", "--step is 'last', which is not int"),
    "a step that was not saved": (None, "RUN TO FORMAT --step 15", "no checkpoint of step 15"),
    "a step below zero": (None, "RUN TO FORMAT --step -1", "no checkpoint of step -1"),
    "another step than the checkpoint's": (
        *(None, "RUN/checkpoints/step_00000030 TO FORMAT --step 15", "is the checkpoint of step 30, not 15"),
    ),
    "an existing target": (None, "RUN --to mine FORMAT", "mine exists: give another name, or --force"),
    "an existing card": (None, "RUN --to carded FORMAT", "carded.md exists"),
    "a directory as target": (None, "RUN --to empty FORMAT", "is a directory"),
    "a target in no directory": (None, "RUN --to none/w FORMAT", "there is no directory"),
    "a target below a file": (None, "RUN --to mine/w FORMAT", "there is no directory"),
    "a device as target": (None, "RUN --to /dev/null FORMAT --force", "is no ordinary file"),
    "a torch file by a safetensors name": (
        *(None, "RUN --to w.safetensors --format torchvision", "format torchvision is a torch file"),
    ),
    "safetensors by a torch name": (None, "RUN --to w.pth FORMAT", "name it .safetensors"),
    "tiny for timm": (None, "RUN TO --format timm", "timm has no model tiny"),
    "no checkpoint": (remove_checkpoints, "RUN TO FORMAT", "no complete checkpoint in"),
    "half a checkpoint": (leave_half_a_checkpoint, "RUN TO FORMAT", "no complete checkpoint in"),
    "no values": (damage("values.json"), "RUN TO FORMAT", "it has no values.json"),
    "values cut": (damage("values.json", cut=40), "RUN TO FORMAT", "damaged: values.json"),
    "values empty": (damage("values.json", b""), "RUN TO FORMAT", "damaged: values.json"),
    "values are a list": (damage("values.json", b"[]"), "RUN TO FORMAT", "damaged: values.json"),
    "a newer format": (change_values(format=99), "RUN TO FORMAT", "has format 99"),
    "no table of contents": (damage(".metadata"), "RUN TO FORMAT", ".metadata"),
    "a table cut": (damage(".metadata", cut=100), "RUN TO FORMAT", "damaged: .metadata"),
    "a pickle bomb": (damage(".metadata", pickle.dumps(Bomb())), "RUN TO FORMAT", ".metadata"),
    "no tensors": (damage("__0_0.distcp"), "RUN TO FORMAT", "damaged: __0_0.distcp: missing"),
    "tensors cut": (damage("__0_0.distcp", cut=1000), "RUN TO FORMAT", "damaged: __0_0.distcp: 1000 of"),
    "tensors empty": (damage("__0_0.distcp", b""), "RUN TO FORMAT", "damaged: __0_0.distcp"),
    "a weight that is NaN": (
        spoil(float("nan")),
        "RUN TO FORMAT",
        "tensors are not finite (conv1.weight)",
    ),
    "a buffer that is infinite": (
        *(
            spoil(float("inf"), "bn1.running_var"),
            "RUN TO FORMAT",
            "tensors are not finite (bn1.running_var)",
        ),
    ),
    "no config": (lambda run: (run / "config.yaml").unlink(), "RUN TO FORMAT", "no readable config.yaml"),
    "a config that is no YAML": (change_config("{"), "RUN TO FORMAT", "no readable config.yaml"),
    "a config that is a list": (change_config("[1]"), "RUN TO FORMAT", "does not name model.arch"),
    "a config without a model": (change_config("recipe: demo"), "RUN TO FORMAT", "does not name model.arch"),
    "an unknown architecture": (
        change_config(model_config("resnet5")),
        "RUN TO FORMAT",
        "did you mean resnet50",
    ),
    "an unknown stem": (change_config(model_config("tiny", "none")), "RUN TO FORMAT", "no stem 'none'"),
    "another architecture": (
        *(change_config(model_config("resnet18")), "RUN TO FORMAT", "does not hold a whole resnet18"),
    ),
}


@pytest.fixture(scope="module")
def tiny_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny") / "run"
    save_run(folder)
    return folder


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line(tiny_run, tmp_path, capsys, monkeypatch, name):
    fault, words, message = MISTAKES[name]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").write_text("mine")
    (tmp_path / "carded.md").write_text("mine")
    (tmp_path / "empty").mkdir()
    run = tiny_run
    if fault:
        run = tmp_path / "run"
        shutil.copytree(tiny_run, run)
        fault(run)
    words = words.replace("RUN", str(run)).replace("TO", "--to w").replace("FORMAT", "--format safetensors")
    with pytest.raises(SystemExit) as caught:
        main(words.split())
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert message in error
    left = {"mine", "carded.md", "empty"} | ({"run"} if fault else set())
    assert set(os.listdir(tmp_path)) == left
    assert (tmp_path / "mine").read_text() == "mine"


def test_without_timm_the_line_says_what_to_install(run, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(UserError, match=r"pip install timm"):
        export.export(run, tmp_path / "w", "timm")


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
    done = finished(command, tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("wrote w.safetensors (")
    assert "query backbone tiny (stem imagenet) of step 30; loaded back into caco_scale's tiny" in done.stdout
    assert "and w.safetensors.md" in done.stdout
    assert "conv1.weight" in load_file(tmp_path / "w.safetensors")


# timm alone: its model and its own transform of an image's pixels; what it knows of this project is nothing.
TIMM_ALONE = """
import sys, timm, torch
from PIL import Image
for name in sys.argv[1:]:
    model = timm.create_model(f"local-dir:{name}", pretrained=True, num_classes=0).eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    with torch.no_grad():
        torch.save(model(transform(Image.open("image.png").convert("RGB"))[None]), f"{name}.features")
assert not any(module.split(".")[0] == "caco_scale" for module in sys.modules)
"""


@pytest.mark.parametrize(("arch", "channels"), [("resnet18", 1), ("timm/test_vit", 5)])
def test_a_hugging_face_directory_for_other_than_three_channels_is_timms_own_model(tmp_path, arch, channels):
    built = noise(build_backbone(arch, channels=channels)[0], 3)
    torch.save(built.state_dict(), tmp_path / "bare.pth")
    export.export(tmp_path / "bare.pth", tmp_path / "hub", "huggingface", arch=arch)
    model = timm.create_model(f"local-dir:{tmp_path / 'hub'}", pretrained=True, num_classes=0).eval()
    again = load_weights(tmp_path / "hub")
    assert again.pixels.channels == channels
    assert not again.says_bits  # nor did the file that it is of
    assert again.mean == again.std == (0.5,) * channels
    size = again.size if "vit" in arch else 64
    images = torch.randn(2, channels, size, size)
    with torch.no_grad():
        wanted = built(images)
        for found in (model(images), again.backbone(images)):
            assert (found - wanted).abs().max() <= 1e-5 * wanted.abs().max().clamp(min=1)


@pytest.mark.long
def test_a_hugging_face_directory_is_timms_own_model_and_transform(tmp_path, monkeypatch):
    from test_weights import save_run as save_seen  # 32 of 40 pixels, mean and deviation of its own

    monkeypatch.chdir(tmp_path)
    pixels = np.random.default_rng(0).integers(0, 256, (40, 52, 3), dtype=np.uint8)
    Image.fromarray(pixels).save("image.png")
    names = {"vit": "timm/test_vit", "resnet": "resnet18"}
    wanted = {}
    for name, arch in names.items():
        save_seen(tmp_path / f"{name}-run", arch, "imagenet")
        main([f"{name}-run", "--to", name, "--format", "huggingface", "--which", "key"])
        assert sorted(os.listdir(name)) == ["README.md", "config.json", "model.safetensors"]
        again = caco_scale.load_backbone(name)
        assert (again.size, again.resize, again.std) == (32, 40, (0.2, 0.3, 0.4))
        with torch.no_grad():
            wanted[name] = again(again.prepare("image.png")[None])
            source = load_weights(f"{name}-run", "key").backbone(again.prepare("image.png")[None])
        assert torch.allclose(source, wanted[name], rtol=0, atol=1e-5 * float(source.abs().max()))
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {
        "HF_HUB_OFFLINE": "1"
    }
    done = subprocess.run(
        [sys.executable, "-c", TIMM_ALONE, *names],
        cwd=tmp_path,
        env=clean,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    for name, features in wanted.items():
        found = torch.load(f"{name}.features", weights_only=True)
        assert (found - features).abs().max() <= 1e-5 * features.abs().max().clamp(min=1), name
    card = Path("vit/README.md").read_text()
    assert card.startswith("---\nlibrary_name: timm\n")
    assert 'timm.create_model("local-dir:vit", pretrained=True, num_classes=0)' in card
    with pytest.raises(UserError, match="vit exists: give another name, or --force"):
        export.export("vit-run", "vit", "huggingface")
    export.export("vit-run", "vit", "huggingface", force=True)
    with pytest.raises(UserError, match="exists and is no such directory"):
        export.export("vit-run", "vit-run", "huggingface", force=True)
    save_run(tmp_path / "small", "resnet18", "cifar")
    with pytest.raises(UserError, match=r"with the stem cifar by a config.json: use --format timm"):
        export.export("small", "x", "huggingface")
    assert not [name for name in os.listdir() if ".tmp" in name or ".old" in name]


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["/home/ada/venv/bin/caco", "pretrain", "demo"], "caco pretrain demo"),
        (
            ["/x/caco_scale/pretrain.py", "--data.shards", "my set"],
            "python -m caco_scale.pretrain --data.shards 'my set'",
        ),
        (["/x/caco_scale/__main__.py", "pretrain"], "python -m caco_scale pretrain"),
        (["/home/ada/train.py", "7"], "train.py 7"),
    ],
)
def test_a_card_names_the_command_as_it_is_typed(words, line):
    """Not where the program lies on its user's machine."""
    assert model_card._command(words) == line
