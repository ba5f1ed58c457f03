"""README and docs/: short, whole, and every number of them made from files."""

import functools
import math
import re
import shutil
import urllib.parse

import pandas as pd
import pytest

from neft_utils.base.files import ROOT
from neft_utils.base.paths import BASE, NOTEBOOKS, REFERENCE
from neft_utils.compare import facts
from neft_utils.compare.results import Results
from neft_utils.make import front, readme

TEXTS = {path.name: path.read_text("utf-8") for path in readme.pages()}
README = TEXTS["README.md"]
STORED = functools.cache(readme.stored_results)
WRITTEN = {path: path.read_text("utf-8") for path in ROOT.glob("*.md")} | {
    path: path.read_text("utf-8") for path in ROOT.glob("d*/*.md")
}


def block(page, name):
    """(profiles, text) of a page's block."""
    match = next(m for m in readme.BLOCK.finditer(TEXTS[page]) if m[2] == name)
    return match[3], match[4]


# ----------------------------------------------------------------------------- what it is like


def test_the_readme_is_short_and_in_order():
    assert len(README.splitlines()) < 200
    heads = re.findall(r"^## (.+)", README, re.M)
    assert heads == [
        "What we found",
        "See it yourself",
        "Which α arrives in your library",
        "Add it to your trainer",
        "Notebooks",
        "Scope and limits",
        "More",
        "Citation and licences",
    ]


def test_what_a_stranger_needs_comes_first():
    top = " ".join(README.partition("## Which α")[0].split())
    assert "x becomes x + U(−1, 1)·α/√(L·d)" in top and "Not tested here: " in top
    for command in ("make reproduce", "make report"):
        assert f"$ {command}" in top
    assert "$ pip install ." in README and "NEFTuneCallback(noise_alpha)" in README
    assert README.count("29.79") == 1  # the headline once, the nearest set-up everywhere else


def test_every_page_is_in_the_index_and_every_link_leads_somewhere():
    index = README.partition("## More")[2]
    for name in TEXTS:
        assert name == "README.md" or f"(docs/{name})" in index, name
    for path, text in WRITTEN.items():
        text = re.sub(r"```.*?```", "", text, flags=re.S)
        for url in re.findall(r"\]\(([^)\s]+)\)|src=\"([^\"]+)\"", text):
            url = urllib.parse.urlsplit("".join(url))
            if url.scheme:
                assert url.scheme == "https", url.geturl()
                continue
            target = path.parent / urllib.parse.unquote(url.path) if url.path else path
            assert target.exists(), f"{path.name}: {url.geturl()}"
            if url.fragment and target.suffix == ".md":
                heads = re.findall(r"^#+ (.+)", target.read_text("utf-8"), re.M)
                assert urllib.parse.unquote(url.fragment) in map(_anchor, heads), url.geturl()


def _anchor(head):
    """A heading's anchor as GitHub makes it."""
    return re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-")


def test_no_words_of_tests_are_left():
    text = "".join(WRITTEN.values())
    text += "".join(path.read_text("utf-8") for path in NOTEBOOKS.glob("*.ipynb"))
    assert "opposite to the claim" not in text and "not detected" not in text.lower()
    assert not [path.name for path, text in WRITTEN.items() if "detected" in text.lower()]


# ---------------------------------------------------------------------------------- the blocks


def test_every_block_is_what_the_files_say():
    found = set()
    for name, text in TEXTS.items():
        blocks = list(readme.BLOCK.finditer(text))
        assert text.count("<!-- /") == len(blocks), f"{name}: one is left open or misspelt"
        for match in blocks:
            made = readme.BLOCKS[match[2]](readme.chosen(match[3], STORED))
            assert match[4] == made, f"{name}: {match[2]}"
            found.add(match[2])
    assert found == set(readme.BLOCKS)


def test_a_stale_block_is_written_anew(monkeypatch, tmp_path):
    stale = tmp_path / "README.md"
    monkeypatch.setattr(readme, "pages", lambda: [stale, tmp_path / "missing.md"])
    monkeypatch.setattr(readme, "stored_results", STORED)
    whole = next(m[0] for m in readme.BLOCK.finditer(README) if m[2] == "lead")
    stale.write_text(whole.replace("29.79", "99.99"), "utf-8")
    assert "99.99" in stale.read_text("utf-8")
    assert readme.update_readme() and stale.read_text("utf-8") == whole
    assert not readme.update_readme()


def made(folder, end_nll):
    """Stored results of `cpu` with three pairs, with or without the end of turn scored."""
    for arm, seed in [(BASE, 0), *((a, s) for a in ("baseline", "neft_a15") for s in range(3))]:
        run = folder / "runs" / f"{arm}-s{seed}"
        shutil.copytree(ROOT / REFERENCE / "cpu" / "runs" / run.name, run)
        losses = pd.read_csv(run / "losses.csv").drop(columns="end_nll", errors="ignore")
        if end_nll:
            noisy = arm == "neft_a15"
            losses["end_nll"] = 0.5 + 0.1 * noisy + 0.001 * losses.index % 7 + 0.002 * seed * noisy
        losses.to_csv(run / "losses.csv", index=False)
    return Results(folder)


