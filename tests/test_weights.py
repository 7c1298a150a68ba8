"""RUN_OR_WEIGHTS: the formats of others give their own model's features, and what is wrong is one line."""

import argparse
import pickle
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torchvision
from safetensors.torch import save_file
from torch.nn import functional as F
from weight_files import (
    Bomb,
    authors_checkpoint,
    dino_checkpoint,
    encoder,
    moco_v2_checkpoint,
    moco_v3_checkpoint,
    noise,
    torchvision_state,
    under,
)

from caco_scale.checkpoint.state import State
from caco_scale.checkpoint.write import Checkpointer
from caco_scale.data.pixels import Pixels
from caco_scale.errors import UserError
from caco_scale.evaluate.task import Task, _introduce
from caco_scale.export import write as export
from caco_scale.export.__main__ import main
from caco_scale.method.encoders import ARCHITECTURES, build_backbone
from caco_scale.method.model import Encoder, QueryKeyModel
from caco_scale.weights.load import load_weights
from caco_scale.weights.recognise import find_architecture, split_heads, timm_vit_renamed


def images(size=64):
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(5))


def features(module, size=64):
    with torch.no_grad():
        return module(images(size))


@pytest.fixture(scope="module")
def pair():
    """Two ResNet-18 encoders with projectors, one for the query and one for the key."""
    return encoder(seed=1), encoder(seed=2)


def save(content, path):
    torch.save(content, path)
    return path


def test_a_checkpoint_of_the_authors_gives_both_encoders_and_the_projector(pair, tmp_path):
    path = save(authors_checkpoint(*pair), tmp_path / "caco.pth.tar")
    for which, model in zip(("query", "key"), pair, strict=True):
        weights = load_weights(path, which=which)
        assert (weights.kind, weights.encoder) == ("checkpoint of CaCo's authors", which)
        assert (weights.arch, weights.stem, weights.num_features) == ("resnet18", "imagenet", 512)
        assert torch.equal(features(weights.backbone), features(model.backbone))
        assert torch.equal(features(Encoder(weights.backbone, weights.projector)), features(model))
    assert {"Memory_Bank", "optimizer", "epoch"} < set(weights.unmatched)
    assert "encoder_q.conv1.weight" in weights.unmatched
    assert load_weights(path).encoder == "query"


def test_moco_v2_gives_its_backbone_and_names_its_head(pair, tmp_path):
    weights = load_weights(save(moco_v2_checkpoint(pair[0]), tmp_path / "moco.pth"))
    assert weights.kind == "MoCo v1 or v2"
    assert torch.equal(features(weights.backbone), features(pair[0].backbone))
    assert weights.projector is None
    assert {"fc.0.weight", "fc.0.bias", "fc.2.weight", "fc.2.bias"} < set(weights.unmatched)


@pytest.mark.parametrize("which", ["query", "key"])
def test_moco_v3_gives_either_encoder(pair, tmp_path, which):
    weights = load_weights(save(moco_v3_checkpoint(*pair), tmp_path / "moco3.pth"), which=which)
    assert weights.kind == "MoCo v3"
    assert torch.equal(features(weights.backbone), features(pair[which == "key"].backbone))
    assert "predictor.0.weight" in weights.unmatched


def test_dino_gives_the_teacher_unless_the_student_is_asked_for(pair, tmp_path):
    path = save(dino_checkpoint(*pair), tmp_path / "dino.pth")
    teacher, student = load_weights(path), load_weights(path, which="query")
    assert (teacher.kind, teacher.encoder, student.encoder) == ("DINO", "key", "query")
    assert torch.equal(features(teacher.backbone), features(pair[1].backbone))
    assert torch.equal(features(student.backbone), features(pair[0].backbone))
    assert "head.mlp.0.weight" in teacher.unmatched


