"""Finished runs, read from their files, and what their tables must say of them."""

import dataclasses
import json
from dataclasses import dataclass

import pandas as pd

from neft_utils.base.files import read_json
from neft_utils.base.paths import BASE, REFERENCE, Paths
from neft_utils.base.pins import PYTHON, pins
from neft_utils.base.read_profile import load_profile
from neft_utils.base.strict import ConfigError
from neft_utils.compare.expected import EVIDENCE
from neft_utils.data.sources import read_jsonl

FILES = ("losses", "task_items", "perturbed_losses", "stopping", "preferences")
LATER = ("rewards",)  # which runs of an older version have not


def open_results(profile, out):
    """(Profile, Paths to write to, runs): local results of the profile, else stored ones.

    Falls back to results/reference of the profile, then of those in `expected.EVIDENCE`, and
    says so; what is computed from them still goes to `out`. A reference of smoke is there for
    its expected values, not to be read: the evidence comes before it. ConfigError for nothing.
    """
    stored = [(name, REFERENCE) for name in EVIDENCE]
    stored.insert(len(stored) if profile == "smoke" else 0, (profile, REFERENCE))
    for name, folder in ((profile, out), *stored):
        loaded = load_profile(name)
        found = Paths(loaded.name, folder).results / "runs"
        wanted = (loaded.confirmatory.treatment, loaded.confirmatory.control)
        if all(list(found.glob(f"{arm}-s*/scores.json")) for arm in wanted):
            if (name, folder) != (profile, out):
                print(f"no finished {profile} runs in {out}: reading {folder}/{loaded.name}")
            return loaded, Paths(loaded.name, out), load_runs(found, loaded)
    raise ConfigError(f"no finished runs of {profile}: run make reproduce PROFILE={profile} first")


def load_runs(folder, profile=None):
    """{(arm, seed): run} of the finished runs below `folder`.

    A run is a dict: scores and provenance, `generations` and each of FILES and LATER as DataFrames
    (empty where nothing was asked), and for trained ones `noise`, `log` (train_log.csv) and `curve`
    (losses_by_epoch.csv; None for the others and where an older version trained). profile: only its
    runs, in its order, so none of an earlier version of it. ConfigError for a run that lacks one of
    FILES.
    """
    runs = {}
    for scores in sorted(folder.glob("*/scores.json")):
        run = scores.parent
        about = json.loads((run / "provenance.json").read_text("utf-8"))
        if missing := [name for name in FILES if not (run / f"{name}.csv").exists()]:
            raise ConfigError(
                f"run {run.name} has no {', '.join(missing)}: an older version of the code scored"
                " it, or files were deleted: run make reproduce"
            )
        log, curve = run / "train_log.csv", run / "losses_by_epoch.csv"
        runs[about["arm"], about["seed"]] = {
            "scores": json.loads(scores.read_text("utf-8")),
            "provenance": about,
            **{name: _table(run / f"{name}.csv") for name in (*FILES, *LATER)},
            "generations": pd.DataFrame(read_jsonl(run / "generations.jsonl")),
            "noise": read_json(run / "noise.json"),
            "log": pd.read_csv(log) if log.exists() else None,
            "curve": pd.read_csv(curve) if curve.exists() else None,
        }
    if profile is None:
        return runs
    return {run: runs[run] for run in [(BASE, 0), *profile.runs()] if run in runs}


def _table(path):
    names = {"example_id": str, "item_id": str}
    return pd.read_csv(path, dtype=names) if path.exists() else pd.DataFrame()


def missing_runs(profile, runs):
    """Names of the profile's runs, the untrained model's included, that are not among `runs`."""
    return _split(profile, runs)[1]


def _split(profile, runs):
    """Names of the profile's runs that are among `runs`, and of those that are not."""
    sides = [], []
    for arm, seed in [(BASE, 0), *profile.runs()]:
        sides[(arm, seed) not in runs].append(f"{arm}-s{seed}")
    return sides


# ------------------------------------------------------------------------- what tables must say


