"""The audit log: which samples every step trained on, the proof that each was seen exactly once.

One file per rank (``FILE``, ``FILE.rank1``, ``FILE.rank2``, ...), one JSON line per step:

    {"step", "epoch", "rank", "world_size", "attempt", "keys": [...]}

Keys are ``shard/key`` in batch order, so that the ranks' lists joined in rank order are the global batch. A
killed run resumes from its last checkpoint and trains the steps after it again, perhaps on another number of
ranks: for a step only its latest attempt counts, and of that attempt all its ranks.
"""

import re
from collections.abc import Iterable
from pathlib import Path

from caco_scale.errors import UserError
from caco_scale.run.files import JsonLines, last_json_line, read_json_lines
from caco_scale.run.patience import Patience


class AuditLog:
    """This rank's part of the audit log of one attempt (a number that grows with each start of the run).

    ``disk``: how long the file may be silent.
    Raises :class:`UserError` where the file holds a later attempt than this: it belongs to another run
    directory, and appending would let the other run's lines count for this one's steps.
    """

    def __init__(
        self, path: str | Path, *, rank: int, world_size: int, attempt: int, disk: Patience | None = None
    ):
        path = Path(path) if rank == 0 else Path(f"{path}.rank{rank}")
        self._disk = disk or Patience(path)
        self._constant = {"rank": rank, "world_size": world_size, "attempt": attempt}
        self._lines = self._disk.call(lambda: self._open(path, attempt))

    def _open(self, path, attempt):
        latest = (last_json_line(path) or {}).get("attempt", 0)
        if latest > attempt:
            raise UserError(
                f"the audit log {path} holds attempt {latest} of another run and this is attempt {attempt}; "
                "name another file with data.audit or remove this one"
            )
        return JsonLines(path)

    def append(self, step: int, epoch: int, keys: Iterable[str]) -> None:
        """Record the samples of this rank's share of a step, in batch order, once they are trained on."""
        line = {"step": step, "epoch": epoch, **self._constant, "keys": list(keys)}
        self._disk.call(lambda: self._lines.append(line))

    def flush(self) -> None:
        """Lines so far are on the disk when this returns: on every rank, before a checkpoint is complete."""
        self._disk.call(self._lines.sync)

    def close(self) -> None:
        if not self._disk.gone:
            self._disk.call(self._lines.close)
            self._disk.rest()


def _rank_files(path):
    """The files of an audit log, those that exist."""
    path = Path(path)
    name = re.compile(re.escape(path.name) + r"(\.rank\d+)?")
    files = [file for file in path.parent.glob("*") if name.fullmatch(file.name)]
    if not files:
        raise UserError(f"no audit log at {path}; a run writes one with data.audit={path}")
    return files


def _latest_attempts(path):
    """step -> (attempt, world_size, {rank: keys}) of the step's latest attempt; a rank's last line wins."""
    steps = {}
    for file in _rank_files(path):
        for line in read_json_lines(file):
            attempt, parts = line["attempt"], {}
            if line["step"] in steps:
                known_attempt, _, known_parts = steps[line["step"]]
                if attempt < known_attempt:
                    continue
                parts = known_parts if attempt == known_attempt else parts
            parts[line["rank"]] = line["keys"]
            steps[line["step"]] = (attempt, line["world_size"], parts)
    return dict(sorted(steps.items()))


def read_audit(path: str | Path) -> dict[int, list[str]]:
    """The global batches trained on: step -> keys, the ranks' lists joined in rank order, steps ascending.

    A step whose latest attempt lacks the line of a rank is left out, even where an earlier attempt had it
    whole: the run was killed within that step, after its last checkpoint, so that the step's work is lost and
    the next attempt will do it again. In a run that has ended there is none; :func:`incomplete_steps` names
    them.
    """
    return {
        step: [key for rank in range(world_size) for key in parts[rank]]
        for step, (_, world_size, parts) in _latest_attempts(path).items()
        if len(parts) == world_size
    }


def incomplete_steps(path: str | Path) -> dict[int, list[int]]:
    """step -> the ranks whose line is missing in the step's latest attempt."""
    return {
        step: [rank for rank in range(world_size) if rank not in parts]
        for step, (_, world_size, parts) in _latest_attempts(path).items()
        if len(parts) < world_size
    }
