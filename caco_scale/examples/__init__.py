"""Short programs that use the package from Python; each runs alone: ``python -m caco_scale.examples.NAME``.

    pretrain_from_python    a run with a callback, its figures and its backbone
    loader_alone            augmented views in a fixed order, for any method
    bank_in_your_loop       the bank of CaCo in a training loop of one's own
    lars_under_fsdp2        LARS where FSDP2 shards the parameters
    lars_under_deepspeed    LARS where ZeRO partitions them
    backbone_in_timm        a trained backbone in timm

They are to be read and copied: each imports the front door, and nothing imports them. README.md beside them shows every
public name in a few lines.
"""
