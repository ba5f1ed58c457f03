"""Every metric: its unit, and how it is read item by item from a run's files."""

from neft_utils.base.profiles import LEADERBOARD

# Metric -> (unit, what it is). The order is the order of the tables' columns.
METRICS = {
    "test_nll": ("nats/token", "response NLL on test rows, noise off"),
    "ood_nll": ("nats/token", "response NLL on MT-Bench reference answers"),
    "train_nll": ("nats/token", "response NLL on the run's own training rows, noise off"),
    "gap": ("nats/token", "test NLL minus train NLL"),
    "best_validation_nll": ("nats/token", "lowest validation NLL over epochs (exploratory)"),
    "answer_tokens": ("tokens", "length of greedy answers, repetition penalty 1.2"),
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
    "train_seconds": ("s", "time of the optimiser steps"),
    "answer_seconds": ("s", "time to answer the test prompts"),
}
# Per-item metrics: (file, the rows that count, the item's name, its value). Items are common to
# all arms of a seed, so that arms are compared item by item.
_PENALISED = "decoding == @decoding and set == 'test'"
ITEMS = {
    "test_nll": ("losses", "split == 'test'", "example_id", "nll"),
    "ood_nll": ("losses", "split == 'ood'", "example_id", "nll"),
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
}
JUDGED = ("preference", "alpaca_eval")
RISES = {"weight_rise": "weights", "typo_rise": "prompt"}  # kinds of perturbed_losses.csv


def per_item(run, name, decoding):
    """A metric of one run item by item, a Series by item name; None where it has none."""
    if name in RISES:
        return _rise(run["perturbed_losses"], RISES[name])
    if name not in ITEMS or run[ITEMS[name][0]].empty:
        return None
    table, rows, item, value = ITEMS[name]
    found = run[table].query(rows, local_dict={"decoding": decoding})
    if found.empty or value not in found:  # the file of an older version lacks the margin
        return None
    if table == "task_items":  # several tasks may number their items alike
        found = found.assign(item_id=found.task + "/" + found.item_id)
    values = found.set_index(item)[value].astype(float).dropna()
    if name.endswith("_accuracy"):
        values = (values > 0).astype(float)
    return values * 100 if name in JUDGED else values


def _rise(perturbed, kind):
    """NLL under the perturbation, mean over its levels, minus NLL without; by example."""
    if perturbed.empty:
        return None
    means = perturbed.groupby(["kind", "example_id"]).nll.mean()
    return means[kind] - means["none"]
