"""Whether two sets of results agree: contrasts within what both intervals allow."""

import math
import shutil

import pytest

from neft_utils.base.files import ROOT
from neft_utils.base.paths import REFERENCE
from neft_utils.base.read_profile import load_profile
from neft_utils.compare import agreement
from neft_utils.compare.results import Results
from neft_utils.compare.stats import Interval, seed_interval


def interval(estimate, half):
    return Interval(estimate, estimate - half, estimate + half, half / 2, 9, 10, 48, half)


def test_two_contrasts_agree_within_both_their_widths():
    one = interval(0.05, 0.03)
    assert agreement.held(one, interval(0.09, 0.04)) == (pytest.approx(0.05), "as expected")
    assert agreement.held(one, interval(0.1001, 0.04)) == (pytest.approx(0.05), "outside")
    assert agreement.held(one, interval(-0.001, 0.04))[1] == "outside"
    for other, said in ((None, "no reference"), (seed_interval([0.05]), "no interval")):
        tolerance, words = agreement.held(one, other)
        assert math.isnan(tolerance) and words.startswith(said)


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
