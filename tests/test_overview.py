"""``caco runs``: a line for every run of a folder, of which little is read."""

import builtins
import csv
import fcntl
import functools
import io
import json
import os
import subprocess
import sys

import pytest
from launch import environment

from caco_scale import config as configuration
from caco_scale.errors import UserError
from caco_scale.report.overview import Row, find_runs, in_order, main, read_row, to_page
from caco_scale.run import files
from caco_scale.run.files import json_lines_backwards, last_json_line

KNN_EVERY, PER_EPOCH = 100, 20


def lines_of(steps, knn, every=10, start=0):
    """Lines of metrics: a loss every 10 steps, a kNN (by ``knn``: step -> percent) every 100."""
    for step in range(start, steps + 1, every):
        if step:
            yield {
                "step": step,
                "epoch": step / PER_EPOCH,
                "loss": 5.0,
                "images_per_second": 100.0 + step % 3,
            }
        if step % KNN_EVERY == 0:
            yield {"step": step, "epoch": step / PER_EPOCH, "knn_top1": knn(step)}


@functools.cache
def config_text(**changes):
    config = configuration.replace(configuration.load_recipe("demo"), optim__epochs=50, **changes)
    return configuration.to_yaml(config)


def make_run(
    folder, steps=1000, knn=lambda step: 20 + step / 50, saved=900, marker="DONE", lines=None, **changes
):
    """A run's directory as training leaves it, as far as the overview looks."""
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "config.yaml").write_text(config_text(**changes))
    records = list(lines_of(steps, knn)) if lines is None else lines
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    if saved:
        checkpoint = folder / f"checkpoints/step_{saved:08d}"
        checkpoint.mkdir()
        known = [["pixels", 30.0], *([step, knn(step)] for step in range(0, saved, KNN_EVERY))]
        values = {"step": saved, "end": 1100, "epoch": saved / PER_EPOCH, "knn": known}
        (checkpoint / "values.json").write_text(json.dumps(values))
    (folder / ".lock").touch()
    if marker:
        (folder / marker).write_text("{}")
    return folder


def test_a_line_says_how_far_and_how_good_a_run_is(tmp_path):
    knn = {0: 40.0, 100: 20.0, 200: 70.0, 300: 60.0}
    found = read_row(make_run(tmp_path / "a", 350, knn.get, saved=300, bank__rule="moco"), "a")
    assert (found.state, found.recipe, found.rule, found.arch) == ("finished", "demo", "moco", "tiny")
    assert (found.step, found.epoch, found.epochs) == (350, 17.5, 55.0)
    assert (found.best_knn, found.best_step, found.last_knn, found.last_step) == (70.0, 200, 60.0, 300)
    assert (found.untrained_knn, found.images_per_second) == (40.0, 101.0)
    whole = read_row(make_run(tmp_path / "b", 350, knn.get, saved=None), "b")  # all from its metrics
    warmup = configuration.load_recipe("demo").bank.warmup_epochs
    assert whole == Row(
        **{**vars(found), "run": "b", "rule": "caco", "epochs": 50 + warmup, "updated": whole.updated}
    )


def test_states(tmp_path):
    for marker, state in (("DONE", "finished"), ("INTERRUPTED", "stopped"), (None, "failed")):
        run = make_run(tmp_path / state, marker=marker)
        assert read_row(run, "x").state == state
        with open(run / ".lock", "a+b") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            assert read_row(run, "x").state == "running"


def test_a_damaged_run_is_a_line_with_gaps(tmp_path):
    run = make_run(tmp_path / "a", marker=None)
    (run / "config.yaml").write_bytes(b"\xff{")
    (run / "metrics.jsonl").write_text('{"step": 5, "loss"\n[1]\n{"loss": 1}\n{"step": "x"}\n')
    (run / "checkpoints/step_00000900/values.json").write_text("[")
    assert read_row(run, "a") == Row("a", "failed", updated=read_row(run, "a").updated)
    (run / "metrics.jsonl").unlink()
    assert read_row(run, "a") == Row("a", "failed")


