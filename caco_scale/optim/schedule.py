"""Every number that changes with the step, as pure functions of the step (no torch, no state).

One step counter from the first update. Two phases: the bank warm-up, which trains MoCo-style while keys fill
the bank, and the main schedule with a clock of its own, t = step - warmup_steps.

Legend: N global batch, K bank rows, S steps per epoch, W learning-rate warm-up steps, T main steps.
"""

import math
from dataclasses import dataclass

from caco_scale.flags.choices import BANK_RULES, LEARNING_RULES, BankRule


@dataclass(frozen=True)
class Schedule:
    """What the schedules are made of: plain values, the lengths in epochs of the data."""

    global_batch_size: int  # N, images per optimizer step over all ranks
    steps_per_epoch: int  # S = floor(images of the data set / N)
    epochs: int  # of the main schedule; the bank warm-up comes before it
    base_lr: float  # of the encoder, per 256 images
    lr_warmup_epochs: float  # linear warm-up of both learning rates in the main schedule
    bank_size: int  # K
    bank_rule: BankRule
    bank_lr: float  # absolute, constant after the same warm-up
    bank_warmup_epochs: int  # 0: ceil(K / N) steps for caco and nearest, none for the other rules
    bank_warmup_ramp_steps: int  # linear warm-up of base_lr within the bank warm-up; 0: full at once
    temperature: float  # of the encoder's loss
    bank_temperature: float
    key_momentum: float  # initial value; rises to 1 over the main schedule
    warmup_temperature: float = 0.2  # of the bank warm-up's loss
    final_lr_fraction: float = 0.01  # of the peak, at the end of the cosine

    def __post_init__(self):
        assert self.bank_rule in BANK_RULES, self.bank_rule
        assert self.steps_per_epoch > 0, self

    @property
    def peak_lr(self) -> float:
        """The encoder's absolute learning rate after warm-up: base_lr * N / 256."""
        return self.base_lr * self.global_batch_size / 256

    @property
    def warmup_steps(self) -> int:
        """Steps of the bank warm-up: enough to fill the bank, or the epochs asked for if those are more."""
        if self.bank_rule not in ("caco", "nearest") and self.bank_warmup_epochs == 0:
            return 0
        steps_to_fill = math.ceil(self.bank_size / self.global_batch_size)
        return max(steps_to_fill, self.bank_warmup_epochs * self.steps_per_epoch)

    @property
    def main_steps(self) -> int:
        return self.epochs * self.steps_per_epoch

    @property
    def total_steps(self) -> int:
        return self.warmup_steps + self.main_steps


@dataclass(frozen=True)
class HyperParameters:
    """The numbers of one step. ``is_switch``: the first main step after a bank warm-up; before it runs, key
    parameters <- query parameters and the bank's velocity <- 0."""

    step: int
    rule: BankRule
    temperature: float
    bank_temperature: float
    lr: float
    bank_lr: float  # 0 while bank rows are a queue of keys
    key_momentum: float  # of the moving average that ends this step
    in_warmup: bool
    is_switch: bool


def hyper_parameters(schedule: Schedule, step: int) -> HyperParameters:
    """The hyper-parameters of ``step``, counted from the first update, bank warm-up included."""
    assert 0 <= step < schedule.total_steps, (step, schedule.total_steps)
    if step < schedule.warmup_steps:
        return _bank_warmup(schedule, step)
    t = step - schedule.warmup_steps
    lr_warmup_steps = round(schedule.lr_warmup_epochs * schedule.steps_per_epoch)
    warmup_factor = linear_warmup(t, lr_warmup_steps)
    decay_factor = cosine_decay(t - lr_warmup_steps, schedule.main_steps - lr_warmup_steps)
    final = schedule.final_lr_fraction
    return HyperParameters(
        step=step,
        rule=schedule.bank_rule,
        temperature=schedule.temperature,
        bank_temperature=schedule.bank_temperature,
        lr=schedule.peak_lr * warmup_factor * (final + (1 - final) * decay_factor),
        bank_lr=schedule.bank_lr * warmup_factor if schedule.bank_rule in LEARNING_RULES else 0.0,
        # The authors move the key encoder at the start of step t with m(t), we at the end of the step before:
        # the average that ends step t carries m(t + 1). Theirs at t = 0 is empty: key = query there.
        key_momentum=1 - (1 - schedule.key_momentum) * cosine_decay(t + 1, schedule.main_steps),
        in_warmup=False,
        is_switch=t == 0 and schedule.warmup_steps > 0,
    )


def _bank_warmup(schedule, step):
    return HyperParameters(
        step=step,
        rule="moco",
        temperature=schedule.warmup_temperature,
        bank_temperature=schedule.warmup_temperature,
        lr=schedule.peak_lr * linear_warmup(step, schedule.bank_warmup_ramp_steps),
        bank_lr=0.0,
        key_momentum=schedule.key_momentum,
        in_warmup=True,
        is_switch=False,
    )


def linear_warmup(t: int, num_steps: int) -> float:
    """(t + 1) / num_steps up to 1: the first step already moves."""
    return min(1.0, (t + 1) / num_steps) if num_steps > 0 else 1.0


def cosine_decay(t: int, num_steps: int) -> float:
    """From 1 at t <= 0 down to 0 at t = num_steps along half a cosine."""
    return 0.5 * (1 + math.cos(math.pi * t / num_steps)) if t > 0 else 1.0
