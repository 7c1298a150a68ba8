"""Reading a checkpoint: by as many ranks as there are now, each of them only the blocks that overlap its own.

``.metadata`` is a pickle; it is read by an unpickler that makes nothing but records of names, shapes and types.
"""

import io
import math
import pickle
import pickletools
import zipfile
from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.checkpoint import filesystem as dcp_filesystem
from torch.distributed.checkpoint import metadata as dcp_metadata
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from caco_scale.checkpoint.folder import TABLE, VALUES, check_files, damaged, read_values
from caco_scale.checkpoint.state import State, Stored, as_stored
from caco_scale.checkpoint.together import new_cpu_group, together
from caco_scale.distributed.collectives import rank, world_size
from caco_scale.errors import UserError


class _Unpickler(pickle.Unpickler):
    """Reads ``.metadata``, which DCP pickles, and makes nothing but records of names, shapes and types."""

    allowed = {
        (dcp_metadata.__name__, name)
        for name in (
            "Metadata",
            "TensorStorageMetadata",
            "ChunkStorageMetadata",
            "TensorProperties",
            "StorageMeta",
            "MetadataIndex",
            "_MEM_FORMAT_ENCODING",
        )
    } | {(dcp_filesystem.__name__, "_StorageInfo"), ("torch", "Size"), ("torch.serialization", "_get_layout")}

    def find_class(self, module, name):
        if (module, name) in self.allowed:
            return super().find_class(module, name)
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        raise pickle.UnpicklingError(f"it names {module}.{name}, which no checkpoint needs")


def _open(path):
    """Values and table of contents of a checkpoint, nothing else of it parsed -> (values, dcp Metadata)."""
    values = read_values(path)
    check_files(path, values, [TABLE])
    try:
        data = (path / TABLE).read_bytes()
        if "sums" not in values:  # of 0.1, which has no hash of it
            _refuse_greedy(data)
        table = _Unpickler(io.BytesIO(data)).load()
        _check_table(table, values)
    except Exception as error:
        raise damaged(path, TABLE, error) from error
    return values, table


def _refuse_greedy(data):
    """ValueError for a pickle that would reserve more memory than its length explains: one flipped bit can ask it."""
    for opcode, value, _ in pickletools.genops(data):  # which reserves nothing
        if "PUT" in opcode.name and (value or 0) > len(data):
            raise ValueError(f"it numbers an object {value} in {len(data)} bytes")


def _check_table(table, values):
    """ValueError where blocks and tensors claim more than the files hold.

    A block lies within its file, no two share bytes, and the blocks of a tensor have as many elements as it has: what a
    reader allocates for tensors is at most what the files, whose sizes are checked, can fill.
    """
    files, used = values["files"], Counter()
    for info in table.storage_data.values():
        name, size = info.relative_path, files.get(info.relative_path)
        if size is None:
            raise ValueError(f"unknown file {name}")
        if min(info.offset, info.length - 1) < 0 or info.offset + info.length > size:
            raise ValueError(f"a block of {info.length} bytes at {info.offset} of the {size} of {name}")
        used[name] += info.length
        if used[name] > size:
            raise ValueError(f"its blocks are more than the {size} bytes of {name}")
    if set(table.state_dict_metadata) != set(values["shapes"]):
        raise ValueError(f"it does not match {VALUES}")
    for name, entry in table.state_dict_metadata.items():
        found = sum(_block_elements(name, entry, chunk, table.storage_data) for chunk in entry.chunks)
        wanted = math.prod(entry.size)
        if not found == wanted == math.prod(values["shapes"][name]):
            raise ValueError(f"it has {found} of the {wanted} elements of {name} {values['shapes'][name]}")


def _block_elements(name, entry, chunk, storage):
    """How many elements a block has, which lies within its tensor and has the bytes for them."""
    places = list(zip(chunk.offsets, chunk.sizes, entry.size, strict=True))
    if any(min(start, size) < 0 or start + size > whole for start, size, whole in places):
        raise ValueError(
            f"a block {tuple(chunk.sizes)} at {tuple(chunk.offsets)} of {name} {tuple(entry.size)}"
        )
    elements = math.prod(chunk.sizes)
    if elements:
        length = storage[MetadataIndex(name, chunk.offsets)].length
        if elements * entry.properties.dtype.itemsize > length:
            raise ValueError(f"{elements} elements of {name} in {length} bytes")
    return elements


def _compare(path, table, stored, exact):
    """UserError that lists where the state and the checkpoint differ in names, sizes or types."""
    there = table.state_dict_metadata
    problems = [f"not in the checkpoint: {name}" for name in stored if name not in there]
    if exact:
        problems += [f"only in the checkpoint: {name}" for name in there if name not in stored]
    for name, s in stored.items():
        if name in there and tuple(there[name].size) != s.size:
            problems.append(f"{name}: {tuple(there[name].size)} elements in the checkpoint, {s.size} here")
        elif name in there and there[name].properties.dtype != s.dtype:
            problems.append(f"{name}: {there[name].properties.dtype} in the checkpoint, {s.dtype} here")
    if problems:
        more = f"; and {len(problems) - 8} more" if len(problems) > 8 else ""
        raise UserError(
            f"checkpoint {path} does not fit this run (another model, bank or optimizer?): "
            f"{'; '.join(problems[:8])}{more}"
        )


