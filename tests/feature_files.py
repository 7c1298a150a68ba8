"""Files of features for tests, written without an encoder."""

import numpy as np

from caco_scale.embed.files import write_features
from caco_scale.embed.parts import Parts, write_part

GRID = 2**25


def write_file(path, features, keys=None, sources=None, labels=None, rows_of_part=5, **request):
    """A file of features (n, F) at ``path``, made of parts of a few rows -> path."""
    count, width = features.shape
    keys = keys or [f"000000.tar/{i:08d}" for i in range(count)]
    sources, labels = sources or [""] * count, np.zeros(count, np.int64) if labels is None else labels
    folder, paths = path.parent / f"{path.name}.made", []
    folder.mkdir()
    for start in range(0, count, rows_of_part):
        part = slice(start, start + rows_of_part)
        columns = {"key": keys[part], "source": sources[part], "label": labels[part]}
        columns |= {"index": np.arange(count)[part], "features": features[part]}
        paths.append(folder / f"{start}")
        write_part(paths[-1], columns, [])
    about = {
        "rows": count,
        "width": width,
        "name": "features",
        "request": {"dtype": features.dtype.name, "layer": "backbone", "images": "", **request},
        "data": "nowhere",
        "classes": ["ant", "bee"],
        "weights": {"path": "nowhere.pth", "which": None, "arch": None, "stem": None},
    }
    write_features(path, about, Parts(paths))
    return path


def exact_cosines(features, others=None):
    """Cosines as whole numbers of 2^-50, by numpy and Python's integers alone: (n, m) objects.

    Features are rounded to the documented grid, multiples of 2^-25; then nothing is.
    """
    whole = []
    for rows in (features, features if others is None else others):
        rows = rows.astype(np.float64)
        rows = rows / np.maximum(np.sqrt((rows * rows).sum(1, keepdims=True)), 1e-12)
        whole.append(np.round(rows * GRID).astype(np.int64))
    return whole[0] @ whole[1].T  # below 2^51: int64 is exact
