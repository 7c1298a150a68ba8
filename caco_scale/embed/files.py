"""The file of features: one row an image, in the set's order, as parquet, npz or safetensors; read in blocks.

    key        ``shard/key``, as audit logs have it
    source     what the image was called by who made the set: its path in a folder, its original name in a built set
    label      its class by number, -1 for none
    index      its number in the set
    features   (n, F) of the backbone, raw; of the projector they are called ``embeddings``; ``patches`` are (n, P * F):
           the tokens of a ViT's P patches one after another (P and F stand in the facts)

In npz the texts are arrays of str; in safetensors, which has no text, UTF-8 in one piece and ``key_ends``, where each
ends. Facts about the whole are JSON: parquet's and safetensors' metadata ``caco_scale``, npz's array ``about``. Equal
content is equal bytes. Memory: one part (when writing) or one block (when reading) and 8 bytes an image.
"""

import contextlib
import json
import os
import zipfile
from abc import abstractmethod
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import IO, Any, Self

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from caco_scale.atomic import atomic_file
from caco_scale.data.pixels import Pixels
from caco_scale.embed.parts import STRINGS, Parts, split
from caco_scale.errors import UserError, one_line, quoted
from caco_scale.run.files import cannot_write, to_json

NAMES = {"backbone": "features", "projector": "embeddings", "patches": "patches"}  # by layer
KINDS = (".parquet", ".npz", ".safetensors")
BLOCK_ROWS = 2048
KEY = "caco_scale"  # of the metadata


def kind_of(path: str | os.PathLike, flag: str = "") -> str:
    """The form of a file by its ending. UserError for another one, and for parquet without pyarrow."""
    kind = Path(path).suffix.lower()
    if kind not in KINDS:
        raise UserError(f"{flag}{path} ends in none of {', '.join(KINDS)}: its ending chooses the form")
    if kind == ".parquet":
        try:
            import pyarrow.parquet  # noqa: F401
        except ImportError:
            raise UserError(
                f"{flag}{path} needs pyarrow: pip install pyarrow, or give a file that ends in .npz"
            ) from None
    return kind


# ----------------------------------------------------------------------------------------------------
# Writing


def write_features(path: Path, about: dict[str, Any], parts: Parts) -> None:
    """Write the file, whole or not at all. ``about``: facts, with ``rows``, ``width`` (F) and ``name``."""
    write = {".parquet": _write_parquet, ".npz": _write_npz, ".safetensors": _write_safetensors}[
        kind_of(path)
    ]
    try:
        with atomic_file(path) as file:
            write(file, about, to_json(about, sort_keys=True), parts)
    except OSError as error:
        raise cannot_write(path, error) from None


def _write_parquet(file, about, text, parts):
    import pyarrow as pa
    import pyarrow.parquet as pq

    width, dtype = about["width"], pa.from_numpy_dtype(about["request"]["dtype"])
    kinds = {"key": pa.string(), "source": pa.string(), "label": pa.int64(), "index": pa.int64()}
    schema = pa.schema({**kinds, about["name"]: pa.list_(dtype, width)}, metadata={KEY: text})
    columns = [*(parts.texts(name) for name in STRINGS), *map(parts.arrays, ("label", "index", "features"))]
    with pq.ParquetWriter(file, schema, compression="none", use_dictionary=False) as writer:
        for *plain, features in zip(*columns, strict=True):
            if len(features):
                rows = pa.FixedSizeListArray.from_arrays(pa.array(features.reshape(-1)), width)
                arrays = [pa.array(c, kind) for c, kind in zip(plain, kinds.values(), strict=True)]
                writer.write_table(pa.Table.from_arrays([*arrays, rows], schema=schema))


def _numbers(about, parts):
    """(name, dtype, shape, arrays in order) of the columns of numbers."""
    rows, dtype = about["rows"], np.dtype(about["request"]["dtype"])
    for name in ("label", "index"):
        yield name, np.dtype("<i8"), (rows,), parts.arrays(name)
    yield about["name"], dtype.newbyteorder("<"), (rows, about["width"]), parts.arrays("features")


