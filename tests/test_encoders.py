"""Backbones: features and names of every architecture, stems, and the ViT at other image sizes."""

from collections import Counter

import pytest
import torch
from torch import nn
from torchvision import models

from caco_scale.distributed.blocks import find_blocks
from caco_scale.errors import UserError
from caco_scale.method.encoders import (
    ARCHITECTURES,
    RESNETS,
    build_backbone,
    fillable,
    refuse_views,
    skeleton,
)
from caco_scale.method.patches import has_patch_tokens, patch_tokens
from caco_scale.method.projector import build_projector


def test_every_torchvision_resnet_is_known():
    assert {"resnet18", "resnet34", "resnet50", "resnet101", "resnet152"} <= set(RESNETS)
    assert {"resnext50_32x4d", "resnext101_64x4d", "wide_resnet50_2", "wide_resnet101_2"} <= set(RESNETS)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_features_have_the_announced_size_and_torchvisions_names(arch):
    with torch.device("meta"):
        backbone, num_features = build_backbone(arch, "imagenet")
        features = backbone(torch.empty(2, 3, 224, 224))
        assert features.shape == (2, num_features)
        if arch == "tiny":
            return
        reference = models.get_model(arch)
    shapes = {name: tensor.shape for name, tensor in backbone.state_dict().items()}
    expected = {name: tensor.shape for name, tensor in reference.state_dict().items()}
    assert shapes == {name: s for name, s in expected.items() if not name.startswith(("fc.", "heads."))}


@pytest.mark.parametrize("arch", ["resnet18", "resnet50"])
def test_resnet_computes_what_torchvision_computes(arch):
    torch.manual_seed(0)
    backbone, num_features = build_backbone(arch, "imagenet")
    reference = models.get_model(arch)
    missing = reference.load_state_dict(backbone.state_dict(), strict=False)
    assert (missing.missing_keys, missing.unexpected_keys) == (["fc.weight", "fc.bias"], [])
    reference.fc = nn.Identity()
    images = torch.randn(2, 3, 64, 64)
    features = backbone(images)
    assert features.shape == (2, num_features)
    assert torch.equal(features, reference(images))


def test_last_batchnorm_of_a_block_starts_at_one():
    backbone, _ = build_backbone("resnet50", "imagenet")
    assert all(torch.all(block.bn3.weight == 1) for block in backbone.layer1)


@pytest.mark.parametrize("arch", ["resnet18", "resnet50"])
def test_cifar_stem_keeps_the_resolution(arch):
    backbone, num_features = build_backbone(arch, "cifar")
    stem = []
    backbone.layer1.register_forward_pre_hook(lambda _, inputs: stem.append(inputs[0].shape))
    assert backbone(torch.randn(2, 3, 32, 32)).shape == (2, num_features)
    assert stem == [(2, 64, 32, 32)]
    assert backbone.conv1.weight.shape == (64, 3, 3, 3)
    std = (2 / (64 * 9)) ** 0.5  # He initialisation over the fan-out, as torchvision's own stem
    assert 0.9 * std < backbone.conv1.weight.std() < 1.1 * std


def test_tiny_is_the_same_with_both_stems_and_sees_32_pixels():
    torch.manual_seed(0)
    backbone, num_features = build_backbone("tiny", "cifar")
    torch.manual_seed(0)
    other, _ = build_backbone("tiny", "imagenet")
    images = torch.randn(4, 3, 32, 32)
    assert num_features == 128
    assert torch.equal(backbone(images), other(images))
    last = []
    backbone.layer4.register_forward_hook(lambda *call: last.append(call[-1].shape))
    assert backbone(images).shape == (4, 128)
    assert last == [(4, 128, 4, 4)]


@pytest.fixture(scope="module")
def vit():
    torch.manual_seed(0)
    return build_backbone("vit_b_16", "imagenet")[0]


def test_vit_computes_what_torchvision_computes_at_224(vit):
    with torch.device("meta"):
        reference = models.vit_b_16()
    reference.heads = nn.Identity()
    reference.load_state_dict(vit.state_dict(), assign=True)
    images = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        assert torch.equal(vit(images), reference(images))


def test_vit_initialises_as_torchvision_does(vit):
    torch.manual_seed(1)
    reference = models.vit_b_16().state_dict()
    for name, tensor in vit.state_dict().items():
        if tensor.numel() > 10_000:
            assert tensor.std().item() == pytest.approx(reference[name].std().item(), rel=0.05), name
    assert not vit.class_token.any()
    assert not vit.conv_proj.bias.any()


