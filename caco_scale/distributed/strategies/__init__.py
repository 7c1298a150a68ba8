"""How the processes of a launch train one model: everything that differs between strategies, behind one interface.

``build.build_strategy`` makes one, ``train_step`` uses it. All train the same model to the last bits of rounding:

    base.py    what a strategy offers to the step, to evaluation and to checkpoints
    ddp.py     every process holds everything (torch's DDP; also one process alone)
    zero.py    DeepSpeed ZeRO-1/2/3: optimizer state, gradients, parameters partitioned
    fsdp2.py   all three partitioned, by torch itself

What this room may know: ``collectives``, ``partition`` and ``syncbn`` beside it. It takes a module with the submodules
``query`` and ``key`` and a function that builds an optimizer; it imports no method, no optimizer and no checkpoint.
"""
