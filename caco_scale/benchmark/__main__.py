"""``python -m caco_scale.benchmark loader``: a table, one JSON object on the last line, and ``--save FILE``."""

import argparse
import json
import os
import platform
from pathlib import Path

from rich.console import Console
from rich.table import Table

from caco_scale.errors import UserError, exit_on_user_error


class _Parser(argparse.ArgumentParser):
    """A typo is one line, exit code 2."""

    def error(self, message):
        raise UserError(f"{message}; see python -m caco_scale.benchmark --help")


def describe_machine():
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


def show(title, rows, machine):
    """The measurements as a table: one row per measurement, a column per figure."""
    table = Table(title=title, title_justify="left")
    columns = list(dict.fromkeys(name for row in rows for name in row))
    for number, name in enumerate(columns):
        table.add_column(name.replace("_", " "), justify="right" if number else "left")
    for row in rows:
        table.add_row(*("" if row.get(name) is None else f"{row[name]}" for name in columns))
    console = Console(soft_wrap=True, highlight=False)
    console.print(table)
    console.print(", ".join(f"{name} {value}" for name, value in machine.items()))


@exit_on_user_error
def main(arguments=None):
    parser = _Parser(prog="python -m caco_scale.benchmark", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    loader = commands.add_parser(
        "loader", help="two views of JPEGs against torchvision's ImageFolder and PIL"
    )
    loader.add_argument(
        "--images", metavar="DIR", help="folder of class folders; drawn (240 JPEGs) if not given"
    )
    loader.add_argument(
        "--rounds", type=int, default=3, metavar="N", help="times that each is measured, in turn"
    )
    loader.add_argument("--batch", type=int, default=60, metavar="N", help="images per batch")
    loader.add_argument("--size", type=int, default=224, metavar="PIXELS", help="side of a view")
    loader.add_argument("--save", metavar="FILE", help="write the JSON there, too")
    options = parser.parse_args(arguments)
    if min(options.rounds, options.batch, options.size) < 1:
        raise UserError("--rounds, --batch and --size must be at least 1")
    from caco_scale.benchmark.loader import measure

    machine = describe_machine()
    result = measure(options.images, options.rounds, options.batch, options.size)
    show("two views per image, one process", result["rows"], machine)
    text = json.dumps({"benchmark": "loader", "machine": machine, **result})
    print(text)
    if options.save:
        try:
            Path(options.save).write_text(text + "\n")
        except OSError as error:
            raise UserError(f"cannot write {options.save}: {error.strerror}") from None


if __name__ == "__main__":
    main()
