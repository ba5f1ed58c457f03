"""What a change does to stopping and to content, each by itself, over the length of the answer.

The last token of a reference answer is the end of turn: how probable a model finds it says how
willing it is to stop. The other tokens are what is said. A mean over all of them mixes the two,
and the shorter an answer is, the more the one end token weighs in it.
"""

import math

import numpy as np
import pandas as pd
from scipy.stats import t

from neft_utils.base.strict import ConfigError
from neft_utils.compare import stats

# Changes are treatment minus control: of P(end of turn), and of three losses in nats, the last two
# per token.
MEASURES = ["p_end", "end_nll", "content_nll", "test_nll"]
COLUMNS = ["example_id", "n_tokens", "nll", "end_nll"]


def row_changes(control, treatment, name="this pair"):
    """Treatment minus control of every row: DataFrame example_id, n_tokens and MEASURES.

    control, treatment: tables of `evaluate.losses.score_losses`, one split; columns example_id,
    n_tokens (of the response, end of turn included), nll (nats per response token), end_nll (nats).
    p_end is exp(-end_nll). name: of the pair, for messages. Raises ConfigError for tables without
    end_nll, losses that are not finite, and pairs of different rows.
    """
    sides = []
    for table in (control, treatment):
        if missing := [column for column in COLUMNS if column not in table]:
            raise ConfigError(
                f"{name}: the losses have no {', '.join(missing)}, because an older version of the"
                " code scored them: score the runs again"
            )
        sides.append(table.set_index("example_id")[COLUMNS[1:]].sort_index())
    if not all(np.isfinite(side[["nll", "end_nll"]]).all(axis=None) for side in sides):
        raise ConfigError(f"{name}: a model gives losses that are no numbers: train it again")
    plain, changed = sides
    if not (plain.index.equals(changed.index) and plain.n_tokens.equals(changed.n_tokens)):
        odd = plain.index.symmetric_difference(changed.index)
        both = plain.index.intersection(changed.index)
        odd = [*odd, *both[plain.n_tokens.reindex(both) != changed.n_tokens.reindex(both)]]
        raise ConfigError(
            f"{name}: its two models were scored on different rows ({len(odd)} of them, the first"
            f" is {odd[0]}): score both on the same rows with the same tokenizer"
        )
    before, after = _measures(plain), _measures(changed)
    return pd.concat([plain.n_tokens, after - before], axis=1).reset_index()


def content_nll(losses):
    """Nats per token of responses without their end of turn, NaN for one that is its end alone.

    losses: DataFrame with nll (nats per token, the end among them), end_nll and n_tokens.
    """
    content = losses.nll * losses.n_tokens - losses.end_nll
    return content / (losses.n_tokens - 1).replace(0, np.nan)


def _measures(losses):
    return pd.DataFrame(
        {
            "p_end": np.exp(-losses.end_nll),
            "end_nll": losses.end_nll,
            "content_nll": content_nll(losses),
            "test_nll": losses.nll,
        }
    )


def weights_of(changes, measure):
    """What a row counts in a measure: its tokens, as in training, or 1 for the one end token."""
    less = {"content_nll": 1, "test_nll": 0}  # the tokens that do not count
    return changes.n_tokens - less[measure] if measure in less else 1


def interval(changes, measure):
    """`stats.Interval` of a measure, each row by `weights_of`; None without usable rows.

    changes: `row_changes` with a column seed, one value for each pair of models. Several pairs get
    the interval over pairs and rows (`stats.confirmatory_interval`). One pair gets `rows_interval`.
    """
    some = pd.DataFrame(
        {
            "seed": changes.seed,
            "example_id": changes.example_id,
            "delta": changes[measure],
            "weight": weights_of(changes, measure),
        }
    ).dropna()
    if some.empty:
        return None
    if some.seed.nunique() > 1:
        return stats.confirmatory_interval(some)
    return rows_interval(some.delta, some.weight)


