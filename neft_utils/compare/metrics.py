"""Every metric: its unit, its words, and how it is read item by item from a run's files."""

import numpy as np
import pandas as pd

from neft_utils.base.profiles import LEADERBOARD
from neft_utils.compare import curves
from neft_utils.compare.end_of_turn import content_nll
from neft_utils.compare.words import LOG_RATIO, Quantity

# Metric -> (unit, what it is). The order is the order of the tables' columns.
METRICS = {
    "answer_length": (LOG_RATIO, "log of the answers' tokens, repetition penalty as the profile"),
    "answer_length_plain": (LOG_RATIO, "the same without repetition penalty"),
    "end_nll": ("nats", "-log P(end of turn) where the reference ends, test rows, noise off"),
    "content_nll": ("nats/token", "NLL of test responses without their end, by tokens"),
    "test_nll": ("nats/token", "NLL of test responses, by tokens as in training, noise off"),
    "test_nll_by_row": ("nats/token", "the same, mean of the rows' means"),
    "ood_nll": ("nats/token", "NLL of MT-Bench reference answers, by tokens"),
    "train_nll": ("nats/token", "NLL of the run's own training responses, by tokens, noise off"),
    "gap": ("nats/token", "test_nll minus train_nll"),
    "best_validation_nll": ("nats/token", "lowest validation NLL over epochs (exploratory)"),
    "best_content_nll": ("nats/token", "content NLL of validation rows at each run's best epoch"),
    "equal_fit_content_nll": ("nats/token", "the same, control stopped at equal training loss"),
    "answer_tokens": ("tokens", "length of the answers, arithmetic mean"),
    "stop_rate": ("share", "answers that ended by themselves"),
    "p_end": ("share", "probability of the end of turn where the reference answer ends"),
    "two_gram_repetition": ("%", "repeated word pairs, paper's chunk rule"),
    "log_diversity": ("nats", "diversity of 2- to 4-grams, paper's variant"),
    "rouge_l": ("share", "ROUGE-L to the reference answers"),
    "train_rouge_l": ("share", "ROUGE-L of answers to training prompts to the training answers"),
    "train_bleu": ("share", "BLEU of the same"),
    "verifiable_length_up": ("share", "verifiable instructions that ask for more, fulfilled"),
    "verifiable_length_down": ("share", "verifiable instructions that ask for less, fulfilled"),
    "verifiable_neutral": ("share", "verifiable instructions about form, fulfilled"),
    "openbookqa": ("share", "OpenBookQA, length-normalised accuracy"),
    "siqa": ("share", "SIQA, length-normalised accuracy"),
    "knowledge": ("nats/token", "right option over the best wrong one, OpenBookQA and SIQA"),
    "knowledge_accuracy": ("share", "right option the most probable one, of the same"),
    "arithmetic": ("nats", "right number over the best wrong one, ASDiv"),
    "arithmetic_accuracy": ("share", "right number the most probable one, of the same"),
    "weight_rise": ("nats/token", "rise of test NLL under relative weight perturbation"),
    "typo_rise": ("nats/token", "rise of test NLL under typos in the prompt"),
    **{name: ("share", f"{name}, as the Open LLM Leaderboard scores it") for name in LEADERBOARD},
    "preference": ("points", "judged better than the reference answer, per cent"),
    "alpaca_eval": ("points", "AlpacaEval: judged better than text_davinci_003, per cent"),
    "reward": ("logits", "what the profile's reward model gives the answers"),
    "alpaca_eval_reward": ("logits", "the same of the answers to AlpacaEval's prompts"),
    "train_seconds": ("s", "time of the optimiser steps"),
    "answer_seconds": ("s", "time to answer the test prompts"),
}
# How a sentence speaks of a metric, where "the metric is higher" would not do.
_LOSS = {"higher": "higher", "lower": "lower", "better": -1}
_WORDS = {
    "answer_length": {"subject": "answers are", "higher": "longer", "lower": "shorter"},
    "answer_length_plain": {
        "subject": "answers without repetition penalty are",
        "higher": "longer",
        "lower": "shorter",
    },
    "end_nll": {
        "subject": "the end of turn is",
        "higher": "less likely",
        "lower": "more likely",
    },
    "content_nll": {"subject": "the loss on what answers say is", **_LOSS},
    "test_nll": {"subject": "the held-out loss is", **_LOSS},
    "test_nll_by_row": {"subject": "the held-out loss, each row alike, is", **_LOSS},
    "ood_nll": {"subject": "the loss on MT-Bench answers is", **_LOSS},
    "train_nll": {"subject": "the training loss is", "higher": "higher", "lower": "lower"},
    "gap": {
        "subject": "the gap between test and training loss is",
        "higher": "wider",
        "lower": "narrower",
    },
    "best_validation_nll": {"subject": "the lowest validation loss is", **_LOSS},
    "best_content_nll": {"subject": "at each run's best epoch, the loss on content is", **_LOSS},
    "equal_fit_content_nll": {
        "subject": "at equal training loss, the loss on held-out content is",
        **_LOSS,
    },
    "weight_rise": {"subject": "the harm of perturbed weights is", **_LOSS},
    "typo_rise": {"subject": "the harm of typos is", **_LOSS},
    "arithmetic": {"subject": "arithmetic is", "higher": "better", "lower": "worse", "better": 1},
    "knowledge": {"subject": "knowledge is", "higher": "better", "lower": "worse", "better": 1},
    "preference": {
        "subject": "the judge's preference is",
        "higher": "higher",
        "lower": "lower",
        "better": 1,
    },
    # Neither way is better by itself: a reward model likes length, see compare.rewards.
    "reward": {"subject": "the reward model's score is", "higher": "higher", "lower": "lower"},
    "alpaca_eval_reward": {
        "subject": "the reward model's score of answers to AlpacaEval's prompts is",
        "higher": "higher",
        "lower": "lower",
    },
}
# What fine-tuning gained is told where the untrained model has the same quantity.
GAINS = ("end_nll", "content_nll", "test_nll", "test_nll_by_row", "ood_nll")


