"""The patch tokens of vision transformers, torchvision's and timm's.

Shapes: B batch, P patches, F features (the width of a token).
"""

from typing import Any

import torch
from torch import nn

from caco_scale.method.vision_transformer import VisionTransformer


def has_patch_tokens(backbone: nn.Module) -> bool:
    """Whether a backbone is a vision transformer, whose last layer has a token for every patch of an image."""
    if isinstance(backbone, VisionTransformer):
        return True
    parts = ("num_prefix_tokens", "patch_embed", "forward_features")  # of timm's
    return all(hasattr(backbone, name) for name in parts)


def patch_tokens(backbone: Any, images: torch.Tensor) -> torch.Tensor:
    """Images (B, 3, H, W) -> (B, P, F): the last layer's tokens, after its norm, row by row of the image's patches.

    The class token, distillation and register tokens are not among them.
    """
    if isinstance(backbone, VisionTransformer):
        return backbone.tokens(images)[:, 1:]
    tokens = backbone.forward_features(images)
    assert tokens.ndim == 3, tokens.shape
    return tokens[:, backbone.num_prefix_tokens :]
