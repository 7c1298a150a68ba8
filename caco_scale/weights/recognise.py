"""What a file of weights holds: whose checkpoint it is, which of its encoders is meant, which architecture that is."""

import re
from collections.abc import Container, Mapping
from typing import Any

from torch import Tensor

from caco_scale.data.pixels import MOST_CHANNELS
from caco_scale.errors import UserError, with_article
from caco_scale.flags.choices import ENCODERS
from caco_scale.method.encoders import ARCHITECTURES
from caco_scale.weights.build import differences, expected_shapes, folded, gist, printable

# Names of the two encoders within a state dict, with what they belong to; the first that occurs wins.
PREFIXES = (
    ("encoder_q.", "encoder_k.", "MoCo v1 or v2"),
    ("base_encoder.", "momentum_encoder.", "MoCo v3"),
    ("backbone.", None, "DINO"),
)
# What may stand beside a backbone without being part of it, by the first words of its names: classifiers, projectors,
# predictors, prototypes, MoCo's queue, the decoder and the masks of MAE and iBOT, the count of an average (EMA).
HEADS = (
    *("fc.", "head.", "heads.", "last_layer.", "classifier.", "pre_logits."),
    *("projector.", "projection_head.", "predictor.", "prediction_head.", "prototypes."),
    *("queue", "decoder_", "mask_token", "masked_embed", "n_averaged"),
)
# Parts that a backbone of this program does not have, and whose they are.
FOREIGN_PARTS = (
    (r"\.se\.fc1\.", "squeeze-and-excitation, as in timm's se{arch}"),
    (r"\.se\.", "channel attention, as in timm's ecaresnet and gcresnet models"),
    (r"\.ls[12]\.|\.gamma", "LayerScale, as in DeiT III and DINOv2"),
    (
        r"\.attn\.(q|k)?_?norm\.|\.mlp\.norm\.",
        "norms within attention or MLP, as in timm's ViTs with qk_norm",
    ),
    (r"^(reg|dist)_token", "register or distillation tokens, as in DINOv2 with registers and distilled DeiT"),
    (r"^norm_pre\.", "a norm before the blocks, as in CLIP's ViT"),
    (
        r"^(fc_norm|attn_pool)\.",
        "another pooling than the class token, as in MAE's fine-tuned ViTs and SigLIP",
    ),
    (r"^layer\d\.\d+\.conv1\.weight|^blocks\.\d+\.norm1\.weight", "more blocks, as a deeper model has"),
)
# Models of timm whose names and shapes are those of an ordinary ResNet while their layers are not (anti-aliasing).
SAME_NAMES = re.compile(r"res\w*(blur|aa)\d", re.IGNORECASE)
# What timm calls the models that have another name in torchvision; the ResNets have the same name in both.
TIMM_NAMES = {"vit_b_16": "vit_base_patch16_224"}
SINGLE = "single"  # the encoder of a file that holds one and does not say which


def choose_encoder(
    path: object, content: Mapping[str, Any], which: str | None, said: str | None = None
) -> tuple[str, str, dict[str, Tensor], list[str]]:
    """(what the file is taken for, query or key or :data:`SINGLE`, its state dict, the names of all the rest).

    ``path``: of the file, for the errors. ``said``: the encoder that the metadata of an export of ours name.
    """
    outer = [name for name in content if isinstance(content[name], dict)]
    if "teacher" in outer or "student" in outer:
        which = which or "key"
        name = {"query": "student", "key": "teacher"}[which]
        kind, state = "DINO", content.get(name)
        if not isinstance(state, dict):
            raise UserError(f"{path} holds no {name} (--which {which}): it has {folded(map(str, content))}")
    else:
        name = next((name for name in ("state_dict", "model") if name in outer), None)
        kind, state = "state dict of torchvision's names", content[name] if name else content
    others = [] if state is content else [str(key) for key in content if key != name]
    tensors = {str(key): value for key, value in state.items() if isinstance(value, Tensor)}
    others += [str(key) for key, value in state.items() if not isinstance(value, Tensor)]
    if not tensors:
        raise UserError(f"{path} holds no tensors by name but {folded(map(str, content)) or 'nothing'}")
    tensors = {_without_wrappers(key): value for key, value in tensors.items()}
    for query, key, family in () if said else PREFIXES:  # an export of ours has a backbone's names alone
        if not any(name.startswith((query, key or query)) for name in tensors):
            continue
        if key is None:
            _check_no_segmentation(path, tensors, query)
            break
        which = which or "query"
        prefix = query if which == "query" else key
        if not (found := within(tensors, prefix)):
            raise UserError(f"{path} holds no {which} encoder ({prefix}*): try --which {_other(which)}")
        kind = "checkpoint of CaCo's authors" if "Memory_Bank" in content else family
        return kind, which, found, others + [name for name in tensors if not name.startswith(prefix)]
    else:
        query = ""
    if kind != "DINO":
        kind, which = ("export of caco_scale" if said else kind), _only_one(path, which, said)
    found = within(tensors, query)
    return kind, which or SINGLE, found, others + [name for name in tensors if not name.startswith(query)]


