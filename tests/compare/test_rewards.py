"""Rewards of two arms' answers beside what length alone would say, and in the tables of metrics."""

import math

import numpy as np
import pandas as pd
import pytest
from made_runs import DECODING, made_run

from neft_utils.base.files import ROOT
from neft_utils.compare import rewards, stats
from neft_utils.compare.metrics import quantity
from neft_utils.compare.results import Results
from neft_utils.compare.runs import LATER, load_runs
from neft_utils.compare.tables import (
    Contrast,
    by_seed,
    contrast,
    contrasts,
    main_markdown,
    main_table,
)
from neft_utils.compare.words import verdict
from neft_utils.evaluate.reward import COLUMNS

PAIR = Contrast("neft_a15", ("baseline",))


def rewarded(values, words, name="test", reference=2.0):
    """rewards.csv of answers e0, e1, … with these rewards and word counts."""
    rows = [
        (name, f"e{i}", v, reference, w, 9)
        for i, (v, w) in enumerate(zip(values, words, strict=True))
    ]
    return pd.DataFrame(rows, columns=COLUMNS)


def run_of(*tables):
    return made_run({"a": 1.0}, rewards=pd.concat(tables, ignore_index=True))


def some_runs():
    """Two seed pairs of four prompts; by hand in the tests below."""
    return {
        ("baseline", 0): run_of(rewarded([1.0, 1.0, 1.0, 1.0], [100, 100, 100, 100])),
        ("neft_a15", 0): run_of(rewarded([2.0, 0.0, 1.0, 4.0], [150, 109, 120, 110])),
        ("baseline", 1): run_of(rewarded([0.0, 0.0, 0.0, 0.0], [50, 50, 50, 50])),
        ("neft_a15", 1): run_of(rewarded([1.0, 2.0, -1.0, 1.0], [40, 50, 46, 80])),
    }


def views(runs, name="test"):
    table = rewards.beside_length(runs, PAIR)
    return table[table["set"] == name].set_index("view")


def test_the_five_views_by_hand():
    runs = some_runs()
    found = views(runs)
    assert list(found.index) == list(rewards.VIEWS)
    # Differences: 1, -1, 0, 3 and 1, 2, -1, 1.
    assert found.estimate["difference"] == pytest.approx(6 / 8)
    assert found.estimate["treatment_higher"] == pytest.approx((2.5 + 3) / 8)
    # Seed 0: longer in all; two of the three unequal ones higher. Seed 1: lengths -, =, -, +.
    assert found.estimate["longer_higher"] == pytest.approx((2 / 3 + 2 / 3) / 2)
    # Within 10 %: 109 and 110 of 100 (-1, 3), 50 and 46 of 50 (2, -1).
    assert found.estimate["difference_matched"] == pytest.approx((1 + 0.5) / 2)
    assert found.estimate["reference"] == pytest.approx((1 + 2) / 2)
    assert found.n_pairs.to_dict() == {
        "difference": 8,
        "treatment_higher": 8,
        "longer_higher": 6,
        "difference_matched": 4,
        "reference": 8,
    }
    assert set(found.n_seeds) == {2}
    assert found.unit.to_dict() == {name: unit for name, (unit, _) in rewards.VIEWS.items()}


def test_the_difference_is_the_metric_and_has_its_two_way_interval():
    runs = some_runs()
    seeds, found = by_seed(runs, DECODING), views(runs).loc["difference"]
    one = contrast(runs, seeds, PAIR, "reward", DECODING)
    assert (found.estimate, found.ci_low, found.ci_high) == pytest.approx(
        (one.estimate, one.ci_low, one.ci_high)
    )
    deltas = pd.DataFrame({"seed": np.repeat([0, 1], 4), "example_id": list("abcd") * 2})
    two_way = stats.confirmatory_interval(deltas.assign(delta=[1, -1, 0, 3, 1, 2, -1, 1]))
    over_seeds = stats.seed_interval([0.75, 0.75])
    assert found.ci_low == pytest.approx(two_way.ci_low)
    assert math.isnan(over_seeds.ci_low)  # which the rows' spread makes an interval
    # Other prompts are left in every seed: t over the seeds' means.
    matched, by_hand = views(runs).loc["difference_matched"], stats.seed_interval([1.0, 0.5])
    assert (matched.ci_low, matched.ci_high) == pytest.approx((by_hand.ci_low, by_hand.ci_high))
    said = str(verdict(one, quantity("reward")))
    assert "logits" in said and "excluded" in said and "win" not in said


