"""The intervals against arithmetic by hand, against scipy and statsmodels, and by simulation."""

from __future__ import annotations

import ast
import dataclasses
import sys
from math import isnan, nan, sqrt
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pandas as pd
import pytest
import statsmodels.api as sm
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from scipy.stats import binom, t, ttest_1samp
from statsmodels.formula.api import ols
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.power import TTestPower

from neft_utils.compare import planning, simulation, stats

# Hundredths between -5 and 5: no subnormal numbers, whose squares vanish.
shapes = array_shapes(min_dims=2, max_dims=2, min_side=2, max_side=5)
matrices = arrays(float, shapes, elements=st.integers(-500, 500).map(lambda k: k / 100))
quick = settings(max_examples=50, deadline=None)


def table(matrix) -> pd.DataFrame:
    """Long table of an (S, N) matrix."""
    matrix = np.asarray(matrix, dtype=float)
    seeds, examples = np.indices(matrix.shape)
    names = [f"row-{e}" for e in examples.ravel()]
    return pd.DataFrame({"seed": seeds.ravel(), "example_id": names, "delta": matrix.ravel()})


def crossed(rng, n_seeds, n_examples, seed_sd, example_sd, rest_sd, mean=0.0) -> np.ndarray:
    a = seed_sd * rng.standard_normal((n_seeds, 1))
    b = example_sd * rng.standard_normal((1, n_examples))
    return mean + a + b + rest_sd * rng.standard_normal((n_seeds, n_examples))


def ends(interval: stats.Interval) -> tuple[float, float]:
    return interval.ci_low, interval.ci_high


def test_by_hand():
    # Seed means 2 and 6, example means 2, 4, 6: mean squares 24, 8, 2. The floor over the two
    # seed means, se 2 and t(1) = 12.7, is wider than se sqrt(30/6) and t(900/610).
    interval = stats.confirmatory_interval(table([[1, 2, 3], [3, 6, 9]]))
    assert (interval.estimate, interval.se, interval.df) == pytest.approx((4, 2, 1))
    assert ends(interval) == pytest.approx((4 - 12.7062 * 2, 4 + 12.7062 * 2), rel=1e-5)
    assert (interval.n_seeds, interval.n_examples) == (2, 3)
    # All seed and example means are 0, so both components are 0 and MS_rest = 4/1 stands alone.
    interval = stats.confirmatory_interval(table([[1, -1], [-1, 1]]))
    assert (interval.estimate, interval.se, interval.df) == pytest.approx((0, 1, 1))


def test_standard_error_and_degrees_of_freedom_agree_with_statsmodels():
    deltas = table(crossed(np.random.default_rng(0), 4, 12, 0.7, example_sd=5, rest_sd=1))
    anova = sm.stats.anova_lm(ols("delta ~ C(seed) + C(example_id)", deltas).fit())
    ms_seed, ms_example, ms_rest = anova["mean_sq"]
    assert min(ms_seed, ms_example) > ms_rest  # else this would test the truncated case
    total = ms_seed + ms_example - ms_rest
    df = total**2 / (ms_seed**2 / 3 + ms_example**2 / 11 + ms_rest**2 / 33)
    interval = stats.confirmatory_interval(deltas)
    assert (interval.se, interval.df) == pytest.approx((sqrt(total / 48), df))
    assert interval.ci_high - interval.estimate == pytest.approx(t.ppf(0.975, df) * interval.se)


@pytest.mark.parametrize("n_examples", [1, 7])
@pytest.mark.parametrize("level", [0.9, 0.95])
def test_is_the_one_sample_t_when_examples_do_not_vary(n_examples, level):
    means = np.array([0.3, -0.1, 0.25, 0.4])
    interval = stats.confirmatory_interval(table(np.tile(means, (n_examples, 1)).T), level)
    expected = ttest_1samp(means, 0)
    assert ends(interval) == pytest.approx(tuple(expected.confidence_interval(level)))
    assert stats.p_value(interval) == pytest.approx(expected.pvalue)
    over_seeds = dataclasses.replace(stats.seed_interval(means, level), n_examples=n_examples)
    assert dataclasses.astuple(interval) == pytest.approx(dataclasses.astuple(over_seeds))


