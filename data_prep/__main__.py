"""The command line: ``python -m data_prep {build,verify,demo}``, also installed as ``caco-shards``."""

import argparse
import difflib
import os
import sys
import time

from rich.console import Console

from caco_scale.data.store import LocalStore
from caco_scale.errors import UserError, exit_on_user_error
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
    commands = main.add_subparsers(dest="command", required=True, metavar="{build,verify,demo}")
    defaults = {"allow_abbrev": False, "formatter_class": argparse.ArgumentDefaultsHelpFormatter}

    make = commands.add_parser(
        "build", help="build a shard set from a folder of class folders or a tar", **defaults
    )
    make.add_argument(
        "src", help="folder of class folders, or a tar of one (.tar, .tar.gz, .tar.bz2, .tar.xz)"
    )
    make.add_argument("dst", help="directory of the shard set; splits (train, val, test) get one each in it")
    make.add_argument("--samples-per-shard", type=int, default=1000, metavar="N", help="images per shard")
    make.add_argument("--seed", type=int, default=0, help="seed of the order in which images fill the shards")
    make.add_argument("--workers", type=int, metavar="N", help="processes; one per CPU if not given")
    make.add_argument("--split", metavar="NAME", help="build only this split, straight into DST")
    make.add_argument(
        "--skip-empty-classes", action="store_true", help="leave out class folders without images"
    )

    check = commands.add_parser("verify", help="check a shard set against its manifest", **defaults)
    check.add_argument("dst", help="directory of a shard set, or of sets named by split")
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
        near = difflib.get_close_matches(unknown[0].split("=")[0], known, 1, cutoff=0.5)
        hint = f"did you mean {near[0]}?" if near else f"{options.command} knows {', '.join(known)}"
        raise UserError(f"unknown argument {unknown[0]!r}: {hint}")
    return options


def run_build(options):
    start = time.monotonic()
    results = build(
        options.src,
        options.dst,
        samples_per_shard=options.samples_per_shard,
        seed=options.seed,
        workers=options.workers,
        split=options.split,
        skip_empty_classes=options.skip_empty_classes,
    )
    print_summary([(path, manifest) for path, manifest, _ in results], time.monotonic() - start)
    _say(*(f"{path} was finished already, by the same build" for path, _, was_there in results if was_there))


def run_verify(options):
    results = verify(options.dst, options.full, options.workers)
    for path, manifest in results:
        if options.full:
            _say(*histogram(manifest))
        checked = "every byte and image checked" if options.full else "sizes, indexes and counts checked"
        _say(f"{path}: fine, {manifest.num_samples:,} samples in {len(manifest.shards):,} shards ({checked})")


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
        {"build": run_build, "verify": run_verify, "demo": run_demo}[options.command](options)
    except KeyboardInterrupt:
        print("interrupted: finished shards are kept, the same command continues", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # the reader of our output is gone, as with `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    main()
