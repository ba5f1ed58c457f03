"""Figures of arms against their controls (notebook 5); saved by `plots.save`."""

import textwrap

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator
from scipy.stats import rankdata

from neft_utils.base.paths import BASE
from neft_utils.compare.plots import (
    WIDTH,
    colour_of,
    directions,
    headline,
    label_rows,
    titled,
    words_of,
)
from neft_utils.compare.run_plots import BASELINE, COLOURS, styled
from neft_utils.compare.words import capital, size

AGAINST = COLOURS[5]  # a difference opposite to the claim


@styled
def learning_curves(runs, profile, verdict):
    """Clean validation loss after each epoch, and what each seed pair differs by at its best.

    Arms lie close together beside what training does, so the second panel subtracts the run of the
    same seed of the arm's own control, each at the epoch where it is best. runs: from
    `runs.load_runs`; verdict: of the confirmatory treatment's `best_validation_nll`.
    """
    main = profile.confirmatory
    curves = {
        key: run["log"].dropna(subset="validation_nll").set_index("epoch").validation_nll
        for key, run in runs.items()
        if run["log"] is not None and key[0] in profile.arms
    }
    controls, rows = {arm: profile.control_of(arm) for arm in profile.arms}, {}
    for arm, control in controls.items():
        seeds = [s for name, s in curves if name == arm and (control, s) in curves]
        if arm not in controls.values() and seeds:
            rows[arm] = [curves[arm, s].min() - curves[control, s].min() for s in seeds]
    figure, (top, bottom) = plt.subplots(
        2,
        figsize=(WIDTH, 4.2 + 0.45 * max(len(rows), 1)),
        height_ratios=(2.6, 0.5 + 0.45 * max(len(rows), 1)),
    )
    names = {main.control: BASELINE, main.treatment: COLOURS[0]}
    for (arm, _), curve in sorted(curves.items(), key=lambda one: one[0][0] in names):
        colour = names.get(arm, COLOURS[4])
        width = 1.5 if arm in names else 0.8
        top.plot(curve.index, curve, "o-", color=colour, linewidth=width, markersize=3.5)
    top.set(xlabel="epoch", ylabel="nats per token (↓ better)")
    top.set_title("Validation loss, noise off: a line a run", fontsize=10)
    top.xaxis.set_major_locator(MaxNLocator(integer=True))
    bottom.axvline(0, color=BASELINE, linewidth=1)
    places = np.arange(len(rows))[::-1]
    for place, (arm, values) in zip(places, rows.items(), strict=True):
        colour = names.get(arm, COLOURS[4])
        bottom.plot(values, [place] * len(values), "o", color=colour, alpha=0.8)
        bottom.plot(np.mean(values), place, "|", color="black", markersize=13)
    if rows:
        label_rows(bottom, [_against(arm, profile) for arm in rows], places)
    bottom.set_title("Lowest validation loss, a point a seed pair, | their mean", fontsize=10)
    bottom.set_xlabel(directions(verdict.quantity))
    seen = {arm for arm, _ in curves}
    handles = [
        Line2D([], [], marker="o", color=colour, label=words_of(arm, profile))
        for arm, colour in names.items()
        if arm in seen
    ]
    if seen - set(names):
        handles.append(Line2D([], [], marker="o", color=COLOURS[4], label="other arms"))
    figure.legend(handles=handles, loc="outside lower left", ncols=3)
    arm = words_of(main.treatment, profile)
    titled(figure, headline(arm, "lowest validation loss", verdict))
    return figure


def _against(arm, profile):
    """An arm in words, with its control where that is not the profile's."""
    control = profile.control_of(arm)
    if control == profile.confirmatory.control:
        return words_of(arm, profile)
    return f"{words_of(arm, profile)}, against {words_of(control, profile)}"


@styled
def seed_pairs(panels):
    """Each primary difference, a panel: seed pairs as points, below them the mean and its interval.

    panels: list of (`claims.Finding`, its deltas from `tables.paired`). Zero is no effect.
    """
    figure, axes = plt.subplots(
        len(panels), figsize=(WIDTH, 0.7 + 1.75 * len(panels)), squeeze=False
    )
    for axis, (found, deltas) in zip(axes[:, 0], panels, strict=True):
        interval, about = found.interval, found.verdict.quantity
        weighted = (deltas.delta * deltas.weight).groupby(deltas.seed).sum()
        means = weighted / deltas.groupby("seed").weight.sum()
        axis.axvline(0, color=BASELINE, linewidth=1)
        axis.plot([size(x, about.unit) for x in means], [1] * len(means), "o", color=COLOURS[0])
        ends = [interval.ci_low, interval.ci_high]
        if np.isfinite(interval.ci_low):
            axis.plot([size(x, about.unit) for x in ends], [0, 0], color="black", linewidth=2)
        axis.plot(size(interval.estimate, about.unit), 0, "D", color="black")
        axis.set_yticks([1, 0], ["seed pairs", "mean"])
        axis.set(ylim=(-0.6, 1.6), xlabel=directions(about))
        axis.grid(axis="y", visible=False)
        said = textwrap.fill(f"Here: {found.verdict}", 74)
        axis.set_title(f"Claim: {found.claim.text}\n{said}", fontsize=10, x=-0.13)
    verdicts = [found.verdict for found, _ in panels]
    titled(figure, f"With noise minus without: {_counted(verdicts, 'claims fixed beforehand')}")
    return figure


