"""Checkpoints of a run: atomic, asynchronous, and the same file for every strategy and world size.

A checkpoint is a folder ``checkpoints/step_XXXXXXXX``:

    values.json         step, config, fingerprint, bank pointer, ...; shapes of the tensors, file sizes
    .metadata           torch.distributed.checkpoint's table of contents: which block lies where
    __<rank>_0.distcp   the blocks that one rank wrote

It is written as ``step_XXXXXXXX.tmp``, every file and the folder are flushed to the disk, and rank 0
renames it last: ``step_XXXXXXXX`` is complete or absent, whatever is killed when.

**The layout knows no strategy.** A tensor is stored under a stable name as a global array of which any rank
may give any contiguous blocks, so what R ranks wrote R' ranks can read:

    query.<parameter>  key.<parameter>              flat: (number of elements,), these five alike
    query_buffer.<buffer>  key_buffer.<buffer>
    optimizer.<parameter>/<slot>
    bank.rows  bank.velocity  (K, D)                bank.assignments  (K,)

A replicated tensor (DDP) is given as it is and written once, whole, as its flat view; the ranks share that
work. A partitioned optimizer (ZeRO, FSDP2) gives the flat ranges it owns of the same names as
:class:`Block`, several to a tensor if need be; the original shape goes to ``values.json``.
"""

import contextlib
import hashlib
import io
import json
import math
import os
import pickle
import re
import shutil
import threading
import time
import warnings
import zipfile
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import filesystem as dcp_filesystem
from torch.distributed.checkpoint import metadata as dcp_metadata
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.distributed.tensor import DTensor

from caco_scale.atomic import flush_to_disk
from caco_scale.distributed.collectives import new_host_group, world_size
from caco_scale.distributed.partition import flat_part, is_zero3, whole_shape
from caco_scale.errors import UserError, one_line
from caco_scale.optim.build import named_state

FORMAT = 1

# One process is a legitimate way to train; DCP warns about it at every save.
warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")


@dataclass(frozen=True)
class Block:
    """A contiguous part of a global tensor: ``local`` lies at ``offset`` in an array of ``global_shape``.

    ``local`` has as many dimensions as ``global_shape`` and may be empty (a rank without a part still names
    the tensor). ``shape`` is the tensor's own shape where the global array is its flat view: a parameter of
    shape (F, D) owned from element 10 on is ``Block(flat, (10,), (F * D,), (F, D))``.
    """

    local: torch.Tensor
    offset: tuple[int, ...]
    global_shape: tuple[int, ...]
    shape: tuple[int, ...] | None = None


@dataclass
class State:
    """What a checkpoint holds: tensors by stable name, and values that JSON can say (the same on every rank).

    A plain tensor is the same on every rank; parts are a :class:`Block` or a list of disjoint ones. Every
    rank names every tensor.
    """

    tensors: dict[str, torch.Tensor | Block | list[Block]]
    values: dict = field(default_factory=dict)


def training_state(model, optimizer, bank, values, partitions=None):
    """The whole state of a run as a :class:`State`: of each tensor what this rank holds, whole or in part.

    ``model`` has the submodules ``query`` and ``key``, replicated, or partitioned by ZeRO-3 or FSDP2; ``bank``
    gives this rank's rows. ``partitions``: see :func:`~caco_scale.optim.build.named_state`. ``values`` (step,
    config, fingerprint, ...) is stored with ``bank_pointer`` added. No rank sees more of the model than it holds.
    """
    tensors, shapes = {}, {}
    for side in ("query", "key"):
        module = getattr(model, side)
        shapes |= {f"{side}.{name}": whole_shape(p) for name, p in module.named_parameters()}
        tensors.update({f"{side}.{name}": _parameter(p) for name, p in module.named_parameters()})
        tensors.update({f"{side}_buffer.{name}": b for name, b in module.named_buffers()})
    for name, value in named_state(optimizer, model.query, partitions).items():
        if isinstance(value, list):
            shape = shapes[f"query.{name.rsplit('/', 1)[0]}"]
            value = [_flat_block(part, offset, shape) for part, offset in value]
        tensors[f"optimizer.{name}"] = value
    start, _ = bank.rows_range
    tensors["bank.rows"] = Block(bank.rows, (start, 0), (bank.size, bank.dim))
    tensors["bank.velocity"] = Block(bank.velocity, (start, 0), (bank.size, bank.dim))
    tensors["bank.assignments"] = Block(bank.assignments, (start,), (bank.size,))
    return State(tensors, {**values, "bank_pointer": bank.pointer})