@quick
@given(matrices)
def test_is_never_narrower_than_t_over_the_seed_means_and_agrees_with_its_p_value(matrix):
    interval, means = stats.confirmatory_interval(table(matrix)), matrix.mean(axis=1)
    if isnan(interval.ci_low):
        assert interval.se == 0 and np.ptp(matrix) == pytest.approx(0)
        return
    floor = t.ppf(0.975, len(means) - 1) * means.std(ddof=1) / sqrt(len(means))
    half_width = interval.ci_high - interval.estimate
    assert half_width >= floor * (1 - 1e-9)
    distance = abs(interval.estimate) - half_width  # of 0 to the nearer end
    assert abs(distance) < 1e-9 or (stats.p_value(interval) < 0.05) == (distance > 0)


@quick
@given(matrices, st.sampled_from([-3.0, -0.5, 2.0, 100.0]), st.sampled_from([-7.0, 0.0, 4.0]))
def test_follows_a_change_of_unit_and_origin(matrix, scale, shift):
    before = stats.confirmatory_interval(table(matrix))
    after = stats.confirmatory_interval(table(scale * matrix + shift))
    low, high = sorted(scale * end + shift for end in ends(before))
    spread = abs(scale) * before.se, abs(scale) * before.detectable
    expected = (scale * before.estimate + shift, low, high, *spread)
    measured = (after.estimate, *ends(after), after.se, after.detectable)
    assert measured == pytest.approx(expected, rel=1e-6, abs=1e-7, nan_ok=True)


def test_mean_squares_that_tie_stay_tied_when_the_origin_moves():
    one = np.zeros((3, 2))
    one[2, 1] = 0.01  # seeds, examples and the rest have the same mean square
    here, there = (stats.confirmatory_interval(table(m)) for m in (one, -0.5 * one - 7))
    assert here.df == there.df and there.se == pytest.approx(here.se / 2, rel=1e-9)


@quick
@given(matrices, st.randoms(use_true_random=False))
def test_ignores_the_order_of_rows_and_the_names(matrix, random):
    deltas = table(matrix)
    expected = dataclasses.astuple(stats.confirmatory_interval(deltas))
    order = random.sample(range(len(deltas)), len(deltas))
    renamed = deltas.assign(
        seed=9 - deltas["seed"], example_id=[n[::-1] for n in deltas.example_id]
    )
    for other in (deltas.iloc[order], renamed):
        interval = dataclasses.astuple(stats.confirmatory_interval(other))
        assert interval == pytest.approx(expected, rel=1e-6, abs=1e-12, nan_ok=True)


def test_a_plan_for_the_seeds_at_hand_is_what_the_interval_could_see():
    matrix = crossed(np.random.default_rng(3), 6, 40, seed_sd=0.5, example_sd=0.8, rest_sd=0.7)
    deltas = table(matrix)
    a, b, c = planning.variance_components(deltas)
    assert min(a, b, c) > 0
    plan = planning.planned_effects(deltas, (3, 6, 50, 10_000)).set_index("n_seeds").detectable
    assert plan[6] == pytest.approx(stats.confirmatory_interval(deltas).detectable, rel=1e-9)
    assert plan.is_monotonic_decreasing
    # What seeds cannot buy: the examples' share B/N stays.
    assert plan[10_000] == pytest.approx(2.8 * np.sqrt(b / 40), rel=0.1)
    with pytest.raises(ValueError, match="needs 2"):
        planning.variance_components(table(matrix[:1]))


def test_covers_the_truth_as_often_as_it_says():
    rng, hits, n = np.random.default_rng(1), 0, 400
    for _ in range(n):
        matrix = crossed(rng, 4, 25, seed_sd=0.6, example_sd=0.7, rest_sd=0.7, mean=0.3)
        low, high = ends(stats.confirmatory_interval(table(matrix)))
        hits += low < 0.3 < high
    low, high = binom.interval(0.999, n, 0.95)
    assert low <= hits <= high


def test_one_seed_gives_an_estimate_and_no_interval():
    deltas = table([[1.0, 2.0, 4.5]])
    for interval in (stats.confirmatory_interval(deltas), simulation.crossed_bootstrap(deltas)):
        assert interval.estimate == pytest.approx(2.5)
        assert np.isnan([*ends(interval), interval.detectable]).all()
        assert (interval.n_seeds, interval.n_examples) == (1, 3)
    assert np.isnan(ends(stats.seed_interval([0.4]))).all()


