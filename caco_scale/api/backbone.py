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
from caco_scale.data.decode import decode
from caco_scale.data.photographs import rgb_pixels
from caco_scale.data.pixels import RGB8, CorruptSample, Pixels
from caco_scale.data.views import centre_crop
from caco_scale.errors import UserError
from caco_scale.weights.load import load_weights


class Backbone(nn.Module):
    """Images (B, C, H, H) -> features (B, F): a backbone without projector or classifier, on the CPU in fp32.

    In eval mode at first; all parameters can be trained. ``module`` is the bare model, whose parameters have
    torchvision's names: ``torchvision.models.resnet50().load_state_dict(backbone.module.state_dict(), strict=False)``.

    ``num_features``: F. ``arch``, ``stem``: as in the configuration's ``model``. ``size``: H of the images that it was
    trained on; ``channels`` (C), ``bits``: theirs; ``mean``, ``std``: what they were normalised with (:meth:`prepare`
    does so); ``assumed``: which of size, mean and std the source does not say, so that they are guesses. ``resize``:
    the shorter side before the centre is cut out, 0: as usual. ``step``: of the run, None where nothing says it.
    """

    module: nn.Module
    num_features: int
    arch: str
    stem: str
    size: int
    channels: int
    bits: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    assumed: tuple[str, ...]
    resize: int
    step: int | None

    def __init__(self, module: nn.Module, **facts: Any):
        super().__init__()
        self.module = module
        for name, value in facts.items():
            setattr(self, name, value)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Normalised float images (B, C, H, W) -> features (B, F)."""
        return self.module(images)

    def prepare(self, image: Any) -> torch.Tensor:
        """One image as the evaluation sees it: resized, its centre cropped, normalised -> (C, H, H) float32.

        ``image``: the path of an image file, an image of PIL (of 8-bit RGB), or an array (height, width, C) of uint8
        or, of 16 bits, uint16. UserError for what is none of them or does not decode.
        """
        pixels = _pixels(image, Pixels(self.channels, self.bits))
        crop = torch.from_numpy(centre_crop(pixels, self.size, self.resize))
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
            authors, MoCo, DINO, torchvision or timm, or a Hugging Face directory in timm's layout, also on the hub
            (``hf://USER/NAME[@REVISION]``, fetched into the cache of ``huggingface_hub``). Nothing in it is run.
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
        channels=weights.pixels.channels,
        bits=weights.pixels.bits,
        mean=weights.mean,
        std=weights.std,
        assumed=weights.assumed,
        resize=weights.resize,
        step=None if found in (None, "") else int(found),
    ).eval()


def _pixels(image: Any, wanted: Pixels = RGB8) -> np.ndarray:
    if isinstance(image, str | os.PathLike):
        try:
            return decode(Path(image).read_bytes(), wanted)
        except OSError as error:
            raise UserError(f"cannot read {os.fspath(image)}: {error.strerror}") from None
        except CorruptSample as error:
            raise UserError(f"{os.fspath(image)} does not decode: {error}") from None
    if isinstance(image, Image.Image) and wanted == RGB8:
        try:
            return rgb_pixels(image)
        except CorruptSample as error:
            raise UserError(f"an image of mode {image.mode}: {error}") from None
    pixels = np.array(image)  # of its own: what PIL gives cannot be written to
    if pixels.ndim == 2:
        pixels = pixels[:, :, None]
    if pixels.dtype != wanted.dtype or pixels.ndim != 3 or pixels.shape[2] != wanted.channels:
        raise UserError(
            f"an image of {pixels.dtype} {pixels.shape}: give a path, an image of PIL, or {wanted.dtype} "
            f"(height, width, {wanted.channels})"
        )
    return pixels
