"""Static rules of the notebooks, of the Makefile, and of paths in the repository."""

import ast
import json
import re

import pytest

from neft_utils.base.paths import NOTEBOOKS, PACKAGE, STEPS

ROOT = PACKAGE.parent
FILES = sorted(NOTEBOOKS.glob("*.ipynb"))
PARAMETERS = {"PROFILE", "ARM", "SEED", "OUT", "MODEL", "ROWS", "SEEDS", "EPOCHS", "REVISION"}
SOLUTIONS = 90


def load(path):
    return json.loads(path.read_text("utf-8"))


def code_cells(notebook):
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def source(cell):
    return "".join(cell["source"])


def test_the_notebooks_are_the_steps():
    assert [path.stem for path in FILES] == list(STEPS.values())
    assert [int(path.stem[:2]) for path in FILES] == list(STEPS)


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
class TestEachNotebook:
    def test_sources_hold_no_outputs_counts_or_empty_cells(self, path):
        names = [cell["id"] for cell in load(path)["cells"]]
        assert len(set(names)) == len(names)
        for cell in load(path)["cells"]:
            assert source(cell).strip()
            if cell["cell_type"] == "code":
                assert cell["outputs"] == [] and cell["execution_count"] is None

    def test_title_has_the_number_of_the_file_and_one_claim(self, path):
        first = source(load(path)["cells"][0])
        assert re.match(rf"# {int(path.stem[:2])}\. \S", first)
        assert len(re.findall(r"^> \*\*Claim", first, re.M)) == 1
        for row in ("You will learn", "Reads", "Writes", "Time, memory"):
            assert f"| {row} |" in first

    def test_one_parameters_cell_of_literals(self, path):
        tagged = [c for c in code_cells(load(path)) if c["metadata"].get("tags") == ["parameters"]]
        assert len(tagged) == 1
        names = []
        for node in ast.parse(source(tagged[0])).body:
            assert isinstance(node, ast.AnnAssign)
            ast.literal_eval(node.value)
            names.append(node.target.id)
        assert set(names) <= PARAMETERS and {"PROFILE", "OUT"} <= set(names)
        assert re.findall(r"  # \S", source(tagged[0])).__len__() == len(names)

    def test_imports_come_before_parameters_come_before_the_rest(self, path):
        cells = code_cells(load(path))
        assert all(
            isinstance(node, ast.Import | ast.ImportFrom)
            for node in ast.parse(source(cells[0])).body
        )
        assert cells[1]["metadata"].get("tags") == ["parameters"]

    def test_cells_are_short_and_links_lead_somewhere(self, path):
        for cell in load(path)["cells"]:
            if cell["cell_type"] == "code":
                assert len(source(cell).splitlines()) <= 30
                assert max(map(len, source(cell).splitlines())) <= 88
            for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", source(cell)):
                assert (NOTEBOOKS / target).exists(), target

    def test_exercises_close_it_and_have_solutions(self, path):
        text = "\n".join(source(cell) for cell in load(path)["cells"])
        number = int(path.stem[:2])
        if number == SOLUTIONS:
            return
        last = source(load(path)["cells"][-1]).partition("## Exercises\n")[2]
        asked = re.findall(r"^(\d)\. \S", last, re.M)
        assert asked == [str(n + 1) for n in range(len(asked))] and 3 <= len(asked) <= 5
        assert f"({STEPS[SOLUTIONS]}.ipynb)" in last
        solved = load(NOTEBOOKS / f"{STEPS[SOLUTIONS]}.ipynb")["cells"]
        solved = "\n".join(source(cell) for cell in solved if cell["cell_type"] == "markdown")
        for n in asked:
            assert f"**Exercise {number}.{n}.**" in solved
        assert f"**Exercise {number}.{len(asked) + 1}.**" not in solved
        assert "TODO" not in text

    def test_the_reader_sees_where_he_is_and_how_long_it_takes(self, path):
        number = int(path.stem[:2])
        text = "\n".join(source(cell) for cell in code_cells(load(path)))
        if number != SOLUTIONS:
            assert f"you_are_here({number})" in text
        assert f"how_long(paths, {number})" in text
        assert "| Time, memory | printed" in source(load(path)["cells"][0])


def test_no_function_is_defined_in_two_places():
    seen = {}
    places = [(p.name, "\n".join(source(c) for c in code_cells(load(p)))) for p in FILES]
    places += [(p.name, p.read_text("utf-8")) for p in PACKAGE.rglob("*.py")]
    for name, text in places:
        for node in ast.parse(text).body:
            if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
                seen.setdefault(node.name, set()).add(name)
    twice = {k: v for k, v in seen.items() if len(v) > 1 and any(n.endswith("ipynb") for n in v)}
    assert not twice


def test_make_alone_lists_every_target():
    text = (ROOT / "Makefile").read_text("utf-8")
    wanted = "env plan check smoke reproduce figures compare bench bench-gpu promote report test"
    wanted += " test-slurm test-faults test-all lint strip clean"
    for target in wanted.split():
        assert re.search(rf"^{target}:.*## \S", text, re.M), target


def test_the_repository_names_no_machine_path():
    for path in [*FILES, *PACKAGE.rglob("*.py"), *ROOT.glob("*.md"), ROOT / "Makefile"]:
        assert not re.search(
            r"(?<![\w.])/(?:home|root|work|Users|mnt)/", path.read_text("utf-8")
        ), path
