"""What a file of weights holds: whose checkpoint it is, which of its encoders is meant, which architecture that is."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from caco_scale.errors import UserError
from caco_scale.flags.choices import ENCODERS
from caco_scale.method.encoders import ARCHITECTURES
from caco_scale.weights.build import differences, expected_shapes, folded

# Names of the two encoders within a state dict, with what they belong to; the first that occurs wins.
PREFIXES = (
    ("encoder_q.", "encoder_k.", "MoCo v1 or v2"),
    ("base_encoder.", "momentum_encoder.", "MoCo v3"),
    ("backbone.", None, "DINO"),
)
HEADS = ("fc.", "head.", "heads.", "last_layer.")


def choose_encoder(
    path: Path, content: Mapping[str, Any], which: str | None
) -> tuple[str, str, dict[str, Tensor], list[str]]:
    """(what the file is taken for, query or key, that encoder's state dict, the names of all the rest)."""
    outer = [name for name in content if isinstance(content[name], dict)]
    if "teacher" in outer or "student" in outer:
        which = which or "key"
        name = {"query": "student", "key": "teacher"}[which]
        kind, state = "DINO", content.get(name)
        if not isinstance(state, dict):
            raise UserError(
                f"{path} holds no {name} (--which {which}): it has {', '.join(map(str, content))}"
            )
    else:
        name = next((name for name in ("state_dict", "model") if name in outer), None)
        kind, state = "state dict of torchvision's names", content[name] if name else content
    others = [] if state is content else [str(key) for key in content if key != name]
    tensors = {str(key): value for key, value in state.items() if isinstance(value, Tensor)}
    others += [str(key) for key, value in state.items() if not isinstance(value, Tensor)]
    if not tensors:
        raise UserError(f"{path} holds no tensors by name but {folded(map(str, content)) or 'nothing'}")
    tensors = {_without_wrappers(key): value for key, value in tensors.items()}
    for query, key, family in PREFIXES:
        if not any(name.startswith((query, key or query)) for name in tensors):
            continue
        which = which or "query"
        prefix = query if which == "query" or key is None else key
        found = within(tensors, prefix)
        if not found:
            raise UserError(f"{path} holds no {which} encoder ({prefix}*): try --which {_other(which)}")
        if family != "DINO":
            kind = "checkpoint of CaCo's authors" if "Memory_Bank" in content else family
        return kind, which, found, others + [name for name in tensors if not name.startswith(prefix)]
    if which == "key" and kind != "DINO":
        raise UserError(f"{path} holds one encoder without saying whose: drop --which key")
    return kind, which or "query", tensors, others


def _other(which):
    return ENCODERS[1 - ENCODERS.index(which)]


def _without_wrappers(name):
    """Without what DataParallel and torch.compile put before the names of a state dict."""
    while name.startswith(("module.", "_orig_mod.")):
        name = name.split(".", 1)[1]
    return name


def within(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names begin so, without that beginning."""
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


def timm_vit_names() -> dict[str, str]:
    """torchvision's name of every tensor of ViT-B/16 -> timm's (and MoCo v3's and DINO's)."""
    modules, others = {"conv_proj": "patch_embed.proj", "encoder.ln": "norm"}, {}
    for block in range(12):
        ours, theirs = f"encoder.layers.encoder_layer_{block}", f"blocks.{block}"
        modules |= {f"{ours}.ln_{n}": f"{theirs}.norm{n}" for n in (1, 2)}
        modules |= {f"{ours}.mlp.{n}": f"{theirs}.mlp.fc{1 + n // 3}" for n in (0, 3)}
        modules[f"{ours}.self_attention.out_proj"] = f"{theirs}.attn.proj"
        others |= {f"{ours}.self_attention.in_proj_{k}": f"{theirs}.attn.qkv.{k}" for k in ("weight", "bias")}
    named = {f"{ours}.{k}": f"{theirs}.{k}" for ours, theirs in modules.items() for k in ("weight", "bias")}
    return {"class_token": "cls_token", "encoder.pos_embedding": "pos_embed", **named, **others}


def timm_vit_renamed(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A ViT by timm's names (MoCo v3, DINO, timm itself) by torchvision's; anything else as it is."""
    if "patch_embed.proj.weight" not in state:
        return dict(state)
    ours = {theirs: ours for ours, theirs in timm_vit_names().items()}
    return {ours.get(name, name): value for name, value in state.items()}


def find_architecture(
    path: Path, state: Mapping[str, Tensor], arch: str | None, stem: str | None
) -> tuple[str, str]:
    """The (arch, stem) whose names and shapes the state dict has; UserError names the nearest and what differs."""
    likely = ("resnet50", "tiny", "vit_b_16", "resnet18", "resnet34")
    arches = [arch] if arch else dict.fromkeys((*likely, *ARCHITECTURES))
    stems = [stem] if stem else [_stem(state)]
    best: Any = None
    for candidate in ((a, s) for a in arches for s in stems if (a, s) != ("vit_b_16", "cifar") or arch):
        expected = expected_shapes(*candidate)
        missing, extra, wrong = differences(expected, state)
        if not missing and not wrong:
            return candidate
        distance = 2 * len(missing) + len(extra) + len(wrong)
        if best is None or distance < best[0]:
            best = distance, candidate, missing, extra, wrong, expected
    _, (arch, stem), missing, extra, wrong, expected = best
    parts = [
        f"missing: {folded(missing)}" if missing else "",
        f"not in it: {folded(extra)}" if extra else "",
    ]
    if wrong:
        shapes = ", ".join(f"{n} {tuple(state[n].shape)} instead of {expected[n]}" for n in wrong)
        parts.append(f"another shape: {shapes}")
    raise UserError(
        f"{path} fits no backbone of this program; nearest is {arch} (stem {stem}), but "
        f"{'; '.join(filter(None, parts))}: give weights of one of {', '.join(ARCHITECTURES)}"
    )


def _stem(state):
    """The first layer that a ResNet's state dict speaks of."""
    first = state.get("conv1.weight")
    return "cifar" if first is not None and first.shape[2:] == (3, 3) else "imagenet"