def quantity(name):
    """The `words.Quantity` of a metric."""
    unit, what = METRICS[name]
    return Quantity(unit, **_WORDS.get(name, {"subject": f"{what}:"}))


# Per-item metrics: (file, the rows that count, the item's name, its value). Items are common to
# all arms of a seed, so that arms are compared item by item.
_PENALISED = "decoding == @decoding and set == 'test'"
_PLAIN = "decoding == 'greedy' and set == 'test'"
_TEST = ("losses", "split == 'test'", "example_id")
REWARDED = {"reward": "test", "alpaca_eval_reward": "alpaca_eval"}  # the sets of rewards.csv
ITEMS = {
    "answer_length": ("generations", _PENALISED, "example_id", "n_tokens"),
    "answer_length_plain": ("generations", _PLAIN, "example_id", "n_tokens"),
    "end_nll": (*_TEST, "end_nll"),
    "content_nll": (*_TEST, "nll"),
    "test_nll": (*_TEST, "nll"),
    "test_nll_by_row": (*_TEST, "nll"),
    "ood_nll": ("losses", "split == 'ood'", "example_id", "nll"),
    "train_nll": ("losses", "split == 'train'", "example_id", "nll"),
    "gap": (*_TEST, "nll"),
    "answer_tokens": ("generations", _PENALISED, "example_id", "n_tokens"),
    "stop_rate": ("generations", _PENALISED, "example_id", "stopped"),
    "p_end": ("stopping", "p_end == p_end", "example_id", "p_end"),
    **{
        f"verifiable_{family}": (
            "task_items",
            f"task == 'verifiable_{family}'",
            "item_id",
            "correct",
        )
        for family in ("length_up", "length_down", "neutral")
    },
    "openbookqa": ("task_items", "task == 'openbookqa'", "item_id", "correct_norm"),
    "siqa": ("task_items", "task == 'siqa'", "item_id", "correct_norm"),
    **{
        name: ("task_items", f"task in {tasks}", "item_id", "margin")
        for front, tasks in (("knowledge", ("openbookqa", "siqa")), ("arithmetic", ("asdiv",)))
        for name in (front, f"{front}_accuracy")
    },
    **{name: ("task_items", f"task == '{name}'", "item_id", "correct") for name in LEADERBOARD},
    **{
        name: ("preferences", f"set == '{one}'", "example_id", "preference")
        for name, one in (("preference", "test"), ("alpaca_eval", "alpaca_eval"))
    },
    **{
        name: ("rewards", f"set == '{one}'", "example_id", "reward")
        for name, one in REWARDED.items()
    },
}
JUDGED = ("preference", "alpaca_eval")
MAY_LACK = (*JUDGED, *REWARDED)  # an answer without a value drops its pair and nothing else
RISES = {"weight_rise": "weights", "typo_rise": "prompt"}  # kinds of perturbed_losses.csv
# A loss per token is a mean over tokens, as the training loss is: a row weighs as it has tokens.
BY_TOKENS = ("content_nll", "test_nll", "ood_nll", "train_nll", "gap")
OWN_ROWS = ("train_nll",)  # each seed has its own: no two-way interval


