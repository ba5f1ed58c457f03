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
    found = [one for one in others if one["outcome"] in ("detected", "opposite")]
    lines = []
    for one in (first, *(one for one in found if one["ci_low"] != one["ci_high"])):  # no counts
        said = one["verdict"]
        lines += [f"{one['claim']} {said[:1].upper()}{said[1:]}.", f"  {_number(one)}"]
    counts = Counter(one["outcome"] for one in others)
    summary = ", ".join(f"{counts[kind]} {said}" for kind, said in SAID.items() if counts[kind])
    lines.append(f"Of {len(others)} other claims: {summary}.")
    table = (paths.tables / "claims.md").read_text("utf-8").splitlines()
    lines += [line for line in table if line and not line.startswith("|")]  # what is missing
    place = os.path.relpath(paths.results, ROOT)
    lines += [
        f"all claims: {place}/tables/claims.md, all measures: {place}/tables/main.md",
        f"results in {place}: tables/, figures/, notebooks/, claims.json (make report: as a site)",
    ]
    return "\n".join(lines)


def _number(claim):
    """The number behind a verdict, with its interval where there is one."""
    if claim["estimate"] is None:
        return "no number"
    digits = digits_of(claim["unit"])
    numbers = [show(claim[name], digits) for name in ("estimate", "ci_low", "ci_high")]
    span = f" [{numbers[1]}, {numbers[2]}]" if claim["ci_low"] != claim["ci_high"] else ""
    return f"{claim['metric']}, {claim['contrast']}: {numbers[0]} {claim['unit']}{span}"
