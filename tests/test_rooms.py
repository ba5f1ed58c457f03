"""The package is rooms in a row: each imports those before it, never those behind."""

import ast
import importlib.util
import json
import subprocess
import sys

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


# What others' packages change when they are imported is their own affair, so those come first. A
# line of what it prints is a module of ours that cannot be imported here, or changes something.
QUIET = """
import importlib, logging, os, sys, warnings

def state():
    loggers = {"": logging.root, **logging.root.manager.loggerDict}
    levels = {name: level for name in loggers if (level := getattr(loggers[name], "level", 0))}
    found = {"filters": list(warnings.filters), "levels": levels, "environ": dict(os.environ)}
    found["handlers"] = list(logging.root.handlers)
    if "transformers" in sys.modules:
        import huggingface_hub.utils, transformers
        found["bars"] = transformers.utils.logging.is_progress_bar_enabled()
        found["hub's bars"] = huggingface_hub.utils.are_progress_bars_disabled()
        found["verbosity"] = transformers.utils.logging.get_verbosity()
        found["attentions"] = set(transformers.AttentionInterface().valid_keys())
        found["masks"] = set(transformers.AttentionMaskInterface().valid_keys())
    if "datasets" in sys.modules:
        found["datasets' bars"] = sys.modules["datasets"].are_progress_bars_disabled()
    return found

def change(name):
    before = state()
    importlib.import_module(name)
    after = state()
    for what in before:
        if before[what] != after[what]:
            print(name, "changes", what)

ours = []
change("neft_utils")
for line in sys.stdin:
    name, _, imports = line.rstrip().partition(": ")
    try:
        exec(imports)
        ours.append(name)
    except ModuleNotFoundError as error:
        print(name, "needs", error.name)
state()  # imports by itself
for name in ours:
    change(name)
assert "transformers" in sys.modules and "datasets" in sys.modules
"""


def of_others(path):
    """A file's imports of others' packages when it is itself imported, as one line of code."""
    nodes = ast.parse(path.read_text("utf-8")).body
    plain = [n for n in nodes if isinstance(n, ast.Import | ast.ImportFrom)]
    lines = [ast.unparse(n) for n in plain if getattr(n, "module", "") != "__future__"]
    return "; ".join(line for line in lines if "neft_utils" not in line) or "pass"


def dotted(path):
    return ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)


def quiet(*files):
    """What importing these files changes, in a process of its own."""
    lines = "".join(f"{dotted(path)}: {of_others(path)}\n" for path in files)
    done = subprocess.run(
        [sys.executable, "-c", QUIET],
        input=lines,
        capture_output=True,
        text=True,
        cwd=PACKAGE.parent,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_importing_the_package_changes_nothing_of_others():
    files = [path for path in PACKAGE.rglob("*.py") if path.name != "__init__.py"]
    has_vllm = importlib.util.find_spec("vllm") is not None
    expected = [] if has_vllm else ["neft_utils.evaluate.vllm.worker needs vllm"]
    assert quiet(*sorted(files)) == expected


@pytest.mark.parametrize(
    "name", ["base.keys", "compare.results", "make.commands", "make.promotion", "make.readme"]
)
def test_commands_that_train_nothing_load_no_torch(name):
    """They answer at once, and say nothing of libraries that they do not need."""
    heavy = {"torch", "transformers", "peft", "trl", "bitsandbytes", "datasets", "lm_eval"}
    code = f"import sys, neft_utils.{name}; print({heavy} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_the_end_of_a_run_that_had_nothing_to_do_waits_for_no_library():
    code = "import sys, neft_utils.make.ending; print({'pandas', 'scipy'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
