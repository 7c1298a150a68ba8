"""Build the bad shards of a set again from its source."""

import hashlib
import os
from dataclasses import replace
from pathlib import Path

from caco_scale.atomic import write_atomically
from caco_scale.data.shard_index import ShardIndex
from caco_scale.data.shard_table import ShardInfo
from caco_scale.data.shards import Manifest
from caco_scale.data.store import open_store
from caco_scale.data.store.local import LocalStore
from caco_scale.errors import UserError
from data_prep.checksums import add_checksums
from data_prep.destination import same_build, scratch_folder
from data_prep.jobs import Settings, plan_shards
from data_prep.sources import open_source
from data_prep.verify import bad_shards
from data_prep.without import image_folders_without


def repair(
    src: str | os.PathLike,
    dst: str | os.PathLike,
    workers: int | None = None,
    source_options: dict | None = None,
    skip_empty_classes: bool = False,
    split: str | None = None,
    split_folders: bool | None = None,
    without: str | None = None,
) -> tuple[Manifest, list[str]]:
    """Build the bad shards of a finished set again, from its source; returns (manifest, names of those built again).

    src, dst and the options: as for the build. Every shard is read and hashed; a set whose indexes have no checksums
    gets them. UserError when the source is not the one that the set was built from, and when a new shard is not the
    one that the manifest names.
    """
    src, dst = os.fspath(src), os.fspath(dst)
    store = open_store(dst, "none")
    if getattr(store, "local_index", None) or store.manifest.build.get("foreign"):
        raise UserError(f"{dst} is an indexed foreign set: {store.repair_hint}")
    if store.remote:
        store.remote.check_writable()
    bad, _ = bad_shards(store, full=True, workers=workers)
    options = source_options, without, (split, skip_empty_classes, split_folders)
    repaired = _repaired(bad, src, dst, store, *options) if bad else []
    manifest, _ = add_checksums(open_store(dst, "none"), store.path if isinstance(store, LocalStore) else dst)
    return manifest, repaired


def _repaired(bad, src, dst, store, source_options, without, how):
    manifest = store.manifest
    with scratch_folder("repair") as scratch:
        source = open_source(src, None, **(source_options or {}))
        folders = image_folders_without(source.scan(), src, without, *how)
        what = manifest.build
        folder = folders[None] if None in folders else _folder_of(folders, what, dst)
        pixels = manifest.pixels if "channels" in what else None
        settings = Settings(what["samples_per_shard"], what["seed"], what.get("short_side", 0), pixels=pixels)
        here = settings.describe(folder)
        same_build(dst, what, here)
        staging = os.path.join(scratch, "shards")
        os.makedirs(os.path.join(staging, ".build"))
        jobs = plan_shards(source, folder, staging, what)
        return [_build_again(jobs[number], manifest.shards[number], store) for number, _ in bad]


def _folder_of(folders, what, dst):
    """The split of a source that a set was built from, by its listing."""
    found = [f for f in folders.values() if f.fingerprint() == what.get("listing")]
    if not found:
        raise UserError(f"no split of the source ({', '.join(folders)}) is the one that {dst} was built from")
    return found[0]


def _build_again(job, info, store):
    from data_prep.shard import build_shard  # not above: it imports torch

    built = ShardInfo(**build_shard(job)[0]["info"])
    if not info.has_checksums:
        built = _without_checksums(job, built, info.index_name)
    if built != info:
        raise UserError(
            f"{info.name} built again has another sha256 ({built.sha256[:12]}) than the manifest's "
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


def _without_checksums(job, built, name):
    """The shard with the index of an older version of this program, which the manifest names."""
    data = Path(job.dst, built.index_name).read_bytes()
    data = ShardIndex.from_bytes(data).with_checksums(None).to_bytes()
    Path(job.dst, name).write_bytes(data)
    return replace(
        built, index_name=name, index_num_bytes=len(data), index_sha256=hashlib.sha256(data).hexdigest()
    )
