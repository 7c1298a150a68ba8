"""torchvision's vision transformers for images of any multiple of their patch, not of one size alone.

Shapes: B batch, F features (the width of a token), H and W an image's height and width.
"""

import math
from typing import Any

import torch
from torch.nn import functional as F
from torchvision.models import vision_transformer

from caco_scale.errors import UserError


class VisionTransformer(vision_transformer.VisionTransformer):
    """torchvision's ViT without its head: at its own size torchvision's forward.

    At other sizes (local crops) the grid of position embeddings is interpolated, so that views of all sizes share one
    set of parameters.
    """

    @classmethod
    def of(cls, model: Any) -> "VisionTransformer":
        """torchvision's model, headless, made one of this kind in place; its tensors and their names stay."""
        del model.heads
        model.__class__, model.encoder.__class__ = cls, _TokenEncoder
        return model

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Images (B, 3, H, W) -> (B, F): the class token. Raises UserError unless the patch divides H and W."""
        return self.tokens(x)[:, 0]

    def tokens(self, x: torch.Tensor) -> torch.Tensor:
        """Images (B, 3, H, W) -> (B, 1 + P, F): the class token, and those of the patches, row by row."""
        height, width = x.shape[-2:]
        if height % self.patch_size or width % self.patch_size:
            raise UserError(
                f"this ViT needs views whose size is a multiple of {self.patch_size} pixels, "
                f"not {height}x{width}; change views.*.size"
            )
        patches = self.conv_proj(x)  # (B, F, rows, columns)
        class_tokens = self.class_token.expand(len(x), -1, -1)
        tokens = torch.cat([class_tokens, patches.flatten(2).transpose(1, 2)], dim=1)
        return self.encoder(tokens, grid=patches.shape[-2:])


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
