"""Is noise more than early stopping? Arms compared at three moments of runs that overfit.

A regulariser that works gives a lower loss on held-out rows. A brake on fitting may give that too
at the end of training, merely because the run has not gone so far: stopping the baseline earlier
would have been as good. Three comparisons of a run with its control tell these apart. Each is
of validation rows with noise and dropout off, paired by seed:

- `end`: both at the end of training. No choice is involved, and a brake shows as a gain.
- `best`: each at its own best epoch (`curves.best_epoch`), as somebody would use them who
  validates. The epochs are chosen on the rows that are compared, so each side's loss is a little
  too low; the difference of two such choices is nearly fair. What is left here is worth having.
- `equal_fit`: the treatment at the end of training, the control at the epoch where its training
  content NLL equals the treatment's (`curves.epoch_of_equal_fit`), every row on the straight line
  between the two scored epochs around it. Two biases favour the treatment. Held-out loss against
  training loss bends upwards where a run overfits, so that the straight line lies above the
  control's true loss. And the treatment has ended its schedule, where the falling learning rate by
  itself lowers losses, while the control is caught in mid-course. So no gain here means that noise
  is no more than stopping earlier; a small gain may be the schedule's. A pair whose control never
  fits as the treatment does has no such epoch: it is left out and counted.

Intervals are those of `stats.confirmatory_interval`, over seed pairs and validation rows.
"""

import math
from dataclasses import dataclass

import pandas as pd

from neft_utils.base.strict import ConfigError
from neft_utils.compare import curves, stats
from neft_utils.compare.metrics import quantity
from neft_utils.compare.tables import Contrast
from neft_utils.compare.words import Verdict, verdict

MOMENTS = {
    "end": "both at the end of training",
    "best": "each run at its own best epoch",
    "equal_fit": "control stopped at equal training loss",
}
MEASURES = ("content_nll", "end_nll")


@dataclass(frozen=True)
class Comparison:
    """One arm against its control at one moment, in one measure of the validation rows."""

    contrast: Contrast
    moment: str  # of MOMENTS
    measure: str  # of MEASURES
    pairs: int  # seed pairs that there are
    verdict: Verdict  # its interval has the seed pairs that could be compared

    @property
    def left_out(self):
        """Seed pairs without such an epoch."""
        interval = self.verdict.interval
        return self.pairs - (interval.n_seeds if interval else 0)

    def __str__(self):
        text = f"{self.contrast.treatment}, {MOMENTS[self.moment]}: {self.verdict}"
        if self.left_out:
            text += f" ({self.left_out} of {self.pairs} pairs have no such epoch)"
        return text


def alike(profile, arm):
    """Whether an arm has another one as its control, which trains on the same rows."""
    control = profile.control_of(arm)
    return arm != control and profile.data_fraction(arm) == profile.data_fraction(control)


def pairs_of(found, pair):
    """Seeds of which both the treatment and its one control are there, sorted.

    found: of `curves.read`, here and below; pair: a `tables.Contrast` with one control.
    """
    (control,) = pair.controls
    return sorted(s for arm, s in found if arm == pair.treatment and (control, s) in found)


def epochs_at(found, pair, seed, moment):
    """(epoch of the treatment, epoch of the control) of a seed at a moment, None without one."""
    treatment, control = _sides(found, pair, seed)
    if moment == "best":
        return curves.best_epoch(treatment), curves.best_epoch(control)
    end = curves.last_epoch(treatment)
    if moment == "end":
        return end, curves.last_epoch(control)
    fitted = curves.by_epoch(treatment)[f"{curves.TRAIN}_content"][end]
    epoch = curves.epoch_of_equal_fit(control, fitted)
    return None if epoch is None else (end, epoch)


