"""What a file of torch.save claims to hold, checked against what it does hold, before torch makes anything of it.

``torch.load(weights_only=True)`` runs no code, but it believes: a record of a zip that unpacks to a thousand times its
size, a storage longer than its record (torch reads behind its end), a tensor longer than its storage (torch makes the
storage grow), ``bytearray(10**10)``, a tuple of tuples whose hash takes for ever. Here the pickles are read as torch
reads them, opcode by opcode, and nothing is made: what would take more than the file's own size is refused, as is all
but dense tensors and plain values. An opcode that torch does not know ends both.
"""

import math
import pickletools
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import IO, Any

import torch

MOST_OPCODES = 1_000_000  # some 30 a tensor; each makes an object of 50 to 500 bytes
MOST_PARTS = 100_000  # of a tuple with the tuples in it, unfolded: what a hash of it has to visit
MOST_DEPTH = 100  # of tuples in tuples
LEGACY_MAGIC = 0x1950A86A20F9469CFC6C  # of files from before the zip format, whose first pickle it is
LEGACY_PICKLES = 5  # magic number, protocol, the machine, the content, the keys of the storages behind them

ITEM_BYTES = {
    **{
        f"{kind}Storage": 1
        for kind in ("Byte", "Char", "Bool", "Untyped", "QInt8", "QUInt8", "QUInt4x2", "QUInt2x4")
    },
    **{f"{kind}Storage": 2 for kind in ("Half", "BFloat16", "Short")},
    **{f"{kind}Storage": 4 for kind in ("Float", "Int", "QInt32")},
    **{f"{kind}Storage": 8 for kind in ("Double", "Long", "ComplexFloat")},
    "ComplexDoubleStorage": 16,
}
REBUILD = (
    "torch._utils._rebuild_tensor",
    "torch._utils._rebuild_tensor_v2",
    "torch._utils._rebuild_tensor_v3",
)
TENSORS = (
    *("torch._utils._rebuild_parameter", "torch._utils._rebuild_parameter_with_state"),
    *("torch.nn.parameter.Parameter", "torch._tensor._rebuild_from_type_v2"),
)
SCALARS = ("numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar")
# Calls that make no more than what they are given.
PLAIN = (
    *("collections.OrderedDict", "builtins.set", "builtins.complex", "argparse.Namespace", "numpy.dtype"),
    *("torch.Size", "torch.device", "torch.serialization._get_layout"),
)


class FalseClaim(Exception):
    """A file claims more than it holds, or holds more than dense tensors and plain values; the message says which."""


@dataclass(frozen=True, slots=True)
class _Global:
    name: str


@dataclass(frozen=True, slots=True)
class _Storage:
    num_bytes: int
    item_bytes: int


@dataclass(slots=True, eq=False)
class _Tuple:
    items: list[Any]
    parts: int
    depth: int


_TENSOR, _OTHER = object(), object()


def check_zip(archive: zipfile.ZipFile, file_size: int) -> None:
    """Hold the records of a zip against the size of its file, and what its pickle claims against the records.

    Raises:
        FalseClaim
    """
    records = archive.infolist()
    if len({record.filename.lower() for record in records}) < len(records):
        raise FalseClaim("has two records of one name")  # torch finds names without regard to case
    total = sum(record.file_size for record in records)
    if total > file_size or any(record.compress_type != zipfile.ZIP_STORED for record in records):
        raise FalseClaim(
            f"has {file_size:,} bytes and its records claim {total:,}, compressed or one upon the other, as torch.save "
            "never writes them"
        )
    if archive.comment or (records and min(record.header_offset for record in records)):
        raise FalseClaim("is a zip within another file, which torch.save never writes")
    sizes = {record.filename.lower(): record.file_size for record in records}
    folder = records[0].filename.partition("/")[0].lower() if records else ""
    for record in records:
        if record.filename.lower() == f"{folder}/data.pkl":
            with archive.open(record) as file:
                _Reader(lambda key: sizes.get(f"{folder}/data/{key}".lower(), 0)).read(file)


