"""A run's own things: what it leaves on disk, what it says, what asks it to stop, how it is measured.

    directory.py    the run directory: config, attempts, metrics, markers (written by files.py, held by lock.py)
    environment.py  what a run ran on                packages.py    the versions that this package needs
    audit.py        which samples every step used
    telemetry.py    metrics and what is shown of them (meter.py: throughput; display.py: bar or lines)
    trackers.py     W&B, MLflow and others, by accelerate's classes
    signals.py      SIGTERM and the like -> a flag   stopping.py   the files STOP and SAVE, the end of a SLURM job
    progress.py     lines about long work            command.py     what its user typed, with other flags
    diagnostics.py  signs of collapse (alarm.py: which of them are too low)
    profiling.py  where a step goes
    scores.py       the scores that a directory holds
    patience.py     waiting for a disk, with an end   scratch.py    what killed processes leave, cleared

It knows nothing of what is trained: of other rooms it uses errors, atomic, and the collectives of ``distributed``.
"""
