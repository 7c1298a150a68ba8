"""Which columns of parquet files are the images and the labels, and what the labels mean.

A Hugging Face data set says it in the files' metadata (features of type Image and ClassLabel); other files are judged
by their types, and by names where several would do. In doubt the user is asked, with the list of the columns.
"""

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from caco_scale.data.splits import some_names
from caco_scale.errors import UserError, did_you_mean, one_line

IMAGE_NAMES = ("image", "img", "jpg", "png", "picture", "photo", "image_bytes", "bytes")
LABEL_NAMES = ("label", "labels", "class", "category", "target", "cls", "class_name", "class_label")
PATH_NAMES = (
    *(
        "path",
        "file_name",
        "filename",
        "file",
        "filepath",
        "file_path",
        "image_path",
        "img_path",
        "image_file",
    ),
    *("image", "img", "name"),
)
NO_LABELS = "none"


@dataclass(frozen=True)
class Columns:
    """The columns to read: of images (``nested``: a struct with ``bytes``), of labels (None: none), names of labels."""

    image: str
    nested: bool
    label: str | None
    names: tuple[str, ...] | None

    @property
    def leaves(self) -> list[str]:
        """As pyarrow reads them."""
        return [self.image + ".bytes" * self.nested] + ([self.label] if self.label is not None else [])

    def image_and_label(self, batch: Any) -> tuple[bytes, int | str | None]:
        """(image bytes, label or None) of a batch of one row. ValueError: either is missing or no such thing."""
        image = batch.column(self.image)[0].as_py()
        data = image["bytes"] if self.nested and image else image
        if not isinstance(data, bytes):
            raise ValueError("no image bytes")
        if self.label is None:
            return data, None
        label = batch.column(self.label)[0].as_py()
        without = f"; pass --label-column {NO_LABELS} to take images without labels"
        if label is None or label == "":
            raise ValueError(
                f"the label in {self.label!r} is {'missing' if label is None else 'empty'}{without}"
            )
        if not isinstance(label, str) and (label < 0 or (self.names and label >= len(self.names))):
            classes = f" of {len(self.names)} classes" if self.names else ""
            raise ValueError(f"label {label}{classes}: has this split no labels?{without}")
        return data, label

    def class_folders(self, labels: Iterable[int | str | None]) -> dict[int | str | None, str]:
        """{label: its class}, so that the classes' order by name is the labels'. UserError: two labels of one class."""
        if self.label is None:
            return {}
        if self.names:
            names = list(self.names)
            in_order = names == sorted(names)
            classes = {n: name if in_order else f"{n:05d}_{name}" for n, name in enumerate(names)}
        else:
            found = set(labels)
            width = max((len(str(label)) for label in found if isinstance(label, int)), default=0)
            classes = {n: n if isinstance(n, str) else f"{n:0{max(5, width)}d}" for n in found}
        classes = {label: name.replace("/", "_") for label, name in classes.items()}
        names = Counter(classes.values())
        if twice := [name for name, count in names.items() if count > 1]:
            raise UserError(
                f"the column {self.label!r} has several labels that would be one class: {some_names(twice)}"
            )
        return classes

    def class_places(
        self, labels: Iterable[int | str | None]
    ) -> tuple[list[str], dict[int | str | None, int]]:
        """(classes in their order, {label: its place among them}); None, "" and numbers below 0 are no label.

        UserError: as :meth:`class_folders`, and a label beyond the names of classes.
        """
        known = {label for label in labels if label not in (None, "")}
        known = {label for label in known if isinstance(label, str) or label >= 0}
        numbers = [label for label in known if not isinstance(label, str)]
        if self.names and numbers and max(numbers) >= len(self.names):
            raise UserError(
                f"label {max(numbers)} of {len(self.names)} classes in {self.label!r}: correct it"
            )
        names = self.class_folders(known) if known else {}
        classes = sorted(set(names.values()))
        places = {name: place for place, name in enumerate(classes)}
        return classes, {label: places[name] for label, name in names.items()}


def find_columns(files: Sequence[str], image_column: str | None, label_column: str | None) -> Columns:
    """The columns of images and labels, the same in all files.

    Args:
        image_column: its name; None: the feature of type Image, else what has the type of one.
        label_column: its name; "none": take no labels; None: the feature of type ClassLabel, else one with a usual
            name; without any the images have no labels.
    Raises:
        UserError: no pyarrow, no such column, several that would do, another type, files that disagree.
    """
    try:
        import pyarrow
        import pyarrow.parquet as parquet
    except ImportError:
        raise UserError("parquet files need pyarrow: pip install pyarrow") from None
    unreadable = (
        pyarrow.ArrowException,
        OSError,
        ValueError,
        TypeError,
        AttributeError,
        MemoryError,
        RecursionError,
    )
    found: Columns | None = None
    first, kind = files[0], None
    for path in files:
        try:
            schema = parquet.read_schema(path)
            features = _features(schema.metadata)
        except unreadable as error:
            raise UserError(f"{path} cannot be read as parquet: {one_line(error)}") from None
        if twice := [name for name, count in Counter(schema.names).items() if count > 1]:
            raise UserError(
                f"{path} has several columns with the name {twice[0]!r}: rename them; {_columns(schema)}"
            )
        image = _image_column(path, schema, features, image_column)
        label = _label_column(path, schema, features, label_column)
        its_kind = None if label is None else _label_kind(path, schema, label)
        names = None if label is None or its_kind != "numbers" else _names(path, features, label)
        here = Columns(image, _is_struct(schema.field(image).type), label, names)
        if found is None:
            found, kind = here, its_kind
            continue
        if (here.image, here.nested, here.label, its_kind) != (found.image, found.nested, found.label, kind):
            raise UserError(
                f"{path} has {_what(here, its_kind)}, but {first} {_what(found, kind)}: give --image-column and "
                "--label-column, or files of one kind"
            )
        if here.names and found.names and here.names != found.names:
            raise UserError(
                f"{path} names the classes of {label!r} otherwise than {first}: they are no one set"
            )
        found = here if here.names else found
    assert found is not None
    return found


