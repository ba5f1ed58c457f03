"""What `make reproduce` says at its end: the answer to the question, and where more is.

Read from files that notebook 5 wrote, so that it is there at once when nothing was to be done.
"""

import os
from collections import Counter
from math import isnan, nan
from types import SimpleNamespace

from neft_utils.base.files import ROOT, read_json
from neft_utils.base.paths import REFERENCE, Paths
from neft_utils.compare.words import capital, digits_of, held, plain, size

SAID = {
    "higher": "a difference upward",
    "lower": "a difference downward",
    "not_seen": "no difference seen",
    "not_testable": "not testable with this profile",
}


def ending(profile, paths):
    """A few lines of text from a finished run's files: the primary answers, beside the reference's.

    profile: base.profiles.Profile; paths: base.paths.Paths of its results.
    """
    ledger = _ledger(paths)
    stored = {one.id: one for one in _ledger(Paths(profile.name, REFERENCE))}
    lines = []
    for one in ledger:
        if one.primary:
            lines += [
                one.claim,
                f"  {capital(one.verdict)}.",
                f"  {_expected(one, stored.get(one.id))}",
            ]
    others = [one for one in ledger if not one.primary]
    counts = Counter(one.outcome for one in others)
    summary = ", ".join(f"{said}: {counts[kind]}" for kind, said in SAID.items() if counts[kind])
    lines.append(f"Of {len(others)} other claims: {summary}.")
    lines += [one["sentence"] for one in read_json(paths.tables / "caveats.json")]
    place = os.path.relpath(paths.results, ROOT)
    lines += [
        f"all claims: {place}/tables/claims.md, all measures: {place}/tables/main.md",
        f"results in {place}: tables/, figures/, notebooks/, claims.json (make report: as a site)",
    ]
    return "\n".join(lines)


def _ledger(paths):
    """The rows of claims.json, numbers that are missing as NaN; none without the file."""
    rows = read_json(paths.results / "claims.json") or []
    numbers = ("estimate", "ci_low", "ci_high")
    gaps = [{name: nan for name in numbers if row[name] is None} for row in rows]
    return [SimpleNamespace(**{**row, **gap}) for row, gap in zip(rows, gaps, strict=True)]


def _expected(here, there):
    """A claim of the ledger beside the reference's row of the same claim, or None."""
    if there is None or isnan(there.estimate):
        return "Expected: no reference of this profile has it."
    unit, digits = plain(here.unit), digits_of(here.unit)
    said = f"Expected: {size(there.estimate, here.unit):+.{digits}f} {unit} (the stored reference)"
    tolerance, verdict = held(here, there)
    if isnan(here.estimate):
        return f"{said}; {here.verdict}."
    if isnan(tolerance):
        return f"{said}; {verdict}."
    within = f"± {size(tolerance, here.unit):.{digits}f}"
    return f"{said}; yours is {size(here.estimate, here.unit):+.{digits}f}, {verdict} ({within})."