def _write_npz(file, about, text, parts):
    columns = [("about", np.dtype(f"<U{len(text)}"), (), iter([np.array(text)]))]
    for name in STRINGS:
        dtype = np.dtype(f"<U{max(max(map(len, texts), default=0) for texts in parts.texts(name)) or 1}")
        columns.append((name, dtype, (about["rows"],), (np.array(t, dtype) for t in parts.texts(name))))
    with zipfile.ZipFile(file, "w") as archive:  # not compressed
        for name, dtype, shape, arrays in [*columns, *_numbers(about, parts)]:
            header = {"descr": dtype.str, "fortran_order": False, "shape": shape}
            # A fixed time: equal content is equal bytes.
            with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True) as member:
                np.lib.format.write_array_header_1_0(member, header)
                for array in arrays:
                    member.write(array.astype(dtype, copy=False).tobytes())


def _write_safetensors(file, about, text, parts):
    kinds = {"<i8": "I64", "<f4": "F32", "<f2": "F16", "|u1": "U8"}
    columns = list(_numbers(about, parts))
    for name in STRINGS:
        columns.append((f"{name}_ends", np.dtype("<i8"), (about["rows"],), _all_ends(parts, name)))
        columns.append((name, np.dtype("|u1"), (parts.num_bytes[name],), parts.arrays(name)))
    columns.sort(key=lambda column: -column[1].itemsize)  # so that every array is aligned
    header: dict[str, Any] = {"__metadata__": {KEY: text}}
    at = 0
    for name, dtype, shape, _ in columns:
        size = dtype.itemsize * int(np.prod(shape))
        header[name] = {"dtype": kinds[dtype.str], "shape": shape, "data_offsets": [at, at + size]}
        at += size
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)
    file.write(len(head).to_bytes(8, "little") + head)
    for _, dtype, _, arrays in columns:
        for array in arrays:
            file.write(array.astype(dtype, copy=False).tobytes())


def _all_ends(parts, name):
    """The ends of a column of text, counted from its beginning."""
    before = 0
    for ends in parts.arrays(f"{name}_ends"):
        yield ends + before
        before += int(ends[-1]) if len(ends) else 0


# ----------------------------------------------------------------------------------------------------
# Reading


def open_features(path: str | os.PathLike) -> "FeatureFile":
    """A file that :func:`write_features` has written. UserError where it is none."""
    if not os.path.isfile(path):
        what = "is no file" if os.path.exists(path) else "does not exist"
        raise UserError(
            f"{path} {what}: python -m caco_scale.embed RUN --data IMAGES --to {quoted(path)} writes one"
        )
    reader = {".parquet": ParquetFile, ".npz": NpzFile, ".safetensors": SafetensorsFile}[kind_of(path)]
    return reader(Path(path))


class FeatureFile:
    """A file of features, read block by block; a context that closes it.

    ``about``: facts (see :mod:`~caco_scale.embed.extract`); ``num_rows``, ``width`` (F); ``name``: features or
    embeddings.
    """

    def __init__(self, path: Path):
        self.path = path
        with self._reading():
            self._open()
            self.about: dict[str, Any] = json.loads(self._about())
            self.num_rows, self.width = int(self.about["rows"]), int(self.about["width"])
            self.name: str = self.about["name"]
            self.about["request"]["images"]
            sizes = {name: len(self.integers(name)) for name in ("label", "index")}
        if set(sizes.values()) != {self.num_rows}:
            raise self._error(f"{self.num_rows:,} rows expected, {sizes} there")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._close()

    @property
    def pixels(self) -> Pixels:
        """What the images were decoded to."""
        request = self.about["request"]
        return Pixels(request.get("channels", 3), request.get("bits", 8))

    def features(self) -> Iterator[NDArray]:
        """Blocks of rows (b, F) in order, b at most BLOCK_ROWS."""
        count = 0
        with self._reading():
            for flat in self._features():
                block = flat.reshape(-1, self.width)
                count += len(block)
                yield block
        if count != self.num_rows:
            raise self._error(f"{self.num_rows:,} rows expected, {count:,} there")

    def texts(self, name: str) -> Iterator[str]:
        """The column ``key`` or ``source``, row by row."""
        with self._reading():
            yield from self._texts(name)

    def names(self) -> Iterator[str]:
        """What to call every image: its source where that is known, else its key."""
        for key, source in zip(self.texts("key"), self.texts("source"), strict=True):
            yield source or key

    def integers(self, name: str) -> NDArray[np.int64]:
        """The column ``label`` or ``index``, (n,)."""
        with self._reading():
            return self._integers(name)

    @contextlib.contextmanager
    def _reading(self) -> Generator[None]:
        """What libraries say of a damaged or foreign file, as a UserError."""
        try:
            yield
        except UserError:
            raise
        except (OSError, ValueError, KeyError, TypeError, EOFError) as error:
            raise self._error(one_line(error)) from None
        except (SafetensorError, zipfile.BadZipFile) as error:
            raise self._error(one_line(error)) from None

    def _error(self, why):
        return UserError(f"{self.path} is no whole file of features of this program ({why}): write it again")

    @abstractmethod
    def _open(self) -> None: ...
    @abstractmethod
    def _close(self) -> None: ...
    @abstractmethod
    def _about(self) -> str | bytes: ...
    @abstractmethod
    def _features(self) -> Iterator[NDArray]: ...
    @abstractmethod
    def _texts(self, name: str) -> Iterator[str]: ...
    @abstractmethod
    def _integers(self, name: str) -> NDArray[np.int64]: ...


