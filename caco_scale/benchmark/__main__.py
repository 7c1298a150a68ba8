"""Measure against straightforward peers, in one run: a table, the machine, one JSON object on the last line.

    python -m caco_scale.benchmark {bank,loader} [--save DIR]

Every figure that matters is a ratio, so that it can be repeated on any machine.
"""

import os

from caco_scale.benchmark.report import describe_machine, publish, show
from caco_scale.errors import Parser, UserError, exit_on_user_error


def _numbers(command, **defaults):
    """Options of whole numbers from 1 up: name -> (default, what it is)."""
    for name, (default, words) in defaults.items():
        command.add_argument(
            f"--{name}", type=int, default=default, metavar="N", help=f"{words} (default {default:,})"
        )


def _parser():
    parser = Parser(prog="python -m caco_scale.benchmark", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    cores = len(os.sched_getaffinity(0))

    bank = commands.add_parser("bank", help="a step of the sharded bank against dense banks")
    _numbers(
        bank,
        samples=(2048, "samples, each in two views"),
        size=(65536, "bank rows"),
        dim=(256, "size of an embedding"),
        rounds=(3, "times that each is measured, in turn"),
        threads=(cores, "threads of each contender"),
    )
    bank.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="where it runs (default cpu)")

    loader = commands.add_parser(
        "loader", help="two views of JPEGs against torchvision's ImageFolder and PIL"
    )
    loader.add_argument(
        "--images", metavar="DIR", help="folder of class folders; drawn (240 JPEGs) if not given"
    )
    _numbers(
        loader,
        rounds=(3, "times that each is measured, in turn"),
        batch=(60, "images per batch"),
        size=(224, "side of a view in pixels"),
    )
    for command in commands.choices.values():
        command.add_argument("--save", metavar="DIR", help="write the JSON there, too, under a dated name")
    return parser


def _bank(options):
    from caco_scale.benchmark.bank import measure

    title = "one step of the bank: loss, gradients, update"
    return title, measure(
        options.samples, options.size, options.dim, options.rounds, options.threads, options.device
    )


def _loader(options):
    from caco_scale.benchmark.loader import measure

    title = "two views per image, one process"
    return title, measure(options.images, options.rounds, options.batch, options.size)


COMMANDS = {"bank": _bank, "loader": _loader}


@exit_on_user_error
def main(arguments=None):
    options = _parser().parse_args(arguments)
    for name, value in vars(options).items():
        if isinstance(value, int) and value < 1:
            raise UserError(f"--{name} is {value}: give at least 1")
    machine = describe_machine()
    title, (result, notes) = COMMANDS[options.command](options)
    show(title, result["rows"], machine, notes)
    publish(options.command, machine, result, options.save)


if __name__ == "__main__":
    main()
