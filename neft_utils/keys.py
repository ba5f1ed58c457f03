"""When a step is done again: the key of everything that its outcome depends on besides its inputs.

Snakemake holds the key of a finished step against that of the code as it is. Prose, comments and
docstrings do not count.
"""

import ast
import hashlib
import json

import neft_utils
from neft_utils import config


def step_key(profile, step, arm=None, seed=None):
    """sha256 of what a step's outcome depends on besides its input files.

    Code cells of its notebook, code of the package modules that they import (directly or
    not; comments and docstrings do not count), its part of the profile, and the pins.
    """
    notebook = json.loads((config.NOTEBOOKS / f"{config.STEPS[step]}.ipynb").read_text("utf-8"))
    cells = ["".join(c["source"]) for c in notebook["cells"] if c["cell_type"] == "code"]
    modules = _modules_used("\n".join(cells))
    parts = {
        1: (profile.model, profile.data, profile.all_seeds()),
        2: (profile.model, profile.arms),
        3: (profile.model, profile.train, profile.arms.get(arm), seed),
        4: (profile.model, profile.evaluate, arm, profile.arms.get(arm), seed),
    }.get(step, profile)
    facts = sorted(config.HERE.glob("facts/*")) if step in (5, 6) else []
    facts = [path.read_text("utf-8") for path in facts]
    pins = (config.HERE.parent / "requirements.txt").read_text("utf-8").split("# Tools: ")[0]
    pins += (config.HERE.parent / "data" / "packages.txt").read_text("utf-8")
    pins = [line.split("#")[0].strip() for line in pins.splitlines()]
    code = {name: _code_only(config.HERE / f"{name}.py") for name in modules}
    text = json.dumps([cells, code, repr(parts), pins, *facts], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _code_only(path):
    tree = ast.parse(path.read_text("utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(
            node
        ):
            node.body = node.body[1:]
    return ast.dump(tree)


def _modules_used(code):
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
                path = config.HERE / f"{module}.py"
                if name != module and path.is_file() and module not in found:
                    found.add(module)
                    queue.append(path.read_text("utf-8"))
    return sorted(found)
