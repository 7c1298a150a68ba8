"""A study's file to the list of its runs.

    recipe: demo                      # a recipe's name, or the path of one
    flags: {optim.epochs: 9}          # of every run, by dotted names
    runs:                             # by name, what each has of its own
      caco: {}
      moco: {bank.rule: moco, loss.temperature: 0.2}
    grid: {bank.size: [256, 1024]}    # every run with every combination of these
    seeds: [0, 1, 2]                  # every run with each of them; without the line: 0

``runs`` and ``grid`` may each be left out.
"""

import functools
import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from caco_scale import config as configuration
from caco_scale.config import Config
from caco_scale.config.yaml_file import read_yaml
from caco_scale.errors import UserError, did_you_mean
from caco_scale.flags import read as flags
from caco_scale.flags.suggest import in_words, meant

PARTS = ("recipe", "flags", "runs", "grid", "seeds")
OWN = {  # fields that the sweep sets itself -> what to use instead
    "run.dir": "--dir of the sweep",
    "run.seed": "seeds: in the study",
    "run.resume": "nothing: a run always resumes",
}
MOST_RUNS = 2_000
MOST_NAME = 200  # characters of a folder's name, of which file systems take 255


@dataclass(frozen=True)
class Planned:
    """One run of a study. ``name``: shared by its seeds. ``varied``: what it has of its own, as the file says it."""

    name: str
    seed: int
    varied: Mapping[str, str]
    recipe: str
    config: Config

    @property
    def directory(self) -> Path:
        return Path(self.config.run.dir)

    def command(self) -> list[str]:
        """The words after ``python -m caco_scale.pretrain`` that give this run: its recipe, and what differs."""
        before, words = _values(self.recipe), [self.recipe]
        for field, value in configuration.flatten(self.config).items():
            if value != before[field]:
                words += (
                    [f"--{field}", *map(str, value)] if isinstance(value, tuple) else [f"--{field}={value}"]
                )
        return words


@functools.cache
def _values(recipe):
    return configuration.flatten(configuration.load_recipe(recipe))


@dataclass(frozen=True)
class Study:
    """A study's file, read. ``base``: the configuration that all runs share. ``variants``: name -> flags of its own."""

    path: Path
    recipe: str
    base: Config
    variants: Mapping[str, Mapping[str, Any]]
    seeds: Sequence[int]

    def varied_fields(self) -> list[str]:
        """Every field that some run has of its own, in the file's order."""
        return list(dict.fromkeys(field for own in self.variants.values() for field in own))

    def planned(self, folder: str | Path) -> list[Planned]:
        """Its runs, each with its directory in ``folder``: the first seed of all of them, then the next one's.

        Raises:
            UserError: a configuration that no run can have, with the run's name.
        """
        found = []
        for seed, (name, own) in itertools.product(self.seeds, self.variants.items()):
            config = _with_flags(self.base, own, f"{self.path}, {name}")
            config = configuration.replace(config, run__dir=str(Path(folder, name, f"seed_{seed}")))
            config = configuration.replace(config, run__seed=seed)
            config = configuration.settle_channels(config, self.base)
            try:
                configuration.check(config)
            except UserError as error:
                raise UserError(f"{self.path}, {name}: {error}") from None
            varied = {field: _shown(value) for field, value in own.items()}
            found.append(Planned(name, seed, varied, self.recipe, config))
        return found


