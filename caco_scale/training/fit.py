"""A configuration and its set of images: values that follow the set, and what of a recipe does not fit it."""

import math
from collections.abc import Callable
from pathlib import Path

from caco_scale import config as configuration
from caco_scale.checkpoint.folder import read_values
from caco_scale.checkpoint.resume import goes_on_from
from caco_scale.config import Config
from caco_scale.config.fit import MEASURED, auto_fields, bank_size, batch_size, fit
from caco_scale.data.channel_stats import channel_stats
from caco_scale.data.listed_files import Listings
from caco_scale.data.order import Order
from caco_scale.data.store import is_listed
from caco_scale.data.workers import bearable_workers, cores_here
from caco_scale.distributed.collectives import from_rank_0, rank
from caco_scale.flags.rules import AUTO
from caco_scale.training.assemble import build_schedule, open_training, open_validation
from caco_scale.training.places import mixed

LISTINGS = "listings"  # in a run's directory
FEWEST_STEPS = 10  # of an epoch, and of a learning rate's warm-up
KEY_TIMES = 3  # averaging times of the key encoder that a training must have
MOST_WORKERS = 16  # that data.workers auto gives a process


def fit_to_set(config: Config, listings: Listings | None = None) -> tuple[Config, list[str]]:
    """The config with every ``auto`` settled, and a line for each. Collective: rank 0 looks, all get the same.

    A run that goes on keeps the values of its checkpoint, whatever the rules or the set say by now; but for
    ``data.workers``, which each process settles by its own machine.

    Raises:
        UserError: on every rank; there is no such set.
    """
    config, lines = _settle_workers(config)
    fields = auto_fields(config)
    if not fields:
        return config, lines
    settled, more = from_rank_0(lambda: _settle(config, fields, listings))
    config = configuration.replace(config, **{n.replace(".", "__"): v for n, v in settled.items()})
    return config, lines + more


def _settle_workers(config):
    if config.data.workers != AUTO:
        return config, []
    workers, (cores, processes) = min(bearable_workers(), MOST_WORKERS), cores_here()
    line = (
        f"data.workers {workers} for {cores} core(s) and {processes} process(es) here: a process's share of the cores "
        f"but one, 1 to {MOST_WORKERS}"
    )
    return configuration.replace(config, data__workers=workers), [line]


def _settle(config, fields, listings):
    """({field: value}, lines) by the checkpoint that the run would go on from, else by the rules."""
    path = goes_on_from(config)
    if path:
        saved = configuration.flatten(configuration.from_dict(read_values(path)["config"], f"{path} config"))
        told = [n for n in fields if n != "views.stats"]
        return {n: saved[n] for n in fields}, [f"{n} {_in_words(saved[n])}, as in {path}" for n in told]
    store = open_training(configuration.replace(config, data__cache_dir="none"), listings=listings)
    fitted, lines = fit(config, store.manifest.num_samples)
    if set(MEASURED) <= set(fields):
        fitted, line = _measure(fitted, store)
        lines.append(line)
    flat = configuration.flatten(fitted)
    return {name: flat[name] for name in fields}, lines


def _measure(config, store):
    """The config with the mean and standard deviation of its images, as given ones, and a line."""
    views = config.views
    mean, std, images = channel_stats(
        store, views.size, resize=config.eval.resize, seed=config.run.seed, workers=config.data.workers
    )
    line = (
        f"views.mean {_in_words(mean)}, views.std {_in_words(std)}: measured on {images:,} of "
        f"{store.manifest.num_samples:,} training images"
    )
    return configuration.replace(config, views__mean=mean, views__std=std, views__stats="given"), line


def _in_words(value):
    return " ".join(map(str, value)) if isinstance(value, tuple) else f"{value:,g}"


def listings_of(config: Config, say: Callable[[str], object]) -> Listings:
    """Where a run keeps which files its sets are of: its directory; those of the run that it goes on from hold."""

    def before():
        path = None if config.data.relist else goes_on_from(config)
        return path.parent.parent / LISTINGS if path else None

    return Listings(Path(config.run.dir, LISTINGS), rank() == 0, before, say)


