"""The commands behind make that are for a card: its tests, its bench, a queue, parcels for it."""

from neft_utils.base.estimate import BENCH_GPU
from neft_utils.base.files import ROOT
from neft_utils.base.plain import say
from neft_utils.base.strict import ConfigError


def add(command):
    """Add the commands; command: function of name, what runs it and help that gives a parser."""
    sub = command("bench-gpu", bench_gpu, "a 7B-shaped QLoRA on one GPU, random weights")
    sub.add_argument("--minutes", type=float, default=None, help="begin no row that does not fit")
    sub = command("gpu-queue", gpu_queue, "do what fits into a card's time, and go on later")
    sub.add_argument("--minutes", required=True, help="how long the card is there")
    sub.add_argument("--pieces", default="", help="names of pieces, or profiles; default: all")
    command("gpu-tests", gpu_tests, "run the tests that need a card")
    sub = command("gpu-parcel", gpu_parcel, "pack what a machine without a network needs")
    sub.add_argument("--to", default="data/parcel", help="folder for the pieces")
    sub.add_argument("--mb", type=float, default=60, help="largest piece, in MB of 10⁶ bytes")
    sub.add_argument("--have", help="file with packages that are there, one a line (pip freeze)")
    sub.add_argument("--python", default="3.12", help="the Python there")
    sub.add_argument("--only", default="", help="some of model, gemma, data, packages")
    sub = command("gpu-unpack", gpu_unpack, "unpack parcels where the loaders look")
    sub.add_argument("--of", default="data/parcel", help="folder with the pieces")
    sub.add_argument("--site", default="data/site", help="folder for Python packages")


def bench_gpu(arguments):
    """Speed and memory at Llama-2-7B's shape on one GPU, to bench-gpu.json."""
    import torch

    if not torch.cuda.is_available():
        raise ConfigError("make bench-gpu needs a CUDA GPU: torch sees none")
    from neft_utils.make.bench.gpu import bench_gpu as measure
    from neft_utils.make.bench.gpu import format_table

    keep = ROOT / arguments.out / BENCH_GPU
    say(format_table(measure(keep=keep, minutes=arguments.minutes)))


def gpu_queue(arguments):
    """The next most valuable things that are missing, as far as a card's time goes."""
    from neft_utils.make.gpu_pieces import pieces_named
    from neft_utils.make.gpu_queue import run_queue

    return run_queue(pieces_named(arguments.pieces.split()), arguments.minutes, arguments.out)


def gpu_tests(arguments):
    """The tests that need a card; what came of them is a file."""
    from neft_utils.make.gpu_tests import gpu_tests as run

    return run(arguments.out)


def gpu_parcel(arguments):
    """Model, rows and packages in pieces, for a card on a machine without a network."""
    from neft_utils.make.parcel import pack

    for line in pack(
        arguments.to,
        arguments.mb,
        arguments.only.split(),
        have=arguments.have,
        python=arguments.python,
    ):
        say(line)


def gpu_unpack(arguments):
    """What of the pieces is there, put where the loaders look; 1 where some is missing."""
    from neft_utils.make.parcel import unpack

    lines, missing = unpack(arguments.of, arguments.site)
    for line in lines:
        say(line)
    return 1 if missing else 0
