"""The figure of runs that overfit shows what its table says, in words that a reader knows."""

import pytest
from made_runs import curve, made_run

from neft_utils.base.read_profile import load_profile
from neft_utils.compare import curves, overfitting, overfitting_plots

PROFILE = load_profile("cpu-overfit")
FIT = {0: 2.0, 2: 1.0, 4: 0.4, 6: 0.2}
HELD_OUT = {0: 2.0, 2: 1.5, 4: 1.7, 6: 2.1}


def some_runs(arms=("baseline", "neft_a15", "dropout"), seeds=(0, 1)):
    runs = {}
    for n, arm in enumerate(arms):
        for seed in seeds:
            train = {e: [x + 0.1 * n * (e > 0)] * 3 for e, x in FIT.items()}
            rows = {e: [x + 0.05 * seed, x - 0.1 * n] for e, x in HELD_OUT.items()}
            runs[arm, seed] = made_run({"e0": 1.0}) | {"curve": curve(train, rows)}
    return curves.read(runs)


def thick(axis):
    return [line for line in axis.lines if line.get_linewidth() > 2]


def test_a_thick_curve_an_arm_a_thin_one_a_run_and_training_goes_right():
    found = some_runs()
    drawn = overfitting_plots.held_out_against_training(found, PROFILE, "A title")
    (axis,) = drawn.axes
    assert len(thick(axis)) == 3
    assert sum(line.get_linewidth() < 1 for line in axis.lines) == 6
    left, right = axis.get_xlim()
    assert left > right  # training loss falls to the right
    assert "training rows" in axis.get_xlabel() and "→" in axis.get_xlabel()
    assert "held-out rows" in axis.get_ylabel() and "better" in axis.get_ylabel()
    noisy = thick(axis)[1]
    tables = [curves.by_epoch(found["neft_a15", seed]) for seed in (0, 1)]
    for values, name in ((noisy.get_xdata(), "train"), (noisy.get_ydata(), "validation")):
        means = sum(table[f"{name}_content"] for table in tables) / 2
        assert list(values) == pytest.approx(means.tolist())
    marks = {mark: [x for x in axis.lines if x.get_marker() == mark] for mark in "os"}
    assert [len(x) for x in marks.values()] == [3, 3]
    assert marks["o"][1].get_ydata()[0] == pytest.approx(min(noisy.get_ydata()))
    assert marks["s"][1].get_xdata()[0] == pytest.approx(noisy.get_xdata()[-1])
    names = [text.get_text() for text in drawn.legends[0].get_texts()]
    assert names[:3] == [
        "no noise (2 runs)",
        "noise, α = 15 (2 runs)",
        "LoRA dropout 0.1 (2 runs)",
    ]
    last = "thick: mean of seeds 0, 1"
    assert names[3:] == ["best epoch", "end of training", "thin: single runs", last]
    drawn.draw_without_rendering()
    assert not drawn.legends[0].get_window_extent().overlaps(axis.get_tightbbox())


def test_means_are_over_the_seeds_that_all_arms_have():
    """Rows of one seed may be harder than another's, and means would differ by that."""
    found = some_runs()
    del found["dropout", 1]
    drawn = overfitting_plots.held_out_against_training(found, PROFILE, "A title")
    for arm, line in zip(("baseline", "neft_a15", "dropout"), thick(drawn.axes[0]), strict=True):
        own = curves.by_epoch(found[arm, 0]).validation_content
        assert list(line.get_ydata()) == pytest.approx(own.tolist())
    names = [text.get_text() for text in drawn.legends[0].get_texts()]
    assert "no noise (2 runs)" in names and names[-1] == "thick: mean of seed 0"


def test_the_title_says_what_equal_training_loss_shows():
    found = some_runs()
    compared = overfitting.comparisons(found, PROFILE)
    title = overfitting_plots.finding(compared, PROFILE)
    (said,) = (
        one.verdict
        for one in compared
        if (one.contrast.treatment, one.moment) == ("neft_a15", "equal_fit")
        and one.measure == "content_nll"
    )
    assert title == f"Noise, α = 15, control stopped at equal training loss: {said}"
    alone = overfitting.comparisons(some_runs(("baseline", "dropout")), PROFILE)
    assert overfitting_plots.finding(alone, PROFILE).startswith("LoRA dropout 0.1, control")
