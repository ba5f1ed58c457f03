"""Is a preferred answer more than a longer one? Preferences of two arms at equal length.

Judges prefer longer answers, so an arm that merely talks more wins more. `length_pairs` has what
the pairs alone say; here is a logit with a length term f, read where the answer is as long as the
reference (f = 0),

    logit P(win) = theta_arm + phi f(chars, reference_chars),       sigmoid(theta) at f = 0.

Differences are treatment minus control in percentage points. `tanh` is tanh(d / sd(d)), d = chars -
reference_chars, sd per arm: AlpacaEval's length control without its terms for prompt difficulty
(Dubois et al. 2024, arXiv:2404.04475). `log_ratio` is ln((chars + 1) / (reference_chars + 1)),
finite for an empty answer. The pooled forms share one slope phi (and one sd) between the arms.

Length is an outcome of the treatment, so what remains is a controlled direct effect under the
form chosen, not a causal decomposition; where lengths hardly overlap it is extrapolation, and the
forms may disagree by more than their intervals say. `length_pairs.overlap` guards that,
`compare_forms` says how well each form predicts the judge on prompts that it was not fitted to,
and `weighted_gain` counts each form by that. Fractional responses: Papke & Wooldridge 1996.
`pairs` is everywhere what `length_pairs.pair_arms` returns, n its number of rows.
"""

import numpy as np
import pandas as pd
from scipy.special import expit, softmax
from scipy.stats import norm

from neft_utils.compare.length_pairs import of_arms, raw_difference, wins_of

FORMS = ("tanh", "pooled_tanh", "log_ratio", "pooled_log_ratio")
REFUTED = 0.001  # a form of less weight is called refuted


def fit_logit(design, response, weights=None, max_steps=60):
    """Maximum-likelihood coefficients of logit P = design @ beta, many weightings at once.

    design: (n, k). response: (n,) or (B, n), 0..1, fractions allowed. weights: (B, n) case weights,
    one row per bootstrap resample or fold (default: ones). Returns (B, k); NaN where Newton's
    method did not bring the gradient per case below 1e-9. A separable sample drifts to a
    probability of 0 or 1, which is its limit. Raises ValueError for shapes that do not fit.
    """
    design, response = np.asarray(design, float), np.asarray(response, float)
    n, k = design.shape
    weights = (
        np.ones_like(np.atleast_2d(response)) if weights is None else np.asarray(weights, float)
    )
    if response.shape not in ((n,), weights.shape) or weights.shape[1:] != (n,):
        raise ValueError(f"shapes {design.shape}, {response.shape}, {weights.shape} do not fit")
    products = (design[:, :, None] * design[:, None, :]).reshape(n, k * k)
    total = weights.sum(1, keepdims=True)
    beta = np.zeros((len(weights), k))
    for _ in range(max_steps):
        chance = expit(beta @ design.T)
        gradient = (weights * (response - chance)) @ design / total
        if np.abs(gradient).max() < 1e-10:
            break
        curvature = ((weights * chance * (1 - chance)) @ products / total).reshape(-1, k, k)
        # The ridge acts on the step only, so the solution does not know of it.
        step = np.linalg.solve(curvature + 1e-10 * np.eye(k), gradient[:, :, None])[:, :, 0]
        beta += np.clip(step, -3, 3)
    beta[np.abs(gradient).max(1) > 1e-9] = np.nan
    return beta


def length_term(pairs, form):
    """f of both arms, shape (2, n): control, treatment; NaN where there is no spread to learn from.

    The sd of the tanh forms belongs to the full sample and stays fixed in resamples. Raises
    ValueError for another form.
    """
    if form not in FORMS:
        raise ValueError(f"form must be one of {', '.join(FORMS)}, not {form!r}")
    chars, reference = of_arms(pairs, "chars"), of_arms(pairs, "reference_chars")
    if form.endswith("log_ratio"):
        term = np.log1p(chars) - np.log1p(reference)
    else:
        change = chars - reference
        axis = None if form.startswith("pooled") else 1
        spread = change.std(axis=axis, ddof=1, keepdims=True)
        with np.errstate(divide="ignore", invalid="ignore"):
            term = np.tanh(change / np.where(spread > 0, spread, np.nan))
    flat = np.ptp(term) < 1e-9 if form.startswith("pooled") else (np.ptp(term, axis=1) < 1e-9).any()
    return np.full_like(term, np.nan) if flat else term


