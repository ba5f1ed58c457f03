"""`make report`: the results as a static site, an index and one page per executed notebook.

The index is the README with other numbers: its sections in its order and its own words, then what
docs/ answers, the figures, where the numbers come from. What is missing is said. No page needs a
script, a server or the network (see `pages`).
"""

import html
import os

import pandas as pd

from neft_utils.base.files import ROOT, atomic_write_text, read_json
from neft_utils.base.paths import REFERENCE, Paths
from neft_utils.base.strict import ConfigError
from neft_utils.compare.results import Results
from neft_utils.make import answers, front, sections
from neft_utils.make.libraries import library_table
from neft_utils.make.pages import find_pages, markdown, notebook_page, page_html
from neft_utils.make.readme import BLOCK, README

_SUMMARISED = ("claims.json", "published/views.csv")


def report(profile, paths, say=print):
    """Write the site of a profile's results to `paths.results`/report; returns its index.html.

    profile: base.profiles.Profile; paths: where local results are; say: takes one line of progress.
    Reads the local results or, without any, results/reference. ConfigError when there is
    neither, ValueError for a file of the results that cannot be read.
    """
    source, stored = paths.results, Paths(profile.name, REFERENCE).results
    if not _has_results(source):
        if not _has_results(stored):
            raise ConfigError(
                f"no results of {profile.name}: run make reproduce PROFILE={profile.name} first"
            )
        say(f"no results of {profile.name} in {paths.out}: reading {REFERENCE}")
        source = stored
    folder = paths.results / "report"
    pages = find_pages(source, profile.confirmatory.treatment)
    written = {"index.html": index_page(profile, source, pages, local=source != stored)}
    for name, page in pages.items():
        written[name] = notebook_page(page, pages, folder)
    for name, text in written.items():
        # An answer cut within a character may hold half of it, which no file can.
        atomic_write_text(folder / name, text.encode("utf-8", "replace").decode("utf-8"))
    for stale in set(folder.glob("*.html")) - {folder / name for name in written}:
        stale.unlink()
    index = folder / "index.html"
    say(f"report of {len(pages)} notebooks: {os.path.relpath(index, ROOT)}")
    return index


def _has_results(folder):
    return (folder / "claims.json").exists() or any(folder.glob("notebooks/[0-9]*.ipynb"))


# ---------------------------------------------------------------------------------- the index


def index_page(profile, source, pages, local):
    """HTML of the index: the results below `source` and links to `pages`.

    local: whether these are a user's own results, whose pages may show rows of the dataset.
    """
    claims = read_json(source / "claims.json")
    if claims is not None and not (
        isinstance(claims, list) and all(isinstance(row, dict) for row in claims)
    ):
        raise ValueError("claims.json is no list of claims: delete it and run make figures")
    results = Results(source, profile)
    if claims and not any("primary" in row for row in claims):
        # Of an older version: its runs say it in today's words.
        claims = [one.as_json() for one in results.ledger.values()]
    said = readme_sections()
    made = {
        "What we found": [
            f"<p>In profile <code>{html.escape(profile.name)}</code>:</p>",
            sections.lead(source),
            _summary(front.headline, results),
            markdown(_prose(said, "What we found")),
        ],
        "See it yourself": [
            _commands(profile.name),
            "<p>In a clone of the repository, at the commit below for these very numbers. The"
            " first command creates the Python environment, runs every notebook and goes on where"
            " it was cut. It ends with these answers:</p>",
            _summary(front.expected, results),
        ],
        "Notebooks": [sections.notebooks(pages)],
    }
    parts = ["<h1>NEFTune, measured</h1>", markdown(_prose(said, ""))]
    for head in said:
        if head and head not in _ELSEWHERE:
            parts += [f"<h2>{html.escape(head)}</h2>"]
            parts += made.get(head) or [markdown(_prose(said, head))]
    parts += [
        "<h2>The evidence</h2>",
        sections.verdict(claims),
        "<h3>Every claim</h3>",
        sections.ledger(claims),
        "<h3>Every metric, by arm</h3>",
        sections.main_table(source / "tables" / "main.csv"),
        *(markdown(str(one)) for one in (results.caveats if claims and results.runs else ())),
        "<h2>How sure are we?</h2>",
        _summary(answers.certainty, results),
        "<h2>How much of it is length?</h2>",
        _summary(answers.length, results),
        "<h2>What the noise costs</h2>",
        _summary(answers.cost, results),
        "<h2>Figures</h2>",
        *sections.figures(source, pages),
        '<h2 id="runs">Runs</h2>',
        sections.runs(pages),
        "<h2>Where the numbers come from</h2>",
        sections.provenance(source),
    ]
    if local:
        parts.append(
            "<p>These pages are made from your own run: some of them show rows of the dataset,"
            " which may not be published.</p>"
        )
    following = next(((name, page["title"]) for name, page in pages.items()), None)
    return page_html("NEFTune, measured: results", "\n".join(parts), following=following)


_ELSEWHERE = ("More", "Citation and licences")  # links of the repository alone


def readme_sections():
    """{heading: Markdown} of the README in its order, "" for what stands before the first.

    Without a README, as in a copy of the package alone, only the headings that the index fills.
    """
    if not README.exists():
        return dict.fromkeys(("", "What we found", "See it yourself", "Notebooks"), "")
    first, *rest = README.read_text("utf-8").split("\n## ")
    found = {"": first.partition("\n")[2]}
    for one in rest:
        head, _, text = one.partition("\n")
        found[head] = text
    return found


def _prose(said, head):
    """A section of the README without its blocks of stored numbers; the libraries' table stays.

    A last line of links within the README is left out too.
    """
    text = BLOCK.sub(lambda m: library_table() if m[2] == "libraries" else "", said[head])
    lines = [line for line in text.splitlines() if "](#" not in line]
    return "\n".join(lines)


def _commands(name):
    name = html.escape(name)
    return (
        '<pre class="code" tabindex="0"><code>'
        f"make reproduce PROFILE={name}\nmake report PROFILE={name}</code></pre>"
    )


def _summary(answer, results):
    """One of `answers` as HTML, or what is missing for it."""
    for name in _SUMMARISED:
        if not (results.folder / name).exists():
            return sections.missing(name, "run make reproduce, or make figures")
    try:
        if not results.runs:
            return sections.missing("finished run", "run make reproduce")
        return markdown(answer(results))
    except (LookupError, TypeError, ValueError, pd.errors.ParserError) as error:
        return sections.missing(
            f"readable answer ({html.escape(repr(error)[:200])})", "run make figures"
        )
