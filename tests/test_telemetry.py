"""What a run says: figures, plain lines, the bar on a terminal, TensorBoard beside metrics.jsonl."""

import io
import math
import os
import pty
import shutil
import subprocess
import sys
import threading
import time
from contextlib import closing
from datetime import UTC, datetime, timedelta

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from caco_scale.errors import UserError
from caco_scale.run.directory import RunDirectory
from caco_scale.run.display import describe_figures
from caco_scale.run.files import read_json_lines
from caco_scale.run.meter import Meter, RemainingTime
from caco_scale.run.telemetry import Telemetry


class Clock:
    """Seconds that pass when told to."""

    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def telemetry_of(path, **changes):
    options = {"total_steps": 100, "steps_per_epoch": 32, "images_per_step": 128, "stream": io.StringIO()}
    return Telemetry(RunDirectory(path, is_main=True), **{**options, **changes})


def test_meter_counts_images_and_the_share_of_waiting():
    clock = Clock()
    meter = Meter(images_per_step=64, clock=clock)
    for _ in range(5):
        with meter.waiting():
            clock.now += 0.5
        clock.now += 1.5
        meter.step()
    with meter.paused():
        clock.now += 1000
    assert meter.read() == {"images_per_second": 32.0, "data_wait": 0.25}
    clock.now += 2
    meter.step()
    assert meter.read() == {"images_per_second": 32.0, "data_wait": 0.0}
    assert meter.read() == {"images_per_second": None, "data_wait": None}


def test_remaining_time_leaves_out_the_first_step():
    clock = Clock()
    left = RemainingTime(total_steps=50, clock=clock)
    clock.now += 300
    assert left.after(11) is None
    clock.now += 8
    assert left.after(15) == 70
    assert left.after(50) == 0


def test_every_record_is_handed_on_too(tmp_path):
    seen = []
    telemetry = telemetry_of(tmp_path, on_metrics=seen.append)
    telemetry.log(10, {"loss": torch.tensor(2.0)})
    telemetry.log_event(10, {"knn_top1": 50.0})
    telemetry.close()
    assert seen == list(read_json_lines(tmp_path / "metrics.jsonl"))
    assert [record["step"] for record in seen] == [10, 10]
    assert all(abs(datetime.now(UTC) - datetime.fromisoformat(r["time"])) < timedelta(hours=1) for r in seen)


def test_figures_in_words():
    figures = {
        "epoch": 12.3456,
        "epochs": 200.0,
        "loss": 7.123456,
        "images_per_second": 12345.6,
        "data_wait": 0.0123,
        "seconds_left": 3725.4,
        "knn_top1": 61.25,
        "knn_step": 1200,
    }
    assert describe_figures(figures) == [
        "epoch 12.35/200",
        "loss 7.1235",
        "12,346 images/s",
        "data wait 1.2%",
        "ETA 1:02:05",
        "kNN 61.25% of step 1,200",
    ]
    assert describe_figures({"knn_top1": 20.5, "knn_step": 0}) == ["kNN 20.50% before training"]
    assert describe_figures({**figures, "loss": None, "knn_top1": None, "seconds_left": None}) == [
        "epoch 12.35/200",
        "12,346 images/s",
        "data wait 1.2%",
    ]


def test_plain_lines_where_there_is_no_terminal(tmp_path):
    stream = io.StringIO()
    with closing(telemetry_of(tmp_path, stream=stream)) as telemetry:
        telemetry.note("2 processes")
        for step in range(1, 9):
            telemetry.progress(step)
        telemetry.log_event(8, {"knn_top1": 56.05})
        telemetry.log(8, {"loss": torch.tensor(5.25), "lr": 0.06})
        telemetry.warn("[bold]low[/bold]")
        telemetry.log(9, {"loss": math.nan})
        telemetry.summary("Finished", [("checkpoint", "runs/" + 150 * "x"), ("kNN [%]", 97.5)])
    lines = stream.getvalue().splitlines()
    assert lines[0] == "2 processes"
    assert lines[1].startswith("step 8/100  epoch 0.25/3.125  loss 5.2500  ")
    assert "images/s  data wait 0.0%  ETA 0:00:" in lines[1]
    assert lines[1].endswith("kNN 56.05% of step 8")
    assert lines[2] == "warning: [bold]low[/bold]"
    assert "loss nan" in lines[3]
    assert any("runs/" + 150 * "x" in line for line in lines)
    assert any("kNN [%]" in line for line in lines)
    assert "\x1b" not in stream.getvalue()


ON_A_TERMINAL = """
import sys
from contextlib import closing
from caco_scale.run.directory import RunDirectory
from caco_scale.run.telemetry import Telemetry
run = RunDirectory(sys.argv[1], is_main=True)
with closing(Telemetry(run, total_steps=40, steps_per_epoch=10, images_per_step=8)) as telemetry:
    telemetry.log_event(0, {"knn_top1": 56.05})
    for step in range(1, 31):
        telemetry.progress(step)
    telemetry.log(30, {"loss": 5.25})
    telemetry.note("a note [1]")
    telemetry.warn("a warning")
    telemetry.summary("Finished", [("steps", 30)])
    if len(sys.argv) > 2:
        raise SystemExit("stopped")
"""


