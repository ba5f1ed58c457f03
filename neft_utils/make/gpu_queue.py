"""What a rented card does first: pieces of work in order of their worth, cut by time, gone on with.

Nothing here schedules: a piece is a command of ours, `make reproduce` of a profile for the most
part, whose runs Snakemake makes one by one. The queue says what fits, starts one piece after the
other, and stops the last one in time; what is whole then is on disk, and the next call goes on.
"""

import contextlib
import ctypes
import dataclasses
import fcntl
import os
import signal
import subprocess
import sys
import time

import psutil

from neft_utils.base.estimate import BENCH_GPU, estimate
from neft_utils.base.files import CODE, ROOT, read_json
from neft_utils.base.keys import step_key
from neft_utils.base.paths import BASE, Paths
from neft_utils.base.plain import say
from neft_utils.base.provenance import git_state
from neft_utils.base.read_profile import load_profile
from neft_utils.base.steps import CHAIN
from neft_utils.base.strict import ConfigError
from neft_utils.make import preflight
from neft_utils.make.gpu_tests import RESULT as TESTS_RESULT
from neft_utils.make.plan import workers
from neft_utils.make.progress import planned_seconds
from neft_utils.make.workflow import one_line, own_code

PR_SET_PDEATHSIG = 1
STOPPING = 20  # seconds that a piece may take to stop before it is killed, within the time given


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
    return [known.get(name) or Piece(name, "profile") for name in names] or list(PIECES)


def run_queue(pieces, minutes, out):
    """Do what fits into `minutes`, in order; returns 0, or 1 where a piece failed.

    Says first what it will do and at the end what is missing. Raises ConfigError for a time that
    is none, and where another queue or `make reproduce` runs here.
    """
    try:
        end = time.monotonic() + 60 * float(minutes)
        if not 0 < float(minutes) < 1e5:
            raise ValueError
    except (TypeError, ValueError):
        raise ConfigError(
            f"MINUTES must be how long the card is there, a number over 0, not {minutes!r}"
        ) from None
    cards = preflight.gpus()
    if not cards and all(_needs_card(piece) for piece in pieces):
        raise ConfigError("gpu-queue needs a CUDA GPU and nvidia-smi lists none: run it on one")
    # In a script's background job interrupts are ignored, and so they would be in every piece.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    failed = []
    with _alone():
        say(f"{float(minutes):g} minutes on {cards[0][0] if cards else 'a CPU'}, in this order:")
        _say_plan(pieces, out, end)
        for piece in pieces:
            state = look(piece, out)
            if not state.missing or state.refused or state.least > _left(end):
                continue
            say(f"-- {piece.name}: {state.missing}, {_left(end):.1f} min left")
            if piece.kind == "profile":
                forget_outdated(load_profile(piece.name), out)
            outcome = _run([*state.command, *_time(piece, end)], end - STOPPING)
            if outcome == "failed":
                failed.append(piece.name)
            if outcome == "stopped":
                say(f"-- {piece.name}: stopped, time is over; what is whole is kept")
        return _say_end(pieces, out, end, failed)


def _left(end):
    """Minutes in which a piece may work."""
    return max(0.0, (end - STOPPING - time.monotonic()) / 60)


def _needs_card(piece):
    return piece.kind != "profile" or load_profile(piece.name).device == "cuda"


@contextlib.contextmanager
def _alone():
    """Raise ConfigError unless nothing of ours runs in this folder."""
    (ROOT / ".snakemake").mkdir(exist_ok=True)
    with contextlib.ExitStack() as files:
        for name, what in (("gpu-queue", "gpu-queue"), ("reproduce", "make reproduce")):
            file = files.enter_context(open(ROOT / ".snakemake" / f"{name}.lock", "w"))
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ConfigError(
                    f"another {what} is running in this folder: wait for it, or end it"
                ) from None
        fcntl.flock(file, fcntl.LOCK_UN)  # which the pieces take themselves
        yield


def _say_plan(pieces, out, end):
    left = _left(end)
    for number, piece in enumerate(pieces):
        state, head = look(piece, out), f"  {number} {piece.name}: "
        if not state.missing:
            say(head + "done")
        elif state.refused:
            say(head + f"skipped: {state.refused}")
        elif state.least > left:
            least = f"needs {state.least:.1f} min at least, {left:.1f} will be left"
            say(head + f"skipped: {state.missing}; {least}")
        else:
            fits = "" if state.minutes <= left else ", as far as the time goes"
            say(head + f"{state.missing}, about {state.minutes:.1f} min{fits}")
            left = max(0.0, left - state.minutes)


def _say_end(pieces, out, end, failed):
    missing = {piece.name: look(piece, out) for piece in pieces}
    for name, state in missing.items():
        if state.missing:
            why = "failed: " if name in failed else f"{state.refused}; " if state.refused else ""
            say(f"missing: {name}: {why}{state.missing}")
    if any(state.missing for state in missing.values()):
        say(f"{max(0, end - time.monotonic()) / 60:.1f} min are left; the same command goes on")
    else:
        say("nothing is missing")
    if profiles := [p.name for p in pieces if p.kind == "profile" and missing[p.name].missing]:
        say(f"tables of what is there: make figures PROFILE={profiles[0]}, and so on")
    return 1 if failed else 0


# ---------------------------------------------------------------------------- how a piece stands


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


# ------------------------------------------------------------------------------------ running it


def _time(piece, end):
    """What a command is told of the time: `bench-gpu` begins no row that does not fit."""
    return ("--minutes", f"{_left(end):.2f}") if piece.kind == "bench" else ()


def _run(command, end):
    """Run a command until `end`, of time.monotonic(): "done", "failed" or "stopped"."""
    environment = dict(os.environ) | own_code(os.environ)
    process = subprocess.Popen(
        command, env=environment, cwd=CODE, start_new_session=True, preexec_fn=_ends_with_us
    )
    try:
        code = process.wait(timeout=max(0.0, end - time.monotonic()))
    except subprocess.TimeoutExpired:
        _stop(process)
        return "stopped"
    except BaseException:
        _stop(process)
        raise
    return "failed" if code else "done"


def _ends_with_us():
    """In a command before it begins: interrupt it when the queue is killed, where Linux can."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGINT)


def _stop(process):
    """Interrupt a command as Ctrl-C does, and kill what of it is still there after STOPPING."""
    with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
        # Kernels have sessions of their own: they are looked up before their parents end.
        family = [psutil.Process(process.pid)]
        family += family[0].children(recursive=True)
        os.killpg(process.pid, signal.SIGINT)
        _, alive = psutil.wait_procs(family, timeout=STOPPING - 5)
        for one in alive:
            with contextlib.suppress(psutil.NoSuchProcess):
                one.kill()
        psutil.wait_procs(alive, timeout=3)
    process.wait()
