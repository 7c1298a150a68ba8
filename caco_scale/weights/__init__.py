"""RUN_OR_WEIGHTS to a backbone: runs and exports of this program, and the checkpoint formats of others.

What is read                        by what it is recognised
a run, one of its checkpoints       a directory; query or key encoder, with its projector
our export (safetensors, torch)     torchvision's names; the metadata of safetensors name arch and stem
CaCo's authors                      ``state_dict`` of ``module.encoder_q.*`` and ``module.encoder_k.*``, ``Memory_Bank``
MoCo v1, v2                         ``state_dict`` of ``module.encoder_q.*``
MoCo v3                             ``state_dict`` of ``module.base_encoder.*`` and ``module.momentum_encoder.*``
DINO                                ``student`` and ``teacher`` with ``backbone.*``, or the backbone alone
torchvision, timm                   a state dict, alone or under ``state_dict`` or ``model``; timm's ViT is renamed

A file holds tensors and plain values or is refused: nothing in it is run. The architecture follows from names and
shapes; every key that has no place in the model is named, and a model with a parameter missing is never returned.

``load.py`` is the way in; ``files.py`` reads, ``recognise.py`` finds out what was read, ``build.py`` makes the modules.
Of other rooms this one knows ``checkpoint`` (to read), ``method`` (to build), ``data.augment`` (ImageNet's mean) and
``errors``.
"""
