"""A run, or several side by side, as one HTML page that needs no network.

    python -m caco_scale.report RUN [RUN2 ...] [--to FILE] [--images N]

Curves, the bank's health, pictures of what bank and backbone see (by the run's newest checkpoint and its shard
sets), incidents, configuration, environment. One process; a CUDA device is used for the pictures if there is one.
Nothing in the run's directory changes but the page, which by default is RUN/report.html.
"""

import os
import sys
from pathlib import Path

from caco_scale.errors import Parser, UserError, exit_on_user_error


def write_report(directories, to=None, images=None):
    """Write the page about the runs in ``directories`` to the file ``to`` -> its Path.

    ``images``: how many of each shard set are looked at for the pictures, 0 for no pictures, None for a number
    that fits a moderate memory. Raises UserError: no run, no metrics, a page that cannot be written.
    """
    try:
        from caco_scale.report.curves import MAX_RUNS
        from caco_scale.report.page import build_page
        from caco_scale.report.runs import read_runs
    except ModuleNotFoundError as error:
        raise UserError(f"the report needs {error.name}: pip install {error.name}") from None
    from caco_scale.atomic import write_atomically
    from caco_scale.report.pictures import Pictures, draw_pictures

    if len(directories) > MAX_RUNS:
        raise UserError(f"{len(directories)} runs are more than can be told apart: give at most {MAX_RUNS}")
    runs = read_runs(directories)
    target = Path(to) if to else runs[0].path / "report.html"
    if os.path.isdir(target):
        raise UserError(f"{target} is a directory: give the name of a file in it")
    if os.path.exists(target) and not os.path.isfile(target):
        raise UserError(f"{target} is no ordinary file: give the name of one to write")
    if not os.path.isdir(target.parent):
        raise UserError(f"{target} cannot be written: there is no directory {target.parent}")
    pictures = []
    for run in runs:
        if images == 0:
            pictures.append(Pictures(["No pictures: --images 0."]))
            continue
        print(f"{run.name}: pictures of {run.checkpoint or 'no checkpoint'}", file=sys.stderr, flush=True)
        pictures.append(draw_pictures(run, images))
    try:
        write_atomically(target, build_page(runs, pictures).encode())
    except OSError as error:
        raise UserError(f"{target} cannot be written: {error.strerror or error}") from None
    for run, drawn in zip(runs, pictures, strict=True):
        for note in drawn.notes:
            print(f"note: {run.name}: {note}", file=sys.stderr, flush=True)
    return target


def _count(text):
    number = int(text)
    if number < 0:
        raise ValueError(text)
    return number


@exit_on_user_error
def main(arguments=None):
    parser = Parser(
        prog="python -m caco_scale.report", description=__doc__.splitlines()[0], allow_abbrev=False
    )
    parser.add_argument(
        "runs", nargs="+", metavar="RUN", help="run directory; several are shown side by side"
    )
    parser.add_argument("--to", metavar="FILE", help="file to write (default: report.html in the first RUN)")
    parser.add_argument(
        "--images",
        type=_count,
        metavar="N",
        help="images of each shard set looked at for the pictures; 0: no pictures",
    )
    flags = parser.parse_args(arguments)
    target = write_report(flags.runs, flags.to, flags.images)
    print(f"wrote {target} ({target.stat().st_size / 1e6:.1f} MB)")


if __name__ == "__main__":
    main()
