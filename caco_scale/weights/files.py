"""Files of tensors: safetensors and torch.save, whole or refused; nothing in them is run."""

import argparse
import re
import struct
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy._core.multiarray import scalar
from safetensors import SafetensorError, safe_open

from caco_scale.errors import UserError, one_line, with_article
from caco_scale.weights.claims import FalseClaim, check_pickles, check_zip

METADATA_KEY = "caco_scale"
# Values beside tensors that published checkpoints hold: records of plain values, which run nothing when they are made.
PLAIN_RECORDS: list[Any] = [
    argparse.Namespace,
    (scalar, "numpy.core.multiarray.scalar"),
    scalar,
    np.dtype,
    *(type(np.dtype(kind)) for kind in ("float32", "float64", "int32", "int64", "bool")),
]


def read_tensors(path: str | Path) -> tuple[dict[str, Any], dict[str, str]]:
    """What a safetensors or torch file holds -> (nested dicts of tensors and plain values, metadata of strings).

    Which of the two decides its first bytes. UserError: neither, cut, damaged, or more than tensors and plain values.
    """
    path = Path(path)
    try:
        with open(path, "rb") as file:
            start = file.read(9)
            size = file.seek(0, 2)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    if not start:
        raise UserError(f"{path} is empty: give a file of weights, or a run directory")
    if len(start) == 9 and start[8:] == b"{":
        return _read_safetensors(path, size)
    if not start.startswith((b"PK", b"\x80")):
        raise UserError(f"{path} is no file of weights: neither safetensors nor torch.save wrote it")
    try:
        _check_zip(path, size) if start.startswith(b"PK") else _check_legacy(path, size)
    except FalseClaim as error:
        raise UserError(f"{path} {error}") from None
    try:
        with torch.serialization.safe_globals(PLAIN_RECORDS), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's notes on old files; what it cannot read is an error
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise _unreadable(path, error) from None
    if not isinstance(content, dict):
        what = with_article(type(content).__name__)
        raise UserError(f"{path} holds {what}, not a state dict: save model.state_dict()")
    return content, _metadata_of(content)


def with_metadata(state: Mapping[str, Any], metadata: Mapping[str, str]) -> OrderedDict[str, Any]:
    """The state dict with metadata inside, for ``torch.save``: where torch keeps the versions of modules.

    ``load_state_dict`` of any library takes it as it is, and :func:`read_tensors` gives the metadata back.
    """
    versions = getattr(state, "_metadata", {})
    held = OrderedDict(state)
    own = {"version": 1, **versions.get("", {}), METADATA_KEY: dict(metadata)}
    held._metadata = OrderedDict({**versions, "": own})  # ty: ignore[missing-attribute]
    return held


def _metadata_of(content):
    found: Any = getattr(content, "_metadata", {})
    for key in ("", METADATA_KEY):
        found = found.get(key) if isinstance(found, dict) else None
    found = found if isinstance(found, dict) else {}
    return {name: value for name, value in found.items() if isinstance(name, str) and isinstance(value, str)}


def _read_safetensors(path, size):
    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118 (no dict)
    except (SafetensorError, OSError, ValueError, TypeError) as error:
        raise UserError(f"{path} ({size:,} bytes) is a damaged safetensors file: {one_line(error)}") from None


def _check_legacy(path, size):
    with open(path, "rb") as file:
        check_pickles(file, size)


def _check_zip(path, size):
    """What torch.load does not: compare the checksums and what the file claims."""
    try:
        with zipfile.ZipFile(path) as archive:
            check_zip(archive, size)
            bad = archive.testzip()
    except (zipfile.BadZipFile, OSError, EOFError, NotImplementedError, RuntimeError, struct.error) as error:
        raise UserError(
            f"{path} is cut or damaged ({one_line(error) or type(error).__name__}, {path.stat().st_size:,} bytes): "
            "fetch or write it again"
        ) from None
    if bad is not None:
        raise UserError(f"{path} is damaged: the checksum of {bad} in it is wrong; fetch or write it again")


def _unreadable(path, error):
    """Why torch did not read a file, in one line."""
    words = one_line(error)
    named = re.search(r"GLOBAL ([\w.]+)|[Uu]nsupported (?:global|class)[: ]+(?:GLOBAL )?([\w.]+)", words)
    if named or ("Weights only load failed" in words and "Unsupported operand" in words):
        what = next((name for name in named.groups() if name), "code") if named else "pickled code"
        return UserError(
            f"{path} holds more than tensors ({what}), which would run code when it is read: nothing of it was run; "
            "save only model.state_dict()"
        )
    return UserError(
        f"{path} is cut or damaged, or torch.save did not write it: {words[:160] or type(error).__name__}"
    )
