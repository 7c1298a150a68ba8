"""Export a backbone for use without this program: of a run, of one checkpoint, or of a file of weights.

    python -m caco_scale.export RUN_OR_WEIGHTS --to FILE [--format {safetensors,torchvision,timm,huggingface}]
                                [--which query|key] [--step N] [--arch ARCH] [--force] [--private]

``torchvision`` is a ``torch.save`` of a state dict for ``torchvision.models.<arch>()``; ``safetensors`` holds the
same names; ``timm`` is what ``timm.create_model(..., checkpoint_path=FILE)`` reads, as safetensors if FILE ends so;
``huggingface`` a directory that ``timm.create_model("local-dir:DIR", pretrained=True)`` and the hub read; with ``--to
hf://USER/NAME[@BRANCH]`` it goes to the hub as one commit. In its metadata a file says whose encoder it is, of which
run, and what images it wants. The projector stays behind. A model card, FILE.md, says what it is and how to load it.
One process on the CPU is enough, whatever trained; the file is loaded back into the library's own model and its
features are compared with the trained backbone's before it appears.
"""

import contextlib
import copy
import json
import os
import shutil
import tempfile
from importlib import metadata as distributions
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from caco_scale import config as configuration
from caco_scale.atomic import write_atomically
from caco_scale.checkpoint.folder import read_values
from caco_scale.data.pixels import RGB8
from caco_scale.data.views import usual_resize
from caco_scale.errors import UserError
from caco_scale.export.hub import (
    CARD,
    FILE,
    HEADER,
    check_directory,
    check_stem,
    config_text,
    load_back,
    loading_lines,
    put_in_place,
)
from caco_scale.export.library_names import library_model, library_of, loading_code, timm_name, to_timm
from caco_scale.export.model_card import write_card
from caco_scale.export.publish import check_hub, page_of, upload
from caco_scale.flags.choices import EXPORT_FORMATS
from caco_scale.method.encoders import USUAL_SIZES, takes
from caco_scale.run.files import check_target
from caco_scale.run.scores import evaluation_scores, logged_scores
from caco_scale.training.assemble import build_schedule
from caco_scale.weights.address import hub_address
from caco_scale.weights.build import gist
from caco_scale.weights.files import read_tensors, with_metadata
from caco_scale.weights.hub import CONFIG
from caco_scale.weights.load import Weights, load_weights

TOLERANCE = 1e-5  # of features, relative to the greatest where that is above one
TORCH_SUFFIXES = (".pth", ".pt", ".bin", ".ckpt", ".tar")


