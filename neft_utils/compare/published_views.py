"""How much of the published gain is length: every view of it in one table, and in sentences.

Views are of two kinds. A model of the judge takes length away from the answers as they are
(`length_control`); the paper's Table 5 changes length itself. A form of length control counts by
how well it predicts the judge.
"""

import pandas as pd
from scipy.stats import t

from neft_utils.compare import length_control
from neft_utils.compare.facts import table_5

VIEWS = ["view", "kind", "estimate", "ci_low", "ci_high", "n", "weight"]
TABLE_5 = {  # arm that the paper's Table 5 holds against NEFTune -> (its name here, kind)
    "plain": ("Table 5, as judged", "raw"),
    "prompt: long and comprehensive": ("Table 5, control asked for long answers", "forced"),
    "min new tokens 250": ("Table 5, control forced to 250 tokens", "forced"),
}


def views(comparison, pair):
    """One row per answer to "how much better?": view, kind, estimate, ci_low, ci_high (points), n,
    weight (of a form of length control, 0 to 1).

    kind: raw; official (the leaderboard's); weighted (all forms by their fit); refit, or refuted
    where a form's weight is below `length_control.REFUTED`; matched (t interval over pairs); forced
    (the control was made longer). The paper's Table 5 has one run an arm and no interval.
    comparison: from `published.compare`, or None; then only what was printed.
    """
    official = ["leaderboard, length-controlled", "official", pair["length_controlled"][2]]
    rows = [["leaderboard, as judged", "raw", pair["raw"][2]], official]
    if comparison is not None:
        n, fit = comparison["n"], pd.DataFrame(comparison["fit"])
        raw = (comparison["raw_difference"], *comparison["raw_ci"])
        forms = comparison["length_controlled"]
        weights = length_control.form_weights(fit, n)
        rows[0] = ["as judged", "raw", *raw, n]
        every = length_control.weighted_gain({"none": raw, **forms}, weights)
        rows.append(["four forms, weighted by fit", "weighted", *every, n])
        for form, values in forms.items():
            refuted = weights[form] < length_control.REFUTED and values[0] is not None
            kind = "refuted" if refuted else "refit"
            rows.append([form.replace("_", " "), kind, *values, n, weights[form]])
        for tolerance, (mean, se, count) in comparison["length_matched"].items():
            wide = None if se is None else se * t.ppf(0.975, count - 1)
            ends = [None, None] if se is None else [mean - wide, mean + wide]
            rows.append([f"lengths within {float(tolerance):.0%}", "matched", mean, *ends, count])
    rows += [[*called, table_5().gain[arm]] for arm, called in TABLE_5.items()]
    rows = [row + [None] * (len(VIEWS) - len(row)) for row in rows]
    numbers = dict.fromkeys([*VIEWS[2:5], "weight"], float) | {"n": "Int64"}
    return pd.DataFrame(rows, columns=VIEWS).astype(numbers)


def by_model(comparison, views):
    """Sentences: what models of the judge leave of the gain, and which of them are refuted.

    comparison: from `published.compare`, or None. views: from `views`.
    """
    first = views.drop_duplicates("kind").set_index("kind")
    text = f"The judge prefers the answers with noise by {first.estimate['raw']:+.1f} points."
    if not comparison:
        left = first.estimate["official"]
        return f"{text} The leaderboard's length control leaves {left:+.1f}."
    mean, low, high = first.loc["weighted", ["estimate", "ci_low", "ci_high"]]
    text += (
        f" Models of the judge that take length away leave {mean:+.1f} [{low:+.1f}, {high:+.1f}],"
        " each weighted by how well it predicts preferences that it was not fitted to."
    )
    fit = pd.DataFrame(comparison["fit"]).set_index("form")
    for row in views[views.kind == "refuted"].itertuples():
        excess, se = fit.loc[row.view.replace(" ", "_"), ["excess", "excess_se"]]
        text += (
            f" The form *{row.view}*, which would leave {row.estimate:+.1f}, is refuted: its"
            f" predictions are worse than the best by {excess:.3f} ± {se:.3f} nats a judgement."
        )
    overlap = comparison["overlap"]
    return (
        f"{text} All of them extrapolate: with noise {overlap['not_longer']:.0%} of the answers are"
        f" no longer than without, and {overlap['similar']} of {comparison['n']} pairs are within"
        " 20 %."
    )


def by_force():
    """Sentences: the paper's Table 5, in which length itself is changed."""
    table = table_5()
    forced, asked = table.loc["min new tokens 250"], table.loc["prompt: long and comprehensive"]
    noisy = table.loc["NEFTune"]
    return (
        "Only the paper's Table 5 changes length itself (one run an arm, one judge): a model"
        f" without noise that may not end before 250 tokens writes {forced.chars:,.0f} characters"
        f" and wins {forced.win_rate:.1f} %, NEFTune {noisy.chars:,.0f} and {noisy.win_rate:.1f} %,"
        f" {forced.gain:+.1f} points; asked for long answers it writes {asked.chars:,.0f}, and"
        f" NEFTune is {asked.gain:+.1f} points ahead."
    )


def as_markdown(views):
    """The table of `views`: view with its number of prompts, points with interval, weight."""
    lines = ["| published answers, with noise minus without | win rate, points | weight |"]
    lines += ["|---|---|---|"]
    for row in views.itertuples():
        refuted = ", refuted" if row.kind == "refuted" else ""
        count = "" if pd.isna(row.n) else f" ({row.n} prompts)"
        span = "" if pd.isna(row.ci_low) else f" [{row.ci_low:+.1f}, {row.ci_high:+.1f}]"
        weight = "" if pd.isna(row.weight) else f"{row.weight:.2f}"
        lines.append(f"| {row.view}{refuted}{count} | {row.estimate:+.1f}{span} | {weight} |")
    return "\n".join(lines) + "\n"
