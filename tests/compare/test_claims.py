"""From per-item files to words: pairing, which arms a claim compares, and its verdict."""

import dataclasses
import itertools
import json
import math

import numpy as np
import pandas as pd
import pytest

from neft_utils.base.paths import BASE
from neft_utils.base.pins import PYTHON
from neft_utils.base.read_profile import load_profile
from neft_utils.base.strict import ConfigError
from neft_utils.compare import claims, facts
from neft_utils.compare.metrics import METRICS, per_item
from neft_utils.compare.runs import Engines, caveats, caveats_json
from neft_utils.compare.tables import Contrast, by_seed, length_views, paired
from neft_utils.evaluate.scoring import ITEM_COLUMNS

DECODING = "greedy_penalty_1.2"
NOTHING = {name.removesuffix(".csv"): columns for name, columns in ITEM_COLUMNS.items()}


def made_run(nll, seconds=10.0, **tables):
    """A run as `runs.load_runs` gives it; nll: {example: value} of test rows."""
    losses = pd.DataFrame(
        [("test", name, 10, value) for name, value in nll.items()],
        columns=["split", "example_id", "n_tokens", "nll"],
    )
    empty = {name: pd.DataFrame(columns=columns) for name, columns in NOTHING.items()}
    about = {"phase_seconds": {"losses": 1.0, "answers": 0.0}}
    return {
        "scores": {"provenance": about},
        "provenance": {"train_seconds": seconds},
        "generations": pd.DataFrame(),
        "noise": None,
        "log": pd.DataFrame({"validation_nll": [2.0, 1.9]}),
        **empty,
        "losses": losses,
        **tables,
    }


def some_runs(shift, arms=("baseline", "neft_a15"), seeds=range(4), items=40):
    """Runs whose last arm has its NLL moved by `shift`; pairs agree up to small noise."""
    rng, runs = np.random.default_rng(0), {}
    for seed in seeds:
        base = rng.normal(2.0, 0.5, items)
        for arm in arms:
            moved = base + 0.001 * rng.standard_normal(items) + shift * (arm == arms[-1])
            runs[arm, seed] = made_run({f"e{i}": v for i, v in enumerate(moved)})
    return runs


def test_pairs_are_treatment_minus_the_mean_of_controls():
    nll = {"a": 1.0, "b": 2.0}
    runs = {
        ("neft", 0): made_run(nll),
        ("dropout", 0): made_run({"b": 1.0, "a": 3.0}),
        ("decay", 0): made_run({"a": 2.0, "b": 2.0}),
        ("neft", 1): made_run(nll),  # no partner: left out
    }
    deltas = paired(runs, Contrast("neft", ("dropout", "decay")), "test_nll", DECODING)
    assert deltas.set_index("example_id").delta.to_dict() == {"a": -1.5, "b": 0.5}
    assert set(deltas.seed) == {0}
    assert paired(runs, Contrast("neft", ("dropout",)), "arithmetic", DECODING) is None


def test_runs_that_were_asked_different_items_are_refused():
    runs = {("neft", 0): made_run({"a": 1.0}), ("baseline", 0): made_run({"b": 1.0})}
    with pytest.raises(ConfigError, match="test_nll: neft and baseline of seed 0"):
        paired(runs, Contrast("neft", ("baseline",)), "test_nll", DECODING)


def test_a_missing_preference_drops_its_pair_and_nothing_else():
    def judged(values):
        rows = [("test", f"e{i}", v, v, v, 9, 9) for i, v in enumerate(values)]
        return pd.DataFrame(rows, columns=ITEM_COLUMNS["preferences.csv"])

    runs = {
        ("neft", 0): made_run({"a": 1.0}, preferences=judged([1.0, 0.5, math.nan])),
        ("baseline", 0): made_run({"a": 1.0}, preferences=judged([0.0, math.nan, 1.0])),
    }
    deltas = paired(runs, Contrast("neft", ("baseline",)), "preference", DECODING)
    assert deltas.set_index("example_id").delta.to_dict() == {"e0": 100.0}


def test_items_of_two_tasks_with_equal_names_stay_apart():
    rows = [("openbookqa", "0", 1, -1.0, 1, 0.5), ("siqa", "0", 0, -3.0, 0, -2.0)]
    table = pd.DataFrame(rows, columns=ITEM_COLUMNS["task_items.csv"])
    run = made_run({"a": 1.0}, task_items=table)
    assert per_item(run, "knowledge", DECODING).to_dict() == {
        "openbookqa/0": 0.5,
        "siqa/0": -2.0,
    }
    assert per_item(run, "knowledge_accuracy", DECODING).to_dict() == {
        "openbookqa/0": 1.0,
        "siqa/0": 0.0,
    }
    assert per_item(run, "siqa", DECODING).to_dict() == {"siqa/0": 0.0}


