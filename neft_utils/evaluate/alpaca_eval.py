"""AlpacaEval's 805 prompts with text_davinci_003's answers, and our answers in its file format.

The paper's win rates are the share of these prompts on which a judge prefers the model's answer
to text_davinci_003's (arXiv 2310.05914, section 4). Prompts and reference answers stand in the
authors' public submission, which is downloaded at one commit and by sha256. Its texts are
CC BY-NC 4.0: they stay in data/downloads.

`python -m neft_utils.evaluate.alpaca_eval RUN_DIR OUT_DIR` writes a run's answers as
model_outputs.json, which the package alpaca-eval annotates; `neft_utils.compare.published` compares
two annotated folders.
"""

import argparse
import hashlib
import sys
from pathlib import Path

import pandas as pd

from neft_utils.base import files
from neft_utils.base.files import write_json
from neft_utils.base.paths import PACKAGE
from neft_utils.base.wheels import pinned_file
from neft_utils.data import sources
from neft_utils.data.records import parse_json, read_text

FACTS = PACKAGE / "facts"
CONTROL, TREATMENT = "alpaca-7b", "alpaca-7b-neft"
COMMIT = "cd543a149df89434d8a54582c0151c0b945c3d20"
SOURCE = f"https://raw.githubusercontent.com/tatsu-lab/alpaca_eval/{COMMIT}"
SET = "alpaca_eval"  # how generations.jsonl calls the answers


def submission(model, cache=None, source=SOURCE):
    """Folder with model_outputs.json and annotations.json of a public model, verified just now.

    model: alpaca-7b or alpaca-7b-neft. cache: default data/downloads/alpaca_eval. A missing file
    is downloaded. Raises what `wheels.pinned_file` raises.
    """
    folder = Path(cache or files.ROOT / "data" / "downloads" / "alpaca_eval") / model
    listed = pd.read_csv(FACTS / "alpaca_eval_files.csv").query("model == @model")
    for file in listed.itertuples():
        pinned_file(f"{source}/{file.path}", file.sha256, folder / file.name)
    return folder


def prompt_id(instruction):
    """What results call a prompt, whose text they may not hold."""
    return hashlib.sha256(instruction.encode()).hexdigest()[:16]


def rows(limit=None, cache=None):
    """[{"id", "prompt", "response"}] of the first prompts; response is text_davinci_003's."""
    path = submission(CONTROL, cache) / "annotations.json"
    records = parse_json(read_text(path), path)[:limit]
    return [
        {
            "id": prompt_id(one["instruction"]),
            "prompt": one["instruction"],
            "response": one["output_1"],
        }
        for one in records
    ]


def export(run, out, cache=None):
    """Write <out>/model_outputs.json from a run's generations.jsonl; returns how many answers.

    Raises sources.DataError if the run was not asked these prompts (evaluate.alpaca_eval_prompts).
    """
    run, out = Path(run), Path(out)
    texts = {one["id"]: one["prompt"] for one in rows(cache=cache)}
    answers = [one for one in sources.read_jsonl(run / "generations.jsonl") if one["set"] == SET]
    if not answers:
        raise sources.DataError(
            f"{run} has no answers to AlpacaEval's prompts: set evaluate.alpaca_eval_prompts in the"
            " profile and run make reproduce"
        )
    outputs = [
        {"instruction": texts[one["example_id"]], "output": one["text"], "generator": run.name}
        for one in answers
    ]
    write_json(out / "model_outputs.json", outputs)
    return len(outputs)


def main(argv=None):
    """Export and say so; exit code 1 and one line for what cannot be."""
    parser = argparse.ArgumentParser(prog="python -m neft_utils.evaluate.alpaca_eval")
    parser.add_argument("run_dir", help="results/…/runs/<arm>-s<seed>")
    parser.add_argument("out_dir", help="folder for model_outputs.json")
    arguments = parser.parse_args(argv)
    try:
        count = export(arguments.run_dir, arguments.out_dir)
    except ValueError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    print(f"{count} answers in {arguments.out_dir}/model_outputs.json")
    return 0


if __name__ == "__main__":
    sys.exit(main())
