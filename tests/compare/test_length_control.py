"""Length control against statsmodels, against known effects, and against nonsense."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import statsmodels.api as sm
from scipy.special import expit

from neft_utils.compare import length_control as lc
from neft_utils.compare import length_pairs


def synthetic(n=3000, effect=0.0, form="pooled_tanh", seed=0, strength=2.0):
    """Pairs whose judge is a logit of length, plus `effect` on theta of the treatment."""
    rng = np.random.default_rng(seed)
    reference = np.exp(rng.normal(5.8, 0.8, n)).round()
    chars = [np.exp(rng.normal(mean, 0.6, n)).round() for mean in (5.8, 6.3)]
    frames = []
    for name, length, theta in zip(length_pairs.ARMS, chars, (-0.5, -0.5 + effect), strict=True):
        frame = pd.DataFrame(
            {"prompt_id": range(n), "chars": length, "reference_chars": reference}
        ).assign(preference=0.5)
        frames.append((name, frame, theta))
    pairs = length_pairs.pair_arms(frames[0][1], frames[1][1])
    term = lc.length_term(pairs, form)
    for (_, frame, theta), f in zip(frames, term, strict=True):
        frame["preference"] = 1.0 * (rng.random(n) < expit(theta + strength * f))
    return length_pairs.pair_arms(frames[0][1], frames[1][1])


@pytest.mark.parametrize("fractional", [False, True])
def test_the_logit_is_statsmodels_for_every_weighting(fractional):
    rng = np.random.default_rng(1)
    design = np.c_[np.ones(200), rng.normal(size=(200, 2))]
    chance = expit(design @ [0.3, -1.0, 0.5])
    response = rng.beta(4 * chance, 4 * (1 - chance)) if fractional else rng.random(200) < chance
    weights = np.stack([np.ones(200), rng.multinomial(200, np.full(200, 1 / 200))]).astype(float)
    found = lc.fit_logit(design, response, weights)
    for row, weight in zip(found, weights, strict=True):
        family = sm.families.Binomial()
        theirs = sm.GLM(1.0 * response, design, family=family, var_weights=weight).fit()
        np.testing.assert_allclose(row, theirs.params, atol=1e-6)


def test_the_logit_takes_a_response_for_every_row():
    rng = np.random.default_rng(2)
    design, response = np.c_[np.ones(50), rng.normal(size=50)], 1.0 * (rng.random((3, 50)) < 0.4)
    together = lc.fit_logit(design, response)
    apart = np.concatenate([lc.fit_logit(design, one) for one in response])
    np.testing.assert_allclose(together, apart, atol=1e-7)


def test_a_separable_sample_ends_at_its_limit_and_bad_shapes_are_refused():
    beta = lc.fit_logit(np.ones((20, 1)), np.ones(20))
    assert expit(beta[0, 0]) > 1 - 1e-6
    with pytest.raises(ValueError, match="do not fit"):
        lc.fit_logit(np.ones((20, 1)), np.ones(19))


@pytest.mark.parametrize("form", lc.FORMS)
def test_each_form_is_its_formula(form):
    pairs = synthetic(n=400, seed=3)
    y = pairs[["preference_control", "preference_treatment"]].to_numpy().T
    c = pairs[["chars_control", "chars_treatment"]].to_numpy(float).T
    r = pairs["reference_chars_control"].to_numpy(float)
    if "tanh" in form:
        d = c - r
        sd = d.std(ddof=1) if form.startswith("pooled") else d.std(1, ddof=1)[:, None]
        f = np.tanh(d / sd)
    else:
        f = np.log((c + 1) / (r + 1))
    if form.startswith("pooled"):
        arm = np.repeat([0.0, 1.0], len(r))
        design = np.c_[1 - arm, arm, f.ravel()]
        theta = sm.GLM(y.ravel(), design, family=sm.families.Binomial()).fit().params[:2]
    else:
        fits = [
            sm.GLM(y[k], np.c_[np.ones(len(r)), f[k]], family=sm.families.Binomial()).fit()
            for k in (0, 1)
        ]
        theta = [fit.params[0] for fit in fits]
    np.testing.assert_allclose(lc.win_rates_at_equal_length(pairs, form)[0], 100 * expit(theta))


@pytest.mark.parametrize("form", ["pooled_tanh", "pooled_log_ratio"])
def test_a_judge_of_length_alone_leaves_nothing_and_a_real_effect_is_found(form):
    none = lc.length_controlled(synthetic(form=form, seed=4), 200).set_index("form").loc[form]
    pairs = synthetic(form=form, effect=0.8, seed=5)
    some = lc.length_controlled(pairs, 200).set_index("form").loc[form]
    assert length_pairs.raw_difference(synthetic(form=form, seed=4))["ci_low"] > 5
    assert none.ci_low < 0 < none.ci_high and none.share_explained == pytest.approx(1, abs=0.4)
    truth = 100 * (expit(0.3) - expit(-0.5))
    assert some.ci_low < truth < some.ci_high and some.ci_low > 0
    assert some.share_low < some.share_explained < some.share_high


def test_the_bootstrap_agrees_with_clustered_standard_errors():
    """An independent way to the interval: sandwich over prompts, delta method."""
    pairs = synthetic(n=800, seed=6)
    term, n = lc.length_term(pairs, "pooled_tanh"), len(pairs)
    y = pairs[["preference_control", "preference_treatment"]].to_numpy().T.ravel()
    arm = np.repeat([0.0, 1.0], n)
    fit = sm.GLM(y, np.c_[1 - arm, arm, term.ravel()], family=sm.families.Binomial()).fit(
        cov_type="cluster", cov_kwds={"groups": np.tile(np.arange(n), 2)}
    )
    p = expit(fit.params[:2])
    gradient = 100 * np.array([-p[0] * (1 - p[0]), p[1] * (1 - p[1]), 0])
    se = (gradient @ fit.cov_params() @ gradient) ** 0.5
    ours = lc.length_controlled(pairs, 1000, forms=("pooled_tanh",)).iloc[0]
    assert (ours.ci_high - ours.ci_low) / (2 * 1.96) == pytest.approx(se, rel=0.12)
    again = lc.length_controlled(pairs, 1000, forms=("pooled_tanh",)).iloc[0]
    assert again.equals(ours) and ours.n_failed == 0


@pytest.mark.parametrize("form", ["pooled_tanh", "pooled_log_ratio"])
def test_the_fit_criterion_finds_the_judges_form(form):
    table = lc.compare_forms(synthetic(form=form, seed=7, strength=3.0)).set_index("form")
    assert table.log_loss.idxmin().removeprefix("pooled_") == form.removeprefix("pooled_")
    assert table.index[-1] == "none" and table.excess.iloc[0] == 0
    assert table.loc["tanh", "deviance"] < table.loc["none", "deviance"]
    other = "pooled_log_ratio" if "tanh" in form else "pooled_tanh"
    assert table.loc[other, "excess"] > 2 * table.loc[other, "excess_se"] > 0


@pytest.mark.parametrize("form", lc.FORMS)
def test_the_judges_own_form_gets_the_weight_and_the_weighted_gain_holds_the_truth(form):
    """A judge of known form and known effect; a form of which it is a special case counts too."""
    pairs = synthetic(form=form, effect=0.4, seed=10, strength=3.0, n=6000)
    fit, n = lc.compare_forms(pairs), len(pairs)
    weights = lc.form_weights(fit, n)
    own = [name for name in lc.FORMS if name.endswith(form.removeprefix("pooled_"))]
    assert weights[own].sum() > 0.99 and weights.sum() == pytest.approx(1)
    assert set(weights.index[weights < lc.REFUTED]) == set(weights.index) - set(own)
    gains = lc.length_controlled(pairs, 200).set_index("form")
    gains = gains[["estimate", "ci_low", "ci_high"]]
    raw = length_pairs.raw_difference(pairs)
    gains.loc["none"] = [raw["estimate"], raw["ci_low"], raw["ci_high"]]
    estimate, low, high = lc.weighted_gain(gains.T.to_dict("list"), weights)
    truth = 100 * (expit(-0.1) - expit(-0.5))
    assert low < truth < high < raw["ci_low"]
    assert min(gains.estimate[own]) <= estimate <= max(gains.estimate[own])


def test_a_judge_without_a_taste_for_length_leaves_the_raw_difference():
    pairs = synthetic(effect=0.4, strength=0.0, seed=11)
    weights = lc.form_weights(lc.compare_forms(pairs), len(pairs))
    assert weights["none"] > 0.3 and weights["none"] > weights[["tanh", "log_ratio"]].max()


def test_weights_are_the_softmax_of_the_total_log_loss_with_its_error_drawn():
    fit = pd.DataFrame({"form": ["a", "b", "c"], "excess": [0.0, 0.02, np.nan]})
    sure = lc.form_weights(fit.assign(excess_se=0.0), 50)  # 100 judgements, 2 nats behind
    assert sure.to_dict() == pytest.approx({"a": 1 / (1 + np.exp(-2)), "b": expit(-2), "c": 0})
    unsure = lc.form_weights(fit.assign(excess_se=[0, 0.02, np.nan]), 50)
    z = np.linspace(-8, 8, 4001)  # the same mean over a normal by quadrature
    density = np.exp(-(z**2) / 2) / np.exp(-(z**2) / 2).sum()
    assert unsure["b"] == pytest.approx((density * expit(-2 - 2 * z)).sum(), abs=0.005)
    assert unsure["b"] > sure["b"] and unsure["c"] == 0


def test_the_weighted_interval_includes_the_choice_of_form():
    gains = {"a": (0.0, -1.96, 1.96), "b": (10.0, 8.04, 11.96), "c": (None, None, None)}
    weights = pd.Series({"a": 0.5, "b": 0.5, "c": 0.0})
    estimate, low, high = lc.weighted_gain(gains, weights)
    assert estimate == 5 and high - 5 == pytest.approx(1.96 * (1 + 25) ** 0.5, rel=1e-4)
    assert 5 - low == pytest.approx(high - 5)
    alone = lc.weighted_gain(gains, pd.Series({"a": 1.0, "b": 0.0, "c": 0.0}))
    assert alone == pytest.approx(gains["a"])


def test_the_deviance_is_statsmodels():
    pairs = synthetic(n=500, seed=8)
    term, total = lc.length_term(pairs, "log_ratio"), 0
    for f, arm in zip(term, length_pairs.ARMS, strict=True):
        design, family = np.c_[np.ones(len(f)), f], sm.families.Binomial()
        total += sm.GLM(pairs[f"preference_{arm}"], design, family=family).fit().deviance
    table = lc.compare_forms(pairs).set_index("form")
    assert table.loc["log_ratio", "deviance"] == pytest.approx(total, rel=1e-6)


def test_a_judge_of_length_alone_on_the_same_lengths():
    pairs = synthetic(effect=1.0, seed=9, n=800)
    table = lc.length_only_judge(pairs, "pooled_tanh", 100).set_index("view")
    assert table.loc["pooled_tanh", "low"] < 0 < table.loc["pooled_tanh", "high"]
    assert table.loc["raw", "mean"] > 5
    # The judge here does see the effect: one curve of length alone cannot explain it.
    seen = lc.length_controlled(pairs, 10, forms=("pooled_tanh",)).estimate[0]
    assert seen > table.loc["pooled_tanh", "high"]


def few(preferences, chars, reference=100):
    return pd.DataFrame(
        {
            "prompt_id": [f"p{i}" for i in range(len(chars))],
            "preference": preferences,
            "chars": chars,
            "reference_chars": reference,
        }
    )


def test_raw_matched_and_quintiles_by_hand():
    control = few([0, 0, 1, 0.5, 0], [100, 100, 100, 100, 100])
    treatment = few([1, 0, 1, 0.5, 1], [100, 120, 80, 150, 300])
    pairs = length_pairs.pair_arms(control, treatment)
    raw = length_pairs.raw_difference(pairs)
    assert (raw["estimate"], raw["control"], raw["treatment"], raw["n"]) == (40, 30, 70, 5)
    assert raw["se"] == pytest.approx(np.std([100, 0, 0, 0, 100], ddof=1) / 5**0.5)
    assert raw["ci_high"] - 40 == pytest.approx(2.7764451 * raw["se"])
    matched = length_pairs.length_matched(pairs).set_index("tolerance")
    assert matched.n.tolist() == [3, 4]  # 20 % and 50 % themselves count
    assert matched.estimate.tolist() == pytest.approx([100 / 3, 25])
    halves = length_pairs.by_length_change(pairs, n_groups=2)
    assert halves.n.tolist() == [3, 2] and halves.estimate.tolist() == pytest.approx([100 / 3, 50])
    assert halves[["chars_low", "chars_high"]].to_numpy().tolist() == [[-20, 20], [50, 200]]


def test_missing_preferences_and_prompts_of_one_arm_drop_out():
    control, treatment = few([0, 1, None, 0], [9] * 4), few([1, None, 1, 1], [9] * 4)
    pairs = length_pairs.pair_arms(control, treatment.iloc[[0, 1, 2, 3]])
    assert pairs.prompt_id.tolist() == ["p0", "p3"]
    with pytest.raises(ValueError, match="share 1 judged prompts"):
        length_pairs.pair_arms(control, treatment.iloc[:3])


def test_the_overlap_guard_needs_both_conditions():
    n = 100
    control = few([0.5] * n, [100] * n)
    assert length_pairs.overlap(length_pairs.pair_arms(control, few([1] * n, [100] * n)))[
        "identifiable"
    ]
    enough = [110] * 30 + [90] * 20 + [900] * 50
    assert length_pairs.overlap(length_pairs.pair_arms(control, few([1] * n, enough)))[
        "identifiable"
    ]
    few_shorter = [110] * 31 + [90] * 19 + [900] * 50
    few_similar = [110] * 29 + [90] * 20 + [900] * 51
    for chars in (few_shorter, few_similar):
        guard = length_pairs.overlap(length_pairs.pair_arms(control, few([1] * n, chars)))
        assert not guard["identifiable"] and guard["verdict"].startswith("not identifiable")


def test_without_any_spread_of_length_there_is_no_number():
    pairs = length_pairs.pair_arms(few([0, 1, 0, 1], [50] * 4), few([1, 1, 0, 1], [50] * 4))
    table = lc.length_controlled(pairs, 20)
    assert table.estimate.isna().all() and table.ci_low.isna().all()
    assert np.isnan(
        length_pairs.raw_difference(
            length_pairs.pair_arms(few([0] * 3, [9] * 3), few([1] * 3, [9] * 3))
        )["ci_low"]
    )


@pytest.mark.parametrize(
    "change, words",
    [
        ({"preference": [0, 1.5, 0]}, "preference of prompt p1"),
        ({"preference": [0, "x", 0]}, "preference of prompt p1"),
        ({"chars": [1, -1, 2]}, "chars of prompt p1"),
        ({"chars": [1, None, 2]}, "chars of prompt p1"),
        ({"reference_chars": [1, np.inf, 2]}, "reference_chars of prompt p1"),
        ({"prompt_id": ["a", "a", "b"]}, "unique"),
    ],
)
def test_bad_input_is_named_in_one_line(change, words):
    good = few([0, 1, 0], [10, 20, 30])
    with pytest.raises(ValueError, match=words) as caught:
        length_pairs.pair_arms(good, good.assign(**change))
    assert "treatment" in str(caught.value) and "\n" not in str(caught.value)


def test_missing_columns_and_unknown_forms_are_refused():
    good = few([0, 1, 0], [10, 20, 30])
    with pytest.raises(ValueError, match=r"control lacks the columns \['chars'\]"):
        length_pairs.pair_arms(good.drop(columns="chars"), good)
    with pytest.raises(ValueError, match="form must be one of"):
        lc.length_term(length_pairs.pair_arms(good, good), "cubic")
