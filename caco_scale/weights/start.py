"""``model.weights``: the backbone that a training starts from, and what became of every key of its source."""

import json
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from timm.models import adapt_input_conv
from torch import nn

from caco_scale import config as configuration
from caco_scale.checkpoint.folder import read_values
from caco_scale.checkpoint.resume import goes_on_from
from caco_scale.checkpoint.sums import file_sha256
from caco_scale.distributed.collectives import from_rank_0
from caco_scale.errors import UserError, quoted, with_article
from caco_scale.weights.address import hub_address
from caco_scale.weights.build import folded, gist
from caco_scale.weights.fetch import settled
from caco_scale.weights.load import Wanted, Weights, load_weights
from caco_scale.weights.recognise import HEADS

OTHER_ENCODERS = (
    "encoder_q",
    "encoder_k",
    "base_encoder",
    "momentum_encoder",
    "student",
    "teacher",
    "query",
    "key",
)
PROJECTOR = "a projector, this run's starts at random"
MOST_WORDS = 300  # letters of a list of names on the console; the run directory has them all


@dataclass(frozen=True)
class StartingWeights:
    """A source of weights for a training. ``sha256``: of its file; of a run, of the backbone's tensors.

    ``left_out``: {name in the source: why it is not used}. ``channels``: of the training's images.
    """

    weights: Weights
    sha256: str
    left_out: dict[str, str]
    channels: int = 3

    def fill(self, backbone: nn.Module) -> None:
        """Every parameter and buffer of the backbone that was wanted; a first layer of three channels is adapted."""
        state, wanted = self.weights.backbone.state_dict(), backbone.state_dict()
        for name, tensor in state.items():
            if tensor.shape != wanted[name].shape:
                state[name] = adapt_input_conv(self.channels, tensor)
        backbone.load_state_dict(state)

    def adapted(self) -> str | None:
        """How a first layer of three channels becomes one of the images', in words."""
        if self.weights.pixels.channels == self.channels:
            return None
        how = "their sum" if self.channels == 1 else f"repeated in turn, times 3/{self.channels}"
        return f"  adapted: the first layer's kernels of 3 channels to {self.channels} (timm's adapt_input_conv: {how})"

    def lines(self, mean: tuple[float, ...], std: tuple[float, ...]) -> list[str]:
        """What was loaded, what was left out and why, what is missing, for the console; then :meth:`other_images`."""
        weights, loaded = self.weights, len(self._loaded())
        whose = f"{weights.kind}, {weights.encoder} encoder" if weights.encoder != "single" else weights.kind
        lines = [
            f"starting weights: {weights.path} ({whose}; sha256 {self.sha256[:12]})",
            f"  loaded into both encoders: {loaded:,} tensors, all that {with_article(weights.arch)} needs"
            + (f" but {len(weights.missing):,}" if weights.missing else ""),
        ]
        if weights.missing:
            lines.append(f"  missing, as a new backbone has them: {_short(folded(weights.missing))}")
        if adapted := self.adapted():
            lines.append(adapted)
        for why in Counter(self.left_out.values()):
            names = [name for name, reason in self.left_out.items() if reason == why]
            lines.append(f"  left out: {_short(gist(names))}: {why}")
        return [*lines, *filter(None, [self.other_images(mean, std)])]

    def facts(self, asked: str = "") -> dict[str, Any]:
        """For the run directory: plain values, every name in full. ``asked``: what ``model.weights`` was."""
        weights, on_hub = self.weights, hub_address(self.weights.path) is not None
        return {
            **({"asked": str(hub_address(asked))} if on_hub else {}),
            "path": weights.path if on_hub else str(Path(weights.path).absolute()),
            "sha256": self.sha256,
            "kind": weights.kind,
            "encoder": weights.encoder,
            "arch": weights.arch,
            "loaded": self._loaded(),
            "adapted": self.adapted(),
            "missing": list(weights.missing),
            "left_out": self.left_out,
        }

    def other_images(self, mean: tuple[float, ...], std: tuple[float, ...]) -> str | None:
        """A line where the source says that its images were normalised otherwise than the run's."""
        weights, differing = self.weights, []
        if weights.pixels.channels != self.channels:
            return None
        for name, own in (("mean", mean), ("std", std)):
            theirs = getattr(weights, name)
            if name not in weights.assumed and any(
                abs(a - b) > 1e-3 for a, b in zip(theirs, own, strict=True)
            ):
                differing.append(f"--views.{name} {' '.join(map(str, theirs))}")
        if not differing:
            return None
        return f"the starting weights have seen images of another normalisation: give {' '.join(differing)}"

    def _loaded(self):
        missing = set(self.weights.missing)
        return [name for name in self.weights.backbone.state_dict() if name not in missing]


