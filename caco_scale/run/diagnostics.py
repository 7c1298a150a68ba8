"""Label-free signs of collapse: do the embeddings still spread, do the features still span many directions?

When they are too low is said by ``alarm.py``.

Shapes: B rows of this rank, N = R·B rows of all ranks, D embedding, F features.
"""

import math

import torch
from torch.distributed import ProcessGroup

from caco_scale.distributed.collectives import all_gather_rows


def embedding_std(embeddings: torch.Tensor, group: ProcessGroup | None = None) -> float:
    """Standard deviation of unit-norm embeddings (B, D) over all ranks' batch, mean over dimensions; a float.

    The value of embeddings spread evenly over the sphere is 1/sqrt(D), of a collapsed encoder 0 (Chen and He,
    arXiv:2011.10566, figure 2). Collective: gathers the embeddings.
    """
    gathered = all_gather_rows(embeddings.detach(), group)
    return gathered.double().std(dim=0, correction=0).mean().item()


def rankme(features: torch.Tensor, group: ProcessGroup | None = None, max_rows: int = 1024) -> float:
    """RankMe of features (B, F) over all ranks' batch: their effective rank, in [1, min(N, F)]; a float.

    exp(-sum p ln p) with p the singular values divided by their sum (Garrido et al., arXiv:2210.02885,
    equation 1). Of more than ``max_rows`` rows an even selection in rank order is taken, the same at any
    world size. 0 if all features are zero, NaN if any is not finite. Collective: gathers the features.
    """
    gathered = all_gather_rows(features.detach(), group)
    stride = -(-gathered.shape[0] // max_rows)
    selected = gathered[::stride].double()
    if not torch.isfinite(selected).all():
        return math.nan
    # From the smaller Gram matrix in fp64, many times quicker than a singular value decomposition. What its
    # rounding hides, values under a millionth of the largest, weighs nothing in the entropy.
    gram = selected @ selected.T if selected.shape[0] < selected.shape[1] else selected.T @ selected
    eigenvalues = torch.linalg.eigvalsh(gram)
    noise = eigenvalues[-1] * len(gram) * torch.finfo(torch.float64).eps
    singular_values = eigenvalues.where(eigenvalues > noise, 0).sqrt()
    if singular_values.sum() == 0:
        return 0.0
    p = singular_values / singular_values.sum()
    return torch.special.entr(p).sum().exp().item()