def test_dino_backbone_alone_and_numpy_numbers_beside_it(pair, tmp_path):
    content = {"state_dict": pair[0].backbone.state_dict(), "top1": np.float64(75.3), "best": np.int64(3)}
    weights = load_weights(save(content, tmp_path / "dino_resnet50_pretrain.pth"))
    assert torch.equal(features(weights.backbone), features(pair[0].backbone))
    assert weights.unmatched == ("top1", "best")


@pytest.mark.parametrize("arch", ["resnet18", "resnet34", "resnext50_32x4d"])
def test_torchvision_is_recognised_by_its_shapes(arch, tmp_path):
    model = torchvision_state(arch)
    weights = load_weights(save(model.state_dict(), tmp_path / "tv.pth"))
    assert (weights.arch, weights.stem) == (arch, "imagenet")
    assert weights.unmatched == ("fc.weight", "fc.bias")
    model.fc = torch.nn.Identity()
    assert torch.equal(features(weights.backbone), features(model))


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_backbone_is_taken_for_itself(arch):
    """A deeper one holds all tensors of a shallower one, and must not be cut down to it."""
    with torch.device("meta"):
        state = build_backbone(arch)[0].state_dict()
    assert find_architecture(Path("w"), state, None, None)[0] == arch


VIT = "vit_base_patch16_224"
# Models of timm with all that a backbone of ours has and more: (name, options, a tensor that is named, whose it is).
WITH_MORE_PARTS = [
    ("seresnet18", {}, "layer1.0.se.fc1.{weight, bias}", "timm's seresnet18"),
    ("seresnext50_32x4d", {}, "layer4.2.se.fc2.{weight, bias}", "timm's seresnext50_32x4d"),
    ("resnet18", {"block_args": {"attn_layer": "eca"}}, "layer1.0.se.conv.weight", "ecaresnet"),
    ("resnet18", {"block_args": {"attn_layer": "gc"}}, "layer1.0.se.conv_attn", "gcresnet"),
    ("resnet200", {}, "layer2.8.conv1.weight", "more blocks"),
    ("resnext101_32x4d", {}, "layer3.6.conv1.weight", "more blocks"),
    (VIT, {"init_values": 1e-5}, "blocks.11.ls2.gamma", "LayerScale"),
    (VIT, {"qk_norm": True}, "blocks.0.attn.q_norm.{weight, bias}", "qk_norm"),
    (VIT, {"scale_mlp_norm": True}, "blocks.0.mlp.norm.{weight, bias}", "norms within attention or MLP"),
    (VIT, {"reg_tokens": 4, "no_embed_class": True}, "reg_token", "registers"),
    (VIT, {"pre_norm": True}, "norm_pre.{weight, bias}", "CLIP"),
    (VIT, {"fc_norm": True}, "fc_norm.{weight, bias}", "another pooling"),
    (VIT, {"global_pool": "map"}, "attn_pool.", "another pooling"),
]


@pytest.mark.parametrize(("name", "options", "tensor", "whose"), WITH_MORE_PARTS)
def test_a_tensor_inside_the_backbone_that_would_not_be_used_is_an_error(name, options, tensor, whose):
    with torch.device("meta"):
        state = timm.create_model(name, **options).state_dict()
    backbone, heads = split_heads(timm_vit_renamed(state))
    assert set(heads) <= {f"{head}.{kind}" for head in ("fc", "head") for kind in ("weight", "bias")}
    with pytest.raises(UserError) as caught:
        find_architecture(Path("w"), backbone, None, None)
    assert tensor in str(caught.value)
    assert whose in str(caught.value)
    assert "\n" not in str(caught.value)


def test_parts_left_out_are_refused_in_a_file_and_by_export(tmp_path):
    path = save(noise(timm.create_model("seresnet18"), 3).state_dict(), tmp_path / "se.pth")
    for arch in (None, "resnet18"):
        with pytest.raises(UserError, match=r"layer1.0.se.fc1.*timm's seresnet18"):
            load_weights(path, arch=arch)
    with pytest.raises(UserError, match=r"layer1.0.se.fc1"):
        export.export(path, tmp_path / "w.pth", "torchvision")
    assert not (tmp_path / "w.pth").exists()


