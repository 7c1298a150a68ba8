"""The command ``embed neighbours``: for some images the k nearest of a file by cosine, exact.

Cosines are those of :mod:`caco_scale.evaluate.knn`, on a grid on which fp64 is exact: equal ones are really equal, and
the lowest row comes first among them. An image of the file is none of its own neighbours.

Shapes: q query images, F features, b a block of rows.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from caco_scale.data.decode import decode
from caco_scale.data.pixels import CorruptSample
from caco_scale.data.small_files import open_regular
from caco_scale.data.store import open_store
from caco_scale.data.store.listed import ListedStore
from caco_scale.data.thumbnails import data_uri
from caco_scale.data.views import centre_crop
from caco_scale.embed.extract import encoded
from caco_scale.embed.files import FeatureFile, open_features
from caco_scale.embed.show import (
    MOST_PICTURES,
    MOST_ROWS,
    Picture,
    Row,
    check_outputs,
    class_name,
    pictures_of,
    write_page,
    write_table,
)
from caco_scale.errors import UserError, did_you_mean
from caco_scale.evaluate.features import feature_batches
from caco_scale.evaluate.knn import Candidates, nearest
from caco_scale.evaluate.results import show
from caco_scale.evaluate.task import Encoding, encoding_of, processes_of
from caco_scale.weights.build import digest
from caco_scale.weights.load import load_weights

PRECISIONS = {"float32": "fp32", "float64": "fp64", "bfloat16": "bf16"}
FEW_NAMES = 100_000  # among which a likely one is looked for


@dataclass
class Query:
    """An image to look for: its name, its row in the file (-1: it is none of the file's), its picture."""

    name: str
    row: int = -1
    uri: str = ""


def run(flags: Any) -> None:
    """``embed neighbours``: a table and a page."""
    outputs = check_outputs(flags.to, "--to")
    with open_features(flags.features) as file:
        rows = _find(file, flags.query)
        images = [word for word in flags.query if word not in rows]
        _check_words(file, images)
        most = file.num_rows - (1 if rows else 0)
        if flags.k > most:
            others = "other images" if rows else "images"
            raise UserError(f"--k {flags.k} needs as many {others}, but {file.path} has {most:,}: give less")
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        queries = [Query(word, row) for word, row in rows.items()]
        features = [_rows(file, np.array([query.row for query in queries], np.int64))]
        if images:
            found, of_images = _encode(file, images, flags)
            queries, features = queries + found, [*features, of_images]
        matrix = torch.from_numpy(np.concatenate(features).astype(np.float32)).to(device)
        found = find_nearest(file, matrix, flags.k, [query.row for query in queries])
        _show(file, queries, found, outputs, flags)


def find_nearest(
    file: FeatureFile, queries: torch.Tensor, k: int, own: Sequence[int]
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """The nearest rows of a file: queries (q, F) -> cosines and rows (q, k), best first, of equals the lowest row.

    ``own``: the row of the file that each query is, which is left out; -1: none.
    """
    wanted = min(k + 1, file.num_rows)
    best, first = Candidates.none(len(queries), wanted, queries.device), 0
    for block in file.features():
        numbers = torch.arange(first, first + len(block))
        rows = torch.from_numpy(np.array(block, np.float32))
        here = nearest(queries, rows, torch.zeros_like(numbers), numbers, min(wanted, len(block)), len(block))
        best, first = best.merged(here, wanted), first + len(block)
    cosines, numbers = best.similarities.cpu().numpy(), best.ids.cpu().numpy()
    kept = [np.flatnonzero(row != mine)[:k] for row, mine in zip(numbers, own, strict=True)]
    return (
        np.stack([row[places] for row, places in zip(cosines, kept, strict=True)]),
        np.stack([row[places] for row, places in zip(numbers, kept, strict=True)]),
    )


# ----------------------------------------------------------------------------------------------------
# What is looked for


def _find(file, words):
    """{word: row} of the words that are a key or a source of the file; a key wins."""
    wanted, found = dict.fromkeys(words), {}
    for column in ("source", "key"):
        for row, name in enumerate(file.texts(column)):
            if name in wanted:
                found[name] = row
    return {word: found[word] for word in wanted if word in found}


def _check_words(file, words):
    """UserError for a word that is neither a name of the file nor an image."""
    for word in words:
        if not Path(word).exists() and "://" not in word:
            names = list(file.names()) if file.num_rows <= FEW_NAMES else []
            raise UserError(
                f"--query {word} is no key and no source in {file.path}{did_you_mean(word, names)}, and no image either"
            )


def _rows(file, rows):
    """The features of some rows, in their order (n, F)."""
    found, first = np.empty((len(rows), file.width), np.float32), 0
    for block in file.features() if len(rows) else ():
        here = (rows >= first) & (rows < first + len(block))
        found[here] = block[rows[here] - first]
        first += len(block)
    return found


def _encode(file, places, flags):
    """Query images that are not in the file, by the file's encoder -> (queries, features (n, F))."""
    task = _encoding(file, flags)
    encode = partial(encoded, task.weights, file.about["request"]["layer"])
    queries, parts = [], []
    for place in places:
        names, batches = _images(place, task, flags)
        names = iter(names)
        for crops in batches:
            queries += [Query(next(names), uri=data_uri(np.asarray(crop))) for crop in crops]
            batch = [(torch.arange(len(crops)), crops, torch.full((len(crops),), -1))]
            (features, _, _) = next(feature_batches(encode, batch, unit_norm=False, **task.extraction()))
            parts.append(features.numpy().astype(file.about["request"]["dtype"]))
    return queries, np.concatenate(parts).astype(np.float32)


def _encoding(file, flags):
    request, source = file.about["request"], file.about["weights"]
    named = flags.arch or (
        None if ":" in (source["arch"] or "") else source["arch"]
    )  # no file says what is run
    how = source["which"], None, named, source["stem"]
    if flags.weights:
        weights = load_weights(flags.weights, *how)
    else:
        try:
            weights = load_weights(source["path"], *how)
        except UserError as error:
            raise UserError(f"{error}; --weights says where the encoder of {file.path} is now") from None
    projector = digest(weights.projector) if "projector" in request and weights.projector else None
    if (weights.sha256, projector) != (request["weights"], request.get("projector")):
        raise UserError(
            f"{weights.path} is not the encoder of {file.path} (its {request['layer']} has other numbers): give that "
            "one as --weights"
        )
    same = {name: request[name] for name in ("size", "resize", "mean", "std")}
    asked = SimpleNamespace(
        **same,
        precision=PRECISIONS[request["compute"]],
        images_at_once=flags.images_at_once,
        workers=flags.workers,
    )
    accelerator = processes_of(SimpleNamespace(world_size=0, timeout_seconds=1800))
    return Encoding(**encoding_of(asked, accelerator, replace(weights, pixels=file.pixels)))


def _images(place, task, flags):
    """(names, batches of crops (b, s, s, C)) of an image file, a folder of images or a shard set."""
    if Path(place).is_file():
        try:
            with open_regular(place) as stream:
                image = decode(stream.read(), task.weights.pixels)
        except (OSError, CorruptSample) as error:
            raise UserError(f"--query {place} is no image that can be read: {error}") from None
        return [place], [centre_crop(image, task.size, task.resize)[None]]
    store = open_store(place, flags.cache_dir, flag="--query", pixels=task.weights.pixels)
    store.check()
    lost = []
    batches = list(task.evaluation_batches(store, lost))
    for image in lost:
        print(f"no query: {image.name} does not decode ({image.error})", flush=True)
    numbers = np.concatenate([np.asarray(ids) for ids, _, _ in batches])
    if not len(numbers):
        raise UserError(f"--query {place}: none of its images decodes")
    names = store.names(numbers)
    names = [name.partition("/")[2] for name in names] if isinstance(store, ListedStore) else names
    return names, [crops for ids, crops, _ in batches if len(ids)]


# ----------------------------------------------------------------------------------------------------
# What is shown


def _show(file, queries, found, outputs, flags):
    cosines, rows = found
    wanted = set(rows.ravel().tolist()) | {query.row for query in queries}
    names = {row: name for row, name in enumerate(file.names()) if row in wanted}
    keys = {row: key for row, key in enumerate(file.texts("key")) if row in wanted}
    labels, indexes = file.integers("label"), file.integers("index")
    table = list(_table(file, queries, cosines, rows, names, keys, labels))
    if ".csv" in outputs:
        write_table(outputs[".csv"], table)
    if ".html" in outputs:
        page = _page(file, queries, cosines, rows, names, labels, indexes, flags)
        write_page(outputs[".html"], f"Nearest images in {file.path.name}", *page)
    if not outputs:
        columns = (
            "query",
            "place",
            "cosine",
            "image",
            "class",
        )  # one name of each, so that a console has room
        named = [
            {**row, "cosine": f"{row['cosine']:.6f}", "image": row["source"] or row["key"]} for row in table
        ]
        shown = [{name: row[name] for name in columns} for row in named]
        show(f"nearest images in {file.path}", shown)
    for path in outputs.values():
        print(f"wrote {path}", flush=True)


def _table(file, queries, cosines, rows, names, keys, labels) -> Iterator[dict[str, Any]]:
    for query, similar, nearest_rows in zip(queries, cosines.tolist(), rows.tolist(), strict=True):
        for place, (cosine, row) in enumerate(zip(similar, nearest_rows, strict=True), 1):
            name = names[row]
            yield {
                "query": query.name,
                "place": place,
                "cosine": min(cosine, 1.0),  # the grid may add 1e-8
                "key": keys[row],
                "source": "" if name == keys[row] else name,
                "class": class_name(file, int(labels[row])),
            }


def _page(file, queries, cosines, rows, names, labels, indexes, flags):
    shown = min(len(queries), MOST_ROWS)
    wanted = [
        r for r in {*rows[:shown, :MOST_PICTURES].ravel().tolist(), *(q.row for q in queries)} if r >= 0
    ]
    uris, note = pictures_of(file, indexes[wanted].tolist(), flags.data, flags.cache_dir)
    uri = lambda row: uris.get(int(indexes[row]), "")
    found = []
    for query, similar, near in zip(queries[:shown], cosines.tolist(), rows.tolist(), strict=False):
        own = class_name(file, int(labels[query.row])) if query.row >= 0 else ""
        pictures = [Picture(query.name, "query", query.uri or uri(query.row))]
        for cosine, row in list(zip(similar, near, strict=True))[:MOST_PICTURES]:
            kind = class_name(file, int(labels[row]))
            name = f"{names[row]}, {kind}" if kind else names[row]
            pictures.append(Picture(name, f"{cosine:.4f}", uri(row), bool(own) and kind != own))
        found.append(Row(query.name, own, pictures))
    lines = [
        f"By the cosine of {file.name} ({file.width:,} numbers), the best first, among {file.num_rows:,} images of "
        f"{file.about['data']}; red: of another class than the query."
    ]
    if shown < len(queries):
        lines.append(f"The first {shown} of {len(queries):,} query images.")
    return [*lines, *([note] if note else [])], found
