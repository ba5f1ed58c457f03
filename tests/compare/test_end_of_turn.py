"""Changes of stopping and content by length of the answer, from tables of losses."""

import math

import numpy as np
import pandas as pd
import pytest
from scipy import stats as scipy_stats

from neft_utils.base.read_profile import load_profile
from neft_utils.base.strict import ConfigError
from neft_utils.compare import end_of_turn
from neft_utils.compare.end_of_turn_plots import end_of_turn_figure, figure


def losses(n_tokens, end, content):
    """A table as `score_losses` makes it, from the two parts of each row."""
    n, end, content = (np.asarray(x, dtype=float) for x in (n_tokens, end, content))
    table = {"split": "test", "example_id": [f"r{i}" for i in range(len(n))]}
    table |= {"n_tokens": n.astype(int), "nll": (content * (n - 1) + end) / n, "end_nll": end}
    return pd.DataFrame(table)


def pair(seed, rows=40, sign=1):
    """Two tables: the end costs 0.4 more in short rows, the content 0.02 more in long ones."""
    draw = np.random.default_rng(seed)
    n = np.linspace(5, 200, rows).round()
    end, content = draw.uniform(0.2, 1, rows), draw.uniform(1, 2, rows)
    later = sign * np.where(n < 60, 0.4, 0.0) + draw.normal(0, 0.02, rows)
    worse = np.where(n > 150, 0.02, 0.0) + draw.normal(0, 0.001, rows)
    return losses(n, end, content), losses(n, end + later, content + worse)


def test_the_parts_of_a_row_are_taken_apart():
    control = losses([1, 5], [0.5, 1.0], [0.0, 2.0])
    treatment = losses([1, 5], [0.7, 1.0], [0.0, 2.5]).iloc[::-1]  # in whatever order
    found = end_of_turn.row_changes(control, treatment).set_index("example_id")
    assert found.loc["r0", "end_nll"] == pytest.approx(0.2)
    assert found.loc["r0", "p_end"] == pytest.approx(math.exp(-0.7) - math.exp(-0.5))
    assert math.isnan(found.loc["r0", "content_nll"])  # an end of turn alone has no content
    assert found.loc["r1", "content_nll"] == pytest.approx(0.5)
    assert found.loc["r1", "test_nll"] == pytest.approx(0.4)


def test_one_pair_has_the_interval_of_a_weighted_mean_over_rows():
    """Against scipy where weights are equal, and against rows drawn again where they are not."""
    draw = np.random.default_rng(0)
    values = draw.normal(0.3, 1, 50)
    same = end_of_turn.rows_interval(values, np.full(50, 7.0))
    low, high = scipy_stats.ttest_1samp(values, 0).confidence_interval()
    assert (same.ci_low, same.ci_high) == pytest.approx((low, high))
    assert same.n_seeds == 1 and same.n_examples == 50

    def sample():
        weights = draw.integers(1, 300, 60)
        return draw.normal(0.2, 1 + 20 / weights), weights

    found = [end_of_turn.rows_interval(*sample()) for _ in range(500)]
    held = np.mean([one.ci_low < 0.2 < one.ci_high for one in found])
    assert 0.92 < held < 0.98
    spread = np.std([one.estimate for one in found])
    assert np.mean([one.se for one in found]) == pytest.approx(spread, rel=0.07)


def test_equal_changes_have_no_interval():
    found = end_of_turn.rows_interval([0.5, 0.5], [1, 2])
    assert found.estimate == 0.5 and math.isnan(found.ci_low)


def test_long_rows_weigh_more_in_content_and_not_in_the_end():
    control = losses([11, 101], [1, 1], [1, 1])
    treatment = losses([11, 101], [2, 1], [2, 1])
    changes = end_of_turn.row_changes(control, treatment).assign(seed=0)
    assert end_of_turn.interval(changes, "content_nll").estimate == pytest.approx(10 / 110)
    assert end_of_turn.interval(changes, "end_nll").estimate == pytest.approx(0.5)
    assert end_of_turn.interval(changes, "test_nll").estimate == pytest.approx(11 / 112)


def test_quarters_by_length_show_where_it_happens():
    both = [end_of_turn.row_changes(*pair(s)).assign(seed=s, label="noise") for s in (0, 1, 2)]
    table = end_of_turn.by_length(pd.concat(both))
    mean = table[table.seed.isna()].pivot(index="part", columns="measure", values="estimate")
    assert mean.index.tolist() == [1, 2, 3, 4]
    assert mean.end_nll.round(1).tolist() == [0.4, pytest.approx(0.0, abs=0.11), 0.0, 0.0]
    assert mean.p_end[1] < -0.1 and abs(mean.p_end[4]) < 0.02
    assert mean.content_nll.round(2).tolist() == [0, 0, 0, 0.02]
    rows = table[table.measure == "end_nll"]
    assert rows[rows.seed.isna()].n_rows.tolist() == [10] * 4
    assert rows.seed.notna().sum() == 12  # a line a seed
    assert table.ci_low.notna().all()


