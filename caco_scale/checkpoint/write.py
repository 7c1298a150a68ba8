"""Writing checkpoints in the background, one at a time, all ranks together.

A save copies this rank's pieces to CPU memory and returns; a thread writes them by torch.distributed.checkpoint, and
rank 0 commits the folder when every rank has written and flushed its part.
"""

import contextlib
import json
import math
import shutil
import threading
import time
import warnings
from collections import Counter
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import metadata as dcp_metadata
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType

from caco_scale.atomic import flush_to_disk
from caco_scale.checkpoint import folder
from caco_scale.checkpoint.state import State, as_stored, owners, signature
from caco_scale.checkpoint.sums import file_sha256
from caco_scale.checkpoint.together import ProcessGone, new_cpu_group, reason_of, root, together
from caco_scale.errors import UserError
from caco_scale.run.patience import Patience

# A save that is asked for at a run's end gets time for its bytes: a disk this slow is not one that hangs.
SLOWEST_BYTES_PER_SECOND = 10e6

# One process is a legitimate way to train; DCP warns about it at every save.
warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")


class _Staging:
    """Copies of this rank's pieces in CPU memory that every save uses again (pinned for CUDA tensors)."""

    def __init__(self):
        self._buffers = {}

    def copy(self, stored, rank, world_size):
        """-> ({(name, offset): CPU tensor in the stored layout}, CUDA event of the last copy or None)."""
        writers, staged, event = owners(stored, world_size), {}, None
        for name, s in stored.items():
            if writers.get(name, rank) != rank:
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

    def __init__(self, stored, staged, count):
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self.stored, self.staged, self._count = stored, staged, count

    def set_up_planner(self, state_dict, storage_meta=None, is_coordinator=False):
        self.state_dict, self.is_coordinator = state_dict, is_coordinator

    def create_local_plan(self):
        items = []
        for (name, offset), tensor in self.staged.items():
            chunk = ChunkStorageMetadata(torch.Size(offset), tensor.shape)
            size = torch.Size(self.stored[name].size)
            data = TensorWriteData(chunk, TensorProperties(dtype=tensor.dtype), size)
            items.append(WriteItem(MetadataIndex(name, offset), WriteItemType.SHARD, tensor_data=data))
        self.plan = SavePlan(items, planner_data=signature(self.stored))
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
        self._count()  # those before it are written
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
            raise root(error) from None  # the cause of an exception does not survive the way to rank 0


