"""Images that are files of their own, read in place by a listing of them."""

import os

from caco_scale.data.counters import Counters
from caco_scale.data.listed_files import ListedFiles, refuse_size
from caco_scale.data.scan import NO_IMAGE
from caco_scale.data.shard_index import ShardIndex
from caco_scale.data.store.base import InPlaceStore
from caco_scale.errors import UserError


class ListedStore(InPlaceStore):
    """The images of a listing. ``base``: the folder that its names count from.

    A sample's key is its name there. The hash of a block is one of names and sizes, not of the images: a picture that
    changes and keeps its size is not noticed.
    """

    pickled = ("url", "manifest", "files", "base")

    def __init__(self, url: str, base: str, files: ListedFiles, counters: Counters | None = None):
        self.url, self.base, self.files = url, base, files
        self._begin(counters or Counters())
        self.manifest = files.manifest()

    @property
    def repair_hint(self) -> str:
        return f"replace these files in {self.url}, or move them away"

    def _load_index(self, shard: int) -> ShardIndex:
        return self._keep_index(shard, self.files.block(shard))

    @property
    def left_out(self) -> str:
        """Links that lead to what is listed already, or nowhere."""
        links = [entry for entry in self.manifest.rejected if entry["reason"] != NO_IMAGE]
        if not links:
            return ""
        return f"{len(links):,} left out of {self.url}: {links[0]['name']} ({links[0]['reason']}), ..."

    def read(self, shard: int, start: int, num_bytes: int, recorded: int | None = None) -> bytes:
        """The whole file number ``start`` of a block."""
        path = os.path.join(self.base, self.index(shard).keys[start])
        try:
            with open(path, "rb") as file:
                data = file.read()
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror}") from None
        if len(data) != num_bytes:
            raise refuse_size(path, len(data), num_bytes)
        return data
