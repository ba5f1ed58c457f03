"""Intervals, tests and verdicts for paired comparisons of two arms over seeds and examples.

The unit is the **seed pair**: treatment and control trained with the same seed on the same rows
and scored on the same test examples. Every seed pair meets every example, which is a two-way
crossed design with one number per cell and two random factors,

    delta[s, e] = mu + a[s] + b[e] + c[s, e]      variances A (seed), B (example), C (the rest),

so that the mean over S seeds and N examples has variance A/S + B/N + C/(S N). Averaging over
examples first and testing S numbers ignores B/N (the examples are a sample too); pooling all
S N numbers ignores A/S, and A does not shrink however many examples are scored.

Sources: Searle, Casella & McCulloch 1992 (crossed random effects, expected mean squares),
Satterthwaite 1946 (degrees of freedom of a sum of mean squares), Miller 2024, arXiv:2411.00640
(paired evaluation of language models), Holm 1979 (several tests).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf, isfinite, nan
from typing import Literal

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

    estimate: float  # mean of treatment minus control
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

    deltas: columns seed, example_id, delta; every seed has every example once (S N rows).
    power: for `detectable`, two-sided at 1 - level. N = 1 gives the t interval over seeds. With
    S = 1 there is no interval over seeds: ci, se and detectable are NaN, df is 0.
    Raises ValueError for missing columns, no rows, non-finite, repeated or unbalanced values.
    """
    return _t_interval(crossed_matrix(deltas), level, power)


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


def non_inferiority(interval: Interval, margin: float, higher_is_better: bool) -> bool:
    """True if the whole interval lies on the good side of "worse by margin" (metric's unit).

    A 95 % interval makes this a one-sided test at 2.5 %. Without an interval (NaN): False.
    """
    if not (isfinite(margin) and margin > 0):
        raise ValueError(f"margin must be a positive number in the metric's unit, got {margin!r}")
    worst = interval.ci_low if higher_is_better else -interval.ci_high
    return bool(worst > -margin)


@dataclass(frozen=True)
class Verdict:
    """What an interval says of an effect, as data; `str()` makes the words, and nothing else does.

    Numbers are in the metric's own unit. `verdict` makes one.
    """

    outcome: Literal["detected", "opposite", "not_detected", "not_testable"]
    unit: str = ""
    detectable: float | None = None  # smallest effect that could be seen; None if not testable
    elsewhere: str | None = None  # profile that can test it
    adjusted_p: float | None = None  # from `holm`, where several were tested
    taken_back: bool = (
        False  # the interval excludes 0, and after Holm's correction it does not count
    )
    margin: float | None = None  # how much worse still counts as "no worse"
    held: bool | None = None  # whether `non_inferiority` holds; None without margin or interval

    @property
    def testable(self) -> bool:
        return self.outcome != "not_testable"

    @property
    def detected(self) -> bool:
        """An effect of either sign, the claimed one or its opposite."""
        return self.outcome in ("detected", "opposite")

    def __str__(self) -> str:
        if not self.testable:
            return "not testable here" + (
                f" (see profile {self.elsewhere})" if self.elsewhere else ""
            )
        if self.detected:
            against = self.outcome == "opposite"
            words = "detected, opposite to the claim" if against else "detected"
        elif self.taken_back:
            words = f"not detected after correction (p = {self.adjusted_p:.2g})"
        else:
            seen = f"{self.detectable:.2g} {self.unit}".strip()
            words = f"not detected (could have seen ≥ {seen})"
        if self.held is None:
            return words
        bound = "worse by less than" if self.held else "not shown to be worse by less than"
        return f"{words}; {bound} {self.margin:g} {self.unit}".strip()


def verdict(
    interval: Interval | None,
    elsewhere: str | None = None,
    unit: str = "",
    claimed: int = 0,
    adjusted_p: float | None = None,
    margin: float | None = None,
) -> Verdict:
    """Whether the interval shows an effect, as a `Verdict`.

    "detected" if the interval excludes 0, "opposite" if so with the other sign than claimed,
    "not_detected" if not, "not_testable" if there is no interval (None, or its ends are NaN).
    claimed: sign of the effect that a claim predicts (0: none). adjusted_p: from `holm`; at 0.05 or
    more it takes a detection back. margin: for a claim of "no worse" in a metric where higher is
    better; `held` says whether `non_inferiority` holds, and a lower value is "opposite".
    elsewhere, unit: for the words. ValueError for a bootstrap, which has no detectable effect.
    """
    if interval is None or not isfinite(interval.ci_low):
        return Verdict("not_testable", unit, elsewhere=elsewhere, margin=margin)
    if not isfinite(interval.detectable):
        raise ValueError("verdict needs confirmatory_interval or seed_interval, not a bootstrap")
    excludes = interval.ci_low > 0 or interval.ci_high < 0
    taken_back = excludes and adjusted_p is not None and adjusted_p >= 0.05
    # What "no worse" forbids is a lower value.
    opposite = claimed * interval.estimate < 0 or (margin is not None and interval.estimate < 0)
    outcome = "not_detected"
    if excludes and not taken_back:
        outcome = "opposite" if opposite else "detected"
    held = None if margin is None else non_inferiority(interval, margin, higher_is_better=True)
    seen = interval.detectable
    return Verdict(outcome, unit, seen, None, adjusted_p, taken_back, margin, held)