def test_another_of_our_backbones_than_asked_for_is_named(tmp_path):
    path = save(torchvision_state("resnet34").state_dict(), tmp_path / "w.pth")
    with pytest.raises(UserError, match=r"it is a resnet34 .stem imagenet.: give --arch resnet34"):
        load_weights(path, arch="resnet18")


def test_a_checkpoint_that_names_a_model_with_the_same_tensors_is_refused(tmp_path):
    state = noise(timm.create_model("resnetblur18"), 3).state_dict()
    for said in ({"arch": "resnetblur18"}, {"args": argparse.Namespace(model="resnetaa50.a1h_in1k")}):
        path = save({**said, "state_dict": state}, tmp_path / "w.pth")
        with pytest.raises(UserError, match="has an ordinary ResNet's tensors and other layers"):
            load_weights(path)
    assert load_weights(path, arch="resnet18").arch == "resnet18"


def test_a_segmenters_backbone_may_be_dilated_and_is_refused(tmp_path):
    model = torchvision.models.get_model("fcn_resnet50", weights=None, weights_backbone=None)
    with pytest.raises(UserError, match=r"below convolutions .classifier.0.weight.*dilated"):
        load_weights(save(model.state_dict(), tmp_path / "w.pth"))


def test_the_parts_beside_a_backbone_are_listed(tmp_path):
    state = torchvision_state().state_dict()
    beside = ("projection_head.0.weight", "prototypes.weight", "predictor.0.bias", "queue", "n_averaged")
    content = {
        "model": {**state, **{name: torch.zeros(2) for name in beside}},
        "model_ema": state,
        "epoch": 3,
    }
    weights = load_weights(save(content, tmp_path / "w.pth"))
    assert set(weights.unmatched) == {"fc.weight", "fc.bias", *beside, "model_ema", "epoch"}
    with pytest.raises(UserError, match=r"not in it: normalise\.mean"):
        load_weights(save({**state, "normalise.mean": torch.zeros(3)}, tmp_path / "w.pth"))


