"""The picture of `overfitting`: held-out loss against training loss, one curve an arm."""

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.lines import Line2D

from neft_utils.compare import curves
from neft_utils.compare.plots import WIDTH, colour_of, titled, words_of
from neft_utils.compare.run_plots import BASELINE, styled
from neft_utils.compare.words import capital

ALT = (
    "Loss on held-out rows against loss on training rows, one curve an arm, from before training on"
    " the left to its end on the right; thin lines are single runs."
)


@styled
def held_out_against_training(found, profile, title):
    """Validation content NLL against training content NLL: seeds thin, an arm's mean thick.

    found: of `curves.read`. Training goes to the right, as its loss falls; the lower curve at the
    same place is better there. A ring marks the mean's best epoch, a square the end of training.
    Means are over the seeds that all arms have, since the rows of some seeds are harder than those
    of others (over all of an arm's, where they share none), and over epochs that all of these have.
    """
    figure, axis = plt.subplots(figsize=(WIDTH, 5.4))
    arms = [arm for arm in profile.arms if any(arm == name for name, _ in found)]
    shared = set.intersection(*({s for name, s in found if name == arm} for arm in arms))
    handles = []
    for arm in arms:
        colour = colour_of(arm, list(profile.arms), profile.confirmatory.control)
        tables = {s: curves.by_epoch(curve) for (name, s), curve in found.items() if name == arm}
        for table in tables.values():
            line = {"color": colour, "linewidth": 0.7, "alpha": 0.45}
            axis.plot(
                table[f"{curves.TRAIN}_content"], table[f"{curves.VALIDATION}_content"], **line
            )
        some = [table for seed, table in tables.items() if seed in shared or not shared]
        mean = pd.concat(some).groupby(level=0)
        mean = mean.mean()[mean.size() == len(some)]
        x, y = (mean[f"{split}_content"] for split in (curves.TRAIN, curves.VALIDATION))
        axis.plot(x, y, ".-", color=colour, linewidth=2.2, markersize=6)
        best, mark = y.idxmin(), {"color": colour, "zorder": 5, "linestyle": ""}
        axis.plot(x[best], y[best], "o", markersize=10, markerfacecolor="none", **mark)
        axis.plot(x.iloc[-1], y.iloc[-1], "s", markersize=7, **mark)
        runs = f"{len(tables)} runs" if len(tables) > 1 else "one run"
        label = f"{words_of(arm, profile)} ({runs})"
        handles.append(Line2D([], [], color=colour, linewidth=2.2, label=label))
    axis.invert_xaxis()
    axis.set(
        xlabel="loss on the training rows, nats per token (training goes this way →)",
        ylabel="loss on held-out rows, nats per token (↓ better)",
    )
    titled(figure, title)
    grey = {"color": BASELINE, "linestyle": ""}
    handles.append(Line2D([], [], marker="o", markerfacecolor="none", label="best epoch", **grey))
    handles.append(Line2D([], [], marker="s", label="end of training", **grey))
    handles.append(Line2D([], [], color=BASELINE, linewidth=0.7, label="thin: single runs"))
    if shared:
        seeds = ", ".join(map(str, sorted(shared)))
        thick = (
            f"thick: mean of seed {seeds}" if len(shared) == 1 else f"thick: mean of seeds {seeds}"
        )
        handles.append(Line2D([], [], color=BASELINE, linewidth=2.2, label=thick))
    figure.legend(handles=handles, loc="outside lower left", ncols=2, fontsize=9)
    return figure


def finding(compared, profile):
    """A title: what the confirmatory treatment shows at equal training loss, else the first arm.

    compared: `overfitting.comparisons`, at least one.
    """
    wanted = [o for o in compared if (o.moment, o.measure) == ("equal_fit", "content_nll")]
    treatment = profile.confirmatory.treatment
    one = next((o for o in wanted if o.contrast.treatment == treatment), wanted[0])
    words = words_of(one.contrast.treatment, profile)
    return f"{capital(words)}, control stopped at equal training loss: {one.verdict}"