def rows_interval(deltas, weights, level=0.95):
    """`stats.Interval` of a weighted mean over the rows of one pair of models.

    It says nothing about another seed: how much trainings differ cannot be seen in one pair.
    deltas, weights: shape (N,). The mean is a ratio of two sums over rows, and its standard error

        se = sqrt(N / (N - 1) sum_e (w_e (delta_e - mean))^2) / sum_e w_e

    (Cochran 1977, Sampling Techniques, section 6.3) is that of an ordinary mean where weights are
    equal; t with N - 1 degrees of freedom. NaN for the ends with one row, or without any spread.
    """
    deltas, weights = np.asarray(deltas, dtype=float), np.asarray(weights, dtype=float)
    n, mean = len(deltas), float(np.average(deltas, weights=weights))
    if n == 1:
        return stats.Interval(mean, math.nan, math.nan, math.nan, 0.0, 1, 1, math.nan)
    squares = (weights * (deltas - mean)) ** 2
    se = float(np.sqrt(n / (n - 1) * squares.sum()) / weights.sum())
    if stats.is_rounding(se, deltas):
        return stats.Interval(mean, math.nan, math.nan, 0.0, n - 1, 1, n, math.nan)
    half = float(t.ppf((1 + level) / 2, n - 1) * se)
    seen = stats.detectable_effect(se, n - 1, 1 - level)
    return stats.Interval(mean, mean - half, mean + half, se, n - 1, 1, n, seen)


def by_length(changes, parts=4):
    """Changes by the length of the reference answer, in quarters of the rows (or other parts).

    changes: `row_changes` with columns label (an arm, a profile) and seed. DataFrame label, part
    (from 1, the shortest), n_rows, length (median tokens of the reference), seed (NaN: over all
    pairs of the label), measure, estimate, ci_low, ci_high. Rows of equal length stay together, so
    there may be fewer parts.
    """
    found = []
    for label, group in changes.groupby("label", sort=False):
        lengths = group.drop_duplicates("example_id").set_index("example_id").n_tokens
        count = max(1, min(parts, len(lengths) // 2))  # one row has no spread
        part = pd.qcut(lengths, count, labels=False, duplicates="drop").rank(method="dense")
        for number, rows in group.groupby(group.example_id.map(part).fillna(1)):
            about = {"label": label, "part": int(number), "n_rows": rows.example_id.nunique()}
            about["length"] = float(rows.drop_duplicates("example_id").n_tokens.median())
            pieces = [(math.nan, rows)]
            if rows.seed.nunique() > 1:
                pieces += list(rows.groupby("seed"))
            for seed, piece in pieces:
                for measure in MEASURES:
                    one = interval(piece, measure)
                    if one is None:
                        continue
                    span = {"ci_low": one.ci_low, "ci_high": one.ci_high}
                    value = {"measure": measure, "estimate": one.estimate, **span}
                    found.append({**about, "seed": seed, **value})
    return pd.DataFrame(found)


def changes_of_runs(runs, profile, arms=None):
    """`row_changes` of the test rows of every pair of runs, with columns label (the arm) and seed.

    runs: `runs.load_runs`. arms: names; by default every arm with noise, each against the run of
    the same seed of its own control (`profile.control_of`). Of an arm only the rows that all its
    pairs have are kept. Raises ConfigError where no pair has end_nll, or where rows differ.
    """
    wanted = [a for a, arm in profile.arms.items() if arm.noise_alpha] if arms is None else arms
    found, older = [], 0
    for arm in wanted:
        control, pairs = profile.control_of(arm), []
        for seed in sorted(seed for name, seed in runs if name == arm and (control, seed) in runs):
            sides = [runs[name, seed]["losses"] for name in (control, arm)]
            if any("end_nll" not in side for side in sides):
                older += 1
                continue
            sides = [side[side.split == "test"] for side in sides]
            changes = row_changes(*sides, f"{arm} against {control}, seed {seed}")
            pairs.append(changes.assign(label=arm, seed=seed))
        if pairs:
            whole = pd.concat(pairs, ignore_index=True)
            common = whole.groupby("example_id").seed.transform("size") == len(pairs)
            found.append(whole[common])
    if not found:
        why = f"{older} pairs were scored before losses.csv had end_nll" if older else "no pair"
        raise ConfigError(
            f"no figure of the end of turn: {why}; make reproduce PROFILE={profile.name} has it"
        )
    return pd.concat(found, ignore_index=True)
