"""Backbones by name, without a classifier: any of torchvision's, any of timm's, or a function of the user's own.

Parameter names are those of the library, so that an exported state dict loads there. Nothing here knows single
architectures but ``tiny``, the demo's own: a head is found, features are measured, sizes are tried.

Shapes: B batch, F features, H and W an image's height and width.
"""

import ast
import contextlib
import importlib
import itertools
import json
import os
import sys
import traceback
import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _NormBase
from torchvision import models
from torchvision.models.resnet import BasicBlock

from caco_scale.distributed.recompute import NotRepeatable
from caco_scale.errors import UserError, did_you_mean, one_line, with_article
from caco_scale.flags.choices import STEMS
from caco_scale.method.architectures import CALLABLE, unknown
from caco_scale.method.channels import forward, probes, take_channels
from caco_scale.method.vision_transformer import VisionTransformer

TORCHVISION = tuple(models.list_models(module=models))
RESNETS = tuple(name for name in TORCHVISION if name.startswith(("resnet", "resnext", "wide_resnet")))
ARCHITECTURES = (*RESNETS, "vit_b_16", "tiny")  # what a file of weights that names nothing is tried for
ANY_SIZE = (
    {"dynamic_img_size": True},
    {"strict_img_size": False},
    {},
)  # how timm's models take several sizes
USUAL_SIZES = (224, 32, 64, 96, 128, 160, 192, 256, 288, 320, 384, 448, 512)  # then multiples of 16, 14 and 8
KNOWN_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
MOST_TRIES, MOST_SHOWN = 40, 6  # of sizes


def build_backbone(
    arch: str, stem: str = "imagenet", options: Sequence[str] = (), channels: int = 3
) -> tuple[nn.Module, int]:
    """A randomly initialised backbone: ``(module giving (B, F) features, F)``.

    Args:
        arch: ``tiny``; a torchvision classification model's name; ``timm/NAME``; or ``package.module:callable``, a
            function that returns a module which gives features (B, F), or a feature map (B, F, rows, columns), whose
            mean over the places is then taken.
        stem: ``imagenet``: the first layer as the architecture has it; ``cifar``: a 3x3 convolution of stride 1 and
            no max-pool, for images of about 32 pixels (ResNets only; ``tiny`` always has it).
        options: ``NAME=VALUE``, keyword arguments of the architecture, as :func:`read_options` reads them.
        channels: of the images (C); other than 3, timm's own models are built for, and the first convolution of others
            is replaced (:func:`caco_scale.method.channels.take_channels`).

    Weights are the library's own initialisation (the last BatchNorm of a ResNet's block starts at one, as the authors
    have it). Layers of chance (dropout, stochastic depth) of torchvision and timm are off unless an option names them:
    with them a step depends on the number of processes. F is measured.

    Raises:
        UserError: no such architecture, one that does not take the options, is no module, or gives no features.
    """
    if stem not in STEMS:
        raise UserError(f"model.stem: no stem {stem!r}; use one of {', '.join(STEMS)}")
    backbone = _build(arch, read_options(options), channels)
    take_channels(arch, backbone, channels)
    if stem == "cifar" and not isinstance(backbone, TinyResNet):
        _use_small_stem(arch, backbone)
    return backbone, _measure(arch, backbone, channels)


def takes_views_at_once(arch: str, options: Sequence[str], backbone: nn.Module) -> bool:
    """Whether several views may pass as one batch: nothing looks across samples but BatchNorm, nothing draws numbers.

    Known of torchvision's, timm's and our own; what others have written passes view by view.
    """
    if _is_callable(arch) or _asks_for_chance(read_options(options)):
        return False
    return all(
        type(part) in KNOWN_NORMS or type(part).__name__ == "BatchNormAct2d"
        for part in backbone.modules()
        if isinstance(part, _NormBase) or any(name.startswith("running_") for name in part._buffers)
    )


def skeleton(
    arch: str, stem: str = "imagenet", options: Sequence[str] = (), channels: int = 3
) -> tuple[nn.Module, int]:
    """As :func:`build_backbone` without memory where that is possible, to look at. Random numbers go on as before."""
    if not _is_callable(arch):
        with contextlib.suppress(UserError), torch.device("meta"):
            return build_backbone(arch, stem, options, channels)
    # A few need values while they are built: then with memory, or here for the true reason.
    with torch.random.fork_rng(devices=[]):
        return build_backbone(arch, stem, options, channels)


def fillable(arch: str, stem: str, options: Sequence[str] = (), channels: int = 3) -> tuple[nn.Module, int]:
    """As :func:`build_backbone`, for one who gives it a whole state dict: what that does not hold is there."""
    if arch in TORCHVISION or arch == "tiny":  # a state dict holds all that these consist of
        return skeleton(arch, stem, options, channels)
    with torch.random.fork_rng(devices=[]):
        return build_backbone(arch, stem, options, channels)


