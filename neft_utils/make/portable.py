"""Wheels of packages that are installed here, for another Python on a machine of this platform."""

import base64
import hashlib
import importlib.metadata
import re
import subprocess
import sys
import zipfile
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from neft_utils.base.strict import ConfigError

# What notebooks and `make` import on a card, without judge, leaderboard, report and cluster. torch
# is not among them: a machine with a card has its own.
ROOTS = (
    *("transformers", "trl", "peft", "accelerate", "bitsandbytes", "datasets", "safetensors"),
    *("gguf", "ijson", "pandas", "scipy", "rouge-score", "sacrebleu", "if-verifiable", "PyYAML"),
    *("matplotlib", "papermill", "snakemake", "ipykernel", "psutil", "pytest", "hypothesis"),
)
NOT = {"torch", "triton"}
OF_THIS_MACHINE = {"INSTALLER", "REQUESTED", "direct_url.json", "RECORD"}
# 117 of bitsandbytes' 129 MB serve other versions of CUDA, and other makers' cards.
OTHER_CARDS = re.compile(r"libbitsandbytes_(cuda(?!130\.)|rocm|xpu|hpu)\w*\.so$")
PLATFORMS = [f"manylinux_2_{n}_x86_64" for n in (39, 35, 34, 31, 28, 27, 24, 17)]
PLATFORMS += ["manylinux2014_x86_64", "manylinux1_x86_64", "linux_x86_64"]


def needed(have=(), roots=ROOTS):
    """Names of the packages that `roots` need, themselves included, without those in `have`."""
    done, queue = set(), [canonicalize_name(name) for name in roots]
    skip = {canonicalize_name(name) for name in have} | NOT
    while queue:
        name = queue.pop()
        if name in done or name in skip or name.startswith("nvidia-"):
            continue
        try:
            asked = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            raise ConfigError(f"{name} is not installed here: run make env") from None
        done.add(name)
        for line in asked:
            one = Requirement(line)
            if one.marker is None or one.marker.evaluate({"extra": ""}):
                queue.append(canonicalize_name(one.name))
    return sorted(done)


def names_in(path):
    """Names of the packages in the lines of a file: as pip freeze writes them, or names alone."""
    if path is None:
        return []
    try:
        lines = Path(path).expanduser().read_text("utf-8").splitlines()
    except OSError as error:
        raise ConfigError(
            f"HAVE={path}: {error.strerror}: give a file, one package a line"
        ) from None
    found = (re.match(r"[A-Za-z0-9][\w.-]*", line.strip()) for line in lines)
    return [match[0] for match in found if match]


def wheels(names, folder, python):
    """Paths of a wheel of each package in `folder`, as installed here, for another Python.

    python: its version, as "3.12". What is no code of one Python's alone is put together from the
    files that are installed, with no network; the others pip downloads in the same version.
    """
    folder.mkdir(parents=True, exist_ok=True)
    found, ask = [], []
    for name in names:
        one = importlib.metadata.distribution(name)
        tags = re.findall(r"^Tag: (\S+)", one.read_text("WHEEL") or "", re.M)
        if tags and all(_portable(tag, python) for tag in tags):
            found.append(build(one, folder, tags[0]))
        else:
            ask.append(f"{name}=={one.version}")
    return found + _downloaded(ask, folder, python)


def _portable(tag, python):
    own, abi, _ = tag.split("-", 2)
    if abi == "none":
        return own.startswith("py")
    minor = int(python.split(".")[1])
    return abi == "abi3" and int(re.sub(r"\D", "", own)[1:]) <= minor


def build(one, folder, tag):
    """A wheel of an installed distribution's own files; of bitsandbytes, what CUDA 13.0 needs."""
    target = folder / f"{canonicalize_name(one.name).replace('-', '_')}-{one.version}-{tag}.whl"
    record, place = [], ""
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in sorted(one.files or [], key=str):
            path = file.as_posix()
            if path.startswith("..") or "__pycache__" in path or OTHER_CARDS.search(path):
                continue
            if file.parent.name.endswith(".dist-info"):
                place = file.parent.as_posix()
                if file.name in OF_THIS_MACHINE:
                    continue
            content = file.read_binary()
            # The same bytes from the same files: no time of this machine.
            archive.writestr(_entry(path), content)
            digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=")
            record.append(f"{path},sha256={digest.decode()},{len(content)}")
        record.append(f"{place}/RECORD,,")
        archive.writestr(_entry(f"{place}/RECORD"), "\n".join(record) + "\n")
    return target


def _entry(path):
    entry = zipfile.ZipInfo(path)
    entry.compress_type, entry.external_attr = zipfile.ZIP_DEFLATED, 0o644 << 16
    return entry


def _downloaded(asked, folder, python):
    if not asked:
        return []
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    command += ["--disable-pip-version-check", "--only-binary=:all:", "--implementation", "cp"]
    command += ["--python-version", python, "-d", str(folder)]
    command += [word for name in PLATFORMS for word in ("--platform", name)]
    done = subprocess.run([*command, *asked], capture_output=True, text=True)
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        raise ConfigError(
            f"pip cannot download a wheel of {', '.join(asked)} for Python {python}"
            f" ({(said or ['no answer'])[0][:120]}): go online, or name in HAVE what is there"
        )
    names = {re.sub(r"[-_.]+", "_", one.split("==")[0]).lower(): one for one in asked}
    files = [p for p in folder.glob("*.whl") if p.name.split("-")[0].lower() in names]
    return sorted(files)


def put(wheel, site):
    """Put a wheel's files below `site`, a folder for PYTHONPATH."""
    with zipfile.ZipFile(wheel) as archive:
        for entry in archive.infolist():
            parts = Path(entry.filename).parts
            if entry.is_dir() or ".." in parts or Path(entry.filename).is_absolute():
                continue
            if parts[0].endswith(".data"):
                if parts[1] not in ("purelib", "platlib"):
                    continue  # scripts, headers: nothing that is imported
                parts = parts[2:]
            target = site.joinpath(*parts)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(archive.read(entry))
