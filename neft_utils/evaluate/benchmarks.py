"""Benchmarks: by how much a model prefers the right answer of an item to the best wrong one.

The paper takes the tasks of the Open LLM Leaderboard to say that NEFTune leaves knowledge and
reasoning as they were. At our scale accuracy sees little of that, so every item has a margin, the
log-probability of its right answer minus that of the most probable wrong one (`candidates` in
`benchmark_items`), which is continuous and pairs over arms. A log-probability alone falls when a
model merely talks otherwise; in the difference such a change cancels.

Options are compared by their mean over tokens: they differ in length, and of a sum the length
decides (SmolLM2-135M would be right in 2 of 24 items of OpenBookQA, where chance is 6), so that a
model whose tokens all get less likely would seem to know less. Numbers are compared by the sum:
their lengths hardly differ, and the first digits decide.

Measured on that model, 24 items each: with the right answer in the prompt the mean margin rises by
3.1 (ASDiv), 4.8 (OpenBookQA) and 4.0 (SIQA). "A:" for "Answer:", a space behind the question and a
plea for friendliness move it by 0.16, 0.15 and 0.30 at most, the right answer's own log-probability
by 2.4, 1.3 and 1.9.

The question is put into the chat template, as notebook 3 trains: of text that begins in the middle
of nowhere a fine-tuned model forgets the format before it forgets the answer. The reply is begun
with LEAD in all cases, so that a preface ("The answer is", "Sure!") is not what is compared.
"""

import contextlib
import io
import logging
import math
import os
import re

import pandas as pd
import torch

from neft_utils.base.model_config import position_limit
from neft_utils.data import sources
from neft_utils.evaluate.benchmark_items import NUMBER, candidates, check_whole, items, question
from neft_utils.evaluate.branches import continuation_logprobs
from neft_utils.evaluate.generate import answer
from neft_utils.train.encoding import prompt_ids
from neft_utils.train.own_path import inner_model

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
COLUMNS = ["task", "item_id", "correct", "gold_logprob", "correct_norm", "margin"]
LEAD = "Answer:"
NEW_TOKENS = {"asdiv": 64, "gsm8k": 256}  # of a greedy answer; longer ones are cut


def score(model, tokenizer, names, limit=None, batch_size=16, *, generate=False, say=print):
    """DataFrame of COLUMNS: one row per item, in the order of `names` and of `items`.

    model: a transformers or PEFT causal LM; it is put in eval mode and stays there.

    margin: in nats per token for options and in nats for numbers, see above; correct: 1 or 0,
    whether it is above 0, the right answer being the most probable; correct_norm: the same with
    log-probabilities divided by the answers' characters. All NaN for an answer without wrong
    ones. gold_logprob: of the right answer, in nats, summed over its tokens; it moves with style
    alone. If `generate` (slow on a CPU), tasks asdiv
    and gsm8k are followed by <task>_answers: correct says whether the last number of a greedy
    answer is the right one. batch_size: of those answers.

    Raises ValueError for embeddings that are noisy even in eval mode, for an item that is too
    long for the model, and for what `items` refuses.
    """
    if isinstance(names, str) or not names or len(set(names)) < len(names):
        raise ValueError(f"names must be a list of different benchmarks, got {names!r}")
    check_whole("batch_size", batch_size)
    tasks = {name: items(name, limit) for name in names}
    _check_silent(model.eval())
    frames = []
    for name, rows in tasks.items():
        _say_all(name, limit, len(rows), say)
        found = [_scored(model, tokenizer, name, rows, say)]
        if generate and name in NEW_TOKENS:
            found.append(_answered(model, tokenizer, name, rows, batch_size, say))
        for frame in found:
            means = frame[["correct", "margin", "gold_logprob"]].mean().dropna()
            means = ", ".join(f"{column} {value:.3f}" for column, value in means.items())
            say(f"{frame.task[0]}: mean {means} over {len(rows)} items")
        frames += found
    return pd.concat(frames, ignore_index=True)


def _say_all(name, limit, count, say):
    if limit is not None and count < limit:
        say(f"{name}: {limit} items are asked for, the benchmark has {count}: all are scored")


