"""Figures of notebook 6, of the published answers; saved by `plots.save`."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

from neft_utils.compare.run_plots import BASELINE, COLOURS, styled, wrapped


@styled
def leaderboard(pairs, labels):
    """Raw and length-controlled win-rate differences of published pairs, in points."""
    figure, axis = plt.subplots()
    places = np.arange(len(pairs))
    kinds = ("raw", "as judged"), ("length_controlled", "length-controlled")
    for shift, (kind, label), colour in zip((-0.2, 0.2), kinds, COLOURS, strict=False):
        heights = [pair[kind][2] for pair in pairs]
        bars = axis.bar(places + shift, heights, 0.38, color=colour, label=label)
        axis.bar_label(bars, fmt="%+.1f", fontsize=9)
    axis.set_xticks(places, labels)
    left = pairs[0]["length_controlled"][2] / pairs[0]["raw"][2]
    title = f"{labels[0].splitlines()[0]}: length control leaves {left:.0%} of the gain"
    axis.set(ylabel="win rate with noise minus without (points)", title=wrapped(title))
    axis.legend()
    return figure


KINDS = {  # kind of `published.views` -> its colour and what the legend calls it
    "raw": ("black", "as judged"),
    "official": (COLOURS[1], "the leaderboard's length control"),
    "weighted": (COLOURS[0], "all forms of length control, weighted"),
    "refit": (COLOURS[4], "one form of length control"),
    "refuted": (BASELINE, "one that predicts the judge clearly worse"),
    "matched": (COLOURS[2], "prompts whose two answers are similarly long"),
    "forced": (COLOURS[5], "control made to write longer: one run, no interval"),
}


@styled
def length_views(views):
    """Every answer to "how much better?" as a point with its interval, in percentage points.

    views: columns view, kind, estimate, ci_low, ci_high, n, weight (`published.views`); NaN where
    there is no interval or number.
    """
    shown = views[views.estimate.notna()]
    figure, axis = plt.subplots(figsize=(6.8, 2.4 + 0.36 * len(shown)))
    places = np.arange(len(shown))[::-1]
    for place, row in zip(places, shown.itertuples(), strict=True):
        colour = KINDS[row.kind][0]
        if np.isfinite(row.ci_low):
            axis.plot([row.ci_low, row.ci_high], [place, place], color=colour, linewidth=2)
        axis.plot(row.estimate, place, "o", color=colour, fillstyle=_fill(row.kind))
        number = f"{row.estimate:+.1f}"
        axis.annotate(number, (row.estimate, place), (0, 5), textcoords="offset points", fontsize=8)
    axis.axvline(0, color=BASELINE, linewidth=1)
    axis.set_yticks(places, [_label(row) for row in shown.itertuples()])
    axis.grid(axis="y", visible=False)
    axis.set(ylim=(-0.6, len(shown) - 0.2))
    axis.set_xlabel("win rate with noise minus without (points)")
    marks = [
        axis.plot([], [], "o", color=KINDS[kind][0], fillstyle=_fill(kind), label=KINDS[kind][1])[0]
        for kind in KINDS
        if kind in set(shown.kind)
    ]
    figure.legend(handles=marks, loc="outside lower left", ncols=2, fontsize=8)
    first = shown.groupby("kind").estimate.first()
    model, last = first.get("weighted", first["official"]), shown.groupby("kind").estimate.last()
    title = (
        f"{first['raw']:+.0f} points as judged, {model:+.0f} once a model of the judge takes length"
        f" away. The authors' own pair: {last['raw']:+.0f}, and {last['forced']:+.0f} against a"
        " control forced to write as much"
    )
    figure.suptitle(wrapped(title), x=0.01, ha="left", fontsize=11)
    return figure


def _fill(kind):
    """An open point for what is not to be believed."""
    return "none" if kind == "refuted" else "full"


def _label(row):
    if np.isfinite(row.weight):
        return f"{row.view} (weight {row.weight:.2f})"
    return row.view if pd.isna(row.n) else f"{row.view} (n = {row.n})"


@styled
def gain_by_length_change(quintiles):
    """Gain in each group of prompts against how much longer the treatment's answer is.

    quintiles: columns quintile, n, chars_low, chars_high, chars_mean (characters), estimate,
    ci_low, ci_high (points); see `length_pairs.by_length_change`.
    """
    figure, axis = plt.subplots()
    axis.axhline(0, color=BASELINE, linewidth=1)
    axis.vlines(
        quintiles.chars_mean, quintiles.ci_low, quintiles.ci_high, color=COLOURS[0], linewidth=2
    )
    axis.plot(quintiles.chars_mean, quintiles.estimate, "o-", color=COLOURS[0])
    for row in quintiles.itertuples():
        label, place = f"{row.estimate:+.0f}", (row.chars_mean, row.estimate)
        axis.annotate(label, place, (6, -10), textcoords="offset points", fontsize=9)
    first, last = quintiles.estimate.iloc[[0, -1]]
    steps = np.diff(quintiles.estimate)
    word = "grows with" if (steps > 0).all() else "does not simply grow with"
    axis.set(
        xlabel="answer with noise minus answer without (characters), mean of each fifth",
        ylabel="gain in win rate (points)",
    )
    title = f"The gain {word} the extra length: {first:+.0f} points in the first fifth of prompts"
    axis.set_title(wrapped(f"{title}, {last:+.0f} in the last"))
    return figure