@pytest.mark.parametrize("value", [0.0, 0.1])
def test_values_without_spread_give_no_interval_rather_than_certainty(value):
    values = np.full((3, 7), value)
    values[1] *= 1 + 1e-15  # rounding, which must not look like a spread
    intervals = (
        stats.confirmatory_interval(table(values)),
        stats.seed_interval(values[:, 0]),
        simulation.crossed_bootstrap(table(values)),
    )
    for interval in intervals:
        assert interval.estimate == pytest.approx(value)
        assert np.isnan([*ends(interval), stats.p_value(interval)]).all()


# ------------------------------------------------------------------------------------ weights


@quick
@given(matrices, st.floats(0.1, 50))
def test_equal_weights_change_nothing(matrix, weight):
    deltas = table(matrix)
    plain = dataclasses.astuple(stats.confirmatory_interval(deltas))
    weighted = dataclasses.astuple(stats.confirmatory_interval(deltas.assign(weight=weight)))
    assert weighted == pytest.approx(plain, rel=1e-9, abs=1e-12, nan_ok=True)


def weighted_table(rng, n_seeds=4, n_examples=30):
    deltas = table(crossed(rng, n_seeds, n_examples, 0.3, 1.0, 0.5))
    weights = pd.Series(np.exp(rng.standard_normal(n_examples)), deltas.example_id.unique())
    return deltas.assign(weight=deltas.example_id.map(weights))


def test_a_weighted_estimate_by_hand():
    deltas = weighted_table(np.random.default_rng(0))
    interval = stats.confirmatory_interval(deltas)
    weighted = (deltas.delta * deltas.weight).groupby(deltas.seed).sum()
    means = weighted / deltas.groupby("seed").weight.sum()
    assert interval.estimate == pytest.approx(means.mean())
    floor = stats.seed_interval(means)
    assert interval.ci_high - interval.ci_low >= (floor.ci_high - floor.ci_low) * (1 - 1e-9)
    one_seed = stats.confirmatory_interval(deltas[deltas.seed == 2])
    assert one_seed.estimate == pytest.approx(means[2]) and isnan(one_seed.ci_low)


def test_weights_of_nothing_but_scale_and_order_change_nothing():
    deltas = weighted_table(np.random.default_rng(1))
    expected = dataclasses.astuple(stats.confirmatory_interval(deltas))
    other = deltas.assign(weight=7 * deltas.weight).sample(frac=1, random_state=0)
    found = dataclasses.astuple(stats.confirmatory_interval(other))
    assert found == pytest.approx(expected, rel=1e-9)


def test_without_spread_between_seeds_it_is_the_standard_error_of_a_weighted_mean():
    """All seeds agree, so what is left are examples: held against statsmodels' HC3 and HC0."""
    rng = np.random.default_rng(2)
    values, weights = rng.standard_normal(200), np.exp(0.6 * rng.standard_normal(200))
    deltas = table(np.tile(values, (3, 1)))
    deltas["weight"] = np.tile(weights, 3)
    interval = stats.confirmatory_interval(deltas)
    model = sm.WLS(values, np.ones(200), weights=weights)
    robust = [model.fit(cov_type=kind) for kind in ("HC0", "HC3")]
    assert interval.estimate == pytest.approx(robust[0].params[0])
    assert robust[0].bse[0] < interval.se < robust[1].bse[0]
    assert 30 < interval.df < 100  # not 199: heavy rows decide more than light ones


def test_one_heavy_example_leaves_the_freedom_of_few():
    deltas = table(crossed(np.random.default_rng(3), 10, 50, 0, 1, 0.1))
    heavy = (deltas.example_id == "row-0") * 99.0 + 1
    assert stats.confirmatory_interval(deltas.assign(weight=heavy)).df < 3
    assert stats.confirmatory_interval(deltas).df > 40


def test_equal_seed_means_are_not_taken_for_certainty():
    # Each seed flips one answer, another one each time: the seed means agree exactly, by luck.
    low, high = ends(stats.confirmatory_interval(table(np.eye(3, 10))))
    assert low < 0 < high


