"""The notebooks' own cells, run in this process: what tests train and score is what readers run."""

import json

from neft_utils.base.paths import NOTEBOOKS, STEPS


def run_cells(step, *, until=None, edits=(), namespace=None, **parameters):
    """Run a notebook's code cells in order; returns the names that they leave.

    parameters: values in place of the parameters cell's. until: text of the cell before which to
    stop, first cell that holds it. edits: [(old, new)] for the cells, each of which must occur.
    namespace: names of an earlier call, as in a kernel that goes on.
    """
    path = NOTEBOOKS / f"{STEPS[step]}.ipynb"
    notebook = json.loads(path.read_text("utf-8"))
    names = {"__name__": "__main__", "display": lambda *shown: None}
    names |= namespace or {}
    pending = dict(edits)
    for number, cell in enumerate(notebook["cells"]):
        source = "".join(cell["source"])
        if cell["cell_type"] != "code":
            continue
        if until is not None and until in source:
            break
        for old in [old for old in pending if old in source]:
            source = source.replace(old, pending.pop(old))
        exec(compile(source, f"{path.name}, cell {number}", "exec"), names)
        if "parameters" in cell["metadata"].get("tags", []):
            if unknown := set(parameters) - set(names):
                raise ValueError(f"{path.name} has no parameter {', '.join(unknown)}")
            names |= parameters
    else:
        if until is not None:
            raise ValueError(f"{path.name} has no cell with {until!r}")
    if pending:
        raise ValueError(f"{path.name} has no cell with {next(iter(pending))!r}")
    return names
