"""The picture of `end_of_turn`: stopping above, content below, by length of the answer."""

import matplotlib.pyplot as plt
from matplotlib.lines import Line2D

from neft_utils.compare.end_of_turn import by_length, changes_of_runs
from neft_utils.compare.plots import WIDTH, titled, words_of
from neft_utils.compare.run_plots import BASELINE, COLOURS, styled
from neft_utils.compare.words import capital

ALT = (
    "Two panels over the length of the reference answer: change of the chance of stopping there,"
    " and change of the loss of the tokens before it. One line a treatment, thin ones single pairs"
    " of the first."
)
PANELS = (
    ("p_end", 100, "Chance of stopping where the reference ends (↓ later to stop)", "points"),
    ("content_nll", 1, "Loss on what is said before (↓ better)", "nats per token"),
)


def end_of_turn_figure(runs, profile, arms=None):
    """`figure` of a profile's runs; arguments and errors as in `end_of_turn.changes_of_runs`."""
    changes = changes_of_runs(runs, profile, arms)
    return figure(changes.assign(label=changes.label.map(lambda arm: words_of(arm, profile))))


@styled
def figure(changes):
    """Change of P(end) and of content NLL against the length of the reference answer.

    changes: as in `by_length`; a line with points for each label, over quarters of the rows, with
    95 % intervals where there is one label, and thin lines for single pairs of the first label.
    """
    table = by_length(changes)
    labels = list(table.label.unique())
    drawn, axes = plt.subplots(2, figsize=(WIDTH, 5.6), sharex=True)
    for axis, (measure, times, title, unit) in zip(axes, PANELS, strict=True):
        axis.axhline(0, color=BASELINE, linewidth=1)
        of_measure = table[table.measure == measure]
        for number, label in enumerate(labels):
            colour, rows = COLOURS[number % len(COLOURS)], of_measure[of_measure.label == label]
            single = rows.dropna(subset="seed") if label == labels[0] else rows[:0]
            for _, one in single.groupby("seed"):
                thin = {"color": colour, "linewidth": 0.7, "alpha": 0.45}
                axis.plot(one.length, times * one.estimate, **thin)
            mean = rows[rows.seed.isna()]
            if len(labels) == 1:
                ends = times * mean.ci_low, times * mean.ci_high
                axis.vlines(mean.length, *ends, color=colour, linewidth=1.5)
            style = {"color": colour, "linewidth": 2.2, "markersize": 5}
            axis.plot(mean.length, times * mean.estimate, "o-", **style)
        axis.set_title(title, fontsize=10)
        axis.set_ylabel(f"change, {unit}")
        axis.margins(x=0.06, y=0.1)
    axes[1].set_xlabel("tokens of the reference answer, median of a quarter of the rows")
    _legend(drawn, table, changes)
    titled(drawn, _finding(table, labels[0]))
    return drawn


def _legend(drawn, table, changes):
    """Below the panels, where no data are."""
    counts = changes.groupby("label", sort=False).seed.nunique()
    handles = []
    for number, (label, count) in enumerate(counts.items()):
        pairs = f"{count} pairs" if count > 1 else "one pair"
        style = {"color": COLOURS[number % len(COLOURS)], "linewidth": 2.2}
        handles.append(Line2D([], [], marker="o", **style, label=f"{label}, {pairs}"))
    if table.seed.notna().any():
        thin = {"color": BASELINE, "linewidth": 0.7}
        which = " of the first" if len(counts) > 1 else ""
        handles.append(Line2D([], [], **thin, label=f"thin: single pairs{which}"))
    if len(counts) == 1 and table.ci_low.notna().any():
        upright = {"color": BASELINE, "linewidth": 1.5}
        handles.append(Line2D([], [], **upright, label="bar: 95 % interval"))
    drawn.legend(handles=handles, loc="outside lower left", ncols=2, fontsize=9)


def _finding(table, label):
    """What the first label's line says at its two ends, as the title of the figure."""
    line = table[(table.label == label) & table.seed.isna() & (table.measure == "p_end")]
    rows = line.sort_values("part").itertuples()
    said = [_change(row) for row in rows]
    where = ["after the shortest answers", "after the longest"] if len(said) > 1 else ["there"]
    parts = [f"{said[end]} {place}" for end, place in zip((0, -1), where, strict=False)]
    return capital(f"{label}, chance of stopping at the reference's end: {', '.join(parts)}")


def _change(row):
    """A change of a chance in points; none is claimed where its interval holds zero."""
    if row.ci_low <= 0 <= row.ci_high:
        return "no change seen"
    return f"{round(100 * row.estimate, 1) + 0:+.1f} points"  # no "-0.0"
