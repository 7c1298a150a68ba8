"""A trained backbone as a module of torch, with what its images have to look like.

Shapes: B images, H the side of an image in pixels, F features.
"""

import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from caco_scale.data.augment import normalise
from caco_scale.data.views import CorruptSample, centre_crop, decode_image, rgb_pixels
from caco_scale.errors import UserError
from caco_scale.weights.load import load_weights


class Backbone(nn.Module):
    """Images (B, 3, H, H) -> features (B, F): a backbone without projector or classifier, on the CPU in fp32.

    In eval mode at first; all parameters can be trained. ``module`` is the bare model, whose parameters have
    torchvision's names: ``torchvision.models.resnet50().load_state_dict(backbone.module.state_dict(), strict=False)``.

    ``num_features``: F. ``arch``, ``stem``: as in the configuration's ``model``. ``size``: H of the images that it was
    trained on; ``mean``, ``std``: what they were normalised with (:meth:`prepare` does so); ``assumed``: which of the
    three the source does not say, so that they are guesses. ``resize``: the shorter side before the centre is cut out,
    0: as usual. ``step``: of the run, None where the source does not say.
    """

    module: nn.Module
    num_features: int
    arch: str
    stem: str
    size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    assumed: tuple[str, ...]
    resize: int
    step: int | None

    def __init__(self, module: nn.Module, **facts: Any):
        super().__init__()
        self.module = module
        for name, value in facts.items():
            setattr(self, name, value)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Normalised float images (B, 3, H, W) -> features (B, F)."""
        return self.module(images)

    def prepare(self, image: Any) -> torch.Tensor:
        """One image as the evaluation sees it: resized, its centre cropped, normalised -> (3, H, H) float32.

        ``image``: the path of an image file, an image of PIL, or an array (height, width, 3) of uint8. UserError for
        what is none of them or does not decode.
        """
        crop = torch.from_numpy(centre_crop(_pixels(image), self.size, self.resize))
        return normalise(crop[None], self.mean, self.std)[0]


def load_backbone(
    run_or_weights: str | os.PathLike[str],
    *,
    which: str | None = None,
    step: int | None = None,
    arch: str | None = None,
) -> Backbone:
    """The backbone of a run or of a file of weights, whole or not at all.

    Args:
        run_or_weights: a run directory, one of its checkpoints, an export of this program, or a checkpoint of CaCo's
            authors, MoCo, DINO, torchvision or timm, or a Hugging Face directory in timm's layout. Nothing in it is
            run.
        which: ``query`` or ``key``, of a source with both; None: the query encoder, of DINO the teacher.
        step: which checkpoint of the run; None: the newest.
        arch: the architecture in a file, None: found out; of a run whose backbone is a function of your own that
            function (``package.module:callable``), which runs because you say so.

    Raises:
        UserError: no such place, damaged, no encoder that fits in every tensor (it names them), values not finite.
    """
    if which not in (None, "query", "key"):
        raise UserError(f"which is {which!r}: give query or key")
    weights = load_weights(os.fspath(run_or_weights), which=which, step=step, arch=arch)
    found = weights.metadata.get("step")
    return Backbone(
        weights.backbone.requires_grad_(True),
        num_features=weights.num_features,
        arch=weights.arch,
        stem=weights.stem,
        size=weights.size,
        mean=weights.mean,
        std=weights.std,
        assumed=weights.assumed,
        resize=weights.resize,
        step=None if found in (None, "") else int(found),
    ).eval()


def _pixels(image: Any) -> np.ndarray:
    if isinstance(image, str | os.PathLike):
        try:
            return decode_image(Path(image).read_bytes())
        except OSError as error:
            raise UserError(f"cannot read {os.fspath(image)}: {error.strerror}") from None
        except CorruptSample as error:
            raise UserError(f"{os.fspath(image)} does not decode: {error}") from None
    if isinstance(image, Image.Image):
        try:
            return rgb_pixels(image)
        except CorruptSample as error:
            raise UserError(f"an image of mode {image.mode}: {error}") from None
    pixels = np.array(image)  # of its own: what PIL gives cannot be written to
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3:
        raise UserError(
            f"an image of {pixels.dtype} {pixels.shape}: give a path, an image of PIL, or uint8 (height, width, 3)"
        )
    return pixels
