"""The time left: by plan at first, then by what the steps that are done have taken."""

from neft_utils.base.estimate import estimate
from neft_utils.base.paths import Paths
from neft_utils.base.read_profile import load_profile
from neft_utils.base.steps import CHAIN
from neft_utils.make.progress import Progress, planned_seconds

PLANNED = {"finetune": 300.0, "evaluate": 100.0}
STATS = """\
Job stats:
job         count
--------  -------
finetune        4
evaluate        4
all             1
total           9
"""


def begin(number, rule="finetune"):
    return f"localrule {rule}:\n    output: x\n    jobid: {number}\n"


def end(number, done, rule="finetune"):
    return f"Finished jobid: {number} (Rule: {rule})\n{done} of 9 steps ({done * 11}%) done\n"


def told(progress, text, now):
    """What it says to the lines of a log that come at this time."""
    said = (progress.read(line, now) for line in text.splitlines())
    return [line for line in said if line is not None]


def started(side_by_side=1):
    progress = Progress(PLANNED, side_by_side, now=0.0)
    assert told(progress, STATS, 0.0) == []
    return progress


def test_before_the_first_step_it_is_the_plan():
    assert Progress(PLANNED, 1, 0.0).status(120.0) == "[  2.0 min] starting"
    assert started().seconds_left(0.0) == 1600
    assert started(2).seconds_left(0.0) == 800
    assert started().status(0.0) == "[  0.0 min] 0 of 9 steps, about 27 min left"


def test_a_machine_as_fast_as_planned_counts_down():
    progress = started()
    told(progress, begin(1), 0.0)
    assert progress.seconds_left(150.0) == 1450
    assert told(progress, end(1, 1), 300.0) == [
        "[  5.0 min] 1 of 9 steps, about 22 min left · finished finetune"
    ]


def test_a_machine_three_times_slower_is_learned_from_the_steps_that_are_done():
    progress = started()
    for n in range(3):
        told(progress, begin(n), 900.0 * n)
        told(progress, end(n, n + 1), 900.0 * (n + 1))
    left = progress.seconds_left(2700.0)  # truly 3 * (300 + 400)
    assert 1900 < left <= 2100


def test_a_step_that_takes_longer_than_planned_is_noticed_before_it_ends():
    """Nothing ended for half an hour, and `about 24 min left` stood there all the time."""
    progress = started()
    told(progress, begin(1), 0.0)
    left = [progress.seconds_left(now) for now in (300.0, 900.0, 1800.0)]
    assert left[0] < left[1] < left[2] and left[2] > 3 * left[0]


def test_the_last_step_over_its_time_is_never_about_no_time_from_its_end():
    """`about 0 min left` stood there for minutes."""
    progress = Progress(PLANNED, 1, 0.0)
    told(progress, "Job stats:\njob    count\n----\nevaluate  1\nall   1\ntotal  2\n", 0.0)
    told(progress, begin(1, "evaluate"), 0.0)
    assert progress.status(60.0) == "[  1.0 min] 0 of 2 steps, about 1 min left"
    assert progress.status(95.0) == "[  1.6 min] 0 of 2 steps, under a minute left"
    left = [progress.seconds_left(now) / 60 for now in (300.0, 600.0, 1200.0)]
    assert 1 <= left[0] < left[1] < left[2] <= 5


def test_a_run_that_goes_on_counts_only_what_is_not_done():
    progress = Progress(PLANNED, 1, 0.0)
    told(progress, "Job stats:\njob    count\n----\nevaluate  1\nall   1\ntotal  2\n", 0.0)
    assert progress.seconds_left(0.0) == 100


def test_steps_that_fail_are_kept_and_said_once():
    progress = started()
    line = "error: 07_reuse: ValueError: no (cell 3, results/x.failed.ipynb)"
    assert told(progress, f"{line}\n{line}\n", 1.0) == [line]
    assert progress.errors == [line] and not progress.nothing
    told(progress, "Nothing to be done (all requested files are present).", 2.0)
    assert progress.nothing


def test_the_plan_of_all_steps_together_is_that_of_make_plan():
    profile = load_profile("cpu")
    rows = estimate(profile, Paths("no-such-results"))
    planned = planned_seconds(rows, CHAIN)
    assert set(planned) == {step.rule for step in CHAIN} | {"evaluate_base"}
    runs = len(profile.runs())
    once = sum(planned[step.rule] for step in CHAIN if not step.per_run)
    whole = once + runs * planned["finetune"] + (runs + 1) * planned["evaluate"]
    assert abs(whole - sum(row[3] for row in rows)) < 1e-6
