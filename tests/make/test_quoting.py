"""What people name, profiles and folders, is never a command, whatever signs it has."""

import os
import shlex
import shutil
import subprocess
import sys
from urllib.parse import quote

import pytest
from chains import copy_of_the_repository, mine, neft, surroundings
from snakemake.cli import parse_config

from neft_utils.base.files import ROOT
from neft_utils.make.workflow import TEXT, settings

NAMES = ("it's $(touch x)", 'a "b" `touch x`; touch x', "a: b #c & touch x", "a\\nb", "007", "a b")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return copy_of_the_repository(tmp_path_factory.mktemp("quoting"))


@pytest.mark.parametrize("name", NAMES)
def test_a_step_of_a_profile_with_such_a_name_runs_and_its_name_does_not(name, folder, tmp_path):
    profile, out = tmp_path / f"{name}.yaml", f"results/{name}"
    shutil.move(mine(tmp_path), profile)
    target = folder / out / name / "published" / "leaderboard.csv"  # the step that needs no other
    command = [sys.executable, "-m", "snakemake", "--cores", "1", "--nolock", str(target)]
    command += ["--config", *settings(str(profile), out)]
    told = {"cwd": folder, "env": surroundings(folder), "capture_output": True, "text": True}
    done = subprocess.run(command, **told)
    assert done.returncode == 0 and target.exists(), done.stderr
    assert not [path for place in (folder, tmp_path) for path in place.rglob("x")]


@pytest.mark.parametrize("name", NAMES)
def test_a_clusters_shell_finds_nothing_to_do_in_a_setting(name):
    for one in settings(f"/home/{name}.yaml", name):
        assert shlex.quote(one) == one


def test_braces_are_refused_because_snakemake_reads_them(folder, tmp_path):
    done = neft(folder, "reproduce", "--profile", mine(tmp_path), "--out", tmp_path / "{arm}")
    assert done.returncode == 1 and "has braces" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1 and not list(tmp_path.glob("*arm*"))


@pytest.mark.parametrize("name", ["007", "1e3", "null", "True", "[a]", "2020-01-01", "", "a: b"])
def test_snakemake_takes_no_name_for_a_number(name):
    assert parse_config(settings(name, name)) == {
        key: f"{TEXT}{quote(name)}" for key in ("profile", "out")
    }


def test_a_folder_of_the_clone_with_braces_is_one_line(folder, tmp_path):
    clone = tmp_path / "a{arm}"
    shutil.copytree(folder, clone, symlinks=True)
    done = neft(clone, "reproduce", "--profile", "nano")
    assert done.returncode == 1 and f"{clone} has braces" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1 and not (clone / "results/local").exists()


@pytest.fixture(scope="module")
def maker(tmp_path_factory):
    """A folder with the Makefile, whose Python says how it was called and does nothing."""
    folder = tmp_path_factory.mktemp("it's a $(touch x) folder")
    for name in ("Makefile", "requirements.txt", "pyproject.toml"):
        shutil.copy(ROOT / name, folder)
    (folder / ".venv" / "bin").mkdir(parents=True)
    python = folder / ".venv" / "bin" / "python"
    python.write_text('#!/bin/sh\nprintf \'%s\\n\' "$PYTHONPATH" "$@"\n')
    python.chmod(0o755)
    (folder / ".venv" / "installed").touch()
    return folder


def make(folder, *words):
    """What `make` of these words says to Python: its search path, and its arguments."""
    command = ["make", "--no-print-directory", "-C", str(folder), *words]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | UNSET)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    return done.stdout.splitlines()


UNSET = {"MAKEFLAGS": "", "MAKELEVEL": "", "MFLAGS": ""}


@pytest.mark.parametrize("name", [*NAMES, "$(shell touch x)", "$$x ${HOME} $HOME", "-x"])
def test_make_hands_names_on_as_they_are(name, maker):
    path = f"{name}.yaml"
    assert make(maker, "check", f"PROFILE={path}") == [
        *(str(maker), "-m", "neft_utils", "check", f"--profile={path}")
    ]
    said = make(maker, "profile", f"NAME={name}", f"MODEL={name}", f"ROWS={path}")
    assert said[4:] == [f"--name={name}", f"--model={name}", f"--rows={path}"]
    said = make(maker, "reproduce", f"ENGINE={name}", f"ENGINE_OPTIONS={name}", f"CORES={name}")
    assert said[4:] == [f"--cores={name}", f"--engine={name}", f"--engine-options={name}"]
    assert not list(maker.rglob("x"))


def test_make_runs_the_code_of_the_folder_that_it_is_called_in(maker):
    assert make(maker, "plan") == [str(maker), "-m", "neft_utils", "plan"]
