"""What `make reproduce` says at its end: the answer to the question, and where more is."""

import os
from collections import Counter

from neft_utils.base.files import ROOT, read_json
from neft_utils.compare.claims import FIRST
from neft_utils.compare.tables import digits_of, show

SAID = {
    "detected": "detected",
    "opposite": "detected, opposite to the claim",
    "not_detected": "not detected",
    "not_testable": "not testable with this profile",
}


def ending(paths):
    """A few lines of text from a finished run's claims.json."""
    claims = read_json(paths.results / "claims.json")
    first = next(one for one in claims if one["id"] == FIRST)
    others = [one for one in claims if one is not first]
    lines = [f"{first['claim']} {first['verdict'].capitalize()}.", f"  {_number(first)}"]
    found = [one for one in others if one["outcome"] in ("detected", "opposite")]
    lines += [f"{one['claim']} {one['verdict'].capitalize()}.\n  {_number(one)}" for one in found]
    counts = Counter(one["outcome"] for one in others)
    summary = ", ".join(f"{counts[kind]} {said}" for kind, said in SAID.items() if counts[kind])
    lines.append(f"Of {len(others)} other claims: {summary}.")
    place = os.path.relpath(paths.results, ROOT)
    lines += [
        f"all claims: {place}/tables/claims.md, all measures: {place}/tables/main.md",
        f"results in {place}: tables/, figures/, notebooks/, claims.json (make report: as a site)",
    ]
    return "\n".join(lines)


def _number(claim):
    """The number behind a verdict, with its interval where there is one."""
    digits = digits_of(claim["unit"])
    numbers = [show(claim[name], digits) for name in ("estimate", "ci_low", "ci_high")]
    span = f" [{numbers[1]}, {numbers[2]}]" if claim["ci_low"] != claim["ci_high"] else ""
    of = claim["contrast"] or "counted"
    return f"{claim['metric']}, {of}: {numbers[0]} {claim['unit']}{span}"
