"""What a design with more or fewer seed pairs would find, from the spreads of the one at hand."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from neft_utils.compare.stats import (
    combined,
    crossed_matrix,
    detectable_effect,
    example_shares,
    mean_squares,
)


def variance_components(deltas: pd.DataFrame) -> tuple[float, float, float]:
    """(A, B, C): variances of what is special to a seed, to an example, and to both together.

    By the expected mean squares of `stats.confirmatory_interval`, set to 0 if negative; in the
    unit of delta squared; with weights B and C are the weighted ones of `stats.mean_squares`.
    Input and errors as there, and ValueError for fewer than 2 seeds.
    """
    values, shares = crossed_matrix(deltas), example_shares(deltas)
    n_seeds, n_examples = values.shape
    if n_seeds < 2:
        raise ValueError(f"a spread between seeds needs 2 of them, got {n_seeds}")
    _, (ms_seed, ms_example, ms_rest) = mean_squares(values, shares)
    seed, example = (ms_seed - ms_rest) / n_examples, (ms_example - ms_rest) / n_seeds
    return max(float(seed), 0.0), max(float(example), 0.0), float(ms_rest)


def planned_effects(
    deltas: pd.DataFrame, seeds: Sequence[int] = (3, 5, 10, 20, 40), power: float = 0.8
) -> pd.DataFrame:
    """What the same design with more or fewer seed pairs would find: n_seeds, detectable.

    The variances are taken as known from these deltas, the examples stay as many as they are, so
    that B/N stays however many seeds there are. detectable as in `stats.Interval`, in delta's
    unit. Errors as in `variance_components`.
    """
    a, b, c = variance_components(deltas)
    shares, rows = example_shares(deltas), []
    for n_seeds in seeds:
        expected = (np.float64(x) for x in (c + len(shares) * a, c + n_seeds * b, c))
        _, se, df = combined(tuple(expected), n_seeds, shares, level=0.95)
        rows.append((n_seeds, detectable_effect(float(se), float(df), power=power)))
    return pd.DataFrame(rows, columns=["n_seeds", "detectable"])