def pin_weights(config: configuration.Config) -> tuple[configuration.Config, str]:
    """A config's ``model.weights``, where that is on the hub, as one commit -> the config, a line about it. Collective.

    A run goes on with the commit that it began with, whatever the branch is now, and asks no network for it; so does a
    start in a run directory whose first one was ended before it had saved. The commit of a fresh start is fetched.

    Raises:
        UserError: on every rank, as :func:`~caco_scale.weights.fetch.settled`.
    """
    asked = hub_address(config.model.weights)
    if asked is None:
        return config, ""
    recorded, resumes = from_rank_0(lambda: _recorded(config, asked))
    pinned = recorded if resumes else settled(recorded or str(asked))
    if not pinned or pinned == str(asked):  # a resume from another address is refused where all such are
        return config, ""
    why = "as in this run's first start" if recorded else "which this run keeps"
    line = f"model.weights: {asked} is commit {pinned.rpartition('@')[2][:12]}, {why}"
    return configuration.replace(config, model__weights=pinned), line


def _recorded(config, asked):
    """(the address with the commit that a run directory has for ``asked``, or ""; whether a checkpoint goes on)."""
    checkpoint = goes_on_from(config)
    run = checkpoint.parent.parent if checkpoint else Path(config.run.dir)
    if checkpoint is None and config.run.resume == "never":
        return "", False
    try:
        facts = json.loads((run / "weights.json").read_text())
        recorded = facts["path"] if facts.get("asked") == str(asked) else ""
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        recorded = ""
    return recorded, checkpoint is not None


def load_start(place: str, wanted: Wanted) -> StartingWeights:
    """The source that ``model.weights`` names, for a backbone as the rest of ``model`` says.

    The query encoder's backbone, of DINO the teacher's, as :func:`~caco_scale.weights.load.load_weights` has it; never
    its projector.

    Raises:
        UserError: as that; another architecture than the one that is wanted.
    """
    try:
        weights = load_weights(place, wanted=wanted)
    except UserError as error:
        raise UserError(f"model.weights: {_by_training_flags(str(error), place)}") from None
    if weights.pixels.channels not in (3, wanted.channels):
        raise UserError(
            f"model.weights: {place} is for images of {weights.pixels}, and data.channels is {wanted.channels}: only "
            "weights for 3 channels can be adapted, give such"
        )
    sha256 = file_sha256(weights.file) if weights.file else weights.sha256
    return StartingWeights(weights, sha256, _left_out(weights), wanted.channels)


def _short(names):
    return names if len(names) <= MOST_WORDS else f"{names[:MOST_WORDS]} ... (all in weights.json)"


def _by_training_flags(line, place):
    """The line with the flags of training in the place of those of evaluation."""
    line = re.sub(r"--(arch|stem)\b", r"--model.\1", line).replace(", or neither", "")
    export = f"python -m caco_scale.export {quoted(place)}"
    return re.sub(
        r"try --which (\w+)",
        rf"write that first, {export} --which \1 --to start.safetensors --format safetensors",
        line,
    )


def _left_out(weights):
    names = {name: _why(name) for name in weights.unmatched}
    if weights.config is not None:  # a run: of its checkpoint only one encoder's backbone was read
        used = tuple(f"{weights.encoder}{part}.backbone." for part in ("", "_buffer"))
        others = read_values(Path(weights.path))["shapes"]
        return {name: _why(name, weights.encoder) for name in others if not name.startswith(used)}
    if weights.projector is not None:
        names |= {f"fc.{name}": PROJECTOR for name in weights.projector.state_dict()}
    return names


def _why(name, own=""):
    first, _, rest = name.partition(".")
    first = first.removesuffix("_buffer")
    if first == own and rest:
        return PROJECTOR if rest.startswith("projector.") else "a predictor, which belongs to its projector"
    if first in OTHER_ENCODERS and rest:
        return "of the other encoder"
    if name.startswith(HEADS):
        return "a head"
    return "no part of an encoder"
