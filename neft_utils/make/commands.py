"""The commands behind make: plan, notebook, reproduce, figures, and so on.

`reproduce` only starts Snakemake, which decides what is done and what is not, and tells the
terminal how far it is. Every failure that a user can cause ends in one line and exit code 1.
"""

import argparse
import fcntl
import json
import os
import shlex
import shutil
import sys
from pathlib import Path

from neft_utils.base.files import ROOT, atomic_write_text, write_json
from neft_utils.base.paths import NOTEBOOKS, REFERENCE, STEPS, Paths, is_path
from neft_utils.base.plain import say
from neft_utils.base.read_profile import load_profile
from neft_utils.base.steps import CHAIN, ordered
from neft_utils.base.strict import ConfigError
from neft_utils.make import gpu_commands, preflight
from neft_utils.make.plan import show_plan, workers
from neft_utils.make.workflow import check_engine, execute, one_line, run_all, write_notebook

FIGURE_STEPS = [step.number for step in ordered([step for step in CHAIN if step.figures])]
JOBS = 50  # at a time on a cluster, unless --cores says otherwise


def main(argv=None):
    for stream in (sys.stdout, sys.stderr):  # of a terminal that may lack some of our letters
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    arguments = _parser().parse_args(argv)
    try:
        return arguments.run(arguments) or 0
    except KeyboardInterrupt:
        print("\nstopped: run the same command again to go on", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output (head, less) has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (ValueError, RuntimeError, OSError) as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 1


def _parser():
    parser = argparse.ArgumentParser(
        prog="python -m neft_utils", description=__doc__.split("\n")[0]
    )
    commands = parser.add_subparsers(required=True)

    def command(name, run, help):
        sub = commands.add_parser(name, help=help)
        sub.set_defaults(run=run)
        sub.add_argument("--profile", default=None, help="name, or path of a YAML file")
        sub.add_argument("--out", default="results/local", help="folder for results")
        return sub

    sub = command("plan", plan, "print steps, sizes and estimates; run nothing")
    sub.add_argument("--cores", type=int, default=None, help="runs side by side")
    sub = command("check", check, "look at machine, model and rows of a profile; run nothing")
    sub.add_argument("--machine", action="store_true", help="at the machine only, in a second")
    sub = command("notebook", notebook, "execute one notebook with papermill")
    sub.add_argument("step", type=int, choices=sorted(STEPS))
    sub.add_argument("--arm")
    sub.add_argument("--seed", type=int)
    command("answer", answer, "answer all prompts of all trained runs with vLLM")
    sub = command("reproduce", reproduce, "run all steps that are not done")
    sub.add_argument("--cores", type=int, default=None, help="runs side by side")
    sub.add_argument("--engine", default="local", help="local, or a Snakemake executor: slurm")
    sub.add_argument("--engine-options", default="", help="more arguments of Snakemake's")
    text = "say other versions than the pinned ones in place of refusing them"
    sub.add_argument("--any-versions", action="store_true", help=text)
    sub = command("profile", own_profile, "begin a profile of your own: NAME.yaml with comments")
    sub.add_argument("--name", default="", help="of the profile and its file")
    sub.add_argument("--model", help="a folder, or a hub id with @ and its commit")
    sub.add_argument("--rows", help="your rows: a file or folder")
    names = ", ".join(f"{number:02}" for number in FIGURE_STEPS)
    command("figures", figures, f"re-execute {names} from stored results")
    sub = command("promote", promote_results, "copy complete, clean results to results/reference")
    sub.add_argument("--partial", action="store_true", help="what is whole, to results/partial")
    command("resume", resume_partial, "take over the runs of results/partial, then make reproduce")
    command("compare", compare, "hold local results against the reference")
    sub = command("bench", bench, "time ours beside plain TRL, to results/local/bench.json")
    sub.add_argument("--steps", type=int, default=6, help="optimiser steps a row, first not timed")
    gpu_commands.add(command)
    command("report", report, "write a static HTML site of the results")
    command("readme", readme, "write the generated blocks of README and docs/ anew")
    command("strip", strip, "clear outputs of the source notebooks")
    return parser


def default_profile():
    """The profile without PROFILE=: gpu-small if there is a GPU and that profile, else cpu."""
    has_gpu = shutil.which("nvidia-smi") is not None
    gpu = NOTEBOOKS / "profiles" / "gpu-small.yaml"
    return "gpu-small" if has_gpu and gpu.exists() else "cpu"


def _profile(arguments):
    name = arguments.profile or default_profile()
    profile = load_profile(name)
    # A path stays a path, absolute because notebooks run in their own folder.
    reference = str(Path(name).expanduser().resolve()) if is_path(name) else name
    return profile, reference, Paths(profile.name, arguments.out)


# ---------------------------------------------------------------------------------- plan


def plan(arguments):
    profile, _, paths = _profile(arguments)
    show_plan(profile, paths, workers(profile, arguments.cores))


def check(arguments):
    """What would stop a run of the profile: machine, model, tokenizer, rows. Runs nothing."""
    profile, _, _ = _profile(arguments)
    for what, found in preflight.check(profile):
        say(f"{what}: {found}")
    if arguments.machine:
        return
    from neft_utils.base.quiet import quiet_libraries

    quiet_libraries()  # before bitsandbytes is imported, which says what its build lacks
    from neft_utils.evaluate.generate import way_to_decode
    from neft_utils.make.rows import check_rows
    from neft_utils.train.base_models import check_model, require_device

    require_device(profile)  # nvidia-smi may list a card that this torch cannot use
    before = preflight.kept()
    model, tokenizer = check_model(profile)
    way_to_decode(model, profile.data.max_tokens + profile.evaluate.max_new_tokens)
    for line in check_rows(profile, tokenizer):
        say(line)
    for path, size in sorted(preflight.kept().items()):
        if path not in before:
            say(f"written: {path}, {size:.2f} GB, which a run needs too")


def own_profile(arguments):
    """Write NAME.yaml in the working directory, with sizes that fit the rows."""
    from neft_utils.make.own import write_profile

    base = arguments.profile or default_profile()
    print(write_profile(arguments.name, base, arguments.model, arguments.rows))


# ------------------------------------------------------------------------------ one notebook


def notebook(arguments):
    profile, reference, paths = _profile(arguments)
    execute(profile, reference, paths, arguments.step, arguments.arm, arguments.seed)


def answer(arguments):
    """Answers of all trained runs from one vLLM engine, for notebook 04 to read."""
    from neft_utils.evaluate.vllm.engine import answer_all

    profile, _, paths = _profile(arguments)
    answer_all(profile, paths)


# ------------------------------------------------------------------------------- all of them


def reproduce(arguments):
    profile, reference, paths = _profile(arguments)
    for name in (reference, str(ROOT), paths.out):
        if set("{}") & set(name):
            raise ConfigError(f"{name} has braces, which Snakemake takes for wildcards: rename it")
    paths.results.mkdir(parents=True, exist_ok=True)
    probe = paths.results / ".writable"
    atomic_write_text(probe, "")
    probe.unlink()
    if arguments.cores is not None and arguments.cores < 1:
        raise ConfigError(f"--cores must be at least 1, not {arguments.cores}")
    local = arguments.engine == "local"
    check_engine(arguments.engine)
    for what, found in preflight.check(profile, local, arguments.any_versions):
        say(f"{what}: {found}")
    count = workers(profile, arguments.cores) if local else arguments.cores or JOBS
    (ROOT / ".snakemake").mkdir(exist_ok=True)
    with open(ROOT / ".snakemake" / "reproduce.lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(
                "another make reproduce is running in this folder: wait for it"
            ) from None
        options = shlex.split(arguments.engine_options)
        code = run_all(profile, reference, paths, count, lock.fileno(), arguments.engine, options)
    if code:
        return code
    from neft_utils.make.ending import ending

    say(ending(profile, paths))
    return 0


def figures(arguments):
    """Figures and tables again, from local results or, without any, from the reference."""
    profile, reference, paths = _profile(arguments)
    if not (paths.results / "runs").is_dir():
        from neft_utils.make.promotion import PARTIAL

        kept = [Paths(profile.name, folder) for folder in (REFERENCE, PARTIAL)]
        stored = next((one for one in kept if (one.results / "runs").is_dir()), None)
        if stored is None:
            raise ConfigError(f"no stored results of {profile.name}: run make reproduce first")
        staged = paths.results.with_name(f".{paths.results.name}.staged")
        shutil.rmtree(staged, ignore_errors=True)
        shutil.copytree(stored.results, staged)
        shutil.rmtree(paths.results, ignore_errors=True)
        staged.rename(paths.results)
        say(f"no local runs of {profile.name}: these are the numbers of {stored.out}")
    for step in FIGURE_STEPS:
        if step == 0 and profile.device == "cuda" and not preflight.gpus():
            say("00_start_here left out: it looks at the machine, and needs the profile's GPU")
            continue
        execute(profile, reference, paths, step)
        say(f"{STEPS[step]} done")
    say(f"figures in {os.path.relpath(paths.figures, ROOT)}")


def promote_results(arguments):
    """Put local results under version control, and what the README shows of them."""
    from neft_utils.make.promotion import promote
    from neft_utils.make.readme import update_readme

    profile, _, paths = _profile(arguments)
    say(promote(profile, paths, arguments.partial))
    update_readme()


def resume_partial(arguments):
    """Runs that another machine kept in results/partial, beside rows that are made here."""
    from neft_utils.make.resume import resume

    profile, reference, paths = _profile(arguments)
    if not (paths.results / "manifest.json").exists():
        execute(profile, reference, paths, 1)
        say(f"{STEPS[1]} done")
    say(resume(profile, paths))


def compare(arguments):
    """Local means and contrasts against the reference's, one by one with tolerances."""
    from neft_utils.make.compare_reference import hold_against_reference

    profile, _, paths = _profile(arguments)
    return 1 if hold_against_reference(profile, paths) else 0


def bench(arguments):
    """Ours beside plain TRL; needs the profile's data (notebook 01) and an idle machine."""
    from neft_utils.data.splits import load_split
    from neft_utils.make.bench.cpu import bench as measure
    from neft_utils.make.bench.cpu import table

    profile, reference, paths = _profile(arguments)
    load_split(paths.processed, "test")  # says what to run if it is not there
    load = os.getloadavg()[0]
    if load > 0.5:
        say(f"warning: load average {load:.1f}: times mean little on a busy machine")
    if arguments.steps < 2:
        raise ConfigError("--steps must be at least 2: the first one warms up")
    found = measure(profile, reference, paths, arguments.steps)
    write_json(ROOT / paths.out / "bench.json", found)
    say(table(found))


def report(arguments):
    """A static HTML site of local results or, without any, of the reference."""
    from neft_utils.make.report import report as write

    profile, _, paths = _profile(arguments)
    write(profile, paths)


def readme(arguments):
    """What `promote` does to the README and docs/, without promoting."""
    from neft_utils.make.readme import update_readme

    say(f"README.md and docs/ {'written' if update_readme() else 'are up to date'}")


def strip(arguments):
    """Clear outputs and counts of the source notebooks."""
    for path in sorted(NOTEBOOKS.glob("*.ipynb")):
        text = json.loads(path.read_text("utf-8"))
        for cell in text["cells"]:
            if cell["cell_type"] == "code":
                cell["outputs"], cell["execution_count"] = [], None
            cell["metadata"] = {k: v for k, v in cell["metadata"].items() if k == "tags"}
        text["metadata"] = {k: text["metadata"][k] for k in ("kernelspec", "language_info")}
        write_notebook(path, text)


if __name__ == "__main__":
    sys.exit(main())
