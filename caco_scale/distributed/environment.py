"""What launchers leave in a process's environment, read and checked: a stale or broken variable is one line, no hang.

A process is one of several by the variables of torch's launchers (``accelerate launch``, ``torchrun``), else by those
of an MPI. accelerate reads many more; of these only what is named here reaches it (:data:`HANDED_ON`), so that what
another job has left in a shell or an image changes nothing.

Imports no torch.
"""

import contextlib
import os
from collections.abc import Generator, Mapping
from typing import NamedTuple

from caco_scale.errors import UserError
from caco_scale.shipped import spelled

PORTS = range(1, 2**16)


class Names(NamedTuple):
    """The variables of one kind of launcher."""

    size: str
    rank: str
    local_rank: str
    local_size: str


TORCH = Names("WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
# In the order in which accelerate looks at them.
MPI = (
    Names("PMI_SIZE", "PMI_RANK", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
    Names(
        *("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"),
        *("OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"),
    ),
    Names(
        *("MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_RANK"),
        *("MV2_COMM_WORLD_LOCAL_RANK", "MV2_COMM_WORLD_LOCAL_SIZE"),
    ),
)
# What accelerate itself may see of its own variables. The strategy is ours, and with it all that would change it.
HANDED_ON = ("ACCELERATE_USE_CPU", "ACCELERATE_USE_DEEPSPEED", "ACCELERATE_CPU_AFFINITY")
ITS_OWN = ("ACCELERATE_", "FSDP_", "PARALLELISM_CONFIG_", "MEGATRON_LM_", "FP8_")
# What a user may have meant, which is not followed: the values that ask for nothing, and what does it here.
NOT_FOLLOWED = {
    "ACCELERATE_MIXED_PRECISION": (("no", "fp32"), "--precision.compute decides"),
    "ACCELERATE_DYNAMO_BACKEND": (("no",), "--precision.compile decides"),
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": (("1", "auto"), "--data.micro_batch_size decides"),
}
TRUE, FALSE = ("true", "1", "yes", "y", "t", "on"), ("false", "0", "no", "n", "f", "off", "")


def is_true(environment: Mapping[str, str], variable: str) -> bool:
    """A switch of accelerate's. UserError: it is none of the words for yes and no."""
    value = environment.get(variable, "").lower()
    if value not in TRUE + FALSE:
        raise UserError(f"{variable} is {value!r}: give true or false, or unset {variable}")
    return value in TRUE


def number(environment: Mapping[str, str], variable: str, default: int, lowest: int = 1) -> int:
    """A whole number of the environment. UserError: it is none, or lower than ``lowest``."""
    text = environment.get(variable)
    if text is None:
        return default
    if not (text.isascii() and text.isdecimal() and len(text) < 10 and int(text) >= lowest):
        raise UserError(
            f"{variable} is {text!r}, which is no whole number of at least {lowest}: unset {variable}, as another "
            "launch's, or correct it"
        )
    return int(text)


class Place(NamedTuple):
    """Of a process among those of its launch, as the environment says: ``size`` processes meet at ``address``."""

    rank: int
    size: int
    local_rank: int
    address: str  # HOST:PORT, empty where nobody is to be met
    names: Names = TORCH

    @property
    def is_launched(self) -> bool:
        """Whether a process group is to be joined, be it of one."""
        return bool(self.address)


ALONE = Place(0, 1, 0, "")


def place_of(environment: Mapping[str, str], on_cpu: bool, asked_world_size: int = 0) -> Place:
    """This process's place in its launch.

    Args:
        on_cpu: on GPUs accelerate joins torch's launches alone.
        asked_world_size: 1: what an MPI says is not meant (``srun`` starts single runs, too).
    Raises:
        UserError: a variable that is no number, or that lacks the others it needs.
    """
    for names in (TORCH, *MPI):
        for name, lowest in zip(names, (1, 0, 0, 1), strict=True):
            number(environment, name, 0, lowest)
    if number(environment, TORCH.size, 1) > 1 or TORCH.local_rank in environment:
        return _checked(environment, TORCH)
    if number(environment, TORCH.rank, 0, 0) > 0:
        raise UserError(
            f"RANK is {environment['RANK']} but WORLD_SIZE is not above 1: unset RANK, as another launch's, "
            f"{_or_launch()} set WORLD_SIZE, MASTER_ADDR and MASTER_PORT"
        )
    for names in MPI if on_cpu and asked_world_size != 1 and TORCH.size not in environment else ():
        if number(environment, names.size, 1) > 1:
            return _checked(environment, names)
    return ALONE


def processes_of_node(environment: Mapping[str, str] = os.environ) -> int:
    """How many of the launch's processes share this machine; 1 where it does not say. Accelerate says it for an MPI.

    UserError: LOCAL_WORLD_SIZE is no number.
    """
    return number(environment, TORCH.local_size, 1)


def share_of_node(environment: Mapping[str, str], world_size: int) -> tuple[int, int]:
    """(local rank, processes of this node) of one of ``world_size``; (0, 1) where the launch does not say both."""
    local_rank, local_size = number(environment, TORCH.local_rank, 0, 0), processes_of_node(environment)
    return (local_rank, local_size) if local_rank < local_size <= world_size else (0, 1)


def is_on_one_node(environment: Mapping[str, str]) -> bool:
    """Do all processes of this launch see the same disks, as its variables say? Without a doubt only."""
    sizes = [
        (environment[names.size], environment.get(names.local_size))
        for names in (TORCH, *MPI)
        if environment.get(names.size, "1") != "1"
    ]
    return all(size == local for size, local in sizes)


def _or_launch():
    config = spelled("ds_configs/ddp.yaml")
    return f"launch with accelerate launch --config_file {config} --num_processes N, or"


def _checked(environment, names):
    known = [f"{name}={environment[name]}" for name in names[:3] if name in environment]
    needed = [names.size, names.rank, "MASTER_ADDR", *(["MASTER_PORT"] if names is TORCH else [])]
    missing = [name for name in needed if not environment.get(name)]
    unset = " ".join(name for name in names if name in environment)
    one = " (or confirm one process by --run.world_size 1)" if names is not TORCH else ""
    if missing:
        raise UserError(
            f"{' '.join(known)} in the environment without {', '.join(missing)}: unset {unset}, as another "
            f"launch's{one}, {_or_launch()} set what is missing"
        )
    size, rank = number(environment, names.size, 1), number(environment, names.rank, 0, 0)
    local_rank = number(environment, names.local_rank, 0, 0)
    local_size = number(environment, names.local_size, size)
    if rank >= size or local_rank >= size or local_size > size or local_rank >= local_size:
        raise UserError(
            f"{' '.join(known)} {names.local_size}={local_size}: a rank must be below the number of processes; unset "
            f"{unset}, as another launch's{one}, {_or_launch()} correct them"
        )
    port = number(environment, "MASTER_PORT", 29500)
    if port not in PORTS:
        raise UserError(f"MASTER_PORT is {port}: give a free port from {PORTS[0]} to {PORTS[-1]}")
    return Place(rank, size, local_rank, f"{environment['MASTER_ADDR']}:{port}", names)


def check_device(environment: Mapping[str, str], device: str) -> None:
    """``ACCELERATE_TORCH_DEVICE``, against the kind of device that is trained on (``cpu``, ``cuda``)."""
    asked = environment.get("ACCELERATE_TORCH_DEVICE", device)
    if asked != device:
        instead = "CUDA_VISIBLE_DEVICES= trains on the CPU" if device == "cuda" else "torch sees no GPU here"
        raise UserError(
            f"ACCELERATE_TORCH_DEVICE is {asked!r} but this process trains on {device}: unset ACCELERATE_TORCH_DEVICE "
            f"({instead})"
        )


def check_parallelism(environment: Mapping[str, str]) -> None:
    """Refuse engines and ways to share out a model that this program does not train with, each by name."""
    asked = {"ACCELERATE_USE_MEGATRON_LM": is_true(environment, "ACCELERATE_USE_MEGATRON_LM")}
    asked |= {
        name: value not in ("", "1")
        for name, value in environment.items()
        if name.startswith("PARALLELISM_CONFIG_") and name.endswith("_SIZE")
    }
    for name in (name for name, wanted in asked.items() if wanted):
        engine = "Megatron-LM" if "MEGATRON" in name else "parallelism"
        raise UserError(
            f"the launcher asks for {engine} ({name}={environment[name]}), which this program does not train with: "
            f"unset {name}, or use one of {spelled('ds_configs/*.yaml')}"
        )


def not_followed(environment: Mapping[str, str]) -> list[str]:
    """Of what the launcher asks and this program does itself: a line each."""
    return [
        f"{name}={environment[name]} is not followed: {instead}"
        for name, (nothing, instead) in NOT_FOLLOWED.items()
        if environment.get(name, nothing[0]).lower() not in nothing
    ]


@contextlib.contextmanager
def only_what_is_handed_on(place: Place) -> Generator[None]:
    """``os.environ`` meanwhile without accelerate's other variables, and without MPIs that ``place`` is not of."""
    foreign = {name for names in MPI if names != place.names for name in names}
    hidden = {
        name: os.environ.pop(name)
        for name in list(os.environ)
        if name in foreign or (name.startswith(ITS_OWN) and name not in HANDED_ON)
    }
    try:
        yield
    finally:
        os.environ.update(hidden)
