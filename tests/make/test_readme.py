"""README and docs/: short, whole, and every number of them made from files."""

import functools
import json
import re
import shutil
import urllib.parse

import pandas as pd
import pytest

from neft_utils.base.files import ROOT, read_json
from neft_utils.base.paths import BASE, NOTEBOOKS, REFERENCE
from neft_utils.compare import claims, facts, published_views
from neft_utils.compare.planning import variance_components
from neft_utils.compare.results import Results
from neft_utils.compare.tables import Contrast, paired
from neft_utils.make import answers, front, others, readme

TEXTS = {path.name: path.read_text("utf-8") for path in readme.pages()}
README = TEXTS["README.md"]
STORED = functools.cache(readme.stored_results)
WRITTEN = {path: path.read_text("utf-8") for path in ROOT.glob("*.md")} | {
    path: path.read_text("utf-8") for path in ROOT.glob("d*/*.md")
}


def said(words, page="README.md"):
    """Whether a page says this, wherever its lines break."""
    return " ".join(words.split()) in " ".join(TEXTS[page].split())


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
    top = README.partition("## Which α")[0]
    assert "adds uniform noise" in top and "not tested here" in top.lower()
    for command in ("make reproduce", "make report"):
        assert f"$ {command}" in top
    assert "$ pip install ." in README and "NEFTuneCallback(noise_alpha=5.0)" in README
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
    assert "Not measured in these runs: the end of turn and the loss on what answers say" in text
    assert "no end_nll: scored by an older version" in text
    assert "the end of turn" in front.expected(old).splitlines()[-1]
    text = " ".join(front.headline(new).split())
    assert "Not measured" not in text and "no end_nll" not in text
    assert "**With noise, the end of turn is less likely by 0.1" in text
    assert "in 3 pairs of runs that differ in the noise alone (profile `cpu`)" in text
    assert front.expected(new).count("- *") == 3


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
        assert f"{low:.1f} %" in flat and f"{high:.1f}" in flat
        assert f"{high - low:+.1f}" in flat
    means = []
    for arm in ("baseline", "neft_a15"):
        runs = (readme.chosen(names, STORED).folder / "runs").glob(f"{arm}-s*/losses.csv")
        tests = [pd.read_csv(path).query("split == 'test'") for path in runs]
        by_token = [(one.nll * one.n_tokens).sum() / one.n_tokens.sum() for one in tests]
        means.append(sum(by_token) / len(by_token))
    row = next(row for row in rows if "`test_nll`" in row[0])
    shown = [float(x) for x in row[3].split(",")] + [float(row[4].split()[0])]
    assert shown == pytest.approx([*means, means[1] - means[0]], abs=1.1e-4)


# ---------------------------------------------------------------- what is written by hand


def kept_dose(name):
    kept = STORED(name)
    found = claims.dose(kept.runs, kept.seeds, kept.profile)
    return found.groupby("arm")[["train_nll", "test_nll", "relative_rms"]].mean()


def test_what_is_said_of_the_curve_is_what_the_numbers_say():
    curve, page = kept_dose("gpu-small"), "scale.md"
    assert said("what α = 7 and 11 are on LLaMA-2, raise the loss in both pairs that each", page)
    # A quarter of the embedding at α = 5 there: a twentieth for each unit of α.
    shares = curve.relative_rms / 0.05
    assert [round(shares[arm]) for arm in ("neft_a30", "neft_a45")] == [7, 11]
    kept = STORED("gpu-small")
    each = claims.dose(kept.runs, kept.seeds, kept.profile).set_index("arm").test_nll
    for arm in ("neft_a30", "neft_a45"):
        assert (each[arm] > 0.005).all() and len(each[arm]) == 2
    assert said("with α = 5 and 10 two pairs show no difference", page)
    for arm in ("neft_a5", "neft_a10"):
        one = kept.contrast(Contrast(arm, ("baseline",)), "test_nll")
        assert one.n_seeds == 2 and one.ci_low < 0 < one.ci_high
    words = "in the one pair that there is, α = 45 over a packed row does less than α = 15 does"
    assert said(words, page)
    rules = kept_dose("gpu-ablations")
    for metric in ("train_nll", "test_nll"):
        assert 0 < rules[metric]["packed_a45"] < rules[metric]["neft_a15"]


def test_what_packing_leaves_is_what_notebook_2_measured():
    name, text = block("README.md", "libraries")
    check = json.loads((ROOT / REFERENCE / name / "noise_check.json").read_text("utf-8"))
    alphas = check["median_effective_alpha"]
    share = alphas["axolotl, TRL: packed to 2048"] / alphas["paper; this repository"]
    assert f"{100 * share:.0f}% where they are packed to 2,048 tokens" in text


def test_shared_test_rows_are_counted():
    name, text = block("evidence.md", "overlap")
    files = {n: ROOT / REFERENCE / n / "runs" / "base-s0" / "losses.csv" for n in ("cpu", name)}
    rows = {n: set(pd.read_csv(f).query("split == 'test'").example_id) for n, f in files.items()}
    both = len(rows["cpu"] & rows[name]) or "none"
    words = f"`{name}` ({len(rows[name])}) and `cpu` ({len(rows['cpu'])}): {both}"
    assert words in " ".join(text.split())


