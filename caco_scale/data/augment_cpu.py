"""The augmentation on a CPU by compiled code, ``augment_cpu.c``: some 8 times as quick as torch's operations.

It is built when the package is installed. Where it is not there, or was built of another source, :func:`absent` says
why and what to do, and ``augment`` goes on with torch.

Shapes: B this rank's batch, H = W the crop's side, C channels, k blur kernel size.
"""

import ctypes
import functools
from collections.abc import Mapping, Sequence
from hashlib import sha256
from pathlib import Path

import torch

LIBRARY = "_augment_cpu.abi3.so"
MOST_RADIUS = 512  # of a blur kernel, in pixels; as in augment_cpu.c
DTYPES = {
    **dict.fromkeys(("jitter", "grayscale", "blur", "solarize", "flip"), torch.bool),
    **dict.fromkeys(("brightness", "contrast", "saturation", "hue"), torch.float64),
    "solarize_threshold": torch.float64,
    "blur_kernel": torch.float64,
    "order": torch.int64,
}


class Arguments(ctypes.Structure):
    """Of one call; the struct of the same name in augment_cpu.c."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("n", "h", "w", "c", "k", "bytes")),
        *((name, ctypes.c_void_p) for name in ("crops", *DTYPES, "mean", "std", "out")),
        *((name, ctypes.c_int64) for name in ("channel_stride", "row_stride", "column_stride")),
    )


@functools.cache
def load(folder: Path = Path(__file__).parent) -> ctypes.CDLL | str:
    """The compiled code of a folder; else why it cannot be used."""
    if not (folder / LIBRARY).exists():
        return "it was not built, for want of a C compiler or of an installation"
    try:
        library = ctypes.CDLL(str(folder / LIBRARY))
        built_of = ctypes.string_at(ctypes.addressof(ctypes.c_char.in_dll(library, "caco_augment_source")))
    except (OSError, ValueError) as error:
        return f"{folder / LIBRARY} cannot be loaded ({error})"
    if built_of.decode() != sha256(Path(__file__).with_suffix(".c").read_bytes()).hexdigest():
        return f"{folder / LIBRARY} was built of another version of its source"
    library.caco_augment.argtypes, library.caco_augment.restype = (
        [ctypes.POINTER(Arguments), ctypes.c_int],
        ctypes.c_int,
    )
    return library


def absent() -> str | None:
    """A line for users where the compiled code cannot be used; None where it is there."""
    why = load()
    if not isinstance(why, str):
        return None
    return (
        f"no compiled augmentation ({why}): torch augments on this CPU, which takes some 8 times as long; install a C "
        "compiler, then run pip install again (pip install -e . in a checkout)"
    )


def takes(crops: torch.Tensor, kernel_size: int = 1) -> bool:
    """Whether compiled code augments these crops (B, H, W, C), and not torch. A blur reaches less than a side."""
    reach = min(MOST_RADIUS, crops.shape[1] - 1, crops.shape[2] - 1)
    return crops.device.type == "cpu" and kernel_size // 2 <= reach and not isinstance(load(), str)


def augment(
    crops: torch.Tensor,
    params: Mapping[str, torch.Tensor] | None,
    mean: Sequence[float],
    std: Sequence[float],
    channels_last: bool,
    library: ctypes.CDLL | None = None,
) -> torch.Tensor:
    """(B, H, W, C) uint8 or uint16 -> (B, C, H, W) float32: ``augment.augment``, or with no params its ``normalise``.

    By as many threads as torch has. ``library``: that of :func:`load`.
    """
    count, height, width, channels = crops.shape
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    out = torch.empty((count, channels, height, width), memory_format=memory_format)
    crops = crops.contiguous()
    drawn = {} if params is None else {n: params[n].to(dtype).contiguous() for n, dtype in DTYPES.items()}
    assert all(values.shape[0] == count for values in drawn.values())
    assert params is None or drawn["order"].shape == (count, 4)
    plain = [(ctypes.c_double * channels)(*values[:channels]) for values in (mean, std)]
    arguments = Arguments(
        *(count, height, width, channels),
        drawn["blur_kernel"].shape[1] if drawn else 1,
        crops.element_size(),
        crops.data_ptr(),
        *(drawn[name].data_ptr() if drawn else None for name in DTYPES),
        *(ctypes.addressof(values) for values in plain),
        out.data_ptr(),
        # torch calls the strides of an axis of length 1 what it likes
        *((1, width * channels, channels) if channels_last else (height * width, width, 1)),
    )
    found = library or load()
    assert not isinstance(found, str), found
    if found.caco_augment(ctypes.byref(arguments), torch.get_num_threads()):
        raise MemoryError(f"no memory to augment images of {height} x {width} pixels")
    return out
