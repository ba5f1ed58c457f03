"""What all figures of results share, and those of the noise itself (notebook 2).

Every figure is 6.4 inches wide and its text has 9 points or more, so that a phone shows it
readably: panels stand below each other, and words stand above the row that they name. It is saved
as PNG and SVG under the number of the notebook that makes it; the look is that of `run_plots`.
"""

import textwrap

import matplotlib.pyplot as plt
import numpy as np

from neft_utils.base.paths import BASE
from neft_utils.compare.run_plots import BASELINE, COLOURS, UNTRAINED, styled
from neft_utils.compare.words import capital, plain

WIDTH, DPI = 6.4, 180  # inches; dots per inch


def save(figure, folder, name, alt):
    """Save as <folder>/<name>.png and .svg, alt text inside, and close it.

    Returns the PNG as an IPython image: at the end of a cell it shows what was saved.
    """
    from IPython.display import Image

    folder.mkdir(parents=True, exist_ok=True)
    # Sharp on a phone's dense screen. No dates: the same numbers shall give the same bytes.
    about = {"Description": alt, "Software": None}
    figure.savefig(folder / f"{name}.png", dpi=DPI, metadata=about)
    figure.savefig(folder / f"{name}.svg", metadata={"Description": alt, "Date": None})
    plt.close(figure)
    return Image(filename=str(folder / f"{name}.png"), width=640, alt=alt)


# ------------------------------------------------------------------------------------ words


def titled(figure, title):
    """The finding, above everything and over the whole width."""
    figure.suptitle(textwrap.fill(title, 72), x=0.01, ha="left", fontsize=12)


def words_of(arm, profile):
    """What a reader calls an arm: "noise, α = 15", "LoRA dropout 0.1", "no noise".

    Its name where two arms would be called the same.
    """
    if arm == BASE:
        return "before fine-tuning"
    called = {name: _words(name, profile) for name in profile.arms}
    alone = list(called.values()).count(called[arm]) == 1
    return called[arm] if alone else arm


def _words(arm, profile):
    change = profile.arms[arm]
    noisy = any(one.noise_alpha for one in profile.arms.values())
    said = []
    if change.noise_alpha:
        kind = "noise" if change.distribution == "uniform" else f"{change.distribution} noise"
        place = {"all": "", "prompt": " on the prompt", "response": " on the response"}
        rule = {"sequence": "", "padded": ", padded length", "packed": ", packed length"}
        said.append(f"{kind}{place[change.where]}, α = {change.noise_alpha:g}{rule[change.length]}")
    control = noisy and not change.noise_alpha and arm == profile.confirmatory.control
    if not control:  # what the control has, all have
        parts = {
            "learning rate {:g}": change.learning_rate,
            "{} epochs": change.epochs,
            "batches of {}": change.batch_size,
            "LoRA rank {}": change.lora_rank,
            "LoRA dropout {:g}": change.lora_dropout,
            "weight decay {:g}": change.weight_decay,
        }
        said += [text.format(value) for text, value in parts.items() if value]
    if not said:
        said = ["no noise" if noisy else "the profile's recipe"]
    if change.data_fraction < 1:
        said.append(f"{change.data_fraction:.0%} of the rows")
    return ", ".join(said)


def headline(arm_words, what, verdict):
    """A title: what is seen of an arm. `what` names the quantity where the verdict does not."""
    named = verdict.taken_back or (verdict.interval is not None and verdict.outcome != "not_seen")
    return capital(f"{arm_words}: {verdict}" if named else f"{what} with {arm_words}: {verdict}")


def directions(quantity):
    """An axis label of a difference: its unit between what less and more of it mean."""
    low, high = quantity.lower, quantity.higher
    if quantity.better:
        low, high = ("better", "worse")[:: -quantity.better]
    return f"← {low}      with minus without, {plain(quantity.unit)}      {high} →"


# ------------------------------------------------------------------------------------- look


def colour_of(arm, arms, control):
    """Grey for the control, light grey for the untrained base, a colour per other arm."""
    if arm in (BASE, control):
        return UNTRAINED if arm == BASE else BASELINE
    others = [name for name in arms if name not in (BASE, control)]
    return COLOURS[others.index(arm) % len(COLOURS)]


