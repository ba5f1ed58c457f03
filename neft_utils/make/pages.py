"""A page of the report: an executed notebook as HTML that runs nothing and fetches nothing.

Every page stands alone, style and figures inside. Outputs may hold text that somebody else
wrote (rows of a dataset, answers of a model): it is escaped or cut down to table markup, and a
Content-Security-Policy forbids whatever would slip through.
"""

import base64
import hashlib
import html
import os
import re
import urllib.parse
import xml.etree.ElementTree as ET
from pathlib import Path

import bleach
import mistune
from mistune.plugins.math import math as math_plugin
from mistune.plugins.table import table as table_plugin
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import PythonLexer

from neft_utils.base.files import read_json
from neft_utils.base.paths import NOTEBOOKS, PACKAGE, STEPS
from neft_utils.base.plain import ESCAPES, plain
from neft_utils.compare.words import capital

REPOSITORY = PACKAGE.parent
STYLE = (PACKAGE / "make" / "report.css").read_text("utf-8")
# Only this stylesheet, by its hash, and images that are inside the page.
POLICY = (
    "default-src 'none'; img-src data:; style-src 'sha256-"
    f"{base64.b64encode(hashlib.sha256(STYLE.encode()).digest()).decode()}';"
    " base-uri 'none'; form-action 'none'"
)
TABLE_TAGS = {"table", "caption", "thead", "tbody", "tfoot", "tr", "th", "td", "div", "span", "p"}
TABLE_TAGS |= {"br", "b", "i", "em", "strong", "code"}
TABLE_ATTRIBUTES = {"table": ["class"], "td": ["colspan", "rowspan"], "th": ["colspan", "rowspan"]}
MATHML = "http://www.w3.org/1998/Math/MathML"
ET.register_namespace("", MATHML)
MATH_TAGS = {"math", "mrow", "mi", "mo", "mn", "mtext", "mspace", "mfrac", "msqrt", "mroot", "msub"}
MATH_TAGS |= {"msup", "msubsup", "mover", "munder", "munderover", "mtable", "mtr", "mtd", "mstyle"}
MATH_ATTRIBUTES = {"display", "stretchy", "fence", "form", "separator", "width", "minsize"}
MATH_ATTRIBUTES |= {"maxsize", "mathvariant", "accent", "displaystyle", "scriptlevel"}
MATH_ATTRIBUTES |= {"columnalign", "linethickness", "movablelimits", "lspace", "rspace"}


# ----------------------------------------------------------------------------- what is there


def find_pages(source, treatment):
    """{file name: page} in reading order; a page is a dict with title, claim and notebook.

    Of the steps that run per arm and seed, the treatment's first seed is the page without a
    suffix, which stands in the chain of previous and next.
    """
    pages = {}
    for step in STEPS.values():
        runs = {p.stem.partition("__")[2]: p for p in source.glob(f"notebooks/{step}*.ipynb")}
        runs = {k: p for k, p in runs.items() if not p.stem.endswith(".failed")}
        seeds = [k for k in runs if re.fullmatch(rf"{re.escape(treatment)}-s\d+", k)]
        first = min(seeds or runs, key=lambda k: (len(k), k), default=None)
        for run in sorted(runs, key=lambda k: (k != first, k)):
            notebook = read_json(runs[run])
            cells = notebook.get("cells") if isinstance(notebook, dict) else None
            if not isinstance(cells, list):
                raise ValueError(f"{runs[run].name} is no notebook: delete it and make it again")
            opening = next((_text(c["source"]) for c in cells if c["cell_type"] == "markdown"), "")
            title = re.search(r"^# (.+)", opening, re.M)
            name = f"{step}.html" if run == first else f"{step}__{run}.html"
            pages[name] = {
                "step": step,
                "run": run,
                "title": title[1].strip() if title else step,
                "claim": claim_of(opening),
                "notebook": notebook,
            }
    return pages


def claim_of(opening):
    """The claim in a notebook's first cell: its quote without the heading words, one line."""
    quote = re.search(r"(?:^> ?.*\n?)+", opening, re.M)
    text = re.sub(r"^> ?|\*\*.*?\*\*", "", quote[0] if quote else "", flags=re.M)
    text = " ".join(text.split())
    return capital(text)


