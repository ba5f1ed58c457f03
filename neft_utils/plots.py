"""One function per figure: the finding as title, seeds as points, baseline grey.

Colours are Okabe & Ito's, which colour-blind readers can tell apart. Every figure is saved
as PNG and SVG under the number of the notebook that makes it.
"""

import functools
import textwrap

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import MaxNLocator

from neft_utils.config import BASE

COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00")
BASELINE, UNTRAINED = "#8C8C8C", "#BFBFBF"
STYLE = {
    "figure.figsize": (6.4, 3.8),
    "figure.dpi": 110,
    "savefig.dpi": 150,
    "font.size": 10,
    "figure.facecolor": "white",
    "axes.facecolor": "white",
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#E6E6E6",
    "axes.axisbelow": True,
    "legend.frameon": False,
    "svg.hashsalt": "neftune",
    "figure.constrained_layout.use": True,
}


def save(figure, folder, name, alt):
    """Save as <folder>/<name>.png and .svg, alt text inside, and close it.

    Returns the PNG as an IPython image: at the end of a cell it shows what was saved.
    """
    from IPython.display import Image

    folder.mkdir(parents=True, exist_ok=True)
    # No dates: the same numbers shall give the same bytes.
    figure.savefig(folder / f"{name}.png", metadata={"Description": alt, "Software": None})
    figure.savefig(folder / f"{name}.svg", metadata={"Description": alt, "Date": None})
    plt.close(figure)
    return Image(filename=str(folder / f"{name}.png"), width=640, alt=alt)


def colour_of(arm, arms, control):
    """Grey for the control, light grey for the untrained base, a colour per other arm."""
    if arm in (BASE, control):
        return UNTRAINED if arm == BASE else BASELINE
    others = [name for name in arms if name not in (BASE, control)]
    return COLOURS[others.index(arm) % len(COLOURS)]


def styled(function):
    """Draw under STYLE and leave the reader's own matplotlib settings alone."""

    @functools.wraps(function)
    def drawn(*args, **kwargs):
        with plt.rc_context(STYLE):
            return function(*args, **kwargs)

    return drawn


def _wrapped(title):
    return textwrap.fill(title, 66)


@styled
def noise_energy(lengths, sizes, energies, noise_alpha):
    """Squared noise norm of a sequence against its length, one marker per embedding size."""
    figure, axis = plt.subplots()
    for marker, size in zip("osD^", sizes, strict=False):
        axis.plot(
            lengths, energies[size], marker, label=f"d = {size}", color=COLOURS[sizes.index(size)]
        )
    expected = noise_alpha**2 / 3
    axis.axhline(expected, color="black", linewidth=1)
    axis.annotate(
        f"α²/3 = {expected:.2f}", (lengths[0], expected), (0, 5), textcoords="offset points"
    )
    axis.set(
        xscale="log",
        ylim=(0, 1.4 * expected),
        xlabel="tokens in the sequence, L",
        ylabel="‖noise‖² over the sequence",
        title="The noise has the same energy for every length and width",
    )
    axis.legend(loc="lower right", ncols=len(sizes))
    return figure


@styled
def effective_alpha(lengths, widths, noise_alpha):
    """Share of the intended α that a sequence gets when L is the width of its batch row."""
    figure, axis = plt.subplots()
    grid = np.arange(16, 513)
    for colour, width in zip(COLOURS, widths, strict=False):
        values = noise_alpha * np.sqrt(np.minimum(grid / width, 1))
        axis.plot(
            grid[grid <= width], values[grid <= width], color=colour, label=f"row of {width} tokens"
        )
    axis.axhline(noise_alpha, color=BASELINE, label="paper: each sequence's own L")
    low, high = np.quantile(lengths, [0.05, 0.95])
    axis.axvspan(low, high, color="#F0F0F0", zorder=0)
    axis.annotate("90 % of our\nexamples", (low + 4, 0.2), fontsize=9)
    axis.set(
        xlabel="tokens in the sequence",
        ylabel="effective α",
        ylim=(0, noise_alpha * 1.1),
        title=f"Batch width in place of length weakens α = {noise_alpha:g}",
    )
    axis.legend(fontsize=9, loc="lower right")
    return figure


