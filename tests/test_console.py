"""The console never ends a command, and nothing else is written into its place."""

import errno
import os
import pty
import signal
import subprocess
import sys

import pytest
from launch import environment

from caco_scale.console import LastingStream

PROGRAM = """
import contextlib, os, sys, time
from caco_scale.errors import exit_on_user_error, run_command
@exit_on_user_error
def main():
    if "waits" in sys.argv:
        print("is here", flush=True)
        sys.stdin.readline()
    opened = open(sys.argv[1], "a")
    for number in range(2000):
        print("line", number, "\\udcff ö")
        print("to stderr", number, file=sys.stderr, flush=True)
    with contextlib.suppress(OSError):
        os.write(2, b"what C++ prints")
    opened.write("is whole")
    opened.close()
run_command(main)
"""


def run(place, redirection):
    words = f"{{ {sys.executable} -c '{PROGRAM}' {place}; echo $? > {place}.code; }} {redirection}"
    done = subprocess.run(
        ["bash", "-c", words], env=environment(), capture_output=True, text=True, timeout=120, check=False
    )
    assert place.read_text() == "is whole", done.stderr
    assert (place.parent / f"{place.name}.code").read_text() == "0\n", done.stderr
    return done


@pytest.mark.parametrize(
    "redirection",
    [
        "| head -n 1",
        "2>&1 | true",
        "> /dev/full",
        "2> /dev/full",
        "> /dev/full 2>&1",
        ">&-",
        "2>&-",
        "<&- >&- 2>&-",
    ],
)
def test_what_becomes_of_the_console_does_not_end_the_work(tmp_path, redirection):
    done = run(tmp_path / "file", redirection)
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr
    if redirection == "> /dev/full":
        assert done.stderr.count("warning: stdout cannot be written (No space left on device)") == 1
    if redirection == "2> /dev/full":
        assert done.stdout.count("warning: stderr cannot be written (No space left on device)") == 1


def test_a_terminal_that_is_closed_does_not_end_the_work(tmp_path):
    """Its process ignores SIGHUP, as under nohup."""
    ours, theirs = pty.openpty()
    words = [
        "bash",
        "-c",
        "trap '' HUP; exec \"$@\"",
        "bash",
        sys.executable,
        "-c",
        PROGRAM,
        tmp_path / "file",
        "waits",
    ]
    process = subprocess.Popen(
        list(map(str, words)), env=environment(), stdin=subprocess.PIPE, stdout=theirs, stderr=theirs
    )
    os.close(theirs)
    assert b"is here" in os.read(ours, 100)
    os.close(ours)
    process.communicate(b"\n", timeout=120)
    assert process.returncode == 0
    assert (tmp_path / "file").read_text() == "is whole"


def test_a_stream_that_does_not_wait_is_waited_for(monkeypatch):
    reader, writer = os.pipe()
    tries = []

    def write(fd, data):
        tries.append(data)
        if len(tries) == 1:
            raise BlockingIOError(errno.EAGAIN, "not now")
        return len(data)

    monkeypatch.setattr(os, "write", write)
    stream = LastingStream(None, writer)
    assert stream.write("a line\n") == 7
    assert tries == [b"a line\n"] * 2
    monkeypatch.undo()
    for fd in (reader, writer):
        os.close(fd)


def test_ctrl_c_is_one_line(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, tmp_path / "file", "waits"],
        env=environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout.readline() == b"is here\n"
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert (process.returncode, errors) == (130, b"error: interrupted\n")
