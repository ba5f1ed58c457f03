"""What `pip install` asks for, what the reproduction is locked to, and that both agree."""

import ast
import re
import subprocess
import sys
from importlib.metadata import version

import pytest
import tomllib
import yaml

import neft_utils
from neft_utils.base import pins
from neft_utils.base.paths import PACKAGE

ROOT = PACKAGE.parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
PROJECT = PYPROJECT["project"]
# Pins that only tests and lint use: whoever runs those has a clone, and `make env`.
FOR_TESTS = {"nbclient", "nbformat", "pytest", "pytest-xdist", "hypothesis", "ruff", "statsmodels"}
TRIED_OLDER = {"torch": (2, 11)}  # the lab has run with it, on the GPU: results/reference/gpu-small


def numbers(text):
    return tuple(map(int, text.split(".")))


def floors(requirements):
    """{name: lower bound}, and nothing else may be asked for."""
    for line in requirements:
        assert re.fullmatch(r"[\w-]+>=\d+(\.\d+)*", line), f"not a lower bound alone: {line}"
    return {name: numbers(bound) for name, bound in (line.split(">=") for line in requirements)}


def test_the_lock_is_exact_and_says_why():
    lines = (ROOT / "requirements.txt").read_text("utf-8").splitlines()
    for line in lines:
        if line and not line.startswith("#"):
            assert re.match(r"^[\w.-]+==[\w.]+ +# \S", line), f"no exact pin with a reason: {line}"


def test_installed_versions_are_the_pinned_ones():
    for name, pin in pins.pins().items():
        assert version(name).split("+")[0] == pin


def test_an_install_asks_only_for_what_noise_and_stats_import():
    wanted = set()
    for file in ("noise.py", "compare/stats.py"):
        for node in ast.walk(ast.parse((PACKAGE / file).read_text("utf-8"))):
            if isinstance(node, ast.ImportFrom):
                wanted.add(node.module.split(".")[0])
            elif isinstance(node, ast.Import):
                wanted |= {alias.name.split(".")[0] for alias in node.names}
    bounds = floors(PROJECT["dependencies"])
    assert set(bounds) == wanted - set(sys.stdlib_module_names)
    for name, floor in bounds.items():
        assert floor < numbers(pins.pins()[name])
    said = " ".join((ROOT / "README.md").read_text("utf-8").split())
    lines = (line.replace(">=", " ") for line in PROJECT["dependencies"])
    assert f"Python {PROJECT['requires-python'][2:]}, {', '.join(lines)}, or newer" in said


def test_the_lab_starts_at_the_pins_minor_versions():
    lab = floors(PROJECT["optional-dependencies"]["lab"])
    assert set(lab) == set(pins.pins()) - FOR_TESTS
    for name, floor in lab.items():
        assert floor == TRIED_OLDER.get(name, numbers(pins.pins()[name])[:2]), name


def test_only_the_lock_needs_one_python():
    assert PROJECT["requires-python"] == ">=3.10"
    floors(PYPROJECT["build-system"]["requires"])
    conda = yaml.safe_load((ROOT / "environment.yml").read_text("utf-8"))
    python, pip = conda["dependencies"][0], conda["dependencies"][-1]["pip"]
    assert python == f"python={pins.PYTHON}"
    assert pip == ["-r requirements.txt", "--editable ."]
    assert f"(Python {pins.PYTHON})" in (ROOT / "requirements.txt").read_text("utf-8")
    makefile = (ROOT / "Makefile").read_text("utf-8")
    assert f"v == ({pins.PYTHON.replace('.', ', ')}) or print(" in makefile  # and else it says so
    lock = makefile.index("-r requirements.txt\n")
    assert lock < makefile.index("--no-deps --editable .\n")


def test_names_for_reuse_are_where_they_are_said_to_be():
    for name in neft_utils.__all__:
        assert getattr(neft_utils, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'finetune'"):
        neft_utils.finetune  # noqa: B018


@pytest.mark.parametrize("name, missing", [("load_base", "peft"), ("load_profile", "yaml")])
def test_a_name_of_the_lab_says_which_extra_it_needs(name, missing):
    code = f"import sys; sys.modules[{missing!r}] = None; from neft_utils import {name}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    last = done.stderr.strip().splitlines()[-1]
    needs = f"neft_utils.{name} needs the lab extra: pip install 'neft_utils[lab]' ("
    assert last.startswith(f"ImportError: {needs}") and missing in last.removeprefix(needs)
    assert "During handling" not in done.stderr and "direct cause" not in done.stderr
