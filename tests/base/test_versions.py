"""`pip install .` and the noise's contract with the oldest and the newest versions there are.

Each test builds a fresh environment of several gigabytes, most of them CUDA libraries: with an
index of CPU builds in PIP_EXTRA_INDEX_URL (README, Add it to your trainer) it is less than one.
"""

import json
import os
import re
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

import pandas as pd
import pytest
import tomllib

from neft_utils.base.paths import PACKAGE
from neft_utils.compare.stats import confirmatory_interval

ROOT = PACKAGE.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
OLDEST = re.match(r">=(3\.\d+)$", PROJECT["requires-python"]).group(1)
NEWEST = ("3.14", "3.13", "3.12")  # the first that is here
GIGABYTES = 12  # of disk, for one environment with CUDA libraries and what pip unpacks meanwhile
DELTAS = {
    "seed": [0, 0, 0, 1, 1, 1, 2, 2, 2],
    "example_id": list("abcabcabc"),
    "delta": [0.5, 0.25, 0.75, 1.0, 0.5, 1.25, 0.25, 0.5, 0.5],
}
USE = """
import importlib.metadata, json, platform, sys
from pathlib import Path
import neft_utils
assert "torch" not in sys.modules
import neft_utils.compare.stats as stats
import pandas as pd
interval = stats.confirmatory_interval(pd.DataFrame(json.loads(sys.argv[1])))
assert neft_utils.verdict(interval)
assert callable(neft_utils.noisy_embeddings)
try:
    neft_utils.load_base
except ImportError as error:
    said = str(error)
place = Path(neft_utils.__file__).parent
data = [path for path in place.rglob("*") if path.suffix in (".csv", ".css", ".yaml")]
files = sorted(str(path.relative_to(place)) for path in data)
packages = ("torch", "transformers", "numpy", "pandas", "scipy")
versions = {name: importlib.metadata.version(name) for name in packages}
versions["python"] = platform.python_version()
print(json.dumps([vars(interval), said, files, versions, str(place)]))
"""


def python(versions):
    """An interpreter of the first of these versions that is here; without one, skip the test."""
    for version in versions:
        pyenv = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv") / "versions"
        found = [shutil.which(f"python{version}"), *sorted(pyenv.glob(f"{version}.*/bin/python"))]
        for path in filter(None, found):
            code = "import sys, ensurepip; print(*sys.version_info[:2], sep='.')"
            said = subprocess.run([path, "-c", code], capture_output=True, text=True)
            if said.stdout.strip() == version:
                return str(path)
    pytest.skip(f"no Python {' or '.join(versions)} with venv on this machine")


def call(*command, cwd):
    hidden = ("PYTHON", "PYTEST", "NEFT_", "COV_")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(hidden)}
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environment)


@pytest.fixture
def folder():
    with tempfile.TemporaryDirectory(prefix="neft-versions-") as name:  # not kept: gigabytes
        if (free := shutil.disk_usage(name).free / 1e9) < GIGABYTES:
            pytest.skip(f"{GIGABYTES} GB of free disk are needed, here are {free:.0f}")
        yield Path(name)


def installed(folder, interpreter, *requirements):
    """The Python of a new environment with this repository, and the seconds that it took."""
    began = time.monotonic()
    assert call(interpreter, "-m", "venv", str(folder / "venv"), cwd=folder).returncode == 0
    own = str(folder / "venv" / "bin" / "python")
    pip = (own, "-m", "pip", "install", "--quiet", "--no-compile", "--disable-pip-version-check")
    done = call(*pip, "--retries", "1", "pytest", "hypothesis", cwd=folder)
    if done.returncode:
        pytest.skip(f"no package index is reachable: {done.stderr.strip().splitlines()[-1]}")
    source = folder / "source"  # a copy: a build leaves its own folders behind
    shutil.copytree(PACKAGE, source / PACKAGE.name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", source)
    done = call(*pip, str(source), *requirements, cwd=folder)
    assert done.returncode == 0, done.stderr
    return own, time.monotonic() - began


def check(own, folder):
    """Hold the contract with that Python; returns the versions that it has."""
    work = folder / "work"
    work.mkdir()
    shutil.copy(ROOT / "tests" / "noise" / "test_noise.py", work)
    (work / "pytest.ini").write_text("[pytest]\nmarkers = gpu: needs CUDA\n", "utf-8")
    done = call(own, "-m", "pytest", "-q", "-rs", "-m", "not gpu", "test_noise.py", cwd=work)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr
    reasons = set(re.findall(r"^SKIPPED \[\d+\] \S+ (.*)", done.stdout, re.M))
    unknown = {x for x in reasons if not re.fullmatch(r"transformers \S+ has no \w+", x)}
    assert not unknown
    print(*sorted(reasons), done.stdout.strip().splitlines()[-1], sep="\n")

    done = call(own, "-c", USE, json.dumps(DELTAS), cwd=work)
    assert done.returncode == 0, done.stderr
    interval, said, files, versions, place = json.loads(done.stdout)
    assert Path(place).is_relative_to(folder / "venv")
    assert interval == pytest.approx(vars(confirmatory_interval(pd.DataFrame(DELTAS))), rel=1e-6)
    assert said.startswith(
        "neft_utils.load_base needs the lab extra: pip install 'neft_utils[lab]'"
    )
    here = (path for path in PACKAGE.rglob("*") if path.suffix in (".csv", ".css", ".yaml"))
    assert files == sorted(str(path.relative_to(PACKAGE)) for path in here)
    return versions


@pytest.mark.versions
def test_the_oldest_versions_that_are_declared(folder):
    floors = dict(requirement.split(">=") for requirement in PROJECT["dependencies"])
    exact = [f"{name}=={floor}" for name, floor in floors.items()]
    own, seconds = installed(folder, python([OLDEST]), *exact)
    versions = check(own, folder)
    print(f"{versions}, installed in {seconds:.0f} s")
    for name, floor in floors.items():
        assert re.fullmatch(rf"{re.escape(floor)}(\.0)*(\+.*)?", versions[name])
    assert versions["python"].startswith(f"{OLDEST}.")


@pytest.mark.versions
def test_the_newest_versions_that_can_be_had(folder):
    own, seconds = installed(folder, python(NEWEST))
    versions = check(own, folder)
    print(f"{versions}, installed in {seconds:.0f} s")
    pinned = (ROOT / "requirements.txt").read_text("utf-8")
    for name in ("torch", "transformers"):  # not resolved to something old, behind the pins
        pin = re.search(rf"^{name}==(\d+)\.(\d+)", pinned, re.M).groups()
        assert tuple(map(int, versions[name].split(".")[:2])) >= tuple(map(int, pin))