def _parameter(p):
    """A parameter as it is stored: itself where every rank has it whole, else this rank's block of it."""
    if isinstance(p, DTensor) or is_zero3(p):
        return _flat_block(*flat_part(p), whole_shape(p))
    return p


def _flat_block(part, offset, shape):
    return Block(part, (offset,), (math.prod(shape),), shape)


def restore(path, model, optimizer, bank, group=None, partitions=None):
    """Load a checkpoint into a run in place (see :func:`load`), the bank's pointer included -> its values.

    An engine that keeps copies of the parameters has to renew them afterwards: ``strategy.restore`` does.
    """
    values = load(path, training_state(model, optimizer, bank, {}, partitions), group)
    bank.pointer = values["bank_pointer"]
    return values


# ----------------------------------------------------------------------------------------------------------
# The folder


def steps(directory):
    """Steps of the complete checkpoints in ``directory``, ascending -> list of int."""
    if not Path(directory).is_dir():
        return []
    matches = [re.fullmatch(r"step_(\d{8,})", entry.name) for entry in Path(directory).iterdir()]
    return sorted(int(match[1]) for match in matches if match)


def step_path(directory, step):
    """The folder of one step's checkpoint -> Path."""
    return Path(directory) / f"step_{step:08d}"


def latest(directory):
    """The newest complete checkpoint in ``directory`` -> Path or None (on all ranks: see Checkpointer)."""
    found = steps(directory)
    return step_path(directory, found[-1]) if found else None


def read_values(path):
    """The JSON values of a checkpoint: the caller's, and step, torch, world_size, shapes and files.

    Raises UserError where there is no checkpoint, where it is damaged, and where a newer version wrote it.
    """
    path = Path(path)
    if not path.is_dir():
        raise UserError(f"no checkpoint at {path}: give the path of a checkpoints/step_XXXXXXXX folder")
    try:
        values = json.loads((path / "values.json").read_text())
        version = values["format"]
        assert isinstance(values["shapes"], dict)
        assert isinstance(values["files"], dict)
    except FileNotFoundError:
        raise UserError(
            f"{path} is not a checkpoint of this program: it has no values.json{_older(path)}"
        ) from None
    except (OSError, ValueError, KeyError, TypeError, AssertionError) as error:
        raise _damaged(path, "values.json", error) from error
    if version != FORMAT:
        raise UserError(
            f"checkpoint {path} has format {version}, this version reads {FORMAT}: update caco_scale"
        )
    return values


def _older(path):
    """What to do about a damaged checkpoint: the end of the error's line."""
    match = re.fullmatch(r"step_(\d{8,})", path.name)
    older = [step for step in steps(path.parent) if match and step < int(match[1])]
    if not older:
        return f"; there is no older one beside it: remove {path} or give another run.dir to start afresh"
    return f"; remove {path} and the run resumes from {step_path(path.parent, older[-1]).name}"


def _damaged(path, file, reason):
    reason = one_line(reason) or type(reason).__name__
    return UserError(f"checkpoint {path} is damaged: {file}: {reason[:200]}{_older(path)}")


# ----------------------------------------------------------------------------------------------------------
# How tensors lie in the file


@dataclass(frozen=True)
class _Stored:
    """One tensor as stored: the global array's ``size``, the tensor's own ``shape``, pieces by offset."""

    size: tuple[int, ...]
    shape: tuple[int, ...]
    dtype: torch.dtype
    replicated: bool
    pieces: dict[tuple[int, ...], torch.Tensor]


def _stored(name, value):
    if isinstance(value, torch.Tensor):
        value = value.detach()
        return _Stored((value.numel(),), tuple(value.shape), value.dtype, True, {(0,): value})
    blocks = [value] if isinstance(value, Block) else value
    first = blocks[0]
    size = tuple(first.global_shape)
    shape = size if first.shape is None else tuple(first.shape)
    assert math.prod(shape) == math.prod(size), f"{name}: shape {shape} is not a view of {size}"
    for block in blocks:
        assert (tuple(block.global_shape), block.shape, block.local.dtype) == (
            first.global_shape,
            first.shape,
            first.local.dtype,
        ), f"{name}: its blocks disagree"
        assert block.local.ndim == len(block.offset) == len(size), f"{name}: {block.local.shape} in {size}"
    pieces = {tuple(block.offset): block.local.detach() for block in blocks if block.local.numel()}
    return _Stored(size, shape, first.local.dtype, False, pieces)


