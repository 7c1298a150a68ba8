"""The key encoder follows the query encoder: the one place that moves key parameters.

Parameters only: the key encoder runs in train mode and keeps BatchNorm statistics of its own.
"""

import torch
from torch import nn

from caco_scale.distributed.partition import local_part, refresh_gathered


@torch.no_grad()
def ema_update(query: nn.Module, key: nn.Module, momentum: float) -> None:
    """key <- momentum * key + (1 - momentum) * query, parameter by parameter (arXiv:2203.14370, section 3).

    ``query``, ``key``: of one structure, partitioned alike, but that only the query may have a ``predictor``.
    ``momentum`` 1 leaves the key encoder as it is, bit for bit; 0 copies. Every rank moves the part that it holds;
    nothing crosses ranks but the parameters that ZeRO-3 keeps whole (the persistent ones), which are gathered anew.
    """
    named = [(name, p) for name, p in query.named_parameters() if not name.startswith("predictor.")]
    key_parameters = list(key.parameters())
    assert [name for name, _ in named] == [name for name, _ in key.named_parameters()]
    sources = [local_part(p) for _, p in named]
    targets = [local_part(p) for p in key_parameters]
    assert all(s.shape == t.shape for s, t in zip(sources, targets, strict=True))
    torch._foreach_lerp_(targets, sources, 1.0 - momentum)
    refresh_gathered(key_parameters)
