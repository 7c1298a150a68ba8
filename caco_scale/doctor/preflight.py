"""Check every node of a job before it trains, and name the bad ones, so that the job can go on without them.

    srun --ntasks-per-node=1 --nodes=4 python -m caco_scale.doctor.preflight --gpus 8
    python -m caco_scale.doctor.preflight --gpus 8 --hosts a,b --rank 0 --master-port 29400  # by hand on a; b: rank 1

One process per node. First what a node sees of itself: GPUs (their number, a small product on each, uncorrected
memory errors), room in /dev/shm. Then what only several can see: who does not arrive, whose clock or software differs
from the others', over whose network an all-reduce fails (NCCL with GPUs, gloo over TCP without).

Rank 0 prints ``bad node NAME: reason; reason`` once per bad node, and a JSON summary as its last line. If rank 0's own
node cannot be reached, rank 1 says so. Exit codes, the same on every node that answers (``srun --kill-on-bad-exit`` may
make a signal's of them: go by the lines):

    0    every node is good
    2    a user's mistake: one line says which
    3    bad nodes: leave those that are named out, and start again
    4    the all-reduce fails although each node alone works with rank 0's: no node to name
"""

import contextlib
import dataclasses
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

import tyro

from caco_scale.doctor.meeting import Meeting, Place, against_the_others, check_network, clock_offsets
from caco_scale.doctor.node import examine
from caco_scale.errors import UserError, exit_on_user_error, one_line, run_command
from caco_scale.flags.read import read, shown
from caco_scale.flags.rules import FROM_0, Amount, Count, PositiveFloat

PROG = "python -m caco_scale.doctor.preflight"
BAD_NODES, NO_CULPRIT = 3, 4  # exit codes


# ----------------------------------------------------------------------------------------------------------
# The verdict


def gather_facts(meeting: Meeting, own: dict) -> dict[int, dict]:
    """Every node's facts, waited for until the time-out: {rank: facts} of those that arrived."""
    facts = {0: own}
    deadline = time.monotonic() + meeting.place.timeout
    for rank in range(1, meeting.place.nodes):
        with contextlib.suppress(TimeoutError):
            facts[rank] = meeting.hear(f"facts/{rank}", deadline - time.monotonic())
            meeting.names[rank] = facts[rank]["node"]
            meeting.arrived.append(rank)
    return facts


def judge(meeting: Meeting, own: dict, max_clock_skew: float) -> dict[str, Any]:
    """Rank 0: hear and ask everybody -> the summary, plain values."""
    place, names = meeting.place, meeting.names
    names[0] = own["node"]
    facts = gather_facts(meeting, own)
    missing = f"did not arrive in {place.timeout:g} seconds"
    reasons = {rank: [missing] for rank in range(place.nodes) if rank not in facts}
    offsets = clock_offsets(meeting, facts)
    compared = against_the_others(facts, offsets, max_clock_skew)
    reasons |= {rank: facts[rank]["reasons"] + compared[rank] for rank in facts}
    faults, no_culprit = check_network(meeting, [rank for rank in sorted(facts) if not reasons[rank]])
    for rank, why in faults.items():
        reasons[rank].append(why)
    bad = {names[rank]: why for rank, why in sorted(reasons.items()) if why}
    code = BAD_NODES if bad else NO_CULPRIT if no_culprit else 0
    return {
        "exit_code": code,
        "nodes": names,
        "bad": bad,
        "network": no_culprit or "not compared: one good node" * (len(facts) - len(bad) < 2) or "ok",
        "notes": {names[rank]: fact["notes"] for rank, fact in facts.items() if fact["notes"]},
        "clock_seconds": {names[rank]: round(seconds, 3) for rank, seconds in offsets.items()},
        "software": own["software"],
    }


def speak(summary: dict[str, Any]) -> None:
    """A line per bad node, the summary as one line of JSON."""
    for name, reasons in summary["bad"].items():
        print(f"bad node {name}: {'; '.join(reasons)}")
    if summary["exit_code"] == NO_CULPRIT:
        print(f"no node to name: {summary['network']}")
    print(json.dumps(summary), flush=True)


def run(options):
    """Check this node, meet the others -> exit code."""
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")  # its network errors are pages; ours are lines
    own = examine(options.gpus, options.shm_gb, options.timeout)
    address, port = options.master_addr, options.master_port or 0  # alone, on any free one
    place = Place(options.rank, options.nodes, address, port, options.timeout, options.gpus > 0)
    try:
        meeting = Meeting(place, options.names)
    except RuntimeError as error:
        if options.rank == 0:
            why = one_line(error)[:200]
            raise UserError(
                f"rank 0 cannot listen on {address} port {port}: {why}; run it on that host, with a free --master-port"
            ) from None
        return without_rank_0(options, f"no answer from {address} port {port}")
    if options.rank == 0:
        summary = judge(meeting, own, options.max_clock_skew)
        speak(summary)  # first: srun may end all when one exits
        meeting.dismiss(summary["exit_code"])
        return summary["exit_code"]
    try:
        meeting.tell(f"facts/{options.rank}", own)
        return meeting.serve()
    except (RuntimeError, TimeoutError):  # the store went with its node
        return without_rank_0(options, "died during the preflight")