def _owners(stored, world_size):
    """Who writes each replicated tensor, so that every rank writes about as many bytes -> {name: rank}.

    Decided from names and sizes alone: every rank comes to the same answer without asking, and copies only
    its share.
    """
    sizes = {name: math.prod(s.size) * s.dtype.itemsize for name, s in stored.items() if s.replicated}
    load, owners = [0] * world_size, {}
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        owners[name] = load.index(min(load))
        load[owners[name]] += sizes[name]
    return owners


def _signature(stored):
    """A hash of what the ranks must agree on: names, shapes, types."""
    lines = [f"{name} {s.size} {s.shape} {s.dtype} {s.replicated}" for name, s in sorted(stored.items())]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


class _Staging:
    """Copies of this rank's pieces in CPU memory that every save uses again (pinned for CUDA tensors)."""

    def __init__(self):
        self._buffers = {}

    def copy(self, stored, rank, world_size):
        """-> ({(name, offset): CPU tensor in the stored layout}, CUDA event of the last copy or None)."""
        owners, staged, event = _owners(stored, world_size), {}, None
        for name, s in stored.items():
            if owners.get(name, rank) != rank:
                continue
            for offset, piece in s.pieces.items():
                staged[name, offset] = self._copy_one((name, offset), piece, s)
                if piece.is_cuda:
                    event = event or torch.cuda.Event()
        if event is not None:
            event.record()  # later kernels of this stream overwrite the parameters only after these copies
        return staged, event

    def _copy_one(self, key, piece, s):
        shape = s.size if s.replicated else tuple(piece.shape)
        buffer = self._buffers.get(key)
        if buffer is None or (tuple(buffer.shape), buffer.dtype) != (shape, s.dtype):
            buffer = torch.empty(shape, dtype=s.dtype, pin_memory=piece.is_cuda)
            self._buffers[key] = buffer
        buffer.view(piece.shape).copy_(piece, non_blocking=True)
        return buffer


class _SavePlanner(DefaultSavePlanner):
    """Describes this rank's staged blocks to DCP; rank 0 checks that all ranks' blocks tile every tensor."""

    def __init__(self, stored, staged):
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self.stored, self.staged = stored, staged

    def set_up_planner(self, state_dict, storage_meta=None, is_coordinator=False):
        self.state_dict, self.is_coordinator = state_dict, is_coordinator

    def create_local_plan(self):
        items = []
        for (name, offset), tensor in self.staged.items():
            chunk = ChunkStorageMetadata(torch.Size(offset), tensor.shape)
            size = torch.Size(self.stored[name].size)
            data = TensorWriteData(chunk, TensorProperties(dtype=tensor.dtype), size)
            items.append(WriteItem(MetadataIndex(name, offset), WriteItemType.SHARD, tensor_data=data))
        self.plan = SavePlan(items, planner_data=_signature(self.stored))
        return self.plan

    def create_global_plan(self, all_plans):
        if len({plan.planner_data for plan in all_plans}) != 1:
            raise ValueError("the ranks do not name the same tensors with the same shapes")
        # By index: ranks that hold the same block count once, and DCP has one of them write it.
        given = {i.index: math.prod(i.tensor_data.chunk.sizes) for plan in all_plans for i in plan.items}
        counts = Counter()
        for index, count in given.items():
            counts[index.fqn] += count
        for name, s in self.stored.items():
            if counts[name] != math.prod(s.size):
                raise ValueError(f"{name}: the ranks give {counts[name]} of its {math.prod(s.size)} elements")
        return super().create_global_plan(all_plans)

    def resolve_data(self, write_item):
        return self.staged[write_item.index.fqn, tuple(write_item.index.offset)]


class _Writer(dcp.FileSystemWriter):
    """DCP's writer, without this machine's paths in the file and with the disk's own error where it fails."""

    def __init__(self, path):
        # The Checkpointer syncs the files itself: torch 2.11 syncs before it has flushed its own buffer.
        super().__init__(path, sync_files=False, per_thread_copy_ahead=0)

    def storage_meta(self):
        return dcp_metadata.StorageMeta()

    def write_data(self, plan, planner):
        try:
            return super().write_data(plan, planner)
        except Exception as error:
            raise _root(error) from None  # the cause of an exception does not survive the way to rank 0