def deltas(found, pair, moment, measure):
    """Treatment minus control of every validation row, as `tables.paired` has test rows.

    moment: of MOMENTS; measure: of MEASURES. DataFrame seed, example_id (the row's number), delta
    (nats per token, or nats), weight (tokens of the content; 1 for the end); None where no pair has
    such epochs. Raises ConfigError for runs that were scored on different rows.
    """
    frames = []
    for seed in pairs_of(found, pair):
        epochs = epochs_at(found, pair, seed, moment)
        if epochs is None:
            continue
        sides = [
            curves.rows_at(curve, curves.VALIDATION, epoch)
            for curve, epoch in zip(_sides(found, pair, seed), epochs, strict=True)
        ]
        delta = (sides[0][measure] - sides[1][measure]).dropna()
        weight = sides[0].tokens.reindex(delta.index) if measure == "content_nll" else 1.0
        frame = pd.DataFrame({"delta": delta, "weight": weight})
        frames.append(frame.rename_axis("example_id").reset_index().assign(seed=seed))
    if not frames:
        return None
    whole = pd.concat(frames, ignore_index=True)
    rows = whole.groupby("example_id").weight.agg(["size", "nunique"])
    if (rows["size"] != len(frames)).any() or (rows["nunique"] != 1).any():
        raise ConfigError(
            f"{pair}: seeds have different validation rows: run make reproduce, which trains anew"
        )
    return whole


def contrast(found, pair, moment, measure):
    """`stats.Interval` of `deltas`, or None; of one pair it has no ends."""
    frame = deltas(found, pair, moment, measure)
    return None if frame is None else stats.confirmatory_interval(frame)


def comparisons(found, profile):
    """A `Comparison` of every arm with its control at every moment, in every measure.

    Left out are arms without a pair of such runs, and those that train on other rows than their
    control. Not corrected for how many there are.
    """
    out = []
    for arm in profile.arms:
        pair = Contrast(arm, (profile.control_of(arm),))
        if not alike(profile, arm) or not (seeds := pairs_of(found, pair)):
            continue
        for moment in MOMENTS:
            for measure in MEASURES:
                said = verdict(contrast(found, pair, moment, measure), quantity(measure))
                out.append(Comparison(pair, moment, measure, len(seeds), said))
    return out


def as_table(compared):
    """`comparisons` as a DataFrame: treatment, control, moment, measure, estimate, its interval,
    pairs (compared), left_out and verdict."""
    rows = []
    for one in compared:
        interval = one.verdict.interval
        numbers = {
            name: getattr(interval, name, math.nan) for name in ("estimate", "ci_low", "ci_high")
        }
        rows.append(
            {
                "treatment": one.contrast.treatment,
                "control": one.contrast.controls[0],
                "moment": one.moment,
                "measure": one.measure,
                **numbers,
                "pairs": one.pairs - one.left_out,
                "left_out": one.left_out,
                "verdict": one.verdict,
            }
        )
    return pd.DataFrame(rows)


def stops(found, profile):
    """Where each run is best and where it ends: DataFrame, a row a run.

    arm, seed, best_epoch; train_best, validation_best, train_end, validation_end: content NLL at
    the best and at the last epoch; equal_fit: the epoch at which the control of the seed fits as
    this run does at its end (NaN: never, or a control itself).
    """
    rows = []
    for (arm, seed), curve in found.items():
        means, best = curves.by_epoch(curve), curves.best_epoch(curve)
        row = {"arm": arm, "seed": seed, "best_epoch": best}
        for word, epoch in (("best", best), ("end", curves.last_epoch(curve))):
            for split in (curves.TRAIN, curves.VALIDATION):
                row[f"{split}_{word}"] = means.loc[epoch, f"{split}_content"]
        pair, epochs = Contrast(arm, (profile.control_of(arm),)), None
        if alike(profile, arm) and seed in pairs_of(found, pair):
            epochs = epochs_at(found, pair, seed, "equal_fit")
        rows.append({**row, "equal_fit": epochs[1] if epochs else math.nan})
    return pd.DataFrame(rows)


def _sides(found, pair, seed):
    """Curves of the treatment and its one control; ConfigError unless they are of the same rows."""
    sides, tables = [found[arm, seed] for arm in pair.arms], []
    for side in sides:
        first = side[side.epoch == side.epoch.min()]
        tables.append(first.set_index(["split", "row"]).n_tokens.sort_index())
    if not tables[0].equals(tables[1]):
        treatment, control = pair.arms
        raise ConfigError(
            f"runs {treatment}-s{seed} and {control}-s{seed} scored different rows by epoch: train"
            " both on the same rows (notebook 03)"
        )
    return sides
