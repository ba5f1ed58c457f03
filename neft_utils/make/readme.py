"""The README's generated blocks, each made from a profile's stored results.

A block stands between comments that name it and its profile. A test holds the README against
these functions.
"""

import functools
import re

from neft_utils.base.files import ROOT, atomic_write_text, read_json
from neft_utils.base.paths import NOTEBOOKS, REFERENCE, STEPS, Paths
from neft_utils.base.strict import ConfigError
from neft_utils.compare.expected import how_long
from neft_utils.compare.results import Results
from neft_utils.make import answers
from neft_utils.make.bench.cpu import table as speed_table
from neft_utils.make.pages import claim_of
from neft_utils.make.promotion import PARTIAL

README = ROOT / "README.md"
BLOCK = re.compile(r"(<!-- (\w+):([\w-]+) -->\n)(.*?)(<!-- /\2 -->)", re.S)


def notebooks(results):
    """Index of the notebooks: title, claim, executed copy in the results, how long it took."""
    folder, treatment = results.folder, results.profile.confirmatory.treatment
    paths = Paths(folder.name, REFERENCE)
    place = f"{REFERENCE}/{folder.name}/notebooks"
    lines = ["| notebook | the claim that it tests | executed | took |", "|---|---|---|---|"]
    for step, name in STEPS.items():
        first = "".join(read_json(NOTEBOOKS / f"{name}.ipynb")["cells"][0]["source"])
        title, claim = re.search(r"^# (.+)", first)[1], claim_of(first)
        copies = sorted(p.name for p in (folder / "notebooks").glob(f"{name}*.ipynb"))
        shown = next((c for c in copies if f"__{treatment}-" in c), copies[0] if copies else None)
        read = f"[read]({place}/{shown})" if shown else "–"
        took = how_long(paths, step, short=True) if shown else "–"
        lines.append(f"| [{title}](notebooks/{name}.ipynb) | {claim} | {read} | {took} |")
    return "\n".join(lines) + "\n"


def speed(results):
    """The tables of `make bench`. ValueError where none was promoted."""
    found = read_json(results.folder / "bench.json")
    if found is None:
        name = results.folder.name
        raise ValueError(f"{name} has no bench.json: run make bench, then make promote")
    return speed_table(found)


# Name of a block -> function of `compare.results.Results` that returns its Markdown.
BLOCKS = {f.__name__: f for f in (*answers.ANSWERS, notebooks, speed)}


def update_readme():
    """Write every generated block of the README anew; returns whether any changed.

    ConfigError for a block of a profile without stored results.
    """
    text, stored = README.read_text("utf-8"), functools.cache(stored_results)
    new = BLOCK.sub(lambda m: m[1] + BLOCKS[m[2]](stored(m[3])) + m[5], text)
    if new != text:
        atomic_write_text(README, new)
    return new != text


def stored_results(name):
    """`Results` of a profile: the reference, or what there is of one. ConfigError without any."""
    for folder in (ROOT / REFERENCE / name, ROOT / PARTIAL / name):
        if (folder / "claims.json").exists():
            return Results(folder)
    raise ConfigError(f"the README shows results of {name} and none are stored: promote them first")
