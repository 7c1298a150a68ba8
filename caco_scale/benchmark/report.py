"""What every benchmark prints and saves: a table, the machine, one JSON object on the last line."""

import json
import os
import platform
import sys
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from caco_scale.errors import UserError


def describe_machine() -> dict[str, Any]:
    """What a figure without it would be worth nothing: processor, cores, memory, versions, load."""
    import torch

    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [
            line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line
        ]
        model = names[0] if names else model
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "processor": model,
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": memory,
        "load_before": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
    }


def show(
    title: str,
    rows: Sequence[Mapping[str, Any]],
    machine: Mapping[str, Any] | None = None,
    notes: Sequence[str] = (),
) -> None:
    """The measurements as a table: one row per measurement, a column per figure; below it what must be known."""
    table = Table(title=title, title_justify="left")
    columns = list(dict.fromkeys(name for row in rows for name in row))
    for number, name in enumerate(columns):
        table.add_column(name.replace("_", " "), justify="right" if number else "left")
    for row in rows:
        table.add_row(*(_cell(row.get(name)) for name in columns))
    width = None if sys.stdout.isatty() else 160  # a log has no width, and a folded figure is hard to read
    console = Console(soft_wrap=True, highlight=False, width=width)
    console.print(table)
    for line in notes:
        console.print(line, markup=False)
    if machine:
        console.print(", ".join(f"{name} {value}" for name, value in machine.items()), markup=False)


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else f"{value}"


def publish(benchmark: str, machine: Mapping[str, Any], result: Mapping[str, Any], save: str | None) -> None:
    """Print the JSON, and with ``save``, a directory, write it to ``<benchmark>_<date>_<time>.json`` there."""
    now = datetime.now().astimezone()
    machine = {**machine, "load_after": round(os.getloadavg()[0], 2)}
    text = json.dumps(
        {"benchmark": benchmark, "date": now.isoformat(timespec="seconds"), "machine": machine, **result}
    )
    print(text)
    if save:
        path = Path(save) / f"{benchmark}_{now:%Y-%m-%d_%H%M%S}.json"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text + "\n")
        except OSError as error:
            raise UserError(f"cannot write {path}: {error.strerror}") from None
