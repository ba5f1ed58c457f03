"""Intervals and tests for paired comparisons of two arms over seeds and examples.

The unit is the **seed pair**: treatment and control trained with the same seed on the same rows
and scored on the same test examples. Every seed pair meets every example, which is a two-way
crossed design with one number per cell and two random factors,

    delta[s, e] = mu + a[s] + b[e] + c[s, e]      variances A (seed), B (example), C (the rest),

so that the mean over S seeds and N examples has variance A/S + B/N + C/(S N). Averaging over
examples first and testing S numbers ignores B/N (the examples are a sample too); pooling all
S N numbers ignores A/S, and A does not shrink however many examples are scored. Examples may have
weights, as a loss per token weighs a response by its tokens.

Sources: Searle, Casella & McCulloch 1992 (crossed random effects, expected mean squares),
Satterthwaite 1946 (degrees of freedom of a sum of mean squares), Bell & McCaffrey 2002 (residuals
of a weighted estimate, corrected for leverage), Miller 2024, arXiv:2411.00640 (paired evaluation of
language models), Holm 1979 (several tests).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from math import inf, isfinite, nan

import numpy as np
import pandas as pd
from scipy.optimize import brentq
from scipy.stats import nct, t

# A standard error below this share of the largest value is rounding (differences of stored
# numbers carry errors near 1e-14 of their size), not a spread.
_ROUNDING = 1e-12


@dataclass(frozen=True)
class Interval:
    """An estimate and how far to trust it, in the metric's own unit.

    ci_low, ci_high and detectable are NaN where no interval exists: one seed, or values without
    any spread (an interval of width zero would claim certainty from a few equal numbers).
    """

    estimate: float  # (weighted) mean of treatment minus control
    ci_low: float
    ci_high: float
    se: float  # standard error of the estimate; NaN with one seed
    df: float  # degrees of freedom of the t distribution; NaN for the bootstrap, 0 with one seed
    n_seeds: int
    n_examples: int
    detectable: float  # smallest true effect that this design finds with the asked power


def confirmatory_interval(
    deltas: pd.DataFrame, level: float = 0.95, power: float = 0.8
) -> Interval:
    """Interval for the mean difference over seeds *and* examples, both taken as samples.

    The mean squares of the two-way layout, and their expectations:

        MS_seed    = N sum_s (mean_s - mean)^2 / (S-1)                    C + N A
        MS_example = S sum_e (mean_e - mean)^2 / (N-1)                    C + S B
        MS_rest    = sum_se (what is left)^2 / ((S-1)(N-1))               C

    hence N A = MS_seed - MS_rest and S B = MS_example - MS_rest, each set to 0 if negative, and
    S N var(mean) = N A + S B + C, which is MS_seed + MS_example - MS_rest if both are positive.
    Satterthwaite gives that sum (sum)^2 / sum_i(MS_i^2 / df_i) degrees of freedom. Where the t
    interval with S-1 degrees over the S seed-pair means is wider, that one is returned.

    With a column `weight` the estimate is sum w d / sum w, see `mean_squares`.

    deltas: columns seed, example_id, delta, and weight (optional; positive, the same for every
    seed); every seed has every example once (S N rows).
    power: for `detectable`, two-sided at 1 - level. N = 1 gives the t interval over seeds. With
    S = 1 there is no interval over seeds: ci, se and detectable are NaN, df is 0.
    Raises ValueError for missing columns, no rows, non-finite, repeated or unbalanced values.
    """
    values, shares = crossed_matrix(deltas), example_shares(deltas)
    return _t_interval(values, level, power, shares)


def seed_interval(values: Sequence[float], level: float = 0.95, power: float = 0.8) -> Interval:
    """The t interval over S seed-pair differences, for metrics without example pairs.

    values: shape (S,), finite (else ValueError). If the seeds share their examples it speaks of
    new seeds on those examples only. n_examples of the result is 1: one number a seed.
    """
    matrix = np.asarray(values, dtype=float)
    if matrix.ndim != 1 or matrix.size == 0 or not np.isfinite(matrix).all():
        raise ValueError(f"seed_interval needs a flat list of finite differences, got {values!r}")
    return _t_interval(matrix[:, None], level, power)


def detectable_effect(se: float, df: float, alpha: float = 0.05, power: float = 0.8) -> float:
    """Smallest true effect that a two-sided t test at alpha finds with the given power.

    Under an effect d the statistic is noncentral t with noncentrality d/se; solved for
    P(|T| > t_crit) = power, in the unit of se. The familiar 2.8 se needs many degrees of
    freedom; with 2 it is 5.7 se. Raises ValueError for values out of range.
    """
    if not (0 <= se < inf and 0 < df < inf and 0 < alpha < power < 1):
        got = f"{se=}, {df=}, {alpha=}, {power=}"
        raise ValueError(f"need se >= 0, df > 0 and 0 < alpha < power < 1, got {got}")
    critical = t.ppf(1 - alpha / 2, df)

    def shortfall(noncentrality: float) -> float:
        near, far = nct.sf(critical, df, noncentrality), nct.cdf(-critical, df, noncentrality)
        # scipy gives NaN for the far tail at noncentrality > 5; it is below P(Z < -5) = 3e-7.
        return near + np.nan_to_num(far) - power

    high = 1.0
    while shortfall(high) < 0:
        high *= 2
    return float(se * brentq(shortfall, 0.0, high))


def p_value(interval: Interval) -> float:
    """Two-sided p-value of "no effect" from the interval's own estimate, se and df.

    Below 1 - level exactly when the interval excludes 0; NaN without one, and for a bootstrap.
    """
    if not (isfinite(interval.ci_low) and isfinite(interval.df)):
        return nan
    return float(2 * t.sf(abs(interval.estimate) / interval.se, interval.df))


def holm(p_values: Sequence[float]) -> np.ndarray:
    """Holm's step-down adjusted p-values, in the order given, shape (m,).

    The i-th smallest (from 0) times m - i, made non-decreasing, at most 1. Raises ValueError for
    values outside [0, 1] and NaN: leave out tests that could not be made.
    """
    p = np.asarray(p_values, dtype=float)
    if p.ndim != 1 or not ((p >= 0) & (p <= 1)).all():
        raise ValueError(f"holm needs a flat list of p-values between 0 and 1, got {p_values!r}")
    order = np.argsort(p)
    steps = np.maximum.accumulate(p[order] * np.arange(p.size, 0, -1))
    return np.minimum(steps, 1.0)[np.argsort(order)]


def t_arithmetic(
    values: np.ndarray, level: float, shares: np.ndarray | None = None
) -> tuple[np.ndarray, ...]:
    """Estimate, half width, se, df, shape (...) each, of (..., S, N) values; S >= 2.

    shares: of each example in the estimate, shape (..., N), summing to 1; None: 1/N each.
    Takes stacks, so that `simulation` tests the arithmetic of the real interval.
    """
    shares = _equal(values) if shares is None else shares
    mean, squares = mean_squares(values, shares)
    return mean, *combined(squares, values.shape[-2], shares, level)


def mean_squares(
    values: np.ndarray, shares: np.ndarray
) -> tuple[np.ndarray, tuple[np.ndarray, ...]]:
    """Means and (MS_seed, MS_example, MS_rest), shape (...) each, of (..., S, N) values.

    With shares h_e = w_e / sum w of the examples, the estimate m is the mean over seeds of
    m_s = sum_e h_e d_se, and to first order, the weights being drawn with the examples,

        m - mu = mean_s a_s + sum_e h_e (b_e + mean_s c_se):

    an example moves the estimate by h_e times its own distance from it (a ratio's influence). So

        MS_seed    = N sum_s (m_s - m)^2 / (S-1)
        MS_example = S N sum_e h_e^2 (mean_e - m)^2 / g_e
        MS_rest    = N sum_se h_e^2 (d_se - m_s - mean_e + m)^2 / (g_e (S-1))

    with the expectations that `confirmatory_interval` gives, B and C being weighted: B =
    N sum_e h_e^2 var(b_e). An example pulls m towards itself, so its distance has the variance
    times g_e = 1 - 2 h_e + sum h^2, not 1. Equal shares give the sums that stand there, since
    then g_e = (N-1)/N.
    """
    n_seeds, n_examples = values.shape[-2:]
    h = shares[..., None, :]
    by_seed = (h * values).sum(-1, keepdims=True)
    mean = by_seed.mean(-2, keepdims=True)
    by_seed = by_seed - mean
    by_example = values.mean(-2, keepdims=True) - mean
    rest = values - mean - by_seed - by_example
    pull = 1 - 2 * h + (h**2).sum(-1, keepdims=True)
    # One example alone is the estimate: it has no distance from it, and no spread to divide.
    scale = n_examples * h**2 / np.where(pull > 1e-12, pull, 1.0)
    ms_seed = n_examples * (by_seed**2).sum((-2, -1)) / (n_seeds - 1)
    ms_example = n_seeds * (scale * by_example**2).sum((-2, -1))
    ms_rest = (scale * rest**2).sum((-2, -1)) / (n_seeds - 1)
    return mean[..., 0, 0], (ms_seed, ms_example, ms_rest)


def _equal(values: np.ndarray) -> np.ndarray:
    return np.full(values.shape[-1], 1 / values.shape[-1])


def _dfs(n_seeds: int, shares: np.ndarray) -> tuple[np.ndarray, ...]:
    """Degrees of freedom of the three mean squares.

    A sum of squares with weights h^2 has (sum h^2)^2 / sum h^4 members' worth of freedom
    (Satterthwaite), N where they are equal, and one of N is spent on the mean.
    """
    n_examples = shares.shape[-1]
    members = (shares**2).sum(-1) ** 2 / (shares**4).sum(-1)
    # With one example the last two sums are 0 and have no degrees of freedom: 0 / 1.
    examples = np.maximum(members * (n_examples - 1) / n_examples, 1.0)
    return np.full_like(examples, n_seeds - 1), examples, np.maximum((n_seeds - 1) * examples, 1.0)


def combined(
    observed: tuple[np.ndarray, ...], n_seeds: int, shares: np.ndarray, level: float
) -> tuple[np.ndarray, ...]:
    """Half width, se and df of the mean, shape (...) each; never below the seeds' own t.

    observed: the three of `mean_squares`, or what they are expected to be.
    """
    (ms_seed, ms_example, ms_rest), dfs = observed, _dfs(n_seeds, shares)
    # Each mean square holds C once, the sum needs it once: subtract it, leave it or add it.
    # Equal up to rounding counts as equal, else a shift of all values could move the df.
    floor_ms = (1 + 1e-9) * ms_rest
    has_seed, has_example = 1 * (ms_seed > floor_ms), 1 * (ms_example > floor_ms)
    terms = has_seed * ms_seed, has_example * ms_example, (1 - has_seed - has_example) * ms_rest
    total = sum(terms)
    squares = sum(term**2 / df for term, df in zip(terms, dfs, strict=True))
    # A subtraction can push the formula below the poorest member's df; no sum lies there.
    poorest = functools.reduce(np.minimum, dfs)
    df = np.maximum(total**2 / np.where(squares > 0, squares, 1.0), poorest)
    se, floor_se = (np.sqrt(ms / (n_seeds * shares.shape[-1])) for ms in (total, ms_seed))
    half_width, floor = (t.ppf((1 + level) / 2, d) * s for d, s in ((df, se), (dfs[0], floor_se)))
    pairs = ((floor, half_width), (floor_se, se), (dfs[0], df))
    return tuple(np.where(floor >= half_width, *pair) for pair in pairs)


def is_rounding(spread: float, values: np.ndarray) -> bool:
    """Whether a spread of these values, in their unit, is no more than rounding."""
    return bool(spread <= _ROUNDING * np.abs(values).max())


def _t_interval(
    values: np.ndarray, level: float, power: float, shares: np.ndarray | None = None
) -> Interval:
    if not 0 < level < 1:
        raise ValueError(f"level must lie between 0 and 1, got {level!r}")
    n_seeds, n_examples = values.shape
    if n_seeds == 1:
        mean = float(values[0] @ (_equal(values) if shares is None else shares))
        return Interval(mean, nan, nan, nan, 0.0, 1, n_examples, nan)
    mean, half_width, se, df = (float(x) for x in t_arithmetic(values, level, shares))
    if is_rounding(se, values):
        return Interval(mean, nan, nan, 0.0, df, n_seeds, n_examples, nan)
    seen = detectable_effect(se, df, 1 - level, power)
    return Interval(mean, mean - half_width, mean + half_width, se, df, n_seeds, n_examples, seen)


def crossed_matrix(deltas: pd.DataFrame) -> np.ndarray:
    """Long table to a checked (S, N) matrix."""
    if not {"seed", "example_id", "delta"} <= set(deltas.columns):
        raise ValueError(f"deltas needs seed, example_id, delta; it has {list(deltas.columns)}")
    if deltas.empty or deltas[["seed", "example_id"]].isna().any(axis=None):
        raise ValueError("deltas has no rows, or a row without seed or example_id")
    keys, delta = deltas[["seed", "example_id"]], pd.to_numeric(deltas["delta"], errors="coerce")
    delta = delta.to_numpy(dtype=float, na_value=nan)
    for bad, what in ((~np.isfinite(delta), "no finite delta"), (keys.duplicated(), "two rows")):
        if bad.any():
            seed, example_id = keys[np.asarray(bad)].astype(object).iloc[0]
            raise ValueError(f"{what} for seed {seed}, example_id {example_id}")
    table = keys.assign(delta=delta).pivot(index="seed", columns="example_id", values="delta")
    for row, column in np.argwhere(table.isna()):
        hole = f"seed {table.index[row]} lacks example_id {table.columns[column]}"
        raise ValueError(f"deltas is unbalanced: {hole}; keep the examples that all seeds have")
    return table.to_numpy(dtype=float)


def example_shares(deltas: pd.DataFrame) -> np.ndarray:
    """Of each example in the estimate, in the columns' order of `crossed_matrix`; they sum to 1.

    deltas: as checked there, with or without a column weight. ValueError for weights that are
    not positive and finite, or differ between the seeds of an example.
    """
    if "weight" not in deltas:
        return np.full(n := deltas["example_id"].nunique(), 1 / n)
    weight = pd.to_numeric(deltas["weight"], errors="coerce").astype(float)
    by_example = weight.groupby(deltas["example_id"])
    low, high = by_example.min(), by_example.max()
    good = (low > 0) & (low == high) & (high < inf) & (by_example.count() == by_example.size())
    if not good.all():
        name = good.index[~good][0]
        raise ValueError(f"example_id {name} needs one positive weight, the same for all seeds")
    weights = by_example.first().to_numpy()
    return weights / weights.sum()
