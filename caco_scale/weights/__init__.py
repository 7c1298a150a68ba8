"""RUN_OR_WEIGHTS to a backbone: runs and exports of this program, and the checkpoint formats of others.

What is read                        by what it is recognised
a run, one of its checkpoints       a directory; query or key encoder, with its projector
our export (safetensors, torch)     torchvision's names; the metadata of safetensors name arch and stem
CaCo's authors                      ``state_dict`` of ``module.encoder_q.*`` and ``module.encoder_k.*``, ``Memory_Bank``
MoCo v1, v2                         ``state_dict`` of ``module.encoder_q.*``
MoCo v3                             ``state_dict`` of ``module.base_encoder.*`` and ``module.momentum_encoder.*``
DINO                                ``student`` and ``teacher`` with ``backbone.*``, or the backbone alone
torchvision, timm                   a state dict, alone or under ``state_dict`` or ``model``; timm's ViT is renamed

A file holds tensors and plain values or is refused: nothing in it is run. The architecture follows from names and
shapes; every key that has no place in the model is named, and a model with a parameter missing is never returned.
"""

import argparse
import hashlib
import json
import os
import re
import struct
import warnings
import zipfile
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import yaml
from safetensors import SafetensorError, safe_open
from torch import nn

from caco_scale.checkpoint.folder import latest, read_values, step_path, steps
from caco_scale.checkpoint.read import load_tensors
from caco_scale.choices import ENCODERS
from caco_scale.data.augment import IMAGENET_MEAN, IMAGENET_STD
from caco_scale.errors import UserError, one_line
from caco_scale.method.encoders import ARCHITECTURES, build_backbone
from caco_scale.method.projector import build_projector

# Values beside tensors that published checkpoints hold: records of plain values, which run nothing when they are made.
PLAIN_RECORDS = [
    argparse.Namespace,
    (np._core.multiarray.scalar, "numpy.core.multiarray.scalar"),
    np._core.multiarray.scalar,
    np.dtype,
    *(type(np.dtype(kind)) for kind in ("float32", "float64", "int32", "int64", "bool")),
]
# Names of the two encoders within a state dict, with what they belong to; the first that occurs wins.
PREFIXES = (
    ("encoder_q.", "encoder_k.", "MoCo v1 or v2"),
    ("base_encoder.", "momentum_encoder.", "MoCo v3"),
    ("backbone.", None, "DINO"),
)
HEADS = ("fc.", "head.", "heads.", "last_layer.")


@dataclass(frozen=True)
class Weights:
    """An encoder out of a run or a file, on the CPU in fp32, in eval mode.

    ``projector`` is None where the source has none that fits. ``kind``: what the source was taken for; ``encoder``:
    query or key; ``size`` (pixels), ``mean``, ``std``: of the images that it was trained on, ImageNet's where the
    source does not say. ``unmatched``: the keys of the source that went nowhere. ``sha256``: of the backbone's tensors.
    ``metadata``: recipe, step, epoch, ... as far as the source says; ``config``: of a run, as nested plain values.
    """

    path: str
    kind: str
    encoder: str
    arch: str
    stem: str
    num_features: int
    backbone: nn.Module
    projector: nn.Module | None
    unmatched: tuple[str, ...]
    sha256: str
    size: int = 224
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    metadata: dict = field(default_factory=dict)
    config: dict | None = None


def load_weights(path, which=None, step=None, arch=None, stem=None):
    """The encoder that a user means by RUN_OR_WEIGHTS -> :class:`Weights`.

    Args:
        which: ``query`` or ``key``; None: query, except for DINO, whose teacher is the one to use.
        step: of a run's checkpoints, None: the newest.
        arch, stem: what the file holds; None: found out. For a run they are known.
    Raises:
        UserError: no such place, damaged, more than tensors in it, no encoder that fits (the keys are named), values
            that are not finite.
    """
    path = Path(path)
    if not os.path.exists(path):  # pathlib raises for a name that no file can have
        raise UserError(
            f"{path} does not exist: give a run directory, one of its checkpoints, or a file of weights"
        )
    if path.is_dir():
        if arch or stem:
            raise UserError(f"--arch and --stem are for files of weights: the run {path} knows its own")
        return _load_run(find_checkpoint(path, step), which or "query")
    if step is not None:
        raise UserError(f"--step chooses one of a run's checkpoints, but {path} is a file: drop it")
    return _load_file(path, which, arch, stem)


