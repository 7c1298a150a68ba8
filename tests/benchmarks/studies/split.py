"""A seeded part of a folder of classes, and a held-out part of the rest: where a study's values are chosen.

    python tests/benchmarks/studies/split.py TRAIN TO --train 10000 --held-out 5000

``TRAIN/<class>/*`` is a training set; TO/train and TO/held_out become folders of links to its files,
each class an equal part, no file in both. The same seed draws the same files.
"""

import argparse
import os
import random
from pathlib import Path


def split(source: Path, to: Path, num_train: int, num_held_out: int, seed: int) -> None:
    """Link ``num_train`` and ``num_held_out`` files of ``source`` into ``to/train`` and ``to/held_out``."""
    classes = sorted(folder for folder in source.iterdir() if folder.is_dir())
    each, held_out = num_train // len(classes), num_held_out // len(classes)
    for folder in classes:
        files = sorted(folder.iterdir())
        drawn = random.Random(f"{seed} {folder.name}").sample(files, each + held_out)
        for name, part in (("train", drawn[:each]), ("held_out", drawn[each:])):
            place = to / name / folder.name
            place.mkdir(parents=True)
            for file in part:
                os.symlink(file.resolve(), place / file.name)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", type=Path)
    parser.add_argument("to", type=Path)
    parser.add_argument("--train", type=int, required=True)
    parser.add_argument("--held-out", type=int, required=True)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    split(given.source, given.to, given.train, given.held_out, given.seed)