def win_rates_at_equal_length(pairs, form, weights=None):
    """Both arms' win rates at the reference's length, in percent, shape (B, 2).

    weights: (B, n) case weights of the pairs; default one row of ones. NaN without a fit.
    """
    return 100 * expit(_coefficients(pairs, form, weights)[:, :, 0])


def _coefficients(pairs, form, weights=None, wins=None):
    """(B, 2, 2): arm x (theta, phi). wins: (2, n) or (2, B, n), default the pairs' own."""
    term, wins = length_term(pairs, form), wins_of(pairs) if wins is None else wins
    if weights is None:
        weights = np.ones((1 if wins.ndim == 2 else wins.shape[1], len(pairs)))
    if np.isnan(term).any():
        return np.full((len(weights), 2, 2), np.nan)
    one, none = np.ones(len(pairs)), np.zeros(len(pairs))
    if form.startswith("pooled"):
        design = np.concatenate([np.c_[one, none, term[0]], np.c_[none, one, term[1]]])
        beta = fit_logit(design, np.concatenate(wins, -1), np.concatenate([weights, weights], 1))
        return np.stack([beta[:, [0, 2]], beta[:, [1, 2]]], axis=1)
    arms = [fit_logit(np.c_[one, f], y, weights) for f, y in zip(term, wins, strict=True)]
    return np.stack(arms, axis=1)


def length_controlled(pairs, n_resamples=1000, seed=0, forms=FORMS):
    """Differences at equal length with 95 % percentile bootstrap intervals over prompts, refitted.

    Returns a DataFrame with one row per form: form, control, treatment (win rates in percent),
    slope_control, slope_treatment (phi), estimate, ci_low, ci_high (points), share_explained,
    share_low, share_high (1 - estimate/raw, NaN where the raw interval holds 0: a share of
    nothing), n_failed (resamples without a fit).
    """
    n = len(pairs)
    rng = np.random.default_rng(seed)
    counts = rng.multinomial(n, np.full(n, 1 / n), n_resamples).astype(float)
    control, treatment = 100 * wins_of(pairs)
    raw, raws = raw_difference(pairs), counts @ (treatment - control) / n
    rows = []
    for form in forms:
        theta, phi = _coefficients(pairs, form)[0].T
        levels = 100 * expit(theta)
        resampled = win_rates_at_equal_length(pairs, form, counts)
        estimate, estimates = levels[1] - levels[0], resampled[:, 1] - resampled[:, 0]
        share, shares = np.nan, np.array([np.nan])
        if raw["ci_low"] > 0 or raw["ci_high"] < 0:
            share, shares = 1 - estimate / raw["estimate"], 1 - estimates / raws
        numbers = [estimate, *_middle(estimates), share, *_middle(shares)]
        rows.append([form, *levels, *phi, *numbers, int(np.isnan(estimates).sum())])
    names = "form control treatment slope_control slope_treatment estimate ci_low ci_high"
    names += " share_explained share_low share_high n_failed"
    return pd.DataFrame(rows, columns=names.split())


def length_only_judge(pairs, form, n_draws=500, seed=0):
    """What each view would show on these very lengths if the judge looked at nothing but length.

    One curve, logit P = theta + phi f of the given form, is fitted to both arms together: no
    difference at equal length, by construction. Preferences are drawn from it and all views
    computed again. Returns one row per view: view ("raw" or a form), mean, low, high (points, 95 %
    of the draws). A form that finds a difference here finds what is not there.
    """
    term = length_term(pairs, form)
    if np.isnan(term).any():
        rows = [[view, np.nan, np.nan, np.nan] for view in ("raw", *FORMS)]
        return pd.DataFrame(rows, columns=["view", "mean", "low", "high"])
    ones = np.ones(term.size)
    theta, phi = fit_logit(np.c_[ones, term.ravel()], wins_of(pairs).ravel())[0]
    draws = np.random.default_rng(seed).random((2, n_draws, len(pairs)))
    wins = (draws < expit(theta + phi * term)[:, None, :]).astype(float)
    found = {"raw": 100 * (wins[1] - wins[0]).mean(1)}
    for other in FORMS:
        control, treatment = 100 * expit(_coefficients(pairs, other, wins=wins)[:, :, 0]).T
        found[other] = treatment - control
    rows = [[view, values.mean(), *_middle(values)] for view, values in found.items()]
    return pd.DataFrame(rows, columns=["view", "mean", "low", "high"])


