"""Backbones: features and names of every architecture, stems, and the ViT at other image sizes."""

import pytest
import torch
from torch import nn
from torchvision import models

from caco_scale.errors import UserError
from caco_scale.method.encoders import ARCHITECTURES, RESNETS, build_backbone
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
    side = vit.grid_side
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
        ("resnet18", "cifer", "no stem 'cifer'"),
        ("vit_b_16", "cifar", "'cifar' is for ResNets"),
    ],
)
def test_mistakes_are_one_line(arch, stem, message):
    with pytest.raises(UserError, match=message) as error:
        build_backbone(arch, stem)
    assert "\n" not in str(error.value)


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