@dataclass(frozen=True)
class MissingRuns:
    there: tuple[str, ...]  # names of runs
    missing: tuple[str, ...]

    def __str__(self):
        whole = len(self.there) + len(self.missing)
        listed = f"{len(self.missing)} of {whole} runs are missing, {', '.join(self.missing)}"
        if len(self.missing) > whole / 2:
            listed = f"{len(self.there)} of {whole} runs are there, {', '.join(self.there)}"
        return (
            f"Not complete: {listed}. Arms are compared on the seeds that both have, so a contrast"
            " is not the difference of two arms' means."
        )


@dataclass(frozen=True)
class OtherVersions:
    packages: tuple[tuple[str, str, str], ...]  # name, version, pinned version

    def __str__(self):
        listed = (f"{name} {version} (pinned: {pin})" for name, version, pin in self.packages)
        return f"Other versions than the pinned ones: {', '.join(listed)}."


@dataclass(frozen=True)
class Engines:
    engines: tuple[str, ...]

    def __str__(self):
        return (
            f"Answers of different engines ({', '.join(self.engines)}), which round differently:"
            " runs differ by that too."
        )


@dataclass(frozen=True)
class OlderScoring:
    runs: tuple[str, ...]  # names of runs

    def __str__(self):
        return (
            f"No end_nll in losses.csv of {len(self.runs)} runs: an older version scored them, so"
            " the end of turn and the content before it cannot be told apart (make reproduce scores"
            " anew). The primary claims were chosen after these runs had been seen."
        )


@dataclass(frozen=True)
class OlderItems:
    runs: tuple[str, ...]  # names of runs

    def __str__(self):
        return (
            f"No margin in task_items.csv of {len(self.runs)} runs: an older version scored them,"
            " without wrong answers beside the right ones, so arithmetic, knowledge and their"
            " accuracies are missing (make reproduce scores anew)."
        )


KINDS = {
    MissingRuns: "missing_runs",
    OtherVersions: "other_versions",
    Engines: "engines",
    OlderScoring: "older_scoring",
    OlderItems: "older_items",
}


def lacks_end_nll(runs):
    """Names of the runs whose losses.csv is of an older version, without the column end_nll."""
    return [f"{a}-s{s}" for (a, s), run in runs.items() if "end_nll" not in run["losses"]]


def caveats(profile, runs):
    """What every table of these runs must say of itself, a list; `str()` of each is a sentence.

    MissingRuns, OtherVersions (of the packages that provenance records), Engines, OlderScoring and
    OlderItems, whichever apply.
    """
    out = []
    there, missing = _split(profile, runs)
    if missing:
        out.append(MissingRuns(tuple(there), tuple(missing)))
    wanted, other = pins(), set()
    for about in (run["provenance"] for run in runs.values()):
        for name, version in about["versions"].items():
            if version is not None and version.split("+")[0] != wanted.get(name, version):
                other.add((name, version, wanted[name]))
        if not about["python"].startswith(f"{PYTHON}."):
            other.add(("Python", about["python"], PYTHON))
    if other:
        out.append(OtherVersions(tuple(sorted(other))))
    engines = {engine_of(run) for run in runs.values() if len(run["generations"])}
    if len(engines) > 1:
        out.append(Engines(tuple(sorted(engines))))
    if older := lacks_end_nll(runs):
        out.append(OlderScoring(tuple(older)))
    tables = {f"{arm}-s{seed}": run["task_items"] for (arm, seed), run in runs.items()}
    older = [
        name
        for name, table in tables.items()
        if "margin" not in table and table.task.isin(["openbookqa", "siqa", "asdiv"]).any()
    ]
    if older:
        out.append(OlderItems(tuple(older)))
    return out


def caveats_json(notes):
    """Caveats as tables/caveats.json holds them: a list of {"kind": …, "sentence": …, …}."""
    rows = [{"kind": KINDS[type(n)], "sentence": str(n), **dataclasses.asdict(n)} for n in notes]
    return json.loads(json.dumps(rows))


def engine_of(run):
    """What answered a run's prompts; transformers, before there was a choice."""
    return run["scores"]["provenance"].get("answer_engine", "transformers")