# ----------------------------------------------------------------------------------------------------------
# Errors that all ranks share


class _ProcessGone(UserError):
    """A rank died or was killed: no rank can complete what they do together."""


def _root(error):
    """The OSError below an exception (torch says ``unexpected pos`` for a full disk), or itself."""
    cause = error
    while cause is not None:
        if isinstance(cause, OSError):
            return OSError(cause.errno, cause.strerror, cause.filename)
        cause = cause.__cause__ or cause.__context__
    return error


def _reason(error):
    """One line for an exception."""
    if isinstance(error, CheckpointException):
        error = next(iter(error.failures.values()))[0]
    if isinstance(error, UserError):
        return one_line(error)
    error = _root(error)
    if isinstance(error, OSError):
        return f"{error.strerror or error}" + (f" ({error.filename})" if error.filename else "")
    return f"{type(error).__name__}: {one_line(error)[:500]}"


def _together(function, group):
    """Run ``function`` on every rank; an error anywhere is a UserError everywhere -> results by rank."""
    cause = None
    try:
        outcome = (function(), None)
    except (Exception, CheckpointException) as error:
        outcome, cause = (None, _reason(error)), error
    outcomes = [outcome]
    if group is not None:
        outcomes = [None] * dist.get_world_size(group)
        try:
            dist.all_gather_object(outcomes, outcome, group=group)
        except RuntimeError as error:  # gloo's word for a closed connection
            raise _ProcessGone("another process of the run has ended") from error
    for _, reason in outcomes:
        if reason is not None:
            raise UserError(reason) from cause
    return [result for result, _ in outcomes]


def _new_cpu_group(group):
    """A gloo group of the same ranks (collective); None for one process."""
    return new_host_group(group) if world_size(group) > 1 else None


# ----------------------------------------------------------------------------------------------------------
# Saving