def label_rows(axis, labels, places):
    """Words above the rows of an axis without ticks: they may be as long as the figure is wide."""
    for text, place in zip(labels, places, strict=True):
        where = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points"}
        ground = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}  # a line may pass below
        axis.annotate(text, (0, place), (2, 8), va="bottom", bbox=ground, **where)
    axis.set(yticks=[], ylim=(min(places) - 0.3, max(places) + 0.8))
    axis.spines["left"].set_visible(False)


# --------------------------------------------------------------------------------- notebook 2


@styled
def noise_energy(lengths, sizes, energies, noise_alpha):
    """Squared noise norm of a sequence against its length, one marker per embedding size."""
    figure, axis = plt.subplots()
    expected = noise_alpha**2 / 3
    axis.axhline(expected, color="black", linewidth=1)
    for number, (marker, d) in enumerate(zip("osD^", sizes, strict=False)):
        beside = np.asarray(lengths) * 1.13 ** (number - (len(sizes) - 1) / 2)  # or they coincide
        axis.plot(beside, energies[d], marker, label=f"d = {d}", color=COLOURS[number])
    axis.set(
        xscale="log",
        ylim=(0, 1.4 * expected),
        xlabel="tokens in the sequence, L",
        ylabel="energy of the noise, ‖noise‖²",
    )
    axis.set_xticks(lengths, lengths)
    axis.minorticks_off()
    figure.legend(loc="outside lower left", ncols=len(sizes))
    worst = max(abs(float(one) / expected - 1) for d in sizes for one in energies[d])
    titled(
        figure,
        f"Whatever the length of a sequence and the size d of the embedding, the noise's energy"
        f" is within {100 * worst:.1f} % of α²/3 = {expected:.4g}",
    )
    return figure


@styled
def effective_alpha(lengths, widths, noise_alpha):
    """Share of the intended α that a sequence gets when L is the width of its batch row."""
    figure, axis = plt.subplots(figsize=(WIDTH, 4.4))
    grid = np.arange(16, 513)
    low, middle, high = np.quantile(lengths, [0.05, 0.5, 0.95])
    axis.axvspan(low, high, color="#F0F0F0", zorder=0, label="nine tenths of our examples")
    axis.axhline(noise_alpha, color=BASELINE, label="paper: each sequence's own length")
    for colour, width in zip(COLOURS, widths, strict=False):
        values = noise_alpha * np.sqrt(np.minimum(grid / width, 1))
        inside = grid <= width
        axis.plot(grid[inside], values[inside], color=colour, label=f"row of {width} tokens")
    axis.set(
        xlabel="tokens in the sequence",
        ylabel="effective α",
        ylim=(0, noise_alpha * 1.1),
    )
    figure.legend(loc="outside lower left", ncols=2)
    left = noise_alpha * np.sqrt(np.minimum(middle / np.array([min(widths), max(widths)]), 1))
    titled(
        figure,
        f"With the row's width in place of its length, our median example gets not"
        f" α = {noise_alpha:g} but {left[0]:.1f} (row of {min(widths)} tokens) to {left[1]:.1f}"
        f" ({max(widths)} tokens)",
    )
    return figure


@styled
def library_rules(table, noise_alpha):
    """Median and p10-p90 of effective α by rule; table: one row a rule, columns p10, p50, p90."""
    figure, axis = plt.subplots(figsize=(WIDTH, 1.6 + 0.46 * len(table)))
    places = np.arange(len(table))[::-1]
    low, middle, high = table.to_numpy().T
    axis.axvline(noise_alpha, color=BASELINE, linewidth=1)
    axis.hlines(places, low, high, color=COLOURS[0], linewidth=3)
    axis.plot(middle, places, "o", color="black")
    labels = [f"{rule}: {value:.3g}" for rule, value in zip(table.index, middle, strict=True)]
    label_rows(axis, labels, places)
    # Linear below 1, so that no noise at all has a place.
    axis.set_xscale("symlog", linthresh=1, linscale=0.5)
    ticks = [0, 1, noise_alpha, 10, 100]
    axis.set_xticks(ticks, [f"{one:g}" for one in ticks])
    axis.minorticks_off()
    axis.set_xlim(-0.15, 1.6 * high.max())
    axis.set_xlabel("← less noise      effective α: median, middle 80 % as a bar      more →")
    titled(
        figure,
        f"One α = {noise_alpha:g}, {len(table)} rules: what arrives at a median sequence is α ="
        f" {middle.min():.3g} to {middle.max():.3g}",
    )
    return figure