def read_options(words: Iterable[str]) -> dict[str, Any]:
    """``("depth=4", "layers=[2, 2]", "act=gelu")`` as keyword arguments: JSON, else Python's literals, else text."""
    found = {}
    for word in words:
        name, _, text = word.partition("=")
        if name in found:
            raise UserError(f"model.options gives {name} twice: keep one of them")
        found[name] = _value(text)
    return found


def refuse_views(arch: str, backbone: nn.Module, sizes: Sequence[int], channels: int = 3) -> None:
    """UserError where a backbone cannot be trained on views of these sizes (pixels): with sizes that it takes.

    Tried in train mode on a copy without memory (or with it where that cannot be), the first size backward too: a
    parameter without a gradient is an error, and so is a module that has none to train.
    """
    if not any(p.requires_grad for p in backbone.parameters()):
        raise UserError(f"model.arch {arch} has no parameters to train: give one that has")
    for size in dict.fromkeys(sizes):
        problem = _problem(arch, backbone, size, channels)
        if problem is None:
            continue
        others = sorted({*USUAL_SIZES, *range(16, 513, 16), *range(14, 533, 14)}, key=lambda x: abs(x - size))
        taken = (other for other in others[:MOST_TRIES] if _problem(arch, backbone, other, channels) is None)
        found = ", ".join(map(str, sorted(itertools.islice(taken, MOST_SHOWN))))
        fix = (
            f"it can on {found}: change views.size, views.local_size" if found else "nor on sizes near to it"
        )
        raise UserError(f"{arch} cannot be trained on views of {size} pixels ({problem}); {fix}")
    _problem(arch, backbone, sizes[0], channels, backward=True)


def takes(backbone: nn.Module, size: int, channels: int = 3) -> bool:
    """Whether it gives features of images of ``size`` pixels in eval mode; tried on a copy."""
    for probe in probes(backbone):
        with contextlib.suppress(Exception), torch.no_grad():
            forward(probe.eval(), size, channels)
            return True
    return False


def _value(text):
    for read in (json.loads, ast.literal_eval):
        try:
            return read(text)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
    return text


def _is_callable(arch):
    return bool(CALLABLE.fullmatch(arch))


def _build(arch, options, channels):
    try:
        if arch == "tiny":
            return TinyResNet(**options)
        if arch in TORCHVISION:
            return _from_torchvision(arch, options)
        if arch.startswith("timm/"):
            return _from_timm(arch.removeprefix("timm/"), options, channels)
        if _is_callable(arch):
            return _from_callable(arch, options)
    except UserError:
        raise
    except Exception as error:  # whatever a library or a user's function may raise
        given = (
            f" with model.options {', '.join(f'{k}={v!r}' for k, v in options.items())}" if options else ""
        )
        raise UserError(
            f"model.arch {arch} cannot be built{given}: {type(error).__name__}: {one_line(error)[:400]}{_where(error)}"
        ) from error
    raise unknown(arch)


def _where(error):
    """The last line of code that is not a library's, for the one who wrote it."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if "site-packages" not in f.filename]
    frames = [f for f in frames if f.filename != __file__]
    return f" ({frames[-1].filename}, line {frames[-1].lineno})" if frames else ""


def _from_torchvision(arch, options):
    _refuse_options(options, "weights", "num_classes")
    is_vit = arch.startswith("vit_")
    with (
        warnings.catch_warnings()
    ):  # a classifier for no class has nothing to initialise, and takes no random number
        warnings.filterwarnings("ignore", message="Initializing zero-element tensors")
        backbone: Any = models.get_model(
            arch, weights=None, **({"num_classes": 0} if is_vit else {}), **options
        )
    if is_vit:
        return _without_chance(VisionTransformer.of(backbone), options)
    path = head_of(backbone)
    parent, _, name = path.rpartition(".")
    setattr(backbone.get_submodule(parent), name, nn.Identity())
    return _without_chance(backbone, options)


def head_of(model: nn.Module) -> str:
    """The dotted name of the layer of one of torchvision's models that gives the classes, the last with weights."""
    return [name for name, m in model.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)][-1]


def _from_timm(name, options, channels):
    try:
        import timm
    except ImportError as error:
        raise UserError(f"model.arch timm/{name} needs timm ({one_line(error)}): pip install timm") from None
    _refuse_options(options, "pretrained", "num_classes", "checkpoint_path", "pretrained_cfg", "cache_dir")
    if not timm.is_model(name.split(".")[0]):
        raise unknown(f"timm/{name}")
    any_size: dict[str, Any]
    for any_size in ANY_SIZE:
        given: Any = {**any_size, **({"in_chans": channels} if channels != 3 else {}), **options}
        try:
            backbone = timm.create_model(name, pretrained=False, num_classes=0, **given)
        except TypeError as error:
            if not any(word in str(error) for word in any_size.keys() - options.keys()):
                raise
        else:
            return _without_chance(backbone, options)
    raise AssertionError("the last of ANY_SIZE adds no argument")


def _refuse_options(options, *names):
    for name in names:
        if name in options:
            raise UserError(
                f"model.options: {name} is not to be chosen, a backbone has no classes and starts untrained"
            )