def _scored(model, tokenizer, name, rows, say):
    """The frame of one benchmark."""
    asked = [encode_item(tokenizer, question(row), candidates(row)) for row in rows]
    limit = position_limit(inner_model(model).config.to_dict())
    for row, (prompt, some) in zip(rows, asked, strict=True):
        _check_length(name, row, len(prompt) + max(map(len, some)), limit)
    out = []
    scored = continuation_logprobs(model, asked, say)
    for row, (_, ids), found in zip(rows, asked, scored, strict=True):
        texts = candidates(row)
        values = [math.nan] * 3
        if len(texts) > 1:
            each = [value / len(text) for value, text in zip(found, texts, strict=True)]
            sizes = [len(one) if "choices" in row else 1 for one in ids]
            right, *wrong = (value / size for value, size in zip(found, sizes, strict=True))
            margin = right - max(wrong)
            values = [float(margin > 0), float(each[0] > max(each[1:])), round(margin, 4)]
        # Four digits: rounding in the forward is coarser, and the file stays small.
        correct, correct_norm, margin = values
        out.append((name, row["id"], correct, round(found[0], 4), correct_norm, margin))
    return pd.DataFrame(out, columns=COLUMNS)


def encode_item(tokenizer, asked, texts):
    """(ids of the prompt, [ids of each text as a reply]) for `branches.continuation_logprobs`.

    asked: what the user asks. The prompt ends with LEAD, or one token before if a tokenizer joins
    it with what follows.
    """
    whole = [tokenizer(f"{LEAD} {text}", add_special_tokens=False)["input_ids"] for text in texts]
    lead = tokenizer(LEAD, add_special_tokens=False)["input_ids"]
    shared = os.path.commonprefix([lead, *whole])
    return prompt_ids(tokenizer, asked) + shared, [one[len(shared) :] for one in whole]


def _answered(model, tokenizer, name, rows, batch_size, say):
    """The frame of greedy answers: the last number counts; 1,250 and 5.00 are 1250 and 5."""
    limit = position_limit(inner_model(model).config.to_dict())
    for row in rows:
        asked = len(prompt_ids(tokenizer, question(row)))
        _check_length(name, row, asked + NEW_TOKENS[name], limit)
    how = {"max_new_tokens": NEW_TOKENS[name], "batch_size": batch_size, "say": say}
    prompts = [question(row) for row in rows]
    answers = answer(model, tokenizer, prompts, repetition_penalty=1.0, **how)
    out = []
    for row, one in zip(rows, answers, strict=True):
        numbers = re.findall(NUMBER, one["text"].replace(",", ""))
        right = bool(numbers) and float(numbers[-1]) == float(row["answer"])
        out.append((f"{name}_answers", row["id"], float(right)))
    return pd.DataFrame(out, columns=COLUMNS[:3]).reindex(columns=COLUMNS)


def _check_length(name, row, tokens, limit):
    if limit is not None and tokens > limit:
        raise ValueError(
            f"{name} item {row['id']} takes {tokens} tokens and the model reads {limit}:"
            f" leave {name} out or use a model with a longer context"
        )


@torch.no_grad()
def _check_silent(model):
    embedding = model.get_input_embeddings()
    ids = torch.arange(8, device=embedding.weight.device)
    if not torch.equal(embedding(ids), embedding(ids)):
        raise ValueError(
            "the model's embeddings differ from call to call in eval mode: remove the hook that"
            " adds noise to them before scoring"
        )


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
            (name, f"{task}-{one['doc_id']}", float(one[measure]), _gold(one))
            for task, samples in found["samples"].items()
            for one in samples
        ]
        _say_all(name, limit, len(rows), say)
        frames.append(pd.DataFrame(rows, columns=["task", "item_id", "correct", "gold_logprob"]))
        say(f"{name}: {measure} {frames[-1].correct.mean():.3f} over {len(rows)} items")
    return pd.concat(frames, ignore_index=True).reindex(columns=COLUMNS)


def _gold(sample):
    """Log-probability of the right option of a multiple-choice sample, else NaN."""
    options, target = sample["filtered_resps"], sample["target"]
    listed = isinstance(target, int) and len(options) > 1 and isinstance(options[0], tuple | list)
    return float(options[target][0]) if listed else math.nan
