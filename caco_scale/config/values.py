"""A :class:`Config` as flat names, as plain values, as a recipe; changed, checked, and beside another one."""

import dataclasses
import os
from typing import Any

import yaml

from caco_scale.config.fields import Config, Views
from caco_scale.errors import UserError
from caco_scale.flags import rules

NEUTRAL = 0.5  # mean and standard deviation of a channel of which nothing is known


def flatten(config: Config) -> dict[str, Any]:
    """``{"section.field": value}`` of a Config, in its order; "auto" for a number that is not settled."""
    flat = {}
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        if dataclasses.is_dataclass(value):
            flat |= {f"{f.name}.{g.name}": _plain(getattr(value, g.name)) for g in dataclasses.fields(value)}
        else:
            flat[f.name] = value
    return flat


def _plain(value):
    return rules.AUTO_WORD if value == rules.AUTO else value


def replace(config: Config, **changes: Any) -> Config:
    """A copy with some ``section__field=value`` changed."""
    for name, value in changes.items():
        section, key = name.split("__")
        part = dataclasses.replace(getattr(config, section), **{key: value})
        config = dataclasses.replace(config, **{section: part})
    return config


PLACES = ("run.dir", "data.shards", "data.val_shards", "data.cache_dir", "data.audit", "model.weights")


def with_absolute_places(config: Config) -> Config:
    """The config with every path in it absolute, as a run keeps it: what it says then holds from any folder."""
    flat = flatten(config)
    words = {"data.cache_dir": ("auto", "none")}
    changes = {
        name.replace(".", "__"): _absolute(flat[name])
        for name in PLACES
        if flat[name] not in words.get(name, ())
    }
    mix = [word.rpartition("=") for word in config.data.mix]
    return replace(
        config, **changes, data__mix=tuple(f"{_absolute(place)}={share}" for place, _, share in mix)
    )


def _absolute(place):
    """A path as an absolute one; nothing, and the address of an object store, as they are."""
    is_path = place and not rules.ADDRESS.match(place) and not place.startswith("pipe:")
    return os.path.abspath(place) if is_path else place


def settle_channels(config: Config, recipe: Config) -> Config:
    """The config with 0.5 for each channel where ``views.mean`` or ``views.std`` are for another number of channels.

    Where they are the defaults, or those of a ``recipe`` for so many: what a user has given stays, and :func:`check`
    refuses it.
    """
    for name in ("mean", "std"):
        value, default = getattr(config.views, name), Views.__dataclass_fields__[name].default
        of_recipe = value == getattr(recipe.views, name) and len(value) == recipe.data.channels
        if len(value) != config.data.channels and (value == default or of_recipe):
            config = replace(config, **{f"views__{name}": (NEUTRAL,) * config.data.channels})
    return config


def check(config: Config) -> None:
    """Refuse values that no run can have; what depends on data or world size is checked where those are known.

    Raises:
        UserError: a field against its own rule, or fields that do not go together.
    """
    rules.check(config)
    warmup_epochs, epochs = config.optim.warmup_epochs, config.optim.epochs
    if epochs != rules.AUTO and warmup_epochs >= epochs:
        raise UserError(f"optim.warmup_epochs {warmup_epochs:g} must be below optim.epochs {epochs}")
    channels = config.data.channels
    for name in ("mean", "std"):
        given = len(getattr(config.views, name))
        if given != channels:
            raise UserError(
                f"views.{name} has {given} number{'s' * (given != 1)} and data.channels is {channels}: give {channels} "
                f"numbers, --views.{name} {' '.join([str(NEUTRAL)] * min(channels, 3))}{' ...' * (channels > 3)}"
            )
    if config.data.shards and config.data.mix:
        raise UserError(
            "data.shards and data.mix are both given: give one (--data.shards '' takes that of the recipe away)"
        )
    resize, size = config.eval.resize, config.views.size
    if 0 < resize < size:
        raise UserError(
            f"eval.resize {resize} is less than views.size {size}, the square that is cut out: give {size} up"
        )


def differences(saved: Config, config: Config) -> list[str]:
    """Fields that a resume must not change and that differ: ``["bank.size: 65536 -> 4096", ...]``."""
    before, now = flatten(saved), flatten(config)
    places = flatten(with_absolute_places(saved)), flatten(with_absolute_places(config))
    return [
        f"{name}: {_shown(before[name])} -> {_shown(now[name])}"
        for name, kind in rules.field_types(Config).items()
        if not rules.is_free(kind) and places[0][name] != places[1][name]
    ]


# Free at a resume, but what decides when ranks meet, and over what.
MET_OVER = (
    *("run.max_steps", "run.max_skipped", "run.log_every", "run.save_every", "eval.knn_every"),
    *("data.micro_batch_size", "data.in_memory", "bank.exchange", "model.checkpoint_activations"),
    "precision.compile",
)


def same_on_all_ranks(config: Config) -> dict[str, Any]:
    """The fields in which the processes of a run must not differ: ``{"bank.size": 65536, ...}``."""
    values = flatten(config)
    return {
        name: values[name]
        for name, kind in rules.field_types(Config).items()
        if name in MET_OVER or not rules.is_free(kind)
    }


def _shown(value):
    return "nothing" if value in ("", ()) else value


def to_dict(config: Config) -> dict[str, Any]:
    """The whole resolved config as nested plain values, as YAML and JSON take them."""
    return {
        name: {k: list(v) if isinstance(v, tuple) else _plain(v) for k, v in value.items()}
        if isinstance(value, dict)
        else value
        for name, value in dataclasses.asdict(config).items()
    }


def to_yaml(config: Config) -> str:
    """The whole resolved config as YAML; itself a recipe that reproduces the run."""
    return yaml.safe_dump(to_dict(config), sort_keys=False)
