"""How torchvision and timm build and name the backbones of this project.

A backbone's names are those of the library that it comes from; for torchvision's ResNets and ViT-B/16 timm has the same
layers, under names that are known. What a library does not have is said, not hidden: ``tiny`` loads into this project's
own module, a function of the user's by that function, and the two lines that make the ``cifar`` stem stand in the model
card.
"""

import contextlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torchvision import models

from caco_scale.errors import UserError
from caco_scale.method.channels import take_channels
from caco_scale.method.encoders import ANY_SIZE, fillable, head_of, read_options, skeleton, takes
from caco_scale.weights.recognise import TIMM_NAMES, timm_name, timm_vit_names

STEM_LINES = [  # what library_model does, for people
    "model.conv1 = torch.nn.Conv2d({}, 64, kernel_size=3, padding=1, bias=False)  # the stem for small images",
    "model.maxpool = torch.nn.Identity()",
]


def library_of(arch: str, file_format: str) -> str:
    """The library whose model a file of this format loads into: torchvision, timm, caco_scale (whose ``tiny`` is), or
    "" where a function of the user's builds it.

    Raises:
        UserError: the format is of a library that has no such model, or that is not installed.
    """
    own = "timm" if arch.startswith("timm/") else "" if ":" in arch else "torchvision"
    if file_format in ("timm", "huggingface"):
        try:
            import timm  # noqa: F401
        except ImportError:
            raise UserError(
                f"--format {file_format} compares with timm's own model, which is not installed: pip install timm"
            ) from None
        if arch == "tiny":
            raise UserError("timm has no model tiny, it is this project's own: use --format safetensors")
        if not own:
            raise UserError(f"timm has no model {arch}, it is code of yours: use --format safetensors")
        _check_timm_has(arch)
        return "timm"
    if own != "torchvision" and file_format == "torchvision":
        others = "timm or safetensors" if own else "safetensors"
        raise UserError(f"torchvision has no model {arch}: use --format {others}")
    return "caco_scale" if arch == "tiny" else own


def to_timm(state: Mapping[str, torch.Tensor], arch: str) -> dict[str, torch.Tensor]:
    """A state dict in torchvision's names under timm's; the tensors are the same."""
    if arch not in TIMM_NAMES:
        return dict(state)
    names = timm_vit_names()
    return {names[name]: tensor for name, tensor in state.items()}


def library_model(
    library: str, arch: str, stem: str, options: Sequence[str], size: int, channels: int = 3
) -> tuple[nn.Module, list[str]]:
    """The library's own model without its classifier, to be filled: images -> features (B, F); with its options.

    ``library``: of :func:`library_of`; ``size``: of the images (pixels), for which timm's ViTs may need an option more,
    as all of timm for other than three ``channels``.
    """
    if library in ("", "caco_scale"):
        return fillable(arch, stem, options, channels)[0], list(options)
    if library == "torchvision":
        model, head = _of_torchvision(arch, options)
        parent, _, name = head.rpartition(".")
        setattr(model.get_submodule(parent), name, nn.Identity())
        model = _with_stem(model, stem)
        take_channels(arch, model, channels)
        return model, list(options)
    import timm

    options = [*options, *([f"in_chans={channels}"] if channels != 3 else [])]
    choices = [[*options, *(f"{name}={value}" for name, value in more.items())] for more in ({}, *ANY_SIZE)]
    for words in choices:
        with contextlib.suppress(TypeError), torch.random.fork_rng(devices=[]):
            model = timm.create_model(timm_name(arch), num_classes=0, **read_options(words))
            if takes(model, size, channels):
                return _with_stem(model, stem, channels), words
    with torch.random.fork_rng(devices=[]):
        model = timm.create_model(timm_name(arch), num_classes=0, **read_options(options))
    return _with_stem(model, stem, channels), list(options)


def _with_stem(model: Any, stem, channels=3):
    """With the first layers of the ``cifar`` stem, where that is asked for; they are not initialised for it."""
    if stem == "cifar":
        model.conv1 = nn.Conv2d(channels, model.conv1.out_channels, kernel_size=3, padding=1, bias=False)
        model.maxpool = nn.Identity()
    return model


