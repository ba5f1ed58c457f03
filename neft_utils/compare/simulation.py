"""Is the interval honest? A crossed bootstrap beside it, and how often each covers a known truth.

Sources: Owen 2007 (crossed bootstrap). The simulations call the arithmetic of
`stats.confirmatory_interval` itself, on many experiments at once.
"""

from __future__ import annotations

from math import nan

import numpy as np
import pandas as pd

from neft_utils.compare.stats import (
    Interval,
    crossed_matrix,
    example_shares,
    is_rounding,
    t_arithmetic,
)

_BLOCK = 250  # simulations held at once: 250 x 10 seeds x 256 examples x 8 bytes = 5 MB
# Standard deviations (seed, example, rest) of one difference. The first are of profile cpu-long's
# held-out loss, scaled: at 10 seeds and 256 rows, rows are 86 % of the estimate's variance, seeds
# 4 % and the rest 10 %. In the second, seeds outweigh ten times what 256 rows leave.
MEASURED, SEEDS_DIFFER = (0.03, 0.68, 0.73), (0.6, 0.68, 0.73)
LOG_LENGTH_SD = 0.6  # of the test rows' response tokens, as measured
# Row effects in cpu-long have skewness 2.8 and excess kurtosis 12: a gamma of this shape has 2.8
# and 11.8.
GAMMA_SHAPE = 0.51


def crossed_bootstrap(deltas: pd.DataFrame, n_resamples: int = 4000, seed: int = 0) -> Interval:
    """95 % percentile interval resampling seeds and examples independently (Owen 2007). Secondary.

    Not for claims: with S = 3 one resample in 27 holds a given seed pair alone, and 1/27 = 3.7 %
    exceeds the 2.5 % tail. So where seed noise dominates, the interval excludes 0 whenever three
    signs agree: 2/8 = 25 % false alarms (see `coverage_table`). Input, weights and errors as in
    `confirmatory_interval`; se is the SD of the resampled means, df and detectable are NaN.
    """
    values, shares = crossed_matrix(deltas), example_shares(deltas)
    means = _resampled_means(values, shares, n_resamples, np.random.default_rng(seed))
    low, high = np.quantile(means, [0.025, 0.975])
    if len(values) == 1 or is_rounding(means.std(), values):
        low = high = nan
    estimate, se = float((values @ shares).mean()), float(means.std())
    return Interval(estimate, float(low), float(high), se, nan, *values.shape, detectable=nan)


def coverage(
    n_seeds: int,
    spreads: tuple[float, float, float] = MEASURED,
    heavy_tailed: bool = False,
    weighted: bool = False,
    n_examples: int = 256,
    n_simulations: int = 2000,
    seed: int = 0,
    bootstrap: bool = False,
) -> float:
    """Share of simulated experiments whose 95 % interval holds the true effect, which is 0.

    spreads: SD of what is special to a seed, to an example, and to both. heavy_tailed: the
    example's part is skewed as GAMMA_SHAPE has it, else normal. weighted: examples weigh as their
    lognormal lengths, drawn anew in each experiment. bootstrap: of `crossed_bootstrap` with 400
    resamples instead. Raises ValueError for fewer than 2 seeds.
    """
    if n_seeds < 2:
        raise ValueError(f"an interval over seeds needs n_seeds >= 2, got {n_seeds}")
    rng, covered = np.random.default_rng(seed), 0
    for start in range(0, n_simulations, _BLOCK):
        size = min(_BLOCK, n_simulations - start)
        shares = np.exp(LOG_LENGTH_SD * weighted * rng.standard_normal((size, n_examples)))
        shares /= shares.sum(-1, keepdims=True)
        rows = rng.standard_normal((size, 1, n_examples))
        if heavy_tailed:
            rows = rng.standard_gamma(GAMMA_SHAPE, rows.shape) - GAMMA_SHAPE
            rows /= GAMMA_SHAPE**0.5
        values = spreads[0] * rng.standard_normal((size, n_seeds, 1)) + spreads[1] * rows
        values += spreads[2] * rng.standard_normal((size, n_seeds, n_examples))
        if bootstrap:
            means = _resampled_means(values, shares, 400, rng)
            low, high = np.quantile(means, [0.025, 0.975], axis=-1)
        else:
            estimate, half_width, _, _ = t_arithmetic(values, 0.95, shares)
            low, high = estimate - half_width, estimate + half_width
        covered += int(((low <= 0) & (high >= 0)).sum())
    return covered / n_simulations


def coverage_table(n_simulations: int = 2000, seed: int = 0) -> pd.DataFrame:
    """How often both intervals hold the truth, nominally 0.95, at 256 examples.

    Columns spread, weights, n_seeds, interval, crossed_bootstrap (an eighth as many simulations).
    """
    cases = [
        ("as measured", "equal", {}),
        ("as measured", "tokens", {"weighted": True}),
        ("heavy-tailed rows", "equal", {"heavy_tailed": True}),
        ("heavy-tailed rows", "tokens", {"heavy_tailed": True, "weighted": True}),
        ("seeds differ most", "equal", {"spreads": SEEDS_DIFFER}),
    ]
    rows = []
    for spread, weights, case in cases:
        for n_seeds in (3, 5, 10):
            case |= {"n_seeds": n_seeds, "seed": seed}
            ours = coverage(**case, n_simulations=n_simulations)
            other = coverage(**case, n_simulations=n_simulations // 8, bootstrap=True)
            rows.append((spread, weights, n_seeds, ours, other))
    columns = ["spread", "weights", "n_seeds", "interval", "crossed_bootstrap"]
    return pd.DataFrame(rows, columns=columns)


def _resampled_means(
    values: np.ndarray, shares: np.ndarray, n_resamples: int, rng: np.random.Generator
) -> np.ndarray:
    """Weighted means, shape (..., R), of (..., S, N) values with both axes resampled R times.

    A resample is a vector of counts per axis; the members of a stack share them.
    """
    n_seeds, n_examples = values.shape[-2:]
    seeds = rng.multinomial(n_seeds, np.full(n_seeds, 1 / n_seeds), n_resamples) / n_seeds
    examples = rng.multinomial(n_examples, np.full(n_examples, 1 / n_examples), n_resamples)
    weighted = shares[..., None, :]
    sums = ((weighted * values) @ examples.T * seeds.T).sum(-2)
    return sums / (weighted @ examples.T)[..., 0, :]
