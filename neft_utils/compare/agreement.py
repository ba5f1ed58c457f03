"""Do two sets of results agree? Tolerances come from the results themselves.

Another processor rounds differently, training makes more of it, and answers part at the first close
call between two tokens. So no number is the same, and how far it may lie off is measured.

A contrast is held by both intervals (`words.held`). The mean of an arm is held by its own
runs' differences, seed by seed and row by row, between the two places: their spread is that of
rounding. A difference within its interval, or within what other seeds would change, is none.
"""

from __future__ import annotations

from math import isfinite, nan

import pandas as pd

from neft_utils.base.paths import BASE, REFERENCE, Paths
from neft_utils.compare import stats
from neft_utils.compare.end_of_turn import rows_interval
from neft_utils.compare.metrics import METRICS, OWN_ROWS, per_item
from neft_utils.compare.results import Results
from neft_utils.compare.tables import two_way
from neft_utils.compare.words import AGREES, DIFFERS, NO_INTERVAL, held, plain, size

ONE_SIDE = "only one side has it"


def reference_of(profile):
    """`Results` of the profile's stored reference, None without one."""
    folder = Paths(profile.name, REFERENCE).results
    return Results(folder, profile) if list(folder.glob("runs/*/scores.json")) else None


def primary_beside(findings, profile):
    """The primary contrasts here beside the stored reference's: DataFrame, a row a claim.

    findings: of `claims.ledger`. Index: id; columns unit, here, expected, tolerance, verdict. Log
    ratios are in per cent, the tolerance as its own ratio's per cent.
    """
    stored = reference_of(profile)
    rows = {}
    for one in findings:
        if not one.primary:
            continue
        there = stored.ledger[one.id].interval if stored else None
        tolerance, said = held(one.interval, there)
        if one.interval is None:
            said = str(one.verdict)
        unit = one.verdict.quantity.unit
        sides = [size(x.estimate, unit) if x else nan for x in (one.interval, there)]
        rows[one.id] = [plain(unit), *sides, size(tolerance, unit), said]
    columns = ["unit", "here", "expected", "tolerance", "verdict"]
    return pd.DataFrame.from_dict(rows, orient="index", columns=columns)


def means_beside(there, here):
    """Every arm's mean in every metric but times, held against the reference's.

    there, here: `Results` of the same runs. DataFrame arm, metric, unit, reference, local,
    tolerance and verdict. The tolerance is the larger of two: the half width of the interval of
    here minus there (rows and seeds paired; its level is corrected for the number of means, so
    that one of twenty comparisons on equal terms has a mean outside; of a single run, over its
    rows), and the standard error by which other seeds would move the mean, from all arms' seeds.
    """
    names = [name for name, (unit, _) in METRICS.items() if unit != "s"]
    sides = [side.main.set_index("arm").reindex(columns=names) for side in (there, here)]
    known = [
        (arm, name)
        for name in names
        for arm in sides[0].index
        if any(isfinite(side.loc[arm, name]) for side in sides)
    ]
    rows = []
    for arm, name in known:
        values = [side.loc[arm, name] for side in sides]
        tolerance, said = nan, ONE_SIDE
        if all(map(isfinite, values)):
            tolerance = _spread(there, here, arm, name, 1 - 0.05 / len(known))
            said = AGREES if abs(values[0] - values[1]) <= tolerance else DIFFERS
            if not isfinite(tolerance):
                said = AGREES if values[0] == values[1] else NO_INTERVAL
        rows.append((arm, name, METRICS[name][0], *values, tolerance, said))
    columns = ["arm", "metric", "unit", "reference", "local", "tolerance", "verdict"]
    return pd.DataFrame(rows, columns=columns)


def _spread(there, here, arm, name, level):
    """The tolerance of one mean, see `means_beside`; NaN without any spread to measure it by."""
    seeds = [seed for one, seed in there.runs if one == arm]
    moved = _moved(there, here, [(arm, seed) for seed in seeds], name, level)
    found = [(moved.ci_high - moved.ci_low) / 2]
    trained = there.seeds[there.seeds.arm != BASE].groupby("arm")[name]
    variance = (trained.var() * (trained.count() - 1)).sum() / max(1, (trained.count() - 1).sum())
    if variance > 0:
        found.append((variance / len(seeds)) ** 0.5)
    return max(filter(isfinite, found), default=nan)


def _moved(there, here, runs, name, level):
    """`stats.Interval` of here minus there, over the seeds and rows that both have."""
    frames = []
    for arm, seed in runs if name not in OWN_ROWS else ():
        sides = [per_item(side.runs[arm, seed], name, side.decoding) for side in (there, here)]
        if all(side is not None for side in sides):
            delta = (sides[1].value - sides[0].value).dropna()
            row = {"seed": seed, "example_id": delta.index, "delta": delta.array}
            frames.append(pd.DataFrame(row | {"weight": sides[0].weight[delta.index].array}))
    if frames and len(runs) == 1:
        return rows_interval(frames[0].delta, frames[0].weight, level)
    if len(frames) == len(runs) and all(map(len, frames)):
        found = two_way(pd.concat(frames, ignore_index=True), level)
        if found is not None:
            return found
    values = [side.seeds.set_index(["arm", "seed"])[name].loc[runs] for side in (there, here)]
    return stats.seed_interval((values[1] - values[0]).dropna(), level)
