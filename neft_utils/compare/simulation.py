"""Is the interval honest? A crossed bootstrap beside it, and experiments without any effect.

Sources: Owen 2007 (crossed bootstrap). The simulations call the arithmetic of
`stats.confirmatory_interval` itself, on many experiments at once.
"""

from __future__ import annotations

from itertools import product
from math import nan

import numpy as np
import pandas as pd

from neft_utils.compare.stats import Interval, crossed_matrix, is_rounding, t_arithmetic

_BLOCK = 500  # simulations held at once: 500 x 10 seeds x 100 examples x 8 bytes = 4 MB


def crossed_bootstrap(deltas: pd.DataFrame, n_resamples: int = 4000, seed: int = 0) -> Interval:
    """95 % percentile interval resampling seeds and examples independently (Owen 2007). Secondary.

    Not for claims: with S = 3 one resample in 27 holds a given seed pair alone, and 1/27 = 3.7 %
    exceeds the 2.5 % tail. So where seed noise dominates, the interval excludes 0 whenever three
    signs agree: 2/8 = 25 % false alarms (see `type_one_error_table`). Input and errors as in
    `confirmatory_interval`; se is the SD of the resampled means, df and detectable are NaN.
    """
    values = crossed_matrix(deltas)
    means = _resampled_means(values, n_resamples, np.random.default_rng(seed))
    low, high = np.quantile(means, [0.025, 0.975])
    if len(values) == 1 or is_rounding(means.std(), values):
        low = high = nan
    estimate, se = float(values.mean()), float(means.std())
    return Interval(estimate, float(low), float(high), se, nan, *values.shape, detectable=nan)


def type_one_error(
    n_seeds: int,
    ratio: float,
    n_examples: int = 100,
    n_simulations: int = 10_000,
    seed: int = 0,
    interaction: float = 0.5,
    bootstrap: bool = False,
) -> float:
    """Share of simulated experiments without any effect whose 95 % interval excludes 0.

    ratio: seed SD sqrt(A) over the standard error that one seed pair has from its examples,
    sqrt((B + C) / N). interaction: C / (B + C), the share of the spread over examples that seeds
    do not have in common. bootstrap: test `crossed_bootstrap` with 400 resamples instead of
    `confirmatory_interval`. Raises ValueError for fewer than 2 seeds.
    """
    if n_seeds < 2:
        raise ValueError(f"an interval over seeds needs n_seeds >= 2, got {n_seeds}")
    rng, false_alarms = np.random.default_rng(seed), 0
    for start in range(0, n_simulations, _BLOCK):
        size = min(_BLOCK, n_simulations - start)
        # B + C = 1, so the example standard error is 1 / sqrt(N) and a[s] has SD ratio / sqrt(N).
        values = ratio / n_examples**0.5 * rng.standard_normal((size, n_seeds, 1))
        values = values + (1 - interaction) ** 0.5 * rng.standard_normal((size, 1, n_examples))
        values += interaction**0.5 * rng.standard_normal((size, n_seeds, n_examples))
        if bootstrap:
            means = _resampled_means(values, 400, rng)
            low, high = np.quantile(means, [0.025, 0.975], axis=-1)
        else:
            estimate, half_width, _, _ = t_arithmetic(values, level=0.95)
            low, high = estimate - half_width, estimate + half_width
        false_alarms += int(((low > 0) | (high < 0)).sum())
    return false_alarms / n_simulations


def type_one_error_table(n_simulations: int = 4000, seed: int = 0) -> pd.DataFrame:
    """False-alarm rates of both intervals at 100 examples; nominal is 0.05.

    Columns n_seeds, ratio, confirmatory, crossed_bootstrap (a quarter as many simulations).
    """
    rows = []
    for n_seeds, ratio in product((3, 5, 10), (0.0, 0.5, 1.0, 2.0, 5.0, 10.0)):
        ours = type_one_error(n_seeds, ratio, 100, n_simulations, seed)
        other = type_one_error(n_seeds, ratio, 100, n_simulations // 4, seed, bootstrap=True)
        rows.append((n_seeds, ratio, ours, other))
    return pd.DataFrame(rows, columns=["n_seeds", "ratio", "confirmatory", "crossed_bootstrap"])


def _resampled_means(values: np.ndarray, n_resamples: int, rng: np.random.Generator) -> np.ndarray:
    """Grand means, shape (..., R), of (..., S, N) values with both axes resampled R times.

    A resample is a vector of counts per axis; the members of a stack share them.
    """
    n_seeds, n_examples = values.shape[-2:]
    seeds = rng.multinomial(n_seeds, np.full(n_seeds, 1 / n_seeds), n_resamples) / n_seeds
    examples = rng.multinomial(n_examples, np.full(n_examples, 1 / n_examples), n_resamples)
    return (values @ (examples.T / n_examples) * seeds.T).sum(-2)