def per_item(run, name, decoding):
    """A metric of one run item by item: DataFrame by item name, columns value and weight.

    None where the run has none, which for `end_nll` and `content_nll` includes a losses.csv of an
    older version, without that column. An answer's n_tokens counts its end of turn, so that an
    empty one has 1 and a log ratio is always finite. A response that is its end alone has no
    content. The gap is that of a test row to the run's training loss: rows of training are each
    seed's own, so that their spread is part of the spread between seeds.
    """
    if name in RISES:
        values = _rise(run["perturbed_losses"], RISES[name])
        return None if values is None else _equally(values)
    if name == "best_content_nll":
        return _at_best_epoch(run)
    if name not in ITEMS or run[ITEMS[name][0]].empty:
        return None
    table, rows, item, column = ITEMS[name]
    found = run[table].query(rows, local_dict={"decoding": decoding})
    if found.empty or column not in found or name == "content_nll" and "end_nll" not in found:
        return None
    if table == "task_items":  # several tasks may number their items alike
        found = found.assign(item_id=found.task + "/" + found.item_id)
    found = found.set_index(item)
    values = found[column].astype(float).dropna()
    if name.endswith("_accuracy"):
        values = (values > 0).astype(float)
    if name in JUDGED:
        values = values * 100
    if name.startswith("answer_length"):
        values = np.log(values.clip(lower=1))
    if name not in BY_TOKENS:
        return _equally(values)
    tokens = found.n_tokens.astype(float)
    if name == "content_nll":
        values, tokens = content_nll(found), tokens - 1
    if name == "gap":
        training = per_item(run, "train_nll", decoding)
        if training is None:
            return None
        values = values - mean(training)
    return pd.DataFrame({"value": values, "weight": tokens}).dropna()


def mean(items):
    """The weighted mean of what `per_item` returns."""
    return float(np.average(items.value, weights=items.weight))


def _at_best_epoch(run):
    """Content of every validation row at the run's best epoch, None without losses by epoch."""
    curve = curves.curve_of(run)
    if curve is None or curves.VALIDATION not in set(curve.split):
        return None
    rows = curves.rows_at(curve, curves.VALIDATION, curves.best_epoch(curve))
    return pd.DataFrame({"value": rows.content_nll, "weight": rows.tokens}).dropna()


def _equally(values):
    return pd.DataFrame({"value": values, "weight": 1.0}).dropna()


def _rise(perturbed, kind):
    """NLL under the perturbation, mean over its levels, minus NLL without; by example."""
    if perturbed.empty:
        return None
    means = perturbed.groupby(["kind", "example_id"]).nll.mean()
    return means[kind] - means["none"]