def paths_and_labels(names: Sequence[str]) -> tuple[str | None, str | None]:
    """Of a list's columns those of the files' paths and of their labels, by their usual names; None: there is none."""
    path = _one_of([name for name in names if name.lower() in PATH_NAMES], PATH_NAMES)
    return path, _one_of([n for n in names if n.lower() in LABEL_NAMES and n != path], LABEL_NAMES)


def holds_images(path: str) -> bool:
    """Has a parquet file a column that may be one of images, their bytes?"""
    try:
        import pyarrow
        import pyarrow.parquet as parquet
    except ImportError:
        raise UserError(f"{path} needs pyarrow: pip install pyarrow") from None
    try:
        return any(_holds_bytes(field.type) for field in parquet.read_schema(path))
    except (pyarrow.ArrowException, OSError):
        return False


def _what(columns, kind):
    label = f"labels in {columns.label!r} ({kind})" if columns.label is not None else "no labels"
    return f"images in {columns.image!r} and {label}"


def _features(metadata):
    """{column: its feature} as Hugging Face's metadata has them."""
    info = json.loads((metadata or {}).get(b"huggingface", b"{}")).get("info") or {}
    features = info.get("features") or {}
    return {name: feature for name, feature in features.items() if isinstance(feature, dict)}


def _image_column(path, schema, features, asked):
    if asked is not None:
        _check_there(path, schema, asked, "--image-column")
        if not _holds_bytes(schema.field(asked).type):
            raise UserError(
                f"{path}: the column {asked!r} is {schema.field(asked).type}, which holds no image files"
            )
        return asked
    usable = [field.name for field in schema if _holds_bytes(field.type)]
    by_feature = [name for name in usable if features.get(name, {}).get("_type") == "Image"]
    by_struct = [name for name in usable if _is_struct(schema.field(name).type)]
    candidates = by_feature or by_struct or usable
    chosen = _one_of(candidates, IMAGE_NAMES)
    if chosen is None:
        what = (
            f"several columns of images ({some_names(candidates)})" if candidates else "no column of images"
        )
        raise UserError(f"{path} has {what}: choose one with --image-column; {_columns(schema)}")
    return chosen


def _label_column(path, schema, features, asked):
    if asked is not None:
        if asked.lower() == NO_LABELS and asked not in schema.names:
            return None
        _check_there(path, schema, asked, "--label-column")
        return asked
    by_feature = [
        n for n in schema.names if features.get(n, {}).get("_type") == "ClassLabel" or _has_names(features, n)
    ]
    by_name = [name for name in schema.names if name.lower() in LABEL_NAMES]
    candidates = by_feature or by_name
    chosen = _one_of(candidates, LABEL_NAMES)
    if candidates and chosen is None:
        raise UserError(
            f"{path} has several columns of labels ({some_names(candidates)}): choose one with --label-column, or "
            f"{NO_LABELS}; {_columns(schema)}"
        )
    return chosen


def _has_names(features, name):
    return isinstance(features.get(name, {}).get("names"), list)


def _one_of(candidates, usual):
    """The only candidate, or the one with the most usual name."""
    if len(candidates) == 1:
        return candidates[0]
    return next((name for word in usual for name in candidates if name.lower() == word), None)


def _check_there(path, schema, name, flag):
    if name not in schema.names:
        raise UserError(
            f"{path} has no column {name!r}{did_you_mean(name, schema.names)} for {flag}; {_columns(schema)}"
        )


def _columns(schema):
    return "its columns: " + some_names([f"{field.name} ({str(field.type)[:60]})" for field in schema], 12)


def _is_struct(kind):
    import pyarrow.types as types

    return types.is_struct(kind)


def _holds_bytes(kind):
    """Is a column of this type one of image files: bytes, or a struct with a field ``bytes``?"""
    import pyarrow.types as types

    if types.is_struct(kind):
        names = [kind.field(i).name for i in range(kind.num_fields)]
        return names.count("bytes") == 1 and _is_binary(kind.field("bytes").type)
    return _is_binary(kind)


def _is_binary(kind):
    import pyarrow.types as types

    return (
        types.is_binary(kind)
        or types.is_large_binary(kind)
        or getattr(types, "is_binary_view", lambda _: 0)(kind)
    )


def _label_kind(path, schema, name):
    """ "numbers" or "names". UserError: the column holds other things."""
    import pyarrow.types as types

    kind = schema.field(name).type
    kind = kind.value_type if types.is_dictionary(kind) else kind
    if types.is_integer(kind) or types.is_boolean(kind):
        return "numbers"
    if (
        types.is_string(kind)
        or types.is_large_string(kind)
        or getattr(types, "is_string_view", lambda _: 0)(kind)
    ):
        return "names"
    raise UserError(
        f"{path}: the labels in {name!r} are {kind}, not integers or names: choose another column with --label-column, "
        f"or {NO_LABELS}; {_columns(schema)}"
    )


def _names(path, features, label):
    """The names that the data set's card has for its labels; None without."""
    names = features.get(label, {}).get("names")
    if not isinstance(names, list) or not names:
        return None
    if not all(isinstance(name, str) and name for name in names) or len(set(names)) != len(names):
        shown = some_names([repr(name)[:40] for name in names])
        raise UserError(
            f"{path}: the names of the classes in {label!r} are empty, doubled or no words ({shown})"
        )
    return tuple(names)
