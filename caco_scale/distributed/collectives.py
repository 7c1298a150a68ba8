"""The few collectives the project uses, with one-process behaviour built in.

Without a process group (``group=None`` and torch.distributed not initialised) the world size is 1 and every
function is the identity. Tensors travel on the group's own backend (NCCL on GPUs, gloo on CPUs); small facts
about the run travel between hosts on a gloo group, so that agreeing on them never waits for a GPU.

Shapes: R ranks; B rows a rank, equal on all; K rows sharded over the ranks, S of them on this rank.
"""

import functools
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist

from caco_scale.errors import UserError

# torch 2.14 renamed these two, and warns of the old names at every start.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


Group = dist.ProcessGroup | None  # None: all ranks
T = TypeVar("T")
N = TypeVar("N", int, float)

_exchange_timeout = timedelta(minutes=30)


def set_exchange_timeout(seconds: float) -> None:
    """``run.timeout_seconds``, for this process: see :func:`exchange_timeout`. Groups that exist keep theirs."""
    global _exchange_timeout
    _exchange_timeout = timedelta(seconds=seconds)


def exchange_timeout() -> timedelta:
    """How long one waits for another process in one exchange between hosts, or for a loader's worker."""
    return _exchange_timeout


def world_size(group: Group = None) -> int:
    """Number of ranks of ``group``; 1 without a process group."""
    return dist.get_world_size(group) if dist.is_initialized() else 1


def rank(group: Group = None) -> int:
    """This process's rank in ``group``; 0 without a process group."""
    return dist.get_rank(group) if dist.is_initialized() else 0


