"""Command: ``python -m caco_scale.export RUN --to FILE --format FORMAT``; see :mod:`caco_scale.export.write`."""

from caco_scale.export.write import main

if __name__ == "__main__":
    main()
