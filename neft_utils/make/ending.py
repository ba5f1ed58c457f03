"""What `make reproduce` says at its end: the answer to the question, and where more is."""

import os
from collections import Counter

import pandas as pd

from neft_utils.base.files import ROOT
from neft_utils.compare.agreement import primary_beside
from neft_utils.compare.results import Results

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
    results = Results(paths.results, profile)
    lines = []
    beside = primary_beside(results.ledger.values(), profile)
    for one in results.primary:
        lines += [
            one.claim.text,
            f"  {one.verdict.sentence}",
            f"  {_expected(beside.loc[one.id])}",
        ]
    others = [one for one in results.ledger.values() if not one.primary]
    counts = Counter(one.verdict.outcome for one in others)
    summary = ", ".join(f"{said}: {counts[kind]}" for kind, said in SAID.items() if counts[kind])
    lines.append(f"Of {len(others)} other claims: {summary}.")
    lines += map(str, results.caveats)
    place = os.path.relpath(paths.results, ROOT)
    lines += [
        f"all claims: {place}/tables/claims.md, all measures: {place}/tables/main.md",
        f"results in {place}: tables/, figures/, notebooks/, claims.json (make report: as a site)",
    ]
    return "\n".join(lines)


def _expected(row):
    """A row of `primary_beside` as text."""
    if pd.isna(row.expected):
        return "Expected: no reference of this profile has it."
    digits = 1 if row.unit == "%" else 4
    said = f"Expected: {row.expected:+.{digits}f} {row.unit} (the stored reference)"
    if pd.isna(row.tolerance):
        return f"{said}; {row.verdict}."
    within = f"± {row.tolerance:.{digits}f}"
    return f"{said}; yours is {row.here:+.{digits}f}, {row.verdict} ({within})."
