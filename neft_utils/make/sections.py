"""The numbers of the report's index as HTML: verdict, ledger, table, figures, runs, provenance.

Every function says what is missing, and how to have it, instead of failing.
"""

import base64
import html
import json
import re
import urllib.parse

import pandas as pd

from neft_utils.base.files import read_json
from neft_utils.base.steps import CHAIN
from neft_utils.compare.metrics import METRICS
from neft_utils.compare.tables import main_markdown
from neft_utils.compare.words import capital, digits_of, plain, show, size
from neft_utils.make.front import lead_figure
from neft_utils.make.pages import image, markdown


def missing(what, remedy):
    return f'<p class="muted">No {what} here: {remedy}.</p>'


def _number(value, digits):
    """A number as text; whatever else stands there, escaped."""
    if value is None or (isinstance(value, int | float) and not isinstance(value, bool)):
        return show(value, digits)
    return html.escape(str(value))


def _estimate(row):
    """(estimate, interval, unit) of a claim as safe text, "–" where it has none."""
    unit = str(row.get("unit", ""))
    numbers = [row.get(name) for name in ("estimate", "ci_low", "ci_high")]
    if numbers[0] is None:
        return "–", "", ""
    known = [size(x, unit) if isinstance(x, int | float) else x for x in numbers]
    estimate, low, high = (_number(one, digits_of(unit)) for one in known)
    interval = ""
    if numbers[1] is not None:
        interval = f'<span class="together">[{low}, {high}]</span>'
    return estimate, interval, html.escape(plain(unit))


def _safe(row, key):
    return html.escape(str(row.get(key) or ""))


def lead(source):
    """The figure that the README begins with, where it is drawn."""
    path = lead_figure(source)
    return _figure(path) if path else missing("figure of the end of turn", "run make figures")


def verdict(claims):
    """The primary answers in words and numbers."""
    rows = [one for one in claims or [] if one.get("primary")]
    if not rows:
        return missing("primary verdict", "run make reproduce, which ends with it")
    said = []
    for row in rows:
        estimate, interval, unit = _estimate(row)
        words = _safe(row, "verdict")
        metric = METRICS.get(row.get("metric"), ("", ""))[1] or _safe(row, "metric")
        said.append(
            f"<p><em>{_safe(row, 'claim')}</em> <strong>{capital(words)}.</strong>"
            f'<br><span class="number">{estimate} {interval}</span> {unit}:'
            f" {_safe(row, 'contrast')}, {html.escape(metric)}</p>"
        )
    return f"""<div class="verdict">
{"".join(said)}
<p>Means over paired seeds and their 95 % intervals.</p>
</div>"""


def main_table(path):
    if not path.exists():
        return missing("table of results", "run make reproduce or make figures")
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


def ledger(claims):
    if not claims:
        return missing("ledger of claims", "run make reproduce or make figures")
    heads = (
        "Claim",
        "What we see",
        "Treatment - control [95&nbsp;% interval]",
        "Paper; note on ours",
    )
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
        return missing(f"readable figure {html.escape(path.name)}", "run make figures")
    shown = image(base64.b64encode(path.read_bytes()).decode(), alt)
    return f"<figure>{shown}<figcaption>{html.escape(alt)} {caption}</figcaption></figure>"


def figures(source, pages):
    found = []
    for path in sorted(source.glob("figures/*.png")):
        if path == lead_figure(source):  # it stands beside the verdict
            continue
        home = next((n for n, p in pages.items() if p["step"][:2] == path.stem[:2]), None)
        caption = _link(home, f"Notebook {path.stem[:2]}") if home else ""
        found.append(_figure(path, caption))
    return found or [missing("figures", "run make figures")]


def _link(name, text):
    return f'<a href="{urllib.parse.quote(name)}">{html.escape(text)}</a>'


def notebooks(pages):
    if not pages:
        return missing("executed notebooks", "run make reproduce")
    chain = {name: page for name, page in pages.items() if "__" not in name}
    rows = [
        f"<td>{_link(name, page['title'])}</td><td class='text'>{markdown(page['claim'])}</td>"
        for name, page in chain.items()
    ]
    return _table(("Notebook", "The claim that it tests"), rows)


def runs(pages):
    """One row per run: its pages of the notebooks that run once per arm and seed."""
    found = {}
    for name, page in pages.items():
        if page["run"]:
            found.setdefault(page["run"], {})[page["step"]] = name
    if not found:
        return missing("executed runs", "run make reproduce")
    rows = []
    for run, pages_of in sorted(found.items()):
        steps = [step for step in CHAIN if step.per_run]
        cells = [_link(pages_of[s.stem], s.label) if s.stem in pages_of else "–" for s in steps]
        row = [f"<code>{html.escape(run)}</code>", *cells]
        rows.append("".join(f"<td>{cell}</td>" for cell in row))
    return _table(("Run (arm, seed)", "Fine-tuning", "Evaluation"), rows)


def provenance(source):
    """Table of commit, versions, machine, time and memory, from the runs' own files."""
    about = [read_json(path) for path in sorted(source.glob("runs/*/provenance.json"))]
    if not about:
        return missing("provenance", "run make reproduce")
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