def list_sets(config: Config, listings: Listings) -> None:
    """List the files of a run's sets that are no shard sets, or compare them with the listing. Collective.

    Raises:
        UserError: on every rank: no images there, or others than were listed.
    """

    def look():
        addresses = [address for address, _ in mixed(config)] or [config.data.shards]
        if any(map(is_listed, addresses)):
            open_training(config, listings=listings)
        if is_listed(config.data.val_shards):
            open_validation(config, listings=listings)

    from_rank_0(look)


def misfits(config: Config, order: Order, world_size: int) -> list[str]:
    """What of a recipe does not fit the number of images: a line each, with the numbers and a flag that helps."""
    n, batch, steps = order.num_samples, order.global_batch_size, order.steps_per_epoch
    schedule, rule = build_schedule(config, steps), config.bank.rule
    fill, main, rows = math.ceil(config.bank.size / batch), schedule.main_steps, bank_size(n, config)[0]
    found = []
    if batch > n / FEWEST_STEPS:
        less = max(1, batch_size(n, config)[0] // world_size) * world_size
        fix = f"give --data.global_batch_size {less}" if less < batch else "it needs more images"
        found.append(
            f"data.global_batch_size {batch:,} is more than a tenth of the {n:,} images: an epoch has {steps} step(s) "
            f"and leaves {n - steps * batch:,} images out; {fix}"
        )
    if config.bank.size > n and rule != "inbatch":
        found.append(
            f"bank.size {config.bank.size:,} is more than the {n:,} images: rows outnumber what they stand for; "
            f"give --bank.size {rows}"
        )
    if schedule.warmup_steps > main:
        fix = f"--bank.warmup_epochs {max(1, config.optim.epochs // 4)}"
        if schedule.warmup_steps == fill:
            fix = (
                f"--bank.size {rows}"
                if rows < config.bank.size
                else f"--optim.epochs {4 * fill // steps + 1}"
            )
        found.append(
            f"the bank warm-up takes {schedule.warmup_steps:,} steps and the training after it {main:,}: give {fix}"
        )
    found += _short_schedule(config, steps, main)
    return found


def _short_schedule(config, steps, main):
    """Lines on a schedule of too few steps."""
    warmup, epochs, found = config.optim.warmup_epochs, config.optim.epochs, []
    if warmup > epochs / 2:
        found.append(
            f"optim.warmup_epochs {warmup:g} is more than half of optim.epochs {epochs}: give --optim.warmup_epochs "
            f"{epochs / 20:g}"
        )
    wanted = math.ceil(FEWEST_STEPS / steps)
    if 0 < warmup * steps < FEWEST_STEPS and wanted <= epochs / 2:
        found.append(
            f"the learning rate rises to its peak within {warmup * steps:g} step(s) (optim.warmup_epochs {warmup:g} of "
            f"{steps} step(s)): give --optim.warmup_epochs {wanted}"
        )
    slow = 1 / max(1 - config.ema.momentum, 1e-9)
    if config.ema.momentum and main < KEY_TIMES * slow:
        found.append(
            f"the training has {main:,} steps and the key encoder averages over {slow:,.0f} (ema.momentum "
            f"{config.ema.momentum:g}): give --optim.epochs {math.ceil(2 * KEY_TIMES * slow / steps)}"
        )
    return found


def few_steps_for_lanes(order: Order) -> str | None:
    """A line where an epoch has fewer steps than lanes, which matters little."""
    steps, batch = order.steps_per_epoch, order.global_batch_size
    if order.lanes <= steps:
        return None
    lanes = max(d for d in range(1, min(steps, batch) + 1) if batch % d == 0)
    return (
        f"data.lanes {order.lanes} are more than the {steps} steps of an epoch: a batch has hardly two neighbours of a "
        "shard. In a set in random order, as `build` makes and a folder is read, that changes nothing; for another one "
        f"give --data.lanes {lanes}"
    )
