"""One function per figure: the finding as title, seeds as points, baseline grey.

Every figure is saved as PNG and SVG under the number of the notebook that makes it; the look
is that of `run_plots`.
"""

import textwrap

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import MaxNLocator

from neft_utils.base.paths import BASE
from neft_utils.compare.run_plots import BASELINE, COLOURS, UNTRAINED, styled, wrapped
from neft_utils.compare.words import plain, size


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


@styled
def noise_energy(lengths, sizes, energies, noise_alpha):
    """Squared noise norm of a sequence against its length, one marker per embedding size."""
    figure, axis = plt.subplots()
    for marker, d in zip("osD^", sizes, strict=False):
        axis.plot(lengths, energies[d], marker, label=f"d = {d}", color=COLOURS[sizes.index(d)])
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
def learning_curves(runs, controls, control, title):
    """Clean validation NLL after each epoch: every run, and every seed pair's difference.

    Arms lie close together beside what training does, so the second panel subtracts the run of
    the same seed of the arm's own control. runs: from `runs.load_runs`; controls: {arm: the
    arm that it is compared with}; control: the confirmatory one, drawn grey.
    """
    arms = list(controls)
    figure, (left, right) = plt.subplots(1, 2, figsize=(8.4, 3.8))
    curves = {
        key: run["log"].dropna(subset="validation_nll").set_index("epoch").validation_nll
        for key, run in runs.items()
        if run["log"] is not None and key[0] in arms
    }
    for (arm, seed), curve in curves.items():
        style = {"color": colour_of(arm, arms, control), "alpha": 0.75, "markersize": 4}
        left.plot(curve.index, curve, "o-", **style)
        own = (controls[arm], seed)
        if arm not in controls.values() and own in curves:
            difference = curve - curves[own]
            right.plot(difference.index, difference, "o-", **style)
    for arm in arms:
        left.plot([], [], "o-", color=colour_of(arm, arms, control), label=arm)
    right.axhline(0, color=BASELINE, linewidth=1)
    left.set(ylabel="validation NLL, noise off (nats/token)")
    right.set(ylabel="NLL minus control, same seed")
    for axis in (left, right):
        axis.set(xlabel="epoch")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    left.legend()
    figure.suptitle(wrapped(title), x=0.01, ha="left", fontsize=11)
    return figure


@styled
def seed_pairs(panels):
    """Each primary difference, a panel: seed pairs as points beside the mean with its interval.

    panels: list of (`claims.Finding`, its deltas from `tables.paired`). Zero is no effect.
    """
    figure, axes = plt.subplots(1, len(panels), figsize=(4.2 * len(panels), 3.8), squeeze=False)
    for axis, (found, deltas) in zip(axes[0], panels, strict=True):
        interval, unit = found.interval, found.verdict.quantity.unit
        weighted = (deltas.delta * deltas.weight).groupby(deltas.seed).sum()
        means = weighted / deltas.groupby("seed").weight.sum()
        axis.axhline(0, color=BASELINE, linewidth=1)
        axis.plot(range(len(means)), [size(x, unit) for x in means], "o", color=COLOURS[0])
        axis.set_xticks([*range(len(means)), len(means)], [*map(str, means.index), "mean"])
        where, ends = len(means), [interval.ci_low, interval.ci_high]
        if np.isfinite(interval.ci_low):
            axis.plot([where, where], [size(x, unit) for x in ends], color="black", linewidth=2)
        axis.plot(where, size(interval.estimate, unit), "D", color="black")
        axis.set_xlim(-0.5, where + 0.5)
        title = textwrap.fill(str(found.verdict), 42 if len(panels) > 1 else 62)
        axis.set(xlabel="seed", ylabel=f"{found.id}, with noise minus without ({plain(unit)})")
        axis.set_title(title, fontsize=9)
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
    axis.set(title=wrapped(title), ylabel=ylabel, xlim=(-0.6, len(names) - 0.4))
    return figure


@styled
def dose(table, title):
    """What noise does to both losses against the noise that arrives: a point a run, by length rule.

    table: `claims.dose`. Axes are linear below 0.001 nats, so that no effect has a place.
    """
    figure, axes = plt.subplots(1, 2, figsize=(8.4, 3.8), sharey=True)
    marks = {
        "sequence": ("o", COLOURS[0]),
        "padded": ("s", COLOURS[1]),
        "packed": ("^", COLOURS[2]),
    }
    for axis, metric, rows in zip(
        axes, ("train_nll", "test_nll"), ("training", "test"), strict=True
    ):
        axis.axhline(0, color=BASELINE, linewidth=1)
        for rule, (marker, colour) in marks.items():
            some = table[table.length == rule]
            axis.plot(some.relative_rms, some[metric], marker, color=colour, label=f"L: {rule}")
        for _, some in table.groupby("arm"):
            packed = some.length.iloc[0] == "packed"  # as much arrives as of a smaller padded α
            end = some.loc[some[metric].idxmin() if packed else some[metric].idxmax()]
            text, place = f"α = {end.noise_alpha:g}", {"xytext": (-6, 3), "ha": "right"}
            if packed:
                place = {"xytext": (6, -8), "ha": "left"}
            point = (end.relative_rms, end[metric])
            axis.annotate(text, point, textcoords="offset points", fontsize=8, **place)
        axis.set_yscale("symlog", linthresh=1e-3)
        axis.set(xscale="log", xlim=(0.03, 0.8), title=f"{rows} rows")
        axis.set_xlabel("noise RMS / embedding RMS")
        axis.set_xticks([0.05, 0.1, 0.2, 0.5], ["0.05", "0.1", "0.2", "0.5"])
        axis.minorticks_off()
    axes[0].set_ylabel("NLL with noise minus without")
    if table.length.nunique() > 1:
        axes[1].legend(*axes[0].get_legend_handles_labels(), loc="upper left")
    figure.suptitle(wrapped(title))
    return figure


@styled
def ledger(findings):
    """Claims with an interval: estimate over detectable effect, filled where a difference is seen.

    findings: from `claims.ledger`.
    """
    shown = [row for row in findings if row.verdict.testable and not row.claim.quotes]
    figure, axis = plt.subplots(figsize=(8.4, 1.2 + 0.42 * max(len(shown), 3)))
    for place, row in enumerate(reversed(shown)):
        numbers = (row.interval.ci_low, row.interval.estimate, row.interval.ci_high)
        low, mean, high = (one / row.interval.detectable for one in numbers)
        colour = COLOURS[0] if row.verdict.seen else BASELINE
        axis.plot([low, high], [place, place], color=colour, linewidth=2)
        face = colour if row.verdict.seen else "white"
        axis.plot(mean, place, "o", color=colour, markerfacecolor=face)
        way = {1: "claimed: →", -1: "claimed: ←", 0: ""}[row.claim.claimed]
        axis.annotate(way, (1.01, place), xycoords=("axes fraction", "data"), va="center")
    axis.axvline(0, color="black", linewidth=1)
    labels = [textwrap.fill(row.claim.text, 44) for row in reversed(shown)]
    axis.set_yticks(range(len(shown)), labels, fontsize=8)
    axis.set_xlabel("difference / smallest effect found four times out of five")
    found = sum(row.verdict.seen for row in shown)
    axis.set_title(
        wrapped(f"A difference is seen for {found} of {len(shown)} claims with an interval")
    )
    return figure
