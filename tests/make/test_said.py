"""What README and docs/ say by hand of stored numbers is computed again, as are others' sums."""

import functools
import json
import re
import sys
import types

import pandas as pd
import pytest

from neft_utils.base.files import ROOT, read_json
from neft_utils.base.paths import BASE, REFERENCE
from neft_utils.compare import claims, facts, published_views
from neft_utils.compare.planning import variance_components
from neft_utils.compare.tables import Contrast, paired
from neft_utils.make import answers, libraries, others, readme
from neft_utils.noise import NEFTuneCallback

TEXTS = {path.name: path.read_text("utf-8") for path in readme.pages()}
STORED = functools.cache(readme.stored_results)


def said(words, page="README.md"):
    """Whether a page says this, wherever its lines break."""
    return " ".join(words.split()) in " ".join(TEXTS[page].split())


def block(page, name):
    """(profiles, text) of a page's block."""
    match = next(m for m in readme.BLOCK.finditer(TEXTS[page]) if m[2] == name)
    return match[3], match[4]


def kept_dose(name):
    kept = STORED(name)
    found = claims.dose(kept.runs, kept.seeds, kept.profile)
    return found.groupby("arm")[["train_nll", "test_nll", "relative_rms"]].mean()


def test_what_is_said_of_the_curve_is_what_the_numbers_say():
    curve, page = kept_dose("gpu-small"), "scale.md"
    assert said("what α = 7 and 11 are on LLaMA-2, raise the loss in both of their pairs", page)
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
    words = "the one pair that there is, α = 45 over a packed row changes the loss less than α = 15"
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
    files = {n: STORED(n).folder / "runs" / "base-s0" / "losses.csv" for n in ("cpu", name)}
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


def test_hardly_a_stored_run_turns_upward_and_none_holds_four_bits():
    """What notebook 5, the README and the FAQ say of all stored runs."""
    assert said("its weights rounded to 4 bits and computed in bf16; no stored run kept 4 bits")
    words = "In five of the stored runs the validation loss rises in the last epoch, by less than"
    assert said(f"{words} 0.01 nats a token, and in no other", "faq.md")
    curves = list(ROOT.glob("results/*/*/runs/*/train_log.csv"))
    assert len(curves) > 50
    rises = []
    for path in curves:
        after = pd.read_csv(path).validation_nll.dropna()
        rises.append(after.iloc[-1] - after.iloc[-2])
        config = json.loads((path.parent / "config.json").read_text("utf-8"))
        assert config["model"]["base_weights"] != "nf4", path
    assert sum(rise > 0 for rise in rises) == 5 and max(rises) < 0.01


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
    assert said(
        "training rows are learned less well, and the gap to held-out rows narrows", "faq.md"
    )
    for name in ("cpu", "cpu-long", "gpu-small"):
        assert STORED(name).ledger["less_overfitting"].interval.ci_high < 0
        means = STORED(name).seeds.groupby("arm").train_nll.mean()
        assert means["neft_a15"] > means["baseline"]


def test_what_the_faq_says_of_other_trainers(monkeypatch):
    words = "For rows of 2,048 and a median of 128 that is 20 for an α of 5"
    assert said(words, "faq.md") and libraries.PACKED == 2048 and libraries.LENGTHS[1] == 128
    assert libraries.arrives("width", "packed", noise_alpha=20)[1] == pytest.approx(5)
    integrations = types.ModuleType("axolotl.integrations.base")
    integrations.BasePlugin = object
    monkeypatch.setitem(sys.modules, "axolotl.integrations.base", integrations)
    for name in ("axolotl", "axolotl.integrations"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    (plugin,) = re.findall(r"```python\n(.*?)```", TEXTS["faq.md"], re.S)
    scope = {}
    exec(plugin, scope)
    (callback,) = scope["NeftPlugin"]().add_callbacks_post_trainer(None, None)
    assert isinstance(callback, NEFTuneCallback)


def test_what_is_said_of_the_gpu_is_what_the_log_says():
    log = (ROOT / "results" / "LOG.md").read_text("utf-8")
    assert "19 of 19 runs at one commit in 8 min 27 s on an H100 80GB" in log
    assert said("took 8 min 27 s of training and scoring on an H100 80GB", "gpu.md")


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


def test_seeds_of_a_small_pool_share_rows():
    assert said("as `gpu-small` does, its seeds share most of their rows", "how_sure.md")
    rows = read_json(ROOT / REFERENCE / "gpu-small" / "manifest.json")["rows"]
    assert rows["train-s0"] > 0.75 * rows["pool"]
