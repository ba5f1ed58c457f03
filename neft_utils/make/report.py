"""`make report`: the results as a static site, an index and one page per executed notebook.

The index answers the questions that people come with (`answers`), then shows the ledger of
claims, the table and the figures, where they come from and how to have them again. What is
missing is said. No page needs a script, a server or the network (see `pages`).
"""

import html
import os

import pandas as pd

from neft_utils.base.files import ROOT, atomic_write_text, read_json
from neft_utils.base.paths import REFERENCE, Paths
from neft_utils.base.strict import ConfigError
from neft_utils.compare.results import Results
from neft_utils.make import answers, sections
from neft_utils.make.pages import find_pages, markdown, notebook_page, page_html

NEFTUNE = """\
NEFTune ([arXiv 2310.05914](https://arxiv.org/abs/2310.05914)) adds uniform noise to the token
embeddings during fine-tuning, and only then: $x' = x + \\frac{\\alpha}{\\sqrt{L d}} \\epsilon$ with
$\\epsilon$ uniform between -1 and 1, $L$ the sequence's own number of tokens, $d$ the embedding
size and $\\alpha$ the strength. Arms with and without noise that share a seed share all else.
"""
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
    parts = [
        "<h1>NEFTune, measured</h1>",
        "<h2>What is NEFTune?</h2>",
        markdown(NEFTUNE),
        "<h2>Does it help here?</h2>",
        f'<p class="lead">In profile <code>{html.escape(profile.name)}</code>:</p>',
        sections.verdict(claims, source),
        _summary(answers.headline, results),
        "<h2>How sure are we?</h2>",
        _summary(answers.certainty, results),
        "<h2>How much of it is length?</h2>",
        _summary(answers.length, results),
        "<h2>What would it cost me to try on my model?</h2>",
        _summary(answers.cost, results),
        "<h2>Every claim</h2>",
        sections.ledger(claims),
        "<h2>Every metric, by arm</h2>",
        sections.main_table(source / "tables" / "main.csv"),
        "<h2>Figures</h2>",
        *sections.figures(source, pages),
        "<h2>Notebooks</h2>",
        sections.notebooks(pages),
        '<h2 id="runs">Runs</h2>',
        sections.runs(pages),
        "<h2>Where the numbers come from</h2>",
        sections.provenance(source),
        "<h2>Reproduce</h2>",
        '<pre class="code" tabindex="0"><code>'
        f"make reproduce PROFILE={html.escape(profile.name)}\n"
        f"make report PROFILE={html.escape(profile.name)}</code></pre>",
        "<p>In a copy of the repository at the commit above; the first command creates the"
        " Python environment, runs every notebook and resumes where it was cut.</p>",
    ]
    if local:
        parts.append(
            "<p>These pages are made from your own run: some of them show rows of the dataset,"
            " which may not be published.</p>"
        )
    following = next(((name, page["title"]) for name, page in pages.items()), None)
    return page_html("NEFTune, measured: results", "\n".join(parts), following=following)


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