def test_a_judge_of_length_alone_shows_itself():
    rng, runs = np.random.default_rng(0), {}
    for seed in range(3):
        for arm, longer in (("baseline", 1.0), ("neft_a15", 1.5)):
            words = np.round(rng.integers(50, 150, 200) * longer)
            runs[arm, seed] = run_of(rewarded(words / 10, words))
    found = views(runs)
    assert found.estimate["longer_higher"] == 1 and found.ci_low["difference"] > 3
    assert found.estimate["treatment_higher"] > 0.8
    assert abs(found.estimate["difference_matched"]) < 1
    assert 0 < found.n_pairs["difference_matched"] < 0.3 * found.n_pairs["difference"]


def test_a_share_has_no_interval_beyond_0_and_1():
    runs = some_runs()
    runs["neft_a15", 1] = run_of(rewarded([1.0, 1.0, 1.0, 1.0], [60, 60, 60, 60]))
    shares = views(runs).loc[["treatment_higher", "longer_higher"]]
    assert (shares.ci_high == 1).all() and (shares.ci_low < shares.estimate).all()


def test_an_answer_without_a_reward_drops_its_pair_and_nothing_else():
    runs = some_runs()
    runs["baseline", 0] = run_of(rewarded([1.0, math.nan, 1.0, 1.0], [100, 100, 100, 100]))
    runs["neft_a15", 0] = run_of(rewarded([2.0, 0.0, math.nan, 4.0], [150, 109, 120, 110]))
    found = views(runs)
    # Both seeds have e0 and e3: 1, 3 and 1, 1.
    assert found.estimate["difference"] == pytest.approx(6 / 4)
    assert found.n_pairs["difference"] == 4 and found.n_pairs["longer_higher"] == 5
    one = contrast(runs, by_seed(runs, DECODING), PAIR, "reward", DECODING)
    assert one.estimate == pytest.approx(6 / 4) and one.n_examples == 2


def test_no_matched_pair_is_said_and_one_seed_has_no_interval():
    runs = {
        ("baseline", 0): run_of(rewarded([1.0, 1.0], [10, 10])),
        ("neft_a15", 0): run_of(rewarded([2.0, 3.0], [20, 30])),
    }
    found = views(runs)
    assert found.n_pairs["difference_matched"] == 0 == found.n_seeds["difference_matched"]
    assert math.isnan(found.estimate["difference_matched"])
    assert found.estimate["difference"] == 1.5 and math.isnan(found.ci_low["difference"])


def test_alpaca_evals_answers_are_a_set_of_their_own():
    def both(values):
        words = [10] * len(values)
        return run_of(
            rewarded(values, words), rewarded([v + 5 for v in values], words, "alpaca_eval")
        )

    runs = {("baseline", 0): both([0.0, 0.0]), ("neft_a15", 0): both([1.0, 3.0])}
    runs |= {("baseline", 1): both([0.0, 0.0]), ("neft_a15", 1): both([2.0, 2.0])}
    assert views(runs, "alpaca_eval").estimate["difference"] == 2
    seeds = by_seed(runs, DECODING).set_index(["arm", "seed"])
    assert seeds.reward["neft_a15", 0] == 2 and seeds.alpaca_eval_reward["neft_a15", 0] == 7


# ------------------------------------------------------------------------- tables of all metrics


def test_the_tables_have_a_column_of_rewards_only_where_a_run_has_any(tmp_path):
    runs, arms = some_runs(), ["baseline", "neft_a15"]
    seeds = by_seed(runs, DECODING)
    main = main_table(seeds, arms)
    assert main.reward.tolist() == [0.5, 1.25] and "alpaca_eval_reward" not in seeds
    assert "| `reward`, logits | 0.50 [" in main_markdown(main)
    without = {key: {**run, "rewards": pd.DataFrame()} for key, run in runs.items()}
    seeds = by_seed(without, DECODING)
    main = main_table(seeds, arms)
    assert not [name for name in (*seeds, *main) if "reward" in name]
    assert "reward" not in main_markdown(main)
    assert contrast(without, seeds, PAIR, "reward", DECODING) is None
    assert rewards.beside_length(without, PAIR).empty
    assert (
        rewards.beside_length({**runs, ("neft_a15", 0): without["neft_a15", 0]}, PAIR).n_seeds[0]
        == 1
    )


def test_stored_runs_of_an_older_version_are_read_without_rewards():
    folder = ROOT / "results" / "reference" / "gpu-small"
    assert not list(folder.glob("runs/*/rewards.csv"))
    stored = Results(folder)
    assert all(run[name].empty for run in stored.runs.values() for name in LATER)
    assert "reward" not in stored.seeds and "reward" not in stored.main
    rows = contrasts(stored.runs, stored.seeds, stored.profile, stored.decoding)
    assert "reward" not in set(rows.metric) and "test_nll" in set(rows.metric)
    assert load_runs(folder / "runs", stored.profile).keys() == stored.runs.keys()
