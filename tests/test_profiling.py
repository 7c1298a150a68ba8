"""The parts of a step: all of them are marked, they are not counted twice, and the profiler writes its files."""

import json

import torch
from test_step import HP, make, views

from caco_scale.run import profiling
from caco_scale.run.profiling import PARTS, SKIPPED_STEPS, PartsClock, StepProfiler, parts_table
from caco_scale.training.step import train_step


def test_every_part_of_a_step_is_measured_once_and_parts_do_not_overlap():
    step = make()
    with PartsClock("cpu") as clock:
        for _ in range(2):
            train_step(*step, [views(slice(None))], HP)
    found = clock.seconds()
    assert set(found) == {*PARTS, "other", "total"}
    in_a_step = set(PARTS) - {"data", "augmentation"}  # those are the trainer's
    assert {name for name in PARTS if found[name] > 0} == in_a_step
    assert sum(found[name] for name in (*PARTS, "other")) <= found["total"] * 1.001
    train_step(*step, [views(slice(None))], HP)  # nobody measures: nothing is added
    assert clock.seconds() == found


def test_the_profiler_writes_a_trace_and_a_table_of_the_steps_it_was_asked_for(tmp_path):
    step, notes = make(), []
    profiler = StepProfiler(tmp_path / "profile", 2, torch.device("cpu"), rank=1, note=notes.append)
    for number in range(1, SKIPPED_STEPS + 4):
        profiler.before_step()
        assert (profiling._clock is not None) == (SKIPPED_STEPS < number <= SKIPPED_STEPS + 2)
        train_step(*step, [views(slice(None))], HP)
        profiler.after_step()
    names = {
        event["name"]
        for event in json.loads((tmp_path / "profile/trace.rank1.json").read_text())["traceEvents"]
    }
    assert {f"step: {name}" for name in ("query", "key", "bank", "backward", "optimizer", "ema")} <= names
    text = (tmp_path / "profile/parts.rank1.txt").read_text()
    assert notes == [f"{text}trace and table: {tmp_path / 'profile'}"]
    assert [line.split("  ")[0] for line in text.splitlines()][1:-3] == list(PARTS)


def test_a_run_that_ends_before_writes_what_was_measured_and_one_that_is_not_asked_writes_nothing(tmp_path):
    for num_steps, written in ((5, True), (0, False)):
        profiler = StepProfiler(tmp_path / f"{num_steps}", num_steps, torch.device("cpu"), rank=0)
        for _ in range(SKIPPED_STEPS + 1):
            profiler.before_step()
            profiler.after_step()
        profiler.close()
        assert (tmp_path / f"{num_steps}" / "parts.rank0.txt").exists() == written
        assert profiling._clock is None


def test_the_table_says_milliseconds_and_shares():
    seconds = {**dict.fromkeys(PARTS, 0.0), "bank": 0.5, "other": 0.5, "total": 1.0}
    lines = parts_table(seconds, 10, exchange_seconds=0.2).splitlines()
    assert "bank                   50.00    50.0%" in lines
    assert lines[-1].split()[:2] == ["communication", "20.00"]
