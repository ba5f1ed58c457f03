"""Pictures of the notebooks that make data and runs, and the look that all figures share.

They have a module to themselves because notebooks 1, 3 and 4 import it: a change of any other
figure shall not redo training. Colours are Okabe & Ito's, which colour-blind readers can tell
apart.
"""

import functools
import io
import textwrap

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.patches import FancyBboxPatch
from matplotlib.ticker import MaxNLocator

from neft_utils.base.steps import CHAIN

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


def styled(function):
    """Draw under STYLE and leave the reader's own matplotlib settings alone."""

    @functools.wraps(function)
    def drawn(*args, **kwargs):
        with plt.rc_context(STYLE):
            return function(*args, **kwargs)

    return drawn


def wrapped(title):
    """A title in lines that a figure is wide enough for."""
    return textwrap.fill(title, 66)


def shown(figure, alt, dpi=110):
    """The figure as an IPython image for the end of a cell, closed and saved nowhere."""
    from IPython.display import Image
    from PIL import Image as Picture

    drawn, small = io.BytesIO(), io.BytesIO()
    figure.savefig(drawn, dpi=dpi)
    plt.close(figure)
    # Every run has an executed copy that carries it: 32 colours take a third of the bytes.
    Picture.open(drawn).convert("RGB").quantize(32).save(small, "PNG", optimize=True)
    return Image(data=small.getvalue(), format="png", width=640, alt=alt)


@styled
def funnel(steps):
    """How many rows each filter leaves. steps: the manifest's funnel, a list of {step, rows}."""
    figure, axis = plt.subplots(figsize=(6.4, 0.9 + 0.24 * len(steps)))
    # Names of files stand there, and a dollar sign would begin a formula.
    names = [one["step"].replace("$", r"\$") for one in steps]
    rows = [one["rows"] for one in steps]
    places = np.arange(len(steps))[::-1]
    lost = [0, *(before - after for before, after in zip(rows, rows[1:], strict=False))]
    axis.barh(places, rows, color=COLOURS[0])
    axis.barh(places, lost, left=rows, color="#F0F0F0")
    for place, count in zip(places, rows, strict=True):
        axis.annotate(f"{count:,}", (count, place), (3, -3), textcoords="offset points", fontsize=9)
    axis.set_yticks(places, names, fontsize=9)
    axis.set(xlabel="rows left (light: removed by this filter)", xlim=(0, 1.15 * max(rows)))
    title = f"Of {rows[0]:,} rows {rows[-1]:,} pass every filter"
    figure.suptitle(title, x=0.01, ha="left", fontsize=STYLE["axes.titlesize"])
    axis.grid(axis="y", visible=False)
    return figure


