"""The report: whole without network or script, and text from elsewhere stays text."""

import dataclasses
import html
import itertools
import json
import re
import shutil
import subprocess
import urllib.parse
from html.parser import HTMLParser

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from neft_utils.base.files import ROOT
from neft_utils.base.paths import NOTEBOOKS, REFERENCE, STEPS, Paths
from neft_utils.base.read_profile import load_profile
from neft_utils.base.strict import ConfigError
from neft_utils.compare import plots
from neft_utils.compare.results import Results
from neft_utils.evaluate.scoring import ITEM_COLUMNS
from neft_utils.make import pages
from neft_utils.make.readme import README
from neft_utils.make.report import _ELSEWHERE as ELSEWHERE
from neft_utils.make.report import report

VOID = {"meta", "img", "br", "hr", "link", "input"}
# Each adds its name to the title where it runs by itself.
PAYLOADS = {
    "script": "<script>document.title += ' RAN-script'</script>",
    "img": "<img src=x onerror=\"document.title += ' RAN-img'\">",
    "svg": "</pre></td><svg onload=\"document.title += ' RAN-svg'\"></svg>",
    "style": "<style></style><script>document.title += ' RAN-style'</script>",
}
LINKS = """[a](javascript:document.title='RAN') <a href="javascript:document.title='RAN'">b</a>
[c](data:text/html,<script>document.title='RAN'</script>) ![d](https://example.org/x.png)
$\\href{javascript:document.title='RAN'}{e}$ $\\text{<script>document.title='RAN'</script>}$"""
EVIL = " ".join(PAYLOADS.values())