def find_checkpoint(run, step=None):
    """The checkpoint that a user means by a run's or a checkpoint's directory, and maybe a step -> Path."""
    run = Path(run)
    if not run.is_dir():
        raise UserError(f"no run at {run}: give a run directory, or one of its checkpoints/step_XXXXXXXX")
    if (run / "values.json").exists() or re.fullmatch(r"step_\d{8,}", run.name):
        if step is not None and step != read_values(run)["step"]:
            raise UserError(
                f"{run} is the checkpoint of step {read_values(run)['step']}, not {step}: drop --step"
            )
        return run
    directory = run / "checkpoints"
    found = steps(directory)
    if not found:
        raise UserError(
            f"no complete checkpoint in {directory}: is {run} a run directory, and has it saved yet?"
        )
    if step is not None and step not in found:
        raise UserError(
            f"no checkpoint of step {step} in {directory}; there are {', '.join(map(str, found))}"
        )
    return latest(directory) if step is None else step_path(directory, step)


# ----------------------------------------------------------------------------------------------------------
# A run


def _load_run(path, which):
    values = read_values(path)
    config = _run_config(path, values)
    prefixes = (f"{which}.", f"{which}_buffer.")
    tensors = load_tensors(path, [name for name in values["shapes"] if name.startswith(prefixes)])
    state = {name.removeprefix(prefixes[0]).removeprefix(prefixes[1]): t for name, t in tensors.items()}
    views = config.get("views") or {}
    arch, stem = config["model"]["arch"], config["model"]["stem"]
    backbone, num_features, missing = _fill_backbone(arch, stem, _within(state, "backbone."), str(path))
    rest = _within(state, "projector.")
    projector = _fill_projector(num_features, rest) if rest else None
    assert not missing, missing
    return Weights(
        path=str(path),
        kind="run of caco_scale",
        encoder=which,
        arch=arch,
        stem=stem,
        num_features=num_features,
        backbone=backbone,
        projector=projector,
        unmatched=() if projector is not None else tuple(f"{which}.projector.{name}" for name in rest),
        sha256=digest(backbone),
        size=views.get("size", 224),
        mean=tuple(views.get("mean", IMAGENET_MEAN)),
        std=tuple(views.get("std", IMAGENET_STD)),
        metadata={"recipe": config.get("recipe", ""), "step": values["step"], "epoch": values.get("epoch")},
        config=config,
    )


def _run_config(path, values):
    """The run's config as nested dicts: the checkpoint's own, else the run directory's config.yaml."""
    config, source = values.get("config"), path / "values.json"
    if config is None:
        source = path.parent.parent / "config.yaml"
        try:
            config = yaml.safe_load(source.read_text())
        except (OSError, UnicodeDecodeError, yaml.YAMLError):
            raise UserError(f"no readable config.yaml beside checkpoint {path}: expected {source}") from None
    try:
        config["model"]["arch"], config["model"]["stem"]
    except (KeyError, TypeError):
        raise UserError(f"{source} does not name model.arch and model.stem") from None
    return config


# ----------------------------------------------------------------------------------------------------------
# A file


def _load_file(path, which, arch, stem):
    content, metadata = read_tensors(path)
    kind, which, state, others = _choose_encoder(path, content, which)
    state = _timm_vit_renamed(state)
    heads = {name: state.pop(name) for name in list(state) if name.startswith(HEADS)}
    names = {name: name for name in heads}
    arch, stem = _architecture(path, state, arch or metadata.get("arch"), stem or metadata.get("stem"))
    backbone, num_features, unexpected = _fill_backbone(arch, stem, state, str(path))
    projector = _fill_projector(num_features, _within(heads, "fc."))
    if projector is not None:
        names = {name: name for name in heads if not name.startswith("fc.")}
    return Weights(
        path=str(path),
        kind=kind,
        encoder=which,
        arch=arch,
        stem=stem,
        num_features=num_features,
        backbone=backbone,
        projector=projector,
        unmatched=(*unexpected, *names, *others),
        sha256=digest(backbone),
        metadata={key: metadata[key] for key in ("recipe", "step", "epoch", "git_commit") if key in metadata},
        **_views_of(path, metadata),
    )


def read_tensors(path):
    """What a safetensors or torch file holds -> (nested dicts of tensors and plain values, metadata of strings).

    Which of the two decides its first bytes. UserError: neither, cut, damaged, or more than tensors and plain values.
    """
    path = Path(path)
    try:
        with open(path, "rb") as file:
            start = file.read(9)
            size = file.seek(0, 2)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    if not start:
        raise UserError(f"{path} is empty: give a file of weights, or a run directory")
    if len(start) == 9 and start[8:] == b"{":
        return _read_safetensors(path, size)
    if start.startswith(b"PK"):
        _check_zip(path)
    elif not start.startswith(b"\x80"):
        raise UserError(f"{path} is no file of weights: neither safetensors nor torch.save wrote it")
    try:
        with torch.serialization.safe_globals(PLAIN_RECORDS), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's notes on old files; what it cannot read is an error
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise _unreadable(path, error) from None
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__}, not a state dict: save model.state_dict()")
    return content, {}


