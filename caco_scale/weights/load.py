"""RUN_OR_WEIGHTS to an encoder: of a run, a checkpoint, a file, a Hugging Face directory, also on the hub."""

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from caco_scale.checkpoint.folder import read_values
from caco_scale.checkpoint.read import load_tensors
from caco_scale.config import NEUTRAL
from caco_scale.config.yaml_file import Typed, read_yaml
from caco_scale.data.augment import IMAGENET_MEAN, IMAGENET_STD
from caco_scale.data.pixels import BITS, MOST_CHANNELS, RGB8, Pixels
from caco_scale.errors import UserError, one_line, quoted, with_article
from caco_scale.flags.choices import ENCODERS
from caco_scale.weights.address import HubAddress
from caco_scale.weights.build import digest, expected_shapes, fill_backbone, fill_projector
from caco_scale.weights.fetch import commit_of, fetch
from caco_scale.weights.files import read_tensors
from caco_scale.weights.hub import HUB, hub_metadata, weights_file
from caco_scale.weights.place import place_of
from caco_scale.weights.recognise import (
    check_stated_name,
    choose_encoder,
    find_architecture,
    renamed_for,
    same_model,
    split_heads,
    within,
)

MOST_PIXELS = 8192  # of a side, as the flag --size has it
FACTS = ("recipe", "step", "epoch", "git_commit")  # what an export says of its run


class Wanted(NamedTuple):
    """A backbone as a configuration's ``model`` has it, which its user says is to be built."""

    arch: str
    stem: str
    options: tuple[str, ...]
    channels: int = 3


@dataclass(frozen=True)
class Weights:
    """An encoder out of a run or a file, on the CPU in fp32, in eval mode.

    ``path``: its place, of the hub the address with the commit. ``projector`` is None where the source has none that
    fits. ``kind``: what the source was taken for. ``encoder``: query or key, or ``single``: the only one of a file that
    does not say which. ``size`` (pixels), ``mean``, ``std``: of the images that it was trained on; ``assumed``: those
    of the three that the source does not say and that are
    guesses (224 pixels, 32 for the stem ``cifar``; ImageNet's colours, 0.5 of other than three channels). ``resize``:
    the shorter side before the centre crop of its evaluations (0: :func:`~caco_scale.data.views.usual_resize`).
    ``pixels``: channels and bits of its images; ``says_bits``: whether the source says the bits, 8 stand there where it
    does not (:func:`~caco_scale.evaluate.task.open_images` takes those of a set). ``unmatched``: the keys of the source
    that went nowhere, none of the backbone's among them; ``missing``: tensors of the backbone that it lacks
    (BatchNorm's counts of batches). ``sha256``: of the backbone's tensors. ``file``: that was read, None of a run.
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
    size: int
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    resize: int = 0
    assumed: tuple[str, ...] = ()
    options: tuple[str, ...] = ()
    pixels: Pixels = RGB8
    says_bits: bool = True
    missing: tuple[str, ...] = ()
    file: Path | None = None
    metadata: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] | None = None


def load_weights(
    path: str | Path,
    which: str | None = None,
    step: int | None = None,
    arch: str | None = None,
    stem: str | None = None,
    wanted: Wanted | None = None,
) -> Weights:
    """The encoder that a user means by RUN_OR_WEIGHTS -> :class:`Weights`.

    Args:
        which: ``query`` or ``key``; None: query, except for DINO, whose teacher is the one to use.
        step: of a run's checkpoints, None: the newest.
        arch, stem: what the file holds; None: found out. For a run they are known; but a function of a user's own
            runs only where ``arch`` or ``wanted`` says so, never because a file or a run names it.
        wanted: instead of ``arch`` and ``stem`` the backbone that is to be filled, and no other.
    Raises:
        UserError: no such place, damaged, more than tensors in it, no encoder that fits (the keys are named), values
            that are not finite.
    """
    kind, place = place_of(path, step)
    if isinstance(place, HubAddress):
        pinned = commit_of(place)
        folder = fetch(pinned)
        about = hub_metadata(folder, str(pinned))
        return _load_file(pinned, weights_file(folder), about, which, arch, stem, wanted)
    if kind == "run":
        return _load_run(place, which or "query", arch, stem, wanted)
    if kind == "hub":
        return _load_file(place, weights_file(place), hub_metadata(place), which, arch, stem, wanted)
    return _load_file(place, place, {}, which, arch, stem, wanted)


def _load_run(path, which, arch, stem, wanted):
    values = read_values(path)
    config = _run_config(path, values)
    prefixes = (f"{which}.", f"{which}_buffer.")
    tensors = load_tensors(path, [name for name in values["shapes"] if name.startswith(prefixes)])
    state = {name.removeprefix(prefixes[0]).removeprefix(prefixes[1]): t for name, t in tensors.items()}
    views = config.get("views") or {}
    said = Wanted(config["model"]["arch"], config["model"]["stem"], _options(config["model"]))
    arch, stem, options, _ = _of_run(path, said, arch, stem, wanted)
    pixels = _pixels_of(path, config.get("data") or {})
    tensors = renamed_for(arch, within(state, "backbone."))
    backbone, num_features = fill_backbone(arch, stem, options, tensors, str(path), pixels.channels)
    rest = within(state, "projector.")
    projector = fill_projector(num_features, rest, str(path)) if rest else None
    return Weights(
        path=str(path),
        kind="run of caco_scale",
        encoder=which,
        arch=arch,
        stem=stem,
        options=options,
        pixels=pixels,
        num_features=num_features,
        backbone=backbone,
        projector=projector,
        unmatched=() if projector is not None else tuple(f"{which}.projector.{name}" for name in rest),
        sha256=digest(backbone),
        **_images(
            {**views, "resize": (config.get("eval") or {}).get("resize") or 0}, arch, stem, pixels.channels
        ),
        metadata={"recipe": config.get("recipe", ""), "step": values["step"], "epoch": values.get("epoch")},
        config=config,
    )


def _of_run(path, said, arch, stem, wanted):
    """The backbone of a run: what it says, unless that is code of a user's own, of which only the user may say so."""
    if wanted:
        _refuse_another(path, said.arch, wanted.arch)
        return wanted
    if arch == said.arch or (arch and _is_code(said.arch)):
        return Wanted(arch, said.stem, said.options)
    if arch or stem:
        raise UserError(
            f"--arch and --stem are for files of weights: the run {path} knows its own, {said.arch} (stem {said.stem})"
        )
    _refuse_code(path, said.arch)
    return said


