"""The pieces of work for a rented card, in order of their worth, and how each of them stands."""

import dataclasses
import sys
from pathlib import Path

from neft_utils.base.estimate import BENCH_GPU, estimate
from neft_utils.base.files import ROOT, read_json
from neft_utils.base.keys import step_key
from neft_utils.base.paths import BASE, Paths, is_path
from neft_utils.base.plain import say
from neft_utils.base.provenance import git_state
from neft_utils.base.read_profile import load_profile
from neft_utils.base.steps import CHAIN
from neft_utils.base.strict import ConfigError
from neft_utils.make import preflight
from neft_utils.make.gpu_tests import RESULT as TESTS_RESULT
from neft_utils.make.plan import workers
from neft_utils.make.progress import planned_seconds
from neft_utils.make.workflow import one_line


@dataclasses.dataclass(frozen=True)
class Piece:
    """One thing to do: the tests of the card, `make bench-gpu`, or a profile, by name or path."""

    name: str
    kind: str  # "tests", "bench" or "profile"
    why: str = ""


PIECES = (
    Piece("tests", "tests", "whether the card computes what the CPU does"),
    Piece("bench-gpu", "bench", "speed and memory at Llama-2-7B's shape beside plain TRL"),
    Piece("gpu-qlora", "profile", "QLoRA with 4-bit weights on the card, once"),
    Piece("gpu-full", "profile", "full fine-tuning of a base model, over the dose of noise"),
    Piece("gpu-small", "profile", "five seed pairs and the curve over the noise"),
    Piece("gpu-ablations", "profile", "what the parts of the noise do"),
)
ROWS = 3  # of `make bench-gpu`
BENCH = {"minutes": 1.4, "least": 1.6, "gpu_gb": 24}  # a row; bf16 weights and NF4's of 7B at once
TESTS = {"minutes": 1.5, "least": 0.5}


@dataclasses.dataclass
class State:
    """How a piece stands: what is missing in words, minutes for all and for the least part of it
    that can be kept, the command, and why it cannot be done here, if it cannot."""

    missing: str
    minutes: float = 0.0
    least: float = 0.0
    command: tuple[str, ...] = ()
    refused: str = ""


def pieces_named(names):
    """PIECES, or those of these names in this order; other names are profiles, or their files."""
    known = {piece.name: piece for piece in PIECES}
    # A piece runs in the repository's folder, whence a relative path would lead elsewhere.
    names = [str(Path(name).expanduser().resolve()) if is_path(name) else name for name in names]
    return [known.get(name) or Piece(name, "profile") for name in names] or list(PIECES)


def look(piece, out):
    """A piece's State from what is on disk."""
    return {"tests": _tests, "bench": _bench, "profile": _profile}[piece.kind](piece, out)


def _ours(*words):
    return (sys.executable, "-m", "neft_utils", *words)


def _tests(piece, out):
    found, here = read_json(ROOT / out / TESTS_RESULT) or {}, preflight.gpus()
    code = git_state()
    if here and found.get("device") == here[0][0] and found.get("commit") == code["commit"]:
        if not found["failed"]:
            return State("")
        return State(", ".join(found["names"][:3]), refused=f"{found['failed']} fail on this card")
    refused = "" if here else "needs a CUDA GPU"
    command = _ours("gpu-tests", "--out", out)
    return State("not run on this card", **TESTS, command=command, refused=refused)


def _bench(piece, out):
    rows = (read_json(ROOT / out / BENCH_GPU) or {}).get("rows", {})
    count = ROWS - sum("skipped" not in row for row in rows.values())
    if not count:
        return State("")
    cards, refused = preflight.gpus(), ""
    if not cards:
        refused = "needs a CUDA GPU"
    elif (size := max(size for _, size in cards)) < BENCH["gpu_gb"]:
        refused = f"needs {BENCH['gpu_gb']} GB of GPU memory, this card has {size:.0f}"
    minutes = count * BENCH["minutes"]
    command = _ours("bench-gpu", "--out", out)
    return State(f"{count} of {ROWS} rows", minutes, BENCH["least"], command, refused)


def _profile(piece, out):
    profile = load_profile(piece.name)
    paths = Paths(profile.name, out)
    runs = [(BASE, 0), *profile.runs()]
    left = [run for run in runs if not is_current(profile, paths, *run)]
    tables = [] if (paths.results / "claims.json").exists() else ["the tables"]
    if not left and not tables:
        return State("")
    try:
        preflight.check(profile, any_versions=True)
        refused = ""
    except ConfigError as error:
        refused = one_line(error)
    each, side = planned_seconds(estimate(profile, paths), CHAIN), workers(profile)
    first = 0 if (paths.processed / "manifest.json").exists() else each["prepare"]
    trained = sum(arm != BASE for arm, _ in left)
    runs_seconds = trained * each["finetune"] + len(left) * each["evaluate"]
    once = sum(not step.per_run for step in CHAIN) * each["compare"]
    # One run alone, for nothing less than a run is kept.
    least = first + each["finetune"] + each["evaluate"] if left else each["compare"]
    names = [f"{arm}-s{seed}" for arm, seed in left]
    some = ", ".join(names[:4]) + (" …" if len(names) > 4 else "")
    words = [f"{len(left)} of {len(runs)} runs ({some})"] if left else []
    command = _ours("reproduce", "--profile", piece.name, "--out", out, "--any-versions")
    minutes = (runs_seconds / side + once) / 60
    return State(" and ".join(words + tables), minutes, least / 60, command, refused)


def is_current(profile, paths, arm, seed):
    """Whether a run is whole and made by this code, these settings and these pins."""
    run = paths.run(arm, seed)
    scores, config = (read_json(run / name) for name in ("scores.json", "config.json"))
    if scores is None or config is None or not (run / "provenance.json").exists():
        return False
    if scores["provenance"]["step_key"] != step_key(profile, 4, arm, seed):
        return False
    return arm == BASE or config["step_key"] == step_key(profile, 3, arm, seed)


def forget_outdated(profile, out):
    """Delete what says that a run is whole where other code, settings or pins made it.

    Snakemake would know by its own notes, but those stay behind when results are carried to another
    machine: without them it would take the run as it is.
    """
    paths = Paths(profile.name, out)
    for arm, seed in [(BASE, 0), *profile.runs()]:
        run = paths.run(arm, seed)
        if not (run / "scores.json").exists() or is_current(profile, paths, arm, seed):
            continue
        say(f"{run.name} is of other code or settings: it is made again")
        (run / "scores.json").unlink()
        config = read_json(run / "config.json") or {}
        if arm != BASE and config.get("step_key") != step_key(profile, 3, arm, seed):
            (run / profile.weights).unlink(missing_ok=True)
