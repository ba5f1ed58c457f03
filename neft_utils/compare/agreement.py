"""Do two sets of results agree? A contrast is held against a stored one by both intervals.

Another processor rounds differently and its answers differ, so a difference of arms moves too: two
independent estimates with 95 % intervals of half widths a and b lie within sqrt(a^2 + b^2) of each
other in about 95 of 100 cases. Results that share rows and seeds lie nearer, so this is generous.
"""

from __future__ import annotations

from math import hypot, isfinite, nan

import pandas as pd

from neft_utils.base.paths import REFERENCE, Paths
from neft_utils.compare.results import Results
from neft_utils.compare.words import plain, size

AGREES, DIFFERS = "as expected", "outside"
NO_INTERVAL, NO_REFERENCE = "no interval to hold it by", "no reference"


def held(here, there):
    """(tolerance, one of the words above) of two `stats.Interval`s of one contrast, or None.

    The tolerance is in the contrast's unit, NaN where one side has no interval.
    """
    if here is None or there is None:
        return nan, NO_REFERENCE
    halves = [(one.ci_high - one.ci_low) / 2 for one in (here, there)]
    if not all(map(isfinite, halves)):
        return nan, NO_INTERVAL
    tolerance = hypot(*halves)
    near = abs(here.estimate - there.estimate) <= tolerance
    return tolerance, AGREES if near else DIFFERS


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
