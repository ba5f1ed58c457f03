"""What a run ran on and with: commit, versions, machine, seconds, memory."""

import functools
import importlib.metadata
import math
import os
import platform
import re
import resource
import subprocess
import sys
import time
from pathlib import Path

VERSIONS = ("torch", "transformers", "trl", "peft", "bitsandbytes", "datasets", "numpy")


# --------------------------------------------------------------------- this run, this code


def git_state():
    """{"commit": hash or None, "dirty": True when tracked files differ from it}, of the code.

    None without a repository, and without git.
    """
    place = str(Path(__file__).resolve().parent)

    def git(*args):
        try:
            done = subprocess.run(["git", "-C", place, *args], capture_output=True, text=True)
        except OSError:  # git is not installed
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    status = git("status", "--porcelain", "--untracked-files=no")
    return {
        "commit": git("rev-parse", "HEAD"),
        "dirty": bool(status) if status is not None else None,
    }


@functools.cache
def _cpu_name():
    try:
        text = Path("/proc/cpuinfo").read_text("utf-8")
        return re.search(r"model name\s*:\s*(.+)", text).group(1)
    except (OSError, AttributeError):
        return platform.processor() or platform.machine()


def without_bf16(info=Path("/proc/cpuinfo")):
    """Whether the processor has no instructions for bf16, as far as the system says."""
    try:
        text = info.read_text("utf-8")
    except OSError:
        return False
    known = re.search(r"^(flags|Features)\b", text, re.MULTILINE)
    return bool(known) and not re.search(r"\b(avx512_bf16|amx_bf16|bf16)\b", text)


def peak_memory_gb():
    """Largest resident memory of this process so far, in GB (10⁹ bytes)."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak * (1 if sys.platform == "darwin" else 1024) / 1e9, 3)


def matmul_gflops(repeats=10, seconds=0.5):
    """Fastest bf16 matrix product of this process, in GFLOP/s: what utilisation is a share of.

    A processor without instructions for bf16 takes seconds for each: it is asked once.
    """
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    size = 8192 if device == "cuda" else 1024
    a = torch.randn(size, size, device=device).bfloat16()  # a card is faster on equal bits
    best, begun = math.inf, time.perf_counter()
    for _ in range(repeats):
        started = time.perf_counter()
        float((a @ a)[0, 0])  # reading a value waits for the device
        best = min(best, time.perf_counter() - started)
        if time.perf_counter() - begun > seconds:
            break
    return 2 * size**3 / best / 1e9


def begin():
    """What must be known of a run before it runs, for `describe`: its code, and the time."""
    return {**git_state(), "started": time.perf_counter()}


def describe(begun=None, **extra):
    """Provenance of a run as a dict: code, versions, machine, seconds, memory, plus `extra`.

    begun: what `begin` said, so that an edit during the run is not taken for its code.
    """
    import torch  # not at import: results and plots need no torch

    cuda = torch.cuda.is_available()
    info = {
        **({key: begun[key] for key in ("commit", "dirty")} if begun else git_state()),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in VERSIONS},
        "device": torch.cuda.get_device_name() if cuda else _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "peak_memory_gb": peak_memory_gb(),
        "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    if cuda:
        info["peak_gpu_memory_gb"] = round(torch.cuda.max_memory_allocated() / 1e9, 3)
    if begun:
        info["seconds"] = round(time.perf_counter() - begun["started"], 1)
    return info | extra


def _version(name):
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
