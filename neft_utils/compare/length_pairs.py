"""Two arms' judged answers side by side, and what pairs alone say about length.

Each arm has one answer per prompt; a judge has compared it with a reference answer that both arms
share. No model of the judge here: the raw paired difference, pairs whose two answers happen to be
similarly long, the gain by change of length, and whether lengths overlap enough to speak of equal
length. `length_control` adds the model. Differences are treatment minus control, in points.
"""

import numpy as np
import pandas as pd
from scipy.stats import t

COLUMNS = ["prompt_id", "preference", "chars", "reference_chars"]
ARMS = ("control", "treatment")
TOLERANCES = (0.2, 0.5)
MIN_NOT_LONGER, MIN_SIMILAR = 0.2, 50  # overlap guard: share of pairs, number of pairs


def pair_arms(control, treatment):
    """One row per prompt that both arms answered and the judge compared; sorted by prompt_id.

    control, treatment: DataFrames with columns prompt_id (unique), preference (0..1, share of
    wins against the reference; draw 0.5; NaN missing), chars, reference_chars (characters).
    Returns prompt_id and <column>_control, <column>_treatment. Raises ValueError naming the arm
    and column for a value outside its range, and if no prompt is left.
    """
    checked = _checked(control, "control"), _checked(treatment, "treatment")
    pairs = checked[0].merge(checked[1], on="prompt_id", suffixes=[f"_{arm}" for arm in ARMS])
    pairs = pairs.dropna().sort_values("prompt_id", ignore_index=True)
    if len(pairs) < 2:
        raise ValueError(f"the arms share {len(pairs)} judged prompts: at least 2 are needed")
    return pairs


def _checked(frame, arm):
    if missing := [column for column in COLUMNS if column not in frame.columns]:
        raise ValueError(f"{arm} lacks the columns {missing}; it has {list(frame.columns)}")
    if frame["prompt_id"].isna().any() or frame["prompt_id"].duplicated().any():
        raise ValueError(f"{arm}: prompt_id must be there and unique in every row")
    out = frame[COLUMNS].reset_index(drop=True)
    for column, high in zip(COLUMNS[1:], (1, np.inf, np.inf), strict=True):
        values = pd.to_numeric(out[column], errors="coerce").astype(float)
        missing = out[column].isna() & (column == "preference")
        bad = ~(np.isfinite(values) & (values >= 0) & (values <= high) | missing)
        if bad.any():
            row = out[bad].iloc[0]
            limits = "0 to 1 or missing" if high == 1 else "a number of characters"
            where = f"{arm}: {column} of prompt {row.prompt_id}"
            raise ValueError(f"{where} is {row[column]!r}, not {limits}")
        out[column] = values
    return out


def of_arms(pairs, name):
    """A column of both arms, shape (2, n): control, treatment."""
    return pairs[[f"{name}_{arm}" for arm in ARMS]].to_numpy(float).T


def wins_of(pairs):
    """Preferences of both arms, 0..1, shape (2, n): control, treatment."""
    return of_arms(pairs, "preference")


def raw_difference(pairs, level=0.95):
    """Mean paired difference with its t interval over prompts, in points.

    pairs: from `pair_arms`, here and below. Returns estimate, ci_low, ci_high (NaN without any
    spread), se, n, and the win rates control and treatment in percent.
    """
    control, treatment = 100 * wins_of(pairs)
    delta = treatment - control
    mean, se = float(delta.mean()), float(delta.std(ddof=1) / len(delta) ** 0.5)
    half = float(t.ppf((1 + level) / 2, len(delta) - 1)) * se if se > 1e-9 else np.nan
    out = {"estimate": mean, "ci_low": mean - half, "ci_high": mean + half, "se": se}
    levels = {"control": float(control.mean()), "treatment": float(treatment.mean())}
    return {**out, "n": len(delta), **levels}


def overlap(pairs):
    """Whether the lengths of the two arms overlap enough to speak of equal length.

    Returns not_longer (share of pairs, 0..1, whose treatment answer is not longer), similar
    (number of pairs within 20 %), not_longer_than_reference (share of the treatment's answers:
    where f = 0 is read off), identifiable, and verdict, a sentence.
    """
    control, treatment = pairs["chars_control"], pairs["chars_treatment"]
    share, similar = float((treatment <= control).mean()), int(within(pairs, 0.2).sum())
    short = float((treatment <= pairs["reference_chars_treatment"]).mean())
    enough = share >= MIN_NOT_LONGER and similar >= MIN_SIMILAR
    verdict = f"{share:.0%} of the pairs are not longer ({MIN_NOT_LONGER:.0%} needed), "
    verdict += f"{similar} are within 20 % ({MIN_SIMILAR} needed)"
    verdict = f"{'identifiable' if enough else 'not identifiable'}: {verdict}"
    numbers = {"not_longer": share, "similar": similar, "not_longer_than_reference": short}
    return {**numbers, "identifiable": enough, "verdict": verdict}


def within(pairs, tolerance, unit="chars"):
    """Which pairs have answers of like length, a bool Series: |treatment - control| <= tolerance *
    control. pairs: with columns <unit>_control and <unit>_treatment."""
    control, treatment = pairs[f"{unit}_control"], pairs[f"{unit}_treatment"]
    return (treatment - control).abs() <= tolerance * control


def length_matched(pairs, tolerances=TOLERANCES):
    """Raw difference where |chars_treatment - chars_control| <= tolerance * chars_control.

    One row per tolerance: tolerance, estimate, se (points; NaN below 1 and 2 pairs), n. The
    prompts that match are not a random sample of all prompts.
    """
    control, treatment = 100 * wins_of(pairs)
    rows = []
    for tolerance in tolerances:
        delta = (treatment - control)[within(pairs, tolerance).to_numpy()]
        mean = delta.mean() if len(delta) else np.nan
        se = delta.std(ddof=1) / len(delta) ** 0.5 if len(delta) > 1 else np.nan
        rows.append([tolerance, mean, se, len(delta)])
    return pd.DataFrame(rows, columns=["tolerance", "estimate", "se", "n"])


def by_length_change(pairs, n_groups=5, level=0.95):
    """Raw difference by quintile (or n_groups) of chars_treatment - chars_control, ascending.

    quintile (from 1), n, chars_low, chars_high, chars_mean (change in characters), estimate,
    ci_low, ci_high (points, t interval over prompts). Equal changes stay in one group, which
    with many ties can leave fewer groups; groups of one pair are left out.
    """
    change = (pairs["chars_treatment"] - pairs["chars_control"]).to_numpy()
    edges = np.quantile(change, np.linspace(0, 1, n_groups + 1)[1:-1])
    number = np.searchsorted(edges, change) + 1  # an edge belongs to the group below it
    rows = []
    for k in range(1, n_groups + 1):
        if (number == k).sum() > 1:
            group, raw = change[number == k], raw_difference(pairs[number == k], level)
            gain = [raw[name] for name in ("estimate", "ci_low", "ci_high")]
            rows.append([k, len(group), group.min(), group.max(), group.mean(), *gain])
    names = "quintile n chars_low chars_high chars_mean estimate ci_low ci_high"
    return pd.DataFrame(rows, columns=names.split())