def t_arithmetic(values: np.ndarray, level: float) -> tuple[np.ndarray, ...]:
    """Estimate, half width, se, df, shape (...) each, of (..., S, N) values; S >= 2.

    Takes stacks, so that `simulation` tests the arithmetic of the real interval.
    """
    mean, squares = mean_squares(values)
    return mean, *combined(squares, *values.shape[-2:], level)


def mean_squares(values: np.ndarray) -> tuple[np.ndarray, tuple[np.ndarray, ...]]:
    """Means and (MS_seed, MS_example, MS_rest), shape (...) each, of (..., S, N) values."""
    n_seeds, n_examples = values.shape[-2:]
    mean = values.mean((-2, -1), keepdims=True)
    by_seed = values.mean(-1, keepdims=True) - mean
    by_example = values.mean(-2, keepdims=True) - mean
    rest = values - mean - by_seed - by_example
    dfs = _dfs(n_seeds, n_examples)
    ms_seed = n_examples * (by_seed**2).sum((-2, -1)) / dfs[0]
    ms_example = n_seeds * (by_example**2).sum((-2, -1)) / dfs[1]
    return mean[..., 0, 0], (ms_seed, ms_example, (rest**2).sum((-2, -1)) / dfs[2])


def _dfs(n_seeds: int, n_examples: int) -> tuple[int, int, int]:
    # With one example the last two sums are 0 and have no degrees of freedom: 0 / 1.
    return n_seeds - 1, max(n_examples - 1, 1), max((n_seeds - 1) * (n_examples - 1), 1)


def combined(
    observed: tuple[np.ndarray, ...], n_seeds: int, n_examples: int, level: float
) -> tuple[np.ndarray, ...]:
    """Half width, se and df of the mean, shape (...) each; never below the seeds' own t.

    observed: the three of `mean_squares`, or what they are expected to be.
    """
    (ms_seed, ms_example, ms_rest), dfs = observed, _dfs(n_seeds, n_examples)
    # Each mean square holds C once, the sum needs it once: subtract it, leave it or add it.
    # Equal up to rounding counts as equal, else a shift of all values could move the df.
    floor_ms = (1 + 1e-9) * ms_rest
    has_seed, has_example = 1 * (ms_seed > floor_ms), 1 * (ms_example > floor_ms)
    terms = has_seed * ms_seed, has_example * ms_example, (1 - has_seed - has_example) * ms_rest
    total = sum(terms)
    squares = sum(term**2 / df for term, df in zip(terms, dfs, strict=True))
    # A subtraction can push the formula below the poorest member's df; no sum lies there.
    df = np.maximum(total**2 / np.where(squares > 0, squares, 1.0), min(dfs))
    se, floor_se = (np.sqrt(ms / (n_seeds * n_examples)) for ms in (total, ms_seed))
    half_width, floor = (t.ppf((1 + level) / 2, d) * s for d, s in ((df, se), (dfs[0], floor_se)))
    pairs = ((floor, half_width), (floor_se, se), (dfs[0], df))
    return tuple(np.where(floor >= half_width, *pair) for pair in pairs)


def is_rounding(spread: float, values: np.ndarray) -> bool:
    """Whether a spread of these values, in their unit, is no more than rounding."""
    return bool(spread <= _ROUNDING * np.abs(values).max())


def _t_interval(values: np.ndarray, level: float, power: float) -> Interval:
    if not 0 < level < 1:
        raise ValueError(f"level must lie between 0 and 1, got {level!r}")
    n_seeds, n_examples = values.shape
    if n_seeds == 1:
        return Interval(float(values.mean()), nan, nan, nan, 0.0, 1, n_examples, nan)
    mean, half_width, se, df = (float(x) for x in t_arithmetic(values, level))
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
