"""What a source is, and the one that most are: an uncompressed tar, read in place."""

import io
import os
from typing import Protocol

from caco_scale.data.folders import File, Listing, hidden, is_image, without_arrays
from caco_scale.data.splits import split_kind
from caco_scale.data.tars import whole_tar_members
from caco_scale.errors import UserError


class Source(Protocol):
    """Where images come from. Picklable: workers read by themselves."""

    def scan(self) -> Listing:
        """Everything that there is."""
        ...

    def read(self, file: File) -> bytes:
        """The bytes of one file of the listing."""
        ...


class TarSource:
    """An uncompressed tar, read in place: member names are only names, no path of a member is ever opened.

    ``label`` is how messages name it.
    """

    def __init__(self, path: str | os.PathLike, label: str | os.PathLike):
        self.path, self.label = str(path), str(label)
        self._file: io.FileIO | None = None

    def __getstate__(self):
        return {"path": self.path, "label": self.label, "_file": None}

    def scan(self) -> Listing:
        """Everything in the tar; what may not be read from it is skipped, with the reason."""
        files, listing = {}, Listing()
        with open(self.path, "rb") as stream:
            for member in whole_tar_members(stream, self.label):
                name = "/".join(part for part in member.name.split("/") if part not in ("", "."))
                reason = self._refused(member)
                if reason:
                    listing.skipped.append((name if "unsafe" not in reason else member.name, reason))
                elif not name or hidden(name):
                    continue
                elif member.isdir():
                    listing.add_folder(name)
                else:
                    files[name] = File(
                        name, member.size, member.offset_data
                    )  # a later member of a name counts
        if not files and not listing.folders and not listing.skipped:
            raise UserError(
                f"{self.label} is an empty tar ({os.path.getsize(self.path):,} bytes, no files in it)"
            )
        for file in files.values():
            listing.add(file)
        return without_wrapper(without_arrays(listing))

    @staticmethod
    def _refused(member):
        if member.name.startswith("/") or ".." in member.name.split("/") or "\\" in member.name:
            return "unsafe name in the tar (absolute, '..' or a backslash)"
        if member.issym() or member.islnk():
            return "link in the tar"
        if member.issparse() or not (member.isreg() or member.isdir()):
            return "not a regular file in the tar"
        return None

    def read(self, file: File) -> bytes:
        """The bytes of a member."""
        try:
            if self._file is None:
                self._file = io.FileIO(self.path)  # kept open for the next reads
            data = os.pread(self._file.fileno(), file.num_bytes, file.offset)
        except OSError as error:
            raise UserError(f"cannot read {self.label}: {error.strerror}") from None
        if len(data) != file.num_bytes:
            raise UserError(f"{self.label} became shorter while it was read (at {file.name})")
        return data


def without_wrapper(listing: Listing) -> Listing:
    """A tar is often made of one folder around everything: leave that folder out of the names."""
    tops = {name.split("/")[0] for name in listing.folders}
    names = [file.name for file in listing.files if is_image(file.name)]
    if len(tops) != 1 or not names or any(name.count("/") < 2 for name in names) or split_kind(min(tops)):
        return listing
    start = len(tops.pop()) + 1
    return Listing(
        [file._replace(name=file.name[start:]) for file in listing.files if "/" in file.name],
        {name[start:] for name in listing.folders if len(name) > start},
        listing.skipped,
    )