def _read_safetensors(path, size):
    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118 (no dict)
    except (SafetensorError, OSError, ValueError, TypeError) as error:
        raise UserError(f"{path} ({size:,} bytes) is a damaged safetensors file: {one_line(error)}") from None


def _check_zip(path):
    """torch.load does not compare checksums."""
    try:
        with zipfile.ZipFile(path) as archive:
            bad = archive.testzip()
    except (zipfile.BadZipFile, OSError, EOFError, NotImplementedError, RuntimeError, struct.error) as error:
        raise UserError(
            f"{path} is cut or damaged ({one_line(error) or type(error).__name__}, {path.stat().st_size:,} bytes): "
            "fetch or write it again"
        ) from None
    if bad is not None:
        raise UserError(f"{path} is damaged: the checksum of {bad} in it is wrong; fetch or write it again")


def _unreadable(path, error):
    """Why torch did not read a file, in one line."""
    words = one_line(error)
    named = re.search(r"GLOBAL ([\w.]+)|[Uu]nsupported (?:global|class)[: ]+(?:GLOBAL )?([\w.]+)", words)
    if named or ("Weights only load failed" in words and "Unsupported operand" in words):
        what = next((name for name in named.groups() if name), "code") if named else "pickled code"
        return UserError(
            f"{path} holds more than tensors ({what}), which would run code when it is read: nothing of it was run; "
            "save only model.state_dict()"
        )
    return UserError(
        f"{path} is cut or damaged, or torch.save did not write it: {words[:160] or type(error).__name__}"
    )


def _choose_encoder(path, content, which):
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
    tensors = {str(key): value for key, value in state.items() if isinstance(value, torch.Tensor)}
    others += [str(key) for key, value in state.items() if not isinstance(value, torch.Tensor)]
    if not tensors:
        raise UserError(f"{path} holds no tensors by name but {_folded(map(str, content)) or 'nothing'}")
    tensors = {_without_wrappers(key): value for key, value in tensors.items()}
    for query, key, family in PREFIXES:
        if not any(name.startswith((query, key or query)) for name in tensors):
            continue
        which = which or "query"
        prefix = query if which == "query" or family == "DINO" else key
        found = _within(tensors, prefix)
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


def _within(state, prefix):
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


TIMM_VIT = (
    (r"cls_token", "class_token"),
    (r"pos_embed", "encoder.pos_embedding"),
    (r"patch_embed\.proj\.(.*)", r"conv_proj.\1"),
    (r"norm\.(.*)", r"encoder.ln.\1"),
    (r"blocks\.(\d+)\.norm([12])\.(.*)", r"encoder.layers.encoder_layer_\1.ln_\2.\3"),
    (r"blocks\.(\d+)\.attn\.qkv\.(.*)", r"encoder.layers.encoder_layer_\1.self_attention.in_proj_\2"),
    (r"blocks\.(\d+)\.attn\.proj\.(.*)", r"encoder.layers.encoder_layer_\1.self_attention.out_proj.\2"),
    (r"blocks\.(\d+)\.mlp\.fc1\.(.*)", r"encoder.layers.encoder_layer_\1.mlp.0.\2"),
    (r"blocks\.(\d+)\.mlp\.fc2\.(.*)", r"encoder.layers.encoder_layer_\1.mlp.3.\2"),
)


def _timm_vit_renamed(state):
    """A ViT by timm's names (MoCo v3, DINO, timm itself) by torchvision's; anything else as it is."""
    if "patch_embed.proj.weight" not in state:
        return state

    def renamed(name):
        for pattern, replacement in TIMM_VIT:
            if re.fullmatch(pattern, name):
                return re.sub(pattern, replacement, name)
        return name

    return {renamed(name): value for name, value in state.items()}


# ----------------------------------------------------------------------------------------------------------
# Which architecture, and does it fit


def _expected(arch, stem):
    """Names and shapes of a backbone's parameters and buffers."""
    with torch.device("meta"):
        backbone, _ = build_backbone(arch, stem)
    return {name: tuple(tensor.shape) for name, tensor in backbone.state_dict().items()}


def _differences(expected, state):
    """(names missing, names too many, names of another shape); a BatchNorm's count of batches may be missing."""
    missing = [n for n in expected if n not in state and not n.endswith("num_batches_tracked")]
    return (
        missing,
        [n for n in state if n not in expected],
        [n for n in expected if n in state and tuple(state[n].shape) != expected[n]],
    )


