"""``model.weights``: a training starts from the weights of every format, says what became of each key, and resumes."""

import json
import shutil
from functools import partial

import pytest
import timm
import torch
from launch import SMALL, by, final_state, launch
from run_directories import save_run
from safetensors.torch import load_file, save_file
from shard_sets import make_shard_set
from weight_files import (
    authors_checkpoint,
    dino_checkpoint,
    encoder,
    moco_v3_checkpoint,
    noise,
    torchvision_state,
    under,
)

import caco_scale
from caco_scale import config as configuration
from caco_scale.errors import UserError
from caco_scale.export import write as export
from caco_scale.training.assemble import build_model
from caco_scale.weights.load import Wanted, load_weights
from caco_scale.weights.start import load_start


@pytest.fixture(scope="module")
def pair():
    return encoder("tiny", "cifar", seed=1), encoder("tiny", "cifar", seed=2)


def hub(folder, name, model, file="model.safetensors", **more):
    """A directory as the hub has timm's models."""
    folder.mkdir()
    images = {"input_size": [3, 96, 96], "crop_pct": 0.75, "mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25]}
    content = {"architecture": name, "num_classes": 10, "pretrained_cfg": images, **more}
    (folder / "config.json").write_text(json.dumps(content))
    write = save_file if file.endswith("safetensors") else torch.save
    write(model.state_dict(), folder / file)
    return folder


def timm_model(name="test_resnet", **options):
    torch.manual_seed(3)
    return noise(timm.create_model(name, **options), 3)


def moco_v2(query):
    head = torch.nn.Linear(4, 4).state_dict()
    return under(query.backbone.state_dict(), "module.encoder_q.") | under(head, "module.encoder_q.fc.")


def exported(path, pair, file_format):
    save_run(path / "run", "tiny", "cifar")
    export.export(path / "run", path / "w", file_format, "key")
    return path / "w"


def saved(content, path, pair):
    torch.save(content(*pair), path / "w.pth")
    return path / "w.pth"


FORMATS = {
    "run": lambda path, pair: save_run(path / "run", "tiny", "cifar") and path / "run",
    "our safetensors": partial(exported, file_format="safetensors"),
    "our torch file": partial(exported, file_format="torchvision"),
    "authors": partial(saved, authors_checkpoint),
    "MoCo v2": partial(saved, lambda query, key: {"state_dict": moco_v2(query)}),
    "MoCo v3": partial(saved, moco_v3_checkpoint),
    "DINO": partial(saved, dino_checkpoint),
    "torchvision": partial(saved, lambda query, key: torchvision_state().state_dict()),
    "hub": lambda path, pair: hub(path / "hub", "test_resnet", timm_model()),
    "hub of torch": lambda path, pair: hub(path / "hub", "test_resnet", timm_model(), "pytorch_model.bin"),
}


ARCHS = {"torchvision": "resnet18", "hub": "timm/test_resnet", "hub of torch": "timm/test_resnet"}


def config_of(arch="resnet18", **changes):
    return configuration.replace(
        configuration.Config(), model__arch=arch, model__projector_hidden=8, model__embedding_dim=4, **changes
    )


def started(place, config):
    model = config.model
    weights = load_start(str(place), Wanted(model.arch, model.stem, model.options))
    return weights, build_model(config, weights)


def features(module, size=64):
    images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        return module.eval()(images)


@pytest.mark.parametrize("kind", FORMATS)
def test_features_at_step_0_are_those_of_the_source(kind, pair, tmp_path):
    place = FORMATS[kind](tmp_path, pair)
    config = config_of(ARCHS.get(kind, "tiny"), model__stem="imagenet" if kind in ARCHS else "cifar")
    weights, model = started(place, config)
    wanted = features(load_weights(place).backbone)
    for side in (model.query, model.key):
        assert (features(side.backbone) - wanted).abs().max() <= 1e-5 * wanted.abs().max()
    fresh = build_model(config)
    assert not torch.equal(features(fresh.query.backbone), wanted)
    assert torch.equal(fresh.query.projector[0].weight, model.query.projector[0].weight)  # at random as ever
    # Every key of the source is accounted for.
    held = len(weights.facts()["loaded"]) + len(weights.left_out)
    file = weights.weights.file
    if kind in ARCHS:
        assert held == len((load_file if file.suffix == ".safetensors" else torch.load)(file))
        assert set(weights.left_out.values()) == {"a head"}
    if kind == "run":
        assert weights.left_out["query.projector.0.weight"].startswith("a projector")
        assert weights.left_out["key_buffer.backbone.bn1.running_mean"] == "of the other encoder"
        assert weights.left_out["bank.rows"] == "no part of an encoder"
    if kind == "authors":
        assert weights.left_out["fc.0.weight"].startswith("a projector")
        assert weights.left_out["encoder_k.conv1.weight"] == "of the other encoder"


@pytest.mark.parametrize(
    ("arch", "name", "options"),
    [
        ("timm/vit_tiny_patch16_224", "vit_tiny_patch16_224", ("depth=2",)),
        ("timm/test_resnet.r160_in1k", "test_resnet", ()),
    ],
)
def test_a_model_of_timms_as_timm_itself_has_it(arch, name, options, tmp_path):
    source = timm_model(name, **({"depth": 2} if options else {}))
    place = hub(tmp_path / "hub", name, source, model_args={"depth": 2, "num_classes": 10} if options else {})
    weights, model = started(place, config_of(arch, model__options=options))
    source.reset_classifier(0)
    size = 224 if options else 64
    wanted = features(source, size)
    assert (features(model.key.backbone, size) - wanted).abs().max() <= 1e-5 * wanted.abs().max()
    found = load_weights(place)
    assert (found.size, found.resize, found.mean) == (96, 128, (0.5, 0.5, 0.5))
    assert "give --views.mean 0.5 0.5 0.5 --views.std 0.25" in weights.other_images((0.4,) * 3, (0.2,) * 3)
    assert weights.other_images((0.5,) * 3, (0.25,) * 3) is None
    assert "another normalisation" in weights.lines((0.4,) * 3, (0.2,) * 3)[-1]
    assert "another normalisation" not in weights.lines((0.5,) * 3, (0.25,) * 3)[-1]


def test_what_a_batchnorm_lacks_is_named_and_what_is_loaded_is_counted(tmp_path):
    state = {
        n: t for n, t in torchvision_state().state_dict().items() if not n.endswith("num_batches_tracked")
    }
    torch.save(state, tmp_path / "w.pth")
    weights, _ = started(tmp_path / "w.pth", config_of())
    text = "\n".join(weights.lines(weights.weights.mean, weights.weights.std))
    assert "loaded into both encoders: 100 tensors, all that a resnet18 needs but 20" in text
    assert "missing, as a new backbone has them: bn1.num_batches_tracked" in text
    assert "left out: fc.* (2): a head" in text


def mistakes(path, pair):
    torch.save(torch.nn.Linear(3, 4).state_dict(), path / "other.pth")
    torch.save(torchvision_state().state_dict(), path / "w.pth")
    torch.save({"state_dict": under(pair[0].backbone.state_dict(), "encoder_k.")}, path / "key.pth")
    hubs = {
        name: hub(path / name, "test_resnet", timm_model())
        for name in ("hub", "typo", "transformers", "empty")
    }
    (hubs["typo"] / "config.json").write_text('{"architecture": "resnet1O8"}')
    save_run(path / "run")
    (path / "transformers/config.json").write_text('{"architectures": ["ViTModel"]}')
    (path / "empty/model.safetensors").rename(path / "empty/model.safetensors.index.json")
    yield "resnet18", "other.pth", "holds nothing of resnet18: it has weight, bias"
    yield (
        "resnet34",
        "w.pth",
        "it is a resnet18 .stem imagenet.: give --model.arch resnet18 --model.stem imagenet$",
    )
    yield "timm/test_resnet", "w.pth", "is no timm/test_resnet .stem imagenet.: .*give --model.arch resnet18"
    yield (
        "resnet18",
        "key.pth",
        "write that first, python -m caco_scale.export .*key.pth --which key --to start",
    )
    yield "resnet18", "run", "is a tiny, not a resnet18: give --model.arch tiny$"
    yield "resnet34", "hub", "is a timm/test_resnet, not a resnet34: give --model.arch timm/test_resnet$"
    yield "own_nets:net", "run", "is a tiny, not an own_nets:net"
    yield "resnet18", "typo", "has no model 'resnet1O8' .did you mean resnet18?"
    yield "resnet18", "transformers", "another library than timm .*ViTModel"
    yield "resnet18", "empty", "in several files .model.safetensors.index.json"
    yield "resnet18", "none", "none does not exist"


def test_a_wrong_source_is_one_line_and_no_training(pair, tmp_path):
    for arch, name, message in mistakes(tmp_path, pair):
        with pytest.raises(UserError, match=message) as caught:
            started(tmp_path / name, config_of(arch))
        assert str(caught.value).startswith("model.weights: ")
        assert "\n" not in str(caught.value)
    flags = {"model.weights": tmp_path / "w.pth", "model.arch": "tiny", "run.dir": tmp_path / "mine"}
    flags |= {"data.shards": tmp_path, "run.max_steps": 2}
    with pytest.raises(UserError, match=r"give --model.arch resnet18"):
        caco_scale.pretrain("demo", **flags)
    assert not (tmp_path / "mine").exists()


def test_a_function_that_a_run_names_is_not_run_unless_the_user_says_so(tmp_path):
    save_run_of_own_net(tmp_path / "run")
    for call in (
        load_weights,
        caco_scale.load_backbone,
        partial(export.export, to=tmp_path / "w", file_format="safetensors"),
    ):
        with pytest.raises(
            UserError, match="is the backbone of own_nets:net, code of its own: give --arch own_nets:net"
        ):
            call(tmp_path / "run")
        call(tmp_path / "run", arch="own_nets:net")
    weights, _ = started(tmp_path / "run", config_of("own_nets:net"))
    assert weights.weights.arch == "own_nets:net"


def save_run_of_own_net(folder):
    from test_weights import save_run as save

    return save(folder, "own_nets:net", "imagenet")


@pytest.mark.long
def test_a_run_starts_under_fsdp2_resumes_without_the_file_and_refuses_another(tmp_path):
    shards = make_shard_set(tmp_path / "set", num_images=48)
    save_run(tmp_path / "source", "tiny", "cifar")
    export.export(tmp_path / "source", tmp_path / "w.safetensors", "safetensors")
    flags = {**SMALL, "data.shards": shards, "run.dir": tmp_path / "run", "bank.size": 8, "run.max_steps": 2}
    flags |= {"model.arch": "tiny", "model.weights": tmp_path / "w.safetensors", "optim.lr": 0}
    output = launch(flags, **by("fsdp2", 2))
    assert "loaded into both encoders" in output
    wanted = load_file(tmp_path / "w.safetensors")
    state, values = final_state(tmp_path / "run")
    for name, tensor in wanted.items():
        if not name.endswith(("running_mean", "running_var", "num_batches_tracked")):
            for side in ("query", "key"):
                assert torch.equal(state[f"{side}.backbone.{name}"], tensor.double()), name
    facts = json.loads((tmp_path / "run/weights.json").read_text())
    assert values["weights_sha256"] == facts["sha256"]
    assert sorted(facts["loaded"]) == sorted(wanted)

    shutil.move(tmp_path / "w.safetensors", tmp_path / "moved.safetensors")
    more = {name: value for name, value in flags.items() if name != "run.max_steps"}
    again = caco_scale.pretrain("demo", **more, **{"run.max_steps": 3})  # the file is gone
    assert again.step == 3
    more["model.weights"] = tmp_path / "moved.safetensors"  # the same bytes elsewhere
    assert caco_scale.pretrain("demo", **more, **{"run.max_steps": 4}).step == 4
    with pytest.raises(
        UserError, match=r"other values .model.weights: .*-> nothing.: give these, or another run.dir"
    ):
        caco_scale.pretrain("demo", **{**more, "model.weights": "", "run.max_steps": 5})
    save_file({**wanted, "conv1.weight": wanted["conv1.weight"] + 1}, tmp_path / "moved.safetensors")
    with pytest.raises(UserError, match=r"other values .model.weights:"):
        caco_scale.pretrain("demo", **{**more, "model.weights": tmp_path / "w2", "run.max_steps": 5})