def export(
    run: str | Path,
    to: str | Path,
    file_format: str | None = None,
    which: str | None = None,
    step: int | None = None,
    force: bool = False,
    arch: str | None = None,
    private: bool = False,
) -> dict[str, str]:
    """Write the backbone of ``run`` (a run's or a checkpoint's directory, or weights) to the file ``to`` -> metadata,
    ``format``, ``compared`` (how the file was checked), ``unused`` (names in a file of weights that went nowhere),
    ``to`` (what was written; on the hub with its commit, and its ``page``), ``bytes`` (of the tensors' file).

    ``file_format``: None: by the name ``to``, see :func:`format_of`; ``which``: the query or the key (momentum)
    encoder, None: as :func:`~caco_scale.weights.load.load_weights` has it;
    ``step``: which checkpoint of the run, default the newest; ``arch``: as ``load_weights`` has it, too. The model
    card goes to ``<to>.md``. ``private``: of an address on the hub (``hf://USER/NAME``): whom a new repository shows
    itself to. Raises UserError: no run, no such checkpoint, damaged, not finite, unknown format, a
    library without the model, no or an existing target without ``force``, what the hub refuses, and where the file read
    back does not give the trained backbone's features.
    """
    if address := hub_address(to):
        if file_format not in (None, "huggingface"):
            raise UserError(f"--to {address} is of format huggingface: drop --format {file_format}")
        target = check_hub(address, (CONFIG, FILE, CARD), private, force)
        return _export_to_hub(load_weights(run, which, step, arch), target)
    if private:
        raise UserError(f"--private is for the hub: give --to hf://USER/{Path(to).name}, or drop it")
    named, file_format = file_format, file_format or format_of(to)
    is_directory = file_format == "huggingface"
    check_target(to, is_folder=is_directory)
    to = Path(to)
    card = to.with_name(f"{to.name}.md")
    _check_target(to, card, file_format, force)  # of a directory more, when the stem is known
    weights = load_weights(run, which, step, arch)
    if named is None and file_format == "torchvision" and weights.arch.startswith("timm/"):
        file_format = "timm"
    library = library_of(weights.arch, file_format)
    said = {"format": file_format, "unused": gist(weights.unmatched)}
    if is_directory:
        check_stem(weights.stem, weights.arch)
        check_directory(to, force)
    metadata = file_metadata(weights)
    state = weights.backbone.state_dict()
    temporary = to.with_name(f"{to.name}.tmp{os.getpid()}")
    try:
        stored = to_timm(state, weights.arch) if library == "timm" else state
        if is_directory:
            compared = _write_directory(temporary, weights, stored, metadata, to.name)
            put_in_place(temporary, to)
            return {**metadata, "compared": compared, **said, **_written(to, to / FILE)}
        _write(temporary, stored, metadata, _container(to, file_format))
        compared, options = _compare(temporary, weights, library)
        channels = weights.pixels.channels
        code = loading_code(library, weights.arch, weights.stem, to.name, options, channels)
        text = _card(weights, to.name, temporary.read_bytes(), code, metadata, compared)
        write_atomically(card, text.encode())
        os.replace(temporary, to)
    except OSError as error:
        raise UserError(f"{to} could not be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
    return {**metadata, "compared": compared, **said, **_written(to, to)}


def _export_to_hub(weights, target):
    """As :func:`export`, to a repository that was asked for; nothing of it stays on this machine."""
    check_stem(weights.stem, weights.arch)
    library_of(weights.arch, "huggingface")
    metadata, stored = file_metadata(weights), to_timm(weights.backbone.state_dict(), weights.arch)
    try:
        with tempfile.TemporaryDirectory(prefix="caco-export-") as folder:
            model = Path(folder, "model")
            compared = _write_directory(model, weights, stored, metadata, target.address)
            source = metadata["recipe"] or weights.kind
            of_step = f", step {metadata['step']}" if metadata["step"] else ""
            address = upload(
                model, target, f"{weights.arch}, {metadata['encoder']} encoder of {source}{of_step}"
            )
            written = _written(address, model / FILE)
    except OSError as error:
        raise UserError(
            f"the directory could not be written below {tempfile.gettempdir()}: {error.strerror or error}; TMPDIR "
            "names another place"
        ) from error
    said = {"format": "huggingface", "unused": gist(weights.unmatched)}
    return {**metadata, "compared": compared, **said, **written, "page": page_of(address)}


def _written(to, file):
    return {"to": str(to), "bytes": str(file.stat().st_size)}


def format_of(to: str | Path) -> str:
    """The format that a file's name asks for: of a torch file torchvision (of a timm backbone it becomes timm).

    Raises:
        UserError: the name's end says none.
    """
    suffix = Path(to).suffix
    if suffix == ".safetensors":
        return "safetensors"
    if suffix in TORCH_SUFFIXES:
        return "torchvision"
    if not suffix:
        return "huggingface"
    raise UserError(
        f"{to}: {suffix} says no format: name it .safetensors, .pth, or without an end (a Hugging Face directory), "
        "or give --format"
    )


def file_metadata(weights: Weights) -> dict[str, str]:
    """Where a backbone comes from and what images it wants: names and strings; what nothing says is left out."""
    metadata = {
        "arch": weights.arch,
        "stem": weights.stem,
        "encoder": weights.encoder,
        "recipe": weights.metadata.get("recipe", ""),
        "step": weights.metadata.get("step", ""),
        "epoch": weights.metadata.get("epoch", ""),
        "git_commit": _environment(weights).get("git_commit") or weights.metadata.get("git_commit", ""),
        "size": weights.size,
        "resize": weights.resize or usual_resize(weights.size),
        "mean": " ".join(map(str, weights.mean)),
        "std": " ".join(map(str, weights.std)),
    }
    unsaid = (
        (*weights.assumed, "resize") if "size" in weights.assumed and not weights.resize else weights.assumed
    )
    known = {name: value for name, value in metadata.items() if name not in unsaid}
    known |= {"options": json.dumps(weights.options)} if weights.options else {}
    known |= weights.pixels._asdict() if weights.pixels != RGB8 else {}
    if not weights.says_bits:
        known.pop("bits", None)
    return {name: "" if value is None else str(value) for name, value in known.items()}


def _check_target(to, card, file_format, force):
    """Refuse a format or a target that cannot be meant (UserError)."""
    if file_format not in EXPORT_FORMATS:
        raise UserError(f"unknown format {file_format!r}: use one of {', '.join(EXPORT_FORMATS)}")
    if to.suffix == ".safetensors" and file_format == "torchvision":
        raise UserError(
            f"{to}: format torchvision is a torch file, name it .pth, or use --format safetensors"
        )
    if to.suffix in TORCH_SUFFIXES and file_format == "safetensors":
        raise UserError(f"{to}: name it .safetensors, or use --format torchvision for a torch file")
    is_directory = file_format == "huggingface"
    if is_directory and to.suffix in (".safetensors", *TORCH_SUFFIXES):
        raise UserError(f"{to}: format huggingface is a directory, give a name without {to.suffix}")
    for file in () if is_directory else (to, card):
        check_target(file)
        if os.path.exists(file) and not force:
            raise UserError(f"{file} exists: give another name, or --force to replace it")


def _write_directory(folder, weights, state, metadata, place):
    """All of a Hugging Face directory, by timm's own names -> how it was compared, in words. ``place``: as in
    :func:`~caco_scale.export.hub.loading_lines`."""
    folder.mkdir()
    channels = weights.pixels.channels
    model, options = library_model(
        "timm", weights.arch, weights.stem, weights.options, weights.size, channels
    )
    (folder / CONFIG).write_text(config_text(weights, metadata, options, model))
    own = [word for word in options if not word.startswith("in_chans=")]  # which "channels" says
    # The file says whose it is by the names that timm has: of torchvision's models another architecture.
    stated = {**metadata, "arch": f"timm/{timm_name(weights.arch)}", "options": json.dumps(own)}
    _write(folder / FILE, state, stated, "safetensors")
    compared = _compared(load_back(folder), weights, "timm")
    text = _card(weights, FILE, (folder / FILE).read_bytes(), loading_lines(place), metadata, compared)
    (folder / CARD).write_text(HEADER + text)
    return compared


def _container(to, file_format):
    """timm tells the two kinds of files apart by the name's end."""
    if file_format == "timm":
        return "safetensors" if to.suffix == ".safetensors" else "torch"
    return "safetensors" if file_format == "safetensors" else "torch"


def _run_directory(weights):
    """The directory of the run that a checkpoint belongs to; None for a file of weights."""
    return None if weights.config is None else Path(weights.path).absolute().parent.parent


def _environment(weights):
    """What ``environment.json`` of the run says, empty where there is none that can be read."""
    run = _run_directory(weights)
    try:
        value = json.loads((run / "environment.json").read_text()) if run else {}
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def _card(weights, name, data, code, metadata, compared):
    """The model card's text for the file ``name`` with the bytes ``data``."""
    run, values, logged, evaluated, config = _run_directory(weights), {}, (None, None), [], {}
    warmup_steps = None
    if run is not None:
        values = read_values(Path(weights.path))
        logged = logged_scores(run, values["step"])
        of_this = (values["step"], weights.encoder)
        evaluated = [score for score in evaluation_scores(run) if (score.step, score.encoder) == of_this]
        try:
            known = configuration.from_dict(weights.config, weights.path)
            config, warmup_steps = configuration.flatten(known), _warmup_steps(known, values)
        except UserError:  # of another version: what it says of the model was enough for the tensors
            config = {}
    facts: dict[str, Any] = {"config": config, "warmup_steps": warmup_steps}
    facts |= {"environment": _environment(weights), "logged": logged, "evaluated": evaluated}
    place = weights.path if hub_address(weights.path) else Path(weights.path).name
    source = "" if run else f"{weights.kind}, `{place}`"
    facts |= {"source": source, "unused": gist(weights.unmatched), "assumed": _assumed(weights)}
    return write_card(name, data, code, metadata, values, compared=compared, **facts)


def _warmup_steps(config, values):
    """Of the bank warm-up, None where the checkpoint does not say how many images there were."""
    images, batch = values.get("num_samples"), config.data.global_batch_size
    known = isinstance(images, int) and images >= batch
    return build_schedule(config, images // batch).warmup_steps if known else None


def _assumed(weights):
    """``{"size": "224", ...}`` of what the source does not say of its images."""
    return {n: str(getattr(weights, n)).strip("()").replace(",", "") for n in weights.assumed}


def _write(path, state, metadata, container):
    if container == "safetensors":
        # Copies: safetensors refuses tensors that share memory.
        save_file(
            {name: t.contiguous() for name, t in state.items()}, path, metadata={"format": "pt", **metadata}
        )
    else:
        torch.save(with_metadata(state, metadata), path)
    with open(path, "rb") as stream:
        os.fsync(stream.fileno())


def _compare(path, weights, library):
    """Features of the file, read back into the library's model, against the trained backbone's -> how equal, in words,
    and the options with which the library builds the model.

    UserError where they differ by more than the tolerance.
    """
    channels = weights.pixels.channels
    model = weights.arch, weights.stem, weights.options, weights.size, channels
    loaded, options = library_model(library, *model)
    loaded.load_state_dict(read_tensors(path)[0], assign=True)
    return _compared(loaded, weights, library), options


def _compared(loaded, weights, library):
    """How equal the features of the library's model are to the trained backbone's, in words; UserError as above."""
    channels = weights.pixels.channels
    size = next(
        (size for size in (weights.size, *USUAL_SIZES) if takes(loaded, size, channels)), weights.size
    )
    images = torch.randn(2, channels, size, size, generator=torch.Generator().manual_seed(0))
    distance, greatest = _distance(weights.backbone, loaded, images, library)
    precision = ""
    if not distance <= TOLERANCE * max(1.0, greatest):
        # Large features may be as far apart by rounding alone (EfficientNet's, after a dozen steps): not in float64.
        with contextlib.suppress(Exception):  # of a user's own module, which may not take it
            doubles = (copy.deepcopy(module).double() for module in (weights.backbone, loaded))
            distance, greatest = _distance(*doubles, images.double(), library)
            precision = " in float64"
    if not distance <= TOLERANCE * max(1.0, greatest):
        whose = f"{library}'s model" if library else weights.arch
        raise UserError(f"{whose} does not give the trained features back (off by {distance:.3g}{precision})")
    equal = ("equal bit for bit" if distance == 0 else f"equal to {distance:.1g}") + precision
    # Of a file of others only what was read can be compared: its own program's model is not here.
    of_what = "" if weights.config is not None else " to those of the backbone as it was read"
    whose = f"{_version(library)}'s {weights.arch}" if library else weights.arch
    return f"loaded back into {whose}, features {equal}{of_what}"


def _distance(backbone, loaded, images, library):
    """The largest difference of two models' features, and the largest of the first one's."""
    with torch.no_grad():
        wanted, found = backbone(images), loaded.eval()(images)
    found = found.mean(dim=(2, 3)) if not library and found.ndim == 4 else found
    return (wanted - found).abs().max().item(), wanted.abs().max().item()


def _version(library):
    return f"{library} {distributions.version(library)}" if library != "caco_scale" else library