class Page(HTMLParser):
    """Elements of a page as (tag, attributes), its title; fails on what does not nest."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.open, self.words = [], [], []
        self.feed(text)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data):
        self.words.append(data)

    def text(self):
        return " ".join(" ".join(self.words).split())


def check(path):
    """What holds for every page of the site; returns it parsed."""
    page = Page(path.read_text("utf-8"))
    tags = {tag for tag, _ in page.elements}
    assert {"header", "nav", "main", "title"} <= tags
    assert not tags & {"script", "iframe", "object", "embed", "svg", "form", "base", "link"}
    policies = [a["content"] for _, a in page.elements if "http-equiv" in a]
    assert len(policies) == 1 and policies[0].startswith("default-src 'none'; img-src data:;")
    assert "unsafe" not in policies[0]
    for tag, attributes in page.elements:
        assert not [name for name in attributes if name.startswith("on")]
        assert not {"style", "srcset", "action", "formaction", "xlink:href"} & set(attributes)
        if "src" in attributes:
            assert tag == "img" and attributes["src"].startswith("data:image/png;base64,")
        if tag == "img":
            assert attributes["alt"].strip()
        if "href" in attributes:
            assert tag == "a"
            url = urllib.parse.urlsplit(attributes["href"])
            if url.scheme != "https":
                assert not url.scheme and not url.netloc
                target = path.parent / urllib.parse.unquote(url.path)
                assert target.exists(), f"{path.name}: {attributes['href']}"
    home = next(a for t, a in page.elements if t == "a")
    assert home["href"] == "index.html"
    return page


def code(*outputs, source="print(1)"):
    return {"cell_type": "code", "source": source, "metadata": {}, "outputs": list(outputs)}


def words(source):
    return {"cell_type": "markdown", "source": source, "metadata": {}}


def shown(kind, text, **metadata):
    return {"output_type": "display_data", "data": {kind: text}, "metadata": metadata}


def printed(text, name="stdout"):
    return {"output_type": "stream", "name": name, "text": [text]}


def write_notebook(folder, name, *cells):
    path = folder / "notebooks" / f"{name}.ipynb"
    path.parent.mkdir(parents=True, exist_ok=True)
    about = {"papermill": {"duration": 2.5, "end_time": "2026-01-02T03:04:05+00:00"}}
    path.write_text(json.dumps({"cells": cells, "metadata": about}), "utf-8")


def claim(**changes):
    row = {"id": "content_nll", "claim": "Noise helps.", "contrast": "noisy - plain"}
    row["primary"] = True
    row |= {"metric": "test_nll", "unit": "nats/token", "estimate": -0.1234, "ci_low": -0.2}
    row |= {
        "ci_high": -0.05,
        "detectable": 0.1,
        "verdict": "the loss is lower",
        "paper": "Table 0",
        "note": "small",
    }
    return row | changes


def write_run(folder, arm, seed, text):
    """A run of a few test rows as notebooks 3 and 4 leave it, on a device called `text`."""
    run = folder / "runs" / f"{arm}-s{seed}"
    run.mkdir(parents=True)
    for name, columns in ITEM_COLUMNS.items():
        pd.DataFrame(columns=columns).to_csv(run / name, index=False)
    rows = pd.DataFrame({"split": "test", "example_id": list("abcd"), "n_tokens": 5})
    rows["nll"] = 1.5 + np.random.default_rng(seed).random(4) + 0.1 * seed * (arm != "baseline")
    rows.to_csv(run / "losses.csv", index=False)
    (run / "generations.jsonl").write_text("")
    pd.DataFrame({"validation_nll": [2.0, 1.9]}).to_csv(run / "train_log.csv", index=False)
    about = {"commit": "0123456789abcdef", "dirty": True, "device": text, "seconds": 20}
    about |= {"arm": arm, "seed": seed, "threads": 1, "peak_memory_gb": 2.5, "train_seconds": 9}
    about |= {"python": "3.11.1", "versions": {}}
    (run / "provenance.json").write_text(json.dumps(about))
    scored = {**about, "seconds": 10, "phase_seconds": {"answers": 0}}
    (run / "scores.json").write_text(json.dumps({"provenance": scored}))


def write_results(folder, text="plain words"):
    """Small results with `text` wherever somebody else's words can come in."""
    arms = load_profile("smoke").confirmatory
    table = pd.DataFrame({"prompt": [text, "b"], "answer": [text, "2"]})
    for number, step in STEPS.items():
        for run in (
            [""]
            if number not in (3, 4)
            else [
                f"{arms.treatment}-s2",
                f"{arms.treatment}-s10",
                f"{arms.control}-s1",
                f"odd {text}-s1".replace("/", "-")[:150],
            ]
        ):
            write_notebook(
                folder,
                step + (run and f"__{run}"),
                words(f"# {number}. Step {text}\n\n> **Claim tested here:** it holds, {text}\n"),
                words(
                    f"[next]({STEPS[min(number + 1, 7)]}.ipynb) [read](../README.md) [no](no.md)"
                ),
                words(f"{text}\n\n{LINKS}\n\n| a | b |\n|---|---|\n| {text} | 2 |"),
                code(printed(f"\x1b[31mred {text}\x1b[0m\n"), printed(text, "stderr")),
                code(shown("text/html", table.to_html(escape=False)), source=f"x = '''{text}'''"),
                code(shown("text/markdown", f"{text}\n\n{LINKS}"), shown("text/plain", text)),
                code(shown("image/svg+xml", f"<svg>{text}</svg>")),
                code({"output_type": "error", "ename": text, "evalue": "", "traceback": [text]}),
            )
    everywhere = ("claim", "note", "estimate", "verdict", "contrast", "paper")
    rows = [claim(), claim(id="x", **dict.fromkeys(everywhere, text))]
    (folder / "claims.json").write_text(json.dumps(rows))
    (folder / "tables").mkdir()
    (folder / "published").mkdir()
    arm, nll, seeds = ["plain", "noisy", text], [1.5, 1.4, 2.25], [2, 2, 1]
    for name, table in {
        "tables/main": {"arm": arm, "test_nll": nll, "n_seeds": seeds},
        "tables/coverage": {"interval": [0.94, 0.97], "crossed_bootstrap": [0.75, 0.95]},
        "published/views": {
            **{"view": [text], "kind": ["raw"], "n": [803]},
            **{"estimate": [35.1], "ci_low": [31.2], "ci_high": [39.0]},
        },
    }.items():
        pd.DataFrame(table).to_csv(folder / f"{name}.csv", index=False)
    for arm, seed in itertools.product((arms.control, arms.treatment), (0, 1)):
        write_run(folder, arm, seed, text)
    plots.save(plt.figure(figsize=(1, 1)), folder / "figures", "05_confirmatory", text)
    plots.save(plt.figure(figsize=(1, 1)), folder / "figures", "02_other", text)


