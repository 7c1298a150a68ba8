"""The job's decisions, and job.py between programs that stand in for SLURM's."""

import ast
import importlib
import os
import signal
import stat
import subprocess
import sys
import time

import pytest
from launch import ROOT

PLACE = ROOT / "slurm"


@pytest.fixture(scope="module")
def decisions():
    sys.path.insert(0, str(PLACE))
    try:
        yield importlib.import_module("decisions")
    finally:
        sys.path.remove(str(PLACE))


def ledger(*events, chain="c"):
    """Lines of ``(event, step)``."""
    return [f"time\t{chain}\t7.0\t{event}\t{step}\tdetail\n" for event, step in events]


START, FAILED, STOPPED = ("start", 0), ("failed", 0), ("stopped", 0)
HISTORIES = {
    "nothing yet": ([], 0, (0, 0, 0, "none")),
    "one that trains": ([START], 0, (1, 1, 1, "start")),
    "one that failed": ([START, FAILED], 0, (1, 1, 1, "failed")),
    "a node was lost, twice": ([START, START], 0, (2, 2, 2, "start")),
    "it was asked": ([START, STOPPED, START, STOPPED], 0, (0, 2, 2, "stopped")),
    "told twice": ([START, ("terminated", 0), STOPPED], 0, (0, 1, 1, "stopped")),
    "bad nodes": ([START, ("bad-nodes", 0)], 0, (0, 1, 1, "bad-nodes")),
    "it failed, then stopped": ([START, FAILED, START, STOPPED], 0, (1, 2, 2, "stopped")),
    "a step since": ([START, FAILED, START, ("failed", 5)], 5, (0, 0, 2, "failed")),
    "the next failed there": ([START, ("failed", 5), ("start", 5), ("failed", 5)], 5, (1, 1, 2, "failed")),
    "a checkpoint is gone": ([("start", 5), ("failed", 5), START, FAILED], 0, (1, 1, 2, "failed")),
}


@pytest.mark.parametrize("name", HISTORIES)
def test_failures_in_a_row_are_counted_at_the_newest_checkpoint(decisions, name):
    events, newest, expected = HISTORIES[name]
    lines = [*ledger(START, FAILED, START, chain="another"), *ledger(*events), "half a li"]
    assert decisions.read_history(lines, "c", newest) == expected


def test_a_job_gives_up_at_the_first_limit_that_is_reached(decisions):
    history = decisions.History(failures=2, starts=4, all_starts=9, last_event="failed")
    assert decisions.why_give_up(history, 3, 5, 10) == ""
    assert decisions.why_give_up(history, 2, 5, 10) == "2 starts in a row failed"
    assert decisions.why_give_up(history, 3, 4, 10) == "4 starts in a row brought no step"
    assert decisions.why_give_up(history, 3, 5, 9) == "this is start 10, more than MAX_STARTS"


def test_one_failure_in_a_row_is_tried_again_in_place(decisions):
    worth = [decisions.is_worth_staying(decisions.History(failures=failures), 3) for failures in range(4)]
    assert worth == [True, True, False, False]
    assert [decisions.is_worth_staying(decisions.History(failures=1), most) for most in (1, 2)] == [
        False,
        True,
    ]


@pytest.mark.parametrize(
    ("exit_code", "asked", "has_saved", "taken_away", "how"),
    [
        (0, "", False, False, "failed"),
        (1, "", False, True, "failed"),
        (0, "USR1", False, False, "stopped"),  # there was nothing to save yet
        (1, "USR1", False, False, "failed"),  # its last save failed
        (137, "TERM", False, False, "stopped"),
        (1, "TERM", False, True, "stopped"),
        (1, "", True, False, "stopped"),  # another told the trainer
    ],
)
def test_how_a_start_has_ended(decisions, exit_code, asked, has_saved, taken_away, how):
    assert decisions.ended(exit_code, asked, has_saved, taken_away, []) == how
    assert decisions.ended(exit_code, asked, has_saved, taken_away, ["n1"]) == "bad-nodes"


def test_the_newest_checkpoint_is_the_last_complete_one(decisions):
    assert decisions.newest_step([]) == 0
    names = ["step_000000008", "step_000000010", "step_000000012.tmp", "step_x", "latest"]
    assert decisions.newest_step(names) == 10


def test_what_slurm_says_is_read_by_name(decisions):
    text = "JobId=7 JobName=a JobState=RUNNING Comment=x JobState=FAILED y Nothing= Features=(null)\n"
    fields = decisions.job_fields(text)
    assert (fields["JobState"], fields["Nothing"], fields["Features"]) == ("RUNNING", "", "(null)")


