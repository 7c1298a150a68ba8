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
import hashlib
import itertools
import json
import os
import platform
import shutil
import socket
import subprocess
import sys
import time
from collections import Counter
from datetime import timedelta
from importlib import metadata
from multiprocessing import get_context
from pathlib import Path

from caco_scale.errors import Parser, UserError, exit_on_user_error, one_line, run_command

BAD_NODES, NO_CULPRIT = 3, 4  # exit codes
PACKAGES = ("torch", "deepspeed", "accelerate")
SHM = "/dev/shm"
CLOCK_READINGS = 5
ELEMENTS = 1 << 20  # of the tensor that is reduced: 4 MB, enough to leave the fast path of small messages


# ----------------------------------------------------------------------------------------------------------
# What a node sees of itself


def package_hash():
    """sha256 over the names and contents of this package's files (Python and recipes)."""
    folder, total = Path(__file__).parents[1], hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.suffix in (".py", ".yaml"):
            total.update(f"{path.relative_to(folder)}\0".encode())
            total.update(hashlib.sha256(path.read_bytes()).digest())
    return total.hexdigest()


def versions():
    """Versions of Python and of what must be the same on every node: {name: version or None}."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    return found


def check_shm(wanted_bytes):
    """Reasons against this node: too little free in /dev/shm, through which loader workers hand batches over."""
    if not os.path.isdir(SHM):
        return [f"no {SHM}"] if wanted_bytes else []
    free = shutil.disk_usage(SHM).free
    return (
        [] if free >= wanted_bytes else [f"{free / 1e9:.2f} GB free in {SHM}, not {wanted_bytes / 1e9:.2f}"]
    )


def use_gpus(answer):
    """In a process of its own, for a broken driver hangs: multiply on every GPU, send the number of them."""
    import torch

    count = torch.cuda.device_count()
    for number in range(count):
        ones = torch.ones(256, 256, device=f"cuda:{number}")
        if (ones @ ones).sum().item() != 256**3:
            answer.send(f"GPU {number} multiplies wrongly")
            return
    answer.send(count)


def check_gpus(wanted, timeout):
    """Reasons against this node: GPUs that are missing, hang, or miscalculate."""
    found = in_a_process(use_gpus, (), timeout)
    if isinstance(found, int):
        return [] if found == wanted else [f"torch sees {found} GPU(s), not {wanted}"]
    return [found]


def read_ecc(text):
    """nvidia-smi's lines ``index, count`` -> {index: uncorrected errors, or None where a GPU does not count them}."""
    pairs = [line.split(",") for line in text.splitlines() if "," in line]
    return {int(i): int(count) if count.strip().isdigit() else None for i, count in pairs}


def check_ecc(timeout):
    """-> (reasons against this node: uncorrected memory errors since the driver was loaded; a note for people)."""
    query = "--query-gpu=index,ecc.errors.uncorrected.volatile.total"
    try:
        done = subprocess.run(
            ["nvidia-smi", query, "--format=csv,noheader,nounits"],
            capture_output=True,
            text=True,
            timeout=timeout,
        )
    except FileNotFoundError:
        return [], "no nvidia-smi: memory errors are not checked"
    except subprocess.TimeoutExpired:
        return [f"nvidia-smi does not answer in {timeout:.0f} seconds"], None
    if done.returncode:
        return [f"nvidia-smi fails: {one_line(done.stdout + done.stderr)[:200]}"], None
    counts = read_ecc(done.stdout)
    bad = [f"GPU {gpu} has {count} uncorrected memory error(s)" for gpu, count in counts.items() if count]
    silent = [gpu for gpu, count in counts.items() if count is None]
    return bad, f"GPUs {silent} do not count memory errors" if silent else None


def examine(options):
    """This node's facts, of which ``reasons`` speak against it."""
    reasons, notes = check_shm(options.shm_gb * 1e9), []
    if options.gpus:
        reasons += check_gpus(options.gpus, options.timeout)
        bad, note = check_ecc(options.timeout)
        reasons += bad
        notes += [note] if note else []
    software = {"caco_scale": package_hash()[:16], **versions()}
    return {"node": node_name(), "reasons": reasons, "notes": notes, "software": software}


