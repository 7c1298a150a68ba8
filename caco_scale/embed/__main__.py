"""Features of every image of a set, in one file, and what is done with them.

    python -m caco_scale.embed RUN_OR_WEIGHTS --data IMAGES --to features.parquet
    python -m caco_scale.embed neighbours features.parquet --query cat/1.jpg --to near.html
    python -m caco_scale.embed duplicates features.parquet --above 0.95 --to list.txt

The first is the command extract, which is meant where none is named. Several processes share it and write the same
file: accelerate launch --config_file "$(caco path ds_configs/ddp.yaml)" --num_processes N -m
caco_scale.embed ... The ending of a file's name chooses its form.
"""

import importlib
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from tyro.conf import Positional

from caco_scale.errors import UserError, did_you_mean, exit_on_user_error, run_command
from caco_scale.evaluate.flags import EncoderFlags, look_early
from caco_scale.flags.read import read_command, shown
from caco_scale.flags.rules import FROM_0, PositiveInt, Rule, at_most
from caco_scale.run.signals import interrupting

PROG = "python -m caco_scale.embed"
Cosine = Annotated[float, Rule(lambda x: 0 < x <= 0.999999, "give a number above 0, at most 0.999999")]


@dataclass(frozen=True, kw_only=True)
class Extract(EncoderFlags):
    """Features of every image of a set, in one file."""

    command: ClassVar[str] = "extract"

    data: Annotated[str | None, shown("IMAGES")] = None
    """Shard set, image folder, list or parquet files, with or without labels (default: those the run trained on)."""
    to: Annotated[str, shown("FILE")]
    """File to write: .parquet, .npz or .safetensors. Beside it FILE.parts keeps what a killed start has computed."""
    layer: Literal["backbone", "projector", "patches"] = "backbone"
    """What is written: the backbone's features, the projector's embeddings (of a run or of CaCo's authors), or the
    tokens of a ViT's patches."""
    dtype: Literal["fp32", "fp16"] = "fp32"
    """Number format in the file."""


@dataclass(frozen=True, kw_only=True)
class OfFile:
    """What commands that read a file of features are asked."""

    features: Positional[Annotated[str, shown("FEATURES")]]
    """File that extract has written."""
    data: Annotated[str | None, shown("IMAGES")] = None
    """Where its images are now, for pictures (default: where they were)."""
    cache_dir: str = "auto"
    """Where whole shards of an object store are kept."""


@dataclass(frozen=True, kw_only=True)
class Neighbours(OfFile):
    """The nearest images by cosine, exact, as a table and as a page of pictures."""

    command: ClassVar[str] = "neighbours"

    query: Annotated[tuple[str, ...], shown("KEY_OR_IMAGES [...]")]
    """Images to look for: keys or sources of the file, image files, folders of images or shard sets."""
    k: PositiveInt = 10
    """Neighbours of each."""
    to: Annotated[tuple[str, ...], shown("FILE [FILE]")] = ()
    """Files to write: a table (.csv), a page of pictures (.html), or both (default: a table on the console)."""
    weights: Annotated[str | None, shown("RUN_OR_WEIGHTS")] = None
    """Where the encoder of the file is now, for image files (default: where it was)."""
    arch: Annotated[str | None, shown("ARCH")] = None
    """Architecture of that encoder, where it is code of your own: package.module:callable."""
    images_at_once: Annotated[int, at_most(2**20), Rule(lambda x: x > 0, "give a number above 0")] = 256
    """Query images per forward."""
    workers: Annotated[int, FROM_0, at_most(1024)] = 0
    """Loader processes for query images."""


@dataclass(frozen=True, kw_only=True)
class Duplicates(OfFile):
    """Groups of near-duplicates by cosine, exact, and all but one of each as a list for data_prep build --without."""

    command: ClassVar[str] = "duplicates"

    above: Annotated[Cosine, shown("COSINE")]
    """Two images whose cosine is this or more are in one group; so are two that a row of such pairs joins."""
    to: Annotated[str, shown("LIST")]
    """Text file to write: a name a line of all images of a group but its first one in the set's order."""
    groups: Annotated[tuple[str, ...], shown("FILE [FILE]")] = ()
    """Files to write about the groups: a table (.csv), a page of pictures (.html), or both."""


COMMANDS: dict[str, type[Any]] = {kind.command: kind for kind in (Extract, Neighbours, Duplicates)}


def with_command(arguments: Sequence[str]) -> list[str]:
    """The words of a command line with the command in front: extract, where none is named."""
    words = list(arguments)
    if not words or words[0] in ("-h", "--help", *COMMANDS):
        return words
    first = words[0]
    if first.isalpha() and not os.path.exists(first) and did_you_mean(first, COMMANDS):
        return words  # a command misspelt: who reads the words says so
    return [Extract.command, *words]


@exit_on_user_error
def main(arguments: Sequence[str] | None = None, prog: str = PROG) -> None:
    """Run a command; exit code 0 with its files written, 2 on a user's mistake."""
    words = with_command(sys.argv[1:] if arguments is None else arguments)
    name, flags = read_command(COMMANDS, words, prog, __doc__ or "")
    if name != Extract.command and os.environ.get("WORLD_SIZE", "1") != "1":
        raise UserError(f"{prog} {name} is the work of one process: start it without a launcher")
    try:
        with interrupting():
            if name == Extract.command:
                look_early(flags, flags.data)
            importlib.import_module(f"caco_scale.embed.{name}").run(flags)
    except KeyboardInterrupt as stop:
        if name == Extract.command:
            print("interrupted: finished parts are kept, the same command continues", file=sys.stderr)
            sys.exit(getattr(stop, "code", 130))
        raise


if __name__ == "__main__":
    run_command(main)