def _only_one(path, which, said):
    """Whose the only encoder of a file is."""
    if which and which != said:
        what = f"holds the {said} encoder" if said else "holds one encoder without saying whose"
        raise UserError(f"{path} {what}: drop --which {which}")
    return said or SINGLE


def _check_no_segmentation(path, tensors, prefix):
    """UserError: a backbone below convolutions. A segmenter's ResNet is dilated, and no name says so."""
    beside = [name for name, tensor in tensors.items() if tensor.ndim == 4 and not name.startswith(prefix)]
    if beside:
        raise UserError(
            f"{path} holds {with_article(prefix[:-1])} below convolutions ({folded(beside)}), as segmenters and "
            "detectors have it: their ResNets may be dilated, which gives other features and which no name says; if "
            f"this one is not, save model.{prefix[:-1]}.state_dict() alone"
        )


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


def renamed_for(arch: str | None, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A ViT-B/16 under the names that ``arch`` (None: one of torchvision's) has; anything else as it is."""
    if not of_other_names(arch):
        return timm_vit_renamed(state)
    if arch is not None and same_model(arch, "vit_b_16") and "conv_proj.weight" in state:
        names = timm_vit_names()
        return {names.get(name, name): value for name, value in state.items()}
    return dict(state)


def timm_vit_renamed(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A ViT by timm's names (MoCo v3, DINO, timm itself) by torchvision's; anything else as it is."""
    if "patch_embed.proj.weight" not in state:
        return dict(state)
    ours = {theirs: ours for ours, theirs in timm_vit_names().items()}
    return {ours.get(name, name): value for name, value in state.items()}


def timm_name(arch: str) -> str:
    """What timm calls an architecture that it has."""
    return TIMM_NAMES.get(arch, arch).removeprefix("timm/")


def same_model(a: str, b: str) -> bool:
    """Whether two architectures by name are the same layers: of torchvision and of timm, with timm's tags or without.

    A name of both libraries may mean two models; their tensors differ then.
    """
    return timm_name(a).partition(".")[0] == timm_name(b).partition(".")[0]


def of_other_names(arch: str | None) -> bool:
    """Is it an architecture of timm's or of the user's own, whose names are not torchvision's?"""
    return arch is not None and ("/" in arch or ":" in arch)


def split_heads(
    state: Mapping[str, Tensor], known: Container[str] = ()
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(what must be the backbone, the :data:`HEADS` beside it). ``known``: names that are the backbone's."""
    heads = {name: tensor for name, tensor in state.items() if name.startswith(HEADS) and name not in known}
    return {name: tensor for name, tensor in state.items() if name not in heads}, heads


def check_stated_name(path: object, content: Mapping[str, Any], arch: str | None) -> None:
    """Refuse (UserError) a checkpoint that names a model of :data:`SAME_NAMES`, unless the user says what it is."""
    arguments = content.get("args")
    for name in (content.get("arch"), *(getattr(arguments, key, None) for key in ("arch", "model"))):
        if arch is None and isinstance(name, str) and SAME_NAMES.search(name):
            raise UserError(
                f"{path} says that it is {with_article(printable(name[:80]))}, which has an ordinary "
                "ResNet's tensors and other layers: load it with timm; --arch ARCH takes it for an ordinary one, "
                "with other features"
            )


def find_architecture(
    path: object,
    state: Mapping[str, Tensor],
    arch: str | None,
    stem: str | None,
    options: tuple[str, ...] = (),
    channels: int = 3,
) -> tuple[str, str, int]:
    """The (arch, stem, channels) whose names and shapes are exactly those of the state dict.

    ``channels``: of the images, as far as the file says it; where it says nothing, 3, the first layer does.

    UserError names the nearest, what differs, and what would load it: a tensor that is left out changes the features.
    """
    likely = ("resnet50", "tiny", "vit_b_16", "resnet18", "resnet34")
    every = dict.fromkeys((*likely, *ARCHITECTURES))
    best: Any = None
    for candidate in _candidates([arch] if arch else every, [stem] if stem else [_stem(state)], arch):
        expected = expected_shapes(*candidate, options, channels)
        missing, extra, wrong = differences(expected, state)
        if not (missing or extra or wrong):
            return *candidate, channels
        if not (missing or extra) and len(wrong) == 1 and channels == 3:
            other = _other_channels(expected[wrong[0]], tuple(state[wrong[0]].shape))
            if other and not any(differences(expected_shapes(*candidate, options, other), state)):
                return *candidate, other
        distance = bool(missing or wrong), 2 * len(missing) + len(extra) + len(wrong)
        if best is None or distance < best[0]:
            best = distance, candidate, missing, extra, wrong, expected
    _, nearest, missing, extra, wrong, expected = best
    if arch and not any(name in expected for name in state):
        raise UserError(f"{path} holds nothing of {arch}: it has {gist(state)}")
    parts = [
        f"missing: {folded(missing)}" if missing else "",
        f"not in it: {folded(extra)}" if extra else "",
    ]
    if wrong:
        shapes = ", ".join(f"{n} {tuple(state[n].shape)} instead of {expected[n]}" for n in wrong)
        parts.append(f"another shape: {shapes}")
    which = f"{nearest[0]} (stem {nearest[1]})"
    fits = (
        f"is no {which}:" if arch and stem else f"fits no backbone of this program; nearest is {which}, but"
    )
    raise UserError(
        f"{path} {fits} "
        f"{'; '.join(filter(None, parts))}: {_what_loads_it(state, arch, stem, nearest[0], extra)}"
    )


def _other_channels(expected, found):
    """Of how many channels a first layer is that is for 3 otherwise; 0: it differs in more."""
    is_first = len(expected) == len(found) == 4 and expected[1] == 3
    same = is_first and (expected[0], *expected[2:]) == (found[0], *found[2:])
    return found[1] if same and 1 <= found[1] <= MOST_CHANNELS else 0


def _candidates(arches, stems, arch):
    return ((a, s) for a in arches for s in stems if (a, s) != ("vit_b_16", "cifar") or arch)


def _what_loads_it(state, asked, stem, nearest, extra):
    """The end of the error: a backbone of ours that was not asked for, or the model whose part it is."""
    if asked or stem:
        for a, s in _candidates(ARCHITECTURES, [_stem(state)], None):
            if not any(differences(expected_shapes(a, s), state)):
                return f"it is {with_article(a)} (stem {s}): give --arch {a} --stem {s}, or neither"
    for pattern, what in FOREIGN_PARTS:
        if any(re.search(pattern, name) for name in extra):
            return (
                f"it has {what.format(arch=nearest)}, which this program does not build: load it with the library that "
                f"wrote it, or give weights of one of {', '.join(ARCHITECTURES)}"
            )
    return f"give weights of {asked or 'one of ' + ', '.join(ARCHITECTURES)}"


def _stem(state):
    """The first layer that a ResNet's state dict speaks of."""
    first = state.get("conv1.weight")
    return "cifar" if first is not None and first.shape[2:] == (3, 3) else "imagenet"
