"""RUN_OR_WEIGHTS to a backbone: runs and exports of this program, and the checkpoint formats of others.

What is read                        by what it is recognised
a run, one of its checkpoints       a directory; query or key encoder, with its projector
our export (safetensors, torch)     torchvision's names; metadata: arch, stem, encoder, size, mean, std, recipe, step
CaCo's authors                      ``state_dict`` of ``module.encoder_q.*`` and ``module.encoder_k.*``, ``Memory_Bank``
MoCo v1, v2                         ``state_dict`` of ``module.encoder_q.*``
MoCo v3                             ``state_dict`` of ``module.base_encoder.*`` and ``module.momentum_encoder.*``
DINO                                ``student`` and ``teacher`` with ``backbone.*``, or the backbone alone
torchvision, timm                   a state dict, alone or under ``state_dict`` or ``model``; timm's ViT is renamed
Hugging Face, timm's layout         a directory: ``config.json``, ``model.safetensors`` or ``pytorch_model.bin``
hf://USER/NAME[@REVISION]           the same on the hub, fetched

A file holds tensors and plain values, no more than its size, or is refused: nothing in it is run. The architecture
follows from names and shapes, all of them (a directory of Hugging Face says it): a parameter that is missing and a
tensor inside the backbone without a place are errors; heads, projectors and other encoders that are not used are named.
What images the weights want is read, or said to be assumed.

``place.py`` looks, without torch; ``load.py`` is the way in, ``start.py`` that of a training (``model.weights``);
``claims.py`` checks a file and ``files.py`` reads it, ``hub.py`` a directory of Hugging Face; ``recognise.py`` finds
out what was read, ``build.py`` makes the modules; ``address.py`` reads an address on the hub, ``fetch.py`` asks it.
Of other rooms this one knows ``checkpoint`` (to read), ``method`` (to build), ``config``, ``data.augment``
(ImageNet's mean), ``distributed`` (one process of a node fetches) and ``errors``.
"""
