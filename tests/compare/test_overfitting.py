"""Runs that overfit, compared at three moments: every number once more with pandas alone."""

import dataclasses
import math

import numpy as np
import pandas as pd
import pytest
from made_runs import curve, made_run

from neft_utils.base.read_profile import load_profile
from neft_utils.base.strict import ConfigError
from neft_utils.compare import curves, overfitting, stats
from neft_utils.compare.tables import Contrast

PAIR = Contrast("neft_a15", ("baseline",))
PROFILE = load_profile("nano")
EPOCHS = (0, 2, 4, 6, 8)


def run_of(table):
    return made_run({"e0": 1.0}) | {"curve": table}


def overfitted(seed, slower=0.0, better=0.0, rows=30, epochs=EPOCHS):
    """A run that fits ever better while its validation loss falls and rises again.

    slower: nats that its training loss stays higher at the end; better: nats that its validation
    loss is lower, whatever its training loss.
    """
    draw, n = np.random.default_rng(seed), 12
    hard, train_hard = draw.normal(0, 0.4, rows), draw.normal(0, 0.3, n)
    tokens = [int(x) for x in np.random.default_rng(99).integers(3, 40, rows)]  # of all seeds
    own = np.random.default_rng([seed, round(100 * (1 + slower)), round(100 * better)])
    train, validation = {}, {}
    for epoch in epochs:
        fit = 2.0 - (1.8 - slower) * epoch / epochs[-1]
        shifted = own.normal(0, 0.01, rows)
        held_out = 1.6 + 0.25 * (fit - 1.2) ** 2 - better + shifted
        train[epoch], validation[epoch] = list(fit + train_hard), list(held_out + hard)
    return run_of(curve(train, validation, tokens, list(draw.uniform(0.1, 1, rows))))


def pairs(seeds=(0, 1, 2), **noisy):
    runs = {}
    for seed in seeds:
        runs["baseline", seed] = overfitted(seed)
        runs["neft_a15", seed] = overfitted(seed, **noisy)
    return runs


def by_hand(table):
    """Content of every row, and the token-weighted mean of each split and epoch."""
    table = table.assign(
        content=(table.nll * table.n_tokens - table.end_nll) / (table.n_tokens - 1)
    )
    table["weight"] = table.n_tokens - 1
    sums = table.assign(sum=table.content * table.weight).groupby(["split", "epoch"])
    return table, sums["sum"].sum() / sums.weight.sum()


def expected(runs, moment, measure):
    """(mean over pairs and rows, number of pairs), by loops over the tables."""
    means = []
    for seed in sorted({seed for _, seed in runs}):
        sides = [by_hand(runs[arm, seed]["curve"]) for arm in ("neft_a15", "baseline")]
        (noisy, noisy_means), (plain, plain_means) = sides

        def at(table, epoch):
            some = table[(table.split == "validation") & (table.epoch == epoch)]
            values = some.set_index("row")["content" if measure == "content_nll" else "end_nll"]
            return values, some.set_index("row").weight

        last = noisy.epoch.max()
        if moment == "end":
            first, second = at(noisy, last), at(plain, plain.epoch.max())
        elif moment == "best":
            first, second = (
                at(table, found.validation.idxmin())
                for table, found in ((noisy, noisy_means), (plain, plain_means))
            )
        else:
            target, levels = noisy_means.train[last], plain_means.train
            place = [
                i for i in range(len(levels) - 1) if levels.iloc[i] >= target >= levels.iloc[i + 1]
            ]
            if not place:
                continue
            i = place[0]
            high, low = levels.iloc[i], levels.iloc[i + 1]
            share = (high - target) / (high - low)
            one, other = (at(plain, levels.index[k])[0] for k in (i, i + 1))
            first, second = at(noisy, last), ((1 - share) * one + share * other, None)
        weight = first[1] if measure == "content_nll" else None
        means.append(np.average(first[0] - second[0], weights=weight))
    return float(np.mean(means)), len(means)


@pytest.mark.parametrize("moment", overfitting.MOMENTS)
@pytest.mark.parametrize("measure", overfitting.MEASURES)
def test_every_difference_again_with_pandas_alone(moment, measure):
    runs = pairs(slower=0.3, better=0.02)
    found = overfitting.contrast(curves.read(runs), PAIR, moment, measure)
    mean, count = expected(runs, moment, measure)
    assert found.estimate == pytest.approx(mean, abs=1e-12) and found.n_seeds == count == 3
    assert found.n_examples == 30
    frame = overfitting.deltas(curves.read(runs), PAIR, moment, measure)
    assert found == stats.confirmatory_interval(frame)