def build(tmp_path, **changes):
    profile = dataclasses.replace(load_profile("smoke"), **{"seeds": (0, 1), **changes})
    lines = []
    return report(profile, Paths(profile.name, str(tmp_path)), lines.append), lines


@pytest.fixture
def results(tmp_path):
    folder = tmp_path / "smoke"
    folder.mkdir()
    return folder


def test_pages_of_small_results(tmp_path, results):
    write_results(results)
    (results / "notebooks" / "05_compare_and_plot.failed.ipynb").write_text("{")
    (results / "report").mkdir()
    (results / "report" / "03_finetune_qlora__gone-s0.html").write_text("of an older run")
    index, lines = build(tmp_path)
    names = {path.name for path in index.parent.iterdir()}
    treatment = load_profile("smoke").confirmatory.treatment
    assert {"index.html", *(f"{step}.html" for step in STEPS.values())} <= names
    assert f"03_finetune_qlora__{treatment}-s10.html" in names  # first by number, not by name
    assert f"03_finetune_qlora__{treatment}-s2.html" not in names
    assert len(names) == 1 + 7 + 2 * 4
    assert len(lines) == 1 and "15 notebooks" in lines[0]
    read = {path.name: check(path) for path in index.parent.iterdir()}
    text = read["index.html"].text()
    for part in (
        "The loss is lower.",
        "94% to 97%",
        "-0.1234 [-0.2000, -0.0500]",
        "2.2500",
        "0123456789ab, with unc",
    ):
        assert part in text
    for part in (
        "29.79 to 64.69 (+34.90)",
        "four times out of five 3 pairs 5 pairs",
        "leaderboard, as judged +35.2",
    ):
        assert part in text
    assert "readable answer" not in text
    assert "2 minutes in all runs" in text
    assert sum(tag == "img" for tag, _ in read["index.html"].elements) == 2
    page = read["04_evaluate.html"]
    assert f"Run {treatment}-s2" in page.text() and "red plain words" in page.text()
    assert "executed 2026-01-02 03:04 UTC in 2 s" in page.text()
    hrefs = [a["href"] for t, a in page.elements if t == "a"]
    assert hrefs[:3] == ["index.html", "03_finetune_qlora.html", "05_compare_and_plot.html"]
    assert any(href.endswith("README.md") for href in hrefs) and "no.md" not in hrefs


def heads(path):
    return [html.unescape(one) for one in re.findall(r"<h2.*?>(.*?)</h2>", path.read_text("utf-8"))]


def test_the_index_is_the_readme_with_other_numbers(tmp_path, results):
    """The same headings in the same order, and its own words under them."""
    write_results(results)
    index, _ = build(tmp_path)
    readme = README.read_text("utf-8")
    wanted = [one for one in re.findall(r"^## (.+)", readme, re.M) if one not in ELSEWHERE]
    assert len(wanted) == 6 and heads(index)[: len(wanted)] == wanted
    text = check(index).text()
    for words in (
        "does a model stop later, does it say something better, does it overfit less?",
        "The paper divides by each sequence's own length",
        "the authors' training code 5.0",
        "pip install .",
        "callbacks=[NEFTuneCallback(noise_alpha)]",
        "No judge and no win rate of our own",
    ):
        assert words in text, words
    assert "make reproduce PROFILE=smoke" in text and "<!--" not in text
    asked = ("How sure are we?", "How much of it is length?", "What the noise costs")
    assert [one for one in heads(index) if one in asked] == list(asked)


def test_a_run_leads_to_its_own_evaluation(tmp_path, results):
    write_results(results)
    index, _ = build(tmp_path)
    control = load_profile("smoke").confirmatory.control
    page = check(index.parent / f"03_finetune_qlora__{control}-s1.html")
    hrefs = [a["href"] for t, a in page.elements if t == "a"]
    own = f"04_evaluate__{control}-s1.html"
    assert hrefs[1:3] == ["02_noisy_embeddings.html", own]
    assert own in hrefs[3:]  # the link in its text, too


