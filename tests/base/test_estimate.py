"""What a profile takes, counted by hand."""

import dataclasses

import pytest

from neft_utils.base import estimate
from neft_utils.base.paths import Paths
from neft_utils.base.profiles import Arm, Speed
from neft_utils.base.read_profile import load_profile

NOWHERE = Paths("no rows of it are here", "nowhere")
SPEED = Speed(train=10.0, forward=100.0, notebook_start=0.0, example_tokens=5.0)


@pytest.fixture(autouse=True)
def a_processor_with_bf16(monkeypatch):
    monkeypatch.setattr(estimate, "without_bf16", lambda: False)


def profile(arms=None, **train):
    nano = load_profile("nano")
    arms = arms or nano.arms
    recipe = dataclasses.replace(nano.train, **train)
    return dataclasses.replace(nano, train=recipe, arms=arms, speed=SPEED, seeds=(0,))


def fine_tuning(asked):
    return next(row for row in estimate.estimate(asked, NOWHERE) if row[0] == "fine-tune")


@pytest.mark.parametrize(
    "epochs, every, times", [(2, 1, 3), (20, 2, 11), (5, 2, 4), (3, 3, 2), (1, 1, 2)]
)
def test_rows_scored_on_the_way_are_counted_as_the_run_log_scores_them(epochs, every, times):
    """Before training, after every few epochs, and at the end whatever its number."""
    plain = profile(epochs=epochs, validate_epochs=every)
    rows = plain.data.validation_rows
    assert estimate.scored_on_the_way(plain, "baseline") == times * rows
    both = profile(epochs=epochs, validate_epochs=every, validate_train=True)
    whole = times * (rows + both.data.train_rows)
    assert estimate.scored_on_the_way(both, "baseline") == whole
    seconds = 2 * 5 * (both.data.train_rows * epochs / 10 + whole / 100)  # two arms, one seed
    assert fine_tuning(both)[3] == pytest.approx(seconds)


def test_an_arm_counts_by_its_own_recipe():
    arms = {
        "baseline": Arm(0.0),
        "dropout": Arm(0.0, lora_dropout=0.1),
        "half": Arm(15.0, data_fraction=0.5, epochs=4),
    }
    asked = profile(arms, epochs=2, validate_train=True)
    rows, validation = asked.data.train_rows, asked.data.validation_rows
    trained = {"baseline": 2 * rows, "dropout": 1.5 * 2 * rows, "half": 4 * rows / 2}
    scored = {"baseline": 3 * (validation + rows), "dropout": 3 * (validation + rows)}
    scored["half"] = 5 * (validation + rows / 2)
    seconds = 5 * (sum(trained.values()) / 10 + sum(scored.values()) / 100)
    assert fine_tuning(asked)[3] == pytest.approx(seconds)


@pytest.mark.parametrize("name", ["cpu-base", "cpu-overfit"])
def test_profiles_of_ninety_minutes_take_no_more(name):
    """With two workers of a core with AMX each, as their speeds say."""
    seconds = sum(row[3] for row in estimate.estimate(load_profile(name), NOWHERE))
    assert seconds / 2 <= 90 * 60