def test_of_200_long_runs_only_the_ends_are_read(tmp_path, monkeypatch, capsys):
    folder, long = tmp_path / "runs", [json.dumps(r) + "\n" for r in lines_of(100_000, lambda step: 50.0)]
    for number in range(200):
        run = make_run(folder / f"study/{number:03d}", lines=[], saved=99_500 + number)
        if number:
            os.link(folder / "study/000/metrics.jsonl", run / "linked")
            (run / "linked").replace(run / "metrics.jsonl")
        else:
            (run / "metrics.jsonl").write_text("".join(long))
    opened, read = [], []
    real, ordinary = builtins.open, files.open_ordinary

    class Counting(io.FileIO):
        def read(self, size=-1):
            found = super().read(size)
            read.append(len(found))
            return found

    monkeypatch.setattr(files, "open_ordinary", lambda path, mode: Counting(path, "rb"))
    monkeypatch.setattr(builtins, "open", lambda *a, **k: opened.append(str(a[0])) or real(*a, **k))
    assert ordinary is not files.open_ordinary
    main([str(folder), "--sort", "last"])
    assert len(read) == 200  # one block each
    assert sum(read) <= 200 * 65536 < 200 * sum(map(len, long)) / 10
    assert sum(path.endswith((".json", ".jsonl", ".yaml")) for path in opened) <= 2 * 200
    out = capsys.readouterr().out
    assert "200 runs in" in out
    assert out.count("study/") == 200


def test_neither_torch_nor_numpy_is_loaded(tmp_path):
    make_run(tmp_path / "runs/a")
    program = (
        "import sys; from caco_scale.__main__ import dispatch; dispatch(sys.argv[1:]); "
        "print([name for name in ('torch', 'numpy', 'matplotlib') if name in sys.modules])"
    )
    words = [
        sys.executable,
        "-c",
        program,
        "runs",
        str(tmp_path / "runs"),
        "--page",
        str(tmp_path / "p.html"),
    ]
    done = subprocess.run(words, env=environment(), capture_output=True, text=True, check=False)
    assert done.stdout.splitlines()[-1] == "[]", done.stdout + done.stderr


def test_sorting():
    rows = [
        Row("b", "failed", best_knn=50.0),
        Row("c", "running", best_knn=None),
        Row("a", "finished", best_knn=70.0, recipe="demo"),
    ]
    names = lambda by: "".join(row.run for row in in_order(rows, by))
    assert [names(by) for by in ("run", "state", "best", "recipe", "updated")] == [
        "abc",
        "cab",
        "abc",
        "abc",
        "abc",
    ]
    assert "".join(row.run for row in in_order(rows[:2], "best")) == "bc"


def test_csv_and_page(tmp_path, capsys):
    hostile = "<i>&"
    make_run(tmp_path / f"runs/x/{hostile}", steps=250, saved=None)
    make_run(tmp_path / "runs/y", marker="INTERRUPTED")
    make_run(tmp_path / "runs/y/inside")  # within a run nothing is looked for
    main([str(tmp_path / "runs"), "--csv", str(tmp_path / "t.csv"), "--page", str(tmp_path / "p.html")])
    out = capsys.readouterr().out
    assert f"wrote {tmp_path}/t.csv" in out
    rows = list(csv.DictReader(io.StringIO((tmp_path / "t.csv").read_text())))
    assert [(row["run"], row["state"], row["best_knn"]) for row in rows] == [
        (f"x/{hostile}", "finished", "24.0"),
        ("y", "stopped", "40.0"),
    ]
    page = (tmp_path / "p.html").read_text()
    assert "x/&lt;i&gt;&amp;" in page
    assert hostile not in page.split("<main>")[1]
    assert "1 finished" in page
    assert "1 stopped" in page
    assert "http" not in page.split("<body>")[1]
    assert to_page([Row("a", "failed")], "t").decode().count("—") == 9


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: None, "does not exist: give a folder with runs in it"),
        (lambda p: p.write_text(""), "is a file"),
        (lambda p: p.mkdir(), "no run in"),
    ],
)
def test_mistakes(tmp_path, make, message):
    make(tmp_path / "r")
    with pytest.raises(UserError, match=message):
        find_runs(tmp_path / "r")


def test_lines_come_backwards_whole_whatever_the_blocks_are(tmp_path):
    path, records = tmp_path / "f.jsonl", [{"n": n, "text": "ä" * (n % 40)} for n in range(300)]
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records) + '{"cut": ')
    for block in (1, 7, 64, 10**6):
        assert list(json_lines_backwards(path, block)) == records[::-1]
    assert last_json_line(path) == records[-1]
    assert list(json_lines_backwards(tmp_path / "none")) == []