def _without_chance(backbone, options):
    """Layers that draw random numbers draw none, unless an option asks for them."""
    if not _asks_for_chance(options):
        for module in backbone.modules():
            if "Drop" in type(module).__name__ or type(module).__name__ == "StochasticDepth":
                for name in ("p", "drop_prob"):
                    if hasattr(module, name):
                        setattr(module, name, 0.0)
    return backbone


def _asks_for_chance(options):
    return any("drop" in name or "stochastic" in name for name in options)


def _from_callable(arch, options):
    path, _, name = arch.partition(":")
    if path.split(".")[0] in sys.stdlib_module_names:
        raise UserError(f"model.arch {arch}: {path} is Python's own, give a module of yours")
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.append(os.getcwd())
    try:
        found: Any = importlib.import_module(path)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{path}.".startswith(f"{error.name}."):
            raise
        raise UserError(
            f"model.arch {arch}: there is no module {error.name} in {os.getcwd()} or on Python's path: "
            "start in the folder that holds it, or set PYTHONPATH"
        ) from None
    for part in name.split("."):
        if not hasattr(found, part):
            raise UserError(f"model.arch {arch}: {path} has no {part}{did_you_mean(part, dir(found))}")
        found = getattr(found, part)
    if not callable(found):
        raise UserError(
            f"model.arch {arch} is {with_article(type(found).__name__)}: give a function that returns a torch.nn.Module"
        )
    backbone = found(**options)
    if not isinstance(backbone, nn.Module):
        raise UserError(
            f"model.arch {arch} returns {with_article(type(backbone).__name__)}: return a torch.nn.Module"
        )
    return backbone


def _use_small_stem(arch, backbone):
    first = getattr(backbone, "conv1", None)
    if not isinstance(first, nn.Conv2d) or not hasattr(backbone, "maxpool"):
        raise UserError(
            f"model.stem: 'cifar' is for ResNets and {arch} has another first layer; use 'imagenet'"
        )
    backbone.conv1 = nn.Conv2d(
        first.in_channels, first.out_channels, kernel_size=3, stride=1, padding=1, bias=False
    )
    nn.init.kaiming_normal_(backbone.conv1.weight, mode="fan_out", nonlinearity="relu")
    backbone.maxpool = nn.Identity()


def _measure(arch, backbone, channels):
    """F, by a forward of two images in eval mode on a copy; a backbone that gives maps is made to give their means."""
    problem, output = "", None
    for probe in probes(backbone):
        probe.eval()
        for size in USUAL_SIZES:
            try:
                with torch.no_grad():
                    output = forward(probe, size, channels)
                break
            except Exception as error:  # of a module that nobody here has written
                problem = (
                    problem
                    or f"on {size} pixels {type(error).__name__}: {one_line(error)[:400]}{_where(error)}"
                )
        if output is not None:
            break
    if output is None:
        raise UserError(f"model.arch {arch} gives no features, {problem}")
    _refuse_output(arch, output)
    if output.ndim == 4:
        backbone.register_forward_hook(_mean_over_places)
    return output.shape[1]


def _refuse_output(arch, output, has_aux=False):
    wanted = "return a module that gives features (B, F), or a feature map (B, F, rows, columns)"
    wanted = (
        "give --model.options aux_logits=false" if has_aux else wanted
    )  # torchvision's GoogLeNet and Inception
    if not isinstance(output, torch.Tensor):
        raise UserError(f"model.arch {arch} gives {with_article(type(output).__name__)}: {wanted}")
    if output.ndim not in (2, 4) or len(output) != 2 or not output.shape[1] or not output.is_floating_point():
        raise UserError(f"model.arch {arch} gives {tuple(output.shape)} {output.dtype} of 2 images: {wanted}")


def _mean_over_places(module, inputs, output):
    """(B, F, rows, columns) -> (B, F); what is no map stays, and is refused."""
    return output.mean(dim=(2, 3)) if getattr(output, "ndim", 0) == 4 else output


def _problem(arch, backbone, size, channels=3, backward=False) -> str | None:
    """Why views of ``size`` pixels cannot be trained on; None: they can. UserError for what no size changes."""
    problem = None
    for probe in probes(backbone):
        try:
            with torch.set_grad_enabled(backward), torch.random.fork_rng(devices=[]):
                output = forward(probe.train(), size, channels)
                if backward:
                    output.sum().backward()
        except NotRepeatable:
            raise
        except Exception as error:  # of a module that nobody here has written
            problem = one_line(error)[:300] or type(error).__name__
            continue
        _refuse_output(arch, output, getattr(backbone, "aux_logits", False))
        unused = [n for n, p in probe.named_parameters() if backward and p.requires_grad and p.grad is None]
        if unused:
            raise UserError(
                f"model.arch {arch}: {len(unused)} parameters have no part in its features ({', '.join(unused[:5])}): "
                "leave them out of the module, or give them requires_grad_(False)"
            )
        return None
    return problem


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
