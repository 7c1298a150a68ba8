"""``torch.compile`` for a run: whether a machine has what it takes, and what speaks against it."""

import os
import shutil
import sysconfig
from importlib.util import find_spec
from pathlib import Path

LEAST_CAPABILITY = (7, 0)  # of a GPU for which Triton makes code


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
    if strategy in ("zero3", "fsdp2"):
        return f"{strategy} partitions the parameters"
    if recomputes:
        return "model.checkpoint_activations"
    if fp64:
        return "precision.compute fp64"
    return lacks and f"it needs {lacks}"
