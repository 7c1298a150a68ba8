"""Schedules: golden values by hand, both clocks, the switch, the order of the key encoder's average."""

import dataclasses
import itertools
import math

import pytest

from caco_scale.optim.schedule import Schedule, hyper_parameters

# 1000 images in batches of 96: S = 10. The bank of 1024 rows fills in 11 steps, 2 epochs are 20.
BASE = Schedule(
    global_batch_size=96,
    steps_per_epoch=10,
    epochs=8,
    base_lr=0.32,
    lr_warmup_epochs=3,
    bank_size=1024,
    bank_rule="caco",
    bank_lr=3.0,
    bank_warmup_epochs=2,
    bank_warmup_ramp_steps=4,
    temperature=0.08,
    bank_temperature=0.07,
    key_momentum=0.99,
)
PEAK = 0.12  # 0.32 * 96 / 256


def replace(**changes):
    return dataclasses.replace(BASE, **changes)


@pytest.mark.parametrize(
    ("changes", "warmup_steps"),
    [
        ({}, 20),
        ({"bank_warmup_epochs": 0}, 11),
        ({"bank_warmup_epochs": 1}, 11),
        ({"bank_size": 960, "bank_warmup_epochs": 0}, 10),
        ({"bank_size": 961, "bank_warmup_epochs": 0}, 11),
        ({"bank_rule": "moco", "bank_warmup_epochs": 0}, 0),
        ({"bank_rule": "adco", "bank_warmup_epochs": 0}, 0),
        ({"bank_rule": "adco", "bank_warmup_epochs": 1}, 11),
        ({"bank_rule": "moco", "bank_warmup_epochs": 2}, 20),
        ({"bank_rule": "nearest", "bank_warmup_epochs": 0}, 11),
        ({"bank_rule": "nnclr", "bank_warmup_epochs": 0}, 0),
        ({"bank_rule": "inbatch", "bank_warmup_epochs": 0}, 0),
    ],
)
def test_length_of_the_bank_warmup(changes, warmup_steps):
    schedule = replace(**changes)
    assert schedule.warmup_steps == warmup_steps
    assert schedule.main_steps == 80
    assert schedule.total_steps == warmup_steps + 80


def test_bank_warmup_has_a_clock_of_its_own():
    steps = [hyper_parameters(BASE, step) for step in range(20)]
    assert [hp.lr for hp in steps[:6]] == pytest.approx(
        [0.25 * PEAK, 0.5 * PEAK, 0.75 * PEAK, PEAK, PEAK, PEAK]
    )
    for step, hp in enumerate(steps):
        assert (hp.step, hp.rule, hp.in_warmup, hp.is_switch) == (step, "moco", True, False)
        assert (hp.temperature, hp.bank_temperature, hp.bank_lr, hp.key_momentum) == (0.2, 0.2, 0.0, 0.99)
    assert steps[-1].lr == pytest.approx(PEAK)


def test_bank_warmup_without_a_ramp_starts_at_full_rate():
    assert hyper_parameters(replace(bank_warmup_ramp_steps=0), 0).lr == pytest.approx(PEAK)


def test_golden_values_of_the_main_schedule():
    switch = hyper_parameters(BASE, 20)
    assert (switch.rule, switch.temperature, switch.bank_temperature) == ("caco", 0.08, 0.07)
    assert (switch.is_switch, switch.in_warmup) == (True, False)
    expected = {  # t: (lr / peak, bank lr); W = 30, cosine over the 50 steps after it
        0: (1 / 30, 0.1),
        14: (0.5, 1.5),
        29: (1.0, 3.0),
        30: (1.0, 3.0),
        55: (0.01 + 0.99 / 2, 3.0),
        79: (0.01 + 0.99 * (1 + math.cos(math.pi * 49 / 50)) / 2, 3.0),
    }
    for t, (lr, bank_lr) in expected.items():
        hp = hyper_parameters(BASE, 20 + t)
        assert hp.lr == pytest.approx(lr * PEAK, rel=1e-14)
        assert hp.bank_lr == pytest.approx(bank_lr, rel=1e-14)
        assert (hp.is_switch, hp.in_warmup) == (t == 0, False)
    assert hyper_parameters(BASE, 99).lr == pytest.approx(0.0109767 * PEAK, rel=1e-5)


