"""How torchvision and timm build and name the backbones of this project.

Our own names are torchvision's, so that only timm's vision transformer needs others. What a library does not have is
said, not hidden: ``tiny`` loads into this project's own module and is refused for timm, and the two lines that make
the ``cifar`` stem stand in the model card.
"""

from collections.abc import Mapping

import torch
from torch import nn
from torchvision import models

from caco_scale.errors import UserError
from caco_scale.method.encoders import build_backbone
from caco_scale.weights.recognise import timm_vit_names

TIMM_NAMES = {"vit_b_16": "vit_base_patch16_224"}  # the ResNets have the same name in both
STEM_LINES = [  # what library_model does, for people
    "model.conv1 = torch.nn.Conv2d(3, 64, kernel_size=3, padding=1, bias=False)  # the stem for small images",
    "model.maxpool = torch.nn.Identity()",
]


def to_timm(state: Mapping[str, torch.Tensor], arch: str) -> dict[str, torch.Tensor]:
    """A state dict in torchvision's names under timm's; the tensors are the same."""
    if arch not in TIMM_NAMES:
        return dict(state)
    names = timm_vit_names()
    return {names[name]: tensor for name, tensor in state.items()}


def library_model(library: str, arch: str, stem: str) -> nn.Module:
    """The library's own model without its classifier, on the meta device: images -> features (B, F).

    ``library``: torchvision, timm, or caco_scale (whose ``tiny`` is). UserError where the
    library has no such model or is not installed.
    """
    check_library(library, arch)
    with torch.device("meta"):
        if library == "caco_scale":
            return build_backbone(arch, stem)[0]
        if library == "timm":
            import timm

            model = timm.create_model(TIMM_NAMES.get(arch, arch), num_classes=0)
        else:
            model = models.get_model(arch, weights=None)
            setattr(model, _head(arch), nn.Identity())
        if stem == "cifar":
            model.conv1 = nn.Conv2d(3, 64, kernel_size=3, padding=1, bias=False)
            model.maxpool = nn.Identity()
    return model


def check_library(library: str, arch: str) -> None:
    """Refuse what the library cannot build (UserError)."""
    if library != "timm":
        return
    try:
        import timm  # noqa: F401
    except ModuleNotFoundError:
        raise UserError(
            "--format timm compares with timm's own model, which is not installed: pip install timm"
        ) from None
    if arch == "tiny":
        raise UserError("timm has no model tiny, it is this project's own: use --format safetensors")


def loading_code(library: str, arch: str, stem: str, file_name: str) -> str:
    """Python lines with which a user builds the model from the file: ``model`` gives features afterwards."""
    is_safetensors = file_name.endswith(".safetensors")
    stem_lines = STEM_LINES if stem == "cifar" and arch != "tiny" else []
    if library == "timm":
        name = TIMM_NAMES.get(arch, arch)
        if not stem_lines:
            build = f'model = timm.create_model("{name}", num_classes=0, checkpoint_path={file_name!r})'
            return "\n".join(["import timm", "", build])
        build = [f'model = timm.create_model("{name}", num_classes=0)', *stem_lines]
        return "\n".join(
            ["import timm", "import torch", "", *build, f"timm.models.load_checkpoint(model, {file_name!r})"]
        )
    imports = [] if library == "caco_scale" and is_safetensors else ["import torch"]
    imports += ["from safetensors.torch import load_file"] if is_safetensors else []
    read = f"load_file({file_name!r})" if is_safetensors else f"torch.load({file_name!r}, weights_only=True)"
    if library == "caco_scale":
        imports.append("from caco_scale.method.encoders import build_backbone")
        build = [f'model, _ = build_backbone("{arch}", "{stem}")']
    else:
        imports.append(f"from torchvision.models import {arch}")
        build = [f"model = {arch}()", f"model.{_head(arch)} = torch.nn.Identity()", *stem_lines]
    return "\n".join([*imports, "", *build, f"model.load_state_dict({read})"])


def _head(arch):
    """What torchvision calls the classifier."""
    return "heads" if arch.startswith("vit") else "fc"
