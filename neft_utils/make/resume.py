"""Going on from results/partial: on another machine, the runs that were kept are not made again."""

import shutil

from neft_utils.base.files import read_json
from neft_utils.base.paths import BASE, Paths
from neft_utils.base.strict import ConfigError
from neft_utils.make.gpu_pieces import is_current
from neft_utils.make.promotion import PARTIAL


def resume(profile, paths):
    """Copy the runs of results/partial that are not among the local ones; returns a sentence.

    paths: base.paths.Paths of the local results, whose rows notebook 1 has made. Of the stored runs
    those count that this code, these settings and these pins would make. They have no weights, so
    that nothing can be asked of their models any more. Raises ConfigError where none is of use.
    """
    stored = Paths(profile.name, PARTIAL)
    if not (stored.results / "runs").is_dir():
        raise ConfigError(f"{PARTIAL} has nothing of {profile.name}: run make reproduce")
    theirs, ours = (read_json(one.results / "manifest.json") for one in (stored, paths))
    if theirs["files"] != ours["files"]:
        raise ConfigError(f"the rows of {PARTIAL}/{profile.name} are others: run make reproduce")
    taken = []
    # A control comes before what is held against it: Snakemake goes by the times of files.
    for run in sorted([(BASE, 0), *profile.runs()], key=lambda run: _rank(profile, *run)):
        if is_current(profile, stored, *run) and not is_current(profile, paths, *run):
            _copy(stored, paths, *run)
            taken.append(run)
    if not taken:
        raise ConfigError(
            f"{PARTIAL}/{profile.name} has no run that is missing here and that this code would"
            " make: run make reproduce"
        )
    whole = 1 + len(profile.runs())
    return f"{len(taken)} of {whole} runs are taken from {PARTIAL}: make reproduce makes the others"


def _rank(profile, arm, seed):
    return arm != BASE and profile.control_of(arm) != arm, arm, seed


def _copy(stored, paths, arm, seed):
    """Copy a run's files and executed notebooks, new in time, the executed notebooks last."""
    run = paths.run(arm, seed)
    shutil.rmtree(run, ignore_errors=True)
    shutil.copytree(stored.run(arm, seed), run, copy_function=shutil.copyfile)
    for step in (3, 4):
        executed = stored.notebook(step, arm, seed)
        if executed.exists():
            paths.notebook(step, arm, seed).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(executed, paths.notebook(step, arm, seed))