def test_torchs_older_file_format_and_missing_batch_counts(tmp_path):
    model = torchvision_state()
    state = {name: t for name, t in model.state_dict().items() if not name.endswith("num_batches_tracked")}
    torch.save(state, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    weights = load_weights(tmp_path / "old.pth")
    model.fc = torch.nn.Identity()
    assert torch.equal(features(weights.backbone), features(model))


def test_timm_resnet_and_half_precision(tmp_path):
    torch.manual_seed(0)
    model = noise(timm.create_model("resnet18"), 3)
    path = tmp_path / "timm.safetensors"
    save_file(
        {name: t.half() if t.is_floating_point() else t for name, t in model.state_dict().items()}, path
    )
    weights = load_weights(path)
    model.reset_classifier(0)
    assert weights.backbone.conv1.weight.dtype == torch.float32
    assert F.cosine_similarity(features(weights.backbone), features(model)).min() > 0.999


def test_a_vit_by_timms_names_as_moco_v3_has_it_is_torchvisions(tmp_path):
    torch.manual_seed(0)
    model = noise(timm.create_model("vit_base_patch16_224", num_classes=7), 3)
    content = {"state_dict": under(model.state_dict(), "module.base_encoder.")}
    weights = load_weights(save(content, tmp_path / "vit.pth"))
    assert (weights.kind, weights.arch, weights.num_features) == ("MoCo v3", "vit_b_16", 768)
    assert set(weights.unmatched) == {"head.weight", "head.bias"}
    model.reset_classifier(0)
    assert torch.allclose(features(weights.backbone, 224), features(model, 224), atol=2e-5)


def save_run(folder, arch="tiny", stem="cifar"):
    """A run's checkpoint of two random encoders -> the model."""
    model = QueryKeyModel(encoder(arch, stem))
    noise(model.key, 9)
    views = {"size": 32, "mean": [0.5, 0.4, 1 / 3], "std": [0.2, 0.3, 0.4]}
    model_config = {"arch": arch, "stem": stem}
    config = {"recipe": "demo", "model": model_config, "views": views, "eval": {"resize": 40}}
    tensors = {}
    for side in ("query", "key"):
        module = getattr(model, side)
        tensors |= {f"{side}.{name}": p for name, p in module.named_parameters()}
        tensors |= {f"{side}_buffer.{name}": b for name, b in module.named_buffers()}
    checkpointer = Checkpointer(folder / "checkpoints")
    for step in (10, 20):
        checkpointer.save(
            step, State(tensors, {"step": step, "epoch": step / 2, "config": config}), wait=True
        )
    return model.eval()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights") / "run"
    return folder, save_run(folder)


def test_a_run_and_one_of_its_checkpoints(run):
    folder, model = run
    weights = load_weights(folder, which="key")
    assert torch.equal(features(weights.backbone), features(model.key.backbone))
    assert torch.equal(features(Encoder(weights.backbone, weights.projector)), features(model.key))
    assert (weights.size, weights.mean, weights.std) == (32, (0.5, 0.4, 1 / 3), (0.2, 0.3, 0.4))
    assert (weights.metadata["step"], weights.unmatched) == (20, ())
    assert load_weights(folder, step=10).metadata["step"] == 10
    assert load_weights(folder / "checkpoints/step_00000010").encoder == "query"


@pytest.mark.parametrize("which", ["query", "key"])
@pytest.mark.parametrize("file_format", ["safetensors", "torchvision"])
def test_our_own_exports_forget_nothing(run, tmp_path, file_format, which):
    folder, model = run
    export.export(folder, tmp_path / "w", file_format, which)
    weights = load_weights(tmp_path / "w")
    assert (weights.kind, weights.encoder) == ("export of caco_scale", which)
    assert (weights.arch, weights.stem) == ("tiny", "cifar")
    assert (weights.size, weights.mean, weights.std) == (32, (0.5, 0.4, 1 / 3), (0.2, 0.3, 0.4))
    assert (weights.resize, weights.assumed) == (40, ())
    assert weights.metadata == {"recipe": "demo", "step": "20", "epoch": "10.0", "git_commit": ""}
    assert torch.equal(features(weights.backbone), features(getattr(model, which).backbone))
    assert weights.sha256 == load_weights(folder, which).sha256
    other = {"query": "key", "key": "query"}[which]
    with pytest.raises(UserError, match=f"holds the {which} encoder: drop --which {other}"):
        load_weights(tmp_path / "w", which=other)
    assert load_weights(tmp_path / "w", which=which).encoder == which
    export.export(tmp_path / "w", tmp_path / "again.safetensors", "safetensors")
    again = load_weights(tmp_path / "again.safetensors")
    assert (again.encoder, again.size, again.std) == (which, 32, (0.2, 0.3, 0.4))


@pytest.mark.parametrize("name", ["w.pth", "w.safetensors"])
def test_an_export_for_timm_forgets_nothing(tmp_path, name):
    model = save_run(tmp_path / "run", "resnet18", "imagenet")
    export.export(tmp_path / "run", tmp_path / name, "timm", "key")
    weights = load_weights(tmp_path / name)
    assert (weights.encoder, weights.size, weights.mean) == ("key", 32, (0.5, 0.4, 1 / 3))
    loaded = timm.create_model("resnet18", num_classes=0, checkpoint_path=str(tmp_path / name)).eval()
    with torch.no_grad():
        assert torch.allclose(loaded(images()), model.key.backbone(images()), atol=1e-4)


def test_what_a_file_does_not_say_is_assumed_and_said(tmp_path, capsys):
    path = save(torchvision_state().state_dict(), tmp_path / "tv.pth")
    weights = load_weights(path)
    assert (weights.encoder, weights.size, weights.assumed) == ("single", 224, ("size", "mean", "std"))
    for which in ("query", "key"):
        with pytest.raises(UserError, match="holds one encoder without saying whose: drop --which"):
            load_weights(path, which=which)
    main([str(path), "--to", str(tmp_path / "w.pth"), "--format", "torchvision"])
    output = capsys.readouterr().out
    assert "not used: fc.* (2)" in output
    assert "does not say the size, mean, std of its images" in output
    assert "features equal bit for bit to those of the backbone as it was read" in output
    card = (tmp_path / "w.pth.md").read_text()
    assert card.startswith("# resnet18, from state dict of torchvision's names\n")
    for words in (
        "| encoder | the file's only backbone, it does not say whose, without",
        "| not used of it | fc.* (2) |",
        "224 pixels; the source does not say its size, mean, std: assumed |",
        "| licence | not stated",
    ):
        assert words in card, card
    assert "without labels" not in card
    again = load_weights(tmp_path / "w.pth")
    assert (again.encoder, again.assumed) == ("single", ("size", "mean", "std"))
    stem = load_weights(save(build_backbone("resnet18", "cifar")[0].state_dict(), tmp_path / "cifar.pth"))
    assert (stem.size, stem.assumed) == (32, ("size", "mean", "std"))


@pytest.mark.parametrize(("arch", "channels"), [(None, 1), (None, 5), ("timm/test_vit", 2)])
def test_the_first_layer_of_bare_weights_says_for_how_many_channels_they_are(tmp_path, arch, channels):
    built = build_backbone(arch or "resnet18", "imagenet", channels=channels)[0]
    torch.save(noise(built, 3).state_dict(), tmp_path / "bare.pth")
    weights = load_weights(tmp_path / "bare.pth", arch=arch)
    assert weights.pixels == Pixels(channels)
    assert weights.mean == weights.std == (0.5,) * channels
    assert {"mean", "std"} <= set(weights.assumed)
    images = torch.randn(2, channels, 160, 160)
    with torch.no_grad():
        assert torch.equal(weights.backbone(images), built(images))


def test_an_evaluation_says_what_it_assumes_unless_it_was_told(tmp_path, capsys):
    weights = load_weights(save(torchvision_state().state_dict(), tmp_path / "w.pth"))
    accelerator: Any = SimpleNamespace(is_main_process=True, num_processes=1, device=torch.device("cpu"))
    manifest = SimpleNamespace(num_samples=4, classes=["a", "b"], class_counts=[2, 2])
    store: Any = SimpleNamespace(url="set", manifest=manifest, unchecked="", fingerprint=object)
    images: Any = {"size": 224, "resize": 256, "mean": weights.mean, "std": (1.0, 1.0, 1.0)}
    rest: Any = {"dtype": torch.float32, "autocast_dtype": None, "images_at_once": 1, "workers": 0, "seed": 0}
    task = Task(accelerator=accelerator, weights=weights, train=store, val=store, **images, **rest)
    _introduce(task, SimpleNamespace(size=None, mean=None, std=(1.0, 1.0, 1.0)))
    words = capsys.readouterr().out
    assert "size 224, mean 0.485, 0.456, 0.406; --size, --mean give others" in words
    assert "single encoder of" in words
    assert "in the file but not used: fc.* (2)" in words


def test_the_metadata_of_an_export_say_what_images_it_wants(run, tmp_path):
    state = run[1].query.backbone.state_dict()
    metadata = {"arch": "tiny", "stem": "cifar", "size": "32", "mean": "0.5 0.4 0.3", "std": "0.2 0.3 0.4"}
    save_file(state, tmp_path / "w", metadata=metadata)
    weights = load_weights(tmp_path / "w")
    assert (weights.size, weights.mean, weights.std) == (32, (0.5, 0.4, 0.3), (0.2, 0.3, 0.4))
    for wrong in (
        *({"mean": "grey"}, {"std": "0.1 0.2"}, {"std": "0 1 1"}, {"mean": "nan 0 0"}),
        *({"size": "0"}, {"size": str(10**9)}, {"size": "9" * 5000}, {"size": "wide"}, {"resize": "-1"}),
    ):
        save_file(state, tmp_path / "w", metadata={**metadata, **wrong})
        with pytest.raises(UserError, match="metadata are damaged"):
            load_weights(tmp_path / "w")


def test_a_cifar_stem_is_told_from_an_imagenet_one(tmp_path):
    state = noise(build_backbone("resnet18", "cifar")[0], 4).state_dict()
    weights = load_weights(save(state, tmp_path / "w"))
    assert (weights.arch, weights.stem) == ("resnet18", "cifar")


def test_nothing_of_a_pickle_bomb_is_run(pair, tmp_path):
    harmless = authors_checkpoint(*pair)
    bombs = {
        "zip": lambda path, bomb: torch.save({**harmless, "epoch": bomb}, path),
        "legacy": lambda path, bomb: torch.save(bomb, path, _use_new_zipfile_serialization=False),
        "pickle": lambda path, bomb: path.write_bytes(pickle.dumps(bomb)),
    }
    for name, write in bombs.items():
        write(tmp_path / name, Bomb(tmp_path / "exploded"))
        with pytest.raises(UserError) as caught:
            load_weights(tmp_path / name)
        assert "nothing of it was run" in str(caught.value), name
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "exploded").exists()


