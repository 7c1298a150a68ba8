"""A directory of Hugging Face parquet files as a source: images as they are stored, bytes not re-encoded.

Parquet is read row group by row group, while a build reads images in random order. So the images are copied once
to one file in the scratch folder, and read from there by offset.
"""

import contextlib
import json
import os
import re
from pathlib import Path
from typing import Any

from caco_scale.atomic import write_atomically
from caco_scale.data.folders import File, Listing
from caco_scale.errors import UserError, one_line
from data_prep.destination import FULL_DISK, SCRATCH_FILES, free_space
from data_prep.tar import TarSource

SPLIT_FILE = r"([A-Za-z]\w*)-\d+-of-\d+(-\w+)?\.parquet"
PACKED, NOTE = SCRATCH_FILES


class ParquetSource(TarSource):
    """Images of the ``image`` column (a struct with ``bytes``, or the bytes), classes of the ``label`` column."""

    def __init__(self, path: str, scratch: str | os.PathLike, split: str | None = None):
        super().__init__(os.path.join(scratch, PACKED), path)
        self.files = [
            str(file)
            for file in sorted(Path(path).rglob("*.parquet"))
            if split is None or file.name.startswith(f"{split}-") or file.parent.name == split
        ]
        if not self.files:
            raise UserError(f"{path} has no parquet files" + (f" of the split {split}" if split else ""))
        matches = (re.fullmatch(SPLIT_FILE, os.path.basename(file)) for file in self.files)
        splits = {match[1] for match in matches if match}
        if split is None and len(splits) > 1:
            raise UserError(
                f"{path} has {len(splits)} splits ({', '.join(sorted(splits))}), which are no one set: choose one with "
                "--split"
            )
        self.origin = [[file, os.path.getsize(file), os.stat(file).st_mtime_ns] for file in self.files]
        self.note = os.path.join(scratch, NOTE)

    def scan(self) -> Listing:
        there: dict[str, Any] | None = None
        if os.path.exists(self.note) and os.path.exists(self.path):
            with contextlib.suppress(ValueError):  # cut short by an earlier version
                there = json.loads(Path(self.note).read_text())
        if there is None or there["origin"] != self.origin:
            there = {"origin": self.origin, "files": self._unpack()}
            write_atomically(self.note, json.dumps(there).encode())
        listing = Listing()
        for name, size, offset in there["files"]:
            listing.add(File(name, size, offset))
        return listing

    def _unpack(self):
        try:
            import pyarrow
            import pyarrow.parquet as parquet
        except ImportError:
            raise UserError("--format parquet needs pyarrow: pip install pyarrow") from None
        unreadable = (pyarrow.ArrowException, OSError, LookupError, TypeError, ValueError, AttributeError)
        try:
            with open(self.path, "wb") as packed:
                return self._copy(packed, parquet.ParquetFile, unreadable)
        except OSError as error:
            if error.errno not in FULL_DISK:
                raise
            folder = os.path.dirname(self.path)
            raise UserError(
                f"no space for {folder} to unpack the parquet files of {self.label}: {error.strerror}; "
                f"{free_space(folder)}: free some, or set TMPDIR"
            ) from None

    def _copy(self, packed, open_parquet, unreadable):
        """Write the images of all files one after another to ``packed``; returns [(name, bytes, offset)]."""
        found, offset = [], 0
        for number, path in enumerate(self.files):
            try:
                for data, name in self._rows(open_parquet(path)):
                    found.append([f"{name}/{number:05d}_{len(found):08d}.jpg", len(data), offset])
                    offset += packed.write(data)
            except unreadable as error:
                if isinstance(error, OSError) and error.errno in FULL_DISK:
                    raise
                raise UserError(f"{path} cannot be read as images with labels: {one_line(error)}") from None
        return found

    @staticmethod
    def _rows(file):
        """(bytes, class name) of every row."""
        names = _class_names(file.schema_arrow.metadata)
        for batch in file.iter_batches(batch_size=64, columns=["image", "label"]):
            rows = batch.to_pydict()
            for image, label in zip(rows["image"], rows["label"], strict=True):
                data = image["bytes"] if isinstance(image, dict) else image
                if data is None or label is None:
                    raise ValueError("a row without image bytes or label")
                if isinstance(label, int) and not 0 <= label < len(names or range(label + 1)):
                    raise ValueError(
                        f"label {label} of {len(names or ())} classes: has this split no labels?"
                    )
                name = names[label] if names else f"{label:05d}" if isinstance(label, int) else str(label)
                yield data, name.replace("/", "_")


def _class_names(metadata):
    """The names that the data set's card has for its labels, prefixed so that their order stays; None without."""
    info = json.loads((metadata or {}).get(b"huggingface", b"{}"))
    names = info.get("info", {}).get("features", {}).get("label", {}).get("names")
    if not names or list(names) == sorted(names):
        return names
    return [f"{number:05d}_{name}" for number, name in enumerate(names)]