def _record(stream, info, sizes, dtype):
    """Read one stored block and check its CRC, which torch.load does not -> tensor of ``sizes``."""
    stream.seek(info.offset)
    data = io.BytesIO(stream.read(info.length))
    with zipfile.ZipFile(data) as archive:
        if any(member.compress_type != zipfile.ZIP_STORED for member in archive.infolist()):
            raise zipfile.BadZipFile(f"the block at byte {info.offset} is compressed, which none of ours is")
        bad = archive.testzip()
    if bad is not None:
        raise zipfile.BadZipFile(f"wrong checksum of the block at byte {info.offset}")
    data.seek(0)
    block = torch.load(data, map_location="cpu", weights_only=True)
    if block.shape != sizes or block.dtype != dtype:
        raise ValueError(f"the block at byte {info.offset} is {tuple(block.shape)} of {block.dtype}")
    return block


def _read(path, table, stored):
    """Fill the pieces of ``stored`` in place from the blocks that overlap them; each block is read once."""
    targets, copy_back, by_block = {}, [], defaultdict(list)
    for name, s in stored.items():
        for offset, piece in s.pieces.items():
            target = piece
            if s.replicated:
                target = piece.view(-1) if piece.is_contiguous() else piece.new_empty(s.size)
                if not piece.is_contiguous():
                    copy_back.append((piece, target))
            targets[name, offset] = target
            chunk = ChunkStorageMetadata(torch.Size(offset), target.shape)
            items = create_read_items_for_chunk_list(name, table.state_dict_metadata[name], [chunk])
            if sum(math.prod(item.lengths) for item in items) != target.numel():
                raise damaged(path, TABLE, f"it does not cover {name}")
            for item in items:
                by_block[item.storage_index].append(item)

    kinds = {
        MetadataIndex(name, chunk.offsets): (chunk.sizes, table.state_dict_metadata[name].properties.dtype)
        for name in stored
        for chunk in table.state_dict_metadata[name].chunks
    }
    by_file = defaultdict(list)
    for index in by_block:
        by_file[table.storage_data[index].relative_path].append(index)
    for file, indices in by_file.items():
        try:
            with open(path / file, "rb") as stream:
                for index in sorted(indices, key=lambda index: table.storage_data[index].offset):
                    block = _record(stream, table.storage_data[index], *kinds[index])
                    for item in by_block[index]:
                        target = targets[item.dest_index.fqn, tuple(item.dest_index.offset)]
                        part = block[_box(item.storage_offsets, item.lengths)]
                        target[_box(item.dest_offsets, item.lengths)].copy_(part)
        except Exception as error:
            raise damaged(path, file, error) from error
    for piece, target in copy_back:
        piece.copy_(target.view(piece.shape))


def _box(offsets, lengths):
    return tuple(slice(start, start + length) for start, length in zip(offsets, lengths, strict=True))


def load(path: str | Path, state: State, group: dist.ProcessGroup | None = None) -> dict:
    """Load a checkpoint into the tensors of ``state`` in place -> its values (``folder.read_values``).

    Whatever ranks and blocks wrote it: each rank reads what overlaps its own. Collective over ``group``
    (default: all ranks) only to agree on errors. Raises UserError, the same on every rank: tensors missing,
    left over or of another size or type (listed); a damaged file (named, with the next older checkpoint).
    """
    path, cpu_group = Path(path), new_cpu_group(group)
    stored = {name: as_stored(name, value) for name, value in state.tensors.items()}

    opened: list = []

    def open_and_check():
        """The files are hashed once, each rank some of them: it may need blocks of all."""
        opened[:] = values, table = _open(path)
        _compare(path, table, stored, exact=True)
        check_files(path, values, sorted(values["files"])[rank(cpu_group) :: world_size(cpu_group)])

    try:
        together(open_and_check, cpu_group)
        values, table = opened
        together(lambda: _read(path, table, stored), cpu_group)
        return values
    finally:
        if cpu_group is not None:
            dist.destroy_process_group(cpu_group)


def load_tensors(path: str | Path, names: Iterable[str] | None = None) -> dict[str, torch.Tensor]:
    """Whole tensors of a checkpoint by name, in their own shapes, on one CPU process without a process group.

    ``names``: which (default all).

    Raises:
        UserError: no such tensor; a damaged file.
    """
    path = Path(path)
    values, table = _open(path)
    stored = {}
    for name in table.state_dict_metadata if names is None else names:
        entry = table.state_dict_metadata.get(name)
        if entry is None:
            raise UserError(f"checkpoint {path} holds no tensor {name}")
        empty = torch.empty(entry.size, dtype=entry.properties.dtype)
        shape = tuple(values["shapes"][name])
        stored[name] = Stored(tuple(entry.size), shape, empty.dtype, False, {(0,) * empty.ndim: empty})
    blocks = [
        MetadataIndex(name, c.offsets) for name in stored for c in table.state_dict_metadata[name].chunks
    ]
    found = [table.storage_data[index] for index in blocks if index in table.storage_data]
    check_files(path, values, sorted({info.relative_path for info in found}))
    _read(path, table, stored)
    return {name: next(iter(s.pieces.values())).view(s.shape) for name, s in stored.items()}
