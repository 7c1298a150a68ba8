"""The stores of images: shard sets in a directory or an object store, folders of images, lists of them, parquet files.

:func:`open_store` takes the address of any of them. All are a :class:`~caco_scale.data.store.base.Store`: who
reads images knows nothing of where they are. Below are the object store's client, the cache and the format of
shard sets; the stores know nothing of batches, orders or training.
"""

import os
from typing import Any, Literal

from caco_scale.data.addresses import is_remote, local_path
from caco_scale.data.counters import Counters
from caco_scale.data.listed_files import Listings
from caco_scale.data.object_store import RetryPolicy
from caco_scale.data.parquet_columns import holds_images
from caco_scale.data.parquet_files import split_named
from caco_scale.data.pixels import Pixels
from caco_scale.data.shards import MANIFEST_NAME, expand_braces
from caco_scale.data.store.base import Store
from caco_scale.data.store.folder import FolderStore, is_shard_set
from caco_scale.data.store.list import ENDINGS, ListStore
from caco_scale.data.store.local import LocalStore
from caco_scale.data.store.parquet import ParquetStore, parquet_splits
from caco_scale.data.store.remote import RemoteStore
from caco_scale.errors import UserError, quoted

BUILD = "python -m data_prep build IMAGES"


def open_store(
    url: str | os.PathLike,
    cache_dir: str = "auto",
    cache_bytes: int = 0,
    retry_policy: RetryPolicy | None = None,
    *,
    labelled: bool = False,
    flag: str = "data.shards",
    counters: Counters | None = None,
    listings: Listings | None = None,
    pixels: Pixels | None = None,
) -> Store:
    """The store at ``url``: a shard set in a directory or an object store, an indexed brace pattern, a folder, a list
    (.csv, .tsv, .parquet), a parquet file of images, a folder of such files or one split of it (``folder/train``).

    Args:
        cache_dir: where whole shards of an object store are kept on this node; ``auto`` is a folder of this user's
            in the node's temporary directory, ``none`` reads ranges only.
        cache_bytes: its limit, 0: four fifths of what is free there.
        labelled: of a folder, take only images in class folders, none of them empty (see :class:`FolderStore`).
        flag: the option that gave ``url``, for messages.
        counters: what the store does is added there; None: to its own.
        listings: where a run keeps which files its sets are of; None: they are listed for this process and its workers.
        pixels: what images are decoded to; None: what the manifest says, RGB of 8 bits where it says nothing.

    Raises:
        UserError: neither shard set nor images there, or of other pixels by its manifest.
    """
    remote = {"cache_dir": cache_dir, "cache_bytes": cache_bytes, "retry_policy": retry_policy}
    store = _open(url, remote, labelled, flag, counters, listings)
    store.take_pixels(pixels, flag)
    return store


def _open(url, remote: dict[str, Any], labelled, flag, counters, listings) -> Store:
    url = os.fspath(url)
    remote["counters"] = counters
    kind, path = kind_at(url, flag)
    if kind == "pattern":
        return _open_pattern(url, flag, remote)
    if kind == "remote":
        return RemoteStore(url, **remote)
    if kind == "list":
        return ListStore(url, labelled, counters, listings)
    if kind == "parquet":
        return ParquetStore(url, path, None, counters, listings)
    if kind == "split":
        return ParquetStore(url, os.path.dirname(path), _split_of_parquet(path), counters, listings)
    if kind == "folder":
        return FolderStore(url, labelled, counters, listings)
    store = LocalStore(url, counters)
    return RemoteStore(url, index=store, **remote) if is_remote(store.shards_at) else store


Kind = Literal["pattern", "remote", "list", "parquet", "split", "folder", "shards"]