def _architecture(path, state, arch, stem):
    """The (arch, stem) whose names and shapes the state dict has; UserError names the nearest and what differs."""
    likely = ("resnet50", "tiny", "vit_b_16", "resnet18", "resnet34")
    arches = [arch] if arch else dict.fromkeys((*likely, *ARCHITECTURES))
    stems = [stem] if stem else [_stem(state)]
    best = None
    for candidate in ((a, s) for a in arches for s in stems if (a, s) != ("vit_b_16", "cifar") or arch):
        expected = _expected(*candidate)
        missing, extra, wrong = _differences(expected, state)
        if not missing and not wrong:
            return candidate
        distance = 2 * len(missing) + len(extra) + len(wrong)
        if best is None or distance < best[0]:
            best = distance, candidate, missing, extra, wrong, expected
    _, (arch, stem), missing, extra, wrong, expected = best
    parts = [
        f"missing: {_folded(missing)}" if missing else "",
        f"not in it: {_folded(extra)}" if extra else "",
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


def _folded(names):
    """Every name, those of one module together: ``bn1.{bias, weight}, conv1.weight``."""
    groups = {}
    for name in names:
        parent, _, last = name.rpartition(".")
        groups.setdefault(parent, []).append(last)
    return ", ".join(
        f"{parent}.{{{', '.join(last)}}}"
        if len(last) > 1 and parent
        else ", ".join(f"{parent}.{x}".strip(".") for x in last)
        for parent, last in groups.items()
    )


def _fill_backbone(arch, stem, state, path):
    """A backbone with the tensors of a state dict in fp32: (module, F, names of the dict that it has no place for)."""
    with torch.device("meta"):  # nothing to initialise: every tensor comes from the state dict
        backbone, num_features = build_backbone(arch, stem)
    expected = {name: tuple(tensor.shape) for name, tensor in backbone.state_dict().items()}
    missing, unexpected, wrong = _differences(expected, state)
    if missing or wrong:
        raise UserError(
            f"{path} does not hold a whole {arch} (stem {stem}): missing or of another shape: "
            f"{_folded([*missing, *wrong])}"
        )
    filled = {name: state.get(name, torch.zeros((), dtype=torch.int64)) for name in expected}
    _assign(backbone, filled, path)
    return backbone, num_features, unexpected


def _fill_projector(num_features, state):
    """A projector with the tensors of a state dict, or None where they are those of another kind of head."""
    try:
        hidden, embedding_dim = state["0.weight"].shape[0], state["6.weight"].shape[0]
        with torch.device("meta"):
            projector = build_projector(num_features, hidden, embedding_dim)
    except (KeyError, IndexError, RuntimeError):
        return None
    expected = {name: tuple(tensor.shape) for name, tensor in projector.state_dict().items()}
    if any(_differences(expected, state)):
        return None
    filled = {name: state.get(name, torch.zeros((), dtype=torch.int64)) for name in expected}
    _assign(projector, filled, "projector")
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
        if reference.is_floating_point() != tensor.is_floating_point():
            raise UserError(f"{path}: {name} is {tensor.dtype}, {reference.dtype} expected")
        kept[name] = tensor.to(reference.dtype).contiguous()
    bad = [
        name for name, tensor in kept.items() if tensor.is_floating_point() and not tensor.isfinite().all()
    ]
    if bad:
        raise UserError(
            f"{path}: {len(bad)} of {len(kept)} tensors are not finite ({_folded(bad)}): its training diverged or the "
            "file is damaged, give an earlier checkpoint"
        )
    module.load_state_dict(kept, assign=True)
    module.eval().requires_grad_(False)


def digest(module):
    """sha256 (hex) of a module's tensors, names included."""
    sha256 = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        sha256.update(name.encode())
        sha256.update(tensor.cpu().numpy().tobytes())
    return sha256.hexdigest()


def _views_of(path, metadata):
    """Size, mean and standard deviation of the images, where the metadata of an export say them."""
    try:
        views = {
            name: tuple(map(float, metadata[name].split())) for name in ("mean", "std") if name in metadata
        }
        if "size" in metadata:
            views["size"] = int(metadata["size"])
        if any(len(views[name]) != 3 for name in ("mean", "std") if name in views):
            raise ValueError("mean and std are three numbers each")
    except ValueError as error:
        raise UserError(f"{path}: its metadata are damaged ({one_line(error)})") from None
    return views


def describe(weights):
    """What was loaded, for a result's JSON: plain values."""
    facts = ("path", "kind", "encoder", "arch", "stem", "sha256", "metadata", "unmatched")
    return json.loads(json.dumps({name: getattr(weights, name) for name in facts}))
