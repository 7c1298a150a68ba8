"""caco_scale: self-supervised image pre-training with CaCo (arXiv:2203.14370) at cluster scale."""

__version__ = "0.1.0"