@styled
def library_rules(table, noise_alpha):
    """Median and p10-p90 of effective α by rule; table: one row a rule, columns p10, p50, p90."""
    figure, axis = plt.subplots()
    places = np.arange(len(table))[::-1]
    low, middle, high = np.maximum(table.to_numpy().T, 0.01)  # a log axis has no zero
    axis.axvline(noise_alpha, color=BASELINE, linewidth=1)
    axis.hlines(places, low, high, color=COLOURS[0], linewidth=3)
    axis.plot(middle, places, "o", color="black")
    for place, value in zip(places, table.iloc[:, 1], strict=True):
        axis.annotate(
            f"{value:.3g}",
            (max(value, 0.01), place),
            (0, 6),
            textcoords="offset points",
            ha="center",
            fontsize=8,
        )
    axis.set_yticks(places, table.index)
    axis.set(
        xscale="log",
        xlabel=f"effective α for α = {noise_alpha:g}, median and p10 to p90",
        ylim=(-0.6, len(table) - 0.3),
        title="One α, seven strengths of noise",
    )
    return figure


@styled
def learning_curves(runs, arms, control, title):
    """Clean validation NLL after each epoch, one line per run, one colour per arm."""
    figure, axis = plt.subplots()
    for arm in arms:
        for (name, _), run in runs.items():
            if name == arm and run["log"] is not None:
                rows = run["log"].dropna(subset="validation_nll")
                axis.plot(
                    rows.epoch,
                    rows.validation_nll,
                    "o-",
                    color=colour_of(arm, arms, control),
                    alpha=0.75,
                    markersize=4,
                )
        axis.plot([], [], "o-", color=colour_of(arm, arms, control), label=arm)
    axis.set(
        xlabel="epoch",
        ylabel="validation NLL, noise off (nats/token)",
        title=title,
    )
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.legend()
    return figure


@styled
def seed_deltas(deltas, interval, title, ylabel):
    """Per-seed mean differences as points beside the mean with its interval; zero is no effect."""
    figure, axis = plt.subplots()
    means = deltas.groupby("seed").delta.mean()
    axis.axhline(0, color=BASELINE, linewidth=1)
    axis.plot(range(len(means)), means, "o", color=COLOURS[0])
    axis.set_xticks([*range(len(means)), len(means)], [*(f"seed {s}" for s in means.index), "mean"])
    where = len(means)
    if np.isfinite(interval.ci_low):
        axis.plot([where, where], [interval.ci_low, interval.ci_high], color="black", linewidth=2)
    axis.plot(where, interval.estimate, "D", color="black")
    if np.isfinite(interval.detectable):
        axis.axhspan(-interval.detectable, interval.detectable, color="#F0F0F0", zorder=0)
        axis.annotate(
            "grey: smaller than this design detects (80 % power)",
            (0.01, 0.02),
            xycoords="axes fraction",
            fontsize=8,
        )
    axis.set(title=_wrapped(title), ylabel=ylabel, xlim=(-0.5, where + 0.5))
    return figure


@styled
def arms_by_seed(seeds, metric, arms, control, title, ylabel):
    """One metric, one column per arm: seeds as points, their mean as a bar."""
    figure, axis = plt.subplots()
    names = [arm for arm in arms if seeds[seeds.arm == arm][metric].notna().any()]
    for place, arm in enumerate(names):
        values = seeds[seeds.arm == arm][metric].dropna()
        colour = colour_of(arm, arms, control)
        axis.plot(np.full(len(values), place), values, "o", color=colour, alpha=0.8)
        axis.plot([place - 0.25, place + 0.25], [values.mean()] * 2, color=colour, linewidth=3)
    axis.set_xticks(range(len(names)), names)
    axis.set(title=_wrapped(title), ylabel=ylabel, xlim=(-0.6, len(names) - 0.4))
    return figure


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
    axis.set(
        ylabel="win rate with noise minus without (points)",
        title="Controlling for length removes most of the published Alpaca gain",
    )
    axis.legend()
    return figure
