"""Backbones: torchvision's ResNets and ViT-B/16 without their classifier, and the demo's tiny ResNet.

Parameter names are torchvision's own, so that an exported state dict loads there.

Shapes: B batch, F features (the width of a ViT's tokens), H and W an image's height and width.
"""

import math
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torchvision import models
from torchvision.models import vision_transformer
from torchvision.models.resnet import BasicBlock

from caco_scale.errors import UserError, did_you_mean
from caco_scale.flags.choices import STEMS

RESNETS = tuple(
    name
    for name in models.list_models(module=models)
    if name.startswith(("resnet", "resnext", "wide_resnet"))
)
ARCHITECTURES = (*RESNETS, "vit_b_16", "tiny")


def build_backbone(arch: str, stem: str = "imagenet") -> tuple[nn.Module, int]:
    """A randomly initialised backbone: ``(module giving (B, F) features, F)``.

    ``arch``: a torchvision ResNet, ResNeXt or Wide ResNet, ``vit_b_16``, or ``tiny``. ``stem``: ``imagenet``,
    or ``cifar`` (a 3x3 convolution of stride 1 and no max-pool, for images of about 32 pixels; ResNets only,
    ``tiny`` always has it). The last BatchNorm of a residual block starts at one, as the authors have it.
    Raises UserError on a name that is not known and on a ViT with the ``cifar`` stem.
    """
    if arch not in ARCHITECTURES:
        raise UserError(
            f"model.arch: no architecture {arch!r}{did_you_mean(arch, ARCHITECTURES)}: "
            f"give one of {', '.join(ARCHITECTURES)}"
        )
    if stem not in STEMS:
        raise UserError(f"model.stem: no stem {stem!r}; use one of {', '.join(STEMS)}")
    if arch == "tiny":
        return TinyResNet(), TinyResNet.num_features
    if arch == "vit_b_16":
        if stem == "cifar":
            raise UserError(
                "model.stem: 'cifar' is for ResNets and vit_b_16 has 16x16 patches; use 'imagenet'"
            )
        return VisionTransformer(), VisionTransformer.num_features
    backbone: Any = models.get_model(arch, weights=None)
    num_features = backbone.fc.in_features
    backbone.fc = nn.Identity()
    if stem == "cifar":
        backbone.conv1 = nn.Conv2d(3, 64, kernel_size=3, stride=1, padding=1, bias=False)
        nn.init.kaiming_normal_(backbone.conv1.weight, mode="fan_out", nonlinearity="relu")
        backbone.maxpool = nn.Identity()
    return backbone, num_features


class TinyResNet(nn.Module):
    """The demo's backbone for images of about 32 pixels: a 3x3 stem and 4 residual blocks, F = 128."""

    num_features = 128

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, kernel_size=3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = _residual_block(16, 16, stride=2)
        self.layer2 = _residual_block(16, 32, stride=2)
        self.layer3 = _residual_block(32, 64, stride=2)
        self.layer4 = _residual_block(64, 128, stride=1)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """(B, 3, H, W) -> (B, 128)."""
        x = F.relu(self.bn1(self.conv1(images)))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return x.mean(dim=(2, 3))


def _residual_block(num_in, num_out, stride):
    shortcut = None
    if stride != 1 or num_in != num_out:
        shortcut = nn.Sequential(nn.Conv2d(num_in, num_out, 1, stride, bias=False), nn.BatchNorm2d(num_out))
    return BasicBlock(num_in, num_out, stride, shortcut)


class VisionTransformer(nn.Module):
    """torchvision's ViT-B/16 without its head, for images of any multiple of 16 pixels; F = 768.

    At 224 pixels it is torchvision's forward. At other sizes (local crops of 96) the 14x14 grid of position
    embeddings is interpolated, so that views of all sizes share one set of parameters.
    """

    num_features = 768
    patch_size = 16
    grid_side = 14

    def __init__(self):
        super().__init__()
        self.conv_proj = nn.Conv2d(3, self.num_features, kernel_size=self.patch_size, stride=self.patch_size)
        self.class_token = nn.Parameter(torch.zeros(1, 1, self.num_features))
        self.encoder = _TokenEncoder(
            seq_length=1 + self.grid_side**2,
            num_layers=12,
            num_heads=12,
            hidden_dim=self.num_features,
            mlp_dim=3072,
            dropout=0.0,
            attention_dropout=0.0,
        )
        fan_in = 3 * self.patch_size**2
        nn.init.trunc_normal_(self.conv_proj.weight, std=math.sqrt(1 / fan_in))
        nn.init.zeros_(self.conv_proj.get_parameter("bias"))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """(B, 3, H, W) -> (B, F): the class token. Raises UserError unless 16 divides H and W."""
        height, width = images.shape[-2:]
        if height % self.patch_size or width % self.patch_size:
            raise UserError(
                f"vit_b_16 needs views whose size is a multiple of {self.patch_size} pixels, "
                f"not {height}x{width}; change views.*.size"
            )
        patches = self.conv_proj(images)  # (B, F, rows, columns)
        class_tokens = self.class_token.expand(len(images), -1, -1)
        tokens = torch.cat([class_tokens, patches.flatten(2).transpose(1, 2)], dim=1)
        return self.encoder(tokens, grid=patches.shape[-2:])[:, 0]


class _TokenEncoder(vision_transformer.Encoder):
    """torchvision's transformer encoder, with position embeddings for any grid of patches."""

    def forward(self, tokens, grid):  # ty: ignore[incompatible-method-override]
        """(B, 1 + rows * columns, F) tokens, the class token first, of ``grid`` = (rows, columns) patches."""
        return self.ln(self.layers(self.dropout(tokens + self._position_embedding(grid))))

    def _position_embedding(self, grid):
        side = math.isqrt(self.pos_embedding.shape[1] - 1)
        if tuple(grid) == (side, side):
            return self.pos_embedding
        class_token, patches = self.pos_embedding[:, :1], self.pos_embedding[:, 1:]
        patches = patches.transpose(1, 2).unflatten(2, (side, side))
        patches = F.interpolate(patches, size=tuple(grid), mode="bicubic", align_corners=False)
        return torch.cat([class_token, patches.flatten(2).transpose(1, 2)], dim=1)
