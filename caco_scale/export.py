"""Export the trained backbone of a run, or of one checkpoint, for use without this program.

    python -m caco_scale.export RUN --to FILE --format {safetensors,torchvision}
                                [--which query|key] [--step N] [--force]

``torchvision`` is a ``torch.save`` of a state dict for ``torchvision.models.<arch>()``; ``safetensors``
holds the same names, with where they come from as its metadata. The projector stays behind. One process on
the CPU is enough, whatever trained; the file is loaded back and its features compared with the trained
backbone's before it appears.
"""

import argparse
import json
import os
from pathlib import Path

import torch
import yaml
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from torchvision import models

from caco_scale.checkpoint import latest, load_tensors, read_values, step_path, steps
from caco_scale.errors import UserError, exit_on_user_error
from caco_scale.method.encoders import build_backbone

FORMATS = ("safetensors", "torchvision")


def export(run, to, file_format, which="query", step=None, force=False):
    """Write the backbone of ``run`` (a run's or a checkpoint's directory) to the file ``to`` -> its metadata.

    ``which``: the query or the key (momentum) encoder; ``step``: which checkpoint of the run, default the
    newest. Raises UserError: no run, no such checkpoint, damaged, unknown format, no or an existing target
    without ``force``, and where the file read back does not give the trained backbone's features bit for
    bit.
    """
    to = Path(to)
    if file_format not in FORMATS:
        raise UserError(f"unknown format {file_format!r}: use one of {', '.join(FORMATS)}")
    if to.is_dir():
        raise UserError(f"{to} is a directory: give the name of a file in it")
    if to.exists() and not force:
        raise UserError(f"{to} exists: give another name, or --force to replace it")
    if not to.parent.is_dir():
        raise UserError(f"{to} cannot be written: there is no directory {to.parent}")
    path = find_checkpoint(run, step)
    state, metadata = backbone_state(path, which)
    temporary = to.with_name(f"{to.name}.tmp{os.getpid()}")
    try:
        _write(temporary, state, metadata, file_format)
        _compare(temporary, state, metadata, file_format)
        os.replace(temporary, to)
    except OSError as error:
        raise UserError(f"{to} could not be written: {error.strerror or error}") from error
    finally:
        temporary.unlink(missing_ok=True)
    return metadata


def find_checkpoint(run, step=None):
    """The checkpoint that a user means by a run's or a checkpoint's directory, and maybe a step -> Path."""
    run = Path(run)
    if not run.is_dir():
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
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return {}


def _write(path, state, metadata, file_format):
    if file_format == "safetensors":
        save_file(state, path, metadata={"format": "pt", **metadata})
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


def _compare(path, state, metadata, file_format):
    """The features of the file, read back as a user will, must equal the trained backbone's bit for bit."""
    with torch.device("meta"):  # nothing to initialise: every tensor comes from a state dict
        trained, _ = build_backbone(metadata["arch"], metadata["stem"])
    try:
        trained.load_state_dict(state, assign=True)
    except RuntimeError as error:
        raise UserError(f"the checkpoint does not hold a backbone {metadata['arch']}: {error}") from error
    loaded = _users_model(read_weights(path), metadata)
    size = 32 if metadata["stem"] == "cifar" or metadata["arch"] == "tiny" else 224
    images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted, found = trained.eval()(images), loaded.eval()(images)
    if not torch.equal(wanted, found):
        distance = (wanted - found).abs().max().item()
        raise UserError(
            f"the {file_format} file does not give the trained features back (off by {distance:.3g})"
        )


def _users_model(state, metadata):
    """The model a user would build: torchvision's (only the classifier may be missing), else ours."""
    arch, stem = metadata["arch"], metadata["stem"]
    if stem == "cifar" or arch not in models.list_models(module=models):
        with torch.device("meta"):
            model, _ = build_backbone(arch, stem)
        model.load_state_dict(state, assign=True)
        return model
    with torch.device("meta"):
        model = models.get_model(arch, weights=None)
    head = "heads" if hasattr(model, "heads") else "fc"
    keys = model.load_state_dict(state, strict=False, assign=True)
    assert not keys.unexpected_keys, keys
    assert all(key.startswith(f"{head}.") for key in keys.missing_keys), keys
    setattr(model, head, nn.Identity())
    return model


class _Parser(argparse.ArgumentParser):
    """A typo is one line, exit code 2."""

    def error(self, message):
        raise UserError(f"{message}; see python -m caco_scale.export --help")


def _parse(arguments):
    parser = _Parser(
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
    what = "{encoder} backbone {arch} (stem {stem}) of step {step}".format(**metadata)
    print(f"wrote {flags.to} ({size:.1f} MB, {flags.file_format}): {what}; loaded back and equal bit for bit")


if __name__ == "__main__":
    main()
