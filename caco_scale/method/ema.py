"""The key encoder follows the query encoder: the one place that moves key parameters.

Parameters only: the key encoder runs in train mode and keeps BatchNorm statistics of its own.
"""

import torch


@torch.no_grad()
def ema_update(query, key, momentum):
    """key <- momentum * key + (1 - momentum) * query, parameter by parameter (arXiv:2203.14370, section 3).

    ``query``, ``key``: modules of one structure. ``momentum`` 1 leaves the key encoder as it is, bit for bit;
    0 copies. Nothing crosses ranks: every rank moves what it holds.
    """
    query_parameters, key_parameters = list(query.parameters()), list(key.parameters())
    assert len(query_parameters) == len(key_parameters)
    torch._foreach_lerp_(key_parameters, query_parameters, 1.0 - momentum)
