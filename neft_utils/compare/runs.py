"""Finished runs, read from their files, and what their tables must say of them."""

import json

import pandas as pd

from neft_utils.base.files import read_json
from neft_utils.base.paths import BASE, REFERENCE, Paths
from neft_utils.base.pins import PYTHON, pins
from neft_utils.base.read_profile import load_profile
from neft_utils.base.strict import ConfigError
from neft_utils.compare.expected import EVIDENCE
from neft_utils.data.sources import read_jsonl

FILES = ("losses", "task_items", "perturbed_losses", "stopping", "preferences")


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
            runs = load_runs(found)  # without those of an earlier version of the profile
            runs = {run: runs[run] for run in [(BASE, 0), *loaded.runs()] if run in runs}
            return loaded, Paths(loaded.name, out), runs
    raise ConfigError(f"no finished runs of {profile}: run make reproduce PROFILE={profile} first")


def load_runs(folder):
    """{(arm, seed): run} of the finished runs below `folder`.

    A run is a dict: scores and provenance, `generations` and each of FILES as DataFrames (empty
    where nothing was asked), and `noise` and `log` (train_log.csv) for trained ones.
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
        log = run / "train_log.csv"
        runs[about["arm"], about["seed"]] = {
            "scores": json.loads(scores.read_text("utf-8")),
            "provenance": about,
            **{name: pd.read_csv(run / f"{name}.csv", dtype=_NAMES) for name in FILES},
            "generations": pd.DataFrame(read_jsonl(run / "generations.jsonl")),
            "noise": read_json(run / "noise.json"),
            "log": pd.read_csv(log) if log.exists() else None,
        }
    return runs


_NAMES = {"example_id": str, "item_id": str}


def missing_runs(profile, runs):
    """Names of the profile's runs, the untrained model's included, that are not among `runs`."""
    return [f"{a}-s{s}" for a, s in [(BASE, 0), *profile.runs()] if (a, s) not in runs]


def caveats(profile, runs):
    """What every table of these runs must say of itself, a sentence each: which runs are missing,
    and which of the packages that provenance records were not the pinned ones."""
    out = []
    if lost := missing_runs(profile, runs):
        models = [(BASE, 0), *profile.runs()]
        whole = len(models)
        listed = f"{len(lost)} of {whole} runs are missing, {', '.join(lost)}"
        if len(lost) > whole / 2:
            there = ", ".join(f"{arm}-s{seed}" for arm, seed in models if (arm, seed) in runs)
            listed = f"{len(runs)} of {whole} runs are there, {there}"
        out.append(
            f"Not complete: {listed}. Arms are compared on the seeds that both have, so a contrast"
            " is not the difference of two arms' means."
        )
    wanted = pins()
    other = {
        f"{name} {version} (pinned: {wanted[name]})"
        for run in runs.values()
        for name, version in run["provenance"]["versions"].items()
        if version is not None and version.split("+")[0] != wanted.get(name, version)
    }
    other |= {
        f"Python {run['provenance']['python']} (pinned: {PYTHON})"
        for run in runs.values()
        if not run["provenance"]["python"].startswith(f"{PYTHON}.")
    }
    if other:
        out.append(f"Other versions than the pinned ones: {', '.join(sorted(other))}.")
    engines = {engine_of(run) for run in runs.values() if len(run["generations"])}
    if len(engines) > 1:
        out.append(
            f"Answers of different engines ({', '.join(sorted(engines))}), which round differently:"
            " runs differ by that too."
        )
    return out


def engine_of(run):
    """What answered a run's prompts; transformers, before there was a choice."""
    return run["scores"]["provenance"].get("answer_engine", "transformers")