def _page_of(step, run, pages):
    """File name of a step's page: the same run's, else the step's first; None without any."""
    same = (n for n, p in pages.items() if p["step"] == step and p["run"] == run)
    return next(same, f"{step}.html" if f"{step}.html" in pages else None)


def _text(source):
    return source if isinstance(source, str) else "".join(source)


# ------------------------------------------------------------------------------ safe pieces


def safe_text(text):
    """Text of a stream or an output for a <pre>: terminal codes removed, markup escaped."""
    lines = ESCAPES.sub("", str(text)).split("\n")
    # Of what a progress bar wrote over itself, the last.
    text = "\n".join(line.rstrip("\r").rpartition("\r")[2] for line in lines)
    return html.escape(plain(text))


def safe_table(markup):
    """HTML of an output cut down to table markup; other tags show as text."""
    markup = re.sub(r"<style\b.*?</style\s*>", "", markup, flags=re.S | re.I)
    return bleach.clean(markup, tags=TABLE_TAGS, attributes=TABLE_ATTRIBUTES)


def safe_math(formula, display="inline"):
    """MathML of a LaTeX formula; its escaped source where it cannot be converted.

    The converter copies text and links as they are: whatever is not plain MathML is refused.
    """
    try:
        from latex2mathml.converter import convert

        tree = ET.fromstring(convert(formula, display=display))
        for element in tree.iter():
            known = element.tag.removeprefix(f"{{{MATHML}}}") in MATH_TAGS
            if not known or set(element.attrib) - MATH_ATTRIBUTES:
                raise ValueError(f"not plain MathML: {element.tag} {element.attrib}")
            _space_operators(list(element))
        return ET.tostring(tree, encoding="unicode")
    except Exception:  # a converter that meets odd input raises anything, IndexError included
        return f"<code>{html.escape(formula)}</code>"


def _space_operators(row):
    """A minus after a bracket or an operator is a sign; a tilde between terms is a relation."""
    for before, element in zip([None, *row], row, strict=False):
        if element.text == "~":
            element.text = "∼"
        if element.text in ("-", "−") and (before is None or before.text in ("(", "[", ",", "=")):
            element.set("form", "prefix")


class _Renderer(mistune.HTMLRenderer):
    """Markdown without raw HTML; `resolve` maps a relative address to a link or None."""

    def __init__(self, resolve):
        super().__init__(escape=True)
        self.resolve = resolve

    def link(self, text, url, title=None):
        target = url if re.match(r"https?://[^\s]+$", url) else self.resolve(url)
        return f'<a href="{html.escape(target)}">{text}</a>' if target else text

    def image(self, text, url, title=None):
        return self.link(text or html.escape(url), url)  # figures come with the outputs

    def block_code(self, code, info=None):
        return f'<pre class="code"><code>{html.escape(code)}</code></pre>\n'

    def table(self, text):
        return f'<div class="scroll" tabindex="0"><table>\n{text}</table></div>\n'

    def inline_math(self, text):
        return safe_math(text)

    def block_math(self, text):
        return f'<div class="formula">{safe_math(text.strip(), "block")}</div>\n'


def markdown(text, resolve=lambda url: None):
    """HTML of Markdown with tables and formulas; raw HTML is escaped, odd links are text."""
    plugins = [table_plugin, math_plugin]
    return mistune.create_markdown(renderer=_Renderer(resolve), plugins=plugins)(text)


def page_html(title, body, previous=None, following=None):
    """A whole page. previous, following: (file name, title) or None."""
    links = ['<a href="index.html">NEFTune, measured</a>']
    for word, one in (("Previous", previous), ("Next", following)):
        if one:
            name, label = urllib.parse.quote(one[0]), html.escape(one[1])
            links.append(f'<a href="{name}">{word}: {label}</a>')
    return f"""\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="referrer" content="no-referrer">
<title>{html.escape(title)}</title>
<style>{STYLE}</style>
</head>
<body>
<header><nav aria-label="Pages">{" ".join(links)}</nav></header>
<main>
{body}
</main>
<footer><p>Made from stored results by <code>make report</code>.</p></footer>
</body>
</html>
"""


# ---------------------------------------------------------------------------- notebook pages


