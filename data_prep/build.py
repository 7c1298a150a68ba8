"""Build a shard set: one seeded global permutation of the images, cut into shards built independently.

Slot g of the permutation is the sample with key ``{g:08d}``, in shard ``g // samples_per_shard``. A rejected
image leaves its slot empty, so that a shard depends on nothing but the listing and the seed: any number of
workers, in any order, after any number of kills, writes the same bytes.

Every finished shard has a record in ``DST/.build``; ``manifest.json`` comes last and ``.build`` is removed.
"""

import json
import os
import re
import shutil
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import replace

from caco_scale.atomic import write_atomically
from caco_scale.data.addresses import is_remote
from caco_scale.data.folders import ImageFolder
from caco_scale.data.object_store import ObjectExists, Remote
from caco_scale.data.shard_table import ShardInfo
from caco_scale.data.shards import MANIFEST_NAME, Manifest
from caco_scale.data.splits import some_names
from caco_scale.data.store import open_store
from caco_scale.errors import UserError
from data_prep.destination import (
    STATE_DIR,
    check_apart,
    destination_errors,
    finished_manifest,
    locked,
    prepare_destination,
    record_path,
    same_build,
    scratch_folder,
    scratch_removed,
)
from data_prep.jobs import DEFAULTS, Settings, manifest_of, plan_shards, run_jobs
from data_prep.sources import needs_scratch, open_source
from data_prep.tar import Source
from data_prep.without import image_folders_without, read_list


def build(
    src: str | os.PathLike,
    dst: str | os.PathLike,
    *,
    samples_per_shard: int = 1000,
    seed: int = 0,
    workers: int | None = None,
    split: str | None = None,
    skip_empty_classes: bool = False,
    short_side: int = 0,
    source_options: dict | None = None,
    dry_run: bool = False,
    part: tuple[int, int] | None = None,
    split_folders: bool | None = None,
    without: str | None = None,
    channels: int = 0,
    bits: int = 0,
    rgb: bool = False,
    tell: Callable[[str], None] = lambda line: None,
) -> list[tuple]:
    """Build the shard sets of a source of images; returns [(directory or address, manifest, was there)].

    src: what :func:`~data_prep.sources.open_source` takes with ``source_options``. dst: a directory, or the address
    of a folder of an object store. A source of splits gives one set per split, in ``dst/<split>``. short_side:
    pixels; larger images are made so small (0: none). dry_run: write nothing; the results are
    [(directory or address, number of images, of shards, bytes)]. part: (I, N), of N processes that share a build, on
    any nodes, this is the I-th, from 1; who finds all shards finished writes the manifest, for the others it is None.
    split_folders: see :func:`~caco_scale.data.folders.image_folders`. without: the path of a list of images that are
    left out, see :func:`~data_prep.without.image_folders_without`. channels, bits: of images that keep them, 0: as
    :func:`~data_prep.kinds.kind_of` finds them; rgb: make 8-bit RGB of all images instead. tell: is given a line for
    every set, with its classes, before work starts. Raises UserError, and keeps finished shards.
    """
    src, dst = os.fspath(src), os.fspath(dst)
    if samples_per_shard < 1 or (workers is not None and workers < 0):
        raise UserError(
            f"--samples-per-shard {samples_per_shard} must be at least 1, --workers {workers} at least 0"
        )
    if rgb and (channels or bits):
        raise UserError("--rgb makes images of 3 channels of 8 bits: leave out --channels and --bits")
    if without:
        read_list(without)  # before a source is hashed or unpacked
    if is_remote(dst):
        Remote(dst).check_writable()

    def folders(source):
        how = split, skip_empty_classes, split_folders
        found = image_folders_without(source.scan(), src, without, *how, tell=tell)
        for name, folder in found.items():
            tell(f"{_join(dst, name)}: {folder.describe()}")
            if folder.left_out:
                tell(f"{_join(dst, name)}: left out, for they are in no split: {some_names(folder.left_out)}")
        return found

    def settings(source, found):
        from data_prep.kinds import kind_of  # it imports torch, and a user's mistakes are told before that

        kind = None if rgb else kind_of(source, found.values(), channels, bits, tell)
        return Settings(samples_per_shard, seed, short_side, workers, kind, converts=rgb)

    source_options = source_options or {}
    if is_remote(dst) or dry_run:
        source = open_source(src, None, **source_options)
        if dry_run:
            return [
                _plan(_join(dst, name), folder, samples_per_shard) for name, folder in folders(source).items()
            ]
        results, found = [], folders(source)
        how = settings(source, found)
        for name, folder in found.items():
            job = source, folder, _join(dst, name), how
            made = build_remote_part(*job, part) if part else build_remote_set(*job)
            results.append((_join(dst, name), *made))
        return results
    return _build_here(src, os.path.abspath(os.path.expanduser(dst)), settings, source_options, folders, part)


