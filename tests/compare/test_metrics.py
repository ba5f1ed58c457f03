"""From per-item files to numbers: pairing, weights, what each metric is of."""

import math

import numpy as np
import pandas as pd
import pytest
from made_runs import DECODING, answers, losses_run, made_run

from neft_utils.base.strict import ConfigError
from neft_utils.compare.metrics import mean, per_item
from neft_utils.compare.tables import (
    Contrast,
    by_seed,
    contrast,
    main_markdown,
    main_table,
    paired,
)
from neft_utils.evaluate.scoring import ITEM_COLUMNS


def test_pairs_are_treatment_minus_the_mean_of_controls():
    nll = {"a": 1.0, "b": 2.0}
    runs = {
        ("neft", 0): made_run(nll),
        ("dropout", 0): made_run({"b": 1.0, "a": 3.0}),
        ("decay", 0): made_run({"a": 2.0, "b": 2.0}),
        ("neft", 1): made_run(nll),  # no partner: left out
    }
    deltas = paired(runs, Contrast("neft", ("dropout", "decay")), "test_nll", DECODING)
    assert deltas.set_index("example_id").delta.to_dict() == {"a": -1.5, "b": 0.5}
    assert set(deltas.seed) == {0}
    assert paired(runs, Contrast("neft", ("dropout",)), "arithmetic", DECODING) is None


def test_runs_that_were_asked_different_items_are_refused():
    runs = {("neft", 0): made_run({"a": 1.0}), ("baseline", 0): made_run({"b": 1.0})}
    pair = Contrast("neft", ("baseline",))
    said = "test_nll: neft and baseline of seed 0 have different items, such as a: score both on"
    with pytest.raises(ConfigError, match=said):
        paired(runs, pair, "test_nll", DECODING)
    runs["baseline", 0] = made_run({"a": 1.0}, tokens=11)
    with pytest.raises(ConfigError, match="have items of different length, such as a"):
        paired(runs, pair, "test_nll", DECODING)


def test_a_missing_preference_drops_its_pair_and_nothing_else():
    def judged(values):
        rows = [("test", f"e{i}", v, v, v, 9, 9) for i, v in enumerate(values)]
        return pd.DataFrame(rows, columns=ITEM_COLUMNS["preferences.csv"])

    runs = {
        ("neft", 0): made_run({"a": 1.0}, preferences=judged([1.0, 0.5, math.nan])),
        ("baseline", 0): made_run({"a": 1.0}, preferences=judged([0.0, math.nan, 1.0])),
    }
    deltas = paired(runs, Contrast("neft", ("baseline",)), "preference", DECODING)
    assert deltas.set_index("example_id").delta.to_dict() == {"e0": 100.0}


def test_items_of_two_tasks_with_equal_names_stay_apart():
    rows = [("openbookqa", "0", 1, -1.0, 1, 0.5), ("siqa", "0", 0, -3.0, 0, -2.0)]
    table = pd.DataFrame(rows, columns=ITEM_COLUMNS["task_items.csv"])
    run = made_run({"a": 1.0}, task_items=table)
    assert per_item(run, "knowledge", DECODING).value.to_dict() == {
        "openbookqa/0": 0.5,
        "siqa/0": -2.0,
    }
    assert per_item(run, "knowledge_accuracy", DECODING).value.to_dict() == {
        "openbookqa/0": 1.0,
        "siqa/0": 0.0,
    }
    assert per_item(run, "siqa", DECODING).value.to_dict() == {"siqa/0": 0.0}


def test_a_rise_is_measured_from_the_same_model_unperturbed():
    rows = [
        *(("none", 0.0, name, value) for name, value in (("a", 1.0), ("b", 2.0))),
        *(("weights", level, name, 1.0 + 10 * level) for level in (0.1, 0.3) for name in "ab"),
    ]
    table = pd.DataFrame(rows, columns=ITEM_COLUMNS["perturbed_losses.csv"])
    run = made_run({"a": 1.0}, perturbed_losses=table)
    rise = per_item(run, "weight_rise", DECODING)
    assert rise.value.to_dict() == pytest.approx({"a": 2.0, "b": 1.0})


# ------------------------------------------------------------------------- what is measured