class Checkpointer:
    """Writes a run's checkpoints in the background; one at a time, all ranks together.

    ``directory``: the run's ``checkpoints`` folder. ``keep``: newest checkpoints to keep, 0 = all; an older
    one is deleted only when the new one is complete, and only if its step is smaller. ``group``: the ranks
    that save (default: all). A process that hangs does not keep the others alive in a save for longer than
    ``collectives.patience()``. Collective: the constructor, ``save``, ``check``, ``wait``, ``latest``, ``close``.
    The constructor also removes what killed saves left behind, so build it before asking for the latest checkpoint.
    """

    def __init__(self, directory, keep=0, group=None):
        self.directory, self.keep = Path(directory), keep
        self._group = _new_cpu_group(group)  # the background thread's own
        self._control = _new_cpu_group(group)  # the training thread's: two threads cannot share one
        self._rank = dist.get_rank(self._group) if self._group else 0
        self._world_size = dist.get_world_size(self._group) if self._group else 1
        self._staging, self._thread, self._error = _Staging(), None, None
        self.completed = None  # the last complete save: (step, seconds from its beginning on)
        self._on_rank_0(self._clean, self._control)

    def save(self, step, state, wait=False):
        """Save ``state`` as of now; returns once it is copied to CPU memory, or complete if ``wait``.

        Waits for the save before this one and raises its error. What the caller changes after the return is
        not in the file. This rank copies its own blocks and its share of the replicated tensors.
        """
        self.wait()
        began = time.monotonic()
        stored = {name: _stored(name, value) for name, value in state.tensors.items()}
        values = {
            **state.values,
            "format": FORMAT,
            "step": step,
            "torch": torch.__version__,
            "world_size": self._world_size,
            "shapes": {name: s.shape for name, s in stored.items()},
        }
        values = json.loads(json.dumps(values))  # a copy, and an error here if JSON cannot say it
        staged, event = self._staging.copy(stored, self._rank, self._world_size)
        planner = _SavePlanner(stored, staged)
        # Not a daemon: a process that ends meanwhile, by an error too, completes its part first.
        self._thread = threading.Thread(
            target=self._write, args=(step, planner, event, values, began), name="checkpoint"
        )
        self._thread.start()
        if wait:
            self.wait()

    @property
    def failed(self):
        """Whether a save in the background has failed, as far as this rank knows. Local: sends nothing.

        For a loop that agrees on signals at every step anyway: put it among those flags, and call ``wait``
        on every rank when any has it.
        """
        return self._error is not None

    def check(self):
        """At a step boundary: raise a failed save's UserError, on every rank at once (a tiny all-reduce)."""
        failed = torch.tensor([int(self.failed)])
        if self._control is not None:
            dist.all_reduce(failed, dist.ReduceOp.MAX, group=self._control)
        if failed.item():
            self.wait()

    def wait(self):
        """Wait until the save in flight is complete; raises its UserError (on every rank)."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error

    def latest(self):
        """The newest complete checkpoint as rank 0 sees it, the same answer on every rank -> Path or None."""
        return self._on_rank_0(lambda: latest(self.directory), self._control)

    def close(self):
        """Wait for the save in flight, give the process groups back. Not for the way out after an error."""
        self.wait()
        for group in (self._group, self._control):
            if group is not None:
                dist.destroy_process_group(group)
        self._group = self._control = None

    # The background thread:

    def _write(self, step, planner, event, values, began):
        final = step_path(self.directory, step)
        temporary = final.with_name(f"{final.name}.tmp")
        try:
            if event is not None:
                event.synchronize()
            self._on_rank_0(lambda: self._make(temporary), self._group)
            files = _together(lambda: self._write_tensors(temporary, planner), self._group)
            self._on_rank_0(lambda: self._commit(temporary, final, values, files), self._group)
            self.completed = (step, time.monotonic() - began)
            self._on_rank_0(lambda: self._prune(step), self._group)
        except BaseException as error:
            self._error = self._failure(step, final, error)
            if self._rank == 0:
                shutil.rmtree(temporary, ignore_errors=True)

    def _on_rank_0(self, function, group):
        """Run ``function`` on rank 0 alone; its result, or its error, on every rank."""
        return _together(function if self._rank == 0 else lambda: None, group)[0]

    def _failure(self, step, final, error):
        what = f"the checkpoint of step {step} could not be written to {final}: {_reason(error).rstrip('. ')}"
        if isinstance(error, _ProcessGone):
            return UserError(f"{what}; older checkpoints are untouched: resume from them")
        free = "unknown"
        with contextlib.suppress(OSError):
            free = f"{shutil.disk_usage(self.directory).free / 1e9:.2f} GB"
        return UserError(
            f"{what} (free there: {free}); older checkpoints are untouched: make room, or move run.dir to a "
            "larger disk, and resume"
        )

    def _clean(self):
        """Remove what killed saves left; a checkpoint that was being replaced by a repetition returns."""
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"cannot make the checkpoint folder {self.directory}: {error.strerror}"
            ) from error
        for old in self.directory.glob("step_*.old.tmp"):
            final = old.with_name(old.name.removesuffix(".old.tmp"))
            if not final.exists():
                os.rename(old, final)
        for stale in self.directory.glob("step_*.tmp"):
            shutil.rmtree(stale)

    def _make(self, temporary):
        if temporary.exists():
            shutil.rmtree(temporary)
        temporary.mkdir(parents=True)

    def _write_tensors(self, temporary, planner):
        """Write this rank's blocks and flush them to the disk -> {file name: bytes}."""
        dcp.save(
            {},
            storage_writer=_Writer(temporary),
            planner=planner,
            process_group=self._group,
            no_dist=self._group is None,
        )
        files = list(temporary.glob(f"__{self._rank}_*.distcp"))
        for file in files:
            flush_to_disk(file)
        return {file.name: file.stat().st_size for file in files}

    def _commit(self, temporary, final, values, files):
        """Rank 0, when every rank has written: the values, the folder, the rename."""
        table = temporary / ".metadata"
        sizes = {name: size for part in files for name, size in part.items()} | {
            ".metadata": table.stat().st_size
        }
        for name, size in sizes.items():
            seen = (temporary / name).stat().st_size if (temporary / name).is_file() else None
            if seen != size:
                raise UserError(
                    f"a process on another machine wrote {name} ({size} bytes), of which this one sees {seen}: "
                    "run.dir must lie on a file system that all machines share"
                )
        with open(temporary / "values.json", "w") as stream:
            json.dump({**values, "files": sizes}, stream, indent=1)
        for path in (table, temporary / "values.json", temporary):
            flush_to_disk(path)
        old = final.with_name(f"{final.name}.old.tmp")
        if final.exists():  # the same step again, after a resume from an older checkpoint
            os.rename(final, old)
        os.rename(temporary, final)
        flush_to_disk(self.directory)
        if old.exists():
            shutil.rmtree(old)

    def _prune(self, step):
        older = [s for s in steps(self.directory) if s < step]
        for victim in older[: max(0, len(older) + 1 - self.keep)] if self.keep else []:
            path = step_path(self.directory, victim)
            temporary = path.with_name(f"{path.name}.tmp")
            os.rename(path, temporary)  # from here on no reader takes it for a checkpoint
            shutil.rmtree(temporary, ignore_errors=True)