def _build_here(src, dst, settings, source_options, folders, part):
    """:func:`build` into a directory; a source that must be unpacked is kept in it until the end."""
    check_apart(src, dst)
    with ExitStack() as stack:
        packed = needs_scratch(src, **source_options)
        if packed and part:
            raise UserError(
                f"parquet files are shared among {part[1]} parts into a bucket only: build {dst} with one job"
                if source_options.get("kind") == "parquet"
                else f"a compressed tar cannot be shared among {part[1]} parts: decompress {src} first"
            )
        if packed:
            stack.enter_context(scratch_removed(dst, existed=os.path.isdir(dst)))
        stack.enter_context(destination_errors(dst))
        if packed:
            stack.enter_context(locked(dst))
        source = open_source(src, os.path.join(dst, STATE_DIR), **source_options)
        found = folders(source)
        settings = settings(source, found)
        if None not in found and os.path.exists(os.path.join(dst, MANIFEST_NAME)):
            raise UserError(
                f"{dst} holds a shard set itself, splits cannot be built in it: choose another directory"
            )
        results = []
        for name, folder in found.items():
            target = _join(dst, name)
            if part:
                results.append((target, *build_part(source, folder, target, settings, part)))
                continue
            held = packed and target == dst
            results.append((target, *build_set(source, folder, target, settings, locked_already=held)))
        if packed:
            shutil.rmtree(os.path.join(dst, STATE_DIR), ignore_errors=True)
        return results


def _join(dst, name):
    return dst if name is None else f"{dst.rstrip('/')}/{name}"


