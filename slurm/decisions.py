"""What a job decides, as functions that know no SLURM: is it worth another start, how has one ended, who is bad.

Standard library and Python 3.6 alone, as job.py.
"""

import re
from typing import Dict, Iterable, List, NamedTuple


class History(NamedTuple):
    """What a submission has behind it."""

    failures: int = 0
    """Starts in a row that failed, or left no end, at the newest checkpoint."""
    starts: int = 0
    """Starts in a row at the newest checkpoint."""
    all_starts: int = 0
    last_event: str = "none"


def read_history(lines: Iterable[str], chain: str, newest: int) -> History:
    """Of the ledger's ``lines``, those of submission ``chain``; ``newest``: the step of the newest checkpoint.

    A start that ended because somebody asked is no failure; one that left no end (its node was lost) is.
    """
    failures = starts = all_starts = 0
    step, last, is_open = None, "none", False
    for line in lines:
        words = line.rstrip("\n").split("\t")
        if len(words) < 5 or words[1] != chain:
            continue
        event = words[3]
        if event == "start":
            if words[4] != step:
                failures = starts = 0
            step = words[4]
            failures, starts, all_starts = failures + 1, starts + 1, all_starts + 1
        elif event in ("stopped", "terminated", "bad-nodes") and is_open:
            failures -= 1
        is_open, last = event == "start", event
    if str(newest) != step:
        failures = starts = 0
    return History(failures, starts, all_starts, last)


def why_give_up(history: History, most_failures: int, most_starts_per_step: int, most_starts: int) -> str:
    """Why another start will not help; empty where it may."""
    if history.all_starts >= most_starts:
        return f"this is start {history.all_starts + 1}, more than MAX_STARTS"
    if history.starts >= most_starts_per_step:
        return f"{history.starts} starts in a row brought no step"
    if history.failures >= most_failures:
        return f"{history.failures} starts in a row failed"
    return ""


def is_worth_staying(history: History, most_failures: int) -> bool:
    """After a failed start: once more on the same nodes? A second failure in a row asks the queue for others."""
    return history.failures < min(2, most_failures)


def newest_step(names: Iterable[str]) -> int:
    """The step of the newest complete checkpoint among a folder's ``names``, 0 without one."""
    found = (re.match(r"step_(\d+)$", name) for name in names)
    return max((int(name.group(1)) for name in found if name), default=0)


def ended(exit_code: int, asked: str, has_saved: bool, taken_away: bool, bad_nodes: List[str]) -> str:
    """How a start has ended: ``stopped``, ``failed`` or ``bad-nodes``.

    Args:
        asked: the signal that this job was sent, empty without one.
        has_saved: the trainer says that it was interrupted, in this start.
        taken_away: SLURM has ended the job.
    """
    if bad_nodes:
        return "bad-nodes"
    # It was asked to stop and had nothing to save yet, or no time to.
    in_order = has_saved or (asked and (exit_code == 0 or exit_code > 128 or taken_away))
    return "stopped" if in_order else "failed"


def job_fields(text: str) -> Dict[str, str]:
    """``scontrol show job -o``'s line as {name: value}; of a name that stands twice (in a comment), the first."""
    fields = {}  # type: Dict[str, str]
    for word in text.split():
        name, equals, value = word.partition("=")
        if equals:
            fields.setdefault(name, value)
    return fields


def rendezvous_port(job: int, restart: int) -> int:
    """Below the ephemeral range, and new on every start; the one after it is for training."""
    return 20000 + (job * 7 + restart) * 2 % 10000


def first_complaint(log: str) -> str:
    """The doctor's line that says why not: its first failure or error, else its last line."""
    lines = [line for line in log.splitlines() if line.strip()]
    found = [line for line in lines if line.startswith(("FAIL", "error:"))]
    line = (found or lines[-1:] or ["it said nothing"])[0]
    return line[len("error:") :].strip() if line.startswith("error:") else line


def would_train(log: str) -> bool:
    """The doctor has warnings alone."""
    return ": it would train, with " in (log.rstrip().splitlines() or [""])[-1]


def warnings_of(log: str) -> List[str]:
    """What the doctor warns of."""
    return re.findall(r"^warn +(.*)", log, re.M)


def bad_nodes(log: str) -> List[str]:
    """The nodes that the preflight names."""
    return sorted(set(re.findall(r"^bad node ([^:\n]*):", log, re.M)))


def errors_of(logs: Iterable[str]) -> List[str]:
    """The first error that each node's log tells, each once."""
    found = (re.search(r"^(\[rank\d+\]: )?error:.*", log, re.M) for log in logs)
    return sorted({line.group() for line in found if line})