def cut(path, share):
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])


def hostile(path, pair, kind):
    """Write the file ``kind`` of :data:`HOSTILE` to ``path``."""
    state = pair[0].backbone.state_dict()
    if kind == "text":
        path.write_text("weights\n")
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind in ("half zip", "most of a zip"):
        cut(save(authors_checkpoint(*pair), path), 0.5 if kind == "half zip" else 0.99)
    elif kind == "half legacy":
        torch.save(state, path, _use_new_zipfile_serialization=False)
        cut(path, 0.5)
    elif kind == "half safetensors":
        save_file(state, path)
        cut(path, 0.5)
    elif kind == "header of safetensors":
        path.write_bytes((1 << 62).to_bytes(8, "little") + b"{}")
    elif kind == "flipped byte":
        save(state, path)
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    elif kind == "other zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("a.txt", "a")
    elif kind == "tensor":
        save(torch.zeros(3), path)
    elif kind == "list":
        save([torch.zeros(3)], path)
    elif kind == "whole module":
        save(pair[0].backbone, path)
    elif kind == "no tensors":
        save({"epoch": 3, "arch": "resnet18"}, path)
    elif kind == "empty dict":
        save({}, path)
    elif kind == "other model":
        save(torch.nn.Linear(3, 4).state_dict(), path)
    elif kind == "half a state dict":
        save(dict(list(state.items())[:60]), path)
    elif kind == "one missing":
        save({name: t for name, t in state.items() if name != "layer3.0.bn1.running_mean"}, path)
    elif kind == "wrong shape":
        save({**state, "layer2.0.conv1.weight": torch.zeros(64, 64, 3, 3)}, path)
    elif kind == "NaN":
        save({**state, "layer4.1.bn2.bias": torch.full((512,), float("nan"))}, path)
    elif kind == "infinite buffer":
        save({**state, "bn1.running_var": torch.full((64,), float("inf"))}, path)
    elif kind == "integers":
        save({**state, "conv1.weight": state["conv1.weight"].to(torch.int8)}, path)
    elif kind == "sparse":
        save({**state, "conv1.weight": state["conv1.weight"].to_sparse()}, path)
    elif kind == "complex":
        save({**state, "conv1.weight": state["conv1.weight"].to(torch.complex64)}, path)
    elif kind == "huge view":
        save({**state, "conv1.weight": torch.zeros(1).expand(2**45)}, path)
    elif kind == "only a key encoder":
        save({"state_dict": under(state, "module.encoder_k.")}, path)
    elif kind == "teacher without tensors":
        save({"teacher": {"epoch": 3}}, path)
    elif kind == "ViT-S":
        vit = timm.create_model("vit_small_patch16_224", depth=12)
        save(vit.state_dict(), path)


