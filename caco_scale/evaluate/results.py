"""Where an evaluation keeps its state and its result, and how sure its figures are.

<folder>/settings.json     what is evaluated and how: the same command finds its folder again by it
<folder>/result.json       appears when the evaluation is finished
<folder>/...               progress of an evaluation that takes long
"""

import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from caco_scale.atomic import write_atomically
from caco_scale.distributed.collectives import assert_equal_on_all_ranks
from caco_scale.errors import UserError
from caco_scale.run.files import to_json
from caco_scale.run.lock import be_alone

CONFIDENCE = 95
WORST = 5  # classes that are shown
Z = 1.959963984540054  # of the standard normal, two-sided 95%
INTERVAL_WORDS = (
    f"{CONFIDENCE}% intervals are Wilson's: over the validation images, not over seeds of training"
)


def interval(correct: int, total: int) -> tuple[float, float]:
    """Wilson's score interval of an accuracy, ``correct`` of ``total`` images: (low, high) in percent.

    It covers which images were drawn for validation, not what another seed of training would give. Unlike the bootstrap
    it keeps its coverage near 0 and 1 and for few images (Wilson, 1927; Brown, Cai and DasGupta, 2001).
    """
    share, spread = correct / total, Z**2 / total
    centre = (share + spread / 2) / (1 + spread)
    half = math.sqrt(spread * (share * (1 - share) + spread / 4)) / (1 + spread)
    low = 0.0 if correct == 0 else centre - half
    high = 1.0 if correct == total else centre + half
    return 100 * low, 100 * high


def same_set(train: str, val: str) -> str:
    """The warning of a validation set that is the training set. ``train``, ``val``: the flags that name them."""
    return (
        f"{train} and {val} are the same images: every image finds itself, and the figures say nothing about "
        f"others. Give {val} images that are not in {train}"
    )


def undecodable_line(which: str, images: Sequence[tuple[str, str]], total: int, shown: int = 3) -> str:
    """What the images of a set that do not decode mean for a figure.

    Args:
        which: ``train`` or ``val``; ``images``: (name, error) of each; ``total``: how many the set has.
    """
    kind, counted = {"val": ("validation", "counted as wrong"), "train": ("training", "left out")}[which]
    return not_decoding(images, total, f"{kind} images", f", {counted}", shown)


def not_decoding(images: Sequence[tuple[str, str]], total: int, what: str, means: str, shown: int = 3) -> str:
    """How many of ``total`` images do not decode, what that ``means``, and (name, error) of the first."""
    names = "; ".join(f"{name} ({error})" for name, error in images[:shown])
    more = f"; and {len(images) - shown:,} more" if len(images) > shown else ""
    verb = "does" if len(images) == 1 else "do"
    return f"{len(images):,} of {total:,} {what} {verb} not decode{means}: {names}{more}"


def result_notes(result: Mapping[str, Any], right: Sequence[int]) -> list[str]:
    """Lines below the figures of a result: what they cover, and the worst of its classes.

    ``right``: how many images of each class were right. A result of an older version has less to say.
    """
    notes = [INTERVAL_WORDS]
    for which, images in (result.get("undecodable") or {}).items():
        if images:
            notes.append(undecodable_line(which, images, result["data"][which]["images"]))
    classes, images = result.get("classes") or [], result.get("images_per_class") or []
    present = [(100 * r / n, name, n) for r, name, n in zip(right, classes, images, strict=False) if n]
    worst = ", ".join(f"{name} {share:.1f}% of {n:,}" for share, name, n in sorted(present)[:WORST])
    if len(present) > 1:
        notes.append(f"worst of {len(present):,} classes: {worst}")
    if len(present) < len(classes):
        notes.append(f"no validation image of {len(classes) - len(present):,} of {len(classes):,} classes")
    return notes


class ResultFolder:
    """The folder of one evaluation; ``settings`` are plain values that decide its result.

    Args:
        to: the folder that the user names, or None: a place below ``base`` of its own for these settings.
        name: how its name begins there.
        is_main: only the main rank writes.
        what: is done there, in messages.
    Raises:
        UserError: on every rank: the folder holds another evaluation, is in use, or cannot be written.
    """

    def __init__(
        self,
        to: str | Path | None,
        base: str | Path,
        name: str,
        settings: Mapping[str, Any],
        is_main: bool,
        what: str = "evaluation",
    ):
        digest = hashlib.sha256(to_json(settings, sort_keys=True).encode()).hexdigest()
        self.path = Path(to) if to else Path(base) / f"{name}-{digest[:8]}"
        self.settings, self.is_main, self._lock = json.loads(to_json(settings)), is_main, None
        self._what, complaint = what, None
        try:
            if is_main:
                self._open()
        except UserError as error:
            complaint = str(error)
            if self._lock is not None:
                self._lock.close()
        assert_equal_on_all_ranks({}, what, error=complaint)

    def _open(self):
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = open(self.path / ".lock", "a")  # noqa: SIM115, held as long as the process lives
        except OSError as error:
            raise UserError(
                f"cannot write {self.path}: {error.strerror}; name another place with --to"
            ) from None
        be_alone(
            self._lock, f"{self.path} is in use by another {self._what}: end that one, or give another --to"
        )
        found = self._read("settings.json")
        if found is None:
            self.write("settings.json", self.settings)
        elif found != self.settings:
            names = sorted(n for n in {*found, *self.settings} if found.get(n) != self.settings.get(n))
            changed = "; ".join(f"{n}: {found.get(n)} -> {self.settings.get(n)}" for n in names)
            raise UserError(f"{self.path} holds another {self._what} ({changed}): give another --to")

    def _read(self, name):
        try:
            content = json.loads((self.path / name).read_text())
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise UserError(
                f"{self.path / name} cannot be read ({error}): remove it, or give another --to"
            ) from None
        return content if isinstance(content, dict) else {}

    def finished(self) -> dict[str, Any] | None:
        """The result that a former start of the same command has left, or None. Any rank may ask."""
        return self._read("result.json")

    def write(self, name: str, content: Any) -> None:
        """A JSON file of the folder, atomically; on the main rank."""
        self.write_bytes(name, (to_json(content, indent=1) + "\n").encode())

    def write_bytes(self, name: str, data: bytes) -> None:
        if not self.is_main:
            return
        try:
            write_atomically(self.path / name, data)
        except OSError as error:
            raise UserError(
                f"cannot write {self.path / name}: {error.strerror}; free or fix that place and start again"
            ) from None


def show(title: str, rows: Sequence[Mapping[str, Any]], notes: Iterable[str] = ()) -> None:
    """A table with a column for every figure of ``rows`` (dicts), and lines below it."""
    table = Table(title=title, title_justify="left")
    columns = list(dict.fromkeys(name for row in rows for name in row))
    for column in columns:
        table.add_column(column, justify="left" if isinstance(rows[0].get(column), str) else "right")
    for row in rows:
        table.add_row(*(_text(row.get(column)) for column in columns))
    console = Console(soft_wrap=True, highlight=False)
    console.print(table)
    for note in notes:
        console.print(note, markup=False)


def _text(value):
    if isinstance(value, float):
        return f"{value:.2f}"
    if isinstance(value, (list, tuple)):
        return " to ".join(_text(part) for part in value)
    return "" if value is None else str(value)