def test_a_rise_is_measured_from_the_same_model_unperturbed():
    rows = [
        *(("none", 0.0, name, value) for name, value in (("a", 1.0), ("b", 2.0))),
        *(("weights", level, name, 1.0 + 10 * level) for level in (0.1, 0.3) for name in "ab"),
    ]
    table = pd.DataFrame(rows, columns=ITEM_COLUMNS["perturbed_losses.csv"])
    run = made_run({"a": 1.0}, perturbed_losses=table)
    rise = per_item(run, "weight_rise", DECODING)
    assert rise.to_dict() == pytest.approx({"a": 2.0, "b": 1.0})


def test_which_arms_a_claim_compares():
    profile = load_profile("cpu-long")
    assert claims.arms_of("confirmatory", profile) == Contrast("neft_a15", ("baseline",))
    assert claims.arms_of("low_data", profile) == Contrast(
        "neft_a15_quarter", ("baseline_quarter",)
    )
    assert claims.arms_of("regularisers", profile) == Contrast("neft_a15", ("dropout", "decay"))
    assert claims.arms_of("alpha", profile) is None is claims.arms_of("much_data", profile)
    gpu = load_profile("gpu-small")
    assert claims.arms_of("alpha", gpu) == Contrast("neft_a15", ("neft_a5",))
    assert claims.arms_of("too_strong", gpu) == Contrast("neft_a45", ("baseline",))
    assert claims.arms_of("much_data", gpu) == Contrast("neft_a15", ("baseline",))
    ablations = load_profile("gpu-ablations")
    assert claims.arms_of("too_strong", ablations) == Contrast("neft_a45", ("baseline",))
    assert claims.arms_of("alpha", ablations) == Contrast("neft_a15", ("neft_a5",))


@pytest.mark.parametrize(
    "shift, outcome", [(-0.05, "detected"), (0.05, "opposite"), (0.0, "not_detected")]
)
def test_verdicts_follow_the_effect(shift, outcome):
    profile = load_profile("nano")
    runs = some_runs(shift)
    seeds = by_seed(runs, DECODING)
    rows = {row.id: row for row in claims.ledger(runs, seeds, profile, DECODING)}
    assert rows["confirmatory"].verdict.outcome == outcome
    assert rows["confirmatory"].estimate == pytest.approx(shift, abs=0.001)
    longer = rows["longer_answers"]
    assert longer.verdict.outcome == "not_testable" and longer.verdict.elsewhere == "cpu-long"
    assert longer.estimate is None
    assert rows["few_lines"].estimate == rows["few_lines"].interval.ci_low == 3
    assert rows["confirmatory"].contrast == Contrast("neft_a15", ("baseline",))
    assert rows["across_models"].contrast is None


def test_a_row_of_claims_json_has_words_and_what_they_are_of():
    profile, runs = load_profile("nano"), some_runs(0.05)
    rows = [
        one.as_json() for one in claims.ledger(runs, by_seed(runs, DECODING), profile, DECODING)
    ]
    assert json.loads(json.dumps(rows, allow_nan=False)) == rows
    fields = "id claim contrast metric unit estimate ci_low ci_high detectable verdict paper note"
    fields += " treatment controls outcome elsewhere adjusted_p taken_back margin held"
    assert all(list(row) == fields.split() for row in rows)
    first = rows[0]
    assert first["contrast"] == "neft_a15 - baseline" and first["treatment"] == "neft_a15"
    assert first["controls"] == ["baseline"] and first["outcome"] == "opposite"
    assert first["verdict"] == "detected, opposite to the claim"
    assert str(Contrast("noise", ("dropout", "decay"))) == "noise - dropout & decay"


def test_a_margin_in_no_metric_is_refused():
    profile = dataclasses.replace(load_profile("nano"), margins={"wisdom": 0.1})
    runs = some_runs(0.0)
    with pytest.raises(ConfigError, match="nano: margins.wisdom is no metric: use test_nll"):
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
    assert rows["beyond_length"].verdict.detected == better
    assert rows["better_answers"].verdict.detected
    assert length_views(some_runs(0), pair).empty


def test_what_the_paper_reports_comes_from_its_tables():
    quoted = facts.paper_values()
    assert quoted["1/7 Alpaca win"] == "29.79 to 64.69"
    assert quoted["4 Alpaca chars"] == "375.22 to 1061.89"
    assert quoted["3 Alpaca alphas"] == "31.43, 28.57, 29.01"
    assert quoted["2 gains"] == "7.3 to 13.8" and quoted["5 long"] == "48.01"
    for claim in claims.CLAIMS.values():
        assert "{" not in claim.paper.format(**quoted)
        assert claim.metric in METRICS or claim.metric == "lines"


def test_markdown_has_one_row_a_claim_and_no_interval_where_none_exists():
    profile = load_profile("nano")
    runs = some_runs(0.01, seeds=[0])
    rows = claims.ledger(runs, by_seed(runs, DECODING), profile, DECODING)
    lines = claims.claims_markdown(rows).splitlines()
    assert len(lines) == 2 + len(claims.CLAIMS)
    assert "nan" not in " ".join(lines) and "[" not in lines[2].split("|")[2]
    pairs = itertools.pairwise(lines[2:])
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
    few = caveats(profile, dict([next(iter(runs.items()))]))[0]
    assert str(few).startswith(f"Not complete: 1 of {len(names)} runs are there, base-s0. Arms")
