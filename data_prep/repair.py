"""Mend a shard set from its source, and make a foreign one readable."""

import hashlib
import os
import tempfile
from collections import Counter
from dataclasses import asdict
from pathlib import Path

from caco_scale.atomic import write_atomically
from caco_scale.data.remote import Remote, is_remote
from caco_scale.data.shards import MANIFEST_NAME, Manifest, ShardInfo, expand_braces, index_tar, plain_name
from caco_scale.data.store import LocalStore, open_store
from caco_scale.errors import UserError
from data_prep.build import describe_build, plan_shards
from data_prep.destination import same_build
from data_prep.sources import image_folders, open_source
from data_prep.verify import bad_shards


def repair(src, dst, workers=None, source_options=None, skip_empty_classes=False, split=None):
    """Build the bad shards of a finished set again, from its source; returns (manifest, names of the mended).

    src, dst and the options: as for the build. Every shard is read and hashed. UserError when the source is not
    the one that the set was built from, and when a new shard is not the one that the manifest names.
    """
    store = open_store(dst, "none")
    if getattr(store, "local_index", None) or store.manifest.build.get("foreign"):
        raise UserError(f"{dst} is an indexed foreign set: there is no source here to build its shards from")
    if store.remote:
        store.remote.check_writable()
    manifest = store.manifest
    bad, _ = bad_shards(store, full=True, workers=workers)
    if not bad:
        return manifest, []
    with tempfile.TemporaryDirectory(prefix="caco-repair-") as scratch:
        source = open_source(src, scratch, **(source_options or {}))
        folders = image_folders(source.scan(), src, split, skip_empty_classes)
        what = manifest.build
        folder = folders[None] if None in folders else _folder_of(folders, what, dst)
        here = describe_build(folder, what["samples_per_shard"], what["seed"], what.get("short_side", 0))
        same_build(dst, what, here)
        staging = os.path.join(scratch, "shards")
        os.makedirs(os.path.join(staging, ".build"))
        jobs = plan_shards(source, folder, staging, what)
        return manifest, [_mend(jobs[number], manifest.shards[number], store) for number, _ in bad]


def _folder_of(folders, what, dst):
    """The split of a source that a set was built from, by its listing."""
    found = [f for f in folders.values() if f.fingerprint() == what.get("listing")]
    if not found:
        raise UserError(f"no split of the source ({', '.join(folders)}) is the one that {dst} was built from")
    return found[0]


def _mend(job, info, store):
    from data_prep.shard import build_shard  # not above: it imports torch

    record, _ = build_shard(job)
    if record["info"] != asdict(info):
        raise UserError(
            f"{info.name} built again has another sha256 ({record['info']['sha256'][:12]}) than the manifest's "
            f"{info.sha256[:12]}: its images or this program's libraries have changed, build the set anew"
        )
    for name in (info.name, info.index_name):
        path = Path(job.dst, name)
        if isinstance(store, LocalStore):
            write_atomically(os.path.join(store.path, name), path.read_bytes())
        else:
            store.remote.write(name, path)
        path.unlink()
    return info.name


# ----------------------------------------------------------------------------------------------------


def index(pattern, to=None, workers=None):
    """Make a foreign WebDataset set readable: index its tars and write a manifest; returns (place, manifest).

    pattern: ``s3://bucket/set/train-{000..012}.tar``, or a folder, whose tars are all taken. to: where manifest and
    indexes go; beside the tars if not given. Nothing of the tars is changed, and every byte is read once.
    UserError: a tar that is missing, cut or damaged, a name that is no plain file name.
    """
    pattern = os.fspath(pattern)
    if pattern.startswith("pipe:") or "|" in pattern:
        raise UserError(f"{pattern!r} is a shell pipe: nothing is run to read data, give files or an address")
    if "{" in pattern:
        folder, names = expand_braces(pattern)
    else:
        folder, names = pattern, None
    if not is_remote(folder):
        folder = os.path.abspath(os.path.expanduser(folder.removeprefix("file://")))
    tars = Remote(folder) if is_remote(folder) else None
    if names is None:
        there = tars.list() if tars else os.listdir(folder) if os.path.isdir(folder) else []
        names = sorted(plain_name(name) for name in there if name.endswith(".tar"))
    if not names:
        raise UserError(f"{pattern} has no tars: give a folder or a pattern like {folder}/{{000..012}}.tar")
    place = folder if to is None else os.fspath(to)
    if to is not None and not is_remote(place):
        place = os.path.abspath(os.path.expanduser(place))
        os.makedirs(place, exist_ok=True)
    if is_remote(place) and place.rstrip("/") != folder.rstrip("/"):
        raise UserError(f"--to {place}: give a local directory, or leave it out to write beside the tars")
    if is_remote(place):
        Remote(place).check_writable()
    _refuse_manifest(place)
    shards, labels = [], Counter()
    write = (
        Remote(place).write
        if is_remote(place)
        else lambda name, data, **_: write_atomically(os.path.join(place, name), data)
    )
    for name in names:
        info, found, data = _index_one(tars, folder, name)
        write(info.index_name, data)
        shards.append(info)
        labels.update(found)
    build = {"foreign": True} | ({} if place == folder else {"shards_at": folder})
    classes = range(max(labels, default=-1) + 1)
    manifest = Manifest(
        classes=tuple(str(label) for label in classes),
        class_counts=tuple(labels[label] for label in classes),
        num_samples=sum(shard.num_samples for shard in shards),
        num_bytes=sum(shard.num_bytes for shard in shards),
        shards=tuple(shards),
        fixed=[],
        rejected=[],
        build=build,
    )
    write(MANIFEST_NAME, manifest.to_json().encode(), create=True)
    return place, manifest


def _refuse_manifest(place):
    there = (
        Remote(place).size(MANIFEST_NAME) is not None
        if is_remote(place)
        else os.path.exists(os.path.join(place, MANIFEST_NAME))
    )
    if there:
        raise UserError(f"{place} has a {MANIFEST_NAME} already: remove it, or write elsewhere with --to")


def _index_one(tars, folder, name):
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
        try:
            index = index_tar(file)
        except UserError as error:
            raise UserError(f"{folder}/{name}: {error}") from None
    data = index.to_bytes()
    index_name = name.removesuffix(".tar") + ".idx"
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
    with open(os.path.join(folder, name), "rb") as file:
        while chunk := file.read(1 << 22):
            yield chunk
