"""The projector: from backbone features (F) to the embedding space (D) of the bank; the predictor."""

from torch import nn


def build_projector(num_features: int, hidden: int, embedding_dim: int) -> nn.Sequential:
    """Three linear layers without biases, BatchNorm and ReLU after the first two: (B, F) -> (B, D).

    The output is not yet of unit norm. arXiv:2203.14370, section 4 (F -> 2048 -> 2048 -> 256 there).
    """
    return nn.Sequential(
        nn.Linear(num_features, hidden, bias=False),
        nn.BatchNorm1d(hidden),
        nn.ReLU(inplace=True),
        nn.Linear(hidden, hidden, bias=False),
        nn.BatchNorm1d(hidden),
        nn.ReLU(inplace=True),
        nn.Linear(hidden, embedding_dim, bias=False),
    )


def build_predictor(embedding_dim: int, hidden: int) -> nn.Sequential:
    """Two linear layers with BatchNorm and ReLU between: (B, D) -> (B, D), not yet of unit norm. Of queries alone.

    arXiv:2104.14548, section 4.1 (256 -> 4096 -> 256 there).
    """
    return nn.Sequential(
        nn.Linear(embedding_dim, hidden, bias=False),
        nn.BatchNorm1d(hidden),
        nn.ReLU(inplace=True),
        nn.Linear(hidden, embedding_dim),
    )