def test_the_lines_that_say_why(decisions):
    doctor = "ok  a\nFAIL b is away\nerror: last\n"
    assert decisions.first_complaint(doctor) == "FAIL b is away"
    assert decisions.first_complaint("x\nerror: no recipe\n") == "no recipe"
    assert decisions.first_complaint("Traceback\nValueError: y\n\n") == "ValueError: y"
    assert decisions.first_complaint("") == "it said nothing"
    warned = "ok    a\nwarn  few images\nwarn  few steps\nx: it would train, with 2 warning(s)\n"
    assert decisions.would_train(warned)
    assert decisions.warnings_of(warned) == ["few images", "few steps"]
    assert not decisions.would_train(doctor)
    assert not decisions.would_train("")
    log = "bad node n2: clock\nbad node n1: /dev/shm\nbad node n2: GPUs\nok n3\n"
    assert decisions.bad_nodes(log) == ["n1", "n2"]
    logs = ["x\n[rank1]: error: a\nerror: b\n", "error: b\n", "", "error: b\nerror: c\n"]
    assert decisions.errors_of(logs) == ["[rank1]: error: a", "error: b"]


def test_ports_are_new_on_every_start_and_leave_room_for_the_next(decisions):
    ports = [decisions.rendezvous_port(4_000_000, restart) for restart in range(1000)]
    assert len(set(ports)) == 1000
    assert all(20000 <= port < 29999 and port % 2 == 0 for port in ports)


@pytest.mark.parametrize("file", ["job.py", "host.py", "decisions.py"])
def test_an_old_python_reads_it_and_needs_nothing_installed(file):
    """The batch host's own, outside of the container."""
    tree = ast.parse((PLACE / file).read_text(), feature_version=(3, 6))
    names = [
        name.split(".")[0]
        for node in ast.walk(tree)
        for name in (
            [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else [node.module or ""]
            if isinstance(node, ast.ImportFrom)
            else []
        )
    ]
    assert set(names) <= {*sys.stdlib_module_names, "host", "decisions"} - {"dataclasses", "__future__"}


# ----------------------------------------------------------------------------------------------------------------------

STANDS_IN = {
    "scontrol": """
case "$1 $2" in
  "show hostnames") echo n1 ;;
  "show job") echo "JobId=7 JobState=RUNNING Reason=None Requeue=1 EndTime=Unknown" ;;
  requeue*) touch "$STUBS/requeued" ;;
esac""",
    "squeue": ":",
    "srun": """
printf "%s\\0" "$@" > "$STUBS/words"
exec python3 "$STUBS/step.py" """,
    "python": """case "$*" in *doctor*) exit 0 ;; *) echo caco_scale 1 ;; esac""",
}


@pytest.fixture
def start(tmp_path):
    """A function of a step's Python code, flags and variables: a start of a job, not waited for."""
    for name, body in STANDS_IN.items():
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (tmp_path / name).chmod(stat.S_IRWXU)
    site = tmp_path / "site.sh"
    site.write_text(f"RUNS={tmp_path}/runs MIN_FREE_GB=0 PREFLIGHT=no\n")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "SBATCH_"))}
    job = {"SLURM_JOB_ID": "7", "SLURM_NNODES": "1", "SLURM_JOB_NODELIST": "n1", "PROCESSES_PER_NODE": "1"}
    started = []

    def call(step, *flags, **variables):
        (tmp_path / "step.py").write_text(step)
        environment = {**kept, "PATH": f"{tmp_path}:{os.environ['PATH']}", "STUBS": str(tmp_path), **job}
        environment |= {"SLURM_SUBMIT_DIR": str(ROOT), "SITE": str(site), "RUN_NAME": "r", **variables}
        words = ["bash", ROOT / "slurm/200ep.sh", *flags]
        output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        started.append(subprocess.Popen(words, env=environment, cwd=ROOT, text=True, **output))
        return started[-1]

    call.run = tmp_path / "runs/r"
    call.folder = tmp_path
    yield call
    for process in started:
        process.kill()


def events(run):
    return [line.split("\t")[3] for line in (run / "slurm/ledger.tsv").read_text().splitlines()]


def test_no_flag_becomes_shell_or_another_flag(start):
    odd = ["a b", "it's", '"', "$(touch ran)", "`touch ran`", "a;b", "a\nb", "", "*", "-x", "7"]
    flags = [word for text in odd for word in ("--run.note", text)]
    process = start("", *flags, RUN_DIR=f"{start.folder}/my runs/$(touch ran)")
    said = process.communicate(timeout=60)[0]
    words = (start.folder / "words").read_text().split("\0")
    assert words[-1 - len(flags) : -1] == flags, said
    assert "$(touch ran)" in " ".join(words)
    assert not (ROOT / "ran").exists()