def test_coverage_by_simulation():
    """Ours holds the truth as often as it says, with our spreads, heavy tails and weights too."""
    rates = simulation.coverage_table(4000)
    assert list(rates.columns) == ["spread", "weights", "n_seeds", "interval", "crossed_bootstrap"]
    assert len(rates) == 15 and set(rates.n_seeds) == {3, 5, 10}
    assert {("heavy-tailed rows", "tokens"), ("as measured", "equal")} <= set(
        zip(rates.spread, rates.weights, strict=True)
    )
    assert rates.interval.round(2).between(0.93, 0.97).all(), rates
    # Three equal signs are one in four where the seeds decide: what the bootstrap takes for sure.
    bad = rates.query("spread == 'seeds differ most' and n_seeds == 3").crossed_bootstrap.item()
    assert 0.65 < bad < 0.85


@pytest.mark.parametrize("spreads", [(0.0, 1.0, 0.0), (0.0, 0.0, 1.0), (1.0, 0.1, 0.1)])
@pytest.mark.parametrize("n_seeds", [2, 5])
def test_coverage_at_the_extremes_of_what_differs(spreads, n_seeds):
    for weighted in (False, True):
        rate = simulation.coverage(n_seeds, spreads, weighted=weighted, n_examples=60)
        assert 0.93 <= rate < 1


def test_random_results_are_seeded():
    rate, again, other = (
        simulation.coverage(3, n_examples=20, n_simulations=700, seed=seed) for seed in (0, 0, 1)
    )
    assert rate == again and rate != other
    deltas = table(crossed(np.random.default_rng(0), 3, 9, 1, 1, 1))
    first, again, other = (ends(simulation.crossed_bootstrap(deltas, 500, s)) for s in (0, 0, 1))
    assert first == again and first != other


def test_bootstrap_calls_three_equal_signs_an_effect_and_the_t_does_not():
    deltas = table(np.tile([[0.1], [0.5], [2.0]], (1, 20)))
    bootstrap = simulation.crossed_bootstrap(deltas)
    assert ends(bootstrap) == pytest.approx((0.1, 2.0))
    assert stats.confirmatory_interval(deltas).ci_low < 0
    assert np.isnan([bootstrap.df, bootstrap.detectable, stats.p_value(bootstrap)]).all()


def test_bootstrap_has_the_spread_of_seeds_plus_examples():
    matrix = crossed(np.random.default_rng(3), 12, 40, seed_sd=1, example_sd=2, rest_sd=0)
    interval = simulation.crossed_bootstrap(table(matrix), n_resamples=20_000)
    # Without a rest the two resampled axes add: var of the 12 seed means / 12 + of the 40 / 40.
    variance = matrix.mean(1).var() / 12 + matrix.mean(0).var() / 40
    assert interval.se == pytest.approx(sqrt(variance), rel=0.03)
    assert interval.estimate == pytest.approx(matrix.mean())
    assert interval.ci_high - interval.ci_low == pytest.approx(2 * 1.96 * interval.se, rel=0.05)


@pytest.mark.parametrize("df", [1, 2, 4.5, 30])
@pytest.mark.parametrize("power", [0.5, 0.8])
def test_detectable_effect_has_its_power_by_simulation(df, power):
    se, n, rng = 0.03, 200_000, np.random.default_rng(0)
    effect = stats.detectable_effect(se, df, power=power)
    estimates = effect + se * rng.standard_normal(n)
    estimated_se = se * np.sqrt(rng.chisquare(df, n) / df)
    found = int((np.abs(estimates / estimated_se) > t.ppf(0.975, df)).sum())
    low, high = binom.interval(0.999, n, power)
    assert low <= found <= high


@pytest.mark.parametrize("n, alpha, power", [(3, 0.05, 0.8), (10, 0.05, 0.1), (40, 0.01, 0.8)])
def test_detectable_effect_agrees_with_statsmodels(n, alpha, power):
    expected = TTestPower().solve_power(nobs=n, alpha=alpha, power=power)
    effect = stats.detectable_effect(1 / sqrt(n), n - 1, alpha, power)
    assert effect == pytest.approx(expected, rel=1e-5)  # their solver stops at about 4e-6


def test_detectable_effect_in_limits_and_in_intervals():
    assert stats.detectable_effect(1, 1e6) == pytest.approx(1.95996 + 0.84162, rel=1e-4)
    assert stats.detectable_effect(7, 4) == pytest.approx(7 * stats.detectable_effect(1, 4))
    assert stats.detectable_effect(0, 4) == 0
    deltas = table(crossed(np.random.default_rng(5), 4, 10, 1, 1, 1))
    interval = stats.confirmatory_interval(deltas, level=0.9, power=0.7)
    assert interval.detectable == stats.detectable_effect(interval.se, interval.df, 1 - 0.9, 0.7)


