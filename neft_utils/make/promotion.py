"""What of local results is put under version control, and under which conditions.

Whole results go to results/reference. Results of which runs are missing go to results/partial,
where no notebook and no test takes them for a reference, and name what is missing.
"""

import atexit
import functools
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile

import pandas as pd

from neft_utils.base.estimate import BENCH_GPU
from neft_utils.base.files import ROOT, read_json
from neft_utils.base.keys import step_key
from neft_utils.base.paths import BASE, PROFILES, REFERENCE, Paths
from neft_utils.base.provenance import git_state
from neft_utils.base.read_profile import load_profile
from neft_utils.base.strict import ConfigError
from neft_utils.compare.runs import caveats, caveats_json, load_runs
from neft_utils.make.workflow import write_notebook

PARTIAL = "results/partial"


def promote(profile, paths, partial=False):
    """Copy a profile's local results; returns a sentence that says what went where.

    paths: base.paths.Paths of the local results. partial: take the runs that are whole, to
    results/partial. Several commits may have made the runs, if what a run depends on is as today.
    Raises ConfigError for a dirty tree, for runs of an edited tree or of older code, for a missing
    run (or, if `partial`, for none).
    """
    _check_profile(profile)
    if shutil.which("git") is None:
        raise ConfigError("promote needs git, which is not installed: it keeps results of a commit")
    state = git_state()
    if state["commit"] is None or state["dirty"]:
        raise ConfigError("promote needs a clean commit: commit or undo your changes first")
    runs = [(BASE, 0), *profile.runs()]
    whole = [run for run in runs if _is_whole(paths.run(*run))]
    missing = [f"{arm}-s{seed}" for arm, seed in runs if (arm, seed) not in whole]
    if missing and not partial:
        raise ConfigError(f"run {missing[0]} is not complete: run make reproduce first")
    reference, part = (Paths(profile.name, folder).results for folder in (REFERENCE, PARTIAL))
    if partial and not missing:
        raise ConfigError("no run is missing: promote it without PARTIAL")
    if partial and reference.exists():
        raise ConfigError(f"{REFERENCE}/{profile.name} is there and whole: nothing to add to it")
    if not whole:
        raise ConfigError("no run is complete: run make reproduce first")
    commits = {commit for run in whole for commit in _commits(profile, paths, *run)}
    _check_rows(profile, paths)
    if not (paths.results / "claims.json").exists():
        raise ConfigError("no claims.json: run make reproduce (where runs are missing: figures)")
    if partial:
        _check_tables(profile, paths, whole)
    target = part if partial else reference
    _copy(profile, paths, target, {f"{arm}-s{seed}" for arm, seed in whole})
    if not partial:
        shutil.rmtree(part, ignore_errors=True)
    if profile.device == "cuda":
        keep_gpu_bench(ROOT / paths.out / BENCH_GPU, ROOT / REFERENCE / BENCH_GPU)
    made = " and ".join(sorted(commit[:12] for commit in commits))
    without = f" without {', '.join(missing)}" if missing else ""
    return (
        f"promoted {len(whole)} runs of {made}{without} to"
        f" {os.path.relpath(target, ROOT)}: commit it"
    )


def _check_profile(profile):
    """Raise ConfigError unless these are results of a profile that every clone has."""
    if not (PROFILES / f"{profile.name}.yaml").is_file():
        raise ConfigError(
            f"{profile.name} is a profile of your own: promote keeps results of those in"
            " notebooks/profiles; put it there under this name and commit it first"
        )
    if load_profile(profile.name) != profile:
        raise ConfigError(
            f"this {profile.name} is not the built-in profile of that name: rename its file, or"
            " promote with the built-in one"
        )


def _check_rows(profile, paths):
    """Raise ConfigError unless the runs' rows are the profile's: no run's key speaks of rows."""
    data, made = profile.data, read_json(paths.results / "manifest.json") or {}
    wanted = {
        "source": data.source,
        "revision": data.revision,
        "max_tokens": data.max_tokens,
        "split_seed": data.split_seed,
        "seeds": profile.all_seeds(),
    }
    for key, value in wanted.items():
        if made.get(key) != value:
            raise ConfigError(
                f"the rows in {os.path.relpath(paths.results, ROOT)} have {key} {made.get(key)!r},"
                f" profile {profile.name} has {value!r}: run make reproduce"
            )


def _is_whole(run):
    names = ("scores.json", "provenance.json", "config.json")
    return all((run / name).exists() for name in names)


def _check_tables(profile, paths, whole):
    """Raise ConfigError unless the tables are of these very runs and say what is missing."""
    runs = {run: one for run, one in load_runs(paths.results / "runs").items() if run in whole}
    table = pd.read_csv(paths.tables / "by_seed.csv")
    same = set(zip(table.arm, table.seed, strict=True)) == set(whole)
    said = read_json(paths.tables / "caveats.json")
    if not same or said != caveats_json(caveats(profile, runs)):
        raise ConfigError("the tables are of other runs: run make figures first")


