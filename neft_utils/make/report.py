"""`make report`: the results as a static site, an index and one page per executed notebook.

The index answers the questions that people come with (`answers`), then shows the ledger of
claims, the table and the figures, where they come from and how to have them again. What is
missing is said. No page needs a script, a server or the network (see `pages`).
"""

import base64
import html
import json
import os
import re
import urllib.parse

import pandas as pd

from neft_utils.base.files import ROOT, atomic_write_text, read_json
from neft_utils.base.paths import REFERENCE, Paths
from neft_utils.base.strict import ConfigError
from neft_utils.compare.metrics import METRICS
from neft_utils.compare.results import Results
from neft_utils.compare.tables import digits_of, main_markdown, show
from neft_utils.make import answers
from neft_utils.make.pages import find_pages, image, markdown, notebook_page, page_html

NEFTUNE = """\
NEFTune ([arXiv 2310.05914](https://arxiv.org/abs/2310.05914)) adds uniform noise to the token
embeddings during fine-tuning, and only then: $x' = x + \\frac{\\alpha}{\\sqrt{L d}} \\epsilon$ with
$\\epsilon$ uniform between -1 and 1, $L$ the sequence's own number of tokens, $d$ the embedding
size and $\\alpha$ the strength. Arms with and without noise that share a seed share all else.
"""
_SUMMARISED = ("claims.json", "tables/type_one_error.csv", "published/views.csv")
_RUN_STEPS = {"03": "fine-tune", "04": "evaluate"}


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
    sections = [
        "<h1>NEFTune, measured</h1>",
        "<h2>What is NEFTune?</h2>",
        markdown(NEFTUNE),
        "<h2>Does it help here?</h2>",
        f'<p class="lead">In profile <code>{html.escape(profile.name)}</code>:</p>',
        _verdict(claims, source),
        _summary(answers.headline, results),
        "<h2>How sure are we?</h2>",
        _summary(answers.certainty, results),
        "<h2>How much of it is length?</h2>",
        _summary(answers.length, results),
        "<h2>What would it cost me to try on my model?</h2>",
        _summary(answers.cost, results),
        "<h2>Every claim</h2>",
        _ledger(claims),
        "<h2>Every metric, by arm</h2>",
        _main_table(source / "tables" / "main.csv"),
        "<h2>Figures</h2>",
        *_figures(source, pages),
        "<h2>Notebooks</h2>",
        _notebooks(pages),
        '<h2 id="runs">Runs</h2>',
        _runs(pages),
        "<h2>Where the numbers come from</h2>",
        _provenance(source),
        "<h2>Reproduce</h2>",
        '<pre class="code" tabindex="0"><code>'
        f"make reproduce PROFILE={html.escape(profile.name)}\n"
        f"make report PROFILE={html.escape(profile.name)}</code></pre>",
        "<p>In a copy of the repository at the commit above; the first command creates the"
        " Python environment, runs every notebook and resumes where it was cut.</p>",
    ]
    if local:
        sections.append(
            "<p>These pages are made from your own run: some of them show rows of the dataset,"
            " which may not be published.</p>"
        )
    following = next(((name, page["title"]) for name, page in pages.items()), None)
    return page_html("NEFTune, measured: results", "\n".join(sections), following=following)


def _summary(answer, results):
    """One of `answers` as HTML, or what is missing for it."""
    for name in _SUMMARISED:
        if not (results.folder / name).exists():
            return _missing(name, "run make reproduce, or make figures")
    try:
        if not results.runs:
            return _missing("finished run", "run make reproduce")
        return markdown(answer(results))
    except (LookupError, TypeError, ValueError, pd.errors.ParserError) as error:
        return _missing(f"readable answer ({html.escape(repr(error)[:200])})", "run make figures")


def _missing(what, remedy):
    return f'<p class="muted">No {what} here: {remedy}.</p>'


def _number(value, digits):
    """A number as text; whatever else stands there, escaped."""
    if value is None or (isinstance(value, int | float) and not isinstance(value, bool)):
        return show(value, digits)
    return html.escape(str(value))


def _estimate(row):
    """(estimate, interval, unit) of a claim as safe text, "–" where it has none."""
    unit = str(row.get("unit", ""))
    digits, ends = digits_of(unit), (row.get("ci_low"), row.get("ci_high"))
    if row.get("estimate") is None:
        return "–", "", ""
    interval = ""
    if ends[0] is not None and ends[0] != ends[1]:
        low, high = (_number(one, digits) for one in ends)
        interval = f'<span class="together">[{low}, {high}]</span>'
    return _number(row["estimate"], digits), interval, html.escape(unit)


def _safe(row, key):
    return html.escape(str(row.get(key) or ""))


def _verdict(claims, source):
    row = next((one for one in claims or [] if one.get("id") == "confirmatory"), None)
    if row is None:
        return _missing("confirmatory verdict", "run make reproduce, which ends with it")
    estimate, interval, unit = _estimate(row)
    verdict = _safe(row, "verdict")
    metric = METRICS.get(row.get("metric"), ("", ""))[1] or _safe(row, "metric")
    figure = _figure(source / "figures" / "05_confirmatory.png")
    return f"""<div class="verdict">
<p><em>{_safe(row, "claim")}</em> <strong>{verdict[:1].upper() + verdict[1:]}.</strong></p>
<p><span class="number">{estimate} {interval}</span> {unit}: {_safe(row, "contrast")},
{metric}; mean over paired seeds and its 95 % interval.</p>
</div>
{figure or _missing("figure of the paired seeds", "run make figures")}"""