def test_a_mere_brake_gains_at_the_end_and_nothing_at_equal_fit():
    """Both runs move along one curve; the braked one has not gone so far."""
    found = curves.read(pairs(seeds=range(6), slower=0.4))
    end, best, equal = (
        overfitting.contrast(found, PAIR, moment, "content_nll") for moment in overfitting.MOMENTS
    )
    assert end.ci_high < 0 and end.estimate < -0.05
    assert abs(best.estimate) < 0.02
    # The straight line between two epochs lies above the curve.
    assert -0.02 < equal.estimate < 0.005


def test_what_is_better_at_equal_fit_is_seen_there():
    found = curves.read(pairs(seeds=range(6), slower=0.4, better=0.1))
    equal = overfitting.contrast(found, PAIR, "equal_fit", "content_nll")
    assert equal.ci_high < 0 and equal.estimate == pytest.approx(-0.1, abs=0.03)


def test_the_best_epoch_is_the_first_with_the_least_content_weighted_by_tokens():
    validation = {0: [2.0, 2.0], 1: [1.0, 1.6], 2: [1.4, 1.2], 3: [1.4, 1.2]}
    table = curve({e: [1.0] for e in validation}, validation, tokens=[3, 101])
    assert curves.best_epoch(curves.curve_of(run_of(table))) == 2  # by rows it would be epoch 1
    flat = curve({0: [1.0], 1: [0.5]}, {0: [1.0, 1.0], 1: [1.5, 1.5]})
    assert curves.best_epoch(curves.curve_of(run_of(flat))) == 0  # training only harmed


def test_equal_fit_lies_between_epochs_at_the_first_crossing():
    levels = {0: 2.0, 2: 1.0, 4: 1.2, 6: 0.4}
    table = curves.curve_of(
        run_of(curve({e: [x, x] for e, x in levels.items()}, {e: [1.0] for e in levels}))
    )
    assert curves.epoch_of_equal_fit(table, 1.5) == pytest.approx(1.0)
    assert curves.epoch_of_equal_fit(table, 2.0) == 0 and curves.epoch_of_equal_fit(table, 0.4) == 6
    assert curves.epoch_of_equal_fit(table, 1.1) == pytest.approx(1.8)  # not at the second descent
    assert curves.epoch_of_equal_fit(table, 0.6) == pytest.approx(5.5)
    assert curves.epoch_of_equal_fit(table, 0.3) is None is curves.epoch_of_equal_fit(table, 2.1)


def test_rows_between_epochs_lie_on_a_straight_line():
    table = curves.curve_of(run_of(curve({0: [1.0], 4: [0.0]}, {0: [1.0, 2.0], 4: [3.0, 2.4]})))
    assert curves.rows_at(table, "validation", 1).content_nll.tolist() == pytest.approx([1.5, 2.1])
    assert curves.rows_at(table, "validation", 4).content_nll.tolist() == pytest.approx([3.0, 2.4])
    for outside in (-1, 5):
        with pytest.raises(ValueError, match="outside the scored ones"):
            curves.rows_at(table, "validation", outside)


def test_one_seed_has_a_difference_and_no_interval_and_says_so():
    (one, *_) = overfitting.comparisons(curves.read(pairs(seeds=[0], slower=0.3)), PROFILE)
    assert math.isnan(one.verdict.interval.ci_low)
    assert str(one).startswith(
        "neft_a15, both at the end of training: one seed pair, so no interval"
    )


def test_pairs_whose_control_never_fits_so_well_are_left_out_and_counted():
    runs = pairs(seeds=range(3))
    for seed in (0, 1):  # these fit better than their control ever does
        runs["neft_a15", seed] = overfitted(seed, slower=-0.1)
    runs["neft_a15", 2] = overfitted(2, slower=0.3)
    said = {
        (one.moment, one.measure): one
        for one in overfitting.comparisons(curves.read(runs), PROFILE)
    }
    equal = said["equal_fit", "content_nll"]
    assert equal.left_out == 2 and equal.verdict.interval.n_seeds == 1
    assert str(equal).endswith("(2 of 3 pairs have no such epoch)")
    assert said["best", "content_nll"].left_out == 0
    runs["neft_a15", 2] = overfitted(2, slower=-0.1)
    none = overfitting.comparisons(curves.read(runs), PROFILE)
    (last,) = (o for o in none if (o.moment, o.measure) == ("equal_fit", "content_nll"))
    assert last.verdict.interval is None and last.left_out == 3
    assert str(last.verdict) == "not measured here"
    table = overfitting.as_table(none)
    assert table.query("moment == 'equal_fit'").estimate.isna().all()
    assert table.query("moment == 'equal_fit'").pairs.tolist() == [0, 0]
    stops = overfitting.stops(curves.read(runs), PROFILE).set_index(["arm", "seed"])
    assert stops.equal_fit.isna().all()


