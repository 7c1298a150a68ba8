"""The command line: ``python -m data_prep {build,verify,repair,index,demo}``, also installed as ``caco-shards``."""

import argparse
import os
import sys
import time

from rich.console import Console

from caco_scale.data.store.local import LocalStore
from caco_scale.errors import UserError, did_you_mean, exit_on_user_error
from data_prep.build import build
from data_prep.progress import print_summary, printable
from data_prep.verify import histogram, verify


class Parser(argparse.ArgumentParser):
    """Errors of the command line are one line, like all others."""

    def error(self, message):
        raise UserError(f"{message} (see `{self.prog} --help`)")


def parser():
    """The commands and their flags."""
    main = Parser(prog="python -m data_prep", description=__doc__, allow_abbrev=False)
    commands = main.add_subparsers(dest="command", required=True, metavar="{build,verify,repair,index,demo}")
    defaults = {"allow_abbrev": False, "formatter_class": argparse.ArgumentDefaultsHelpFormatter}

    make = commands.add_parser(
        "build", help="build a shard set from a folder of class folders or a tar", **defaults
    )
    _add_source(make)
    make.add_argument(
        "dst",
        help="directory or s3://, gs://, az:// folder of the set; splits (train, val, test) get one each",
    )
    make.add_argument("--samples-per-shard", type=int, default=1000, metavar="N", help="images per shard")
    make.add_argument("--seed", type=int, default=0, help="seed of the order in which images fill the shards")
    make.add_argument("--workers", type=int, metavar="N", help="processes; one per CPU if not given")
    make.add_argument(
        "--short-side",
        type=int,
        default=0,
        metavar="PIXELS",
        help="shrink larger images to it; 0 = keep all bytes",
    )
    make.add_argument(
        "--part",
        metavar="I/N",
        help="build every N-th shard only, from the I-th: N processes with I = 1 to N share a build, on any nodes",
    )
    make.add_argument("--dry-run", action="store_true", help="say what would be written, and how large")

    mend = commands.add_parser(
        "repair", help="build the bad shards of a set again from its source", **defaults
    )
    _add_source(mend)
    mend.add_argument("dst", help="directory or address of the set")
    mend.add_argument(
        "--workers", type=int, metavar="N", help="processes that check; one per CPU if not given"
    )

    foreign = commands.add_parser("index", help="make a foreign WebDataset set readable", **defaults)
    foreign.add_argument("src", help="folder of tars, or a pattern like s3://bucket/train-{000..012}.tar")
    foreign.add_argument(
        "--to", metavar="DIR", help="directory for manifest and indexes; beside the tars if not given"
    )

    check = commands.add_parser("verify", help="check a shard set against its manifest", **defaults)
    check.add_argument("dst", help="directory or address of a shard set, or of sets named by split")
    check.add_argument(
        "--expect", metavar="NAME", help="imagenet1k-train or imagenet1k-val: must be that, complete"
    )
    check.add_argument("--full", action="store_true", help="also hash every shard and decode every image")
    check.add_argument(
        "--workers", type=int, metavar="N", help="processes for --full; one per CPU if not given"
    )

    demo = commands.add_parser(
        "demo", help="draw the demo's ten classes of textures into DST/train, DST/val", **defaults
    )
    demo.add_argument("dst", help="directory for the two shard sets")
    demo.add_argument("--train", type=int, default=4096, metavar="N", help="training images")
    demo.add_argument("--val", type=int, default=2000, metavar="N", help="validation images")
    return main


def _add_source(command):
    command.add_argument(
        "src",
        help="folder of class folders, a tar of one (.tar, .tar.gz, .tar.bz2, .tar.xz), ILSVRC2012_img_train.tar, "
        "ILSVRC2012_img_val.tar (with --labels), or a folder of parquet files (with --format parquet)",
    )
    command.add_argument("--format", choices=["auto", "parquet"], default="auto", help="kind of the source")
    command.add_argument(
        "--labels",
        metavar="FILE",
        help="classes of a tar without folders: ImageNet's devkit, or a text of WNIDs",
    )
    command.add_argument(
        "--md5",
        default="auto",
        metavar="HEX",
        help="of the source; auto = ImageNet's own, for its size; none",
    )
    command.add_argument("--split", metavar="NAME", help="take only this split, straight into DST")
    command.add_argument(
        "--skip-empty-classes", action="store_true", help="leave out class folders without images"
    )


def _source_options(options):
    split = options.split if options.format == "parquet" else None
    return {"kind": options.format, "labels": options.labels, "md5": options.md5, "split": split}