@styled
def training_curve(log):
    """Loss of each optimiser step, and clean validation NLL where it was measured.

    log: train_log.csv of a run, columns epoch, train_loss and validation_nll (nats per token).
    """
    figure, axis = plt.subplots()
    noisy = log.dropna(subset="train_loss")
    window = max(2, len(noisy) // 8)
    smooth = noisy.train_loss.rolling(window, min_periods=1, center=True).mean()
    axis.plot(noisy.epoch, noisy.train_loss, color=UNTRAINED, linewidth=1, label="training, a step")
    label = f"training, mean of {window} steps"
    axis.plot(noisy.epoch, smooth, color=BASELINE, linewidth=2, label=label)
    clean = log.dropna(subset="validation_nll")
    axis.plot(
        clean.epoch, clean.validation_nll, "o-", color=COLOURS[0], label="validation, noise off"
    )
    first, last = clean.validation_nll.iloc[[0, -1]]
    axis.set(
        xlabel="epoch",
        ylabel="NLL (nats per response token)",
        title=wrapped(
            f"Validation NLL goes from {first:.3f} to {last:.3f}, measured without noise"
        ),
    )
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.legend(loc="outside lower center", ncols=3)  # below: nowhere over the data
    return figure


@styled
def loss_spread(losses):
    """NLL of every example, one column per split, with the mean as a bar.

    losses: losses.csv of a run, columns split and nll.
    """
    figure, axis = plt.subplots()
    rng = np.random.default_rng(0)
    names = list(dict.fromkeys(losses.split))
    for place, name in enumerate(names):
        values = losses.nll[losses.split == name]
        spread = place + rng.uniform(-0.18, 0.18, len(values))
        axis.plot(spread, values, "o", color=COLOURS[0], alpha=0.35, markersize=3)
        axis.plot([place - 0.3, place + 0.3], [values.mean()] * 2, color="black", linewidth=2)
    axis.set_xticks(range(len(names)), names)
    within = losses.groupby("split").nll.std().mean()
    axis.set(
        ylabel="NLL (nats per response token)",
        title=wrapped(
            f"Examples of one split differ by {within:.1f} nats (standard deviation; black: mean)"
        ),
    )
    return figure


# ---------------------------------------------------------------------------- the pipeline

# Below the way of the data, above what explains it: as the steps are declared.
BOXES = {one.number: one for one in CHAIN if one.place}
WORDS = {number: f"{number} {one.label}" for number, one in BOXES.items()}
ARROWS = [(start, number) for number, one in BOXES.items() for start in one.after]
PER_RUN = [number for number, one in BOXES.items() if one.per_run]
WIDTH, HEIGHT = 1.06, 0.44
HERE, BOX = COLOURS[0], "#F0F0F0"
PIPELINE = (
    f"Notebooks and where each leads: {', '.join(f'{WORDS[a]} to {WORDS[b]}' for a, b in ARROWS)};"
    f" {' and '.join(WORDS[number] for number in PER_RUN)} once per arm and seed."
)


def pipeline(here=None):
    """Figure of the notebooks 0 to 7 and what feeds what; `here`: the number to point out."""
    with plt.rc_context({**STYLE, "figure.constrained_layout.use": False}):
        figure = plt.figure(figsize=(6.4, 1.9))
        axis = figure.add_axes((0, 0, 1, 1))
        axis.set(xlim=(0, 6.4), ylim=(-0.55, 1.35))
        axis.set_axis_off()
        first, last = (BOXES[number].place[0] for number in (PER_RUN[0], PER_RUN[-1]))
        around = FancyBboxPatch(
            (first - WIDTH / 2 - 0.1, -0.5),
            last - first + WIDTH + 0.2,
            0.86,
            boxstyle="round,pad=0,rounding_size=0.1",
            linestyle="--",
        )
        around.set(facecolor="none", edgecolor=BASELINE)
        axis.add_patch(around)
        middle = (first + last) / 2
        axis.text(middle, -0.43, "once per arm and seed", ha="center", fontsize=9, color="#555555")
        for start, end in ARROWS:
            (x, y), (to_x, to_y) = BOXES[start].place, BOXES[end].place
            right, up = (to_x > x) - (to_x < x), (to_y > y) - (to_y < y)
            axis.annotate(
                "",
                (to_x - right * WIDTH / 2, to_y - up * HEIGHT / 2),
                (x + right * WIDTH / 2, y + up * HEIGHT / 2),
                arrowprops={"arrowstyle": "-|>", "color": BASELINE, "shrinkA": 1, "shrinkB": 1},
            )
        for number, (x, y) in ((number, one.place) for number, one in BOXES.items()):
            box = FancyBboxPatch(
                (x - WIDTH / 2, y - HEIGHT / 2),
                WIDTH,
                HEIGHT,
                boxstyle="round,pad=0,rounding_size=0.08",
                facecolor=HERE if number == here else BOX,
                edgecolor=HERE if number == here else BASELINE,
            )
            axis.add_patch(box)
            colour = "white" if number == here else "black"
            weight = "bold" if number == here else "normal"
            axis.text(x, y, WORDS[number], ha="center", va="center", color=colour, weight=weight)
    return figure


def you_are_here(number):
    """The pipeline with one notebook pointed out, as an image for the end of a cell."""
    return shown(pipeline(number), f"{PIPELINE} You are here: {WORDS[number]}.")
