"""A :class:`Config` from a recipe, a YAML file of some sections, or from a checkpoint's plain values.

Both go the way of a command line: the values become words, ``--bank.size=4096``, and tyro reads them.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from caco_scale.config.fields import Config
from caco_scale.errors import UserError, did_you_mean, one_line
from caco_scale.flags import read as flags

RECIPES = Path(__file__).parents[1] / "recipes"


def recipe_names() -> list[str]:
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def load_recipe(name: str | Path) -> Config:
    """The Config of a recipe's name or of a YAML file's path."""
    path = RECIPES / f"{name}.yaml"
    if not path.exists():
        path = Path(name)
        if not path.is_file():
            raise UserError(
                f"no recipe {str(name)!r}{did_you_mean(name, recipe_names())}: give one of "
                f"{', '.join(recipe_names())}, or the path of a YAML file"
            )
    try:
        values = yaml.load(path.read_text(), Words) or {}
    except GivenTwice as error:
        raise UserError(f"{path}: {error}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not a YAML file: {one_line(error)}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path} holds no sections (run:, data:, bank: ...)")
    return from_dict({"recipe": path.stem, **values}, str(path))


def makes_its_data(config: Config) -> bool:
    """Is it a demo, or a baseline of it, on the demo's own images, which the command builds?"""
    return config.recipe.split("_")[0] == "demo" and config.data.shards == load_recipe("demo").data.shards


class GivenTwice(ValueError):
    """A section or a field stands twice in a file: YAML's own reader would drop the first without a word."""


class Words(yaml.SafeLoader):
    """Reads YAML whose values stay the words that were typed; a key given twice is :class:`GivenTwice`."""

    def compose_mapping_node(self, anchor):
        node, lines = super().compose_mapping_node(anchor), {}
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue  # no name: refused later
            line = key.start_mark.line + 1
            if key.value in lines:
                fix = "join the two" if isinstance(value, yaml.MappingNode) else "keep one of them"
                raise GivenTwice(f"{key.value} is given twice, in lines {lines[key.value]} and {line}: {fix}")
            lines[key.value] = line
        return node


KEPT_MEANINGS = ("tag:yaml.org,2002:null", "tag:yaml.org,2002:merge")  # nothing, and ``<<: *anchor``
Words.yaml_implicit_resolvers = {
    first: [(tag, form) for tag, form in resolvers if tag in KEPT_MEANINGS]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


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
            raise UserError(f"{source}: unknown field {section}{did_you_mean(section, sections)}")
        if section == "recipe":
            recipe = str(fields)
            continue
        if not isinstance(fields, Mapping):
            raise UserError(f"{source}: {section} is a section, not a value ({fields!r})")
        for key, value in fields.items():
            name = f"{section}.{key}"
            if name not in known:
                raise UserError(f"{source}: unknown field {name}{did_you_mean(name, known)}")
            if value is None:
                raise UserError(f"{source}: {name} has no value: give one, or leave the line out")
            several = isinstance(value, list | tuple)
            if several and len(value) > flags.most_values(known[name]):
                raise UserError(f"{source}: {name} is {value}: {flags.wanted(known[name])}")
            words += [f"--{name}", *map(str, value)] if several else [f"--{name}={value}"]
    config = flags.read(Config, words, source, default=Config(), name_of=lambda name: f"{source}: {name}")
    return dataclasses.replace(config, recipe=recipe)