def parse(arguments):
    """The parsed command line. UserError with the nearest flag for an unknown one."""
    # "--samples_per_shard" and "--samples-per-shard" both work.
    flags = [a.split("=", 1) if a.startswith("--") else [a] for a in arguments]
    arguments = ["=".join([f[0].replace("_", "-"), *f[1:]]) if f[0].startswith("--") else f[0] for f in flags]
    commands = parser()
    options, unknown = commands.parse_known_args(arguments)
    if unknown:
        known = [
            "--" + name.replace("_", "-") for name in vars(options) if name not in ("command", "src", "dst")
        ]
        hint = did_you_mean(unknown[0].split("=")[0], known)
        raise UserError(f"unknown argument {unknown[0]!r}{hint}: {options.command} knows {', '.join(known)}")
    return options


def parse_part(text):
    """``I/N`` -> (I, N), or None where it is not given."""
    if text is None:
        return None
    numbers = text.split("/")
    if (
        len(numbers) != 2
        or not all(n.isdigit() for n in numbers)
        or not 1 <= int(numbers[0]) <= int(numbers[1])
    ):
        raise UserError(
            f"--part {text} is not I/N with I from 1 to N: give 1/4, 2/4, 3/4 and 4/4 to four processes"
        )
    return int(numbers[0]), int(numbers[1])


def run_build(options):
    start = time.monotonic()
    results = build(
        options.src,
        options.dst,
        samples_per_shard=options.samples_per_shard,
        seed=options.seed,
        workers=options.workers,
        split=None if options.format == "parquet" else options.split,
        skip_empty_classes=options.skip_empty_classes,
        short_side=options.short_side,
        source_options=_source_options(options),
        dry_run=options.dry_run,
        part=parse_part(options.part),
    )
    if options.dry_run:
        _say(
            *(
                f"{path}: would write {images:,} images in {shards:,} shards, about {num_bytes / 1e6:,.1f} MB"
                + (f" before images are made {options.short_side} pixels small" if options.short_side else "")
                for path, images, shards, num_bytes in results
            )
        )
        return
    finished = [(path, manifest) for path, manifest, _ in results if manifest]
    print_summary(finished, time.monotonic() - start)
    _say(
        *(
            f"{path}: part {options.part} is finished, others are not"
            for path, manifest, _ in results
            if not manifest
        )
    )
    _say(*(f"{path} was finished already, by the same build" for path, _, was_there in results if was_there))


def run_verify(options):
    results = verify(options.dst, options.full, options.workers, options.expect)
    for path, manifest in results:
        if options.full:
            _say(*histogram(manifest))
        checked = "every byte and image checked" if options.full else "sizes, indexes and counts checked"
        _say(f"{path}: fine, {manifest.num_samples:,} samples in {len(manifest.shards):,} shards ({checked})")


def run_repair(options):
    from data_prep.repair import repair

    manifest, mended = repair(
        options.src,
        options.dst,
        options.workers,
        _source_options(options),
        options.skip_empty_classes,
        None if options.format == "parquet" else options.split,
    )
    _say(
        f"{options.dst}: {len(mended)} of {len(manifest.shards):,} shards built again: {', '.join(mended) or 'none'}"
    )


def run_index(options):
    from data_prep.index import index

    place, manifest = index(options.src, options.to)
    labelled = sum(manifest.class_counts)
    _say(
        f"{place}: {manifest.num_samples:,} samples ({labelled:,} with a label) in {len(manifest.shards):,} shards, "
        f"{manifest.num_bytes / 1e6:,.1f} MB; give it as data.shards"
    )


def run_demo(options):
    from data_prep.demo import build_demo  # not above: it needs torch, the other commands answer at once

    if min(options.train, options.val) < 10:
        raise UserError(
            f"--train {options.train} and --val {options.val} must be at least 10, one image per class"
        )
    start = time.monotonic()
    paths = build_demo(options.dst, options.train, options.val, workers=None)
    print_summary([(path, LocalStore(path).manifest) for path in paths], time.monotonic() - start)


def _say(*lines):
    console = Console(markup=False, highlight=False)
    for line in lines:
        console.print(printable(line), soft_wrap=True)


@exit_on_user_error
def main(arguments=None):
    """Run a command; exit code 0, or 2 with one line on stderr."""
    options = parse(sys.argv[1:] if arguments is None else arguments)
    try:
        {
            "build": run_build,
            "verify": run_verify,
            "repair": run_repair,
            "index": run_index,
            "demo": run_demo,
        }[options.command](options)
    except KeyboardInterrupt:
        print("interrupted: finished shards are kept, the same command continues", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # the reader of our output is gone, as with `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    main()