def _middle(values):
    """The 2.5 and 97.5 % quantiles of what was fitted; NaN if more than a tenth was not."""
    good = values[np.isfinite(values)]
    return np.quantile(good, [0.025, 0.975]) if len(good) > 0.9 * len(values) else [np.nan] * 2


def compare_forms(pairs, n_folds=10, seed=0):
    """Which length term predicts the judge best: one row per form, "none" being no length term.

    n_parameters; deviance (both arms, full sample; 0 if the fit equals the responses); log_loss
    (nats per judgement, cross-validated with both arms of a prompt in one fold); excess (log_loss
    minus the best form's) and excess_se (its paired standard error over prompts). Sorted by
    log_loss. The sd of lengths is the full sample's.
    """
    n, wins = len(pairs), wins_of(pairs)
    n_folds = min(n_folds, n)
    fold = np.random.default_rng(seed).permutation(np.arange(n) % n_folds)
    kept = (fold[None, :] != np.arange(n_folds)[:, None]).astype(float)
    saturated = _log_loss(wins, wins).sum()
    rows, losses = [], []
    for form in ("none", *FORMS):
        full, folds = (_predict(pairs, form, weights) for weights in (None, kept))
        held_out = np.take_along_axis(folds, fold[None, None, :], axis=0)[0]
        losses.append(_log_loss(wins, held_out).mean(0))
        count = {"none": 2, "tanh": 4, "log_ratio": 4}.get(form, 3)
        deviance = 2 * (_log_loss(wins, full[0]).sum() - saturated)
        rows.append([form, count, deviance, losses[-1].mean()])
    table = pd.DataFrame(rows, columns=["form", "n_parameters", "deviance", "log_loss"])
    best = losses[int(np.nanargmin(table["log_loss"]))]
    table["excess"] = [float((loss - best).mean()) for loss in losses]
    table["excess_se"] = [float((loss - best).std(ddof=1) / n**0.5) for loss in losses]
    return table.sort_values("log_loss", ignore_index=True)


def form_weights(fit, n, n_draws=20_000, seed=0):
    """How much each form counts, by how well it predicts the judge out of sample; sums to 1.

    fit: from `compare_forms` of n pairs. Softmax of minus the total held-out log-loss of the 2n
    judgements, so that a form ten nats behind counts e^-10. The losses are known to their standard
    errors only: the softmax is averaged over normal draws of `excess`. That is pseudo-BMA+ (Yao
    et al. 2018, arXiv:1704.02030) with normal draws in place of its bootstrap. Returns a Series by
    form; 0 for a form without a fit.
    """
    excess, se = fit[["excess", "excess_se"]].to_numpy(float).T
    draws = np.random.default_rng(seed).normal(excess, se, (n_draws, len(fit)))
    draws = np.where(np.isnan(draws), np.inf, draws)
    return pd.Series(softmax(-2 * n * draws, axis=1).mean(0), index=fit["form"], name="weight")


def weighted_gain(gains, weights):
    """(estimate, ci_low, ci_high) over the forms, the choice of form included.

    gains: {form: (estimate, ci_low, ci_high)}, points, with the raw difference as "none". weights:
    from `form_weights`. The variance is the weighted mean of the forms' own variances plus the
    spread of their estimates (law of total variance; Burnham & Anderson 2002, section 4.3). Forms
    of weight 0 may be NaN; NaN if another one is.
    """
    wide = norm.ppf(0.975)
    used = [form for form in weights.index if weights[form] > 0]
    mean, low, high = np.array([gains[form] for form in used], float).T
    share, se = weights[used].to_numpy(), (high - low) / (2 * wide)
    estimate = share @ mean
    half = wide * (share @ (se**2 + (mean - estimate) ** 2)) ** 0.5
    return float(estimate), float(estimate - half), float(estimate + half)


def _predict(pairs, form, weights=None):
    """Chances of a win, shape (B, 2, n)."""
    if form == "none":
        weights = np.ones((1, len(pairs))) if weights is None else weights
        means = weights @ wins_of(pairs).T / weights.sum(1, keepdims=True)
        return np.repeat(means[:, :, None], len(pairs), axis=2)
    beta = _coefficients(pairs, form, weights)
    return expit(beta[:, :, :1] + beta[:, :, 1:] * length_term(pairs, form))


def _log_loss(wins, chance):
    chance = np.clip(chance, 1e-12, 1 - 1e-12)
    return -(wins * np.log(chance) + (1 - wins) * np.log(1 - chance))
