"""The command ``embed``: features of every image of a set, by any number of processes, in one file."""

import json
import shutil
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from caco_scale import __version__
from caco_scale.data.addresses import is_remote, local_path
from caco_scale.data.loader import evaluation_batches
from caco_scale.data.pipeline import Undecodable
from caco_scale.data.store.base import Store
from caco_scale.data.store.listed import ListedStore
from caco_scale.distributed.collectives import gather_objects
from caco_scale.embed.files import NAMES, kind_of, open_features, write_features
from caco_scale.embed.parts import Parts, part_path, part_ranges, write_part
from caco_scale.errors import UserError, with_article
from caco_scale.evaluate.features import feature_batches
from caco_scale.evaluate.listed import originals_of
from caco_scale.evaluate.results import ResultFolder, not_decoding
from caco_scale.evaluate.task import (
    Encoding,
    encoding_of,
    introduce_encoder,
    open_images,
    processes_of,
    weights_of,
)
from caco_scale.method.patches import has_patch_tokens, patch_tokens
from caco_scale.run.files import check_target, remove_leftovers
from caco_scale.run.progress import now_and_then
from caco_scale.weights.build import digest
from caco_scale.weights.load import Weights

MOST_NAMED = 10_000  # images that do not decode, by name in the file


@dataclass
class Extraction(Encoding):
    """An :class:`Encoding` and the images that it is to encode. ``dtype_there``: in the file."""

    store: Store
    layer: str
    dtype_there: type[np.floating]

    def describe(self) -> dict[str, Any]:
        projector = self.weights.projector
        more = {"projector": digest(projector)} if self.layer == "projector" and projector is not None else {}
        return {
            **super().describe(),
            **more,
            "images": self.store.fingerprint(),
            "layer": self.layer,
            "dtype": np.dtype(self.dtype_there).name,
            "images_at_once": self.images_at_once,  # a batch's composition moves the last digits
            "device": self.device.type,
        }

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """Normalised images (b, 3, s, s) -> (b, F)."""
        return encoded(self.weights, self.layer, images)


def encoded(weights: Weights, layer: str, images: torch.Tensor) -> torch.Tensor:
    """What a layer, backbone, projector or patches, makes of normalised images (b, 3, s, s) -> (b, F)."""
    if layer == "patches":
        return patch_tokens(weights.backbone, images).flatten(1)
    features = weights.backbone(images)
    if layer == "projector":
        assert weights.projector is not None
        return weights.projector(features)
    return features


