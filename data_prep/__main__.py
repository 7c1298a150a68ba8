"""Shard sets: ``python -m data_prep {build,verify,repair,index,demo}``, also installed as ``caco-shards``."""

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from tyro.conf import Positional

from caco_scale.data.pixels import BITS, MOST_CHANNELS
from caco_scale.errors import UserError, exit_on_user_error
from caco_scale.flags.read import Switch, read_command, shown
from caco_scale.flags.rules import FROM_0, Rule, at_most
from caco_scale.run.signals import interrupting

PROG = "python -m data_prep"
ONE_PER_CLASS = Rule(lambda x: x >= 10, "give at least 10, one image per class")
EIGHT_OR_SIXTEEN = Rule(lambda x: x in (0, *BITS), "give 8 or 16")

PARQUET_OPTIONS = ("image_column", "label_column", "missing_files")

# What a command imports stands in its ``run``: --help and a typo are answered at once.


@dataclass(frozen=True, kw_only=True)
class FromSource:
    """What commands that read a source are asked."""

    src: Positional[Annotated[str, shown("SRC")]]
    """Folder of class folders, a tar of one (.tar, .tar.gz, .tar.bz2, .tar.xz), ILSVRC2012_img_train.tar,
    ILSVRC2012_img_val.tar (with --labels), or parquet files (with --format parquet)."""
    format: Literal["auto", "parquet"] = "auto"
    """Kind of the source."""
    labels: Annotated[str | None, shown("FILE")] = None
    """Classes of a tar without folders: ImageNet's devkit, or a text of WNIDs."""
    md5: Annotated[str, shown("HEX")] = "auto"
    """Of the source (default: auto = ImageNet's own, for its size; none = unchecked)."""
    split: Annotated[str | None, shown("NAME")] = None
    """Take only this split, straight into DST."""
    split_folders: Switch | None = None
    """Folders named train, val, ... are splits, of a set each, or (--no-split-folders) classes (default: by their
    names, and a question where those do not tell)."""
    image_column: Annotated[str | None, shown("NAME")] = None
    """Of parquet files (default: the one that holds images)."""
    label_column: Annotated[str | None, shown("NAME")] = None
    """Of parquet files (default: the one of classes, if there is one); none = no labels."""
    missing_files: Switch = False
    """Take parquet files of which some are missing by their own numbers."""
    skip_empty_classes: Switch = False
    """Leave out class folders without images."""
    without: Annotated[str | None, shown("LIST")] = None
    """Leave out the images that a text file names, one a line, as caco embed duplicates writes it."""
    workers: Annotated[int | None, shown("N")] = None
    """Processes (default: one per CPU)."""

    def source_options(self) -> dict[str, Any]:
        """As :func:`data_prep.sources.open_source` takes them."""
        options = {"kind": self.format, "labels": self.labels, "md5": self.md5}
        if self.format == "parquet":
            options |= {name: getattr(self, name) for name in ("split", *PARQUET_OPTIONS)}
        elif given := [name for name in PARQUET_OPTIONS if getattr(self, name)]:
            raise UserError(f"--{given[0].replace('_', '-')} is for --format parquet: give both or none")
        return options

    def split_folder(self) -> str | None:
        """The split that is a folder of the source: parquet files have theirs in their names."""
        return None if self.format == "parquet" else self.split


@dataclass(frozen=True, kw_only=True)
class Build(FromSource):
    """Build a shard set from a folder of class folders or a tar."""

    dst: Positional[Annotated[str, shown("DST")]]
    """Directory or s3://, gs://, az:// folder of the set; splits (train, val, test) get one each."""
    samples_per_shard: int = 1000
    """Images per shard."""
    seed: int = 0
    """Seed of the order in which images fill the shards."""
    short_side: int = 0
    """Shrink larger images to this many pixels; 0 = keep all bytes."""
    channels: Annotated[int, FROM_0, at_most(MOST_CHANNELS)] = 0
    """Channels that all images have and keep, to the last bit (TIFF pages count as such); 0 = found (photographs
    become 8-bit RGB JPEGs; deep, one- and many-channel images stay as they are)."""
    bits: Annotated[int, EIGHT_OR_SIXTEEN] = 0
    """Bits of each channel, 8 or 16; 0 = found, or 8 with --channels."""
    rgb: Switch = False
    """Make 8-bit RGB JPEGs of all images, as Pillow shows them."""
    part: Annotated[str | None, shown("I/N")] = None
    """Build every N-th shard only, from the I-th: N processes with I = 1 to N share a build, on any nodes."""
    dry_run: Switch = False
    """Say what would be written, and how large."""

    def run(self) -> None:
        from data_prep.build import build
        from data_prep.progress import print_summary, say

        start = time.monotonic()
        results = build(
            self.src,
            self.dst,
            samples_per_shard=self.samples_per_shard,
            seed=self.seed,
            workers=self.workers,
            split=self.split_folder(),
            skip_empty_classes=self.skip_empty_classes,
            short_side=self.short_side,
            source_options=self.source_options(),
            dry_run=self.dry_run,
            part=parse_part(self.part),
            split_folders=self.split_folders,
            without=self.without,
            channels=self.channels,
            bits=self.bits,
            rgb=self.rgb,
            tell=say,
        )
        if self.dry_run:
            before = f" before images are made {self.short_side} pixels small" if self.short_side else ""
            for path, images, shards, num_bytes in results:
                size = f"{images:,} images in {shards:,} shards, about {num_bytes / 1e6:,.1f} MB"
                say(f"{path}: would write {size}{before}")
            return
        print_summary([(path, made) for path, made, _ in results if made], time.monotonic() - start)
        for path, made, was_there in results:
            if not made:
                say(f"{path}: part {self.part} is finished, others are not")
            elif was_there:
                say(f"{path} was finished already, by the same build")