def test_key_momentum_rises_to_one_by_a_cosine():
    for t, expected in {
        0: 1 - 0.01 * (1 + math.cos(math.pi / 80)) / 2,
        19: 0.9914644660940673,
        39: 0.995,
    }.items():
        assert hyper_parameters(BASE, 20 + t).key_momentum == pytest.approx(expected, rel=1e-14)
    assert hyper_parameters(BASE, 99).key_momentum == 1.0
    momenta = [hyper_parameters(BASE, step).key_momentum for step in range(19, 100)]
    assert momenta[0] == 0.99
    assert all(a < b for a, b in itertools.pairwise(momenta))


def test_lr_warmup_edges():
    at_once = replace(lr_warmup_epochs=0)
    assert hyper_parameters(at_once, 20).lr == pytest.approx(PEAK)
    assert hyper_parameters(at_once, 20).bank_lr == 3.0
    fraction = replace(lr_warmup_epochs=0.25)  # 2.5 steps: Python rounds to 2
    assert [hyper_parameters(fraction, 20 + t).bank_lr for t in range(3)] == pytest.approx([1.5, 3.0, 3.0])
    longer = replace(lr_warmup_epochs=16)  # twice the schedule: rises to half the peak, no cosine
    assert hyper_parameters(longer, 99).lr == pytest.approx(PEAK / 2)


@pytest.mark.parametrize(
    ("rule", "bank_lr"), [("adco", 0.1), ("moco", 0.0), ("nnclr", 0.0), ("inbatch", 0.0)]
)
def test_baselines_start_with_the_main_schedule(rule, bank_lr):
    schedule = replace(bank_rule=rule, bank_warmup_epochs=0)
    first = hyper_parameters(schedule, 0)
    assert (first.rule, first.in_warmup, first.is_switch) == (rule, False, False)
    assert (first.temperature, first.lr) == (0.08, pytest.approx(PEAK / 30))
    assert first.bank_lr == pytest.approx(bank_lr)
    assert hyper_parameters(schedule, 79).key_momentum == 1.0


def test_baselines_with_a_bank_warmup_switch_too():
    schedule = replace(bank_rule="adco")
    assert [hyper_parameters(schedule, step).rule for step in (19, 20)] == ["moco", "adco"]
    switches = [step for step in range(schedule.total_steps) if hyper_parameters(schedule, step).is_switch]
    assert switches == [20]


def test_published_recipe_has_the_papers_rates():
    schedule = Schedule(
        global_batch_size=4096,
        steps_per_epoch=312,
        epochs=200,
        base_lr=0.3,
        lr_warmup_epochs=10,
        bank_size=65_536,
        bank_rule="caco",
        bank_lr=3.0,
        bank_warmup_epochs=0,
        bank_warmup_ramp_steps=0,
        temperature=0.08,
        bank_temperature=0.08,
        key_momentum=0.99,
    )
    assert (schedule.warmup_steps, schedule.total_steps) == (16, 16 + 62_400)
    peak = hyper_parameters(schedule, 16 + 3120)
    assert (peak.lr, peak.bank_lr) == (pytest.approx(4.8), 3.0)
    assert hyper_parameters(schedule, 16 + 62_399).lr == pytest.approx(0.048, rel=1e-4)


@pytest.mark.parametrize("changes", [{}, {"bank_rule": "moco", "bank_warmup_epochs": 0}])
def test_average_at_the_end_of_a_step_gives_the_keys_of_one_at_the_start(changes):
    """The authors average at the start of a step, with its momentum; we at the end of the step before."""
    schedule = replace(**changes)
    warmup = schedule.warmup_steps
    ours = authors = query = 1.0
    for step in range(schedule.total_steps):
        hp = hyper_parameters(schedule, step)
        if hp.is_switch:
            ours = query
        t = step - warmup
        start = 0.99
        momentum = start if t < 0 else 1 - (1 - start) * (math.cos(math.pi * t / 80) + 1) / 2
        if t == 0:
            authors = query
        authors = momentum * authors + (1 - momentum) * query
        assert ours == pytest.approx(authors, rel=1e-12), step  # the keys of this step's forward
        query += math.sin(7 * step) + 0.1  # the encoder's step
        ours = hp.key_momentum * ours + (1 - hp.key_momentum) * query
    assert ours == pytest.approx(authors, rel=1e-12)  # the last average is empty: momentum 1


def test_steps_outside_the_schedule_and_epochs_without_one_are_refused():
    for step in (-1, 100):
        with pytest.raises(AssertionError):
            hyper_parameters(BASE, step)
    with pytest.raises(AssertionError):
        replace(steps_per_epoch=0)
    with pytest.raises(AssertionError):
        replace(bank_rule="dino")
