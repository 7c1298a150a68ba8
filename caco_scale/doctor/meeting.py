"""What only several nodes see together: who does not arrive, whose clock or software differs, whose network fails.

Rank 0 leads: it keeps a key-value store, gives tasks, and hears the replies. It needs nothing of the nodes' own view.
"""

import json
import os
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from caco_scale.doctor.node import in_a_process
from caco_scale.errors import one_line

CLOCK_READINGS = 5
ELEMENTS = 1 << 20  # of the tensor that is reduced: 4 MB, enough to leave the fast path of small messages


@dataclass(frozen=True)
class Place:
    """Where this node stands among those of the job, and where they meet."""

    rank: int
    nodes: int
    address: str
    """Host of rank 0, which keeps the store."""
    port: int
    timeout: float
    """Seconds to arrive, and to answer."""
    gpus: bool
    """Whether the network is NCCL's between GPUs, or gloo's over TCP."""


def reduce_together(answer: Any, place: Place, name: str, rank: int, world_size: int) -> None:
    """In a process of its own: one all-reduce in a new group called ``name``; sends True, or what failed."""
    import torch
    import torch.distributed as dist

    timeout = timedelta(seconds=place.timeout)
    # To raise here, where NCCL's watchdog would abort the process.
    os.environ["TORCH_NCCL_BLOCKING_WAIT"] = "1"
    try:
        host = dist.TCPStore(place.address, place.port, is_master=False, timeout=timeout)
        store = dist.PrefixStore(name, host)
        backend = "nccl" if place.gpus else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)
        ranks = torch.full((ELEMENTS,), rank + 1.0, device="cuda" if place.gpus else "cpu")
        dist.all_reduce(ranks)
        store.set(f"done/{rank}", "")
        store.wait([f"done/{other}" for other in range(world_size)], timeout)  # nobody leaves amid another's
        right = bool((ranks == world_size * (world_size + 1) / 2).all())
        answer.send(right or "its sum is wrong")
    except Exception as error:  # whatever it is, it is the answer
        answer.send(one_line(error)[:200])


class Meeting:
    """The nodes around a key-value store that rank 0 keeps. Rank 0 gives tasks, every node replies to its own."""

    def __init__(self, place: Place, names: list[str]):
        from torch.distributed import TCPStore

        self.place, self.names = place, names
        self.arrived = [0]
        self._sent = Counter()
        self._store = TCPStore(
            place.address,
            place.port,
            is_master=place.rank == 0,
            wait_for_workers=False,
            timeout=timedelta(seconds=place.timeout),
        )

    def tell(self, key: str, value: Any) -> None:
        self._store.set(key, json.dumps(value))

    def hear(self, key: str, seconds: float) -> Any:
        """What is told under ``key``, waited for; TimeoutError after ``seconds`` (at least 1)."""
        from torch.distributed import DistStoreError

        try:
            self._store.wait([key], timedelta(seconds=max(seconds, 1)))
        except DistStoreError:
            raise TimeoutError(key) from None
        return json.loads(self._store.get(key))

    def ask(self, tasks: dict[int, tuple], seconds: float) -> dict[int, Any]:
        """Rank 0: give each rank of ``tasks`` its task, do one's own -> {rank: reply, None where none came}."""
        for rank in tasks.keys() - {0}:
            self._sent[rank] += 1
            self.tell(f"task/{rank}/{self._sent[rank]}", tasks[rank])
        replies = {0: do(tasks[0], self.place)} if 0 in tasks else {}
        deadline = time.monotonic() + seconds
        for rank in tasks.keys() - {0}:
            try:
                left = deadline - time.monotonic()
                replies[rank] = self.hear(f"reply/{rank}/{self._sent[rank]}", left)
            except TimeoutError:
                replies[rank] = None
        return replies

    def dismiss(self, code: int) -> None:
        """Rank 0: the others exit with ``code``; returns when all that are there know it."""
        self.ask({rank: ("verdict", code) for rank in self.arrived if rank}, self.place.timeout)

    def serve(self) -> int:
        """The other ranks: do what rank 0 asks for, until its verdict -> exit code."""
        rank, place, number = self.place.rank, self.place, 0
        while True:
            number += 1
            task = self.hear(f"task/{rank}/{number}", place.timeout * (place.nodes + 4))
            self.tell(f"reply/{rank}/{number}", do(task, place))
            if task[0] == "verdict":
                return task[1]


def do(task: tuple, place: Place) -> Any:
    """One task of rank 0's: the time, an all-reduce, the verdict."""
    name, *arguments = task
    if name == "clock":
        return time.time()
    if name == "reduce":
        return in_a_process(reduce_together, (place, *arguments), 2 * place.timeout)
    assert name == "verdict", task
    return True


def clock_offsets(meeting: Meeting, ranks: Iterable[int]) -> dict[int, float]:
    """How many seconds each clock is ahead of rank 0's, by the quickest of several readings: {rank: seconds}."""
    offsets = {0: 0.0}
    for rank in set(ranks) - {0}:
        readings = []
        for _ in range(CLOCK_READINGS):
            sent = time.time()
            there = meeting.ask({rank: ("clock",)}, meeting.place.timeout)[rank]
            received = time.time()
            if there is None:
                break
            readings.append((received - sent, there - (sent + received) / 2))
        if readings:
            offsets[rank] = min(readings)[1]
    return offsets


def majority(values: dict[int, Any]) -> int:
    """The most frequent of ``{rank: value}``; of equally frequent ones that of the lowest rank."""
    counts = Counter(values.values())
    return max(sorted(values), key=lambda rank: counts[values[rank]] - rank / (len(values) + 1) / 2)


def against_the_others(
    facts: dict[int, dict], offsets: dict[int, float], max_skew: float
) -> dict[int, list[str]]:
    """Reasons that show by comparison only: {rank: [reason, ...]}; most nodes are right."""
    reasons = {rank: [] if rank in offsets else ["arrived and then fell silent"] for rank in facts}
    for name in facts[0]["software"]:
        if any(name not in fact["software"] for fact in facts.values()):
            continue  # other code asks for other packages, and differs itself
        values = {rank: fact["software"][name] for rank, fact in facts.items()}
        usual = values[majority(values)]
        for rank, value in values.items():
            if value != usual:
                reasons[rank].append(f"{name} is {value}, on most nodes {usual}")
    # The clock that most others agree with; a mean would be pulled by the one that is wrong.
    close = {r: sum(abs(offsets[r] - other) <= max_skew for other in offsets.values()) for r in offsets}
    right = offsets[max(sorted(offsets), key=lambda rank: close[rank])]
    for rank, offset in offsets.items():
        if abs(offset - right) > max_skew:
            reasons[rank].append(f"its clock is {offset - right:+.1f} seconds off")
    return reasons


def check_network(meeting: Meeting, good: list[int]) -> tuple[dict[int, str], str | None]:
    """All-reduce over the ``good`` ranks; if it fails, in pairs -> ({rank: reason}, why where no rank can be named)."""
    timeout, names = meeting.place.timeout, meeting.names

    def reduce(name, ranks):
        tasks = {rank: ("reduce", name, place, len(ranks)) for place, rank in enumerate(ranks)}
        replies = meeting.ask(tasks, 2 * timeout + 10)
        return [
            f"{names[rank]}: {reply or 'no answer'}" for rank, reply in replies.items() if reply is not True
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
    return {rank: f"the all-reduce with {names[hub]} fails ({why[-1]})" for rank, why in broken.items()}, None