def node_name():
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def in_a_process(function, arguments, timeout):
    """What ``function(answer, *arguments)`` sends by its pipe end ``answer``, or a reason (str) where it does not."""
    context = get_context("spawn")
    receiver, answer = context.Pipe(duplex=False)
    process = context.Process(target=function, args=(answer, *arguments))
    process.start()
    answer.close()
    try:
        return receiver.recv() if receiver.poll(timeout) else f"no answer in {timeout:.0f} seconds"
    except EOFError:
        process.join()
        return f"{function.__name__} died with exit code {process.exitcode}"
    finally:
        process.kill()
        process.join()


# ----------------------------------------------------------------------------------------------------------
# What only several see


def reduce_together(answer, options, name, rank, world_size):
    """In a process of its own: one all-reduce in a new group called ``name``; sends True, or what failed."""
    import torch
    import torch.distributed as dist

    patience = timedelta(seconds=options.timeout)
    os.environ["TORCH_NCCL_BLOCKING_WAIT"] = (
        "1"  # to raise here, where NCCL's watchdog would abort the process
    )
    try:
        host = dist.TCPStore(options.master_addr, options.master_port, is_master=False, timeout=patience)
        store = dist.PrefixStore(name, host)
        dist.init_process_group(
            "nccl" if options.gpus else "gloo",
            store=store,
            rank=rank,
            world_size=world_size,
            timeout=patience,
        )
        ranks = torch.full((ELEMENTS,), rank + 1.0, device="cuda" if options.gpus else "cpu")
        dist.all_reduce(ranks)
        store.set(f"done/{rank}", "")
        store.wait(
            [f"done/{other}" for other in range(world_size)], patience
        )  # nobody leaves another in the middle
        right = bool((ranks == world_size * (world_size + 1) / 2).all())
        answer.send(right or "its sum is wrong")
    except Exception as error:  # whatever it is, it is the answer
        answer.send(one_line(error)[:200])


class Meeting:
    """The nodes around a key-value store that rank 0 keeps. Rank 0 gives tasks, every node replies to its own."""

    def __init__(self, options):
        from torch.distributed import TCPStore

        self.options, self._sent = options, Counter()
        self.arrived = [0]
        self._store = TCPStore(
            options.master_addr,
            options.master_port,
            is_master=options.rank == 0,
            wait_for_workers=False,
            timeout=timedelta(seconds=options.timeout),
        )

    def tell(self, key, value):
        self._store.set(key, json.dumps(value))

    def hear(self, key, seconds):
        """What is told under ``key``, waited for; TimeoutError after ``seconds`` (at least 1)."""
        from torch.distributed import DistStoreError

        try:
            self._store.wait([key], timedelta(seconds=max(seconds, 1)))
        except DistStoreError:
            raise TimeoutError(key) from None
        return json.loads(self._store.get(key))

    def ask(self, tasks, seconds):
        """Rank 0: give each rank of ``tasks`` its task, do one's own -> {rank: reply, None where none came}."""
        for rank in tasks.keys() - {0}:
            self._sent[rank] += 1
            self.tell(f"task/{rank}/{self._sent[rank]}", tasks[rank])
        replies = {0: do(tasks[0], self.options)} if 0 in tasks else {}
        deadline = time.monotonic() + seconds
        for rank in tasks.keys() - {0}:
            try:
                left = deadline - time.monotonic()
                replies[rank] = self.hear(f"reply/{rank}/{self._sent[rank]}", left)
            except TimeoutError:
                replies[rank] = None
        return replies

    def dismiss(self, code):
        """Rank 0: the others exit with ``code``; returns when all that are there know it."""
        self.ask({rank: ("verdict", code) for rank in self.arrived if rank}, self.options.timeout)

    def serve(self):
        """The other ranks: do what rank 0 asks for, until its verdict -> exit code."""
        rank, options = self.options.rank, self.options
        for number in itertools.count(1):
            task = self.hear(f"task/{rank}/{number}", options.timeout * (options.nodes + 4))
            self.tell(f"reply/{rank}/{number}", do(task, options))
            if task[0] == "verdict":
                return task[1]


def do(task, options):
    """One task of rank 0's: the time, an all-reduce, the verdict."""
    name, *arguments = task
    if name == "clock":
        return time.time()
    if name == "reduce":
        return in_a_process(reduce_together, (options, *arguments), 2 * options.timeout)
    assert name == "verdict", task
    return True


def clock_offsets(meeting, ranks):
    """How many seconds each clock is ahead of rank 0's, by the quickest of several readings: {rank: seconds}."""
    offsets = {0: 0.0}
    for rank in set(ranks) - {0}:
        readings = []
        for _ in range(CLOCK_READINGS):
            sent = time.time()
            there = meeting.ask({rank: ("clock",)}, meeting.options.timeout)[rank]
            received = time.time()
            if there is None:
                break
            readings.append((received - sent, there - (sent + received) / 2))
        if readings:
            offsets[rank] = min(readings)[1]
    return offsets


