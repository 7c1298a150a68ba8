"""Backbones for images of other than three channels: the first layer, found by trying, and copies to try things with.

Shapes: C channels, H an image's side.
"""

import copy
from collections.abc import Iterator
from functools import partial

import torch
from torch import nn

from caco_scale.errors import UserError, one_line

MOST_LAYERS = 8  # that read the images themselves
TRIED_SIZES = (224, 32, 96, 256, 299, 384)


def take_channels(arch: str, backbone: nn.Module, channels: int) -> list[str]:
    """Make a backbone for three channels one for images of ``channels``, in place -> the names of what was replaced.

    One that takes them stays as it is. Whatever convolution of three channels the images come to (``conv1``,
    ``features.0.0``, ``conv_proj``, ...) gets a
    kernel for each channel, drawn normally with the spread of the library's own initialisation, smaller by the root of
    3 / C so that its outputs have the same size. Nothing is drawn for three channels.

    Raises:
        UserError: the images of so many channels come to something else than such a convolution.
    """
    replaced, problem = [], ""
    if channels == 3:
        return replaced
    for _ in range(MOST_LAYERS):
        for size in TRIED_SIZES:
            refused, problem = _refusing(backbone, size, channels)
            if problem is None:
                return replaced
            if refused:
                break
        if not refused:
            break
        _widen(backbone.get_submodule(refused), channels)
        replaced.append(refused)
    raise UserError(
        f"model.arch {arch} takes no images of {channels} channels and has no first convolution of 3 to be replaced "
        f"({problem}): return a module for {channels} channels (an argument of its own by model.options)"
    )


def _refusing(backbone, size, channels) -> tuple[str | None, str | None]:
    """(the name of the convolution of 3 channels that images of others fail at, if it is one, the error or None)."""
    problem = None
    for probe in probes(backbone):
        entered = []
        for name, module in probe.named_modules():
            if isinstance(module, nn.Conv2d):
                module.register_forward_pre_hook(partial(_note, entered, name))
        try:
            with torch.no_grad():
                forward(probe.eval(), size, channels)
            return None, None
        except Exception as error:  # of a module that nobody here has written
            problem = one_line(error)[:300] or type(error).__name__
        if entered:
            name, shape = entered[-1]
            conv = probe.get_submodule(name)
            if conv.in_channels == 3 and conv.groups == 1 and shape[-3] == channels:
                return name, problem
    return None, problem


def _note(entered, name, _, inputs):
    entered.append((name, inputs[0].shape))


def _widen(conv, channels):
    old = conv.weight
    spread = old.detach().std() * (3 / channels) ** 0.5
    weight = torch.empty(old.shape[0], channels, *old.shape[2:], dtype=old.dtype, device=old.device)
    conv.weight = nn.Parameter(weight.normal_() * spread, old.requires_grad)
    conv.in_channels = channels


def probes(backbone: nn.Module) -> Iterator[nn.Module]:
    """Copies to try things with: one without memory, and one with it, where the backbone has it."""
    tensors = [*backbone.parameters(), *backbone.buffers()]
    empty = {}
    for tensor in tensors:
        like = torch.empty_like(tensor, device="meta")
        is_parameter = isinstance(tensor, nn.Parameter)
        empty[id(tensor)] = nn.Parameter(like, tensor.requires_grad) if is_parameter else like
    yield copy.deepcopy(backbone, empty)
    if not any(t.is_meta for t in tensors):
        yield copy.deepcopy(backbone)


def forward(probe: nn.Module, size: int, channels: int = 3) -> torch.Tensor:
    """What the module makes of two images; the global random numbers go on as before."""
    first = next(probe.parameters(), torch.empty(0))
    images = torch.zeros(2, channels, size, size, device=first.device, dtype=first.dtype)
    with torch.random.fork_rng(devices=[]):
        return probe(images)
