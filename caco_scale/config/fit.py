"""Values that follow the number of training images: the rules for fields that are ``auto``. Pure functions.

The rules are provisional: guesses from published recipes of other sets and from first looks at 10,000 images
(``tests/benchmarks/STUDIES.md``), not measured as a whole. Each stands alone below, with its reason as a run prints it.
A value that is given, by a recipe or a flag, wins; the rules after it go by that value.

Legend: n training images, N global batch, K bank rows.
"""

import math
from collections.abc import Callable

from caco_scale.config.fields import Config
from caco_scale.config.values import check, flatten, replace
from caco_scale.flags.rules import AUTO_WORD


def power_of_two(most: float, least: int, highest: int) -> int:
    """The largest power of two up to ``most``, but within ``least`` and ``highest``."""
    return min(highest, max(least, 2 ** int(math.log2(max(most, 1)))))


def batch_size(n: int, _: Config) -> tuple[int, str]:
    """Small sets need steps more than they need large batches; CIFAR-10's 50,000 are usual with 512."""
    least = power_of_two(n / 10, 8, 32)  # below 320 images a tenth of them, or an epoch would have few steps
    return power_of_two(n / 64, least, 1024), "a power of two that leaves 64 steps an epoch, 32 to 1,024" + (
        "; of few images a tenth" if least < 32 else ""
    )


def bank_size(n: int, _: Config) -> tuple[int, str]:
    """1,024 rows were better than 16,384 for 10,000 images; the paper's 65,536 are a twentieth of ImageNet."""
    least = power_of_two(n, 1, 256)  # never more rows than images
    return power_of_two(n / 8, least, 65536), "an eighth of the images, a power of two, 256 to 65,536" + (
        "; of few images not more than those" if least < 256 else ""
    )


def epochs(n: int, _: Config) -> tuple[int, str]:
    """CIFAR-10 is usual with 200 to 800 epochs; ImageNet with 200."""
    return min(800, max(200, round(10**7 / n / 10) * 10)), "10 million images seen, 200 to 800 epochs"


def lr_warmup_epochs(_: int, config: Config) -> tuple[float, str]:
    return min(10, config.optim.epochs / 20), "a twentieth of optim.epochs, at most 10"


def bank_warmup_epochs(_: int, config: Config) -> tuple[int, str]:
    """Five of twenty in the demo, where it decides; a queue of keys, or no bank, needs none."""
    if config.bank.rule not in ("caco", "adco", "nearest"):
        return 0, f"bank.rule {config.bank.rule} needs none"
    e = config.optim.epochs
    return max(
        round(e / 20), min(5, math.ceil(e / 4))
    ), "a twentieth of optim.epochs, at least 5 or a quarter"


def bank_warmup_ramp(n: int, config: Config) -> tuple[int, str]:
    batch = config.data.global_batch_size
    steps = max(config.bank.warmup_epochs * (n // batch), math.ceil(config.bank.size / batch))
    return min(500, steps // 2), "half of the bank warm-up's steps, at most 500"


RULES: dict[str, Callable[[int, Config], tuple[float, str]]] = {  # a rule may ask for what stands before it
    "data.global_batch_size": batch_size,
    "bank.size": bank_size,
    "optim.epochs": epochs,
    "optim.warmup_epochs": lr_warmup_epochs,
    "bank.warmup_epochs": bank_warmup_epochs,
    "bank.warmup_ramp_steps": bank_warmup_ramp,
}


MEASURED = ("views.stats", "views.mean", "views.std")  # what views.stats measure settles


def auto_fields(config: Config) -> list[str]:
    """The fields that a look at the set settles: those that are ``auto``, by their rules, and what is to be measured.

    ``data.workers`` is none of them: it follows the machine.
    """
    return _by_rule(config) + [*MEASURED] * (config.views.stats == "measure")


def _by_rule(config):
    flat = flatten(config)
    return [name for name in RULES if flat[name] == AUTO_WORD]


def fit(config: Config, num_images: int) -> tuple[Config, list[str]]:
    """A config with the ``auto`` of every rule settled for so many images, and a line for each: value and rule.

    Raises:
        UserError: what the rules give does not go with what is given.
    """
    lines = []
    for name in _by_rule(config):
        value, rule = RULES[name](num_images, config)
        config = replace(config, **{name.replace(".", "__"): value})
        lines.append(f"{name} {value:,g} for {num_images:,} images: {rule}")
    check(config)
    return config, lines