def run(flags: Any) -> None:
    """``embed``: write the file, or go on with what a former start has left. Collective.

    Raises:
        UserError: processes, weights, images or places that are not as asked for; features that are not finite.
    """
    kind_of(flags.to, "--to ")
    check_target(flags.to)
    task = _task(flags)
    request, target = task.describe(), Path(flags.to)
    if target.exists():
        _refuse_others(target, request)
        if task.is_main:
            _remove_parts(target, request)
        return task.say(f"{target} was there already, written by the same command")
    folder = ResultFolder(f"{target}.parts", target.parent, target.name, request, task.is_main, "extraction")
    parts = part_ranges(task.store.manifest.num_samples, task.images_at_once)
    if task.is_main:
        remove_leftovers(folder.path)
    path_of = lambda part: part_path(folder.path, part, folder.settings)
    missing = gather_objects([part for part in parts if not path_of(part).exists()])[0]
    if len(missing) < len(parts):
        task.say(f"{len(parts) - len(missing)} of {len(parts)} parts were there already")
    count, ranks = len(missing), task.world_size
    mine = missing[count * task.rank // ranks : count * (task.rank + 1) // ranks]
    if mine:
        _extract(task, path_of, mine)
    gather_objects(None)  # all parts are there
    if task.is_main:
        _finish(task, flags, folder, [path_of(part) for part in parts], target)


def _task(flags):
    accelerator = processes_of(flags)
    weights = weights_of(flags)
    address = flags.data or ((weights.config or {}).get("data") or {}).get("shards")
    if not address:
        raise UserError(f"{flags.weights} does not say what it was trained on: give --data IMAGES")
    if flags.layer == "projector" and weights.projector is None:
        raise UserError(f"{flags.weights} has no projector of ours: drop --layer projector")
    if flags.layer == "patches" and not has_patch_tokens(weights.backbone):
        raise UserError(
            f"{flags.weights} is {with_article(weights.arch)}, which has no tokens of patches, as ViTs have: "
            "drop --layer patches"
        )
    weights, store = open_images(weights, address, flags.cache_dir, "--data")
    _check_names(store)
    task = Extraction(
        **encoding_of(flags, accelerator, weights),
        store=store,
        layer=flags.layer,
        dtype_there={"fp32": np.float32, "fp16": np.float16}[flags.dtype],
    )
    introduce_encoder(task, flags)
    task.say(f"{store.manifest.num_samples:,} images in {store.url}")
    if store.unchecked:
        task.say(store.unchecked)
    return task


def _check_names(store):
    """UserError for a key that no file of features can hold; of an object store it shows when it is met."""
    for shard in range(len(store.manifest.shards)) if store.remote is None else ():
        keys = store.index(shard).keys
        for key in () if "".join(keys).isascii() else keys:
            _utf8(key, store)


def _utf8(name, store):
    try:
        name.encode()
    except UnicodeEncodeError:
        shown = name.encode(errors="backslashreplace").decode()
        raise UserError(f"an image of {store.url} has a name that is not UTF-8: rename {shown}") from None
    return name


def _refuse_others(target, request):
    with open_features(target) as there:
        found = there.about["request"]
    if found != request:
        names = sorted(n for n in {*found, *request} if found.get(n) != request.get(n))
        changed = "; ".join(f"{n}: {found.get(n)} -> {request.get(n)}" for n in names)
        raise UserError(f"{target} holds other features ({changed}): remove it, or give another --to")


def _remove_parts(target, request):
    """A kill between the file's appearance and the end of its parts leaves some of them behind."""
    parts = Path(f"{target}.parts")
    try:
        found = json.loads((parts / "settings.json").read_text())
    except (OSError, ValueError):
        found = request  # it was the first to go
    if found == request:
        shutil.rmtree(parts, ignore_errors=True)


# ----------------------------------------------------------------------------------------------------
# A rank's parts


def _extract(task, path_of, parts):
    """Compute and write some parts, one after another; ``path_of``: part -> where it goes."""
    undecodable: list[Undecodable] = []
    first, last = parts[0].start, parts[-1].stop
    whole = sum(map(len, parts)) == last - first
    ids = range(first, last) if whole else np.concatenate([np.arange(p.start, p.stop) for p in parts])
    batches = evaluation_batches(
        task.store,
        task.size,
        rank=0,
        world_size=1,
        batch_size=task.images_at_once,
        workers=task.workers,
        ids=ids,
        resize=task.resize,
        undecodable=undecodable,
    )
    rows, waiting, advance = [], list(parts), _say_progress(task, sum(map(len, parts)))
    stream = feature_batches(task.encode, batches, unit_norm=False, **task.extraction())
    for features, labels, numbers in stream:
        while int(numbers[0]) >= waiting[0].stop:
            _write(task, path_of, waiting.pop(0), rows, undecodable)
            rows = []
        rows.append((_finite(features, task), labels.numpy(), numbers.numpy()))
        advance(len(numbers))
    for part in waiting:
        _write(task, path_of, part, rows, undecodable)
        rows = []


def _finite(features, task):
    """The features in the file's number format."""
    if not torch.isfinite(features).all():
        raise UserError(
            f"the {NAMES[task.layer]} of some images are not finite, so the encoder's weights or buffers are not "
            "either: take an earlier checkpoint"
        )
    with np.errstate(over="ignore"):
        cast = features.numpy().astype(task.dtype_there)
    if not np.isfinite(cast).all():
        raise UserError(
            f"a value of the {NAMES[task.layer]} is {float(features.abs().max()):g}, more than fp16 can hold: give "
            "--dtype fp32"
        )
    return cast


def _write(task, path_of, part, rows, undecodable):
    """One part: its rows, and of ``undecodable``, what was met so far, what lies in it."""
    empty = np.empty((0, 0), task.dtype_there), *(np.empty(0, np.int64) for _ in range(2))
    features, labels, numbers = (np.concatenate(c) for c in zip(*rows, strict=True)) if rows else empty
    lost = [image for image in undecodable if image.index in part]
    keys = partial(_keys, task.store)
    columns = {"key": keys(numbers), "source": _sources(task.store, numbers)}
    columns |= {"label": labels, "index": numbers, "features": features}
    named = zip(keys(np.array([image.index for image in lost], np.int64)), lost, strict=True)
    write_part(path_of(part), columns, [(key, image.error) for key, image in named])
    undecodable[:] = [image for image in undecodable if image.index not in part]


def _keys(store, numbers):
    """``shard/key`` of images by their numbers, as the audit has them."""
    return [_utf8(name, store) for name in store.names(numbers)] if len(numbers) else []


def _sources(store, numbers):
    """What images were called by who made the set: their path in a folder, or their original name, else ""."""
    shards, positions = store.locate(numbers)
    found = []
    for shard in np.unique(shards).tolist():
        here = positions[shards == shard].tolist()
        if isinstance(store, ListedStore):
            names = {position: store.index(shard).keys[position] for position in here}
        else:
            names = originals_of(store, shard, here)
        found += [_utf8(names.get(position, ""), store) for position in here]
    return found


def _say_progress(task, total):
    """A function that is given numbers of this rank's images and says now and then, on the main rank, how far it is."""
    each = " of each process" if task.world_size > 1 else ""

    def line(done, seconds):
        return f"{done:,} of {total:,} images{each}, {done / seconds:,.0f} images/s"

    return now_and_then(task.say, line)


# ----------------------------------------------------------------------------------------------------
# The file


def _finish(task, flags, folder, paths, target):
    """Join all parts in the file; on the main rank."""
    joined = Parts(paths)
    undecodable, total = list(joined.undecodable()), task.store.manifest.num_samples
    if not joined.num_rows:
        key, error = undecodable[0]
        raise UserError(f"none of the {total:,} images of {task.store.url} decodes; {key}: {error}")
    width = next(array.shape[1] for array in joined.arrays("features") if len(array))
    about = {
        "version": __version__,
        "rows": joined.num_rows,
        "width": width,
        "name": NAMES[task.layer],
        **({"patches": _patches(task, width)} if task.layer == "patches" else {}),
        "request": folder.settings,
        "data": complete_address(task.store.url),
        "classes": list(task.store.manifest.classes),
        "weights": {
            "path": str(Path(task.weights.path).absolute()),
            **{name: getattr(flags, name) for name in ("which", "arch", "stem")},
        },
        "undecodable": {"count": len(undecodable), "named": undecodable[:MOST_NAMED]},
    }
    write_features(target, about, joined)
    shutil.rmtree(folder.path, ignore_errors=True)
    if undecodable:
        task.say(not_decoding(undecodable, total, "images", " and have no row"))
    task.say(
        f"wrote {target}: {joined.num_rows:,} rows of {width:,} {NAMES[task.layer]}, {flags.dtype} "
        f"({target.stat().st_size / 1e6:,.1f} MB)"
    )


def _patches(task, width):
    """[P, F] of rows of P * F numbers."""
    return [width // task.weights.num_features, task.weights.num_features]


def complete_address(url: str) -> str:
    """An address that means the same in another working directory."""
    return url if is_remote(url) or "{" in url else str(Path(local_path(url)).absolute())