def test_rows_of_one_length_are_one_part():
    changes = end_of_turn.row_changes(*(losses([9] * 8, [x] * 8, [1] * 8) for x in (1, 2)))
    table = end_of_turn.by_length(changes.assign(seed=0, label="a"))
    assert table.part.unique().tolist() == [1] and table.n_rows.unique().tolist() == [8]


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda t: t.drop(columns="end_nll"), "p: the losses have no end_nll, because an older"),
        (lambda t: t.iloc[1:], r"p: .* different rows \(1 of them, the first is r0\)"),
        (lambda t: t.assign(n_tokens=t.n_tokens + 1), r"different rows \(40 of them"),
        (lambda t: t.assign(end_nll=math.nan), "p: a model gives losses that are no numbers"),
    ],
)
def test_tables_that_cannot_be_paired_are_refused_in_one_line(change, words):
    control, treatment = pair(0)
    with pytest.raises(ConfigError, match=words) as caught:
        end_of_turn.row_changes(control, change(treatment), "p")
    assert "\n" not in str(caught.value)


class TestRuns:
    profile = load_profile("nano")

    def runs(self, seeds=(0, 1)):
        sides = {s: pair(s) for s in seeds}
        arms = self.profile.confirmatory.control, self.profile.confirmatory.treatment
        return {
            (arm, s): {"losses": pd.concat([side, side.assign(split="train", end_nll=99)])}
            for s in seeds
            for arm, side in zip(arms, sides[s], strict=True)
        }

    def test_test_rows_of_every_pair_are_compared(self):
        found = end_of_turn.changes_of_runs(self.runs(), self.profile)
        assert found.groupby("seed").size().tolist() == [40, 40]
        assert found.label.unique().tolist() == [self.profile.confirmatory.treatment]
        expected = pd.concat([end_of_turn.row_changes(*pair(s)) for s in (0, 1)])
        assert found.end_nll.mean() == pytest.approx(expected.end_nll.mean())

    def test_only_rows_that_all_pairs_have_are_kept(self):
        runs = self.runs()
        for (_, seed), run in runs.items():
            if seed == 1:
                run["losses"] = run["losses"].query("example_id != 'r3'")
        found = end_of_turn.changes_of_runs(runs, self.profile)
        assert found.groupby("seed").size().tolist() == [39, 39]

    def test_older_runs_say_why_there_is_no_figure(self):
        runs = self.runs()
        for run in runs.values():
            run["losses"] = run["losses"].drop(columns="end_nll")
        with pytest.raises(ConfigError, match="2 pairs were scored before losses.csv had end_nll"):
            end_of_turn_figure(runs, self.profile)
        with pytest.raises(ConfigError, match="end of turn: no pair"):
            end_of_turn_figure({}, self.profile)

    def test_the_figure_shows_both_parts_over_the_same_lengths(self):
        drawn = end_of_turn_figure(self.runs(), self.profile)
        upper, lower = drawn.axes
        lengths = []
        for axis, words in ((upper, "later to stop"), (lower, "better")):
            assert words in axis.get_title("left") and axis.get_ylabel()
            thick = [line for line in axis.lines if line.get_marker() == "o"]
            thin = [line for line in axis.lines if line.get_linewidth() < 1]
            assert len(thick) == 1 and len(thin) == 2
            lengths.append(thick[0].get_xdata().tolist())
        assert lengths[0] == lengths[1] and len(lengths[0]) == 4 and lower.get_xlabel()
        line = next(line for line in upper.lines if line.get_marker() == "o")
        assert line.get_ydata()[0] < -10  # percentage points, not shares
        title = f"{line.get_ydata()[0]:+.1f} points"
        assert title in drawn.get_suptitle().replace("\n", " ")
        drawn.draw_without_rendering()
        box = drawn.legends[0].get_window_extent()
        assert not any(box.overlaps(axis.get_tightbbox()) for axis in drawn.axes)


def test_several_labels_are_lines_of_several_colours():
    changes = [
        end_of_turn.row_changes(*pair(s, sign=sign)).assign(seed=s, label=label)
        for label, sign in (("cpu", 1), ("gpu-small", -1))
        for s in (0, 1)
    ]
    drawn = figure(pd.concat(changes))
    thick = [line for line in drawn.axes[0].lines if line.get_marker() == "o"]
    assert len({line.get_color() for line in thick}) == 2
    assert thick[0].get_ydata()[0] < 0 < thick[1].get_ydata()[0]
    names = [text.get_text() for text in drawn.legends[0].get_texts()]
    assert names[:2] == ["cpu, 2 pairs", "gpu-small, 2 pairs"]
