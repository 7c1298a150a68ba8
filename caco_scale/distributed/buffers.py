"""The buffers of a module, BatchNorm's running statistics first of all, as they were before a step."""

import torch
from torch import nn


class BufferSnapshot:
    """A step's forward has moved the buffers by the time its gradients are known: the way back.

    The copies stay from step to step, and on a GPU one kernel or a few write them all.
    """

    def __init__(self, module: nn.Module):
        self._module = module
        self._held: list[tuple[dict, dict]] = []  # a part's buffers, and which they were
        self._copies: list[torch.Tensor] = []

    @torch.no_grad()
    def keep(self) -> None:
        """Remember the buffers as they are now."""
        self._held = [(part._buffers, dict(part._buffers)) for part in self._module.modules()]
        buffers = self._tensors()
        if [_kind(b) for b in buffers] != [_kind(b) for b in self._copies]:
            self._copies = [torch.empty_like(b) for b in buffers]
        _copy(self._copies, buffers)

    @torch.no_grad()
    def restore(self) -> None:
        """Make them again what :meth:`keep` has seen: the same tensors, with the same values."""
        for held, before in self._held:
            held.clear()
            held.update(before)
        _copy(self._tensors(), self._copies)

    def _tensors(self):
        return [b for _, before in self._held for b in before.values() if b is not None]


def _kind(tensor):
    return tensor.shape, tensor.dtype, tensor.device


def _copy(targets, sources):
    """``targets`` <- ``sources``, all of a type at once: of several types torch would copy one by one."""
    for dtype in dict.fromkeys(t.dtype for t in targets):
        of_type = [i for i, t in enumerate(targets) if t.dtype == dtype]
        torch._foreach_copy_([targets[i] for i in of_type], [sources[i] for i in of_type])