WAITS = """
import os, pathlib, signal, sys, time
folder = pathlib.Path(os.environ["STUBS"])
def stop(*_):
    with open(folder / "heard", "a") as file: file.write("x")
    if SAVES: (folder / "runs/r/INTERRUPTED").write_text("{}")
    sys.exit(CODE)
signal.signal(signal.SIGUSR1, stop)
(folder / "trains").touch()
time.sleep(100)
"""


def until(there):
    for _ in range(600):
        if there():
            return
        time.sleep(0.1)
    raise AssertionError("never")


@pytest.mark.parametrize(
    ("name", "saves", "code", "how"),
    [
        ("USR1", True, 0, ["stopped"]),
        ("USR2", True, 0, ["stopped"]),
        ("TERM", True, 0, ["terminated", "stopped"]),
        ("USR1", False, 1, ["failed"]),  # it could not save, and the job is to end: no start here
    ],
)
def test_a_signal_reaches_the_trainer_and_the_job_comes_back(start, name, saves, code, how):
    process = start(WAITS.replace("SAVES", str(saves)).replace("CODE", str(code)))
    until((start.folder / "trains").exists)
    process.send_signal(getattr(signal, f"SIG{name}"))
    said = process.communicate(timeout=60)[0]
    assert process.returncode == 0, said
    assert (start.folder / "heard").read_text() == "x"  # once, and at once
    assert events(start.run) == ["start", *how]
    assert (start.folder / "requeued").exists()


def test_a_signal_before_the_trainer_is_kept(start):
    """While the site's modules load; no step begins, and that is no failure."""
    with (start.folder / "site.sh").open("a") as site:
        site.write('touch "$STUBS/loads"; sleep 1; sleep 1; sleep 1\n')
    process = start("")
    until((start.folder / "loads").exists)
    process.send_signal(signal.SIGUSR1)
    said = process.communicate(timeout=60)[0]
    assert process.returncode == 0, said
    assert not (start.folder / "words").exists()
    assert events(start.run) == ["start", "stopped"]


def test_a_fault_of_the_job_itself_is_a_failed_start(start):
    """srun cannot be run: said, noted, counted; a snapshot that cannot be taken is a warning."""
    (start.run / "slurm").mkdir(parents=True)
    (start.run / "slurm/snapshot").touch()
    (start.folder / "srun").write_text("no program\n")
    (start.folder / "srun").chmod(stat.S_IRUSR)
    process = start("", PATH=f"{start.folder}:/usr/bin:/bin")
    said = process.communicate(timeout=60)[0]
    assert "warning: no snapshot of what is started" in said
    assert "srun" in said
    assert process.returncode == 0, said
    assert events(start.run) == ["start", "failed"] * 2
    assert (start.folder / "requeued").exists()


COUNTS = """
import os, pathlib, sys
folder = pathlib.Path(os.environ["STUBS"])
with open(folder / "ports", "a") as file: print(os.environ["MASTER_PORT"], file=file)
number = len((folder / "ports").read_text().split())
if number == 1: (folder / "runs/r/checkpoints/step_000000005").mkdir(parents=True)
if number == DONE_AT: (folder / "runs/r/DONE").write_text("{}")
sys.exit(0 if number == DONE_AT else 1)
"""


def test_a_crash_is_started_again_without_a_requeue(start):
    process = start(COUNTS.replace("DONE_AT", "3"))
    said = process.communicate(timeout=60)[0]
    assert process.returncode == 0, said
    # The first crash left a checkpoint, so that the second is the first of its kind there.
    assert events(start.run) == ["start", "failed", "start", "failed", "start", "done"]
    assert not (start.folder / "requeued").exists()
    folders = {path.name for path in (start.run / "slurm").iterdir() if path.is_dir()}
    assert folders >= {"7.0", "7.0.1", "7.0.2"}
    assert os.readlink(start.run / "slurm/latest") == "7.0.2"
    assert len(set((start.folder / "ports").read_text().split())) == 3


@pytest.mark.parametrize(("most", "starts"), [("3", 2), ("1", 1)])
def test_a_second_crash_at_one_checkpoint_asks_the_queue(start, most, starts):
    with (start.folder / "site.sh").open("a") as site:
        site.write(f"MAX_FAILURES={most}\n")
    process = start("raise SystemExit(1)")
    said = process.communicate(timeout=60)[0]
    assert process.returncode == 0, said
    assert events(start.run) == ["start", "failed"] * starts
    assert (start.folder / "requeued").exists()


def test_a_host_without_python_is_one_line(start):
    python = start.folder / "python3"
    python.write_text("#!/bin/sh\nexit 1\n")
    python.chmod(stat.S_IRWXU)
    process = start("")
    said = process.communicate(timeout=60)[0]
    assert process.returncode == 2
    assert "error: no python3 of 3.6 or later on " in said