def _is_code(arch):
    return ":" in str(arch)


def _refuse_code(path, arch):
    """UserError for a function of a user's own that a file or a run names: only its user may say that it is to run."""
    if _is_code(arch):
        raise UserError(
            f"{path} is the backbone of {quoted(arch)}, code of its own: give --arch {quoted(arch)} to run it"
        )


def _refuse_another(path, said, wanted):
    """UserError where a source says that it is another architecture than the one that is wanted."""
    if said and not (_is_code(said) and _is_code(wanted)) and not same_model(said, wanted):
        raise UserError(
            f"{path} is {with_article(said)}, not {with_article(wanted)}: give --arch {quoted(said)}"
        )


def _run_config(path, values):
    """The run's config as nested dicts: the checkpoint's own, else the run directory's config.yaml."""
    config, source = values.get("config"), path / "values.json"
    if config is None:
        source = path.parent.parent / "config.yaml"
        try:
            config = read_yaml(source, Typed)
        except UserError as error:
            raise UserError(f"no readable config.yaml beside checkpoint {path}: {error}") from None
    try:
        config["model"]["arch"], config["model"]["stem"]
    except (KeyError, TypeError):
        raise UserError(f"{source} does not name model.arch and model.stem") from None
    return config


def _load_file(path, file, about, which, arch, stem, wanted):
    """``about``: what stands beside the file, in the words of our exports' metadata, which win."""
    content, metadata = read_tensors(file)
    metadata = metadata if metadata.get("arch") else {**about, **metadata}
    said = metadata.get("encoder") if metadata.get("encoder") in ENCODERS else None
    kind, which, state, others = choose_encoder(path, content, which, said)
    pixels = _pixels_of(path, metadata)
    if wanted:
        _refuse_another(path, metadata.get("arch"), wanted.arch)
        named, stem, options, channels = wanted
        if "channels" not in metadata and _first_channels(state) == channels:
            pixels = Pixels(channels)
    else:
        check_stated_name(path, content, arch)
        if not arch:
            _refuse_code(path, metadata.get("arch") or "")
        named, stem = arch or metadata.get("arch"), stem or metadata.get("stem")
        options = _stated_options(path, metadata) if named and named == metadata.get("arch") else ()
    state = renamed_for(named, state)
    expected = expected_shapes(named, stem or "imagenet", options, pixels.channels) if named else ()
    state, heads = split_heads(state, expected)
    arch, stem, channels = find_architecture(path, state, named, stem, options, pixels.channels)
    if channels != pixels.channels:  # what says nothing of its images says nothing of their bits
        pixels = Pixels(channels)
    backbone, num_features = fill_backbone(arch, stem, options, state, str(path), pixels.channels)
    projector = fill_projector(num_features, within(heads, "fc."), str(path))
    unused = [name for name in heads if projector is None or not name.startswith("fc.")]
    return Weights(
        path=str(path),
        kind=HUB if about and not said else kind,
        encoder=which,
        arch=arch,
        stem=stem,
        options=options,
        pixels=pixels,
        says_bits="bits" in metadata
        or bool(metadata.get("step")),  # exports of runs name others than RGB of 8 bits
        num_features=num_features,
        backbone=backbone,
        projector=projector,
        unmatched=(*unused, *others),
        missing=tuple(name for name in backbone.state_dict() if name not in state),
        file=file,
        sha256=digest(backbone),
        metadata={key: metadata[key] for key in FACTS if key in metadata},
        **_images(_views_of(path, metadata, pixels.channels), arch, stem, pixels.channels),
    )