def _plan(dst, folder, samples_per_shard):
    from data_prep.shard import SAMPLE_OVERHEAD_BYTES

    num_bytes = sum(image.file.num_bytes + SAMPLE_OVERHEAD_BYTES for image in folder.images)
    return dst, len(folder.images), -(-len(folder.images) // samples_per_shard), num_bytes


def build_set(
    source: Source,
    folder: ImageFolder,
    dst: str,
    settings: Settings = DEFAULTS,
    *,
    locked_already: bool = False,
    wait: bool = False,
    quiet: bool = False,
) -> tuple[Manifest, bool]:
    """Build one shard set in ``dst`` from an ImageFolder of ``source``; returns (manifest, was there).

    ``wait``: for another build of ``dst`` to end, instead of refusing.
    """
    what = settings.describe(folder)
    with ExitStack() as stack:
        stack.enter_context(destination_errors(dst))
        manifest = finished_manifest(dst, what)
        if not manifest and not locked_already:
            stack.enter_context(locked(dst, wait))
            manifest = finished_manifest(dst, what)  # another process may have just built it
        if manifest:
            shutil.rmtree(os.path.join(dst, STATE_DIR), ignore_errors=True)
            return manifest, True
        prepare_destination(dst, what)
        jobs = plan_shards(source, folder, dst, what, converts=settings.converts)
        records = run_jobs(jobs, dst, settings.workers, quiet)
        manifest = manifest_of(records, folder, what)
        write_atomically(os.path.join(dst, MANIFEST_NAME), manifest.to_json().encode())
        if not locked_already:
            shutil.rmtree(os.path.join(dst, STATE_DIR), ignore_errors=True)
        return manifest, False


def build_part(
    source: Source, folder: ImageFolder, dst: str, settings: Settings, part: tuple[int, int]
) -> tuple[Manifest | None, bool]:
    """Build this part's shards of a set in ``dst``, at the same time as the others -> (manifest or None, was there).

    Only shards are shared out: the last part to end checks them all and writes the manifest.
    """
    what = settings.describe(folder)
    state = os.path.join(dst, STATE_DIR)
    with destination_errors(dst):
        manifest = finished_manifest(dst, what)
        if manifest:
            return manifest, True
        if os.path.exists(os.path.join(dst, MANIFEST_NAME)):
            raise UserError(f"{dst} is a finished set with damaged shards: build it again without --part")
        with locked(dst, shared=True):
            manifest = finished_manifest(dst, what)  # the others may have just finished it
            if manifest:
                return manifest, True
            if not os.path.exists(os.path.join(state, "build.json")):
                write_atomically(os.path.join(state, "build.json"), json.dumps(what).encode())
            jobs = plan_shards(source, folder, dst, what, converts=settings.converts)
            run_jobs(jobs[part[0] - 1 :: part[1]], dst, settings.workers, quiet=False)
        if not all(os.path.exists(record_path(state, job.number)) for job in jobs):
            return finished_manifest(dst, what), False
    return build_set(source, folder, dst, settings, wait=True)


def build_remote_set(
    source: Source, folder: ImageFolder, dst: str, settings: Settings
) -> tuple[Manifest, bool]:
    """Build one shard set straight into an object store; returns (manifest, was there).

    A shard is made in a temporary directory, uploaded in parts, and gone from there. The records of finished
    shards are in the store, too: any machine continues. The manifest is created, never overwritten.
    """
    what = settings.describe(folder)
    remote = Remote(dst)
    manifest = _remote_manifest(remote, what)
    if manifest:
        return manifest, True
    records = _remote_records(remote, what)
    sizes = remote.listing()
    with scratch_folder("build") as staging, destination_errors(staging):
        jobs = plan_shards(source, folder, staging, what, remote, settings.converts)
        jobs = [replace(job, kept=_if_there(records.get(job.number), sizes)) for job in jobs]
        manifest = manifest_of(run_jobs(jobs, dst, settings.workers, quiet=False), folder, what)
    try:
        remote.write(MANIFEST_NAME, manifest.to_json().encode(), create=True)
    except ObjectExists:  # another build of the same was quicker
        if _remote_manifest(remote, what) != manifest:
            raise UserError(
                f"{dst}: another build has written its {MANIFEST_NAME}: choose another folder"
            ) from None
    remote.delete(f"{STATE_DIR}/{name.rpartition('/')[2]}" for name in remote.listing(STATE_DIR))
    return manifest, False


def build_remote_part(
    source: Source, folder: ImageFolder, dst: str, settings: Settings, part: tuple[int, int]
) -> tuple[Manifest | None, bool]:
    """:func:`build_part` in an object store, where nobody is locked out: the last part or parts write one manifest."""
    what = settings.describe(folder)
    remote = Remote(dst)
    manifest = _remote_manifest(remote, what)
    if manifest:
        return manifest, True
    records, sizes = _remote_records(remote, what), remote.listing()
    with scratch_folder("build") as staging, destination_errors(staging):
        jobs = plan_shards(source, folder, staging, what, remote, settings.converts)
        own = jobs[part[0] - 1 :: part[1]]
        run_jobs(
            [replace(job, kept=_if_there(records.get(job.number), sizes)) for job in own],
            dst,
            settings.workers,
            quiet=False,
        )
    manifest = _remote_manifest(remote, what)  # a quicker part may have finished it, and removed the records
    if manifest or len(_remote_records(remote, what)) < len(jobs):
        return manifest, False
    return build_remote_set(source, folder, dst, settings)


def _remote_manifest(remote, what):
    """The manifest of a finished build if it is this one, None if there is none."""
    text = remote.read_whole(MANIFEST_NAME, missing=b"")
    if not text:
        return None
    manifest = Manifest.from_bytes(text, remote.url)
    same_build(remote.url, manifest.build, what)
    open_store(remote.url, "none").check()
    return manifest


def _remote_records(remote, what):
    """{shard number: record} of what an earlier run finished; notes what is built where there is nothing."""
    note = f"{STATE_DIR}/build.json"
    with suppress(ObjectExists):
        remote.write(note, json.dumps(what).encode(), create=True)
    same_build(remote.url, json.loads(remote.read_whole(note)), what)
    names = [name.rpartition("/")[2] for name in remote.listing(STATE_DIR)]
    names = [name for name in names if re.fullmatch(r"\d{6,}\.json", name)]
    texts = remote.concurrently(lambda name: remote.read_whole(f"{STATE_DIR}/{name}"), names)
    return {int(name[:-5]): json.loads(text) for name, text in zip(names, texts, strict=True)}


def _if_there(record, sizes):
    """The record, if its files are in the store with their recorded sizes (uploads are whole or not there)."""
    if record is None:
        return None
    info = ShardInfo(**record["info"])
    there = sizes.get(info.name) == info.num_bytes and sizes.get(info.index_name) == info.index_num_bytes
    return record if there else None
