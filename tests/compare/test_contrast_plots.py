"""Figures of arms say what the numbers say, in a person's words, readable on a phone."""

import dataclasses

import numpy as np
import pandas as pd
import pytest
from made_runs import made_run

from neft_utils.base.paths import BASE
from neft_utils.base.read_profile import load_profile
from neft_utils.compare import claims, contrast_plots, plots
from neft_utils.compare.metrics import quantity
from neft_utils.compare.stats import seed_interval
from neft_utils.compare.words import verdict

PROFILE = load_profile("cpu-long")


def finding(name, deltas):
    claim = claims.CLAIMS[name]
    interval = seed_interval(np.array(deltas))
    said = verdict(interval, quantity(claim.metric), claimed=claim.claimed)
    return claims.Finding(name, claim, claims.confirmatory(PROFILE), said, "", True)


FOUND = [
    finding("end_nll", [0.09, 0.10, 0.11]),  # as claimed
    finding("content_nll", [0.09, 0.10, 0.11]),  # against the claim
    finding("answer_length", [-0.1, 0.0, 0.12]),  # not seen
]


def checked(figure):
    """Its title in one line, after a look at the sizes of its words and the place of its legend."""
    figure.draw_without_rendering()
    assert figure.get_size_inches()[0] == pytest.approx(plots.WIDTH)
    words = [text for axis in figure.axes for text in axis.texts]
    words += [label for axis in figure.axes for label in (axis.xaxis.label, axis.title)]
    assert all(text.get_fontsize() >= 9 for text in words)
    for legend in figure.legends:
        box = legend.get_window_extent()
        assert not any(box.overlaps(axis.get_tightbbox()) for axis in figure.axes)
    return " ".join(figure.get_suptitle().split())


def test_right_is_as_claimed_and_the_title_counts_what_is_against_it():
    figure = contrast_plots.ledger(FOUND)
    assert checked(figure) == (
        "A difference is seen in 2 of 3 claims with an interval, in 1 against the claim"
    )
    points = [
        line for line in figure.axes[0].lines if line.get_marker() == "o" and len(line.get_xdata())
    ]
    assert [np.sign(line.get_xdata()[0]) for line in points] == [1, -1, 1]
    assert points[1].get_color() == contrast_plots.AGAINST
    assert points[2].get_markerfacecolor() == "white"


def test_without_an_interval_there_is_no_ledger_to_draw():
    assert contrast_plots.ledger([finding("end_nll", [0.1])]) is None


def test_each_panel_has_its_claim_its_sentence_and_both_directions():
    pairs = pd.DataFrame({"seed": [0, 1], "delta": [0.1, 0.2], "weight": 1.0})
    figure = contrast_plots.seed_pairs([(one, pairs) for one in FOUND])
    assert "seen in 2 of 3" in checked(figure)
    for axis, one in zip(figure.axes, FOUND, strict=True):
        said = " ".join(axis.get_title("left").split())
        assert one.claim.text in said and str(one.verdict) in said
    labels = [axis.get_xlabel() for axis in figure.axes]
    assert labels[0].startswith("← more likely") and labels[0].endswith("less likely →")
    assert labels[1].startswith("← better") and labels[1].endswith("worse →")


def test_better_is_where_a_quantity_has_it():
    assert plots.directions(quantity("arithmetic")).startswith("← worse")
    assert plots.directions(quantity("gap")).startswith("← narrower")


def test_learning_curves_of_many_arms_have_room_for_all():
    runs = {}
    for n, (arm, seed) in enumerate(PROFILE.runs()):
        log = pd.DataFrame({"epoch": [0, 1, 2], "validation_nll": [2.0, 1.8 + n / 100, 1.9]})
        runs[arm, seed] = made_run({"e0": 1.0}, log=log)
    said = verdict(seed_interval(np.array([-0.1, 0.1, 0.0])), quantity("best_validation_nll"))
    figure = contrast_plots.learning_curves(runs, PROFILE, said)
    assert checked(figure).startswith("Lowest validation loss with noise, α = 15: no difference")
    names = [text.get_text() for text in figure.axes[1].texts]
    assert names == [
        "noise, α = 15",
        "noise on the prompt, α = 15",
        "noise on the response, α = 15",
        "noise, α = 30, packed length",
        "LoRA dropout 0.1",
    ]


def test_answers_of_a_seed_are_joined_and_the_untrained_model_stands_apart():
    seeds = pd.DataFrame(
        [(BASE, 0, 90.0), ("baseline", 0, 50.0), ("baseline", 1, 60.0)]
        + [("neft_a15", 0, 70.0), ("neft_a15", 1, 65.0)],
        columns=["arm", "seed", "answer_length"],
    )
    seeds["answer_length"] = np.log(seeds.answer_length)
    arms = [BASE, *PROFILE.arms]
    figure = contrast_plots.answer_lengths(seeds, arms, PROFILE, FOUND[2].verdict)
    assert "length of answers with noise" in checked(figure).lower()
    axis = figure.axes[0]
    names = [" ".join(label.get_text().split()) for label in axis.get_yticklabels()]
    assert names == ["before fine-tuning", "no noise", "noise, α = 15"]
    joined = [line.get_xdata().tolist() for line in axis.lines if line.get_linestyle() == "-"]
    assert np.allclose(joined, [[50, 70], [60, 65]])


def doses(slopes):
    rows = [
        (f"a{n}", seed, 5.0 * n, "sequence", 5.0 * n, 0.05 * n, slopes[0] * n, slopes[1](n))
        for n in range(1, 6)
        for seed in (0, 1)
    ]
    columns = ["arm", "seed", "noise_alpha", "length", "effective_alpha", "relative_rms"]
    return pd.DataFrame(rows, columns=[*columns, "train_nll", "test_nll"])


def test_an_order_is_claimed_only_where_chance_would_not_make_it():
    figure = contrast_plots.dose(doses((0.01, lambda n: (-1) ** n * 0.01)))
    title = checked(figure)
    assert title.startswith("Training loss: higher with more noise, test loss: in no order")
    three = doses((0.01, lambda n: 0.01 * n)).query("noise_alpha <= 15")
    assert "in no order" in checked(contrast_plots.dose(three))


def test_arms_have_a_persons_words():
    arms = {
        **PROFILE.arms,
        "prompt": dataclasses.replace(PROFILE.arms["neft_a15"], where="prompt"),
        "packed": dataclasses.replace(PROFILE.arms["neft_a15"], length="packed"),
        "both": dataclasses.replace(PROFILE.arms["neft_a15"], lora_dropout=0.1),
        "twin": PROFILE.arms["dropout"],
    }
    profile = dataclasses.replace(PROFILE, arms=arms)
    words = {arm: plots.words_of(arm, profile) for arm in [BASE, *arms]}
    assert words[BASE] == "before fine-tuning" and words["baseline"] == "no noise"
    assert words["prompt"] == "noise on the prompt, α = 15"
    assert words["packed"] == "noise, α = 15, packed length"
    assert words["both"] == "noise, α = 15, LoRA dropout 0.1"
    assert words["twin"] == "twin" and words["dropout"] == "dropout"  # else both the same
    assert plots.words_of("lr_1e3", load_profile("cpu-overfit-tuning")) == "learning rate 0.001"
