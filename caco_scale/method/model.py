"""The query and the key encoder as one module, so that one engine wraps, shards and saves both.

Shapes: B this rank's batch, F features, D embedding, H and W a view's height and width.
"""

import copy
from collections.abc import Sequence
from contextlib import nullcontext

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from caco_scale.distributed.syncbn import views_in_batch
from caco_scale.method.ema import ema_update
from caco_scale.run.profiling import part

NUM_GLOBAL_VIEWS = 2


class Encoder(nn.Module):
    """Backbone and projector: images (B, 3, H, W) -> unit-norm embeddings (B, D), fp32 or fp64.

    ``predictor``: (B, D) -> (B, D) behind the projector, of a query encoder only; None: without.
    """

    def __init__(self, backbone: nn.Module, projector: nn.Module, predictor: nn.Module | None = None):
        super().__init__()
        self.backbone = backbone
        self.projector = projector
        self.predictor = predictor

    def features(self, images: Tensor) -> Tensor:
        """Backbone features (B, F), what evaluation and export look at."""
        return self.backbone(images)

    def forward(self, images: Tensor) -> Tensor:
        embeddings = self.projector(self.backbone(images))
        return unit_norm(embeddings if self.predictor is None else self.predictor(embeddings))


def unit_norm(embeddings: Tensor) -> Tensor:
    """Rows (B, D) divided by their norms; in fp32 at least, whatever autocast region the caller is in."""
    with torch.autocast(embeddings.device.type, enabled=False):
        if embeddings.dtype != torch.float64:
            embeddings = embeddings.float()
        return F.normalize(embeddings, dim=1)


class QueryKeyModel(nn.Module):
    """The trained query encoder and its moving average, the key encoder, which takes no gradient.

    The key encoder starts as a copy, without the predictor; :func:`caco_scale.method.ema.ema_update` and
    :func:`synchronise_key` alone move its parameters. Both run in train mode, each with BatchNorm statistics of its
    own; convert them to synchronised BatchNorm after construction (a process group cannot be copied).

    ``autocast_dtype``: compute in this type inside ``forward``, parameters and outputs stay as they are;
    None: in the parameters' type. ``crops_at_once``: all local crops pass the query encoder as one batch, in which
    nothing but :class:`~caco_scale.distributed.syncbn.SyncBatchNorm` looks across samples. Views may be channels_last,
    which convolutions then keep; the weights never are: DeepSpeed and FSDP2 cannot flatten them then.
    """

    def __init__(
        self,
        encoder: Encoder,
        *,
        autocast_dtype: torch.dtype | None = None,
        crops_at_once: bool = False,
    ):
        super().__init__()
        self.query = encoder
        self.key = copy.deepcopy(encoder).requires_grad_(False)
        self.key.predictor = None
        self.autocast_dtype = autocast_dtype
        self.crops_at_once = crops_at_once

    def forward(self, views: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Queries of every view and keys of the two global views, all unit norm.

        ``views``: list of (B, 3, H, W), the two global views first. Returns (list of (B, D) queries, one per
        view; list of two (B, D) keys without gradient). Every view has BatchNorm statistics of its own: each is a
        forward of its own but for local crops at once. Crosses ranks: synchronised BatchNorm's statistics only.
        """
        with self._autocast(views[0].device.type):
            with part("query"):
                queries = [self.query(view) for view in views[:NUM_GLOBAL_VIEWS]]
                queries += self._queries_of_crops(views[NUM_GLOBAL_VIEWS:])
            with part("key"), torch.no_grad():
                keys = [self.key(view) for view in views[:NUM_GLOBAL_VIEWS]]
        return queries, keys

    def _queries_of_crops(self, crops):
        if not self.crops_at_once or len(crops) < 2:
            return [self.query(crop) for crop in crops]
        with views_in_batch(len(crops)):
            return self.query(torch.cat(crops)).chunk(len(crops))

    def _autocast(self, device_type):
        if self.autocast_dtype is None:
            return nullcontext()
        return torch.autocast(device_type, dtype=self.autocast_dtype)


def synchronise_key(model: QueryKeyModel) -> None:
    """Key parameters <- query parameters, buffers stay: the switch from bank warm-up to the main schedule."""
    ema_update(model.query, model.key, momentum=0.0)
