"""How good is a backbone? ``python -m caco_scale.evaluate {knn,linear,finetune} RUN_OR_WEIGHTS [--flags]``.

RUN_OR_WEIGHTS is a run directory, one of its checkpoints, or a file: an export of this program, or a checkpoint of
CaCo's authors, MoCo, DINO, torchvision or timm. --data and --val are shard sets or folders of class folders, so that
transfer to another data set is the same command. One label an image: multi-label sets (PASCAL VOC07) are out of scope.
Several processes: accelerate launch --config_file ds_configs/ddp.yaml --num_processes N -m caco_scale.evaluate ...
"""

import argparse
import importlib
import os
import sys

from caco_scale.errors import Parser, UserError, did_you_mean, exit_on_user_error, run_command


def parse(arguments):
    """Flags of the command line, checked as far as they can be without looking at anything else."""
    arguments = [_with_underscores(argument) for argument in arguments]
    flags, unknown = parser().parse_known_args(arguments)
    if unknown:
        known = [f"--{name}" for name in vars(flags)]
        meant = did_you_mean(unknown[0], known) if unknown[0].startswith("-") else ""
        raise UserError(
            f"unknown argument {unknown[0]}{meant}: evaluate {flags.command} --help lists them all"
        )
    check(flags)
    return flags


def _with_underscores(argument):
    """``--batch-size`` and ``--batch_size`` are the same flag."""
    name, equals, value = argument.partition("=")
    return (
        name.replace("-", "_").replace("__", "--", 1) + equals + value if name.startswith("--") else argument
    )


def parser():
    top = Parser(
        prog="python -m caco_scale.evaluate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    commands = top.add_subparsers(dest="command", required=True)
    knn = _command(commands, "knn", "weighted k-nearest-neighbour accuracy of features and embeddings, exact")
    knn.add_argument(
        "--k", type=int, nargs="+", metavar="N", help="neighbours that vote (default: 10 20 100 200)"
    )
    knn.add_argument(
        "--temperature",
        type=float,
        nargs="+",
        metavar="T",
        default=[0.07, 0.1, 0.2],
        help="of the votes' weights exp(similarity / T) (default: 0.07 0.1 0.2)",
    )
    linear = _command(
        commands, "linear", "a linear classifier on frozen features, as the paper trains it, or --fast"
    )
    linear.add_argument(
        "--fast",
        action="store_true",
        help="sweep many learning rates in one pass over the images",
    )
    linear.add_argument(
        "--lr",
        type=float,
        nargs="+",
        metavar="LR",
        help="per 256 images (default: 0.025, the authors' command; --fast: 0.001 to 30, the best on held-out images)",
    )
    _add_training(
        linear, epochs="100; --fast: 10, at least 2000 steps", batch_size="4096; --fast: at most 256"
    )
    finetune = _command(
        commands, "finetune", "encoder and classifier trained on a share of the labels (SimCLR's protocol)"
    )
    finetune.add_argument(
        "--fraction",
        type=float,
        default=1.0,
        metavar="SHARE",
        help="of the labels, class by class, at least one of each: 0.01, 0.1, 1.0 (default: 1.0)",
    )
    finetune.add_argument("--lr", type=float, metavar="LR", help="per 256 images (default: 0.05)")
    _add_training(finetune, epochs="60 for less than 5%% of the labels, else 30", batch_size="1024")
    return top


def _add_training(command, epochs, batch_size):
    command.add_argument("--epochs", type=int, metavar="N", help=f"(default: {epochs})")
    command.add_argument(
        "--batch_size",
        type=int,
        metavar="N",
        help=f"images per step over all processes (default: {batch_size})",
    )


def _command(commands, name, words):
    """A command with the flags that all have."""
    command = commands.add_parser(
        name,
        help=words,
        description=f"{words}. Multi-label data sets (VOC07) are out of scope.",
        allow_abbrev=False,
    )
    add = command.add_argument
    add("weights", metavar="RUN_OR_WEIGHTS", help="run directory, checkpoint directory, or file of weights")
    add(
        "--data",
        metavar="TRAIN",
        help="training images: shard set or image folder (default: those of the run)",
    )
    add(
        "--val",
        metavar="VAL",
        help="validation images (default: those of the run, or the val/ beside train/ in --data)",
    )
    add("--which", choices=("query", "key"), help="encoder (default: query; of DINO key, its teacher)")
    add("--step", type=int, metavar="N", help="checkpoint of the run (default: the newest)")
    add("--arch", help="architecture in a file of weights (default: found out)")
    add("--stem", choices=("imagenet", "cifar"), help="first layer in a file of weights (default: found out)")
    add("--size", type=int, metavar="PIXELS", help="side of the images (default: the run's, else 224)")
    for what in ("mean", "std"):
        add(
            f"--{what}",
            type=float,
            nargs=3,
            metavar=("R", "G", "B"),
            help=f"{what} of the colours (default: the run's)",
        )
    add(
        "--precision", choices=("fp32", "bf16", "fp64"), default="fp32", help="of the encoder (default: fp32)"
    )
    add(
        "--images_at_once",
        type=int,
        default=256,
        metavar="N",
        help="images per forward and process (default: 256)",
    )
    workers = min(4, len(os.sched_getaffinity(0)))
    add(
        "--workers",
        type=int,
        default=workers,
        metavar="N",
        help=f"loader processes per process (default: {workers})",
    )
    add("--cache_dir", default="auto", help="where whole shards of an object store are kept (default: auto)")
    add("--seed", type=int, default=0, metavar="N", help="of everything drawn at random (default: 0)")
    add(
        "--to", metavar="DIR", help="folder for progress and result (default: in the run, else runs/evaluate)"
    )
    add(
        "--world_size",
        type=int,
        default=0,
        metavar="N",
        help="processes that must be there (default: unchecked)",
    )
    add(
        "--timeout_seconds",
        type=float,
        default=1800,
        metavar="S",
        help="wait for another process, or for the loader (default: 1800)",
    )
    return command


MAY_BE_ZERO = ("workers", "seed", "world_size", "step", "mean")
MOST = {"size": 8192, "seed": 2**63 - 1, "workers": 1024, "images_at_once": 2**20, "batch_size": 2**24}
MOST |= {"epochs": 100_000, "lr": 1e6, "fraction": 1}


def check(flags):
    """Refuse numbers that no evaluation can have."""
    for name, value in vars(flags).items():
        for number in value if isinstance(value, list) else [value]:
            if isinstance(number, bool) or not isinstance(number, int | float):
                continue
            least = "a number from 0 up" if name in MAY_BE_ZERO else "a number above 0"
            if not (0 < number < float("inf") or (number == 0 and name in MAY_BE_ZERO)):
                raise UserError(f"--{name} is {number}: give {least}")
            if number > MOST.get(name, number):
                raise UserError(f"--{name} is {number}: give at most {MOST[name]}")


@exit_on_user_error
def main(arguments=None):
    """One evaluation; exit code 0 with ``result.json`` written, 2 on a user's mistake."""
    flags = parse(sys.argv[1:] if arguments is None else arguments)
    module = importlib.import_module(f"caco_scale.evaluate.run_{flags.command}")
    module.run(flags)


if __name__ == "__main__":
    run_command(main)