def notebook_page(page, pages, folder):
    """HTML of an executed notebook, to lie in `folder` among `pages`."""

    def resolve(url):
        try:
            path = urllib.parse.unquote(urllib.parse.urlsplit(url).path)
            if path.endswith(".ipynb") and (name := _page_of(Path(path).stem, page["run"], pages)):
                return urllib.parse.quote(name)
            target = (NOTEBOOKS / path).resolve()
            if not path or not target.is_relative_to(REPOSITORY) or not target.exists():
                return None
        except (ValueError, OSError):  # no address at all, or longer than a path can be
            return None
        return urllib.parse.quote(Path(os.path.relpath(target, folder)).as_posix())

    steps = [s for s in STEPS.values() if f"{s}.html" in pages]
    place = steps.index(page["step"])
    near = [_page_of(s, page["run"], pages) for s in steps]
    previous = near[place - 1] if place else "index.html"
    following = near[place + 1] if place + 1 < len(steps) else None
    titles = {"index.html": "Results", **{name: one["title"] for name, one in pages.items()}}
    about = page["notebook"].get("metadata", {}).get("papermill", {})
    facts = [f"Run <code>{html.escape(page['run'])}</code>"] if page["run"] else []
    if about.get("end_time") and about.get("duration"):
        when = html.escape(str(about["end_time"])[:16].replace("T", " "))
        facts.append(f"executed {when} UTC in {float(about['duration']):.0f} s")
    body = [f'<p class="muted">{", ".join(facts)}</p>'] if facts else []
    for number, cell in enumerate(page["notebook"]["cells"], 1):
        source = _text(cell["source"])
        if cell["cell_type"] == "markdown":
            body.append(markdown(source, resolve))
        elif cell["cell_type"] == "code":
            if source.strip():
                code = highlight(source, PythonLexer(), HtmlFormatter(nowrap=True))
                body.append(f'<pre class="code" tabindex="0"><code>{code}</code></pre>')
            body += [_output(o, number, resolve) for o in _joined(cell.get("outputs", []))]
    title = page["title"] + (f" ({page['run']})" if page["run"] else "")
    pair = [(name, titles[name]) if name else None for name in (previous, following)]
    return page_html(title, "\n".join(body), *pair)


def _joined(outputs):
    """Outputs with neighbouring pieces of one stream put together, as a terminal shows them."""
    found = []
    for one in outputs:
        streams = all(x["output_type"] == "stream" for x in (*found[-1:], one))
        if found and streams and one.get("name") == found[-1].get("name"):
            one = {**one, "text": _text(found.pop()["text"]) + _text(one["text"])}
        found.append(one)
    return found


def _output(output, number, resolve):
    """HTML of one output of cell `number`: the richest form that can be shown safely."""
    if output["output_type"] == "stream":
        kind = " stderr" if output.get("name") == "stderr" else ""
        return f'<pre class="output{kind}" tabindex="0">{safe_text(_text(output["text"]))}</pre>'
    if output["output_type"] == "error":
        text = "\n".join(output.get("traceback") or [f"{output['ename']}: {output['evalue']}"])
        return f'<pre class="output stderr" tabindex="0">{safe_text(text)}</pre>'
    data = {kind: _text(value) for kind, value in output.get("data", {}).items() if value}
    if "image/png" in data:
        about = output.get("metadata", {}).get("image/png", {})
        alt = about.get("alt") or f"Figure of cell {number}"
        return image("".join(data["image/png"].split()), alt, about.get("width"))
    if "text/html" in data:
        return f'<div class="scroll" tabindex="0">{safe_table(data["text/html"])}</div>'
    if "text/markdown" in data:
        return markdown(data["text/markdown"], resolve)
    text = safe_text(data.get("text/plain", ""))
    return f'<pre class="output" tabindex="0">{text}</pre>' if text else ""


def image(encoded, alt, width=None):
    if not re.fullmatch(r"[A-Za-z0-9+/=]+", encoded):
        return f'<p class="muted">Not a picture: {html.escape(str(alt))}</p>'
    size = f' width="{width}"' if isinstance(width, int) else ""
    return f'<img src="data:image/png;base64,{encoded}" alt="{html.escape(str(alt))}"{size}>'
