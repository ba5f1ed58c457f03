"""`python -m neft_utils.compare`: did a change make a model better, or later to stop?"""

import argparse
import sys

DESCRIPTION = """\
Did a change make a model better, or later to stop? Compares two fine-tunes on rows that neither
was trained on: willingness to stop, content, loss, and with --answers the length of answers.
A model is a folder, or a hub id with its commit (owner/name@COMMIT), of whole weights or of a
PEFT adapter. Intervals are over rows; several pairs (--pair) give intervals over seeds as well."""
EXAMPLE = """\
example, three pairs of trainings:
  python -m neft_utils.compare plain-0 noisy-0 --pair plain-1 noisy-1 --pair plain-2 noisy-2 \\
      --rows held_out.json --answers 48 --out comparison"""


def main(argv=None):
    """Run the command; returns its exit status. Bad input is one line on stderr and status 1."""
    for stream in (sys.stdout, sys.stderr):  # of a terminal that may lack some of our letters
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    given = _parser().parse_args(argv)
    pairs = [(given.control, given.treatment), *given.pair]
    from transformers.utils import logging  # here: torch comes with these, in seconds

    from neft_utils.compare.two_models import compare_models

    logging.disable_progress_bar()

    try:
        found = compare_models(
            *map(list, zip(*pairs, strict=True)),
            given.rows,
            base=given.base,
            nf4=given.nf4,
            answers=given.answers,
            max_new_tokens=given.max_new_tokens,
        )
        if given.out:
            found.write(given.out)
    except (ValueError, RuntimeError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    print(found)
    if given.out:
        print(f"Tables and the figure are in {given.out}.")
    return 0


def _parser():
    parser = argparse.ArgumentParser(
        prog="python -m neft_utils.compare",
        description=DESCRIPTION,
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("control", metavar="CONTROL", help="the model without the change")
    parser.add_argument("treatment", metavar="TREATMENT", help="the model with it, else alike")
    parser.add_argument(
        "--pair",
        nargs=2,
        action="append",
        default=[],
        metavar=("CONTROL", "TREATMENT"),
        help="one more pair, of another seed; may be repeated",
    )
    parser.add_argument(
        "--rows", required=True, help="rows with prompt and response: .json, .jsonl, .csv, .parquet"
    )
    parser.add_argument("--base", help="base of the adapters, if not where they name it")
    parser.add_argument(
        "--nf4", action="store_true", help="round the adapters' base to 4 bits, as QLoRA does"
    )
    parser.add_argument(
        "--answers", type=_count, default=0, metavar="N", help="answer the first N prompts, too"
    )
    parser.add_argument(
        "--max-new-tokens", type=_count, default=256, metavar="N", help="cut answers here (256)"
    )
    parser.add_argument("--out", metavar="FOLDER", help="write tables and the figure here")
    return parser


def _count(text):
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 0")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