HOSTILE = {
    "text": "neither safetensors nor torch.save",
    "empty": "is empty",
    "half zip": "cut or damaged",
    "most of a zip": "cut or damaged",
    "half legacy": "cut or damaged",
    "half safetensors": "damaged safetensors",
    "header of safetensors": "damaged safetensors",
    "flipped byte": "checksum of",
    "other zip": "cut or damaged",
    "tensor": "holds a Tensor, not a state dict",
    "list": "holds a list, not a state dict",
    "whole module": "more than tensors",
    "no tensors": "no tensors by name but epoch, arch",
    "empty dict": "no tensors by name but nothing",
    "other model": "not in it: weight, bias",
    "half a state dict": "nearest is resnet18 .stem imagenet., but missing: ",
    "one missing": "missing: layer3.0.bn1.running_mean",
    "wrong shape": r"layer2.0.conv1.weight \(64, 64, 3, 3\) instead of \(128, 64, 3, 3\)",
    "NaN": r"1 of 120 tensors are not finite \(layer4.1.bn2.bias\)",
    "infinite buffer": r"not finite \(bn1.running_var\)",
    "integers": "conv1.weight is torch.int8",
    "sparse": "no plain dense tensor",
    "complex": "no plain dense tensor",
    "huge view": r"conv1.weight \(35184372088832,\) instead",
    "only a key encoder": "holds no query encoder .*--which key",
    "teacher without tensors": "no tensors by name",
    "ViT-S": "nearest is vit_b_16",
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_or_wrong_file_is_one_line(kind, pair, tmp_path):
    hostile(tmp_path / "w.pth", pair, kind)
    with pytest.raises(UserError, match=HOSTILE[kind]) as caught:
        load_weights(tmp_path / "w.pth")
    assert "\n" not in str(caught.value)


def test_every_unmatched_key_is_named(tmp_path):
    state = torchvision_state().state_dict()
    half = {name: t for name, t in state.items() if not name.startswith("layer4.1.")}
    with pytest.raises(UserError) as caught:
        load_weights(save({**half, "mine.weight": torch.zeros(2)}, tmp_path / "w"))
    line = str(caught.value)
    assert "layer4.1.bn1.{weight, bias, running_mean, running_var}" in line
    assert "layer4.1.conv2.weight" in line
    assert "not in it: mine.weight" in line


def refusals(run, tmp_path, pair):
    authors = save(authors_checkpoint(*pair), tmp_path / "caco.pth")
    plain = save(pair[0].backbone.state_dict(), tmp_path / "plain.pth")
    (tmp_path / "folder").mkdir()
    yield tmp_path / "none", {}, "does not exist"
    yield tmp_path / ("x" * 300), {}, "does not exist"
    yield tmp_path / "folder", {}, "no complete checkpoint"
    yield run, {"step": 15}, "no checkpoint of step 15 in .* there are 10, 20"
    yield run / "checkpoints/step_00000010", {"step": 20}, "is the checkpoint of step 10, not 20"
    yield run, {"arch": "resnet50"}, "--arch and --stem are for files"
    yield authors, {"step": 10}, "--step chooses one of a run's checkpoints"
    yield authors, {"arch": "resnet50"}, "nearest is resnet50"
    yield authors, {"arch": "resnet51"}, "no architecture 'resnet51'"
    yield authors, {"stem": "cifar"}, "conv1.weight"
    yield plain, {"which": "key"}, "drop --which key"


def test_wrong_choices_are_one_line(run, pair, tmp_path):
    for path, options, message in refusals(run[0], tmp_path, pair):
        with pytest.raises(UserError, match=message) as caught:
            load_weights(path, **options)
        assert "\n" not in str(caught.value)


def test_damaged_runs_are_one_line(tmp_path):
    save_run(tmp_path / "run")
    newest = tmp_path / "run/checkpoints/step_00000020"
    cut(newest / "__0_0.distcp", 0.5)
    with pytest.raises(UserError, match=r"damaged: __0_0\.distcp"):
        load_weights(tmp_path / "run")
    (newest / "values.json").unlink()
    with pytest.raises(UserError, match="it has no values"):
        load_weights(newest)