def test_missing_pieces_are_said(tmp_path, results):
    write_notebook(results, "00_start_here", words("no title"), code())
    text = check(build(tmp_path)[0]).text()
    for what in (
        "verdict",
        "table of results",
        "ledger of claims",
        "figures",
        "runs",
        "provenance",
    ):
        assert re.search(rf"No \w* ?{what} here: run make", text), what
    shutil.rmtree(results / "notebooks")
    (results / "claims.json").write_text("[]")
    assert "No executed notebooks here" in check(build(tmp_path)[0]).text()


def test_runs_without_a_pair_are_no_verdict(tmp_path, results):
    write_results(results)
    for run in results.glob(f"runs/{load_profile('smoke').confirmatory.treatment}-s*"):
        shutil.rmtree(run)
    text = check(build(tmp_path)[0]).text()
    assert "readable answer" not in text and "not measured here" in text
    assert "Not complete: 2 of 5 runs are there, baseline-s0, baseline-s1." in text
    shutil.rmtree(results / "runs")
    assert "No finished run here: run make reproduce" in check(build(tmp_path)[0]).text()


def test_names_are_not_read_as_markdown(tmp_path, results):
    write_results(results)
    (results / "tables" / "main.csv").write_text(
        "arm,test_nll,n_seeds\na|b *c* &lt; [d](e),1.5,1\n"
    )
    assert "metric, unit a|b *c* &lt; [d](e) (1) test_nll" in check(build(tmp_path)[0]).text()


def test_nothing_at_all_is_one_line(tmp_path):
    with pytest.raises(ConfigError, match="^no results of nowhere: run make reproduce PROFILE=no"):
        build(tmp_path, name="nowhere")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "name", ["claims.json", "tables/main.csv", "notebooks/00_start_here.ipynb"]
)
def test_a_broken_file_is_named(tmp_path, results, name):
    write_results(results)
    (results / name).write_text("arm,test_nll\nplain,much\n")
    with pytest.raises(ValueError, match=f"^{name.split('/')[-1]} is no.*(delete|run make)"):
        build(tmp_path)


@pytest.mark.skipif(not (ROOT / REFERENCE / "cpu").exists(), reason="no reference of cpu")
def test_pages_of_the_reference(tmp_path):
    profile = load_profile("cpu")
    lines = []
    index = report(profile, Paths("cpu", str(tmp_path)), lines.append)
    stored = Paths("cpu", REFERENCE).results
    assert "reading results/reference" in lines[0]
    assert index == tmp_path / "cpu" / "report" / "index.html"
    read = {path.name: check(path) for path in index.parent.iterdir()}
    executed = {p.stem.split("__")[0] for p in stored.glob("notebooks/*.ipynb")}
    assert {f"{step}.html" for step in executed} <= set(read)
    assert len(read) == 1 + len(list(stored.glob("notebooks/*.ipynb")))
    text = read["index.html"].text()
    for row in Results(stored).ledger.values():
        assert " ".join(row.claim.text.split()) in text and str(row.verdict) in text
    assert all(str(note) in text for note in Results(stored).caveats)
    images = [a["alt"] for t, a in read["index.html"].elements if t == "img"]
    assert len(images) == len(list(stored.glob("figures/*.png")))
    # The figures carry their own description; the name is only for those that lack one.
    assert not [alt for alt in images if re.match(r"Figure \d", alt)]


def test_every_formula_of_the_notebooks_becomes_mathml():
    count = 0
    for path in NOTEBOOKS.glob("*.ipynb"):
        for cell in json.loads(path.read_text("utf-8"))["cells"]:
            if cell["cell_type"] == "markdown":
                source = "".join(cell["source"])
                formulas = re.findall(r"\$\$.+?\$\$|\$[^$]+\$", source, re.S)
                assert pages.markdown(source).count("<math") == len(formulas), source
                count += len(formulas)
    assert count > 20


