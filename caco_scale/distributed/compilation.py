"""``torch.compile`` for a run: what it takes, what speaks against it, what it compiles, where its code is kept."""

import contextlib
import fcntl
import logging
import os
import re
import shutil
import sys
import sysconfig
from collections.abc import Generator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from caco_scale.distributed.blocks import find_blocks

PLACE = "TORCHINDUCTOR_CACHE_DIR"  # inductor's and, in a folder of it, Triton's
KEPT_IN = "compile_cache"  # in a run's directory
LEAST_CAPABILITY = (7, 0)  # of a GPU for which Triton makes code
SIZES = 2  # of views, at most: the global ones and the local crops


def lacking(device_type: str) -> str | None:
    """What torch.compile needs for such a device and this machine has not, with what to do; None: nothing.

    On CUDA that is Triton, whose launchers are C; on a CPU inductor writes C++.
    """
    cuda = device_type == "cuda"
    if cuda and not find_spec("triton"):
        return "the package triton, which torch for CUDA brings: pip install triton"
    language, variable, usual = ("C", "CC", ("gcc", "clang")) if cuda else ("C++", "CXX", ("g++",))
    compilers = (os.environ[variable],) if variable in os.environ else usual  # as both look for it
    if not any(map(shutil.which, compilers)):
        names = " or ".join(compilers)
        return f"a {language} compiler, and there is no {names}: install one, or name it in {variable}"
    schemes = ("posix_prefix", sysconfig.get_default_scheme())
    headers = [Path(sysconfig.get_path("include", scheme), "Python.h") for scheme in schemes]
    if not any(header.exists() for header in headers):
        return f"Python's headers, and there is no {headers[0]}: install them (python3-dev)"
    return _too_old() if cuda else None


def _too_old():
    import torch

    found = torch.cuda.get_device_capability() if torch.cuda.is_available() else LEAST_CAPABILITY
    if found >= LEAST_CAPABILITY:
        return None
    least, has = (".".join(map(str, numbers)) for numbers in (LEAST_CAPABILITY, found))
    return f"a GPU of compute capability {least}, and this one has {has}"


def reason_against(
    device_type: str, strategy: str, recomputes: bool, fp64: bool, lacks: str | None
) -> str | None:
    """Why ``precision.compile=auto`` is false; None: it is true.

    Args:
        recomputes: ``model.checkpoint_activations``.
        fp64: ``precision.compute``, with which runs are compared, to their last digits.
        lacks: of :func:`lacking`.
    """
    if device_type != "cuda":
        return "only on CUDA"
    if strategy == "zero3":
        return "zero3 partitions the parameters"
    if recomputes:
        return "model.checkpoint_activations"
    if fp64:
        return "precision.compute fp64"
    return lacks and f"it needs {lacks}"


def compile_encoders(model: Any, backend: str = "inductor") -> None:
    """Compile both encoders: once for each size of view, whatever follows (a graph of free sizes would be slower)."""
    model.query.compile(backend=backend, dynamic=False)
    model.key.compile(backend=backend, dynamic=False)
    _expect(2 * SIZES)


def compile_blocks(model: Any, backend: str = "inductor") -> None:
    """As :func:`compile_encoders`, block by block; where nothing repeats, an encoder as a whole.

    FSDP2 gathers and frees the parameters of a block in its hooks, which stay outside what is compiled. Parameters keep
    their names. Layers before and behind the blocks are not compiled.
    """
    import torch

    for encoder in (model.query, model.key):
        parts = find_blocks(encoder) or [encoder]
        for part in parts:
            part.forward = torch.compile(part.forward, backend=backend, dynamic=False)
        _expect(SIZES * len(parts))


def _expect(times):
    """Let code that several modules of a class share be compiled so many times more, and say where that is too few."""
    from torch._dynamo import config

    config.recompile_limit += times
    config.accumulated_recompile_limit += times
    logging.getLogger("torch._dynamo.convert_frame").addFilter(_at_the_limit)


class _AtTheLimit(logging.Filter):
    """Says once that torch no longer compiles some code, which its own warning does not call by the field's name."""

    said = False

    def filter(self, record):
        found = re.search(r"(\w*recompile_limit) \((\d+)\)\s+function: (.*)", record.getMessage())
        if found and not self.said:
            self.said = True
            limit, number, code = found.groups()
            print(
                f"warning: precision.compile: {code} was compiled {number} times (torch's {limit}); for other inputs "
                "it runs uncompiled, which is slower: find out why by TORCH_LOGS=recompiles, or give "
                "--precision.compile false",
                file=sys.stderr,
                flush=True,
            )
        return True


_at_the_limit = _AtTheLimit()


@contextlib.contextmanager
def failures_explained() -> Generator[None]:
    """Within it, an error of the compiler carries what a user can do: under ``auto`` nobody has asked for it."""
    try:
        yield
    except Exception as error:
        if type(error).__module__.startswith(("torch._dynamo.", "torch._inductor.")):
            error.add_note("torch.compile has failed: --precision.compile false trains without it")
        raise


@contextlib.contextmanager
def code_kept_in(folder: Path) -> Generator[str]:
    """Within it, what is compiled is kept in a folder, where later starts find it -> a line that says where it is.

    All processes of a run may share the folder: inductor and Triton name files by the hash of what they are made from,
    and put them in place whole, by renaming. Where the user has named a place, that one stays.
    """
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    before = os.environ.get(PLACE, default_cache_dir())  # which inductor names by itself when it is imported
    if os.path.abspath(before) != os.path.abspath(default_cache_dir()):
        yield f"compiled code is kept in {before} ({PLACE})"
        return
    folder = folder.absolute()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / ".lock", "a+b") as lock:
            fcntl.flock(
                lock, fcntl.LOCK_SH
            )  # inductor takes locks there, too, and fails where there are none
    except OSError as error:
        yield f"{folder} cannot keep compiled code ({error.strerror or error}): each node keeps it for itself"
        return
    os.environ[PLACE] = str(folder)
    try:
        yield f"compiled code is kept in {folder}, for later starts"
    finally:
        os.environ[PLACE] = before