def test_rows_differ_more_than_seeds_do():
    assert said("Test rows differ more than seeds do", "how_sure.md")
    for name in ("cpu-long", "gpu-small"):
        row = STORED(name)
        deltas = row.contrast(claims.confirmatory(row.profile), "test_nll")
        assert deltas.n_examples > 100
    stored = STORED("cpu-long")
    pair = claims.confirmatory(stored.profile)
    table = paired(stored.runs, pair, "test_nll", stored.decoding)
    seed, row, _ = variance_components(table)
    assert row / table.example_id.nunique() > seed / table.seed.nunique()


def test_no_stored_run_turns_upward_or_holds_four_bits():
    """What notebook 5, the README and the FAQ say of all stored runs."""
    assert said("its weights rounded to 4 bits and computed in bf16; no stored run kept 4 bits")
    assert said("In no stored run does the validation loss rise in the last epoch", "faq.md")
    curves = list(ROOT.glob("results/*/*/runs/*/train_log.csv"))
    assert len(curves) > 50
    for path in curves:
        after = pd.read_csv(path).validation_nll.dropna()
        assert after.iloc[-1] <= after.iloc[-2], path
        config = json.loads((path.parent / "config.json").read_text("utf-8"))
        assert config["model"]["base_weights"] != "nf4", path


def test_what_is_concluded_about_length_is_what_the_numbers_say():
    """A judge of length alone is enough; force is not; the refuted forms count nothing."""
    names, _ = block("length.md", "length")
    found = read_json(readme.chosen(names, STORED).folder / "published/comparison.json")
    views = published_views.views(found, facts.leaderboard_pair())
    assert said("taste for length is enough to explain the public gain", "length.md")
    low, high = found["length_only_judges"]["pooled_tanh"]["raw"][1:]
    assert low < found["raw_difference"] < high
    weighted = views[views.kind == "weighted"].iloc[0]
    assert weighted.ci_low < 0 < weighted.ci_high < found["raw_difference"] / 2
    words = "forcing an ordinary model to write as much does not bring it"
    assert said(words, "length.md")
    forced = facts.table_5().loc["min new tokens 250"]
    assert forced.chars > facts.table_5().chars["NEFTune"] and forced.gain > 20
    assert views[views.kind == "refuted"].weight.max() < 1e-6


def test_alpha_15_is_what_was_measured():
    assert said("embedding rows are about three times as long as LLaMA-2's")
    for name in ("cpu", "cpu-long", "gpu-small"):
        check = read_json(STORED(name).folder / "noise_check.json")
        assert check["median_length"] > 110 and check["suggested_noise_alpha"] > 15
        assert check["noise_over_embedding"]["neft_a15"] < 0.25
        assert check["row_norm"] / 1.1 == pytest.approx(3, abs=0.5)


def test_what_the_faq_quotes_of_the_paper():
    assert said("with smaller gains than full fine-tuning", "faq.md")
    printed = facts.paper_results().query("train_data == 'Alpaca' and noise != 'none'")
    wins = printed[printed.metric == "win_rate_vs_davinci003"].set_index("table").value
    assert wins["3"].max() < wins["1/7"].max()
    assert said("narrows", "faq.md")
    for name in ("cpu", "cpu-long", "gpu-small"):
        assert STORED(name).ledger["less_overfitting"].interval.ci_high < 0


def test_what_others_found_is_added_up_right():
    _, text = block("others.md", "others")
    flat = " ".join(text.split())
    changes = [5.08, 0.62, 10.07, 3.23, 1.80, 3.61, -2.55]  # the arrows of the paper's Table 1
    assert others.changes("AlpacaEval 1") == pytest.approx(changes)
    assert f"mean {sum(changes) / 7:+.1f}" in flat
    more = {
        "AlpacaEval 2": [-0.09, 0.03, 0.56, 0.70, -0.14, 0.51, -0.15],
        "MT-Bench": [-0.12, 0.19, -0.12, 0.11, 0.20, 0.27, 0.02],
        "18 tasks": [0.33, 0.49, 0.45, -0.74, 0.56, 0.75, -0.09],
    }
    for name, arrows in more.items():
        assert others.changes(name) == pytest.approx(arrows)
        assert f"{name} {sum(arrows) / 7:+.2f}" in flat
    assert all(one.address.startswith("https://") for one in others.studies())


def test_what_fine_tuning_alone_does_is_in_the_table():
    stored = STORED("cpu-long")
    sentence, main = answers.fine_tuning(stored), stored.main.set_index("arm")
    for name in ("verifiable_length_up", "verifiable_length_down", "verifiable_neutral"):
        before, after = main[name][BASE], main[name]["baseline"]
        assert f"`{name}` {before:.2f} to {after:.2f}" in sentence