@dataclass(frozen=True, kw_only=True)
class Verify:
    """Check a shard set against its manifest."""

    dst: Positional[Annotated[str, shown("DST")]]
    """Directory or address of a shard set, or of sets named by split."""
    expect: Annotated[str | None, shown("NAME")] = None
    """imagenet1k-train or imagenet1k-val: must be that, complete."""
    full: Switch = False
    """Also hash every shard and decode every image."""
    workers: Annotated[int | None, shown("N")] = None
    """Processes for --full (default: one per CPU)."""

    def run(self) -> None:
        from data_prep.progress import say
        from data_prep.verify import histogram, verify

        checked = "every byte and image checked" if self.full else "sizes, indexes and counts checked"
        for path, manifest in verify(self.dst, self.full, self.workers, self.expect):
            if self.full:
                say(*histogram(manifest))
            samples = f"{manifest.num_samples:,} samples in {len(manifest.shards):,} shards"
            samples += f", {manifest.pixels}" * ("channels" in manifest.build)
            say(f"{path}: fine, {samples} ({checked})")


@dataclass(frozen=True, kw_only=True)
class Repair(FromSource):
    """Build the bad shards of a set again from its source."""

    dst: Positional[Annotated[str, shown("DST")]]
    """Directory or address of the set."""

    def run(self) -> None:
        from data_prep.progress import say
        from data_prep.repair import repair

        options = (self.source_options(), self.skip_empty_classes, self.split_folder(), self.split_folders)
        manifest, repaired = repair(self.src, self.dst, self.workers, *options, self.without)
        which = ", ".join(repaired) or "none"
        say(f"{self.dst}: {len(repaired)} of {len(manifest.shards):,} shards built again: {which}")


@dataclass(frozen=True, kw_only=True)
class Index:
    """Make a foreign WebDataset set readable. As in webdataset, files in a row whose names are equal up to the first
    dot are one sample; what has no image is left out and counted."""

    src: Positional[Annotated[str, shown("SRC")]]
    """Folder of tars, or a pattern like s3://bucket/train-{000..012}.tar."""
    to: Annotated[str | None, shown("DIR")] = None
    """Directory for manifest and indexes (default: beside the tars)."""
    image: Annotated[str | None, shown("EXT")] = None
    """Extension of the image to read (rgb.png), where samples have several and none is plainly .jpg, .png, ..."""

    def run(self) -> None:
        from data_prep.index import index
        from data_prep.progress import say

        place, manifest = index(self.src, self.to, self.image)
        say(*(f"{place}: {note}" for note in manifest.build.get("notes", ())))
        say(
            f"{place}: {manifest.num_samples:,} samples ({sum(manifest.class_counts):,} with a label) in "
            f"{len(manifest.shards):,} shards, {manifest.num_bytes / 1e6:,.1f} MB; give it as data.shards"
        )


@dataclass(frozen=True, kw_only=True)
class Demo:
    """Draw the demo's ten classes of textures into DST/train and DST/val."""

    dst: Positional[Annotated[str, shown("DST")]]
    """Directory for the two shard sets."""
    train: Annotated[int, ONE_PER_CLASS] = 4096
    """Training images."""
    val: Annotated[int, ONE_PER_CLASS] = 2000
    """Validation images."""

    def run(self) -> None:
        from caco_scale.data.store.local import LocalStore
        from data_prep.demo import build_demo
        from data_prep.progress import print_summary

        start = time.monotonic()
        paths = build_demo(self.dst, self.train, self.val, workers=None)
        print_summary([(path, LocalStore(path).manifest) for path in paths], time.monotonic() - start)


COMMANDS = {"build": Build, "verify": Verify, "repair": Repair, "index": Index, "demo": Demo}


def parse_part(text: str | None) -> tuple[int, int] | None:
    """``I/N`` -> (I, N), or None where it is not given."""
    if text is None:
        return None
    numbers = text.split("/")
    if len(numbers) == 2 and all(n.isdigit() for n in numbers) and 1 <= int(numbers[0]) <= int(numbers[1]):
        return int(numbers[0]), int(numbers[1])
    raise UserError(
        f"--part {text} is not I/N with I from 1 to N: give 1/4, 2/4, 3/4 and 4/4 to four processes"
    )


@exit_on_user_error
def main(arguments: Sequence[str] | None = None, prog: str = PROG) -> None:
    """Run a command; exit code 0, or 2 with one line on stderr."""
    _, command = read_command(COMMANDS, sys.argv[1:] if arguments is None else arguments, prog, __doc__ or "")
    try:
        with interrupting():
            command.run()
    except KeyboardInterrupt as stop:
        print("interrupted: finished shards are kept, the same command continues", file=sys.stderr)
        sys.exit(getattr(stop, "code", 130))


if __name__ == "__main__":
    main()