def _check_timm_has(arch):
    """UserError unless timm has one of torchvision's models with the same tensors."""
    if arch.startswith("timm/"):
        return
    import timm

    state = to_timm(skeleton(arch)[0].state_dict(), arch)
    shapes = {}
    if timm.is_model(timm_name(arch)):
        model = skeleton(f"timm/{timm_name(arch)}")[0]
        shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    if shapes != {name: tensor.shape for name, tensor in state.items()}:
        raise UserError(
            f"timm has no {arch} with torchvision's tensors: use --format torchvision or safetensors, or train "
            f"a model of timm's (model.arch timm/NAME)"
        )


def loading_code(
    library: str, arch: str, stem: str, file_name: str, options: Sequence[str] = (), channels: int = 3
) -> str:
    """Python lines with which a user builds the model from the file: ``model`` gives features afterwards."""
    is_safetensors = file_name.endswith(".safetensors")
    stem_lines = [line.format(channels) for line in STEM_LINES] if stem == "cifar" and arch != "tiny" else []
    if channels != 3 and not stem_lines and library in ("torchvision", ""):
        stem_lines = _first_layer(library, arch, stem, options, channels)
    arguments = ", ".join(f"{name}={value!r}" for name, value in read_options(options).items())
    given = f", {arguments}" if arguments else ""
    if library == "timm":
        name = timm_name(arch)
        if not stem_lines:
            build = (
                f'model = timm.create_model("{name}", num_classes=0{given}, checkpoint_path={file_name!r})'
            )
            return "\n".join(["import timm", "", build])
        build = [f'model = timm.create_model("{name}", num_classes=0{given})', *stem_lines]
        return "\n".join(
            ["import timm", "import torch", "", *build, f"timm.models.load_checkpoint(model, {file_name!r})"]
        )
    imports = [] if library == "caco_scale" and is_safetensors else ["import torch"]
    imports += ["from safetensors.torch import load_file"] if is_safetensors else []
    read = f"load_file({file_name!r})" if is_safetensors else f"torch.load({file_name!r}, weights_only=True)"
    if library == "caco_scale":
        imports.append("from caco_scale.method.encoders import build_backbone")
        more = f", channels={channels}" if channels != 3 else ""
        build = [f'model, _ = build_backbone("{arch}", "{stem}"{more})']
    elif not library:
        module, _, function = arch.partition(":")
        imports = [line for line in imports if line != "import torch" or stem_lines or not is_safetensors]
        imports.append(f"import {module}")
        build = [f"model = {module}.{function}({arguments})", *stem_lines]
    else:
        imports.append(f"from torchvision.models import {arch}")
        head = re.sub(r"\.(\d+)", r"[\1]", _of_torchvision(arch, options)[1])
        build = [f"model = {arch}({arguments})", f"model.{head} = torch.nn.Identity()", *stem_lines]
    return "\n".join([*imports, "", *build, f"model.load_state_dict({read})"])


def _first_layer(library, arch, stem, options, channels):
    """The lines that give the library's model a first convolution of other than three channels."""
    model = _of_torchvision(arch, options)[0] if library else skeleton(arch, stem, options)[0]
    lines = []
    for name in take_channels(arch, model, channels):
        conv = model.get_submodule(name)
        sizes = f"kernel_size={conv.kernel_size}, stride={conv.stride}, padding={conv.padding}"
        place = re.sub(r"\.(\d+)", r"[\1]", name)
        bias = conv.bias is not None
        lines.append(
            f"model.{place} = torch.nn.Conv2d({channels}, {conv.out_channels}, {sizes}, bias={bias})"
        )
    return lines


def _of_torchvision(arch, options):
    """torchvision's own model, without memory where that can be, and the dotted name of its classifier."""
    try:
        with torch.device("meta"):
            model = models.get_model(arch, weights=None, **read_options(options))
    except NotImplementedError:  # it needs values while it is built
        with torch.random.fork_rng(devices=[]):
            model = models.get_model(arch, weights=None, **read_options(options))
    return model, head_of(model)