def test_where_runs_stop_is_a_row_a_run():
    runs = pairs(slower=0.3)
    stops = overfitting.stops(curves.read(runs), PROFILE).set_index(["arm", "seed"])
    assert len(stops) == 6 and stops.loc["baseline"].equal_fit.isna().all()
    for (arm, seed), row in stops.iterrows():
        _, means = by_hand(runs[arm, seed]["curve"])
        assert row.best_epoch == means.validation.idxmin()
        assert row.validation_best == pytest.approx(means.validation.min())
        assert row.train_end == pytest.approx(means.train[8])
    assert stops.loc["neft_a15"].equal_fit.between(6, 8).all()


def test_runs_without_the_file_or_without_training_rows_are_not_read():
    runs = pairs(seeds=(0, 1))
    runs["neft_a15", 0]["curve"] = None  # of an older version
    some = runs["baseline", 1]["curve"]
    runs["baseline", 1]["curve"] = some[some.split == "validation"]  # validate_train is off
    found = curves.read(runs)
    assert sorted(found) == [("baseline", 0), ("neft_a15", 1)]
    assert overfitting.comparisons(found, PROFILE) == []
    assert overfitting.as_table([]).empty
    assert overfitting.contrast(found, PAIR, "end", "content_nll") is None


def test_an_arm_is_held_against_its_own_control():
    arms = {**PROFILE.arms, "dropout": dataclasses.replace(PROFILE.arms["baseline"])}
    profile = dataclasses.replace(PROFILE, arms=arms)
    runs = pairs() | {("dropout", 0): overfitted(0, slower=0.1)}
    found = overfitting.comparisons(curves.read(runs), profile)
    assert {str(one.contrast) for one in found} == {"neft_a15 - baseline", "dropout - baseline"}
    assert {one.pairs for one in found if one.contrast.treatment == "dropout"} == {1}


def test_an_arm_of_other_rows_than_its_control_has_is_left_out():
    half = dataclasses.replace(PROFILE.arms["neft_a15"], data_fraction=0.5)
    profile = dataclasses.replace(PROFILE, arms={**PROFILE.arms, "half": half})
    runs = pairs(seeds=[0])
    some = runs["neft_a15", 0]["curve"]
    less = some[(some.split == "validation") | (some.row < 6)]
    found = curves.read(runs | {("half", 0): run_of(less)})
    compared = overfitting.comparisons(found, profile)
    assert {one.contrast.treatment for one in compared} == {"neft_a15"}
    stops = overfitting.stops(found, profile).set_index("arm")
    assert math.isnan(stops.equal_fit["half"]) and stops.best_epoch["half"] >= 0


def test_a_response_that_is_its_end_alone_has_an_end_and_no_content():
    table = curve({0: [1.0, 1.0], 1: [0.5, 0.5]}, {0: [1.0, 1.0], 1: [2.0, 2.0]}, tokens=[1, 11])
    runs = {(arm, s): run_of(table) for arm in ("baseline", "neft_a15") for s in (0, 1)}
    found = curves.read(runs)
    assert overfitting.contrast(found, PAIR, "end", "content_nll").n_examples == 1
    assert overfitting.contrast(found, PAIR, "end", "end_nll").n_examples == 2
    assert curves.by_epoch(found["baseline", 0]).validation_content.tolist() == [1.0, 2.0]


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda t: t.assign(nll=t.nll.where(t.epoch < 4)), "no numbers from epoch 4 on: lower the"),
        (lambda t: t.assign(end_nll=math.inf), "no numbers from epoch 0 on"),
        (lambda t: t.drop(columns="end_nll"), "has no end_nll: run make reproduce"),
        (lambda t: t.iloc[:-1], "has not the same rows at every epoch"),
        (lambda t: pd.concat([t, t.tail(1)]), "has not the same rows at every epoch"),
    ],
)
def test_a_broken_file_is_refused_in_one_line_that_names_the_run(change, words):
    runs = pairs(seeds=[0])
    runs["neft_a15", 0]["curve"] = change(runs["neft_a15", 0]["curve"])
    runs["neft_a15", 0]["provenance"] |= {"arm": "neft_a15", "seed": 0}
    with pytest.raises(ConfigError, match=f"^losses_by_epoch.csv of run neft_a15-s0 .*{words}"):
        curves.read(runs)


def test_runs_of_different_rows_are_refused():
    runs = pairs(seeds=[0])
    runs["neft_a15", 0] = overfitted(0, rows=29)
    with pytest.raises(ConfigError, match="neft_a15-s0 and baseline-s0 scored different rows"):
        overfitting.comparisons(curves.read(runs), PROFILE)
    runs = pairs(seeds=[0, 1])
    for arm in PAIR.arms:
        runs[arm, 1]["curve"] = overfitted(1, rows=29)["curve"]
    with pytest.raises(ConfigError, match="neft_a15 - baseline: seeds have different validation"):
        overfitting.comparisons(curves.read(runs), PROFILE)
