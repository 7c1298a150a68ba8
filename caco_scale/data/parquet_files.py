"""Files of parquet: which of a folder's are one split, whether any is missing, what they claim to hold.

Which files are one split is judged by their names (:func:`split_of`), what is in them by ``parquet_columns``.
"""

import os
import re
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

from caco_scale.data.splits import some_names, split_kind
from caco_scale.errors import UserError, quoted

# train-00000-of-00003.parquet, and with a hash at its end as older data sets have it.
PART = re.compile(r"(?P<name>.*?)-(?P<number>\d+)-of-(?P<total>\d+)(-\w+)?")
NUMBERED = re.compile(r"(?P<name>.*?)[-_.]?(?P<number>\d+)")  # 0000.parquet, train_0.parquet
SMALL_BYTES, MOST_GROWTH = 1 << 30, 20


def check_claims(path, metadata):
    """UserError for a group of rows that would unpack to many times its bytes: its pages are unpacked whole."""
    for number in range(metadata.num_row_groups):
        group = metadata.row_group(number)
        for column in (group.column(i) for i in range(group.num_columns)):
            claimed = column.total_uncompressed_size
            if claimed > max(SMALL_BYTES, MOST_GROWTH * column.total_compressed_size):
                raise UserError(
                    f"{path}: {column.total_compressed_size:,} bytes of its column {column.path_in_schema} claim to "
                    f"unpack to {claimed:,}: it is no file of stored images"
                )


def split_of(file: str) -> str | None:
    """The split of a parquet file by its path below the source; None: its names tell of none.

    ``train-00000-of-00003.parquet``, ``train_0.parquet``, ``train.parquet``, ``default/train/0000.parquet``.
    """
    *folders, name = Path(file).with_suffix("").parts
    if (part := PART.fullmatch(name)) and part["name"]:
        return part["name"]
    if split_kind(name):
        numbered = NUMBERED.fullmatch(name)
        return numbered["name"] if numbered else name
    return next((folder for folder in reversed(folders) if split_kind(folder)), None)


def files_by_split(path: str | os.PathLike) -> dict[str | None, list[str]]:
    """{split: the parquet files below ``path`` that are of it}; None: those whose names tell of none."""
    below = Path(path)
    files = sorted(str(file.relative_to(below)) for file in below.rglob("*.parquet") if file.is_file())
    of = defaultdict(list)
    for file in files:
        if not any(part.startswith(".") for part in Path(file).parts):
            of[split_of(file)].append(file)
    return of


def split_named(path: str | os.PathLike, split: str) -> str | None:
    """The split of the parquet files below ``path`` that is called so, or means that; None: not one is."""
    of = files_by_split(path)
    names = [name for name in of if name == split] or [
        name for name in of if name and split_kind(name) == (split_kind(split) or "")
    ]
    return names[0] if len(names) == 1 else None


def chosen(path: str | os.PathLike, split: str | None) -> list[str]:
    """The files of the one split that there is or that is asked for, below ``path``. UserError: not one."""
    of = files_by_split(path)
    if split is not None:
        name = split_named(path, split)
        if name is None:
            there = some_names(sorted(filter(None, of)), 8) or "none"
            raise UserError(f"{path} has no parquet files of the split {split} (its splits: {there})")
        return _one_folder(path, of[name], split)
    if not any(of.values()):
        raise UserError(f"{path} has no parquet files")
    splits = sorted(filter(None, of))
    if len(splits) > 1:
        raise UserError(
            f"{path} has {len(splits)} splits ({some_names(splits, 8)}), which are no one set: choose one with --split"
        )
    if splits and None in of:
        raise UserError(
            f"{path} has files of the split {splits[0]} and others of none ({some_names(of[None])}), which are no one "
            f"set: choose it with --split {quoted(splits[0])}, or move the others away"
        )
    return _one_folder(path, next(iter(of.values())), splits[0] if splits else None)


def _one_folder(path, files, split):
    """The files of a split, if they lie in one folder: two are two configurations of a data set. UserError: two."""
    folders = sorted({os.path.dirname(file) for file in files})
    if split is not None and len(folders) > 1:
        raise UserError(
            f"{path} has the split {split} {len(folders)} times (in {some_names(folders)}), which are no one set: give "
            f"one of these folders, {quoted(os.path.join(path, folders[0]))}"
        )
    return files


def check_complete(path, files: Iterable[str]):
    """UserError where the numbers in the files' names say that some are missing, or there twice."""
    groups = defaultdict(list)
    for file in files:
        stem = Path(file).stem
        match = PART.fullmatch(stem) or NUMBERED.fullmatch(stem)
        if match:
            total = match.groupdict().get("total")
            groups[os.path.dirname(file), match["name"], total].append((int(match["number"]), stem))
    if len({(folder, name) for folder, name, _ in groups}) != len(groups):
        raise UserError(f"{path} has files of two versions of a split (-of- different numbers): remove one")
    for (_, name, total), numbers in groups.items():
        there = sorted(number for number, _ in numbers)
        first = min(there[0], 1) if total is None else int(int(total) in there)
        if total is None and there[0] > 1:
            continue  # years, say
        expected = range(first, int(total) + first) if total else range(first, max(there[-1] + 1, first))
        if len(expected) > len(there) + 1_000_000:
            raise UserError(
                f"{path}: {numbers[0][1]} is one of {len(expected):,} files, {len(there):,} are there"
            )
        missing = sorted(set(expected) - set(there))
        if missing:
            of = f"{name or 'numbers'}: {len(there):,} of {len(expected):,} files"
            raise UserError(
                f"{path} has not all files of {of}; missing: {some_names(list(map(str, missing)), 5)}: download them, "
                "or pass --missing-files to take what is there"
            )
        if len(set(there)) != len(there) or len(there) > len(expected):
            raise UserError(
                f"{path} has {len(there):,} files for the {len(expected):,} of {name or 'numbers'} (such as "
                f"{numbers[0][1]}): two versions lie there, remove one"
            )
