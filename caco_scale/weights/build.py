"""Modules out of state dicts: on the CPU, in fp32, in eval mode, complete and finite or refused."""

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import cache

import torch
from torch import Tensor, nn

from caco_scale.errors import UserError
from caco_scale.method.encoders import fillable, skeleton
from caco_scale.method.projector import build_projector

MOST_SHOWN = 20_000  # letters of a list of names: all names of any backbone here have room


def shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a module's parameters and buffers."""
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}


@cache
def expected_shapes(
    arch: str, stem: str, options: tuple[str, ...] = (), channels: int = 3
) -> dict[str, tuple[int, ...]]:
    """Those of a backbone."""
    return shapes(skeleton(arch, stem, options, channels)[0])


def differences(
    expected: Mapping[str, tuple[int, ...]], state: Mapping[str, Tensor]
) -> tuple[list[str], list[str], list[str]]:
    """(names missing, names too many, names of another shape); a BatchNorm's count of batches may be missing."""
    missing = [n for n in expected if n not in state and not n.endswith("num_batches_tracked")]
    return (
        missing,
        [n for n in state if n not in expected],
        [n for n in expected if n in state and tuple(state[n].shape) != expected[n]],
    )


def folded(names: Iterable[str]) -> str:
    """The names, those of one module together: ``bn1.{bias, weight}, conv1.weight``."""
    groups = {}
    for name in names:
        parent, _, last = name.rpartition(".")
        groups.setdefault(parent, []).append(last)
    return _shown(
        f"{parent}.{{{', '.join(last)}}}"
        if len(last) > 1 and parent
        else ", ".join(f"{parent}.{x}".strip(".") for x in last)
        for parent, last in groups.items()
    )


def gist(names: Iterable[str]) -> str:
    """Names by their first word, with how many there are of each: ``fc.* (2), encoder_k.* (161), epoch``."""
    counts = Counter(
        first + (".*" if rest else "") for first, _, rest in (name.partition(".") for name in names)
    )
    return _shown(f"{first} ({n})" if first.endswith(".*") else first for first, n in counts.items())


def printable(text: str) -> str:
    """What stands in a file, without what a terminal would obey."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)


def _shown(parts):
    text = ", ".join(parts)
    return printable(text[:MOST_SHOWN]) + (
        f" ... ({len(text):,} letters in all)" if len(text) > MOST_SHOWN else ""
    )


def fill_backbone(
    arch: str, stem: str, options: Sequence[str], state: Mapping[str, Tensor], path: str, channels: int = 3
) -> tuple[nn.Module, int]:
    """A backbone with all tensors of a state dict, in fp32 -> (module, F). UserError where they do not fit."""
    backbone, num_features = fillable(arch, stem, options, channels)
    expected = shapes(backbone)
    # A run's checkpoint has every buffer; those that the module makes itself are no state.
    own = {name for name, _ in backbone.named_buffers()} - set(expected)
    state = {name: tensor for name, tensor in state.items() if name not in own}
    missing, unexpected, wrong = differences(expected, state)
    if missing or unexpected or wrong:
        raise UserError(
            f"{path} does not hold a whole {arch} (stem {stem}) and nothing else: missing, of another shape or "
            f"without a place: {folded([*missing, *wrong, *unexpected])}"
        )
    filled = {name: state.get(name, torch.zeros((), dtype=torch.int64)) for name in expected}
    _assign(backbone, filled, path)
    return backbone, num_features


def fill_projector(num_features: int, state: Mapping[str, Tensor], path: str) -> nn.Sequential | None:
    """A projector with the tensors of a state dict, or None where they are those of another kind of head."""
    try:
        hidden, embedding_dim = state["0.weight"].shape[0], state["6.weight"].shape[0]
        with torch.device("meta"):
            projector = build_projector(num_features, hidden, embedding_dim)
    except (KeyError, IndexError, RuntimeError):
        return None
    expected = shapes(projector)
    if any(differences(expected, state)):
        return None
    filled = {name: state.get(name, torch.zeros((), dtype=torch.int64)) for name in expected}
    _assign(projector, filled, f"{path}, projector")
    return projector


def _assign(module, state, path):
    """Put a complete state dict into a module on the meta device, in fp32; UserError for what is not finite."""
    kept = {}
    for name, reference in module.state_dict().items():
        tensor = state[name]
        if (
            tensor.layout != torch.strided
            or tensor.is_complex()
            or tensor.is_quantized
            or tensor.device.type != "cpu"
        ):
            raise UserError(f"{path}: {name} is no plain dense tensor ({tensor.dtype}, {tensor.layout})")
        held = tensor.untyped_storage().nbytes()
        if tensor.numel() * tensor.element_size() > held:  # expanded: a few bytes that stand for many
            raise UserError(
                f"{path}: {name} claims {tuple(tensor.shape)} of {held:,} bytes: save contiguous tensors"
            )
        if reference.is_floating_point() != tensor.is_floating_point():
            raise UserError(f"{path}: {name} is {tensor.dtype}, {reference.dtype} expected")
        kept[name] = tensor.to(reference.dtype).contiguous()
    bad = [
        name for name, tensor in kept.items() if tensor.is_floating_point() and not tensor.isfinite().all()
    ]
    if bad:
        raise UserError(
            f"{path}: {len(bad)} of {len(kept)} tensors are not finite ({folded(bad)}): its training diverged or the "
            "file is damaged, give an earlier checkpoint"
        )
    module.load_state_dict(kept, assign=True)
    module.eval().requires_grad_(False)


def digest(module: nn.Module) -> str:
    """sha256 (hex) of a module's tensors, names included."""
    sha256 = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        sha256.update(name.encode())
        sha256.update(tensor.cpu().numpy().tobytes())
    return sha256.hexdigest()
