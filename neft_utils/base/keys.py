"""When a step is done again: the key of everything that its outcome depends on besides its inputs.

Snakemake holds the key of a finished step against that of the code as it is. Prose, comments and
docstrings do not count.
"""

import ast
import dataclasses
import hashlib
import json

import neft_utils
from neft_utils.base import paths, pins

# Pins whose version no result depends on: they draw, run and test.
TOOLS = {
    *("matplotlib", "papermill", "snakemake", "snakemake-executor-plugin-slurm", "ipykernel"),
    *("jupyterlab", "nbclient", "nbformat", "pytest", "pytest-xdist", "hypothesis", "statsmodels"),
    *("ruff", "mistune", "bleach", "Pygments", "latex2mathml", "pillow"),
}


def step_key(profile, step, arm=None, seed=None):
    """sha256 of what a step's outcome depends on besides its input files.

    Code cells of its notebook, code of the package modules that they import (directly or
    not; comments and docstrings do not count), its part of the profile, and the pins.
    """
    notebook = json.loads((paths.NOTEBOOKS / f"{paths.STEPS[step]}.ipynb").read_text("utf-8"))
    cells = ["".join(c["source"]) for c in notebook["cells"] if c["cell_type"] == "code"]
    parts = {
        1: (profile.model, profile.data, profile.all_seeds()),
        2: (profile.model, profile.arms),
        3: (profile.model, profile.train, profile.arms.get(arm), seed),
        4: (profile.model, profile.evaluate, arm, profile.arms.get(arm), seed),
    }.get(step, profile)
    facts = sorted(paths.PACKAGE.glob("facts/*")) if step in (5, 6) else []
    facts = [path.read_text("utf-8") for path in facts]
    versions = {name: version for name, version in pins.pins().items() if name not in TOOLS}
    wheels = (paths.PACKAGE.parent / "data" / "packages.txt").read_text("utf-8")
    wheels = [line.split("#")[0].strip() for line in wheels.splitlines()]
    code = {name: _code_only(_file_of(name)) for name in _modules_used("\n".join(cells))}
    text = json.dumps([cells, code, changes(parts), versions, wheels, *facts], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def changes(value):
    """A dataclass as JSON values, without what is at its default: a new setting that a profile
    does not use changes no key."""
    if dataclasses.is_dataclass(value):
        pairs = ((f, getattr(value, f.name)) for f in dataclasses.fields(value))
        return {f.name: changes(one) for f, one in pairs if one != _default(f)}
    if isinstance(value, dict):
        return {name: changes(one) for name, one in value.items()}
    return [changes(one) for one in value] if isinstance(value, tuple | list) else value


def _default(field):
    made = field.default_factory is not dataclasses.MISSING
    return field.default_factory() if made else field.default


def _file_of(module):
    return paths.PACKAGE.joinpath(*module.split(".")).with_suffix(".py")


def _code_only(path):
    tree = ast.parse(path.read_text("utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(
            node
        ):
            node.body = node.body[1:]
    return ast.dump(tree)


def _modules_used(code):
    """Modules of the package, dotted names below it, that code imports, directly or not."""
    found, queue = set(), [code]
    while queue:
        for node in ast.walk(ast.parse(queue.pop())):
            names = []
            if isinstance(node, ast.ImportFrom) and node.module:
                names = [node.module] + [f"{node.module}.{a.name}" for a in node.names]
            elif isinstance(node, ast.Import):
                names = [a.name for a in node.names]
            for name in names:
                module = name.removeprefix("neft_utils.")
                if name != module:  # the package offers some names of its modules as its own
                    module = neft_utils._HOME.get(module, module)
                if name != module and _file_of(module).is_file() and module not in found:
                    found.add(module)
                    queue.append(_file_of(module).read_text("utf-8"))
    return sorted(found)