@pytest.mark.parametrize("arguments", [[], ["fail"]])
def test_a_bar_on_a_terminal_which_gets_its_cursor_back(tmp_path, arguments):
    main, terminal = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "100", "LINES": "24"}
    process = subprocess.Popen(
        [sys.executable, "-c", ON_A_TERMINAL, str(tmp_path), *arguments],
        stdout=terminal,
        stderr=terminal,
        env=environment,
    )
    os.close(terminal)
    output = b""
    while True:
        try:
            output += os.read(main, 65536)
        except OSError:  # the terminal's other end is closed
            break
    os.close(main)
    assert process.wait() == len(arguments)
    text = output.decode()
    for words in (
        "30/40",
        "epoch 3.00/4",
        "loss 5.2500",
        "kNN 56.05%",
        "a note [1]",
        "warning: a warning",
        "Finished",
    ):
        assert words in text
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l")


def test_metrics_and_tensorboard_hold_the_same_scalars(tmp_path):
    with closing(telemetry_of(tmp_path)) as telemetry:
        telemetry.log_event(0, {"knn_top1": 50.0, "knn_seconds": 1.5})
        for step in range(1, 9):
            telemetry.progress(step)
            if step % 4 == 0:
                telemetry.log(step, {"loss": torch.tensor(1.0 / step), "bank_lr": math.nan, "rule": "caco"})
        telemetry.log_event(8, {"event": "corrupt_sample", "key": "000000.tar/1"})
    lines = list(read_json_lines(tmp_path / "metrics.jsonl"))
    assert [line["step"] for line in lines] == [0, 4, 8, 8]
    assert list(lines[1]) == [
        "step",
        "epoch",
        "loss",
        "bank_lr",
        "rule",
        "images_per_second",
        "data_wait",
        "time",
    ]
    assert lines[1]["epoch"] == 0.125
    assert lines[1]["bank_lr"] is None
    assert lines[1]["loss"] == 0.25

    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    expected = {}
    for line in lines:
        for name, value in line.items():
            if name != "step" and isinstance(value, (int, float)):
                expected.setdefault(name, []).append((line["step"], pytest.approx(value)))
    written = {name: [(e.step, e.value) for e in board.Scalars(name)] for name in board.Tags()["scalars"]}
    assert written == expected
    assert set(written) >= {"loss", "epoch", "knn_top1", "knn_seconds"}


def test_a_resumed_run_replaces_the_steps_after_its_checkpoint(tmp_path):
    with closing(telemetry_of(tmp_path)) as telemetry:
        for step in (10, 20, 30):
            telemetry.log(step, {"loss": float(step)})
    # TensorBoard reads its files by name: second, host, process, number there. In one second 10 comes before 9.
    time.sleep(1 - time.time() % 1)
    run = RunDirectory(tmp_path, is_main=True)
    run.start_attempt(world_size=1, resumed_step=20)
    options = {"total_steps": 100, "steps_per_epoch": 32, "images_per_step": 128, "stream": io.StringIO()}
    with closing(Telemetry(run, start_step=20, **options)) as telemetry:
        telemetry.log(25, {"loss": 25.0})
    assert [line["loss"] for line in read_json_lines(run.metrics)] == [10.0, 20.0, 25.0]
    board = EventAccumulator(str(run.tensorboard)).Reload()
    assert [event.value for event in board.Scalars("loss")] == [10.0, 20.0, 25.0]


def test_other_ranks_say_nothing(tmp_path):
    stream = io.StringIO()
    run = RunDirectory(tmp_path / "run", is_main=False)
    with closing(
        Telemetry(run, total_steps=4, steps_per_epoch=2, images_per_step=8, stream=stream)
    ) as telemetry:
        telemetry.progress(1)
        telemetry.log(1, {"loss": 1.0})
        telemetry.log_event(1, {"knn_top1": 1.0})
        telemetry.warn("no")
        telemetry.summary("no", [])
        telemetry.flush()
        assert telemetry.meter.read()["images_per_second"] > 0
    assert stream.getvalue() == ""
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("what", ["file", "pipe"])
def test_a_tensorboard_that_cannot_be_is_one_line(tmp_path, what):
    place = tmp_path / "tensorboard"
    place.write_text("") if what == "file" else os.mkfifo(place)
    with pytest.raises(UserError, match=r"cannot write .*/tensorboard: .+; free or fix that place"):
        telemetry_of(tmp_path)


def test_a_tensorboard_that_fails_later_is_one_line_without_a_traceback(tmp_path, capsys):
    before = threading.excepthook
    telemetry = telemetry_of(tmp_path)
    telemetry.flush()  # its thread has made its file, not in the middle of the removal
    shutil.rmtree(tmp_path / "tensorboard")
    (tmp_path / "tensorboard").write_text("")

    def log():
        for step in range(1, 4):
            telemetry.log_event(step, {"knn_top1": 1.0})
            telemetry.flush()

    with pytest.raises(UserError, match=r"cannot write .*/tensorboard"):
        log()
    telemetry.close()
    assert threading.excepthook == before
    assert "Traceback" not in capsys.readouterr().err
