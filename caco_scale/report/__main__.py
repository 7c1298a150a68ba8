"""A run, or several side by side, as one HTML page that needs no network.

    python -m caco_scale.report RUN [RUN2 ...] [--to FILE] [--images N] [--map pca]

Several runs share the axes of every chart, and a table says in what their configurations differ. Curves, the bank's
health, pictures of what bank and backbone see (by the run's newest checkpoint and its shard sets), a map of the
features, incidents, configuration, environment. One process; a CUDA device is used for the pictures if there is one.
Nothing in the run's directory changes but the page, which by default is RUN/report.html.
"""

import importlib.util
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional

from caco_scale.errors import UserError, exit_on_user_error
from caco_scale.flags.choices import MapMethod
from caco_scale.flags.read import read, shown
from caco_scale.flags.rules import FROM_0


def write_report(
    directories: Sequence[str | Path],
    to: str | Path | None = None,
    images: int | None = None,
    arch: str | None = None,
    map_method: MapMethod = "auto",
) -> Path:
    """Write the page about the runs in ``directories`` to the file ``to`` -> its Path.

    ``images``: how many of each shard set are looked at for the pictures, 0 for no pictures, None for a number
    that fits a moderate memory; ``arch``: the function of the user's own that built the runs' backbones;
    ``map_method``: how features are laid in a plane. Raises UserError: no run, no metrics, a package that is not there,
    a page that cannot be written.
    """
    from caco_scale.atomic import write_atomically
    from caco_scale.report.runs import MAX_RUNS, read_runs
    from caco_scale.run.files import check_target

    if len(directories) > MAX_RUNS:
        raise UserError(f"{len(directories)} runs are more than can be told apart: give at most {MAX_RUNS}")
    check_map(map_method)
    runs = read_runs(directories)
    target = Path(to) if to else runs[0].path / "report.html"
    check_target(to or target, "--to" if to else "the page")
    try:  # after the looks above, which load neither this nor torch
        from caco_scale.report.page import build_page
    except ModuleNotFoundError as error:
        raise UserError(f"the report needs {error.name}: pip install {error.name}") from None
    from caco_scale.report.pictures import Pictures, draw_pictures

    pictures = []
    for run in runs:
        if images == 0:
            pictures.append(Pictures(["No pictures: --images 0."]))
            continue
        print(f"{run.name}: pictures of {run.checkpoint or 'no checkpoint'}", file=sys.stderr, flush=True)
        pictures.append(draw_pictures(run, images, arch, map_method))
    try:
        write_atomically(target, build_page(runs, pictures))
    except OSError as error:
        raise UserError(f"{target} cannot be written: {error.strerror or error}") from None
    for run, drawn in zip(runs, pictures, strict=True):
        for note in drawn.notes:
            print(f"note: {run.name}: {note}", file=sys.stderr, flush=True)
    return target


def check_map(method: MapMethod) -> None:
    """UserError where the package that a map wants is not there."""
    packages = {"tsne": ("sklearn", "scikit-learn"), "umap": ("umap", "umap-learn")}
    module, package = packages.get(method, ("", ""))
    if module and importlib.util.find_spec(module) is None:
        raise UserError(f"--map {method} needs {package}: pip install {package}, or give --map pca")


PROG = "python -m caco_scale.report"


@dataclass(frozen=True, kw_only=True)
class Report:
    """A run, or several side by side, as one HTML page that needs no network."""

    runs: Positional[Annotated[tuple[str, ...], shown("RUN [RUN ...]")]]
    """Run directory; several are shown side by side."""
    to: Annotated[str | None, shown("FILE")] = None
    """File to write (default: report.html in the first RUN)."""
    images: Annotated[int | None, FROM_0, shown("N")] = None
    """Images of each shard set looked at for the pictures, 0 = no pictures (default: what fits a moderate memory)."""
    map: MapMethod = "auto"
    """Map of the features: pca, tsne (needs scikit-learn), umap (umap-learn); auto = the last of them there."""
    arch: Annotated[str | None, shown("ARCH")] = None
    """Your own package.module:callable, of runs whose backbone it has built (default: no pictures of these)."""


@exit_on_user_error
def main(arguments: Sequence[str] | None = None, prog: str = PROG) -> None:
    """Write the page; exit code 2 on a user's mistake."""
    flags = read(Report, sys.argv[1:] if arguments is None else arguments, prog)
    target = write_report(flags.runs, flags.to, flags.images, flags.arch, flags.map)
    print(f"wrote {target} ({target.stat().st_size / 1e6:.1f} MB)")


if __name__ == "__main__":
    main()