def _first_channels(state):
    """What the first convolution of a state dict takes; 0: it has none."""
    return next((tensor.shape[1] for tensor in state.values() if tensor.ndim == 4), 0)


def _stated_options(path, metadata):
    """The backbone's keyword arguments, as an export has them."""
    try:
        words = json.loads(metadata.get("options") or "[]")
        if not isinstance(words, list) or not all(isinstance(word, str) and "=" in word for word in words):
            raise ValueError("options are a list of NAME=VALUE")
    except ValueError as error:
        raise UserError(f"{path}: its metadata are damaged ({one_line(error)})") from None
    return tuple(words)


def _options(model):
    return tuple(map(str, model.get("options") or ()))


def _pixels_of(path, said):
    """Channels and bits of the images, by a run's ``data`` or an export's metadata."""
    try:
        pixels = Pixels(int(said.get("channels", 3)), int(said.get("bits", 8)))
        if not 1 <= pixels.channels <= MOST_CHANNELS or pixels.bits not in BITS:
            raise ValueError(f"images of {pixels}")
    except (TypeError, ValueError) as error:
        raise UserError(f"{path}: what it says of its images is damaged ({one_line(error)})") from None
    return pixels


def _views_of(path, metadata, channels):
    """Size, mean and standard deviation of the images, as far as the metadata of an export say them."""
    try:
        views: dict[str, Any] = {
            name: tuple(map(float, metadata[name].split())) for name in ("mean", "std") if metadata.get(name)
        }
        views |= {name: int(metadata[name]) for name in ("size", "resize") if metadata.get(name)}
        if any(len(views[name]) != channels for name in ("mean", "std") if name in views):
            raise ValueError(f"mean and std are {channels} numbers each")
        if not 0 < views.get("size", 1) <= MOST_PIXELS or not 0 <= views.get("resize", 0) <= 2 * MOST_PIXELS:
            raise ValueError(f"a size is 1 to {MOST_PIXELS} pixels")
        if not all(map(math.isfinite, views.get("mean", ()))) or not all(
            0 < x < math.inf for x in views.get("std", ())
        ):
            raise ValueError("mean and std are finite, std above zero")
    except ValueError as error:
        raise UserError(f"{path}: its metadata are damaged ({one_line(error)})") from None
    return views


def _images(views, arch, stem, channels):
    """Size, mean, std and resize of :class:`Weights`, and which of the first three nothing says."""
    neutral = (NEUTRAL,) * channels
    usual = {
        "size": 32 if arch == "tiny" or stem == "cifar" else 224,
        "mean": IMAGENET_MEAN if channels == 3 else neutral,
        "std": IMAGENET_STD if channels == 3 else neutral,
    }
    known = {name: views[name] for name in (*usual, "resize") if name in views}
    known |= {name: tuple(known[name]) for name in ("mean", "std") if name in known}
    return {**usual, **known, "assumed": tuple(name for name in usual if name not in known)}


def describe(weights: Weights) -> dict[str, Any]:
    """What was loaded, for a result's JSON: plain values."""
    facts = (
        "path",
        "kind",
        "encoder",
        "arch",
        "stem",
        "options",
        "sha256",
        "metadata",
        "assumed",
        "unmatched",
    )
    return json.loads(json.dumps({name: getattr(weights, name) for name in facts}))