def _main_table(path):
    if not path.exists():
        return _missing("table of results", "run make reproduce or make figures")
    try:
        main = pd.read_csv(path)
        names = [n for m in METRICS for n in (m, f"{m}_ci_low", f"{m}_ci_high")]
        main = main.reindex(columns=["arm", *names, "n_seeds"]).dropna(subset="arm")
        numbers = main[[*names]].apply(pd.to_numeric)
        main = main.assign(**numbers, arm=main.arm.map(_one_cell))
        return f'<div class="numbers">{markdown(main_markdown(main))}</div>'
    except (ValueError, pd.errors.ParserError) as error:
        raise ValueError(f"{path.name} is no table ({error}): run make figures") from None


def _one_cell(name):
    """A name as literal text of one Markdown cell."""
    return re.sub(r"([\\`*_{}\[\]()#+!|<>~$&-])", r"\\\1", " ".join(str(name).split()))


def _ledger(claims):
    if not claims:
        return _missing("ledger of claims", "run make reproduce or make figures")
    heads = ("Claim", "Verdict", "Treatment - control [95&nbsp;% interval]", "Paper; note on ours")
    rows = []
    for row in claims:
        estimate, interval, unit = _estimate(row)
        what = f"<code>{_safe(row, 'metric')}</code>, {_safe(row, 'contrast')}"
        number = f"<strong>{estimate}</strong> {interval} {unit}"
        cells = [_safe(row, "claim"), _safe(row, "verdict")]
        cells.append(f"{number}<br>{what}" if row.get("contrast") else number)
        note = f'<br><span class="muted">{_safe(row, "note")}</span>'
        cells.append(_safe(row, "paper") + note)
        rows.append("".join(f'<td class="text">{cell}</td>' for cell in cells))
    return _table(heads, rows)


def _table(heads, rows):
    head = "".join(f"<th>{one}</th>" for one in heads)
    body = "".join(f"<tr>{row}</tr>\n" for row in rows)
    return (
        f'<div class="scroll" tabindex="0"><table class="wide"><thead><tr>{head}</tr></thead>\n'
        f"<tbody>{body}</tbody></table></div>"
    )


def _figure(path, caption=""):
    """A figure with the alternative text that its PNG carries; "" where there is none."""
    if not path.exists():
        return ""
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as picture:
            alt = picture.info.get("Description") or f"Figure {path.stem}"
    except (UnidentifiedImageError, OSError):
        return _missing(f"readable figure {html.escape(path.name)}", "run make figures")
    shown = image(base64.b64encode(path.read_bytes()).decode(), alt)
    return f"<figure>{shown}<figcaption>{html.escape(alt)} {caption}</figcaption></figure>"


def _figures(source, pages):
    found = []
    for path in sorted(source.glob("figures/*.png")):
        if path.stem == "05_confirmatory":  # it stands beside the verdict
            continue
        home = next((n for n, p in pages.items() if p["step"][:2] == path.stem[:2]), None)
        caption = _link(home, f"Notebook {path.stem[:2]}") if home else ""
        found.append(_figure(path, caption))
    return found or [_missing("figures", "run make figures")]


def _link(name, text):
    return f'<a href="{urllib.parse.quote(name)}">{html.escape(text)}</a>'


def _notebooks(pages):
    if not pages:
        return _missing("executed notebooks", "run make reproduce")
    chain = {name: page for name, page in pages.items() if "__" not in name}
    rows = [
        f"<td>{_link(name, page['title'])}</td><td class='text'>{markdown(page['claim'])}</td>"
        for name, page in chain.items()
    ]
    return _table(("Notebook", "The claim that it tests"), rows)


def _runs(pages):
    """One row per run: its pages of notebooks 03 and 04."""
    runs = {}
    for name, page in pages.items():
        if page["run"]:
            runs.setdefault(page["run"], {})[page["step"][:2]] = name
    if not runs:
        return _missing("executed runs", "run make reproduce")
    rows = []
    for run in sorted(runs):
        cells = [_link(runs[run][s], t) if s in runs[run] else "–" for s, t in _RUN_STEPS.items()]
        row = [f"<code>{html.escape(run)}</code>", *cells]
        rows.append("".join(f"<td>{cell}</td>" for cell in row))
    return _table(("Run (arm, seed)", "Fine-tuning", "Evaluation"), rows)


def _provenance(source):
    """Table of commit, versions, machine, time and memory, from the runs' own files."""
    about = [read_json(path) for path in sorted(source.glob("runs/*/provenance.json"))]
    if not about:
        return _missing("provenance", "run make reproduce")
    scored = [read_json(path) for path in sorted(source.glob("runs/*/scores.json"))]
    every = about + [one.get("provenance", {}) for one in scored]
    # The untrained model's only file of provenance is that of its evaluation.
    counted = {json.dumps(one): one for one in every}.values()

    def values(key):
        return sorted({str(one[key]) for one in every if one.get(key) is not None})

    versions = sorted({f"{k} {v}" for one in every for k, v in one.get("versions", {}).items()})
    commits = [one[:12] for one in values("commit")]
    if any(one.get("dirty") for one in every):
        commits.append("with uncommitted changes")
    facts = {
        "Commit": ", ".join(commits) or "unknown",
        "Runs": f"{len(about)}, {len(scored)} of them evaluated",
        "Machine": "; ".join(values("device")),
        "Threads a run": ", ".join(values("threads")),
        "Time": f"{sum(one.get('seconds') or 0 for one in counted) / 60:.0f} minutes in all runs",
        "Memory": f"{max(one.get('peak_memory_gb') or 0 for one in every):.1f} GB a run at most",
        "Versions": "Python " + ", ".join([*values("python"), *versions]),
        "Last finished": max(values("finished"), default="unknown"),
    }
    rows = [f"<th>{k}</th><td class='text'>{html.escape(v)}</td>" for k, v in facts.items()]
    return _table((), rows)
