"""When a step is done again: the key of everything that its outcome depends on besides its inputs.

Snakemake holds the key of a finished step against that of the code as it is. Prose, comments and
docstrings do not count, nor does the declaration of the steps: where a box of the diagram stands
redoes nothing, and what matters of it (`depends`) is in the key by its values.
"""

import ast
import dataclasses
import functools
import hashlib
import json
from pathlib import Path

import neft_utils
from neft_utils.base import files, paths, pins, steps
from neft_utils.base.contents import content_of
from neft_utils.base.wheels import pinned_packages

# Pins whose version no result depends on: they draw, run and test.
TOOLS = {
    *("matplotlib", "papermill", "snakemake", "snakemake-executor-plugin-slurm", "ipykernel"),
    *("jupyterlab", "nbclient", "nbformat", "pytest", "pytest-xdist", "hypothesis", "statsmodels"),
    *("ruff", "mistune", "bleach", "Pygments", "latex2mathml", "pillow"),
}


def step_key(profile, step, arm=None, seed=None):
    """sha256 of what a step's outcome depends on besides its input files.

    Code cells of its notebook, code of the package modules that they import (directly or
    not; comments and docstrings do not count), its part of the profile with the content of the
    model and rows that lie at its paths, and the pins.
    """
    declared = steps.step(step)
    notebook = json.loads((paths.NOTEBOOKS / f"{declared.stem}.ipynb").read_text("utf-8"))
    cells = ["".join(c["source"]) for c in notebook["cells"] if c["cell_type"] == "code"]
    facts = sorted(paths.PACKAGE.glob("facts/*")) if declared.facts else []
    facts = [path.read_text("utf-8") for path in facts]
    versions = {name: version for name, version in pins.pins().items() if name not in TOOLS}
    wheels = (paths.PACKAGE.parent / "data" / "packages.txt").read_text("utf-8")
    wheels = [line.split("#")[0].strip() for line in wheels.splitlines()]
    code = {name: _code_only(_text_of(name)) for name in _modules_used("\n".join(cells))}
    parts = changes(_parts(declared, profile, arm, seed))
    text = json.dumps([cells, code, parts, versions, wheels, *facts], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _parts(step, profile, arm, seed):
    """What of the profile and the run the step's outcome depends on."""
    profile = _with_contents(profile)
    known = {"arm": arm, "seed": seed, "change": profile.arms.get(arm)}
    known["all_seeds"] = profile.all_seeds()
    parts = [known[name] if name in known else getattr(profile, name) for name in step.depends]
    return parts or profile


def _with_contents(profile):
    """The profile with what is in its own files and folders in place of where they are."""
    for part, key in (("model", "source"), ("data", "path")):
        section = getattr(profile, part)
        name = getattr(section, key)
        if name is None or name == "nano" or name in pinned_packages():
            continue  # made in code, or known by a pin: alike on every machine
        place = Path(name).expanduser()
        if content := content_of(files.ROOT / place):
            held = dataclasses.replace(section, **{key: f"{place.name} {content}"})
            profile = dataclasses.replace(profile, **{part: held})
    return profile


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


def _text_of(module):
    return _file_of(module).read_text("utf-8")


@functools.cache
def _code_only(text):
    tree = ast.parse(text)
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
        for module in _imported(queue.pop()):
            if module not in found and module != "base.steps" and _file_of(module).is_file():
                found.add(module)
                queue.append(_text_of(module))
    return sorted(found)


@functools.cache
def _imported(code):
    """Names below the package that code imports, of modules and of what is in them."""
    names = []
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.ImportFrom) and node.module:
            names += [node.module, *(f"{node.module}.{a.name}" for a in node.names)]
        elif isinstance(node, ast.Import):
            names += [a.name for a in node.names]
    ours = [name.partition(".")[2] for name in names if name.startswith("neft_utils.")]
    # The package offers some names of its modules as its own.
    return [neft_utils._HOME.get(name, name) for name in ours]
