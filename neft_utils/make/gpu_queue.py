"""The queue for a rented card: pieces of work one after the other, cut by time, gone on with.

Nothing here schedules: a piece is a command of ours, `make reproduce` of a profile for the most
part, whose runs Snakemake makes one by one. The queue says what fits, starts one piece after the
other, and stops the last one in time; what is whole then is on disk, and the next call goes on.
"""

import contextlib
import ctypes
import fcntl
import os
import signal
import subprocess
import time

import psutil

from neft_utils.base.files import CODE, ROOT
from neft_utils.base.plain import say
from neft_utils.base.read_profile import load_profile
from neft_utils.base.strict import ConfigError
from neft_utils.make import preflight
from neft_utils.make.gpu_pieces import forget_outdated, look
from neft_utils.make.workflow import own_code

PR_SET_PDEATHSIG = 1
STOPPING = 20  # seconds that a piece may take to stop before it is killed, within the time given


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
            if not state.missing or state.refused:
                continue
            if state.least > _left(end):
                say(f"-- {piece.name}: skipped, {_least(state, _left(end))}")
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


def _least(state, left):
    return f"which needs {state.least:.1f} min at least, of which {left:.1f} are left"


def _say_plan(pieces, out, end):
    left = _left(end)
    for number, piece in enumerate(pieces):
        why = f", {piece.why}" if piece.why else ""
        state, head = look(piece, out), f"  {number} {piece.name}{why}: "
        if not state.missing:
            say(head + "done")
        elif state.refused:
            say(head + f"skipped: {state.refused}")
        elif state.least > left:
            say(head + f"skipped: {state.missing}, {_least(state, left)}")
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
