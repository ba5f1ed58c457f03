"""The generated blocks of the README and of docs/, each made from a profile's stored results.

A block stands between comments that name it and its profile, or several, of which the first counts
whose primary claims are all answered, else the last. A test holds every page against the functions
here.
"""

import functools
import re

from neft_utils.base.files import ROOT, atomic_write_text, read_json
from neft_utils.base.paths import NOTEBOOKS, REFERENCE, STEPS, Paths
from neft_utils.base.strict import ConfigError
from neft_utils.compare.expected import how_long
from neft_utils.compare.results import Results
from neft_utils.make import answers, front
from neft_utils.make.bench.cpu import table as speed_table
from neft_utils.make.libraries import library_table
from neft_utils.make.others import others_table
from neft_utils.make.pages import claim_of
from neft_utils.make.promotion import PARTIAL

README = ROOT / "README.md"
PAPER, PACKED = "paper; this repository", "axolotl, TRL: packed to 2048"  # rules of notebook 2
BLOCK = re.compile(r"(<!-- (\w+):([\w,-]+) -->\n)(.*?)(<!-- /\2 -->)", re.S)


def pages():
    """The files that may hold blocks: README.md and docs/*.md."""
    return [README, *sorted(README.parent.glob("docs/*.md"))]


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


def libraries(results):
    """The table of `make.libraries`, and what packing leaves on this profile's rows."""
    found = read_json(results.folder / "noise_check.json") or {}
    found, rules = found.get("median_effective_alpha", {}), ("transformers, TRL: padded", PACKED)
    if not {PAPER, *rules} <= set(found):
        return library_table()
    padded, packed = (found[one] / found[PAPER] for one in rules)
    return library_table() + (
        f"\nOn the rows of profile `{results.folder.name}`, in micro-batches of eight, the median"
        f" sequence gets\n{padded:.0%} of the noise where they are padded and {packed:.0%} where"
        " they are packed to 2,048 tokens.\n"
    )


def others(results):
    """The table of `make.others`, which no results of ours enter."""
    return others_table()


# Name of a block -> function of `compare.results.Results` that returns its Markdown.
BLOCKS = {f.__name__: f for f in (front.lead, front.expected, *answers.ANSWERS)}
BLOCKS |= {f.__name__: f for f in (notebooks, libraries, others, speed)}


def update_readme():
    """Write every generated block of README.md and docs/ anew; returns whether any changed.

    ConfigError for a block of a profile without stored results.
    """
    stored, changed = functools.cache(stored_results), False
    for path in pages():
        if not path.exists():
            continue
        text = path.read_text("utf-8")
        new = BLOCK.sub(lambda m: m[1] + BLOCKS[m[2]](chosen(m[3], stored)) + m[5], text)
        if new != text:
            atomic_write_text(path, new)
            changed = True
    return changed


def chosen(names, stored=None):
    """`Results` of the first named profile that answers all its primary claims, else of the last.

    names: profiles with commas between; stored: `stored_results` or a function like it.
    """
    stored = stored or stored_results
    found = [stored(name) for name in names.split(",")]
    whole = (one for one in found if all(row.verdict.testable for row in one.primary))
    return next(whole, found[-1])


def stored_results(name):
    """`Results` of a profile: the reference, or what there is of one. ConfigError without any."""
    for folder in (ROOT / REFERENCE / name, ROOT / PARTIAL / name):
        if (folder / "claims.json").exists():
            return Results(folder)
    raise ConfigError(f"README and docs show results of {name}, and none are stored: promote them")