def test_the_first_profile_that_answers_everything_is_shown(tmp_path):
    old, new = made(tmp_path / "old" / "cpu", False), made(tmp_path / "new" / "cpu", True)
    of = {"a": old, "b": old, "c": new}
    assert readme.chosen("a,b", of.get) is old and readme.chosen("a,c", of.get) is new
    assert readme.chosen("c,a", of.get) is new
    text = front.headline(old)
    text = " ".join(text.split())
    assert "Not measured in these runs: the end of turn and the loss on what answers say." in text
    assert "no end_nll: scored by an older version" in text
    assert "- The end of turn and " in front.expected(old)
    text = " ".join(front.headline(new).split())
    assert "Not measured" not in text and "no end_nll" not in text
    assert text.startswith("**With noise, ") and "the end of turn is less likely by 0.1" in text
    assert "in 3 pairs of runs that differ in the noise alone (profile `cpu`)" in text
    expected = " ".join(front.expected(new).split())
    assert expected.count("; yours may differ by ") == 3 and "- The end of turn: +0.1" in expected


def test_the_figure_is_our_own_question_where_it_is_drawn(tmp_path):
    results = made(tmp_path / "cpu", True)
    assert front.lead_figure(results.folder) is None and front.lead(results) == front.headline(
        results
    )
    figures = tmp_path / "cpu" / "figures"
    figures.mkdir()
    for name in ("06_length_change", "05_end_of_turn"):
        shutil.copy(ROOT / REFERENCE / "cpu" / "figures" / "06_length_change.png", figures)
        (figures / "06_length_change.png").rename(figures / f"{name}.png")
        assert front.lead_figure(results.folder).stem == name


def test_what_is_not_tested_is_what_no_stored_results_answer(monkeypatch, tmp_path):
    assert front.untested()[-1] == "what a judge prefers"
    monkeypatch.setattr(front, "ROOT", tmp_path)
    assert "models of 7 billion parameters" in front.untested()
    (tmp_path / REFERENCE / "mistral-7b-alpaca-qlora").mkdir(parents=True)
    assert "models of 7 billion parameters" not in front.untested()


def test_another_stored_profile_has_a_column_of_its_own(monkeypatch):
    monkeypatch.setattr(front, "BESIDE", {"gpu-small": "longer rows", "never-run": "none"})
    results, other = STORED("cpu"), STORED("gpu-small")
    assert [one.profile.name for one in front.beside(results)] == ["gpu-small"]
    assert front.beside(other) == []
    table = [line.split("|")[1:-1] for line in front.lead(results).splitlines() if "|" in line]
    assert table[0][-1].strip() == "longer rows (`gpu-small`)"
    assert len({len(row) for row in table}) == 1
    cells = {row[0].split("`")[1]: row[-1].strip() for row in table if "`" in row[0]}
    assert cells["end_nll"] == "–"  # its runs are older than the measure
    length = other.ledger["answer_length"].interval.estimate
    assert cells["answer_length"].startswith(f"{100 * (math.exp(length) - 1):+.1f} [")


def test_the_headline_has_the_papers_and_our_numbers():
    names, text = block("README.md", "lead")
    rows = [line.split("|")[1:-1] for line in text.splitlines() if line.startswith("| ")][1:]
    paper = facts.paper_results().query("table == '1/7'").set_index("train_data").value
    for cell, data in ((rows[0][1], "Alpaca"), (rows[0][2], "ShareGPT")):
        low, high = paper[data]
        numbers = [float(x) for x in re.findall(r"[\d.]+", cell)]
        assert numbers == pytest.approx([low, high, high - low])
    board = facts.leaderboard_rows().query("leaderboard == 'AlpacaEval 1'").set_index("model")
    flat = " ".join(text.split())
    for column in ("win_rate", "length_controlled_win_rate"):
        low, high = board.loc[["alpaca-7b", "alpaca-7b-neft"], column]
        assert f"{low:.2f} %" in flat and f"{high:.2f}" in flat
        assert f"{high - low:+.2f}" in flat
    means = []
    for arm in ("baseline", "neft_a15"):
        runs = (readme.chosen(names, STORED).folder / "runs").glob(f"{arm}-s*/losses.csv")
        tests = [pd.read_csv(path).query("split == 'test'") for path in runs]
        by_token = [(one.nll * one.n_tokens).sum() / one.n_tokens.sum() for one in tests]
        means.append(sum(by_token) / len(by_token))
    row = next(row for row in rows if "`test_nll`" in row[0])
    shown = [float(x) for x in row[3].split(",")] + [float(row[4].split()[0])]
    assert shown == pytest.approx([*means, means[1] - means[0]], abs=1.1e-4)