def test_vit_interpolates_position_embeddings_for_local_crops(vit):
    side = vit.image_size // vit.patch_size
    rows, columns = torch.meshgrid(torch.arange(side) + 0.5, torch.arange(side) + 0.5, indexing="ij")
    ramp = torch.zeros_like(vit.encoder.pos_embedding)
    ramp[0, 1:, 0], ramp[0, 1:, 1] = rows.flatten() / side, columns.flatten() / side
    ramp[0, 0, 2] = 7.0
    trained = vit.encoder.pos_embedding.data
    vit.encoder.pos_embedding.data = ramp
    try:
        embedding = vit.encoder._position_embedding((6, 6))
    finally:
        vit.encoder.pos_embedding.data = trained
    assert embedding.shape == (1, 37, 768)
    assert embedding[0, 0, 2] == 7.0
    inner = embedding[0, 1:].unflatten(0, (6, 6))[1:-1, 1:-1]  # away from the border a ramp stays one
    expected = (torch.arange(1, 5) + 0.5) / 6
    torch.testing.assert_close(inner[..., 0], expected[:, None].expand(4, 4), atol=4e-3, rtol=0)
    torch.testing.assert_close(inner[..., 1], expected[None, :].expand(4, 4), atol=4e-3, rtol=0)


def test_vit_trains_its_position_embeddings_from_local_crops(vit):
    features = vit(torch.randn(1, 3, 96, 96))
    assert features.shape == (1, 768)
    (gradient,) = torch.autograd.grad(features.square().sum(), vit.encoder.pos_embedding)
    assert gradient.abs().sum() > 0


def test_vit_refuses_sizes_that_patches_do_not_tile(vit):
    with pytest.raises(UserError, match="multiple of 16 pixels, not 100x96"):
        vit(torch.randn(1, 3, 100, 96))


@pytest.mark.parametrize(
    ("arch", "stem", "message"),
    [
        ("resnet5O", "imagenet", "did you mean resnet50?"),
        ("vit_b16", "imagenet", "did you mean vit_b_16?"),
        ("test_vit", "imagenet", "did you mean timm/test_vit?"),
        ("timm/resnet5O", "imagenet", "has no model 'resnet5O' .did you mean resnet50?"),
        ("swin_t", "cifar", "'cifar' is for ResNets"),
        ("own_nets:nett", "imagenet", "own_nets has no nett .did you mean net?"),
        ("own_net:net", "imagenet", "there is no module own_net"),
        ("own_nets:number", "imagenet", "returns an int: return a torch.nn.Module"),
        ("own_nets:broken", "imagenet", "OSError: no weights here .*own_nets.py, line"),
        ("own_nets:Tokens", "imagenet", r"gives .2, 8, 3136. torch.float32 of 2 images: return"),
        ("os:getcwd", "imagenet", "os is Python's own"),
        ("resnet18", "cifer", "no stem 'cifer'"),
        ("vit_b_16", "cifar", "'cifar' is for ResNets"),
    ],
)
def test_mistakes_are_one_line(arch, stem, message):
    with pytest.raises(UserError, match=message) as error:
        build_backbone(arch, stem)
    assert "\n" not in str(error.value)


# Of each: F, and its blocks.
SMALL = {
    "squeezenet1_1": (512, {"Fire": 8}),
    "shufflenet_v2_x0_5": (1024, {"InvertedResidual": 16}),
    "convnext_tiny": (768, {"CNBlock": 18}),
    "resnet18": (512, {"BasicBlock": 8}),
    "tiny": (128, {"BasicBlock": 4}),
    "vit_b_16": (768, {"EncoderBlock": 12}),
    "timm/test_vit": (64, {"Block": 6}),
    "timm/test_convnext": (64, {"ConvNeXtBlock": 8}),
    "timm/test_resnet": (96, {"BasicBlock": 3}),
    "timm/test_efficientnet": (256, {}),
    "own_nets:net": (8, {"Block": 2}),
}


@pytest.mark.parametrize("arch", SMALL)
def test_features_are_measured_and_blocks_are_found(arch):
    backbone, num_features = skeleton(arch)
    found = Counter(type(block).__name__ for block in find_blocks(backbone))
    assert (num_features, {name: found[name] for name in SMALL[arch][1]}) == SMALL[arch]
    held = [id(p) for block in find_blocks(backbone) for p in block.parameters()]
    assert len(held) == len(set(held))  # no parameter is in two