@quick
@given(st.lists(st.integers(0, 1000).map(lambda k: k / 1000), min_size=1, max_size=8))
def test_holm_agrees_with_statsmodels(p_values):
    with patch("gc.collect"):  # which it calls each time: half a second beside all that is loaded
        expected = multipletests(p_values, method="holm")[1]
    assert stats.holm(p_values) == pytest.approx(expected)


def test_holm_by_hand():
    # Sorted 0.01, 0.03, 0.04 times 3, 2, 1: 0.03, 0.06 and 0.04, which must not fall below 0.06.
    assert stats.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert stats.holm([]).shape == (0,)


def test_it_can_be_used_without_the_lab():
    """Public and for Python 3.10: nothing but numpy, pandas and scipy is imported."""
    text = Path(stats.__file__).read_text("utf-8")
    roots = set()
    for node in ast.walk(ast.parse(text, feature_version=(3, 10))):
        if isinstance(node, ast.Import):
            roots |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            roots.add(node.module.partition(".")[0])
    assert roots - set(sys.stdlib_module_names) == {"numpy", "pandas", "scipy"}


GOOD = table([[1, 2, 3], [4, 5, 7]])
BAD_TABLES = [
    (GOOD.drop(columns="delta"), r"needs seed, example_id, delta; it has \['seed', 'example_id'\]"),
    (GOOD.iloc[:0], "deltas has no rows"),
    (GOOD.assign(seed=[None, 0, 0, 1, 1, 1]), "a row without seed or example_id"),
    (GOOD.assign(example_id=["a", "b", None, "a", "b", "c"]), "a row without seed or example_id"),
    (GOOD.assign(delta=[1, 2, 3, 4, nan, 6]), "no finite delta for seed 1, example_id row-1"),
    (GOOD.assign(delta=[1, 2, -np.inf, 4, 5, 6]), "no finite delta for seed 0, example_id row-2"),
    (GOOD.assign(delta=["x", *range(5)]), "no finite delta for seed 0, example_id row-0"),
    (pd.concat([GOOD, GOOD.iloc[[2]]]), "two rows for seed 0, example_id row-2"),
    (GOOD.drop(index=5), "unbalanced: seed 1 lacks example_id row-2; keep the examples that all"),
]
_ONE = "needs one positive weight, the same for all seeds"
BAD_TABLES += [
    (GOOD.assign(weight=w), f"example_id row-{bad} {_ONE}")
    for w, bad in (
        ([1, 2, 0, 1, 2, 0], 2),
        ([1, 2, 3, 1, 9, 3], 1),
        ([nan, 2, 3, nan, 2, 3], 0),
        ([1, 2, np.inf, 1, 2, np.inf], 2),
        ([1, 2, "x", 1, 2, 3], 2),
    )
]
HOLM, POWER = "holm needs a flat list of p-values", "need se >= 0, df > 0 and 0 < alpha < power < 1"
BAD_CALLS = [
    *((stats.seed_interval, [v], "flat list of finite") for v in ([], [1, nan], [[1.0], [2.0]])),
    *((stats.seed_interval, [[1, 2], v], "level must lie between") for v in (0, 1, 95, nan)),
    *((stats.detectable_effect, v, POWER) for v in ([-1, 4], [nan, 4], [np.inf, 4], [1, 0])),
    *((stats.detectable_effect, [1, 4, *v], POWER) for v in ([0], [0.8, 0.8], [0.1, 1])),
    *((stats.holm, [v], HOLM) for v in ([0.2, 1.2], [-0.1], [nan], [[0.1]])),
    (simulation.coverage, [1], "needs n_seeds >= 2, got 1"),
    *((stats.confirmatory_interval, [v], message) for v, message in BAD_TABLES),
    *((simulation.crossed_bootstrap, [v], message) for v, message in BAD_TABLES),
]


@pytest.mark.parametrize("call, arguments, message", BAD_CALLS)
def test_bad_input_is_refused_in_one_clear_line(call, arguments, message):
    with pytest.raises(ValueError, match=message) as caught:
        call(*arguments)
    assert "\n" not in str(caught.value)
