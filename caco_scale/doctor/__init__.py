"""Before a run: what would fail, what it needs, what it will cost. Nothing is trained, nothing written.

    checks.py     the doctor: versions, launch, then every check of a start (``training/checks.py``) to the last, the
                  loader's speed and memory
    memory.py     a rank's memory, estimated
    estimate.py   steps, hours and their price
    preflight.py  the nodes of a job and the verdict on them; node.py: what each sees of itself, meeting.py: what only
                  several see

Knows config, training's parts and checks (never its loop), checkpoint, method's sizes, data, distributed and run.
Nothing knows it.
"""