def read_study(path: str | Path) -> Study:
    """The study of a YAML file.

    Raises:
        UserError: no such file, no YAML, an unknown part or field (naming the nearest), a value of the wrong type.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(
            f"no study {path}: give the path of a YAML file (recipe:, flags:, runs:, grid:, seeds:)"
        )
    parts = read_yaml(path)
    if not isinstance(parts, dict):
        raise UserError(f"{path} holds no parts: a study has {', '.join(PARTS)}")
    for part in parts:
        if part not in PARTS:
            raise UserError(
                f"{path}: unknown part {part}{did_you_mean(part, PARTS)}: a study has {', '.join(PARTS)}"
            )
    if not isinstance(parts.get("recipe"), str):
        raise UserError(f"{path} names no recipe: give one, as in recipe: demo")
    base = configuration.replace(
        configuration.load_recipe(parts["recipe"]), run__finish="none"
    )  # a table is asked for
    base = _with_flags(base, _mapping(parts.get("flags"), f"{path}: flags"), str(path))
    variants = _variants(parts, path)
    seeds = _seeds(parts.get("seeds", ["0"]), path)
    if len(variants) * len(seeds) > MOST_RUNS:
        raise UserError(f"{path} has {len(variants) * len(seeds):,} runs: give at most {MOST_RUNS:,}")
    return Study(path, parts["recipe"], base, variants, seeds)


def _variants(parts, path):
    """Name -> flags of its own, of every run in ``runs`` with every combination of ``grid``."""
    grid = _mapping(parts.get("grid"), f"{path}: grid")
    for field, values in grid.items():
        if not isinstance(values, list) or not values:
            raise UserError(f"{path}: grid: {field} is {values!r}: give a list of values, as in [1, 2]")
    runs = _mapping(parts.get("runs"), f"{path}: runs")
    runs = {str(name): _mapping(own, f"{path}: runs: {name}") for name, own in runs.items()} or {"": {}}
    if not grid and runs == {"": {}}:
        raise UserError(f"{path} has no runs: give runs: or grid:")
    for name, own in runs.items():
        twice = sorted(set(own) & set(grid))
        if twice:
            raise UserError(f"{path}: {twice[0]} is in the run {name} and in the grid: keep one of them")
    variants: dict[str, dict[str, Any]] = {}
    fields = _short_names(grid)
    for (name, own), values in itertools.product(runs.items(), itertools.product(*grid.values())):
        words = [f"{fields[field]}={_shown(value)}" for field, value in zip(grid, values, strict=True)]
        full = _folder_name(",".join([name, *words] if name else words), path)
        if full in variants:
            raise UserError(
                f"{path}: two runs would be called {full}: give other values, or name them in runs:"
            )
        variants[full] = {**own, **dict(zip(grid, values, strict=True))}
    return variants


def _short_names(fields: Iterable[str]) -> dict[str, str]:
    """``bank.size`` -> ``size`` where no other field of the grid ends so."""
    last = [field.rpartition(".")[2] for field in fields]
    return {field: end if last.count(end) == 1 else field for field, end in zip(fields, last, strict=True)}


def _folder_name(name, path):
    name = re.sub(r"[^\w.=,+-]+", "-", name)
    if not name.strip(".-") or name.startswith((".", "-")) or len(name) > MOST_NAME:
        raise UserError(
            f"{path}: {name!r} cannot be the name of a folder: give 1 to {MOST_NAME} letters and digits, in runs:"
        )
    return name


def _seeds(values, path):
    if not isinstance(values, list) or not values:
        raise UserError(f"{path}: seeds is {values!r}: give a list of whole numbers, as in [0, 1, 2]")
    try:
        seeds = [int(value) for value in values]
    except (TypeError, ValueError):
        raise UserError(f"{path}: seeds is {values!r}: give whole numbers") from None
    if len(set(seeds)) < len(seeds):
        raise UserError(f"{path}: a seed is given twice ({', '.join(map(str, seeds))}): give each once")
    return seeds


def _mapping(value, what):
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise UserError(f"{what} is {value!r}: give names and values, as in {{bank.size: 256}}")
    return value


def _with_flags(base, fields, source):
    """``base`` with fields by their dotted names, as a YAML file gives them."""
    known, words = flags.flag_types(Config), []
    for field, value in fields.items():
        if field in OWN:
            raise UserError(f"{source}: {field} is set by the sweep: use {OWN[field]}")
        if field not in known:
            hint = (
                ": give dotted names, as in bank.size"
                if isinstance(value, dict)
                else in_words(meant(field, known))
            )
            raise UserError(f"{source}: unknown field {field}{hint}")
        if value is None or isinstance(value, dict) or value == []:
            raise UserError(f"{source}: {field} has no value: give one, or leave it out")
        if isinstance(value, list) and len(value) > flags.most_values(known[field]):
            raise UserError(f"{source}: {field} is {' '.join(map(str, value))}: {flags.wanted(known[field])}")
        words += [f"--{field}", *map(str, value)] if isinstance(value, list) else [f"--{field}={value}"]
    return flags.read(Config, words, source, default=base, name_of=lambda name: f"{source}: {name}")


def _shown(value):
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)