def majority(values):
    """The most frequent of ``{rank: value}``; of equally frequent ones that of the lowest rank."""
    counts = Counter(values.values())
    return max(sorted(values), key=lambda rank: counts[values[rank]] - rank / (len(values) + 1) / 2)


def against_the_others(facts, offsets, max_skew):
    """Reasons that show by comparison only: {rank: [reason, ...]}; most nodes are right."""
    reasons = {rank: [] if rank in offsets else ["arrived and then fell silent"] for rank in facts}
    for name in facts[0]["software"]:
        values = {rank: fact["software"][name] for rank, fact in facts.items()}
        usual = values[majority(values)]
        for rank, value in values.items():
            if value != usual:
                reasons[rank].append(f"{name} is {value}, on most nodes {usual}")
    # The clock that most others agree with; a mean would be pulled by the one that is wrong.
    close = {r: sum(abs(offsets[r] - other) <= max_skew for other in offsets.values()) for r in offsets}
    right = offsets[max(sorted(offsets), key=close.get)]
    for rank, offset in offsets.items():
        if abs(offset - right) > max_skew:
            reasons[rank].append(f"its clock is {offset - right:+.1f} seconds off")
    return reasons


def check_network(meeting, good):
    """All-reduce over the ``good`` ranks; if it fails, in pairs -> ({rank: reason}, why where no rank can be named)."""
    options = meeting.options

    def reduce(name, ranks):
        tasks = {rank: ("reduce", name, place, len(ranks)) for place, rank in enumerate(ranks)}
        replies = meeting.ask(tasks, 2 * options.timeout + 10)
        return [
            f"{options.names[rank]}: {reply or 'no answer'}"
            for rank, reply in replies.items()
            if reply is not True
        ]

    failed = reduce("all", good) if len(good) > 1 else []
    if not failed:
        return {}, None
    hub, *others = good
    broken = {rank: why for rank in others if (why := reduce(f"pair-{rank}", [hub, rank]))}
    if not broken or len(others) == 1:  # of two, either may be to blame
        return {}, f"the all-reduce fails ({'; '.join(failed)})"
    if len(broken) == len(others):
        return {hub: f"no all-reduce with any of {len(others)} other nodes ({broken[others[0]][-1]})"}, None
    return {
        rank: f"the all-reduce with {options.names[hub]} fails ({why[-1]})" for rank, why in broken.items()
    }, None


# ----------------------------------------------------------------------------------------------------------
# The verdict


def gather_facts(meeting, own):
    """Every node's facts, waited for until the time-out: {rank: facts} of those that arrived."""
    options, facts = meeting.options, {0: own}
    deadline = time.monotonic() + options.timeout
    for rank in range(1, options.nodes):
        with contextlib.suppress(TimeoutError):
            facts[rank] = meeting.hear(f"facts/{rank}", deadline - time.monotonic())
            options.names[rank] = facts[rank]["node"]
            meeting.arrived.append(rank)
    return facts


def judge(meeting, own):
    """Rank 0: hear and ask everybody -> the summary, plain values."""
    options = meeting.options
    options.names[0] = own["node"]
    facts = gather_facts(meeting, own)
    missing = f"did not arrive in {options.timeout:g} seconds"
    reasons = {rank: [missing] for rank in range(options.nodes) if rank not in facts}
    offsets = clock_offsets(meeting, facts)
    compared = against_the_others(facts, offsets, options.max_clock_skew)
    reasons |= {rank: facts[rank]["reasons"] + compared[rank] for rank in facts}
    faults, no_culprit = check_network(meeting, [rank for rank in sorted(facts) if not reasons[rank]])
    for rank, why in faults.items():
        reasons[rank].append(why)
    bad = {options.names[rank]: why for rank, why in sorted(reasons.items()) if why}
    code = BAD_NODES if bad else NO_CULPRIT if no_culprit else 0
    return {
        "exit_code": code,
        "nodes": options.names,
        "bad": bad,
        "network": no_culprit or "not compared: one good node" * (len(facts) - len(bad) < 2) or "ok",
        "notes": {options.names[rank]: fact["notes"] for rank, fact in facts.items() if fact["notes"]},
        "clock_seconds": {options.names[rank]: round(seconds, 3) for rank, seconds in offsets.items()},
        "software": own["software"],
    }


