"""What to expect: the reference run's numbers beside ours, and how long a notebook took there.

Both come from results/reference, so that no notebook needs a number typed into its text.
"""

import statistics

import pandas as pd

from neft_utils.base.files import read_json
from neft_utils.base.paths import REFERENCE, STEPS, Paths

# Unit -> how far the same profile may end from the reference on another machine. On the same
# machine runs agree bit for bit; elsewhere products round differently, and training grows that.
TOLERANCES = {"nats/token": 0.03, "tokens": 25.0, "share": 0.15, "%": 3.0}
EVIDENCE = ("cpu-long", "cpu")  # profiles whose reference speaks where the reader's has none


def beside(paths, name, measure, unit="nats/token"):
    """A measure of a results file beside the same measure of the reference run's file.

    paths: base.paths.Paths; name: a CSV file below the profile's results; measure: its DataFrame ->
    Series of numbers; unit: one of TOLERANCES. Returns a DataFrame, one row per number, with
    columns here, expected, tolerance and verdict: "as expected", "outside", or "no reference" for
    a number that the reference lacks; the column here alone where it has no such file.
    """
    here = measure(pd.read_csv(paths.results / name))
    stored = Paths(paths.profile, REFERENCE).results / name
    if not stored.exists():
        return pd.DataFrame({"here": here})
    expected = measure(pd.read_csv(stored))
    table = pd.DataFrame({"here": here, "expected": expected.reindex(here.index)})
    table["tolerance"] = f"± {TOLERANCES[unit]:g} {unit}"
    near = (table.here - table.expected).abs() <= TOLERANCES[unit]
    table["verdict"] = near.map({True: "as expected", False: "outside"})
    table.loc[table.expected.isna(), "verdict"] = "no reference"
    return table


def same_files(paths, manifest):
    """A sentence: whether notebook 1 wrote the very files of the reference run (sha256).

    manifest: what `splits.write_splits` returns, or manifest.json. The rows depend on pinned
    sources and code alone, so the tolerance is none.
    """
    stored = read_json(Paths(paths.profile, REFERENCE).results / "manifest.json")
    if stored is None:
        return f"no reference of profile {paths.profile}: nothing to compare with"
    names = sorted(set(manifest["files"]) | set(stored["files"]))
    differ = [n for n in names if manifest["files"].get(n) != stored["files"].get(n)]
    if differ:
        return f"not the reference's files: {', '.join(differ)} (another profile, pin or code?)"
    return f"all {len(names)} files have the reference's sha256, as expected"


def how_long(paths, step, short=False):
    """How long a step's notebook took in the reference run, and on which machine, as text.

    step: number of the notebook. Of the reference of the same profile or, if there is none, of
    one in EVIDENCE, which the text names. short: the time only, where a table says the rest.
    """
    for profile in dict.fromkeys((paths.profile, *EVIDENCE)):
        stored = Paths(profile, REFERENCE).results
        took = notebook_seconds(stored, step)
        about = [read_json(path) for path in stored.glob("runs/*/provenance.json")]
        if took and about:
            time = duration(statistics.median(took))
            if short:
                return time if len(took) == 1 else f"{time} a run"
            if len(took) > 1:
                memory = max(one["peak_memory_gb"] for one in about)
                time += f" (median of {len(took)} runs, at most {memory:.1f} GB)"
            where = f"{about[0]['device']}, {about[0]['threads']} thread"
            return f"{time} in the reference run of profile {profile} ({where})"
    return "not known: no reference run is stored"


def notebook_seconds(folder, step):
    """Durations of the executed copies of a step's notebook below a profile's folder."""
    copies = sorted(folder.glob(f"notebooks/{STEPS[step]}*.ipynb"))
    copies = [path for path in copies if not path.stem.endswith(".failed")]
    return [read_json(path)["metadata"]["papermill"]["duration"] for path in copies]


def duration(seconds):
    """Seconds as text for people."""
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.1f} min"
