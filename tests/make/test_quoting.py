"""What people name, profiles and folders, is never a command, whatever signs it has."""

import shlex
import shutil
import subprocess
import sys

import pytest
from chains import copy_of_the_repository, mine, neft, surroundings

from neft_utils.make.workflow import settings

NAMES = ("it's $(touch x)", 'a "b" `touch x`; touch x', "a: b #c & touch x", "a\\nb")


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
