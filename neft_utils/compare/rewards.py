"""Two arms' answers as a reward model sees them, beside what length alone would have done.

`evaluate.reward` gave every answer a number, a logit. Its unit is the model's own, so only
differences between answers to the same prompts say something, and these little by themselves: a
reward model likes length, as judges do. So the difference never stands without how often the longer
of two answers has the higher reward, and without the pairs whose answers are about equally long.
Nobody preferred anything here, so no share below is a share of prompts that somebody decided.
"""

import math

import numpy as np
import pandas as pd

from neft_utils.compare import stats
from neft_utils.compare.length_pairs import within
from neft_utils.compare.metrics import REWARDED
from neft_utils.compare.tables import two_way

MATCHED = 0.1  # word counts of a matched pair differ by at most this share of the control's
VIEWS = {  # name: (unit, what it is)
    "difference": ("logits", "reward with noise minus without"),
    "treatment_higher": ("share", "the answer with noise has the higher reward, equal ones half"),
    "longer_higher": ("share", "the longer answer has the higher reward"),
    "difference_matched": ("logits", "difference where word counts are within 10 %"),
    "reference": ("logits", "reward of the reference answers minus those without noise"),
}
COLUMNS = ["set", "view", "what", "unit", "estimate", "ci_low", "ci_high", "n_seeds", "n_pairs"]


def beside_length(runs, pair):
    """DataFrame of COLUMNS, a row a set of prompts and one of VIEWS; empty without rewards.

    runs: from `runs.load_runs`; pair: a `tables.Contrast` of one control. Intervals are the two-way
    ones over seeds and prompts; of `longer_higher` and `difference_matched`, where other prompts
    are left in every seed, t over the seeds' means, which speaks of these prompts alone. n_pairs:
    answers to the same prompt in the same seed that the row is of, ties and unequal lengths being
    left out where a row is not of them. NaN where none is left, and ends where one seed is.
    """
    rows = []
    for one in REWARDED.values():
        pairs = pairs_of(runs, pair, one)
        if len(pairs):
            rows += [(one, *row) for row in _views(pairs)]
    return pd.DataFrame(rows, columns=COLUMNS)


def pairs_of(runs, pair, name):
    """Answers of both arms to the same prompt in the same seed, a row each that both have.

    name: a set of rewards.csv. Columns seed, example_id, and of both arms reward_ and n_words_
    with control or treatment behind, and reference_reward (logits; rows without one are left out).
    """
    frames = []
    seeds = set.intersection(*({s for a, s in runs if a == arm} for arm in pair.arms))
    for seed in sorted(seeds):
        sides = [runs[arm, seed]["rewards"] for arm in reversed(pair.arms)]
        if any(side.empty for side in sides):
            continue
        sides = [side[side["set"] == name].drop(columns="set") for side in sides]
        sides[1] = sides[1][["example_id", "reward", "n_words"]]
        both = sides[0].merge(sides[1], on="example_id", suffixes=("_control", "_treatment"))
        frames.append(both.assign(seed=seed))
    columns = ["seed", "example_id", "reward_control", "reward_treatment"]
    columns += ["n_words_control", "n_words_treatment", "reference_reward"]
    if not frames:
        return pd.DataFrame(columns=columns)
    table = pd.concat(frames, ignore_index=True)[columns]
    return table.dropna(subset=["reward_control", "reward_treatment"], ignore_index=True)


def _views(pairs):
    """Rows of `beside_length`, without the set."""
    higher = pairs.reward_treatment - pairs.reward_control
    longer = np.sign(pairs.n_words_treatment - pairs.n_words_control)
    decided = (higher != 0) & (longer != 0)
    alike = within(pairs, MATCHED, "n_words")
    found = {
        "difference": _over_both(pairs, higher),
        "treatment_higher": _over_both(pairs, (np.sign(higher) + 1) / 2),
        "longer_higher": _over_seeds(pairs[decided], np.sign(higher) == longer),
        "difference_matched": _over_seeds(pairs[alike], higher),
        "reference": _over_both(pairs, pairs.reference_reward - pairs.reward_control),
    }
    for name, (one, count) in found.items():
        unit, what = VIEWS[name]
        numbers = [math.nan] * 3 if one is None else [one.estimate, one.ci_low, one.ci_high]
        if unit == "share":  # what it is a share of has no less than 0 and no more than 1
            numbers = np.clip(numbers, 0, 1).tolist()
        yield (name, what, unit, *numbers, one.n_seeds if one else 0, count)


def _over_both(pairs, values):
    """(Two-way `stats.Interval`, pairs that it is of) of the values of all pairs; (None, 0)."""
    deltas = pairs[["seed", "example_id"]].assign(delta=values.astype(float)).dropna()
    one = two_way(deltas) if len(deltas) else None
    return one, one.n_seeds * one.n_examples if one else 0


def _over_seeds(pairs, values):
    """(t `stats.Interval` over the seeds' means, number of pairs) of some pairs; (None, 0)."""
    means = values[pairs.index].astype(float).groupby(pairs.seed).mean()
    return stats.seed_interval(means.to_numpy()) if len(means) else None, len(pairs)
