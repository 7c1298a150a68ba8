"""What a build shows while it runs and at its end: a rich bar on a terminal, plain lines elsewhere."""

import time
from collections.abc import Sequence

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from caco_scale.data.shards import Manifest

PLAIN_EVERY_SECONDS = 5.0
MOST_EXAMPLES = 5


def printable(text: str) -> str:
    """Names of files may hold anything: control characters and what is not UTF-8 are shown as escapes."""
    text = text.encode("utf-8", "backslashreplace").decode()
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


class BuildProgress:
    """Progress over images, advanced shard by shard. ``quiet`` shows nothing."""

    def __init__(self, label: str, num_images: int, quiet: bool = False):
        self.label, self.num_images, self.quiet = label, num_images, quiet
        self.console = Console(stderr=True, markup=False, highlight=False)
        self.done = self.fresh = self.num_bytes = 0
        self.start = self.last_line = time.monotonic()
        self.bar = None

    def __enter__(self):
        if self.console.is_terminal and not self.quiet:
            columns = TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[rate]}")
            self.bar = Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=self.console)
            self.task = self.bar.add_task(self.label, total=self.num_images, rate="")
            self.bar.start()
        return self

    def __exit__(self, *_):
        if self.bar:
            self.bar.stop()

    def advance(self, num_images: int, num_bytes: int, kept: bool) -> None:
        """One shard is there; ``kept``: it was there from an earlier run and does not count for the rate."""
        self.done += num_images
        if not kept:
            self.fresh += num_images
            self.num_bytes += num_bytes
        now = time.monotonic()
        if self.bar:
            self.bar.update(self.task, completed=self.done, rate=self._rate(now))
        elif not self.quiet and (now - self.last_line > PLAIN_EVERY_SECONDS or self.done == self.num_images):
            self.last_line = now
            self.console.print(self._line(now), soft_wrap=True)

    def _rate(self, now):
        seconds = max(now - self.start, 1e-3)
        return f"{self.fresh / seconds:,.0f} images/s  {self.num_bytes / seconds / 1e6:,.1f} MB/s"

    def _line(self, now):
        left = (self.num_images - self.done) * (now - self.start) / max(self.fresh, 1)
        done = f"{self.label}: {self.done:,}/{self.num_images:,} images"
        return f"{done}  {self._rate(now)}  {left:,.0f} s left"


def print_summary(results: Sequence[tuple[str, Manifest]], seconds: float) -> None:
    """The table at the end of a build, and the first few of what was fixed or rejected."""
    console = Console(markup=False, highlight=False)
    table = Table("set", "samples", "shards", "bytes", "fixed", "rejected")
    for column in table.columns[1:]:
        column.justify = "right"
    for path, manifest in results:
        numbers = manifest.num_samples, len(manifest.shards), manifest.num_bytes
        counts = len(manifest.fixed), len(manifest.rejected)
        table.add_row(printable(str(path)), *(f"{n:,}" for n in (*numbers, *counts)))
    console.print(table)
    for path, manifest in results:
        for what, notes in (("fixed", manifest.fixed), ("rejected", manifest.rejected)):
            for note in notes[:MOST_EXAMPLES]:
                console.print(
                    f"{what} {printable(note['source'])}: {printable(note['reason'])}", soft_wrap=True
                )
            if len(notes) > MOST_EXAMPLES:
                more = f"... {len(notes) - MOST_EXAMPLES:,} more {what}: see {path}/manifest.json"
                console.print(printable(more), soft_wrap=True)
    console.print(f"{seconds:,.1f} seconds")


def say(*lines: str) -> None:
    """Print lines as they are, whatever a file's name holds."""
    console = Console(markup=False, highlight=False)
    for line in lines:
        console.print(printable(line), soft_wrap=True)
