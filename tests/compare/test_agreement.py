"""Whether two sets of results agree: contrasts within what both intervals allow."""

import math
import shutil

import numpy as np
import pandas as pd
import pytest

from neft_utils.base.files import ROOT
from neft_utils.base.paths import REFERENCE
from neft_utils.base.read_profile import load_profile
from neft_utils.compare import agreement, words
from neft_utils.compare.results import Results
from neft_utils.compare.stats import Interval, seed_interval


def interval(estimate, half):
    return Interval(estimate, estimate - half, estimate + half, half / 2, 9, 10, 48, half)


def test_two_contrasts_agree_within_both_their_widths():
    one = interval(0.05, 0.03)
    assert words.held(one, interval(0.09, 0.04)) == (pytest.approx(0.05), "as expected")
    assert words.held(one, interval(0.1001, 0.04)) == (pytest.approx(0.05), "outside")
    assert words.held(one, interval(-0.001, 0.04))[1] == "outside"
    for other, said in ((None, "no reference"), (seed_interval([0.05]), "no interval")):
        tolerance, said_now = words.held(one, other)
        assert math.isnan(tolerance) and said_now.startswith(said)


def test_the_primary_answers_beside_the_references():
    profile = load_profile("cpu")
    stored = Results(ROOT / REFERENCE / "cpu", profile)
    table = agreement.primary_beside(stored.ledger.values(), profile)
    assert list(table.index) == list(profile.confirmatory.metrics)
    row = table.loc["answer_length"]
    assert row.unit == "%" and row.here == row.expected and row.verdict == "as expected"
    one = stored.ledger["answer_length"].interval
    half = (one.ci_high - one.ci_low) / 2
    assert row.tolerance == pytest.approx(100 * math.expm1(math.sqrt(2) * half))


def test_without_a_reference_it_says_so(monkeypatch, tmp_path):
    profile = load_profile("cpu")
    for seed in (0, 1, 2):
        for arm in ("baseline", "neft_a15"):
            source = ROOT / REFERENCE / "cpu" / "runs" / f"{arm}-s{seed}"
            shutil.copytree(source, tmp_path / "runs" / source.name)
    monkeypatch.setattr("neft_utils.base.paths.ROOT", tmp_path)
    found = Results(tmp_path, profile).ledger.values()
    table = agreement.primary_beside(found, profile)
    assert table.loc["answer_length", "verdict"] == "no reference"
    assert table.expected.isna().all() and table.here.notna().any()


def places(tmp_path, change):
    """Results of the stored profile cpu, and the same with `change` made to losses of each run."""
    profile = load_profile("cpu")
    stored = ROOT / REFERENCE / "cpu"
    for run in sorted((stored / "runs").iterdir()):
        shutil.copytree(run, tmp_path / "runs" / run.name)
        path = tmp_path / "runs" / run.name / "losses.csv"
        losses = pd.read_csv(path)
        change(run.name, losses).to_csv(path, index=False)
    return Results(stored, profile), Results(tmp_path, profile)


def moved(shift, spread):
    """A change of losses: each by a normal number, and by a shift in runs with noise."""
    draw = np.random.default_rng(0)

    def change(name, losses):
        by = draw.normal(shift if name.startswith("neft") else 0.0, spread, len(losses))
        return losses.assign(nll=losses.nll + by)

    return change


@pytest.mark.parametrize("spread", [0.0, 0.001, 0.1])
def test_means_that_only_rounding_moves_are_as_expected(tmp_path, spread):
    table = agreement.means_beside(*places(tmp_path, moved(0.0, spread)))
    assert set(table.verdict) == {"as expected"} and len(table) > 40
    losses = table[table.metric == "test_nll"].set_index("arm")
    assert (losses.reference != losses.local).all() == (spread > 0)


def test_a_mean_that_is_really_off_is_outside_and_no_other(tmp_path):
    there, here = places(tmp_path, moved(0.02, 0.001))
    table = agreement.means_beside(there, here).set_index(["arm", "metric"])
    outside = table[table.verdict == "outside"]
    assert {arm for arm, _ in outside.index} == {"neft_a15"}
    assert {"test_nll", "test_nll_by_row"} <= {metric for _, metric in outside.index}
    one = table.loc["neft_a15", "test_nll_by_row"]
    assert one.local - one.reference == pytest.approx(0.02, abs=1e-4)
    # Other seeds would move it by this much: the spread of the runs' means, from all arms.
    seeds = there.seeds.groupby("arm").test_nll_by_row
    counts, variances = seeds.count().drop("base"), seeds.var().drop("base").fillna(0)
    pooled = (variances * (counts - 1)).sum() / (counts - 1).sum()
    assert one.tolerance >= math.sqrt(pooled / 3) * (1 - 1e-9)