def test_building_takes_no_more_random_numbers_than_the_users_function_and_moves_no_statistic():
    import own_nets

    torch.manual_seed(0)
    wanted = own_nets.net(width=4)
    after = torch.rand(1)
    torch.manual_seed(0)
    backbone, num_features = build_backbone("own_nets:net", options=("width=4",))
    assert torch.equal(torch.rand(1), after)
    assert num_features == 4
    assert all(torch.equal(t, wanted.state_dict()[name]) for name, t in backbone.state_dict().items())
    images = torch.randn(2, 3, 16, 16)
    assert torch.equal(backbone.eval()(images), wanted.eval()(images).mean(dim=(2, 3)))  # of a map: the means
    state = torch.get_rng_state()
    fillable("timm/test_vit", "imagenet")
    refuse_views("timm/test_vit", skeleton("timm/test_vit")[0], [160, 64])
    assert torch.equal(torch.get_rng_state(), state)


def test_layers_of_chance_are_off_unless_an_option_names_them():
    def drawn(*options):
        backbone, _ = build_backbone("timm/test_vit", options=options)
        images = torch.randn(8, 3, 64, 64)
        with torch.no_grad():
            return not torch.equal(backbone(images), backbone(images))

    assert not drawn()
    assert drawn("drop_path_rate=0.9")
    for arch in ("convnext_tiny", "efficientnet_b0", "swin_t"):
        found = [getattr(m, "p", 0.0) for m in skeleton(arch)[0].modules()]
        assert not any(p for p in found if isinstance(p, float)), arch


def test_views_of_other_sizes():
    vit = skeleton("timm/test_vit")[0]
    refuse_views("timm/test_vit", vit, [160, 96])  # by timm's own interpolation of the positions
    with pytest.raises(
        UserError, match=r"timm/test_vit cannot be trained on views of 100 pixels .*it can on .*96"
    ):
        refuse_views("timm/test_vit", vit, [160, 100])
    with pytest.raises(
        UserError, match=r"cannot be trained on views of 32 pixels .*it can on .*64, .*views.local_size"
    ):
        refuse_views("alexnet", skeleton("alexnet")[0], [224, 32])


@pytest.mark.parametrize(
    ("arch", "message"),
    [
        ("own_nets:Unused", "2 parameters have no part in its features .head.weight, head.bias"),
        ("own_nets:Pair", "gives a tuple: return"),
        ("torch.nn:Identity", "torch.nn:Identity has no parameters to train"),
        ("googlenet", "gives a GoogLeNetOutputs: give --model.options aux_logits=false"),
    ],
)
def test_what_would_fail_in_the_first_steps_of_training_is_refused_before(arch, message):
    with pytest.raises(UserError, match=message):
        refuse_views(arch, skeleton(arch)[0], [32])


def test_patch_tokens_are_the_last_layers_row_by_row(vit):
    images = torch.randn(1, 3, 32, 64)
    with torch.no_grad():
        tokens = patch_tokens(vit.eval(), images)
        assert tokens.shape == (1, 8, 768)
        seen = []
        hook = vit.encoder.ln.register_forward_hook(lambda *call: seen.append(call[-1]))
        features = vit(images)
        hook.remove()
        assert torch.equal(torch.cat([features[:, None], tokens], dim=1), seen[0])
        timms = build_backbone("timm/test_vit")[0].eval()
        assert torch.equal(patch_tokens(timms, images), timms.forward_features(images)[:, 1:])
    assert not has_patch_tokens(skeleton("tiny")[0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("depth=1", "depth=2"), "gives depth twice"),
        (("dpth=1",), "unexpected keyword argument 'dpth'"),
        (("pretrained=true",), "leave pretrained out|pretrained is not"),
    ],
)
def test_options_that_cannot_be(options, message):
    arch = "timm/test_vit" if "pretrained=true" in options else "own_nets:net"
    with pytest.raises(UserError, match=message):
        build_backbone(arch, options=options)


def test_projector_is_three_linear_layers_without_biases():
    projector = build_projector(128, 32, 16)
    assert {name: tuple(p.shape) for name, p in projector.named_parameters()} == {
        "0.weight": (32, 128),
        "1.weight": (32,),
        "1.bias": (32,),
        "3.weight": (32, 32),
        "4.weight": (32,),
        "4.bias": (32,),
        "6.weight": (16, 32),
    }
    assert projector(torch.randn(4, 128)).shape == (4, 16)
