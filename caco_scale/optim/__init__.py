"""What moves the encoder: LARS, the choice of an optimizer, and every number that changes with the step.

    lars.py       LARS, exact also where an engine cut the parameters up
    build.py      parameter groups, the optimizer by name, its first state and its state by parameter name
    schedule.py   the hyper-parameters of a step, pure functions of its number

What this room may know: ``errors``, ``flags.choices``, ``distributed.partition``. No model, no bank, no configuration.
"""