class Checkpointer:
    """Writes a run's checkpoints in the background; one at a time, all ranks together.

    ``directory``: the run's ``checkpoints`` folder. ``keep``: newest checkpoints to keep, 0 = all; an older
    one is deleted only when the new one is complete, and only if its step is smaller. ``group``: the ranks
    that save (default: all). A process that hangs does not keep the others alive in a save for longer than
    ``collectives.exchange_timeout()``, a disk that hangs no longer than ``disk`` is patient. Collective: the
    constructor, ``save``, ``wait``, ``latest``, ``prune``, ``close``.
    The constructor also removes what killed saves left behind, so build it before asking for the latest checkpoint.
    """

    def __init__(
        self,
        directory: str | Path,
        keep: int = 0,
        group: dist.ProcessGroup | None = None,
        disk: Patience | None = None,
    ):
        self.directory, self.keep = Path(directory), keep
        self._disk = disk or Patience(directory)
        self._progress, self._bytes = (
            0,
            0,
        )  # of the save in flight: grows with what is done; what this rank writes
        self._group = new_cpu_group(group)  # the background thread's own
        self._control = new_cpu_group(group)  # the training thread's: two threads cannot share one
        self._rank = dist.get_rank(self._group) if self._group else 0
        self._world_size = dist.get_world_size(self._group) if self._group else 1
        self._staging, self._thread, self._error = _Staging(), None, None
        self.completed: tuple[int, float] | None = None  # the last: step, seconds from its beginning on
        self._ask_on_rank_0(lambda: folder.clean(self.directory))

    def save(self, step: int, state: State, wait: bool = False) -> None:
        """Save ``state`` as of now; returns once it is copied to CPU memory, or complete if ``wait``.

        Waits for the save before this one and raises its error. What the caller changes after the return is
        not in the file. This rank copies its own blocks and its share of the replicated tensors.
        """
        self.wait()
        began = time.monotonic()
        stored = {name: as_stored(name, value) for name, value in state.tensors.items()}
        values = {
            **state.values,
            "format": folder.FORMAT,
            "step": step,
            "torch": torch.__version__,
            "world_size": self._world_size,
            "shapes": {name: s.shape for name, s in stored.items()},
        }
        values = json.loads(json.dumps(values))  # a copy, and an error here if JSON cannot say it
        staged, event = self._staging.copy(stored, self._rank, self._world_size)
        planner = _SavePlanner(stored, staged, self._count)
        self._bytes = sum(tensor.nbytes for tensor in staged.values())
        # Not a daemon: a process that ends meanwhile, by an error too, completes its part first.
        self._thread = threading.Thread(
            target=self._write, args=(step, planner, event, values, began), name="checkpoint"
        )
        self._thread.start()
        if wait:
            self.wait()

    @property
    def failed(self) -> bool:
        """Whether a save in the background has failed, as far as this rank knows. Local: sends nothing.

        For a loop that agrees on signals at every step anyway: put it among those flags, and call ``wait``
        on every rank when any has it.
        """
        return self._error is not None

    def wait(self) -> None:
        """Wait until the save in flight is complete; raises its UserError (on every rank)."""
        if self._thread is not None:
            self._disk.until(self._is_over, lambda: self._progress, self._bytes / SLOWEST_BYTES_PER_SECOND)
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error

    def latest(self) -> Path | None:
        """The newest complete checkpoint as rank 0 sees it, the same answer on every rank."""
        return self._ask_on_rank_0(lambda: folder.latest(self.directory))

    def prune(self) -> None:
        """Remove the oldest checkpoints but the newest ``keep``, as a save does at its end if nothing kills it.

        UserError: the newest, for which they would go, is damaged.
        """
        self._ask_on_rank_0(self._prune)

    def _prune(self):
        newest = folder.latest(self.directory)
        if newest is not None and len(folder.steps(self.directory)) > self.keep > 0:
            values = folder.read_values(newest)
            folder.check_files(newest, values)
            folder.prune(self.directory, values["step"], self.keep)

    def close(self) -> None:
        """Wait for the save in flight, give the process groups back. Not for the way out after an error."""
        self.wait()
        for group in (self._group, self._control):
            if group is not None:
                dist.destroy_process_group(group)
        self._group = self._control = None

    def _ask_on_rank_0(self, function):
        return self._on_rank_0(lambda: self._disk.call(function), self._control)

    def _is_over(self, seconds):
        """Wait so long for the save in flight -> whether it is complete, or has failed."""
        assert self._thread is not None
        self._thread.join(seconds)
        return not self._thread.is_alive()

    # The background thread:

    def _count(self):
        self._progress += 1

    def _write(self, step, planner, event, values, began):
        final = folder.step_path(self.directory, step)
        temporary = folder.temporary_path(final)
        try:
            if event is not None:
                event.synchronize()
            self._on_rank_0(lambda: folder.begin(temporary), self._group)
            files = together(lambda: self._write_tensors(temporary, planner), self._group)
            self._count()
            self._on_rank_0(lambda: folder.commit(temporary, final, values, files), self._group)
            self._count()
            self.completed = (step, time.monotonic() - began)
            self._on_rank_0(lambda: folder.prune(self.directory, step, self.keep), self._group)
        except BaseException as error:
            self._error = self._failure(step, final, error)
            if self._rank == 0:
                shutil.rmtree(temporary, ignore_errors=True)

    def _on_rank_0(self, function, group):
        """Run ``function`` on rank 0 alone; its result, or its error, on every rank."""
        return together(function if self._rank == 0 else lambda: None, group)[0]

    def _failure(self, step, final, error):
        what = (
            f"the checkpoint of step {step} could not be written to {final}: {reason_of(error).rstrip('. ')}"
        )
        if isinstance(error, ProcessGone):
            return UserError(f"{what}; older checkpoints are untouched: resume from them")
        free = "unknown"
        with contextlib.suppress(OSError):
            free = f"{shutil.disk_usage(self.directory).free / 1e9:.2f} GB"
        return UserError(
            f"{what} (free there: {free}); older checkpoints are untouched: make room, or move run.dir to a "
            "larger disk, and resume"
        )

    def _write_tensors(self, temporary, planner):
        """Write this rank's blocks and flush them to the disk -> {file name: (bytes, SHA-256)}."""
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
        return {file.name: (file.stat().st_size, file_sha256(file)) for file in files}
