"""Export the trained backbone of a run, or of one checkpoint, for use without this program.

    python -m caco_scale.export RUN --to FILE --format {safetensors,torchvision,timm}
                                [--which query|key] [--step N] [--force]

``torchvision`` is a ``torch.save`` of a state dict for ``torchvision.models.<arch>()``; ``safetensors`` holds the
same names, with where they come from as its metadata; ``timm`` is what ``timm.create_model(..., checkpoint_path=FILE)``
reads, as safetensors if FILE ends so. The projector stays behind. A model card, FILE.md, says what it is and how to
load it. One process on the CPU is enough, whatever trained; the file is loaded back into the library's own model and
its features are compared with the trained backbone's before it appears.
"""

import json
import os
from importlib import metadata as distributions
from pathlib import Path

import torch
import yaml
from safetensors import safe_open
from safetensors.torch import save_file

from caco_scale import config as configuration
from caco_scale.atomic import write_atomically
from caco_scale.checkpoint import latest, load_tensors, read_values, step_path, steps
from caco_scale.errors import Parser, UserError, exit_on_user_error
from caco_scale.layouts import check_library, library_model, to_timm
from caco_scale.method.encoders import build_backbone
from caco_scale.model_card import scores, write_card

FORMATS = ("safetensors", "torchvision", "timm")
TOLERANCE = 1e-5  # of features, relative to the greatest where that is above one
TORCH_SUFFIXES = (".pth", ".pt", ".bin", ".ckpt", ".tar")


def export(run, to, file_format, which="query", step=None, force=False):
    """Write the backbone of ``run`` (a run's or a checkpoint's directory) to the file ``to`` -> its metadata.

    ``which``: the query or the key (momentum) encoder; ``step``: which checkpoint of the run, default the newest. The
    model card goes to ``<to>.md``. Raises UserError: no run, no such checkpoint, damaged, not finite, unknown format, a
    library without the model, no or an existing target without ``force``, and where the file read back does not give
    the trained backbone's features.
    """
    to = Path(to)
    card = to.with_name(f"{to.name}.md")
    _check_target(to, card, file_format, force)
    path = find_checkpoint(run, step)
    state, metadata = backbone_state(path, which)
    library = "timm" if file_format == "timm" else _library_of(metadata, file_format)
    check_library(library, metadata["arch"])
    stored = to_timm(state, metadata["arch"]) if library == "timm" else state
    temporary = to.with_name(f"{to.name}.tmp{os.getpid()}")
    try:
        _write(temporary, stored, metadata, _container(to, file_format))
        compared = _compare(temporary, state, metadata, library)
        text = _card(path, to, temporary, library, metadata, compared)
        write_atomically(card, text.encode())
        os.replace(temporary, to)
    except OSError as error:
        raise UserError(f"{to} could not be written: {error.strerror or error}") from error
    finally:
        temporary.unlink(missing_ok=True)
    return {**metadata, "compared": compared}


def _check_target(to, card, file_format, force):
    """Refuse a format or a target that cannot be meant (UserError)."""
    if file_format not in FORMATS:
        raise UserError(f"unknown format {file_format!r}: use one of {', '.join(FORMATS)}")
    if to.suffix == ".safetensors" and file_format == "torchvision":
        raise UserError(
            f"{to}: format torchvision is a torch file, name it .pth, or use --format safetensors"
        )
    if to.suffix in TORCH_SUFFIXES and file_format == "safetensors":
        raise UserError(f"{to}: name it .safetensors, or use --format torchvision for a torch file")
    if os.path.isdir(to):
        raise UserError(f"{to} is a directory: give the name of a file in it")
    if not os.path.isdir(to.parent):
        raise UserError(f"{to} cannot be written: there is no directory {to.parent}")
    for file in (to, card):
        if os.path.exists(file) and not file.is_file():
            raise UserError(f"{file} is no ordinary file: give the name of one to write")
        if os.path.exists(file) and not force:
            raise UserError(f"{file} exists: give another name, or --force to replace it")


def _library_of(metadata, file_format):
    """Whose model a file of torchvision's names loads into: only ``tiny`` is no model of torchvision's."""
    return "caco_scale" if file_format == "safetensors" and metadata["arch"] == "tiny" else "torchvision"


def _container(to, file_format):
    """timm tells the two kinds of files apart by the name's end."""
    if file_format == "timm":
        return "safetensors" if to.suffix == ".safetensors" else "torch"
    return "safetensors" if file_format == "safetensors" else "torch"


def _card(path, to, temporary, library, metadata, compared):
    """The model card's text for the checkpoint ``path`` and the file that is about to become ``to``."""
    values, run = read_values(path), path.parent.parent
    try:
        config = configuration.flatten(configuration.from_dict(_config(path, values), str(path)))
    except UserError:  # of another version: what it says of the model was enough for the tensors
        config = {}
    evaluations = scores(run, values["step"])
    data, environment = temporary.read_bytes(), _json(run / "environment.json")
    return write_card(to.name, data, library, metadata, values, config, environment, evaluations, compared)