def _counted(verdicts, what):
    """How many claims show a difference, and of these how many the claimed one."""
    with_interval = [one for one in verdicts if one.testable]
    if not with_interval:
        return f"none of {len(verdicts)} {what} has an interval"
    sides = [_side(one) for one in with_interval]
    text = f"a difference is seen in {sum(map(bool, sides))} of {len(sides)} {what}"
    return text + (f", in {sides.count(-1)} against the claim" if -1 in sides else "")


def _side(verdict):
    """1 for a difference as claimed (or none is), -1 for one against the claim, 0 for none seen."""
    if not verdict.seen:
        return 0
    up = 1 if verdict.outcome == "higher" else -1
    return up * verdict.claimed or 1


@styled
def answer_lengths(seeds, arms, profile, verdict):
    """Tokens of an answer, a row an arm: a point a run, runs of a seed joined.

    Geometric means, since the verdict's difference is one of logarithms. seeds: `tables.by_seed`;
    arms: names, BASE too; verdict: of the confirmatory `answer_length`.
    """
    main = profile.confirmatory
    logs = seeds.pivot(index="arm", columns="seed", values="answer_length")
    tokens = np.exp(logs.dropna(how="all"))
    names = [arm for arm in arms if arm in tokens.index]
    tokens = tokens.loc[names]
    figure, axis = plt.subplots(figsize=(WIDTH, 1.6 + 0.6 * len(names)))
    places = np.arange(len(names))[::-1]
    trained = [name != BASE for name in names]
    for seed in tokens:
        of_seed = tokens[seed][trained].to_numpy()
        axis.plot(of_seed, places[trained], "-", color=BASELINE, linewidth=0.8)
    for place, arm in zip(places, names, strict=True):
        values = tokens.loc[arm].dropna()
        colour = colour_of(arm, list(profile.arms), main.control) if arm != BASE else BASELINE
        face = "white" if arm == BASE else colour
        axis.plot(values, [place] * len(values), "o", color=colour, markerfacecolor=face)
        middle = np.exp(np.log(values).mean())
        axis.plot(middle, place, "|", color="black", markersize=18, markeredgewidth=2)
    labels = [textwrap.fill(words_of(arm, profile), 20) for arm in names]
    axis.set_yticks(places, labels)
    axis.set_ylim(-0.5, len(names) - 0.5)
    axis.grid(axis="y", visible=False)
    axis.set_xlabel("tokens of an answer, geometric mean (longer →); lines join seeds, | the mean")
    arm = words_of(main.treatment, profile)
    titled(figure, headline(arm, "length of answers", verdict))
    return figure


MARKS = {"sequence": ("o", "its own"), "padded": ("s", "padded row"), "packed": ("^", "packed row")}


@styled
def dose(table):
    """What noise does to both losses against the noise that arrives: a point a run, seeds joined.

    table: `claims.dose`. Axes are linear below 0.001 nats, so that no effect has a place.
    """
    figure, axes = plt.subplots(2, figsize=(WIDTH, 6.2), sharex=True)
    panels = {
        "train_nll": "Training rows: loss with noise minus without (↑ fitted less well)",
        "test_nll": "Test rows: loss with noise minus without (↑ worse, ↓ better)",
    }
    ends = table[list(panels)].min().min(), table[list(panels)].max().max()
    for axis, (metric, title) in zip(axes, panels.items(), strict=True):
        axis.axhline(0, color=BASELINE, linewidth=1)
        for number, (rule, (mark, said)) in enumerate(MARKS.items()):
            some = table[table.length == rule].sort_values("relative_rms")
            if some.empty:
                continue
            style = {"color": COLOURS[number], "linewidth": 0.7, "markersize": 5, "alpha": 0.85}
            for _, of_seed in some.groupby("seed"):
                axis.plot(of_seed.relative_rms, of_seed[metric], f"{mark}-", **style)
            handle = {"label": f"length: {said}", "linestyle": "", "marker": mark}
            if axis is axes[0]:
                axis.plot([], [], color=COLOURS[number], **handle)
        axis.set_yscale("symlog", linthresh=1e-3)
        low, high = 1.6 * min(ends[0], -2e-4), 2 * max(ends[1], 2e-3)
        axis.set(ylim=(low, high), ylabel="nats per token")
        ticks = [x for x in (-0.1, -0.01, -0.001, 0, 0.001, 0.01, 0.1, 1) if low <= x <= high]
        axis.set_yticks(ticks, [f"{x:g}" for x in ticks])
        axis.set_title(title, fontsize=10)
    _name_doses(axes[0], table)
    axes[1].set(xscale="log", xlim=(0.6 * table.relative_rms.min(), 1.6 * table.relative_rms.max()))
    shares = [x for x in (0.02, 0.05, 0.1, 0.2, 0.5, 1, 2) if _within(x, axes[1].get_xlim())]
    axes[1].set_xticks(shares, [f"{x:g}" for x in shares])
    axes[1].set_xlabel("size of the noise that arrives, as a share of the embedding's (RMS)")
    for axis in axes:
        axis.minorticks_off()
    if table.length.nunique() > 1:
        figure.legend(loc="outside lower left", ncols=3)
    titled(figure, _dose_finding(table))
    return figure