def speak(summary):
    """A line per bad node, the summary as one line of JSON."""
    for name, reasons in summary["bad"].items():
        print(f"bad node {name}: {'; '.join(reasons)}")
    if summary["exit_code"] == NO_CULPRIT:
        print(f"no node to name: {summary['network']}")
    print(json.dumps(summary), flush=True)


def run(options):
    """Check this node, meet the others -> exit code."""
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")  # its network errors are pages; ours are lines
    own = examine(options)
    try:
        meeting = Meeting(options)
    except RuntimeError as error:
        if options.rank == 0:
            place = f"{options.master_addr} port {options.master_port}"
            raise UserError(
                f"cannot listen on {place}: {one_line(error)[:200]}; give a free --master-port"
            ) from None
        return without_rank_0(options, f"no answer from {options.master_addr} port {options.master_port}")
    if options.rank == 0:
        summary = judge(meeting, own)
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


def parse(arguments, environment):
    """Flags, and for those not given what SLURM says -> options, checked (UserError)."""
    flags = Parser(prog="python -m caco_scale.doctor.preflight", description=__doc__.split("\n")[0])
    add = flags.add_argument
    add("--gpus", type=int, required=True, metavar="N", help="GPUs that a node must have; 0 = none, on CPUs")
    add("--hosts", metavar="A,B,...", help="node names in rank order (default: those of the SLURM step)")
    add(
        "--nodes",
        type=int,
        metavar="N",
        help="number of nodes (default: that of the step or of --hosts, or 1)",
    )
    add(
        "--rank",
        type=int,
        metavar="R",
        help="which of them this one is, from 0 (default: SLURM_PROCID, or 0)",
    )
    add("--master-addr", metavar="HOST", help="rank 0's address (default: MASTER_ADDR, else the first node)")
    add("--master-port", type=int, metavar="PORT", help="a free port there (default: MASTER_PORT)")
    add("--shm-gb", type=float, default=1, metavar="GB", help=f"least room in {SHM} (default: 1)")
    add("--max-clock-skew", type=float, default=5, metavar="SECONDS", help="between two clocks (default: 5)")
    add(
        "--timeout",
        type=float,
        default=300,
        metavar="SECONDS",
        help="to arrive, and to answer (default: 300)",
    )
    options = flags.parse_args(arguments)

    def number(value, *variables):
        texts = [environment[name] for name in variables if environment.get(name)]
        if value is not None or not texts:
            return value
        if not texts[0].isdigit():
            raise UserError(f"{variables[0]} is {texts[0]!r}, which is no number")
        return int(texts[0])

    hosts = options.hosts.split(",") if options.hosts else step_nodes(environment) or []
    options.nodes = number(options.nodes, "SLURM_STEP_NUM_NODES", "SLURM_NNODES") or len(hosts) or 1
    options.rank = number(options.rank, "SLURM_PROCID") or 0
    options.master_port = number(options.master_port, "MASTER_PORT")
    options.master_addr = (
        options.master_addr or environment.get("MASTER_ADDR") or next(iter(hosts), "127.0.0.1")
    )
    options.names = (hosts + [f"of-rank-{rank}" for rank in range(options.nodes)][len(hosts) :])[
        : options.nodes
    ]
    check(options, number(None, "SLURM_STEP_NUM_TASKS"))
    return options


def check(options, tasks):
    """Refuse what cannot be meant. ``tasks``: processes of the SLURM step, or None."""
    if tasks is not None and tasks != options.nodes:
        raise UserError(f"{tasks} processes on {options.nodes} nodes: give srun --ntasks-per-node=1")
    if not 0 <= options.rank < options.nodes:
        raise UserError(f"--rank {options.rank} is not one of {options.nodes} nodes: they count from 0")
    if options.gpus < 0 or options.shm_gb < 0 or options.max_clock_skew <= 0 or options.timeout <= 0:
        raise UserError("--gpus and --shm-gb must be 0 or more, --max-clock-skew and --timeout more than 0")
    if options.master_port is None and options.nodes > 1:
        raise UserError("give --master-port, or set MASTER_PORT: a port that is free on rank 0's node")


@exit_on_user_error
def main(arguments=None):
    options = parse(sys.argv[1:] if arguments is None else arguments, os.environ)
    sys.exit(run(options))


if __name__ == "__main__":
    run_command(main)
