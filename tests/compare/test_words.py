"""One sentence for every difference: direction, size, what is excluded, and what is missing."""

from __future__ import annotations

import ast
import dataclasses
import sys
from math import log, nan
from pathlib import Path

import pandas as pd
import pytest

from neft_utils.compare import metrics, simulation, stats, words
from neft_utils.compare.words import Quantity, verdict

NOTHING = stats.Interval(0.0007, -0.0004, 0.0017, 0.0005, 9, 10, 256, 0.0015)
LOSS = metrics.quantity("test_nll")
LENGTH = metrics.quantity("answer_length")


def log_ratio(estimate, low, high):
    return stats.Interval(log(estimate), log(low), log(high), 0.02, 9, 10, 48, 0.06)


@pytest.mark.parametrize(
    "interval, quantity, more, sentence",
    [
        (
            log_ratio(1.063, 1.02, 1.107),
            LENGTH,
            {"claimed": 1},
            "answers are longer by 6.3 % [2.0, 10.7]",
        ),
        (
            log_ratio(0.9, 0.8, 0.95),
            LENGTH,
            {"claimed": 1},
            "answers are shorter by 10.0 % [5.0, 20.0]",
        ),
        (
            log_ratio(1.061, 0.966, 1.165),
            LENGTH,
            {"claimed": 1},
            "no difference seen; longer by more than 16.5 % is excluded",
        ),
        (
            NOTHING,
            LOSS,
            {"claimed": -1},
            "no difference seen; a gain over 0.0004 nats per token is excluded",
        ),
        (
            NOTHING,
            LOSS,
            {},
            "no difference seen; a gain over 0.0004 nats per token and a loss over 0.0017 nats per"
            " token are excluded",
        ),
        (
            dataclasses.replace(NOTHING, ci_low=0.0002),
            LOSS,
            {"claimed": -1, "gained": 0.35},
            "the held-out loss is higher by 0.0007 nats per token [0.0002, 0.0017], 0.2 % of what"
            " fine-tuning gained",
        ),
        (
            dataclasses.replace(NOTHING, ci_low=0.0002),
            LOSS,
            {"adjusted_p": 0.05, "gained": -0.1},
            "the held-out loss is higher by 0.0007 nats per token [0.0002, 0.0017], which does not"
            " hold after correction for the other claims (p = 0.05)",
        ),
        (
            stats.Interval(-0.1, -0.2, -0.05, 0.03, 9, 3, 400, 0.1),
            metrics.quantity("end_nll"),
            {"claimed": 1},
            "the end of turn is more likely by 0.100 nats [0.050, 0.200]",
        ),
        (
            stats.seed_interval([log(1.061)]),
            LENGTH,
            {"claimed": 1},
            "one seed pair, so no interval: answers are longer by 6.1 %",
        ),
        (
            stats.seed_interval([0.25, 0.25]),
            LOSS,
            {},
            "no spread, so no interval: the held-out loss is higher by 0.2500 nats per token",
        ),
        (
            NOTHING,
            Quantity(),
            {},
            "no difference seen; higher by more than 0.00 and lower by more than 0.00 are excluded",
        ),
        (None, LOSS, {"elsewhere": "gpu"}, "not measured here (see profile gpu)"),
        (None, LOSS, {"missing": "no end_nll"}, "no end_nll"),
    ],
)
def test_the_sentence(interval, quantity, more, sentence):
    assert str(verdict(interval, quantity, **more)) == sentence


def test_a_verdict_is_data():
    up = dataclasses.replace(NOTHING, ci_low=0.0001)
    down = dataclasses.replace(NOTHING, estimate=-0.0007, ci_low=-0.001, ci_high=-0.0001)
    assert [verdict(one, LOSS).outcome for one in (up, down)] == ["higher", "lower"]
    assert all(verdict(one, LOSS).seen for one in (up, down))
    nothing = verdict(NOTHING, LOSS)
    assert (nothing.outcome, nothing.seen, nothing.testable) == ("not_seen", False, True)
    edge = verdict(dataclasses.replace(NOTHING, ci_low=0.0), LOSS)
    assert edge.outcome == "not_seen"
    kept, taken = (verdict(up, LOSS, adjusted_p=p) for p in (0.049, 0.05))
    assert kept.seen and not kept.taken_back and taken.taken_back and not taken.seen
    assert not verdict(NOTHING, LOSS, adjusted_p=0.5).taken_back
    for one in (None, stats.seed_interval([1.0]), stats.seed_interval([0.1, 0.1])):
        assert verdict(one, LOSS).outcome == "not_testable" and not verdict(one, LOSS).testable
    assert verdict(up, LOSS, gained=0.35).share == pytest.approx(0.002)
    assert verdict(up, LOSS, claimed=-1).claim_words == "lower"
    assert verdict(up, LENGTH, claimed=1).claim_words == "longer"


def test_a_bootstrap_makes_no_verdict():
    table = pd.DataFrame({"seed": [0, 0, 1, 1], "example_id": [0, 1] * 2, "delta": [1, 2, 3, 5]})
    with pytest.raises(ValueError, match="not a bootstrap"):
        verdict(simulation.crossed_bootstrap(table), LOSS)


def test_no_worse_is_said_only_within_the_margin():
    near = stats.Interval(-0.01, -0.03, 0.01, 0.01, 9, 10, 50, 0.03)
    score = Quantity("nats", "arithmetic is", "better", "worse", better=1)
    without, wide, narrow = (verdict(near, score, margin=m) for m in (None, 0.05, 0.02))
    assert (without.held, wide.held, narrow.held) == (None, True, False)
    assert str(wide) == f"{without}; worse by less than 0.05 nats"
    assert str(narrow) == f"{without}; a loss of 0.02 nats is not excluded"
    assert str(verdict(None, score, margin=0.02)) == "not measured here"
    # Where lower is better, what is worse is higher.
    assert verdict(near, LOSS, margin=0.02).held and not verdict(near, LOSS, margin=0.01).held


@pytest.mark.parametrize("higher_is_better, low, high", [(True, -0.9, 3.0), (False, -3.0, 0.9)])
def test_non_inferiority_looks_at_the_worst_end(higher_is_better, low, high):
    interval = stats.Interval(0.5, low, high, 1.0, 4, 5, 10, 3.0)
    assert words.non_inferiority(interval, 1.0, higher_is_better)
    assert not words.non_inferiority(interval, 0.8, higher_is_better)
    assert not words.non_inferiority(interval, 1.0, not higher_is_better)
    assert not words.non_inferiority(stats.seed_interval([1.0]), 1.0, higher_is_better)
    for margin in (0, -1, nan):
        with pytest.raises(ValueError, match="margin must be a positive"):
            words.non_inferiority(interval, margin, higher_is_better)


def test_numbers_as_people_weigh_them():
    assert words.with_interval(log_ratio(1.061, 0.966, 1.165), "log ratio") == (
        "+6.1 [-3.4, +16.5] %"
    )
    assert words.with_interval(stats.seed_interval([0.25]), "share") == "+0.25"
    assert words.show(-0.00001, 4) == "0.0000" and words.show(nan) == "–"


def test_it_can_be_used_without_the_lab():
    """Public and for Python 3.10, as `stats`: no import but the package's statistics."""
    tree = ast.parse(Path(words.__file__).read_text("utf-8"), feature_version=(3, 10))
    found = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    found = {name for name in found if name.partition(".")[0] not in sys.stdlib_module_names}
    assert found == {"neft_utils.compare.stats"}
