"""Every default of a run, and how a recipe and flags become one frozen :class:`Config`.

    fields.py        the sections and their fields: defaults, rules, units
    fit.py           values that follow the number of images
    values.py        a Config as flat names, as plain values, beside another Config
    yaml_file.py     YAML by words, within limits
    recipes.py       a Config from a YAML file or from a checkpoint's plain values
    command_line.py  recipe and flags, as typed, to a Config

Knows of no other room: of the package only ``errors`` and ``flags``. It is imported by what
builds the parts of a run, by commands and reports; the mathematics takes plain values.
"""

from caco_scale.config.command_line import parse
from caco_scale.config.fields import Config, Views
from caco_scale.config.recipes import RECIPES, from_dict, load_recipe, makes_its_data, recipe_names
from caco_scale.config.values import (
    NEUTRAL,
    check,
    differences,
    flatten,
    replace,
    same_on_all_ranks,
    settle_channels,
    to_dict,
    to_yaml,
    with_absolute_places,
)

__all__ = [
    "NEUTRAL",
    "RECIPES",
    "Config",
    "Views",
    "check",
    "differences",
    "flatten",
    "from_dict",
    "load_recipe",
    "makes_its_data",
    "parse",
    "recipe_names",
    "replace",
    "same_on_all_ranks",
    "settle_channels",
    "to_dict",
    "to_yaml",
    "with_absolute_places",
]