class ParquetFile(FeatureFile):
    def _open(self):
        import pyarrow.parquet as pq

        self._file = pq.ParquetFile(self.path, memory_map=True)

    def _close(self):
        self._file.close()

    def _about(self):
        return (self._file.schema_arrow.metadata or {})[KEY.encode()]

    def _batches(self, name):
        for batch in self._file.iter_batches(BLOCK_ROWS, columns=[name]):
            yield batch.column(0)

    def _features(self):
        for column in self._batches(self.name):
            yield column.flatten().to_numpy(zero_copy_only=False)

    def _texts(self, name):
        for column in self._batches(name):
            yield from column.to_pylist()

    def _integers(self, name):
        empty = np.empty(0, np.int64)
        return np.concatenate([empty, *(column.to_numpy() for column in self._batches(name))])


class NpzFile(FeatureFile):
    def _open(self):
        self._archive = zipfile.ZipFile(self.path)

    def _close(self):
        self._archive.close()

    def _about(self):
        (text,) = self._blocks("about", 1)
        return str(text[0])

    def _blocks(self, name, rows):
        """Blocks of at most ``rows`` rows of an array, flat."""
        with self._archive.open(f"{name}.npy") as member:
            if np.lib.format.read_magic(member) != (1, 0):
                raise ValueError(f"another kind of array in {name}")
            shape, fortran_order, dtype = np.lib.format.read_array_header_1_0(member)
            if fortran_order or dtype.hasobject:
                raise ValueError(f"{name} is {dtype}")
            count, each = (shape or (1,))[0], int(np.prod(shape[1:]))
            for start in range(0, count, rows):
                wanted = min(rows, count - start) * each
                yield np.frombuffer(_exactly(member, wanted * dtype.itemsize), dtype)

    def _features(self):
        yield from self._blocks(self.name, BLOCK_ROWS)

    def _texts(self, name):
        for block in self._blocks(name, BLOCK_ROWS):
            yield from block.tolist()

    def _integers(self, name):
        return np.concatenate([np.empty(0, np.int64), *self._blocks(name, 1 << 20)])


def _exactly(stream: IO[bytes], num_bytes: int) -> bytes:
    data = stream.read(num_bytes)
    if len(data) != num_bytes:
        raise EOFError(f"{num_bytes:,} bytes expected, {len(data):,} there")
    return data


class SafetensorsFile(FeatureFile):
    def _open(self):
        self._file = safe_open(self.path, "numpy")
        self._file.__enter__()

    def _close(self):
        self._file.__exit__(None, None, None)

    def _about(self):
        return (self._file.metadata() or {})[KEY]

    def _features(self):
        rows = self._file.get_slice(self.name)
        for start in range(0, self.num_rows, BLOCK_ROWS):
            yield rows[start : min(start + BLOCK_ROWS, self.num_rows)]

    def _texts(self, name):
        data, ends = self._file.get_slice(name), self._integers(f"{name}_ends")
        for start in range(0, self.num_rows, BLOCK_ROWS):
            here = ends[start : start + BLOCK_ROWS]
            first = int(ends[start - 1]) if start else 0
            yield from split(data[first : int(here[-1])].tobytes(), (here - first).tolist())

    def _integers(self, name):
        return self._file.get_tensor(name)
