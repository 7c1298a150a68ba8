"""What all ranks do together: an error of one of them is the same one-line error of all."""

from collections.abc import Callable
from typing import TypeVar

import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from caco_scale.distributed.collectives import new_host_group, world_size
from caco_scale.errors import UserError, one_line

T = TypeVar("T")


class ProcessGone(UserError):
    """A rank died or was killed: no rank can complete what they do together."""


def root(error: BaseException) -> BaseException:
    """The OSError below an exception (torch says ``unexpected pos`` for a full disk), or itself."""
    cause = error
    while cause is not None:
        if isinstance(cause, OSError):
            return OSError(cause.errno, cause.strerror, cause.filename)
        cause = cause.__cause__ or cause.__context__
    return error


def reason_of(error: BaseException) -> str:
    """One line for an exception."""
    if isinstance(error, CheckpointException):
        error = next(iter(error.failures.values()))[0]
    if isinstance(error, UserError):
        return one_line(error)
    error = root(error)
    if isinstance(error, OSError):
        return f"{error.strerror or error}" + (f" ({error.filename})" if error.filename else "")
    return f"{type(error).__name__}: {one_line(error)[:500]}"


def together(function: Callable[[], T], group: dist.ProcessGroup | None) -> list[T]:
    """Run ``function`` on every rank of a gloo group (None: alone) -> what it returned, by rank.

    Raises:
        UserError: on every rank, where it failed on any.
        ProcessGone: another process has ended.
    """
    cause = None
    try:
        outcome = (function(), None)
    except (Exception, CheckpointException) as error:
        outcome, cause = (None, reason_of(error)), error
    outcomes: list = [outcome]
    if group is not None:
        outcomes = [None] * dist.get_world_size(group)
        try:
            dist.all_gather_object(outcomes, outcome, group=group)
        except RuntimeError as error:  # gloo's word for a closed connection
            raise ProcessGone("another process of the run has ended") from error
    for _, reason in outcomes:
        if reason is not None:
            raise UserError(reason) from cause
    return [result for result, _ in outcomes]


def new_cpu_group(group: dist.ProcessGroup | None) -> dist.ProcessGroup | None:
    """A gloo group of the same ranks, for :func:`together`; None for one process. Collective."""
    return new_host_group(group) if world_size(group) > 1 else None