def test_formulas_that_cannot_be_converted_stay_text():
    for formula in ("\\frac{", "\\href{javascript:x}{y}", "\\text{<script>x</script>}", ""):
        out = pages.safe_math(formula)
        assert "<script" not in out and "href=" not in out
    assert pages.safe_math("\\text{<b>}") == "<code>\\text{&lt;b&gt;}</code>"
    sign = pages.safe_math("(-b, b)")
    assert 'form="prefix"' in sign


def test_tables_lose_all_but_their_structure():
    table = '<style scoped>td {color: red}</style><table class="dataframe" onclick="x()">'
    table += '<tr><td style="x" colspan="2"><a href="javascript:x()">a</a></td></tr></table>'
    out = pages.safe_table(table)
    assert "red" not in out and "onclick" not in out and "style" not in out
    assert '<table class="dataframe">' in out and '<td colspan="2">&lt;a href' in out


def test_pieces_of_a_stream_are_one_output(tmp_path, results):
    pieces = [printed("a 1 %\r"), printed("b\n"), printed("c\n"), printed("d\n", "stderr")]
    write_notebook(results, "00_start_here", words("# a"), code(*pieces))
    text = (build(tmp_path)[0].parent / "00_start_here.html").read_text("utf-8")
    assert re.findall(r'class="(output.*?)".*?>(.*?)</pre>', text, re.S) == [
        ("output", "b\nc\n"),
        ("output stderr", "d\n"),
    ]


def test_terminal_codes_and_halved_characters(tmp_path, results):
    assert (
        pages.safe_text("\x1b[1;31ma\x1b[0m\x1b]8;;http://x\x07b\x1b(0c\x00 10%\r20%\n") == "20%\n"
    )
    assert pages.safe_text("\x1b[1;31ma\x1b[0m\x1b]0;t\x07b\x00 < \x9b") == "ab &lt; "
    write_notebook(results, "00_start_here", words("# a"), code(printed("cut \ud83d")))
    index, _ = build(tmp_path)
    assert "cut ?" in (index.parent / "00_start_here.html").read_text("utf-8")


# --------------------------------------------------------------------- in a real browser


def dumped(path, folder):
    """The page's DOM after headless Chromium has loaded it."""
    options = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-sync"
    options += " --disable-background-networking --disable-component-update --dump-dom"
    command = ["chromium", *options.split(), f"--user-data-dir={folder}", path.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert "</html>" in done.stdout, done.stderr[-500:]
    return done.stdout


def title(dom):
    return html.unescape(re.search(r"<title>(.*?)</title>", dom, re.S)[1])


needs_browser = pytest.mark.skipif(shutil.which("chromium") is None, reason="needs chromium")


def test_text_from_elsewhere_stays_text(tmp_path, results):
    write_results(results, EVIL)
    index, _ = build(tmp_path)
    for path in index.parent.iterdir():
        page = check(path)
        assert "RAN-img" in page.text()  # shown, not lost


@needs_browser
def test_nothing_runs_in_a_browser(tmp_path, results):
    write_results(results, EVIL)
    index, _ = build(tmp_path)
    run = next(index.parent.glob("03*__odd*.html"))
    for path in (index, index.parent / "05_compare_and_plot.html", run):
        dom = dumped(path, tmp_path / "browser")
        parsed = Page(re.sub(r"<title>.*?</title>", "", dom, flags=re.S))
        assert not {"script", "svg", "iframe"} & {tag for tag, _ in parsed.elements}
        assert title(dom) == title(path.read_text("utf-8"))  # no payload has added to it


@needs_browser
def test_the_payloads_run_where_nothing_stops_them(tmp_path):
    """The control of the test above, and the policy alone as the second line of defence."""
    page = pages.page_html("start", EVIL)
    guarded, bare = tmp_path / "guarded.html", tmp_path / "bare.html"
    guarded.write_text(page, "utf-8")
    bare.write_text(page.replace("Content-Security-Policy", "X-Nothing"), "utf-8")
    found = title(dumped(bare, tmp_path / "browser"))
    assert set(found.split()) == {"start", *(f"RAN-{name}" for name in PAYLOADS)}
    assert title(dumped(guarded, tmp_path / "browser")) == "start"