def shard_range(size: int, world_size: int, rank: int) -> tuple[int, int]:
    """Rows ``start <= row < stop`` of ``rank`` when ``size`` rows are split as DTensor's ``Shard(0)`` does.

    Blocks of ceil(size / world_size) rows: the last ones may be shorter or empty.
    """
    block = -(-size // world_size)
    start = min(rank * block, size)
    return start, min(start + block, size)


def all_gather_rows(x: torch.Tensor, group: Group = None) -> torch.Tensor:
    """Every rank's ``x`` (B, ...) one below the other in rank order: (R·B, ...), the same on every rank."""
    if world_size(group) == 1:
        return x
    gathered = x.new_empty((world_size(group) * x.shape[0], *x.shape[1:]))
    _all_gather(gathered, x.contiguous(), group=group)
    return gathered


def all_gather_shards(x: torch.Tensor, size: int, group: Group = None) -> torch.Tensor:
    """The whole (K, ...), on every rank, of which each rank holds the rows of ``shard_range(size, ...)``."""
    if world_size(group) == 1:
        return x
    block = -(-size // world_size(group))
    padded = x.new_zeros((block, *x.shape[1:]))
    padded[: x.shape[0]] = x
    return all_gather_rows(padded, group)[:size]  # only the blocks at the end are padded


def all_reduce_(
    x: torch.Tensor, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM, group: Group = None
) -> torch.Tensor:
    """Reduce ``x`` over the ranks in place and return it: the same on every rank."""
    if world_size(group) > 1:
        dist.all_reduce(x, op=op, group=group)
    return x


def reduce_scatter_rows(x: torch.Tensor, group: Group = None) -> torch.Tensor:
    """Sum over ranks of ``x`` (R·B, ...), of which this rank gets its own rows: (B, ...)."""
    ranks = world_size(group)
    if ranks == 1:
        return x
    x = x.contiguous()
    shape = (x.shape[0] // ranks, *x.shape[1:])
    if x.device.type == "cpu":  # gloo lacks it in some versions: the same bytes, summed in rank order
        blocks = torch.empty_like(x)
        dist.all_to_all_single(blocks, x, group=group)
        return blocks.view(ranks, *shape).sum(0)
    received = x.new_empty(shape)
    _reduce_scatter(received, x, group=group)
    return received


def exchange_row_blocks(x: torch.Tensor, size: int, group: Group = None) -> torch.Tensor:
    """Turn column shards of all rows into whole rows of one's own: (R·B, S) -> (B, K), by one all-to-all.

    Rank r brings the columns of ``shard_range(size, R, r)`` for the rows of all ranks, and gets its own B
    rows with all K = ``size`` columns. Blocks may be uneven or empty.
    """
    ranks = world_size(group)
    if ranks == 1:
        return x
    num_rows = x.shape[0] // ranks
    widths = [stop - start for start, stop in (shard_range(size, ranks, r) for r in range(ranks))]
    received = x.new_empty(num_rows * size)
    dist.all_to_all_single(
        received,
        x.contiguous().view(-1),
        output_split_sizes=[num_rows * width for width in widths],
        input_split_sizes=[num_rows * x.shape[1]] * ranks,
        group=group,
    )
    blocks = received.split([num_rows * width for width in widths])
    return torch.cat([block.view(num_rows, -1) for block in blocks if len(block)], dim=1)


def gather_objects(value: T, group: Group = None) -> list[T]:
    """Every rank's ``value`` (anything that pickles) in rank order, on every rank. Between hosts only."""
    if world_size(group) == 1:
        return [value]
    values: list = [None] * world_size(group)
    dist.all_gather_object(values, value, group=_host_group(_resolve(group)))
    return values


def gather_if_any(value: T, told: bool, group: Group = None) -> list[T] | None:
    """As :func:`gather_objects` where ``told`` is true on any rank, else None: then one exchange of a byte is all."""
    if world_size(group) > 1:
        own = torch.tensor([told], dtype=torch.uint8)
        each = list(torch.zeros(world_size(group), 1, dtype=torch.uint8))
        dist.all_gather(each, own, group=_host_group(_resolve(group)))
        told = any(byte.numpy()[0] for byte in each)
    return gather_objects(value, group) if told else None


def from_rank_0(function: Callable[[], T]) -> T:
    """What ``function`` gives on rank 0, which alone calls it, on every rank. Between hosts only.

    Raises:
        UserError: on every rank, where it does there.
    """
    value, error = None, None
    if rank() == 0:
        try:
            value = function()
        except UserError as wrong:
            error = str(wrong)
    value, error = gather_objects((value, error))[0]
    if error:
        raise UserError(error)
    return cast(T, value)


def all_max(value: N, group: Group = None) -> N:
    """The largest of the ranks' ``value`` (a Python number), on every rank. Between hosts only."""
    return max(gather_objects(value, group))


def assert_equal_on_all_ranks(
    values: Mapping[str, Any], what: str, group: Group = None, error: str | None = None
) -> None:
    """Raise the same kind of error on EVERY rank when the ranks disagree: a clear line instead of a hang.

    Args:
        values: name -> anything that pickles and compares; the names speak in the message ("batch size").
        what: what is checked, the beginning of the message ("contrast").
        error: this rank's own complaint, if it has one: it is then raised on all ranks, not only here.

    Raises:
        UserError: on every rank, if ``error`` is set on any or a value differs, with each rank's value.
    """
    gathered = gather_objects((error, dict(values)), group)
    for r, (complaint, _) in enumerate(gathered):
        if complaint is not None:
            raise UserError(complaint if len(gathered) == 1 else f"{complaint} (rank {r})")
    for name in dict.fromkeys(name for _, facts in gathered for name in facts):
        seen = [facts.get(name) for _, facts in gathered]
        if any(value != seen[0] for value in seen):
            listed = ", ".join(f"{value} on rank {r}" for r, value in enumerate(seen))
            raise UserError(f"{what}: the {name} must be the same on every rank, but is {listed}")


def assert_still_equal(
    values: Mapping[str, Any],
    before: Mapping[str, Any] | None,
    what: str,
    group: Group = None,
    error: str | None = None,
) -> None:
    """As :func:`assert_equal_on_all_ranks`, of values that change on all ranks at once: compared only when they do.

    ``before``: those of last time; None, or none: they are compared.

    A rank that is wrong alone afterwards finds nobody to tell, for the others are in the exchange that comes next. It
    ends by an error that names it, and they with it, as with any process that is gone.

    Raises:
        UserError: here, at once, for this rank's own ``error``.
        RuntimeError: here, where this rank's values alone have changed: after :func:`exchange_timeout`. Where tensors
            travel by gloo, too, gloo ends this process at once instead, as its messages do not fit theirs.
    """
    if not before:
        return assert_equal_on_all_ranks(values, what, group, error)
    if error is not None:
        raise UserError(error if world_size(group) == 1 else f"{error} (rank {rank(group)})")
    if values == before:
        return None
    try:
        return assert_equal_on_all_ranks(values, what, group)
    except RuntimeError as lost:
        changed = ", ".join(
            f"{name} ({before.get(name)} -> {value})"
            for name, value in values.items()
            if before.get(name) != value
        )
        raise RuntimeError(f"{what}: rank {rank(group)} alone changes the {changed}: {lost}") from lost


def _resolve(group):
    return dist.group.WORLD if group is None else group


@functools.lru_cache(maxsize=8)
def _host_group(group):
    """A gloo group of the ranks of ``group``: itself where it is one. The first call is a collective."""
    return (
        group if dist.get_backend(group) == "gloo" else new_host_group(group, use_local_synchronization=True)
    )


def new_host_group(group: Group = None, **options: Any) -> dist.ProcessGroup:
    """A gloo group of the ranks of ``group``: waits for no GPU, at most :func:`exchange_timeout`. Collective.

    ``options``: of ``torch.distributed.new_group``.
    """
    ranks = dist.get_process_group_ranks(_resolve(group))
    return cast(
        dist.ProcessGroup, dist.new_group(ranks, backend="gloo", timeout=_exchange_timeout, **options)
    )