def _commits(profile, paths, arm, seed):
    """The commits that trained and scored a run; ConfigError where it cannot be promoted."""
    run = paths.run(arm, seed)
    about = read_json(run / "provenance.json")
    scored = read_json(run / "scores.json")["provenance"]
    if about["dirty"] or scored["dirty"]:
        raise ConfigError(f"run {run.name} ran with uncommitted changes: run it again")
    if None in (about["commit"], scored["commit"]):
        raise ConfigError(f"run {run.name} ran outside a git repository: run it again in a clone")
    keys = {4: scored["step_key"]}
    if arm != BASE:
        keys[3] = read_json(run / "config.json")["step_key"]
    if about["python"].split(".")[:2] != platform.python_version().split(".")[:2]:
        # Another Python writes syntax trees, and so keys, in another form: ask this one.
        keys = {step: _key_at(about["commit"], profile.name, step, arm, seed) for step in keys}
    if any(found != step_key(profile, step, arm, seed) for step, found in keys.items()):
        raise ConfigError(f"run {run.name} is older than the code: run make reproduce")
    return about["commit"], scored["commit"]


def _key_at(commit, name, step, arm, seed):
    """The step's key by the code and the profile of a commit."""
    code = "import sys; from neft_utils.base.read_profile import load_profile as load;"
    code += "from neft_utils.base.keys import step_key as key;"
    code += (
        "name, step, arm, seed = sys.argv[1:]; print(key(load(name), int(step), arm, int(seed)))"
    )
    command = [sys.executable, "-c", code, name, str(step), arm, str(seed)]
    done = subprocess.run(
        command,
        cwd="/",
        env={**os.environ, "PYTHONPATH": _checkout(commit)},
        capture_output=True,
        text=True,
    )
    return done.stdout.strip()


@functools.cache
def _checkout(commit):
    """A folder with the files of a commit, for as long as this process lives."""
    folder = tempfile.TemporaryDirectory(prefix="neft-")
    atexit.register(folder.cleanup)
    for command in (
        ["git", "clone", "--quiet", "--no-checkout", str(ROOT), folder.name],
        ["git", "-C", folder.name, "checkout", "--quiet", commit],
    ):
        if subprocess.run(command, capture_output=True).returncode:
            raise ConfigError(f"commit {commit[:12]}, which made runs, is not in this repository")
    return folder.name


def _copy(profile, paths, target, names):
    """Put the results with the runs of these names in the place of `target`, or nothing."""
    target.parent.mkdir(parents=True, exist_ok=True)
    new, old = (target.with_name(f".{target.name}.{word}") for word in ("new", "old"))
    shutil.rmtree(new, ignore_errors=True)
    keep_out = shutil.ignore_patterns(
        "adapter", "model", "trainer", "vllm", "report", "*.log", ".*", "*.failed.ipynb"
    )
    shutil.copytree(paths.results, new, ignore=keep_out)
    for run in (new / "runs").iterdir():  # cut, or of an earlier version of the profile
        if run.name not in names:
            shutil.rmtree(run)
            for path in new.glob(f"notebooks/*__{run.name}.ipynb"):
                path.unlink()
    _copy_bench(profile, paths, target, new)
    for path in new.glob("notebooks/*.ipynb"):
        _make_public(path)
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        target.rename(old)
    new.rename(target)
    shutil.rmtree(old, ignore_errors=True)


def _make_public(path):
    """Take rows of the dataset and this machine's paths out of an executed notebook.

    Cells tagged shows-data print rows, which may not be published; warnings name files by their
    full path.
    """
    copy = json.loads(path.read_text("utf-8").replace(f"{ROOT}{os.sep}", ""))
    note = "rows of the dataset: run this notebook to see them, they are not published\n"
    for cell in copy["cells"]:
        if "shows-data" in cell["metadata"].get("tags", []):
            cell["outputs"] = [{"name": "stdout", "output_type": "stream", "text": [note]}]
    write_notebook(path, copy)


def _copy_bench(profile, paths, target, new):
    """Take bench.json along if `make bench` ran for this profile at a clean commit, else keep the
    one that was promoted before."""
    for measured in (ROOT / paths.out / "bench.json", target / "bench.json"):
        found = read_json(measured)
        if found and found["profile"] == profile.name and not found["dirty"]:
            shutil.copy(measured, new / "bench.json")
            return


def keep_gpu_bench(measured, kept):
    """Copy what `make bench-gpu` measured at clean commits, unless another has more of its rows.

    It is no profile's: `make plan` of every profile for a GPU reads it.
    """
    new, old = (_rows_measured(read_json(path)) for path in (measured, kept))
    if new and len(new) >= len(old) and all(row["dirty"] is False for row in new):
        kept.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(measured, kept)


def _rows_measured(found):
    rows = found["rows"].values() if found and found["shape"] != "tiny" else ()
    return [row for row in rows if "skipped" not in row]
