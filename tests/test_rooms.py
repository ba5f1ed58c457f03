"""The package is rooms in a row: each imports those before it, never those behind."""

import ast
import json

import pytest

from neft_utils.base.paths import NOTEBOOKS, PACKAGE

ROOMS = ("noise", "base", "data", "train", "evaluate", "compare", "make")
# The package itself only says where names are, and hands `python -m neft_utils` to make.
FILES = sorted(path for path in PACKAGE.rglob("*.py") if path.parent != PACKAGE)


def code_of(path):
    """Python of a module, or of a notebook's code cells."""
    text = path.read_text("utf-8")
    if path.suffix != ".ipynb":
        return text
    cells = json.loads(text)["cells"]
    return "\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "code")


def imported(path):
    """Dotted names of this package that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(code_of(path))):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name} imports relatively"
            if node.module == "neft_utils":
                yield from (f"neft_utils.{alias.name}" for alias in node.names)
            elif node.module and node.module.startswith("neft_utils."):
                yield node.module
        elif isinstance(node, ast.Import):
            yield from (a.name for a in node.names if a.name.startswith("neft_utils."))


def test_there_are_these_rooms_and_no_others():
    places = {path.relative_to(PACKAGE).parts[0] for path in FILES}
    assert places == set(ROOMS) - {"noise"}
    alone = {path.stem for path in PACKAGE.glob("*.py")}
    assert alone == {"__init__", "__main__", "noise"}


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_a_room_imports_only_rooms_before_it(path):
    own = ROOMS.index(path.relative_to(PACKAGE).parts[0])
    for name in imported(path):
        room = name.split(".")[1]
        assert room in ROOMS, f"{name}: import it from the module that defines it"
        assert ROOMS.index(room) <= own, f"{path.name} imports {name}"


@pytest.mark.parametrize("path", sorted(NOTEBOOKS.glob("*.ipynb")), ids=lambda p: p.stem)
def test_nobody_imports_make(path):
    """What `make` runs may change without a step being done again; notebooks start it."""
    rooms = {name.split(".")[1] for name in imported(path)}
    assert rooms and "make" not in rooms


def test_noise_can_be_copied_out():
    assert not list(imported(PACKAGE / "noise.py"))


def test_files_are_short_enough_to_read_at_once():
    long = {p.name: n for p in FILES if (n := len(p.read_text("utf-8").splitlines())) > 350}
    assert not long


QUIET = """
import logging, sys, warnings
before = list(warnings.filters), logging.getLogger("bitsandbytes").level
import importlib, neft_utils
for name in sys.argv[1:]:
    importlib.import_module(name)
assert (list(warnings.filters), logging.getLogger("bitsandbytes").level) == before
if "transformers" in sys.modules:
    from transformers import AttentionInterface
    from transformers.utils import logging as bars
    assert bars.is_progress_bar_enabled(), "progress bars are off"
    assert "per_document" not in AttentionInterface().valid_keys(), "an attention is registered"
"""
