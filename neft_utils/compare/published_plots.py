"""Figures of notebook 6, of the published answers; saved by `plots.save`."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

from neft_utils.compare.plots import WIDTH, label_rows, titled
from neft_utils.compare.run_plots import BASELINE, COLOURS, styled

POINTS = "← worse      win rate with noise minus without, points      better →"


@styled
def leaderboard(pairs, labels):
    """Raw and length-controlled win-rate differences of published pairs, in points."""
    figure, axis = plt.subplots(figsize=(WIDTH, 1.7 + 0.6 * len(pairs)))
    places = np.arange(len(pairs))[::-1]
    ends = {name: [pair[name][2] for pair in pairs] for name in ("raw", "length_controlled")}
    axis.axvline(0, color=BASELINE, linewidth=1)
    axis.hlines(places, *ends.values(), color=BASELINE, linewidth=1.5)
    axis.plot(ends["raw"], places, "o", color="black", label="as judged")
    at_length = {"color": COLOURS[1], "label": "length-controlled", "markersize": 8}
    axis.plot(ends["length_controlled"], places, "D", **at_length)
    for values in ends.values():
        for value, place in zip(values, places, strict=True):
            where = {"textcoords": "offset points", "ha": "center", "va": "top"}
            axis.annotate(f"{value:+.1f}", (value, place), (0, -7), **where)
    label_rows(axis, [" ".join(label.split()) for label in labels], places)
    axis.set(xlabel=POINTS, ylim=(-0.6, len(pairs) - 0.2))
    axis.margins(x=0.08)
    figure.legend(loc="outside lower left", ncols=2)
    said = [
        f"{label.splitlines()[0]}: {raw:+.1f} points as judged, {left:+.1f} with length controlled"
        for label, raw, left in zip(labels, *ends.values(), strict=True)
    ]
    titled(figure, "; ".join(said))
    return figure


KINDS = {  # kind of `published.views` -> its colour and what the legend calls it
    "raw": ("black", "as judged"),
    "official": (COLOURS[1], "the leaderboard's length control"),
    "weighted": (COLOURS[0], "all forms of length control, weighted"),
    "refit": (COLOURS[4], "one form of length control"),
    "refuted": (BASELINE, "form that predicts the judge clearly worse"),
    "matched": (COLOURS[2], "prompts whose two answers are similarly long"),
    "forced": (COLOURS[5], "control made to write longer: no interval"),
}


@styled
def length_views(views):
    """Every answer to "how much better?" as a point with its interval, in percentage points.

    views: columns view, kind, estimate, ci_low, ci_high, n, weight (`published.views`); NaN where
    there is no interval or number.
    """
    shown = views[views.estimate.notna()]
    figure, axis = plt.subplots(figsize=(WIDTH, 2.8 + 0.4 * len(shown)))
    places = np.arange(len(shown))[::-1]
    for place, row in zip(places, shown.itertuples(), strict=True):
        colour = KINDS[row.kind][0]
        if np.isfinite(row.ci_low):
            axis.plot([row.ci_low, row.ci_high], [place, place], color=colour, linewidth=2)
        axis.plot(row.estimate, place, "o", color=colour, fillstyle=_fill(row.kind))
    axis.axvline(0, color=BASELINE, linewidth=1, zorder=0)
    label_rows(axis, [_label(row) for row in shown.itertuples()], places)
    axis.set_xlabel(POINTS)
    for kind in KINDS:
        if kind in set(shown.kind):
            colour, words = KINDS[kind]
            axis.plot([], [], "o", color=colour, fillstyle=_fill(kind), label=words)
    figure.legend(loc="outside lower left", ncols=2, fontsize=9, columnspacing=1)
    titled(figure, _views_finding(shown))
    return figure


def _views_finding(shown):
    """What is left of the gain by either way, with the interval where there is one."""
    first, last = shown.groupby("kind").first(), shown.groupby("kind").estimate.last()
    model = first.loc["weighted" if "weighted" in first.index else "official"]
    span = f" [{model.ci_low:+.0f}, {model.ci_high:+.0f}]" if np.isfinite(model.ci_low) else ""
    return (
        f"{first.estimate['raw']:+.0f} points as judged, {model.estimate:+.0f}{span} once a model"
        f" of the judge takes length away. The authors' own pair: {last['raw']:+.0f}, and"
        f" {last['forced']:+.0f} against a control forced to write as much"
    )


def _fill(kind):
    """An open point for what is not to be believed."""
    return "none" if kind == "refuted" else "full"


def _label(row):
    """A view with its number, and what that rests on."""
    on = f" (weight {row.weight:.2f})" if np.isfinite(row.weight) else ""
    if not on and not pd.isna(row.n):
        on = f" (n = {row.n})"
    return f"{row.view}{on}: {row.estimate:+.1f}"


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
        axis.annotate(label, place, (7, -12), textcoords="offset points")
    first, last = quintiles.estimate.iloc[[0, -1]]
    steps = np.diff(quintiles.estimate)
    apart = quintiles.ci_low.iloc[-1] > quintiles.ci_high.iloc[0]
    word = "grows with" if (steps > 0).all() and apart else "does not simply grow with"
    axis.set(
        xlabel="extra characters of the answer with noise, mean of each fifth of prompts",
        ylabel="gain in win rate, points (↑ better)",
    )
    title = f"The gain {word} the extra length: {first:+.0f} points in the first fifth of prompts"
    titled(figure, f"{title}, {last:+.0f} in the last")
    return figure