def without_rank_0(options, reason):
    """Nobody leads: rank 1 names the node of rank 0."""
    if options.rank == 1:
        speak({"exit_code": BAD_NODES, "nodes": options.names, "bad": {options.names[0]: [reason]}})
    return BAD_NODES


# ----------------------------------------------------------------------------------------------------------
# The command


def step_nodes(environment):
    """Names of the job step's nodes in rank order, by ``scontrol``; None where that cannot be asked."""
    names = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST")
    if not names:
        return None
    try:
        command = ["scontrol", "show", "hostnames", names]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    except (OSError, subprocess.SubprocessError):  # in a container there is none
        return None
    return done.stdout.split()


@dataclass(frozen=True, kw_only=True)
class Preflight:
    """Check every node of a job before it trains, and name the bad ones, so that the job can go on without them."""

    gpus: Count
    """GPUs that a node must have; 0 = none, on CPUs."""
    hosts: Annotated[str | None, shown("A,B,...")] = None
    """Node names in rank order (default: those of the SLURM step)."""
    nodes: Annotated[int, shown("N")] = 0
    """Number of nodes (default: that of the step or of --hosts, or 1)."""
    rank: Annotated[int | None, shown("R")] = None
    """Which of them this one is, from 0 (default: SLURM_PROCID, or 0)."""
    master_addr: Annotated[str | None, shown("HOST")] = None
    """Rank 0's address (default: MASTER_ADDR, else the first node)."""
    master_port: Annotated[int | None, FROM_0, shown("PORT")] = None
    """A free port there (default: MASTER_PORT)."""
    shm_gb: Amount = 1
    """Least room in /dev/shm, in GB."""
    max_clock_skew: PositiveFloat = 5
    """Most seconds between two clocks."""
    timeout: PositiveFloat = 300
    """Seconds to arrive, and to answer."""
    names: tyro.conf.Suppress[list[str]] = field(default_factory=list)
    """Of the nodes, in rank order, as far as they are known."""


def parse(arguments: Sequence[str], environment: Mapping[str, str], prog: str = PROG) -> Preflight:
    """Flags, and for those not given what SLURM says -> options, checked (UserError)."""
    options = read(Preflight, arguments, prog)

    def number(value, *variables):
        texts = [environment[name] for name in variables if environment.get(name)]
        if value is not None or not texts:
            return value
        if not texts[0].isdigit():
            raise UserError(f"{variables[0]} is {texts[0]!r}, which is no number")
        return int(texts[0])

    hosts = options.hosts.split(",") if options.hosts else step_nodes(environment) or []
    asked = number(options.nodes or None, "SLURM_STEP_NUM_NODES", "SLURM_NNODES")
    nodes = asked or len(hosts) or 1
    options = dataclasses.replace(
        options,
        nodes=nodes,
        rank=number(options.rank, "SLURM_PROCID") or 0,
        master_port=number(options.master_port, "MASTER_PORT"),
        master_addr=options.master_addr or environment.get("MASTER_ADDR") or next(iter(hosts), "127.0.0.1"),
        names=(hosts + [f"of-rank-{rank}" for rank in range(len(hosts), nodes)])[:nodes],
    )
    check(options, number(None, "SLURM_STEP_NUM_TASKS"))
    return options


def check(options, tasks):
    """Refuse what cannot be meant. ``tasks``: processes of the SLURM step, or None."""
    if tasks is not None and tasks != options.nodes:
        raise UserError(f"{tasks} processes on {options.nodes} nodes: give srun --ntasks-per-node=1")
    if not 0 <= options.rank < options.nodes:
        raise UserError(f"--rank {options.rank} is not one of {options.nodes} nodes: they count from 0")
    if options.master_port is None and options.nodes > 1:
        raise UserError("give --master-port, or set MASTER_PORT: a port that is free on rank 0's node")


@exit_on_user_error
def main(arguments: Sequence[str] | None = None, prog: str = PROG) -> None:
    """Exit codes as above."""
    options = parse(sys.argv[1:] if arguments is None else arguments, os.environ, prog)
    sys.exit(run(options))


if __name__ == "__main__":
    run_command(main)
