"""The command ``embed duplicates``: groups of near-duplicates by cosine, exact, in blocks.

Cosines are those of :mod:`caco_scale.evaluate.knn`, on a grid on which fp64 is exact: whether a pair is above does not
depend on blocks or devices. A product in fp32 says which rows of two blocks can have such a pair at all; only those are
computed in fp64. A group is a connected component: images that a row of pairs above the cosine joins.

Memory: two blocks of rows and their products, 16 bytes an image, and the names of what is left out. The rows lie in a
file without a name in the temporary directory meanwhile.

Shapes: n rows, F features, b rows of a block.
"""

import functools
import os
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from caco_scale.data.shards import MANIFEST_NAME
from caco_scale.embed.files import FeatureFile, open_features
from caco_scale.embed.show import (
    MOST_PICTURES,
    MOST_ROWS,
    Picture,
    Row,
    check_outputs,
    class_name,
    pictures_of,
    refuse_existing,
    write,
    write_page,
    write_table,
)
from caco_scale.errors import UserError, quoted
from caco_scale.evaluate.knn import on_grid
from caco_scale.run.progress import now_and_then

BLOCK_ROWS = 2048


def run(flags: Any) -> None:
    """``embed duplicates``: the list, and what else is asked for about the groups."""
    refuse_existing(flags.to, "--to")
    outputs = check_outputs(flags.groups, "--groups")
    with open_features(flags.features) as file, tempfile.TemporaryFile(prefix="caco-embed-") as scratch:
        rows = _spooled(file, scratch)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        first = groups_above(rows, flags.above, device, _say_progress(len(rows)))
        groups = _groups(first)
        _write_list(file, flags.to, np.flatnonzero(first != np.arange(len(first))))
        labels = file.integers("label")
        if outputs:
            _show(file, rows, labels, groups, outputs, flags)
        _summary(file, labels, groups, flags)


def groups_above(
    rows: NDArray,
    above: float,
    device: torch.device | str = "cpu",
    advance: Callable[[int], object] = bool,
    block_rows: int = BLOCK_ROWS,
) -> NDArray[np.int64]:
    """The first row of the group that each row is in, (n,): connected components of the pairs whose cosine is ``above``
    or more.

    ``rows``: (n, F), not normalised; read block by block. ``advance``: is given a number of pairs, as they are done.
    """
    first = np.arange(len(rows))
    starts = range(0, len(rows), block_rows)
    # What a cosine in fp32 may be off by: twice the bound of a sum of F products.
    margin = (rows.shape[1] + 4) * 2.0**-23
    load = lambda start: on_grid(torch.from_numpy(np.array(rows[start : start + block_rows])).to(device))
    for start in starts:
        block = load(start)
        for other_start in range(start, len(rows), block_rows):
            other = block if other_start == start else load(other_start)
            a, b = _pairs(block, other, above, margin)
            if other_start == start:
                a, b = a[a < b], b[a < b]
            _unite(first, a + start, b + other_start)
            advance(len(block) * len(other))
    return _roots(first, first.copy())


def _pairs(block, other, above, margin):
    """Places of all pairs of two blocks (b, F) on the grid whose cosine is at least ``above`` -> two arrays."""
    rough = block.float() @ other.float().T
    candidates = (rough >= above - margin).any(1).nonzero()[:, 0]
    exact = block[candidates] @ other.T
    a, b = (exact >= above).nonzero(as_tuple=True)
    return candidates[a].cpu().numpy(), b.cpu().numpy()


def _unite(first, a, b):
    """Join the groups of rows ``a`` and ``b`` pair by pair: of two first rows the lower one stays."""
    while True:
        a, b = _roots(first, a), _roots(first, b)
        apart = a != b
        if not apart.any():
            return
        a, b = a[apart], b[apart]
        np.minimum.at(first, np.maximum(a, b), np.minimum(a, b))


def _roots(first, rows):
    """The first row of the group of each of ``rows``; shortens the ways to it."""
    while True:
        above = first[rows]
        if (above == rows).all():
            return rows
        first[rows] = first[above]
        rows = above


def _spooled(file: FeatureFile, scratch) -> NDArray:
    """All rows of a file (n, F) as they are there, mapped from ``scratch``."""
    dtype = np.dtype(file.about["request"]["dtype"])
    try:
        for block in file.features():
            scratch.write(block.astype(dtype, copy=False).tobytes())
        scratch.flush()
    except OSError as error:
        need = file.num_rows * file.width * 4
        raise UserError(
            f"cannot hold the features in {tempfile.gettempdir()} ({error.strerror}; up to {need / 1e6:,.0f} MB): set "
            "TMPDIR to a place with room"
        ) from None
    return np.memmap(scratch, dtype, "r", shape=(file.num_rows, file.width))


