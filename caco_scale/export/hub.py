"""A Hugging Face directory in timm's layout: ``config.json``, ``model.safetensors`` and the model card as README.md."""

import json
import math
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from caco_scale.errors import UserError, one_line
from caco_scale.export.library_names import timm_name
from caco_scale.method.encoders import read_options
from caco_scale.weights.address import HubAddress
from caco_scale.weights.hub import CONFIG, FILES
from caco_scale.weights.load import Weights

FILE, CARD = FILES[0], "README.md"
HEADER = "---\nlibrary_name: timm\ntags:\n- image-feature-extraction\n- timm\n---\n\n"  # a licence is its publisher's


def check_stem(stem: str, arch: str) -> None:
    """UserError where timm has no such model."""
    if stem == "cifar":
        raise UserError(
            f"timm builds no {arch} with the stem cifar by a config.json: use --format timm, whose card has the lines"
        )


def check_directory(to: Path, force: bool) -> None:
    """UserError where no such directory can be written, or what is there is another one."""
    if os.path.lexists(to):
        ours = to.is_dir() and {entry.name for entry in to.iterdir()} <= {CONFIG, FILE, CARD}
        if not ours:
            raise UserError(f"{to} exists and is no such directory: give another name")
        if not force:
            raise UserError(f"{to} exists: give another name, or --force to replace it")


def config_text(weights: Weights, known: Mapping[str, str], options: Sequence[str], model: Any) -> str:
    """``config.json``. ``known``: of :func:`~caco_scale.export.write.file_metadata`; ``model``: timm's own."""
    own = getattr(model, "pretrained_cfg", None) or {}
    arguments = read_options(options)
    if own.get(
        "fixed_input_size"
    ):  # else timm would build it for its usual 224 pixels, and interpolate positions
        arguments = {"img_size": own["input_size"][-1], **arguments}
    images: dict[str, Any] = {name: own[name] for name in ("first_conv", "classifier") if own.get(name)}
    images |= {"num_classes": 0, "interpolation": "bilinear", "crop_mode": "center"}
    if "size" in known:
        images |= {"input_size": [weights.pixels.channels, weights.size, weights.size]}
        images |= {"crop_pct": _share(weights.size, int(known["resize"]))} if "resize" in known else {}
    images |= {name: list(getattr(weights, name)) for name in ("mean", "std") if name in known}
    content = {
        "architecture": timm_name(weights.arch).partition(".")[0],
        "num_classes": 0,
        "num_features": weights.num_features,
        "model_args": arguments,
        "pretrained_cfg": images,
    }
    return json.dumps(content, indent=2) + "\n"


def _share(size, resize):
    """``crop_pct``, by which timm, which rounds down, comes to just this shorter side before the crop."""
    share = size / resize
    return share if math.floor(size / share) == resize else size / (resize + 1e-3)


def load_back(folder: Path) -> torch.nn.Module:
    """The directory as timm itself loads it, without a network. UserError where it does not."""
    import timm

    try:
        with torch.random.fork_rng(devices=[]):
            return timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=0)
    except Exception as error:  # of timm's many models
        raise UserError(f"timm {timm.__version__} does not load it back: {one_line(error)[:400]}") from None


def loading_lines(place: str | HubAddress) -> str:
    """Python lines with which a user builds the model; ``place``: the directory's name, or its address on the hub."""
    name = f"hf-hub:{str(place)[len('hf://') :]}" if isinstance(place, HubAddress) else f"local-dir:{place}"
    return f'import timm\n\nmodel = timm.create_model("{name}", pretrained=True, num_classes=0)'


def put_in_place(temporary: Path, to: Path) -> None:
    """The finished directory under its name; one of ours that was there goes."""
    old = to.with_name(f"{to.name}.old{os.getpid()}")
    if to.exists():
        os.rename(to, old)
    os.rename(temporary, to)
    shutil.rmtree(old, ignore_errors=True)
