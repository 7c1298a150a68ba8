"""A run's training: from the configuration to the last checkpoint.

    trainer.py   run(): the start (processes, refusals, data, what to resume), then the loop
    loop.py      the loop: a batch, a step, what is due after it, a checkpoint; over the parts
    step.py      one update, the algorithm on one screen
    places.py    what the configuration names on disks and in libraries, looked at before torch is loaded
    checks.py    what must be right before a run trains, said once for training and the doctor
    assemble.py  the parts that the configuration describes: data, views, schedule, encoders, bank, strategy

Parts of the loop, each with one concern and ``state_dict()``/``load_state_dict()`` for what a checkpoint keeps of it:
skipped.py (steps that were not finite), corrupt.py (images), health.py (collapse, use of the bank), evaluations.py
(kNN), ``Requests`` of ``run.stopping`` (stop, save). records.py is what a start leaves behind; it keeps nothing.

It knows the rooms below it, whose objects it puts together: config, data, method, optim, distributed, checkpoint,
evaluate (the kNN monitor), run. Of these none knows it; above it are the doctor, the sweep and the export (checks and
parts), the benchmarks, the Python front door and the commands.
"""
