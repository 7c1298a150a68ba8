"""Make a foreign WebDataset set readable: an index of every tar, and a manifest. Or add checksums to an old set's."""

import hashlib
import os
import tempfile
from collections import Counter
from dataclasses import replace

from caco_scale.data.addresses import is_remote, local_path
from caco_scale.data.folders import is_image
from caco_scale.data.object_store import Remote
from caco_scale.data.shard_index import INDEX_SUFFIXES
from caco_scale.data.shard_table import ShardInfo, ShardTable
from caco_scale.data.shards import MANIFEST_NAME, Manifest, expand_braces, plain_name
from caco_scale.data.small_files import open_regular
from caco_scale.data.store import open_store
from caco_scale.data.tars import Notes, index_tar
from caco_scale.errors import UserError
from data_prep.checksums import add_checksums, writer


def index(
    pattern: str | os.PathLike, to: str | os.PathLike | None = None, image: str | None = None
) -> tuple[str, Manifest]:
    """Make a foreign WebDataset set readable: index its tars and write a manifest; returns (place, manifest).

    pattern: ``s3://bucket/set/train-{000..012}.tar``, or a folder, whose tars are all taken. to: where manifest and
    indexes go; beside the tars if not given. image: of samples with several images, the extension of the one to
    read. Nothing of the tars is changed, and every byte is read once. What is left out of them is in
    ``manifest.build["notes"]``, in words with numbers. A set that has a manifest and indexes without checksums gets
    those, and keeps all else that its manifest says. UserError: a tar that is missing, cut or damaged, a name that is
    no plain file name, samples whose image cannot be told (:func:`~caco_scale.data.tars.index_tar`), tars without any.
    """
    if image is not None:
        image = image.lower().lstrip(".")
        if not is_image(f"x.{image}"):
            raise UserError(f"--image {image} is no image's extension: give one like jpg or rgb.png")
    pattern, to = os.fspath(pattern), None if to is None else os.fspath(to)
    if pattern.startswith("pipe:") or "|" in pattern:
        raise UserError(f"{pattern!r} is a shell pipe: nothing is run to read data, give files or an address")
    if "{" in pattern:
        folder, names = expand_braces(pattern)
    else:
        folder, names = pattern, None
    if not is_remote(folder):
        folder = local_path(folder)
    tars = Remote(folder) if is_remote(folder) else None
    if manifest := _completed(folder, names, to):
        return folder if to is None else to, manifest
    if names is None:
        there = tars.listing() if tars else os.listdir(folder) if os.path.isdir(folder) else []
        names = sorted(plain_name(name, f"in {folder}: rename it") for name in there if name.endswith(".tar"))
    if not names:
        raise UserError(f"{pattern} has no tars: give a folder or a pattern like {folder}/{{000..012}}.tar")
    place = folder if to is None else to
    if to is not None and not is_remote(place):
        place = local_path(place)
        os.makedirs(place, exist_ok=True)
    if is_remote(place) and place.rstrip("/") != folder.rstrip("/"):
        raise UserError(f"--to {place}: give a local directory, or leave it out to write beside the tars")
    if is_remote(place):
        Remote(place).check_writable()
    _refuse_manifest(place)
    shards, labels, notes = [], Counter(), Notes()
    write = writer(place)
    for name in names:
        info, found, data = _index_one(tars, folder, name, image, notes)
        if not info.num_samples:
            notes.add("tars without a sample", name)
        write(info.index_name, data)
        shards.append(info)
        labels.update(found)
    if not sum(shard.num_samples for shard in shards):
        raise UserError(
            f"{pattern} has no sample with an image in {len(shards):,} tars: {'; '.join(notes.lines())}"
        )
    build = {
        "foreign": True,
        "notes": notes.lines(),
        **({"shards_at": folder} if place != folder else {}),
        **({"pattern": os.path.basename(pattern)} if "{" in pattern else {}),
        **({"image": image} if image else {}),
    }
    classes = range(max(labels, default=-1) + 1)
    manifest = Manifest(
        classes=tuple(str(label) for label in classes),
        class_counts=tuple(labels[label] for label in classes),
        num_samples=sum(shard.num_samples for shard in shards),
        num_bytes=sum(shard.num_bytes for shard in shards),
        shards=ShardTable(shards),
        fixed=[],
        rejected=[],
        build=build,
    )
    write(MANIFEST_NAME, manifest.to_json().encode(), create=True)
    return place, manifest


def _has_manifest(place):
    if is_remote(place):
        return Remote(place).size(MANIFEST_NAME) is not None
    return os.path.exists(os.path.join(place, MANIFEST_NAME))


def _completed(folder, names, to):
    """The manifest of a set of these tars (None: all) after its missing checksums were added; None if none miss.

    Where the manifest is beside the tars but ``to`` is elsewhere, the set is described anew in ``to``.
    """
    place = folder if to is None else to if is_remote(to) else local_path(to)
    there = next((place for place in (place, folder) if _has_manifest(place)), None)
    if there is None:
        return None
    store = open_store(there, "none")
    if not store.unchecked or (names and names != [shard.name for shard in store.manifest.shards]):
        return None
    if there != place:
        os.makedirs(place, exist_ok=True)
        store.manifest = replace(store.manifest, build=store.manifest.build | {"shards_at": folder})
    return add_checksums(store, place)[0]


def _refuse_manifest(place):
    if _has_manifest(place):
        raise UserError(f"{place} has a {MANIFEST_NAME} already: remove it, or write elsewhere with --to")


def _index_one(tars, folder, name, image, notes):
    """(ShardInfo, labels, bytes of the index) of one tar."""
    digest = hashlib.sha256()
    with tempfile.TemporaryFile() as file:
        try:
            for chunk in _chunks(tars, folder, name):
                digest.update(chunk)
                file.write(chunk)
        except OSError as error:
            raise UserError(f"cannot read {folder}/{name}: {error.strerror}") from None
        num_bytes = file.tell()
        file.seek(0)
        index = index_tar(file, f"{folder}/{name}", image, notes)
    data = index.to_bytes()
    index_name = name.removesuffix(".tar") + INDEX_SUFFIXES[True]
    sha256 = hashlib.sha256(data).hexdigest()
    info = ShardInfo(name, len(index), num_bytes, digest.hexdigest(), index_name, len(data), sha256)
    return info, [int(label) for label in index.labels if label >= 0], data


def _chunks(tars, folder, name):
    if tars:
        size = tars.size(name)
        if size is None:
            raise UserError(f"{folder}/{name} does not exist")
        yield from tars.stream(name, 0, size, whole=True)
        return
    with open_regular(os.path.join(folder, name)) as file:
        while chunk := file.read(1 << 22):
            yield chunk
