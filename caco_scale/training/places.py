"""What a configuration names on disks and in libraries, looked at before torch is imported: a mistake costs no start.

The words are those of the parts that use these things, and the checks are theirs: here they are only made early. This
file imports neither torch nor what imports it.
"""

import os
from fractions import Fraction
from pathlib import Path

from caco_scale.checkpoint.folder import checkpoint_of
from caco_scale.checkpoint.resume import goes_on_from
from caco_scale.config import Config, makes_its_data
from caco_scale.data.store import kind_at
from caco_scale.distributed.environment import is_on_one_node
from caco_scale.errors import UserError
from caco_scale.method.architectures import refuse_unknown
from caco_scale.weights.place import place_of


def mixed(config: Config) -> list[tuple[str, Fraction]]:
    """(address, weight) of each set of ``data.mix``."""
    parts = [word.rpartition("=") for word in config.data.mix]
    return [(address, Fraction(weight)) for address, _, weight in parts]


def evaluates(config: Config) -> bool:
    """Does the run evaluate, on ``data.val_shards``?"""
    return bool(config.data.val_shards and (config.eval.knn_every or config.eval.baselines))


def look_early(config: Config) -> None:
    """Refuse what this process sees is not there: the architecture, sets, weights, a checkpoint to resume from.

    Of processes on several nodes none speaks alone: the others would wait for it. They look together, later.

    Raises:
        UserError: as training raises it.
    """
    if not is_on_one_node(os.environ):
        return
    refuse_unknown(config.model.arch)
    if config.run.resume not in ("auto", "never"):
        checkpoint_of(config.run.resume)
    if config.model.weights and not goes_on_from(config):
        look_for_weights(config.model.weights)
    sets = mixed(config)
    for address, _ in sets:
        kind_at(address, "data.mix")
    made = Path(config.data.shards).parent if makes_its_data(config) else None  # the demo's, both sets
    if not sets and not made:
        kind_at(config.data.shards)
    if evaluates(config) and Path(config.data.val_shards).parent != made:
        kind_at(config.data.val_shards, "data.val_shards")


def look_for_weights(place: str) -> None:
    """UserError where there is nothing that ``model.weights`` may name."""
    try:
        place_of(place)
    except UserError as error:
        raise UserError(f"model.weights: {error}") from None
