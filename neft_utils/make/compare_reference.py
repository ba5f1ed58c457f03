"""`make compare`: local results against the promoted ones, where both are of one experiment."""

import os

import pandas as pd

from neft_utils.base.files import ROOT, read_json
from neft_utils.base.paths import REFERENCE, Paths
from neft_utils.base.strict import ConfigError
from neft_utils.compare.expected import TOLERANCES
from neft_utils.compare.metrics import METRICS


def hold_against_reference(profile, paths):
    """Print every cell of the main table beside the reference's; returns how many are outside."""
    sides = [Paths(profile.name, REFERENCE).tables / "main.csv", paths.tables / "main.csv"]
    for path in sides:
        if not path.exists():
            raise ConfigError(f"{os.path.relpath(path, ROOT)} is missing: nothing to compare")
    _refuse_unlike(*(path.parent.parent for path in sides))
    reference, local = (pd.read_csv(path).set_index("arm") for path in sides)
    if list(reference.index) != list(local.index):
        raise ConfigError("local and reference have different arms: they cannot be compared")
    misses = 0
    for metric, (unit, _) in METRICS.items():
        if unit not in TOLERANCES:
            continue
        for arm in reference.index:
            a, b = reference.loc[arm, metric], local.loc[arm, metric]
            if pd.isna(a) and pd.isna(b):
                continue
            good = abs(a - b) <= TOLERANCES[unit]
            misses += not good
            print(
                f"{'ok' if good else 'MISS'} {arm} {metric}: reference {a:.4f} local {b:.4f}"
                f" tolerance {TOLERANCES[unit]:g} {unit}"
            )
    return misses


def _refuse_unlike(reference, local):
    """Raise ConfigError for results of other rows, another model or another recipe."""
    manifests = [read_json(side / "manifest.json") or {} for side in (reference, local)]
    files = [manifest.get("files", {}) for manifest in manifests]
    for name in ("test.jsonl", "validation.jsonl"):
        if files[0].get(name) != files[1].get(name):
            raise ConfigError(f"local and reference have different rows ({name}): not comparable")
    for path in sorted((local / "runs").glob("*/config.json")):
        other = reference / path.relative_to(local)
        if not other.exists():
            continue
        ours, theirs = (read_json(one) for one in (path, other))
        for part in ("model", "train", "noise"):
            # Keys that only one side has are settings of a later version, at their defaults.
            both = ours.get(part, {}).keys() & theirs.get(part, {}).keys()
            for key in sorted(both):
                if ours[part][key] != theirs[part][key]:
                    raise ConfigError(
                        f"run {path.parent.name} has {part}.{key} {ours[part][key]} here and"
                        f" {theirs[part][key]} in the reference: not comparable"
                    )