def test_losses_weigh_rows_by_tokens_and_content_is_without_the_end():
    run = losses_run(
        [
            ("test", "a", 10, 1.0, 2.0),
            ("test", "b", 30, 2.0, 1.0),
            ("test", "end", 1, 4.0, 4.0),  # a response that is its end of turn alone
            ("train", "c", 4, 0.5, 0.1),
            ("train", "d", 12, 1.5, 0.1),
        ]
    )
    found = {name: mean(per_item(run, name, DECODING)) for name in ("test_nll", "train_nll")}
    assert found == pytest.approx({"test_nll": (10 + 60 + 4) / 41, "train_nll": (2 + 18) / 16})
    assert mean(per_item(run, "gap", DECODING)) == pytest.approx(74 / 41 - 20 / 16)
    assert mean(per_item(run, "test_nll_by_row", DECODING)) == pytest.approx(7 / 3)
    assert mean(per_item(run, "end_nll", DECODING)) == pytest.approx(7 / 3)
    content = per_item(run, "content_nll", DECODING)
    assert content.value.to_dict() == pytest.approx({"a": 8 / 9, "b": 59 / 29})
    assert content.weight.to_dict() == {"a": 9, "b": 29}
    # Together they are the whole: what is said and where it ends, by tokens.
    assert (content.value * content.weight).sum() + 7 == pytest.approx(74)


def test_answer_length_is_a_ratio_and_an_empty_answer_has_its_end_of_turn():
    runs = {
        ("baseline", 0): made_run({}, generations=answers([10, 1, 8])),
        ("neft_a15", 0): made_run({}, generations=answers([20, 4, 8])),
    }
    deltas = paired(runs, Contrast("neft_a15", ("baseline",)), "answer_length", DECODING)
    assert np.exp(deltas.delta).tolist() == pytest.approx([2, 4, 1])
    seeds = by_seed(runs, DECODING).set_index("arm")
    assert math.exp(seeds.answer_length["neft_a15"]) == pytest.approx((20 * 4 * 8) ** (1 / 3))
    assert seeds.answer_tokens["neft_a15"] == pytest.approx(32 / 3)
    shown = main_markdown(main_table(by_seed(runs, DECODING), ["baseline", "neft_a15"]))
    assert "| `answer_length`, tokens, geometric mean | 4.3 | 8.6 |" in shown
    assert per_item(runs["baseline", 0], "answer_length_plain", DECODING) is None
    plain = made_run({}, generations=answers([3], "greedy"))
    assert mean(per_item(plain, "answer_length_plain", DECODING)) == pytest.approx(math.log(3))


def gap_runs(rng, n_seeds=5, n_test=40):
    """Test rows that all seeds share and training rows of each seed's own."""
    runs, tokens = {}, rng.integers(5, 60, n_test)
    for seed in range(n_seeds):
        own = [("train", f"s{seed}-{i}", 20, rng.normal(1, 0.3), 0.1) for i in range(30)]
        base = rng.normal(2, 0.5, n_test)
        for arm, shift in (("baseline", 0.0), ("neft_a15", 0.02)):
            rows = [(s, e, n, v - 2 * shift, 0.1) for s, e, n, v, _ in own]
            nll = base + shift * rng.normal(1, 3, n_test)
            rows += [("test", f"e{i}", tokens[i], v, 0.1) for i, v in enumerate(nll)]
            runs[arm, seed] = losses_run(rows)
    return runs


def test_the_gaps_interval_has_the_test_rows_in_it():
    runs, pair = gap_runs(np.random.default_rng(0)), Contrast("neft_a15", ("baseline",))
    seeds = by_seed(runs, DECODING)
    found = contrast(runs, seeds, pair, "gap", DECODING)
    wide = seeds.pivot(index="seed", columns="arm", values="gap")
    assert found.estimate == pytest.approx((wide.neft_a15 - wide.baseline).mean())
    assert found.n_examples == 40
    test = contrast(runs, seeds, pair, "test_nll", DECODING)
    # The training loss moved by the same in every seed: what is uncertain are the test rows.
    assert found.se == pytest.approx(test.se, rel=1e-6)
    assert found.estimate - test.estimate == pytest.approx(0.04)
