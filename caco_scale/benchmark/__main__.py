"""Measure against straightforward peers, in one run: a table, the machine, one JSON object on the last line.

    python -m caco_scale.benchmark {bank,step,scale,loader} [--save DIR]

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

    step = commands.add_parser(
        "step",
        help="the training step of a recipe against the same in fp32, eager, with a dense bank",
        epilog="further flags are the recipe's: --data.global_batch_size 64 --precision.compute bf16",
    )
    step.add_argument("recipe", nargs="?", default="demo", help="name or YAML file (default demo)")
    _numbers(
        step,
        steps=(4, "steps in a round"),
        rounds=(3, "times that each is measured, in turn"),
        threads=(cores, "threads of each contender"),
    )

    scale = commands.add_parser(
        "scale", help="bytes that the bank sends as rows and ranks grow (gloo), and a run on paper"
    )
    _numbers(
        scale,
        samples=(240, "samples of the global batch, each in two views"),
        dim=(128, "size of an embedding"),
        ranks=(4, "most ranks"),
        rounds=(2, "times that each step is timed; the least counts"),
    )
    scale.add_argument(
        "--gpu-images-per-second",
        type=float,
        default=2500.0,
        metavar="X",
        help="for the run on paper: what one of your GPUs trains of a supervised ResNet-50 (2,500 is an assumption)",
    )
    scale.add_argument(
        "--sizes", type=int, nargs="+", default=[4096, 16384, 65536], metavar="N", help="bank rows"
    )

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


def _step(options):
    import torch

    from caco_scale.benchmark.step import measure
    from caco_scale.config import parse
    from caco_scale.training.assemble import check_temperatures, resolve_precision

    config = parse([options.recipe, *options.flags], prog="python -m caco_scale.benchmark step")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = resolve_precision(config, device)
    check_temperatures(config)
    title = "one training step, augmentation included"
    return title, measure(config, options.steps, options.rounds, options.threads, device.type)


def _scale(options):
    from caco_scale.benchmark.paper import Inputs, work_out
    from caco_scale.benchmark.scale import measure

    title = "what a rank sends for the bank in one step"
    result, notes = measure(options.samples, options.sizes, options.dim, options.ranks, options.rounds)
    inputs = Inputs(supervised_images_per_second=options.gpu_images_per_second)
    result |= {"paper_inputs": vars(inputs), "paper": work_out(inputs)}
    return title, (result, notes)


def _loader(options):
    from caco_scale.benchmark.loader import measure

    title = "two views per image, one process"
    return title, measure(options.images, options.rounds, options.batch, options.size)


COMMANDS = {"bank": _bank, "step": _step, "scale": _scale, "loader": _loader}


@exit_on_user_error
def main(arguments=None):
    parser = _parser()
    options, options.flags = parser.parse_known_args(arguments)
    if options.flags and options.command != "step":
        raise UserError(f"unknown argument {options.flags[0]}; see {parser.prog} {options.command} --help")
    for name, value in vars(options).items():
        if isinstance(value, int) and value < 1:
            raise UserError(f"--{name} is {value}: give at least 1")
    machine = describe_machine()
    title, (result, notes) = COMMANDS[options.command](options)
    show(title, result["rows"], machine, notes)
    if "paper" in result:
        show("ResNet-50, 800 epochs, batch 4,096, 32 GPUs, on paper: nothing of it was run", result["paper"])
    publish(options.command, machine, result, options.save)


if __name__ == "__main__":
    main()
