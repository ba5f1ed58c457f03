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
    for shift, kind, colour in ((-0.2, "raw", COLOURS[0]), (0.2, "length_controlled", COLOURS[1])):
        heights = [pair[kind][2] for pair in pairs]
        bars = axis.bar(places + shift, heights, 0.38, color=colour, label=kind.replace("_", "-"))
        axis.bar_label(bars, fmt="%+.1f", fontsize=9)
    axis.set_xticks(places, labels)
    left = pairs[0]["length_controlled"][2] / pairs[0]["raw"][2]
    title = f"{labels[0].splitlines()[0]}: {left:.0%} of the raw gain is left at equal length"
    axis.set(ylabel="win rate with noise minus without (points)", title=wrapped(title))
    axis.legend()
    return figure


@styled
def length_views(views):
    """Every answer to "how much better?" as a point with its interval, in percentage points.

    views: columns view, kind (raw, official, refit, matched), estimate, ci_low, ci_high, n
    (`published.views`); NaN where there is no interval or number.
    """
    shown = views[views.estimate.notna()]
    figure, axis = plt.subplots(figsize=(6.4, 1.4 + 0.34 * len(shown)))
    colours = {"raw": "black", "official": COLOURS[1], "refit": COLOURS[0], "matched": COLOURS[2]}
    places = np.arange(len(shown))[::-1]
    for place, row in zip(places, shown.itertuples(), strict=True):
        colour = colours[row.kind]
        if np.isfinite(row.ci_low):
            axis.plot([row.ci_low, row.ci_high], [place, place], color=colour, linewidth=2)
        axis.plot(row.estimate, place, "o", color=colour)
        number = f"{row.estimate:+.1f}"
        axis.annotate(number, (row.estimate, place), (0, 5), textcoords="offset points", fontsize=8)
    axis.axvline(0, color=BASELINE, linewidth=1)
    counts = ["" if pd.isna(n) else f" (n = {n})" for n in shown.n]
    axis.set_yticks(places, [view + n for view, n in zip(shown["view"], counts, strict=True)])
    axis.set(xlabel="win rate with noise minus without (points)", ylim=(-0.6, len(shown) - 0.2))
    raw = shown[shown.kind == "raw"].estimate.iloc[0]
    rest = shown[shown.kind != "raw"].estimate
    gain = f"{rest.min():+.0f} to {rest.max():+.0f}" if len(rest) > 1 else f"{rest.min():+.0f}"
    how = ", depending on how length is held" if len(rest) > 1 else ""
    axis.set_title(wrapped(f"{raw:+.0f} points as judged, {gain} at equal length{how}"), x=-0.35)
    return figure


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
