"""One run's losses by epoch: how well it fits, when it was best, when it fitted as another one.

They come from losses_by_epoch.csv, a line per scored row and epoch, noise and dropout off. The
*end* is the loss of the end-of-turn token, the *content* that of the tokens before it, as in
`compare.metrics`: the end counts once a row, the content once a token.
"""

import numpy as np
import pandas as pd

from neft_utils.base.strict import ConfigError
from neft_utils.compare.end_of_turn import content_nll

COLUMNS = ["epoch", "split", "row", "n_tokens", "nll", "end_nll"]
TRAIN, VALIDATION = "train", "validation"


def curve_of(run):
    """A run's table with its content apart, or None where the run has no such file.

    run: of `runs.load_runs`. DataFrame epoch, split, row, n_tokens (of the response, its end
    included), end_nll (nats) and content_nll (nats per token; NaN for a response that is its end
    alone). Raises ConfigError of one line, which names the run, for missing columns, losses that
    are not finite, and epochs that have not all the same rows.
    """
    table = run["curve"]
    if table is None or table.empty:
        return None
    about = run["provenance"]
    file = f"losses_by_epoch.csv of run {about['arm']}-s{about['seed']}"
    if missing := [column for column in COLUMNS if column not in table]:
        raise ConfigError(f"{file} has no {', '.join(missing)}: run make reproduce")
    losses = table[["nll", "end_nll"]].apply(pd.to_numeric, errors="coerce")
    bad = ~np.isfinite(losses).all(axis=1)
    if bad.any():
        raise ConfigError(
            f"{file} has losses that are no numbers from epoch {table.epoch[bad].min()} on: lower"
            " the learning rate and train it again"
        )
    keys = table[["epoch", "split", "row"]]
    sizes = keys.groupby(["split", "row"]).epoch.agg(["size", "nunique"])
    epochs = keys.groupby("split").epoch.nunique()
    if (
        not (sizes["size"] == sizes["nunique"]).all()
        or not (
            sizes["nunique"] == epochs.reindex(sizes.index.get_level_values("split")).array
        ).all()
    ):
        raise ConfigError(f"{file} has not the same rows at every epoch: delete the run's folder")
    losses = losses.assign(n_tokens=table.n_tokens.astype(float))
    losses["content_nll"] = content_nll(losses)
    table = keys.join(losses[["n_tokens", "end_nll", "content_nll"]])
    return table.sort_values(["split", "epoch", "row"], ignore_index=True)


def read(runs):
    """{(arm, seed): `curve_of`} of the runs that scored their training rows on the way too."""
    found = {}
    for key, run in runs.items():
        curve = curve_of(run)
        if curve is not None and {TRAIN, VALIDATION} <= set(curve.split):
            found[key] = curve
    return found


def rows_at(curve, split, epoch):
    """Losses of a split's rows at an epoch: DataFrame by row, columns content_nll, end_nll, tokens.

    epoch: one that was scored, or a number between two of them, where every row's loss lies on the
    straight line between its losses at the two. tokens: of the content, its weight. Raises
    ValueError outside the scored epochs.
    """
    some = curve[curve.split == split]
    scored = np.sort(some.epoch.unique())
    if len(scored) == 0 or not scored[0] <= epoch <= scored[-1]:
        raise ValueError(f"epoch {epoch} lies outside the scored ones {scored.tolist()}")
    after = int(np.searchsorted(scored, epoch))
    before = max(after - 1, 0)
    span = scored[after] - scored[before]
    share = (epoch - scored[before]) / span if span else 0.0
    sides = [some[some.epoch == scored[i]].set_index("row") for i in (before, after)]
    found = sides[1][["n_tokens"]].rename(columns={"n_tokens": "tokens"}) - 1
    for name in ("content_nll", "end_nll"):
        found[name] = (1 - share) * sides[0][name] + share * sides[1][name]
    return found


def by_epoch(curve):
    """Means of the scored rows: DataFrame by epoch, a column `<split>_content` and `<split>_end`.

    Content weighs rows by their tokens, the end weighs rows alike; nats per token and nats.
    """
    out = {}
    for split, some in curve.groupby("split", sort=False):
        weight = (some.n_tokens - 1).where(some.content_nll.notna())
        sums = (some.content_nll * weight).groupby(some.epoch).sum()
        out[f"{split}_content"] = sums / weight.groupby(some.epoch).sum()
        out[f"{split}_end"] = some.end_nll.groupby(some.epoch).mean()
    return pd.DataFrame(out).sort_index()


def best_epoch(curve):
    """The scored epoch with the least validation content NLL, the first of equals.

    The untrained model is epoch 0 and may be the best. The choice is made on the rows that it is
    then judged by, so the loss there is too low by what chance gives the least of several values:
    little where the curve has one clear bottom, and about the same for arms that are scored equally
    often. Between scored epochs there may be a better one.
    """
    return int(by_epoch(curve)[f"{VALIDATION}_content"].idxmin())


def last_epoch(curve):
    """The last scored epoch, which is the end of training."""
    return int(curve.epoch.max())


def epoch_of_equal_fit(control, loss):
    """Where a control's training content NLL first comes down to `loss`: an epoch, or None.

    control: its `curve_of`; loss: nats per token, the other run's. Straight lines between the
    scored epochs, so the epoch is a real number; None where the control never fits so well, or
    fitted better before training began.
    """
    levels = by_epoch(control)[f"{TRAIN}_content"]
    epochs, values = levels.index.to_numpy(dtype=float), levels.to_numpy()
    for i in range(len(values)):
        if values[i] == loss:
            return float(epochs[i])
        if i + 1 < len(values) and values[i] > loss > values[i + 1]:
            share = (values[i] - loss) / (values[i] - values[i + 1])
            return float(epochs[i] + share * (epochs[i + 1] - epochs[i]))
    return None