def _within(x, ends):
    return ends[0] <= x <= ends[1]


def _name_doses(axis, table):
    """Each arm's α above its points, or below those of packed rows, which lie near others."""
    for _, some in table.groupby("arm"):
        packed = some.length.iloc[0] == "packed"
        end = some.loc[some.train_nll.idxmin() if packed else some.train_nll.idxmax()]
        place = {"xytext": (4, -14), "ha": "left"} if packed else {"xytext": (-4, 5), "ha": "right"}
        point = (end.relative_rms, end.train_nll)
        text = f"α = {end.noise_alpha:g}"
        axis.annotate(text, point, textcoords="offset points", fontsize=9, **place)


def _dose_finding(table):
    """What the arms' means say of the order; runs of one arm are no further strengths."""
    means = table.groupby("arm")[["relative_rms", "train_nll", "test_nll"]].mean()
    said, numbers = {}, []
    for metric, words in (("train_nll", "training loss"), ("test_nll", "test loss")):
        rank, p = _rank_correlation(means.relative_rms, means[metric])
        way = f"{'higher' if rank > 0 else 'lower'} with more noise" if p < 0.05 else "in no order"
        said.setdefault(way, []).append(words)
        numbers.append(f"{rank:.2f}")
    text = ", ".join(f"{' and '.join(words)}: {way}" for way, words in said.items())
    return capital(
        f"{text} (rank correlation {' and '.join(numbers)} over {len(means)} strengths of noise)"
    )


def _rank_correlation(x, y):
    """(Spearman's correlation, p by permutation: few arms make the usual formula too sure)."""
    ranks = [rankdata(one) - (len(x) + 1) / 2 for one in (x, y)]
    size = np.sqrt((ranks[0] ** 2).sum() * (ranks[1] ** 2).sum())
    drawn = np.random.default_rng(0).permuted(np.tile(ranks[1], (9999, 1)), axis=1) @ ranks[0]
    seen = ranks[0] @ ranks[1]
    return seen / size, (1 + (abs(drawn) > abs(seen) - 1e-9).sum()) / 10_000


@styled
def ledger(findings):
    """Claims with an interval: estimate over detectable effect, turned so that right is as claimed.

    findings: from `claims.ledger`. Where none is claimed, right is better. Returns None
    where no claim has an interval.
    """
    shown = [row for row in findings if row.verdict.testable and not row.claim.quotes]
    if not shown:
        return None
    labels = [textwrap.fill(_label(row), 76) for row in shown]
    places = -np.cumsum([0, *(0.75 + 0.45 * (1 + text.count("\n")) for text in labels[1:])])
    figure, axis = plt.subplots(figsize=(WIDTH, 1.9 - 0.42 * places[-1] + 0.2))
    axis.axvline(0, color="black", linewidth=1)
    kinds = {
        1: (COLOURS[0], "a difference is seen, as claimed"),
        -1: (AGAINST, "seen, against the claim"),
        0: (BASELINE, "not seen, or not after correction"),
    }
    for place, row in zip(places, shown, strict=True):
        one, sign = row.interval, row.claim.claimed or row.verdict.quantity.better or 1
        low, mean, high = (
            sign * x / one.detectable for x in (one.ci_low, one.estimate, one.ci_high)
        )
        colour, _ = kinds[_side(row.verdict)]
        axis.plot([low, high], [place, place], color=colour, linewidth=2)
        face = colour if row.verdict.seen else "white"
        axis.plot(mean, place, "o", color=colour, markerfacecolor=face)
    label_rows(axis, labels, places)
    axis.set_xlabel(
        "← against the claim      as claimed →\n"
        "difference, in units of the smallest one found four times out of five"
    )
    sides = {_side(row.verdict) for row in shown}
    for side, (colour, text) in kinds.items():
        if side not in sides:
            continue
        face = colour if side else "white"
        axis.plot([], [], "o-", color=colour, markerfacecolor=face, label=text)
    figure.legend(loc="outside lower left", ncols=2)
    titled(figure, capital(_counted([row.verdict for row in shown], "claims with an interval")))
    return figure


def _label(row):
    """A claim, and what the right side is where it names no direction."""
    return row.claim.text + ("" if row.claim.claimed else " (→ better)")
