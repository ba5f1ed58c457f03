"""Copies of the repository, and the commands as a user runs them there."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import yaml

from neft_utils.base.files import ROOT
from neft_utils.base.paths import NOTEBOOKS

PARTS = ("neft_utils", "notebooks", "Snakefile", "requirements.txt", "pyproject.toml")


def copy_of_the_repository(folder):
    folder.mkdir(exist_ok=True)
    for name in PARTS:
        source = ROOT / name
        (shutil.copytree if source.is_dir() else shutil.copy)(source, folder / name)
    (folder / "data").mkdir()
    stored = "results/reference/cpu"  # which the solutions of the exercises read
    shutil.copytree(ROOT / stored, folder / stored)
    shutil.copy(ROOT / "data" / "packages.txt", folder / "data")
    for name in ("wheels", "models"):
        (ROOT / "data" / name).mkdir(exist_ok=True)
        (folder / "data" / name).symlink_to(ROOT / "data" / name)
    return folder


def neft(folder, *arguments, timeout=600, **environment):
    """Run `python -m neft_utils` of that copy from another folder; returns the process."""
    return subprocess.run(
        command(*arguments),
        cwd="/",
        env=surroundings(folder, **environment),
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def command(*arguments):
    return [sys.executable, "-m", "neft_utils", *map(str, arguments)]


def surroundings(folder, **more):
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, "PYTHONPATH": str(folder), "PATH": path, **more}


def files_of(run):
    return {
        path.relative_to(run): path.read_bytes()
        for path in sorted(run.rglob("*"))
        if path.name
        in ("losses.csv", "generations.jsonl", "noise.json", "adapter_model.safetensors")
    }


def mine(tmp_path, **changes):
    """A nano profile of one's own, with top-level keys replaced."""
    values = yaml.safe_load((NOTEBOOKS / "profiles" / "nano.yaml").read_text("utf-8")) | changes
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(values), "utf-8")
    return path