def _say_progress(rows):
    """A function that is given numbers of pairs and says now and then how many are done."""
    total = rows * rows / 2

    def line(done, seconds):
        share = min(done / total, 1)
        return f"{share:.1%} of all pairs, {seconds * (1 / share - 1):,.0f} s left"

    return now_and_then(functools.partial(print, flush=True), line)


# ----------------------------------------------------------------------------------------------------
# What comes of it


def _groups(first) -> list[NDArray[np.int64]]:
    """The groups of two and more: their rows, ascending; by their first rows."""
    order = np.argsort(first, kind="stable")
    starts = np.flatnonzero(np.diff(first[order], prepend=-1))
    return [rows for rows in np.split(order, starts[1:]) if len(rows) > 1]


def _write_list(file, path, left_out):
    chosen, lines = set(left_out.tolist()), []
    for row, name in enumerate(file.names()):
        if row in chosen:
            if len(name.splitlines()) > 1:
                raise UserError(
                    f"{name!r} has a line break in its name, which no list can hold: rename that image"
                )
            lines.append(f"{name}\n")
    write(path, "".join(lines).encode())


def _show(file, rows, labels, groups, outputs, flags):
    inside = {row for group in groups for row in group.tolist()}
    names = {row: name for row, name in enumerate(file.names()) if row in inside}
    keys = {row: key for row, key in enumerate(file.texts("key")) if row in inside}
    if ".csv" in outputs:
        write_table(outputs[".csv"], list(_table(file, rows, labels, groups, names, keys)))
    if ".html" in outputs:
        write_page(
            outputs[".html"],
            f"Near-duplicates in {file.path.name}",
            *_page(file, rows, labels, groups[:MOST_ROWS], names, len(groups), flags),
        )
    for path in outputs.values():
        print(f"wrote {path}", flush=True)


def _cosines(rows, group):
    """Of each of a group's rows with its first one."""
    on = on_grid(torch.from_numpy(np.array(rows[group])))
    return (on @ on[0]).clamp(max=1).tolist()  # the grid may add 1e-8


def _table(file, rows, labels, groups, names, keys) -> Iterator[dict[str, Any]]:
    for number, group in enumerate(groups, 1):
        for place, (row, cosine) in enumerate(zip(group.tolist(), _cosines(rows, group), strict=True)):
            yield {
                "group": number,
                "kept": "no" if place else "yes",
                "cosine": cosine,
                "key": keys[row],
                "source": "" if names[row] == keys[row] else names[row],
                "class": class_name(file, int(labels[row])),
            }


def _page(file, rows, labels, groups, names, total, flags):
    sizes = [len(group) for group in groups]
    groups = [group[:MOST_PICTURES] for group in groups]
    indexes = file.integers("index")
    uris, note = pictures_of(file, [int(indexes[r]) for g in groups for r in g], flags.data, flags.cache_dir)
    found = []
    for number, (group, size) in enumerate(zip(groups, sizes, strict=True), 1):
        kinds = [class_name(file, int(labels[row])) for row in group]
        pictures = [
            Picture(
                ", ".join(filter(None, (names[row], kind))),
                f"{cosine:.4f}" if place else "kept",
                uris.get(int(indexes[row]), ""),
                kind != kinds[0],
            )
            for place, (row, kind, cosine) in enumerate(
                zip(group.tolist(), kinds, _cosines(rows, group), strict=True)
            )
        ]
        found.append(Row(f"group {number}", f"{size:,} images · {names[int(group[0])]}", pictures))
    lines = [
        f"{total:,} groups whose images a cosine of {flags.above:g} or more of their {file.name} joins, of "
        f"{file.num_rows:,} images of {file.about['data']}; below each the cosine with the one that is kept; red: of "
        "another class than it."
    ]
    if total > len(groups) or max(sizes, default=0) > MOST_PICTURES:
        lines.append(f"At most {MOST_ROWS} groups and {MOST_PICTURES} images of each are shown.")
    return [*lines, *([note] if note else [])], found


def _summary(file, labels, groups, flags):
    inside = sum(map(len, groups))
    mixed = sum(len(np.unique(labels[group])) > 1 for group in groups)
    print(
        f"{len(groups):,} groups of {inside:,} images at a cosine of {flags.above:g} or more"
        + (f" ({mixed:,} groups of several classes)" if mixed else "")
        + f": {inside - len(groups):,} of {file.num_rows:,} images in {flags.to}"
    )
    source = file.about["data"] if os.path.isdir(file.about["data"]) else "SRC"
    built = os.path.exists(os.path.join(source, MANIFEST_NAME))
    print(
        f"a set without them: python -m data_prep build {'SRC' if built else quoted(source)} SHARDS --without "
        f"{quoted(flags.to)}"
    )