def kind_at(url: str, flag: str = "data.shards") -> tuple[Kind, str]:
    """What kind of set there is at an address, and its path where it is on a disk; a look, before anything is opened.

    Raises:
        UserError: nothing that is a set of images. Of an object store only the form of the address is seen here.
    """
    if not url:
        raise UserError(
            f"{flag} is empty: give a folder of images, or a shard set (`{BUILD} SHARDS` makes one in SHARDS)"
        )
    if url.startswith("pipe:") or "|" in url:
        raise UserError(
            f"{flag} {url!r} is a shell pipe: nothing is run to read data, give the directory or address "
            f"that holds {MANIFEST_NAME}"
        )
    if "{" in url or "}" in url:
        return "pattern", ""
    if is_remote(url):
        return "remote", ""
    path = local_path(url)
    if os.path.isfile(path) and path.endswith(ENDINGS):
        return ("parquet" if path.endswith(".parquet") and holds_images(path) else "list"), path
    if _split_of_parquet(path) is not None:
        return "split", path
    if not os.path.isdir(path):
        raise UserError(f"{flag} {url} {_no_directory(url, path)}")
    if is_shard_set(path):
        return "shards", path
    _refuse_other_sets(url, path)
    return ("parquet" if parquet_splits(path) is not None else "folder"), path


def is_listed(url: str) -> bool:
    """Is it a set of single files, of which :func:`open_store` makes a listing?"""
    if not url or is_remote(url) or "{" in url or "}" in url:
        return False
    path = local_path(url)
    return (os.path.exists(path) or _split_of_parquet(path) is not None) and not is_shard_set(path)


def _split_of_parquet(path):
    """The split that a path names which is not there, in a folder of parquet files which is; None: it does not."""
    folder, name = os.path.split(path)
    if (
        os.path.exists(path)
        or not os.path.isdir(folder)
        or is_shard_set(folder)
        or parquet_splits(folder) is None
    ):
        return None
    return split_named(folder, name)


def _no_directory(url, path):
    """What is wrong with a path that is no directory, and what to do."""
    if not os.path.exists(path):
        return (
            f"does not exist: give a folder of images, or make a shard set there with `{BUILD} {quoted(url)}`"
        )
    folder = os.path.dirname(path)
    if os.path.basename(path) == MANIFEST_NAME:
        return f"is a file, not a directory: give {quoted(folder)}"
    if path.endswith(".tar"):
        return (
            f"is a file, not a directory: `python -m data_prep index {quoted(folder)}` makes its folder readable, "
            f"then give {quoted(folder)}"
        )
    return (
        "is a file, not a directory: give a folder of images or a shard set, or a list (.csv, .tsv, .parquet)"
    )


def _refuse_other_sets(url, path):
    """UserError for a directory without a manifest that is nevertheless no folder of images."""
    try:
        entries = sorted(os.scandir(path), key=lambda entry: entry.name)
    except OSError as error:
        raise UserError(f"cannot read {url}: {error.strerror}") from None
    splits = [entry.name for entry in entries if os.path.exists(os.path.join(entry.path, MANIFEST_NAME))]
    if splits:
        places = " or ".join(quoted(os.path.join(url, split)) for split in splits[:3])
        raise UserError(f"{url} has no {MANIFEST_NAME}: did you mean {places}?")
    tars = [entry.name for entry in entries if entry.name.endswith(".tar")]
    if tars:
        raise UserError(
            f"{url} has {len(tars)} tars but no {MANIFEST_NAME}: `python -m data_prep index {quoted(url)}` writes "
            "one for WebDataset shards, "
            f"`python -m data_prep build {quoted(os.path.join(url, tars[0]))} SHARDS` takes a tar of images"
        )


def _open_pattern(pattern, flag, options):
    """The store of a foreign set by its brace pattern: its manifest lies beside the shards."""
    folder, names = expand_braces(pattern)
    unindexed = UserError(
        f"{flag} {pattern} has no {MANIFEST_NAME}: make one with `python -m data_prep index {quoted(pattern)}`, "
        "or if you may not write there, elsewhere with --to, and give that directory"
    )
    if not is_remote(folder) and not is_shard_set(local_path(folder)):
        raise unindexed
    try:
        store = open_store(folder, flag=flag, **options)
    except UserError as error:
        if MANIFEST_NAME not in str(error) and "not exist" not in str(error):
            raise
        raise unindexed from None
    there = [shard.name for shard in store.manifest.shards]
    if there != names:
        raise UserError(
            f"{flag} {pattern} means {len(names)} shards, but the {MANIFEST_NAME} there has {len(there)} "
            f"({there[0]} to {there[-1]}): give {quoted(folder)}, or index the pattern to another directory"
        )
    return store