def find_checkpoint(run, step=None):
    """The checkpoint that a user means by a run's or a checkpoint's directory, and maybe a step -> Path."""
    run = Path(run)
    if not os.path.isdir(run):  # False, too, for a name that no file can have
        raise UserError(f"no run at {run}: give a run directory, or one of its checkpoints/step_XXXXXXXX")
    if (run / "values.json").exists():
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


def backbone_state(path, which="query"):
    """A checkpoint's backbone as (state dict in torchvision's names, floats in fp32; metadata of strings)."""
    values = read_values(path)
    config = _config(path, values)
    prefixes = (f"{which}.backbone.", f"{which}_buffer.backbone.")
    names = [name for name in values["shapes"] if name.startswith(prefixes)]
    tensors = load_tensors(path, names)
    state = {}
    for name, tensor in tensors.items():
        short = name.removeprefix(prefixes[0]).removeprefix(prefixes[1])
        state[short] = tensor.float() if tensor.is_floating_point() else tensor
        if not state[short].isfinite().all():
            raise UserError(f"{path}: {name} is not finite, the run has diverged: export an earlier step")
    environment = _json(path.parent.parent / "environment.json")
    metadata = {
        "arch": config["model"]["arch"],
        "stem": config["model"]["stem"],
        "encoder": which,
        "recipe": config.get("recipe", ""),
        "step": values["step"],
        "epoch": values.get("epoch", ""),
        "git_commit": environment.get("git_commit", ""),
    }
    return state, {key: str(value) for key, value in metadata.items()}


def _config(path, values):
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


def _json(path):
    """A JSON object, empty where there is none that can be read."""
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def _write(path, state, metadata, container):
    if container == "safetensors":
        # Copies: safetensors refuses tensors that share memory.
        save_file(
            {name: t.contiguous() for name, t in state.items()}, path, metadata={"format": "pt", **metadata}
        )
    else:
        torch.save(state, path)
    with open(path, "rb") as stream:
        os.fsync(stream.fileno())


def read_weights(path):
    """A state dict from a file of either format, by its content; nothing is unpickled but tensors."""
    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except Exception:  # safetensors' own error class: then it is torch's format
        return torch.load(path, map_location="cpu", weights_only=True)


def _compare(path, state, metadata, library):
    """Features of the file, read back into the library's model, against the trained backbone's -> how equal, in words.

    UserError where they differ by more than the tolerance.
    """
    arch, stem = metadata["arch"], metadata["stem"]
    with torch.device("meta"):  # nothing to initialise: every tensor comes from a state dict
        trained, _ = build_backbone(arch, stem)
    try:
        trained.load_state_dict(state, assign=True)
    except RuntimeError as error:
        raise UserError(f"the checkpoint does not hold a backbone {arch}: {error}") from error
    loaded = library_model(library, arch, stem)
    loaded.load_state_dict(read_weights(path), assign=True)
    size = 32 if stem == "cifar" or arch == "tiny" else 224
    images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted, found = trained.eval()(images), loaded.eval()(images)
    distance = (wanted - found).abs().max().item()
    if not distance <= TOLERANCE * max(1.0, wanted.abs().max().item()):
        raise UserError(f"{library}'s model does not give the trained features back (off by {distance:.3g})")
    equal = "equal bit for bit" if distance == 0 else f"equal to {distance:.1g}"
    return f"loaded back into {_version(library)}'s {arch}, features {equal}"


def _version(library):
    return f"{library} {distributions.version(library)}" if library != "caco_scale" else library


def _parse(arguments):
    parser = Parser(
        prog="python -m caco_scale.export", description=__doc__.splitlines()[0], allow_abbrev=False
    )
    parser.add_argument("run", metavar="RUN", help="run directory, or one of its checkpoints/step_XXXXXXXX")
    parser.add_argument("--to", required=True, metavar="FILE", help="file to write")
    parser.add_argument(
        "--format", required=True, choices=FORMATS, dest="file_format", help="format of the file"
    )
    parser.add_argument("--which", choices=("query", "key"), default="query", help="encoder (default: query)")
    parser.add_argument("--step", type=int, help="step of the checkpoint (default: the newest)")
    parser.add_argument("--force", action="store_true", help="replace an existing file")
    return parser.parse_args(arguments)


@exit_on_user_error
def main(arguments=None):
    flags = _parse(arguments)
    metadata = export(**vars(flags))
    size = Path(flags.to).stat().st_size / 1e6
    what = "{encoder} backbone {arch} (stem {stem}) of step {step}; {compared}".format(**metadata)
    print(f"wrote {flags.to} ({size:.1f} MB, {flags.file_format}) and {flags.to}.md: {what}")


if __name__ == "__main__":
    main()