def check_pickles(file: IO[bytes], file_size: int) -> None:
    """Hold what a file of the older format claims against its size.

    Raises:
        FalseClaim
    """
    claimed: dict[str, int] = {}
    for number in range(LEGACY_PICKLES):
        reader = _Reader(lambda _: file_size)
        value = reader.read(file)
        claimed |= reader.storages
        if sum(claimed.values()) > file_size:
            raise FalseClaim(
                f"is cut or damaged: it has {file_size:,} bytes and claims tensors of {sum(claimed.values()):,}"
            )
        if not reader.ended or (number == 0 and value != LEGACY_MAGIC):
            return  # as torch does


class _Reader:
    """One pickle. ``storage_bytes``: the key of a storage -> bytes that there are; ``storages``: those claimed."""

    def __init__(self, storage_bytes: Callable[[str], int]):
        self._storage_bytes, self.storages, self.ended = storage_bytes, {}, False
        self._stack, self._marks, self._memo = [], [], {}

    def read(self, file: IO[bytes]) -> Any:
        """To the end, or to an opcode that torch does not know -> what the pickle holds, as far as it is of use."""
        for count, (name, value) in enumerate(_opcodes(file), 1):
            if count > MOST_OPCODES:
                raise FalseClaim(f"holds more than tensors: a pickle of more than {MOST_OPCODES:,} parts")
            if name == "STOP":
                self.ended = True
                return self._stack[-1] if self._stack else _OTHER
            handle = _HANDLERS.get(name)
            if handle is None:
                return _OTHER
            try:
                handle(self, value)
            except (IndexError, KeyError):
                raise FalseClaim("is cut or damaged: its pickle does not hold together") from None
        return _OTHER

    def _push(self, value):
        self._stack.append(value)

    def _pop_mark(self):
        items, self._stack = self._stack, self._marks.pop()
        return items

    def _mark(self, _):
        self._marks.append(self._stack)
        self._stack = []

    def _tuple(self, items):
        inner = [item for item in items if isinstance(item, _Tuple)]
        parts = len(items) + sum(item.parts for item in inner)
        depth = 1 + max((item.depth for item in inner), default=0)
        if parts > MOST_PARTS or depth > MOST_DEPTH:
            raise FalseClaim(f"holds more than tensors: a tuple of {parts:,} parts, {depth} deep")
        self._push(_Tuple(items, parts, depth))

    def _tuple_of(self, count):
        items = [self._stack.pop() for _ in range(count)][::-1]
        self._tuple(items)

    def _drop(self, count):
        for _ in range(count):
            self._stack.pop()

    def _call(self, arguments, what):
        if not isinstance(what, _Global):
            return _OTHER  # torch refuses it
        given = arguments.items if isinstance(arguments, _Tuple) else []
        if what.name in REBUILD:
            return self._tensor(what.name, given)
        if what.name == "torch._tensor._rebuild_from_type_v2":
            return self._call(given[2], given[0])
        if what.name in TENSORS and given and given[0] is _TENSOR:
            return _TENSOR
        plain = what.name in PLAIN or (what.name in SCALARS and len(given) == 2)
        plain = plain or (what.name == "_codecs.encode" and given[1] in ("latin1", "latin-1"))
        if not plain:
            raise FalseClaim(
                f"holds more than tensors, or a tensor that is no plain dense tensor ({what.name}): nothing of it was "
                "run; save only model.state_dict()"
            )
        return _OTHER

    def _new_object(self, _):
        arguments, what = self._stack.pop(), self._stack.pop()
        self._push(self._call(arguments, what))

    def _build(self, _):
        self._drop(1)
        if self._stack[-1] is _TENSOR:  # torch would set its storage and size anew
            raise FalseClaim(
                "holds a tensor in the form of torch 0.1: load it with torch and save model.state_dict()"
            )

    def _storage(self, _):
        given = self._stack.pop()
        if isinstance(given, int):  # a storage that was there before, of which torch knows
            return self._push(_OTHER)
        if not isinstance(given, _Tuple) or len(given.items) < 5:
            raise FalseClaim("is cut or damaged: a storage without a size")
        kind, key, length = given.items[1], given.items[2], given.items[4]
        item_bytes = ITEM_BYTES.get(kind.name.rpartition(".")[2]) if isinstance(kind, _Global) else None
        if item_bytes is None or not isinstance(length, int) or not isinstance(key, str):
            raise FalseClaim("is cut or damaged: a storage of no known kind")
        there, claimed = self._storage_bytes(key), length * item_bytes
        if not 0 <= claimed <= there:
            raise FalseClaim(
                f"is damaged: storage {key[:40]!r} claims {claimed:,} bytes, of which there are {there:,}"
            )
        self.storages[key] = max(claimed, self.storages.get(key, 0))
        self._push(_Storage(claimed, item_bytes))

    def _tensor(self, name, given):
        storage, offset, size, stride = given[:4]
        item_bytes = storage.item_bytes if isinstance(storage, _Storage) else 0
        if name.endswith("_v3") and isinstance(given[6], _Global):
            dtype = getattr(torch, given[6].name.rpartition(".")[2], None)
            item_bytes = dtype.itemsize if isinstance(dtype, torch.dtype) else 0
        numbers = [offset, *getattr(size, "items", [None]), *getattr(stride, "items", [None])]
        if not item_bytes or not all(isinstance(n, int) and n >= 0 for n in numbers):
            raise FalseClaim("is cut or damaged: a tensor without storage or size")
        extent = sum((s - 1) * step for s, step in zip(size.items, stride.items, strict=False)) + offset + 1
        needed = item_bytes * extent if math.prod(size.items) else 0
        if needed > storage.num_bytes:
            raise FalseClaim(
                f"is damaged: a tensor claims {needed:,} bytes of a storage of {storage.num_bytes:,}"
            )
        return _TENSOR


