"""The declaration of the steps holds together, and is what the repository does."""

import json

import pytest

from neft_utils.base.paths import BASE, NOTEBOOKS, Paths
from neft_utils.base.read_profile import load_profile
from neft_utils.base.steps import CHAIN, SCORES, ends, expand, needs, ordered, step
from neft_utils.make.commands import FIGURE_STEPS

NANO = load_profile("nano")


def test_every_file_that_is_read_is_written_by_one_step():
    written = [file for one in CHAIN for file in one.writes]
    assert len(written) == len(set(written))
    for one in CHAIN:
        assert set(one.reads) <= set(written), one.stem
        assert one.number not in needs(one)


def test_steps_come_after_what_they_read():
    place = {one.number: n for n, one in enumerate(ordered(CHAIN))}
    assert len(place) == len(CHAIN)
    for one in CHAIN:
        assert all(place[other] < place[one.number] for other in needs(one))
    assert {one.number: needs(one) for one in CHAIN if one.reads} == {
        2: [1],
        3: [1],
        4: [1, 3],
        5: [4, 6],
        7: [1],
        90: [1, 5],
    }
    assert ends() == [0, 2, 7, 90]
    assert FIGURE_STEPS == [0, 2, 6, 5]  # the table of 6 is read by 5


def test_files_of_a_run_and_of_all_runs():
    paths = Paths("nano", "results/local")
    (pattern,) = expand([SCORES], NANO, paths)
    assert pattern == str(paths.results / "runs/{arm}-s{seed}/scores.json")
    runs = [(BASE, 0), *NANO.runs()]
    assert expand([SCORES], NANO, paths, runs) == [
        str(paths.run(*run) / "scores.json") for run in runs
    ]
    rows = [name for name in expand(step(1).writes, NANO, paths, NANO.runs()) if "train" in name]
    assert rows == [str(paths.processed / f"train-s{seed}.jsonl") for seed in NANO.all_seeds()]


@pytest.mark.parametrize("one", CHAIN, ids=lambda one: one.stem)
def test_a_step_that_runs_per_arm_and_seed_has_a_notebook_that_takes_them(one):
    cells = json.loads((NOTEBOOKS / f"{one.stem}.ipynb").read_text("utf-8"))["cells"]
    (parameters,) = (c["source"] for c in cells if "parameters" in c["metadata"].get("tags", []))
    assert ("ARM: str" in "".join(parameters)) == one.per_run
