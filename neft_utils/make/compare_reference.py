"""`make compare`: local results against the promoted ones, where both are of one experiment."""

from neft_utils.base.files import read_json
from neft_utils.base.paths import REFERENCE, Paths
from neft_utils.base.strict import ConfigError
from neft_utils.compare.agreement import means_beside
from neft_utils.compare.metrics import METRICS
from neft_utils.compare.results import Results
from neft_utils.compare.tables import Contrast
from neft_utils.compare.words import AGREES, DIFFERS, NO_INTERVAL, NO_REFERENCE, held


def hold_against_reference(profile, paths):
    """Print every mean of an arm and every contrast beside the reference's; returns the misses.

    Both sides are computed from their per-item files, so that a reference of an older version is
    read as today's code reads it; what only one side has measured is named and is no miss.
    """
    sides = [Paths(profile.name, REFERENCE).results, paths.results]
    for path in sides:
        if not list(path.glob("runs/*/scores.json")):
            raise ConfigError(
                f"{path.relative_to(path.parents[2])}/runs is missing: nothing to compare"
            )
    _refuse_unlike(*sides)
    reference, local = (Results(path, profile) for path in sides)
    if set(reference.runs) != set(local.runs):
        raise ConfigError("local and reference have different runs: they cannot be compared")
    return _means(reference, local) + _contrasts(reference, local)


def _means(reference, local):
    table = means_beside(reference, local)
    for one in table.itertuples():
        mark = {AGREES: "ok", DIFFERS: "MISS"}.get(one.verdict, "--")
        values = f"{one.arm} {one.metric}: reference {one.reference:.4f} local {one.local:.4f}"
        within = f"tolerance {one.tolerance:.4f} {one.unit}"
        print(mark, values, within if mark != "--" else f"({one.verdict})")
    return int((table.verdict == DIFFERS).sum())


def _contrasts(reference, local):
    """Every arm against its control, held by both intervals."""
    misses, profile = 0, local.profile
    for arm in profile.arms:
        control = profile.control_of(arm)
        for metric, (unit, _) in METRICS.items() if arm != control else ():
            pair = Contrast(arm, (control,))
            there, here = (side.contrast(pair, metric) for side in (reference, local))
            tolerance, said = held(here, there)
            if unit == "s" or said in (NO_REFERENCE, NO_INTERVAL):
                continue
            misses += said != AGREES
            print(
                f"{'ok' if said == AGREES else 'MISS'} {pair} {metric}: reference"
                f" {there.estimate:+.4f} local {here.estimate:+.4f} tolerance {tolerance:.4f}"
                f" {unit}"
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
