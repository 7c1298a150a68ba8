"""Recipe and flags, as typed on a command line, to a checked :class:`Config`."""

from collections.abc import Iterable
from typing import Any, TypeVar, overload

from caco_scale.config.fields import Config, Views
from caco_scale.config.recipes import load_recipe, recipe_names
from caco_scale.config.values import check, replace, settle_channels
from caco_scale.errors import UserError
from caco_scale.flags import read as flags

Own = TypeVar("Own")


@overload
def parse(arguments: Iterable[str], prog: str = ..., own: None = None) -> Config: ...
@overload
def parse(arguments: Iterable[str], prog: str, own: type[Own]) -> tuple[Config, Own]: ...
def parse(arguments: Iterable[str], prog: str = "python -m caco_scale.pretrain", own: Any = None) -> Any:
    """``[RECIPE] [--section.field value ...]`` to a checked Config; with ``own`` to (Config, an ``own``).

    The recipe may stand after the flags, too.

    Args:
        arguments: no recipe means ``demo``.
        own: a dataclass of flags that the command has besides the recipe's.
    Raises:
        UserError: unknown recipe or flag (naming the nearest), a value of the wrong type or out of range.
    """
    kinds = [Config] if own is None else [own, Config]
    name, arguments = flags.take_word(list(arguments), kinds, recipe_names())
    config = load_recipe(flags.at_home(name or "demo"))
    if not config.run.dir:
        config = replace(config, run__dir=f"runs/{config.recipe}")
    about = (
        f"RECIPE: {', '.join(recipe_names())}, or the path of a YAML file. "
        f"The values below are those of {config.recipe}."
    )
    if own is None:
        given = flags.read(Config, arguments, prog, default=config, about=about, usage="[RECIPE]")
        return _checked(given, config)
    about = f"{own.__doc__} {about}"
    given, options = flags.read_both(
        Config, own, arguments, prog, default=config, about=about, usage="[RECIPE]"
    )
    return _checked(given, config), options


def _checked(config, recipe):
    _refuse_two_sources(config.views, recipe.views)
    config = settle_channels(config, recipe)
    if not config.run.dir.strip():
        raise UserError(f"run.dir is empty: give a directory, or leave it out for runs/{config.recipe}")
    check(config)
    return config


def _refuse_two_sources(views, of_recipe):
    """UserError for a mean or deviation that is given, and to be measured as well."""
    if views.stats != "measure":
        return
    before = Views() if of_recipe.stats == "measure" else of_recipe  # a flag may overrule what a recipe gives
    for name in ("mean", "std"):
        if getattr(views, name) != getattr(before, name):
            raise UserError(
                f"views.{name} is given and views.stats is measure: leave views.mean and views.std out, or give "
                "--views.stats given"
            )
