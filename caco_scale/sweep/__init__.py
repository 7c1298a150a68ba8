"""Studies: many runs by one file, and one table of what they reached (``python -m caco_scale.sweep STUDY.yaml``).

    study.py    a study's file to the list of its runs, each with its whole configuration
    runs.py     what a run's directory says of it: done, with which values, and how good
    runner.py   the processes: which are started, and what ends them
    table.py    the table, as CSV and for a terminal

The run directories are the only memory: what is done, and where to go on, is read from them at every start. It knows
the configuration, what a run leaves on disk, the trainer's checks and precision, the report; a run is a process of its
own.
"""
