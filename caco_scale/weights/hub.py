"""A Hugging Face directory in timm's layout: ``config.json`` and a file of weights, ``model.safetensors`` at best."""

import json
from pathlib import Path
from typing import Any

from caco_scale.errors import UserError, did_you_mean, one_line, with_article
from caco_scale.weights.build import printable
from caco_scale.weights.place import CONFIG

HUB = "Hugging Face directory of timm's layout"
FILES = ("model.safetensors", "pytorch_model.bin")  # the first that there is
MOST_BYTES = 10**6  # of config.json


def weights_file(path: Path) -> Path:
    """The file of weights in such a directory. UserError where it has none, or has it in several parts."""
    for name in FILES:
        if (path / name).is_file():
            return path / name
    parts = next(path.glob("*.index.json"), None)
    if parts is not None:
        raise UserError(f"{path} holds its weights in several files ({parts.name}): save them as {FILES[0]}")
    raise UserError(f"{path} has a {CONFIG} and no weights beside it: fetch {' or '.join(FILES)}, too")


def hub_metadata(path: Path, name: str = "") -> dict[str, str]:
    """What ``config.json`` says, in the words of our exports' metadata: arch, options, and of the images what it knows.

    ``name``: of the directory in an error, where that is not its path.

    Raises:
        UserError: damaged, or of another library than timm.
    """
    name = name or str(path)
    content = _read(path / CONFIG)
    arch, images = content.get("architecture"), content.get("pretrained_cfg")
    if not isinstance(arch, str):
        whose = content.get("architectures") or content.get("model_type") or "no architecture"
        raise UserError(
            f"{name} is in the layout of another library than timm ({printable(str(whose))[:100]}): load it there, and "
            "save its backbone's state_dict() as a file"
        )
    import timm

    if not timm.is_model(arch.partition(".")[0]):
        wanted = printable(arch)[:100]
        near = did_you_mean(wanted, timm.list_models())
        raise UserError(f"{name}/{CONFIG}: timm {timm.__version__} has no model {wanted!r}{near}")
    images = images if isinstance(images, dict) else content
    arguments = content.get("model_args") or {}
    if not isinstance(arguments, dict):
        raise UserError(f"{name}/{CONFIG} is damaged: its model_args are no names with values")
    # Of a backbone without classes; all else that builds the model counts.
    fixed = images.get("fixed_input_size") and not {"dynamic_img_size", "strict_img_size"} & set(arguments)
    if fixed and _side(images):  # another size than the architecture's own changes a parameter's shape
        arguments = {"img_size": _side(images), **arguments}
    channels = arguments.get("in_chans", 3)
    words = [f"{k}={json.dumps(v)}" for k, v in arguments.items() if k not in ("num_classes", "in_chans")]
    found = {"arch": f"timm/{arch}", "stem": "imagenet", "options": json.dumps(words), **_images(images)}
    found |= {"channels": str(channels)} if channels != 3 else {}
    return {name: value for name, value in found.items() if value}


def _read(path) -> dict[str, Any]:
    try:
        with open(path, "rb") as file:
            content = json.loads(file.read(MOST_BYTES))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is no readable JSON ({one_line(error)[:200]}): fetch it again") from None
    if not isinstance(content, dict):
        what = with_article(type(content).__name__)
        raise UserError(f"{path} holds {what}, not the facts of a model: fetch it again")
    return content


def _images(facts):
    """Size, resize, mean and std, as far as they are there; the reader of the words checks their range."""
    side, share = _side(facts), facts.get("crop_pct")
    words = {
        name: " ".join(map(str, facts[name])) for name in ("mean", "std") if isinstance(facts.get(name), list)
    }
    if side:
        words["size"] = str(side)
        if isinstance(share, int | float) and 0 < share <= 1:
            words["resize"] = str(int(side / share))
    return words


def _side(facts):
    """Pixels on a side of square images, 0 where nothing says it."""
    shape = facts.get("input_size")
    is_square = isinstance(shape, list) and len(shape) == 3 and shape[1] == shape[2]
    return shape[1] if is_square and isinstance(shape[1], int) else 0