# ----------------------------------------------------------------------------------------------------------
# Loading


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
    """Values and table of contents of a checkpoint, its files' sizes checked -> (values, dcp Metadata)."""
    values = read_values(path)
    for name, size in values["files"].items():
        found = (path / name).stat().st_size if (path / name).is_file() else None
        if found != size:
            raise _damaged(
                path, name, "missing" if found is None else f"{found} of its {size} bytes are there"
            )
    try:
        with open(path / ".metadata", "rb") as stream:
            table = _Unpickler(stream).load()
        for info in table.storage_data.values():
            assert info.relative_path in values["files"], f"unknown file {info.relative_path}"
        assert set(table.state_dict_metadata) == set(values["shapes"]), "it does not match values.json"
    except Exception as error:
        raise _damaged(path, ".metadata", error) from error
    return values, table


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


def _record(stream, info):
    """Read one stored block and check its CRC, which torch.load does not -> tensor."""
    stream.seek(info.offset)
    data = io.BytesIO(stream.read(info.length))
    with zipfile.ZipFile(data) as archive:
        bad = archive.testzip()
    if bad is not None:
        raise zipfile.BadZipFile(f"wrong checksum of the block at byte {info.offset}")
    data.seek(0)
    return torch.load(data, map_location="cpu", weights_only=True)


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
                raise _damaged(path, ".metadata", f"it does not cover {name}")
            for item in items:
                by_block[item.storage_index].append(item)

    by_file = defaultdict(list)
    for index in by_block:
        by_file[table.storage_data[index].relative_path].append(index)
    for file, indices in by_file.items():
        try:
            with open(path / file, "rb") as stream:
                for index in sorted(indices, key=lambda index: table.storage_data[index].offset):
                    block = _record(stream, table.storage_data[index])
                    for item in by_block[index]:
                        target = targets[item.dest_index.fqn, tuple(item.dest_index.offset)]
                        part = block[_box(item.storage_offsets, item.lengths)]
                        target[_box(item.dest_offsets, item.lengths)].copy_(part)
        except Exception as error:
            raise _damaged(path, file, error) from error
    for piece, target in copy_back:
        piece.copy_(target.view(piece.shape))


def _box(offsets, lengths):
    return tuple(slice(start, start + length) for start, length in zip(offsets, lengths, strict=True))


def load(path, state, group=None):
    """Load a checkpoint into the tensors of ``state`` in place -> its values (:func:`read_values`).

    Whatever ranks and blocks wrote it: each rank reads what overlaps its own. Collective over ``group``
    (default: all ranks) only to agree on errors. Raises UserError, the same on every rank: tensors missing,
    left over or of another size or type (listed); a damaged file (named, with the next older checkpoint).
    """
    path, cpu_group = Path(path), _new_cpu_group(group)
    stored = {name: _stored(name, value) for name, value in state.tensors.items()}

    def read():
        values, table = _open(path)
        _compare(path, table, stored, exact=True)
        _read(path, table, stored)
        return values

    try:
        return _together(read, cpu_group)[0]
    finally:
        if cpu_group is not None:
            dist.destroy_process_group(cpu_group)


def load_tensors(path, names=None):
    """Whole tensors of a checkpoint by name, in their own shapes, on one CPU process without a process group.

    ``names``: which (default all); UserError for one that is not there -> {name: tensor}.
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
        stored[name] = _Stored(tuple(entry.size), shape, empty.dtype, False, {(0,) * empty.ndim: empty})
    _read(path, table, stored)
    return {name: next(iter(s.pieces.values())).view(s.shape) for name, s in stored.items()}
