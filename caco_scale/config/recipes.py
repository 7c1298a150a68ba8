"""A :class:`Config` from a recipe, a YAML file of some sections, or from a checkpoint's plain values.

Both go the way of a command line: the values become words, ``--bank.size=4096``, and tyro reads them.
"""

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from caco_scale.config.fields import Config
from caco_scale.config.yaml_file import excerpt, read_yaml
from caco_scale.errors import UserError, did_you_mean
from caco_scale.flags import read as flags
from caco_scale.flags.rules import Free, Mix, Options
from caco_scale.flags.suggest import in_words, meant, nearest

RECIPES = Path(__file__).parents[1] / "recipes"


def recipe_names() -> list[str]:
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def load_recipe(name: str | Path) -> Config:
    """The Config of a recipe's name or of a YAML file's path."""
    path = RECIPES / f"{name}.yaml"
    if not os.path.exists(path):  # pathlib raises for a name that no file can have
        path = Path(name)
        if not os.path.isfile(path):
            shown = excerpt(str(name))
            raise UserError(
                f"no recipe {shown}{did_you_mean(str(name)[:80], recipe_names())}: give one of "
                f"{', '.join(recipe_names())}, or the path of a YAML file"
            )
    values = read_yaml(path) or {}
    if not isinstance(values, dict):
        raise UserError(f"{path} holds no sections (run:, data:, bank: ...)")
    return from_dict({"recipe": path.stem, **values}, str(path))


def makes_its_data(config: Config) -> bool:
    """Is it a demo, or a baseline of it, on the demo's own images, which the command builds?"""
    own = os.path.abspath(load_recipe("demo").data.shards)
    return config.recipe.split("_")[0] == "demo" and os.path.abspath(config.data.shards) == own


def from_dict(values: Mapping[str, Any], source: str) -> Config:
    """The Config of nested values, plain ones or words; fields that are not named have their defaults.

    ``source`` names the values in errors.

    Raises:
        UserError: an unknown section or field, naming the nearest; a value of the wrong type.
    """
    known, words, recipe = flags.flag_types(Config), [], Config.recipe
    sections = [f.name for f in dataclasses.fields(Config)]
    for section, fields in values.items():
        if section not in sections:
            raise UserError(
                f"{source}: unknown field {_name(section)}{_meant(_name(section), sections, known)}"
            )
        if section == "recipe":
            recipe = _name(fields)
            continue
        if not isinstance(fields, Mapping):
            raise UserError(f"{source}: {section} is a section, not a value ({excerpt(fields)})")
        for key, value in fields.items():
            name = f"{section}.{_name(key)}"
            if name not in known:
                raise UserError(f"{source}: unknown field {name}{_meant(name, [], known)}")
            if value is None:
                raise UserError(f"{source}: {name} has no value: give one, or leave the line out")
            if isinstance(value, Mapping) and known[name] in (Options, Free[Mix]):
                value = [f"{_name(k)}={_word(v)}" for k, v in value.items()]
            several = isinstance(value, list | tuple)
            if several and not value and flags.most_values(known[name]) == float("inf"):
                continue
            if several and len(value) > flags.most_values(known[name]):
                raise UserError(f"{source}: {name} is {excerpt(value)}: {flags.wanted(known[name])}")
            if any(isinstance(item, list | tuple | Mapping) for item in (value if several else [value])):
                raise UserError(f"{source}: {name} is {excerpt(value)}: {flags.wanted(known[name])}")
            words += [f"--{name}", *map(str, value)] if several else [f"--{name}={value}"]
    config = flags.read(Config, words, source, default=Config(), name_of=lambda name: f"{source}: {name}")
    return dataclasses.replace(config, recipe=recipe)


def _meant(name, sections, known):
    """What an unknown section or field of a recipe may have meant, or nothing."""
    return in_words(nearest(name, sections) or meant(name, known))


def _word(value):
    """A value of a section as the word of a command line."""
    return f"[{', '.join(map(str, value))}]" if isinstance(value, list) else str(value)


def _name(key):
    """A key as errors show it: what is no word, or none that was meant, as an excerpt."""
    return key if isinstance(key, str) and len(key) <= 200 else excerpt(key)
