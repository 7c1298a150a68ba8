"""Several processes as one: the launch, collectives, BatchNorm over all ranks, and the engines that train a model.

    launch.py             join the processes of a launch, and refuse one that would train otherwise than believed
    environment.py        what launchers leave in the environment, checked
    deepspeed_config.py   what a launch asks of DeepSpeed, checked
    collectives.py        what crosses ranks, with one process built in
    partition.py          which part of a parameter this rank holds, whatever engine cut it up
    compilation.py        torch.compile: what it takes, what it compiles, where its code is kept
    syncbn.py             BatchNorm over the global batch on any device
    strategies/           DDP, ZeRO and FSDP2 behind one interface

What this room may know: ``errors`` and ``flags.choices``. No method, no optimizer, no checkpoint, no data.
"""
