"""The picture of `end_of_turn`: stopping on the left, content on the right, by answer length."""

import matplotlib.pyplot as plt
from matplotlib.lines import Line2D

from neft_utils.compare.end_of_turn import by_length, changes_of_runs
from neft_utils.compare.run_plots import BASELINE, COLOURS, styled, wrapped

ALT = (
    "Two panels over the length of the reference answer: change of the probability of ending there,"
    " and change of the loss of the tokens before it. One line a treatment, thin ones single pairs."
)
PANELS = (
    ("p_end", 100, "Stopping (below zero: later to stop)", "chance of stopping changes by, points"),
    ("content_nll", 1, "Content (below zero: better)", "loss changes by, nats per token"),
)


def end_of_turn_figure(runs, profile, arms=None):
    """`figure` of a profile's runs; arguments and errors as in `end_of_turn.changes_of_runs`."""
    return figure(changes_of_runs(runs, profile, arms))


@styled
def figure(changes):
    """Change of P(end) and of content NLL against the length of the reference answer.

    changes: as in `by_length`; a line with points for each label, over quarters of the rows, with
    95 % intervals where there is one label, and thin lines for single pairs of models.
    """
    table = by_length(changes)
    labels = list(table.label.unique())
    drawn, axes = plt.subplots(1, 2, figsize=(8.4, 4.0))
    for axis, (measure, times, title, unit) in zip(axes, PANELS, strict=True):
        axis.axhline(0, color=BASELINE, linewidth=1)
        of_measure = table[table.measure == measure]
        for number, label in enumerate(labels):
            colour, rows = COLOURS[number % len(COLOURS)], of_measure[of_measure.label == label]
            for _, one in rows.dropna(subset="seed").groupby("seed"):
                thin = {"color": colour, "linewidth": 0.7, "alpha": 0.45}
                axis.plot(one.length, times * one.estimate, **thin)
            mean = rows[rows.seed.isna()]
            if len(labels) == 1:
                ends = times * mean.ci_low, times * mean.ci_high
                axis.vlines(mean.length, *ends, color=colour, linewidth=1.5)
            style = {"color": colour, "linewidth": 2.2, "markersize": 5}
            axis.plot(mean.length, times * mean.estimate, "o-", **style)
        axis.set(title=title, ylabel=unit, xlabel="tokens of the reference answer")
        axis.margins(x=0.06, y=0.1)
    _legend(drawn, table, changes)
    drawn.suptitle(wrapped(_finding(table, labels[0])), x=0.01, ha="left", fontsize=11)
    return drawn


def _legend(drawn, table, changes):
    """Below the panels, where no data are."""
    counts = changes.groupby("label", sort=False).seed.nunique()
    handles = []
    for number, (label, count) in enumerate(counts.items()):
        pairs = f"mean of {count} seed pairs" if count > 1 else "one pair"
        style = {"color": COLOURS[number % len(COLOURS)], "linewidth": 2.2}
        handles.append(Line2D([], [], marker="o", **style, label=f"{label}, {pairs}"))
    if table.seed.notna().any():
        thin = {"color": BASELINE, "linewidth": 0.7}
        handles.append(Line2D([], [], **thin, label="thin: one pair"))
    if len(counts) == 1 and table.ci_low.notna().any():
        upright = {"color": BASELINE, "linewidth": 1.5}
        handles.append(Line2D([], [], **upright, label="upright: 95 % interval"))
    drawn.legend(handles=handles, loc="outside lower left", ncols=3, fontsize=9)


def _finding(table, label):
    """What the first label's line says at its two ends, as the title of the figure."""
    line = table[(table.label == label) & table.seed.isna()].sort_values("part")
    ends = (100 * line[line.measure == "p_end"].estimate).round(1) + 0  # no "-0.0"
    if len(ends) == 1:
        return f"Chance of stopping where the reference answer ends: {ends.iloc[0]:+.1f} points"
    return (
        f"Chance of stopping where the reference answer ends: {ends.iloc[0]:+.1f} points after the"
        f" shortest answers, {ends.iloc[-1]:+.1f} after the longest"
    )