def _modern(value):
    """``module name`` as pickletools gives it -> ``module.name``, those of Python 2 by today's."""
    module, _, name = value.partition(" ")
    return f"{'builtins' if module == '__builtin__' else module}.{name}"


def _opcodes(file: IO[bytes]) -> Iterator[tuple[str, Any]]:
    try:
        for opcode, value, _ in pickletools.genops(file):
            yield opcode.name, value
    except (ValueError, MemoryError, OverflowError) as error:
        raise FalseClaim(
            f"is cut or damaged: its pickle ends or breaks off ({type(error).__name__})"
        ) from None


# Every opcode that torch's unpickler knows, and what it does to stack, marks and memo.
_HANDLERS: dict[str, Callable[[_Reader, Any], Any]] = {
    "PROTO": lambda self, _: None,
    "MARK": _Reader._mark,
    "GLOBAL": lambda self, value: self._push(_Global(_modern(value))),
    **dict.fromkeys(
        ("BININT", "BININT1", "BININT2", "LONG1", "BINUNICODE", "SHORT_BINSTRING"), _Reader._push
    ),
    **dict.fromkeys(
        ("NONE", "NEWTRUE", "NEWFALSE", "BINFLOAT", "EMPTY_LIST", "EMPTY_DICT", "EMPTY_SET"),
        lambda self, _: self._push(_OTHER),
    ),
    "EMPTY_TUPLE": lambda self, _: self._tuple([]),
    "TUPLE": lambda self, _: self._tuple(self._pop_mark()),
    "TUPLE1": lambda self, _: self._tuple_of(1),
    "TUPLE2": lambda self, _: self._tuple_of(2),
    "TUPLE3": lambda self, _: self._tuple_of(3),
    "APPEND": lambda self, _: self._drop(1),
    "SETITEM": lambda self, _: self._drop(2),
    **dict.fromkeys(("APPENDS", "SETITEMS"), lambda self, _: self._pop_mark()),
    **dict.fromkeys(("BINGET", "LONG_BINGET"), lambda self, value: self._push(self._memo[value])),
    **dict.fromkeys(
        ("BINPUT", "LONG_BINPUT"), lambda self, value: self._memo.__setitem__(value, self._stack[-1])
    ),
    **dict.fromkeys(("REDUCE", "NEWOBJ"), _Reader._new_object),
    "BUILD": _Reader._build,
    "BINPERSID": _Reader._storage,
}
