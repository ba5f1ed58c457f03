"""How far `make reproduce` is: Snakemake's log into a line per finished step, with the time left.

The time left begins as the profile's plan and learns from the steps that are done and from those
that take longer than planned: on a busy machine all of them do.
"""

import re
from collections import Counter

TRUST = 60.0  # seconds of planned work that count as if they had taken as long as planned
LATE = 0.2  # what a step over its time is expected to take on, as a share of what it is over


class Progress:
    """Reads Snakemake's log line by line; `errors` and `nothing` say how it ended.

    planned: {rule: seconds of one step by plan}, for rules that are in it; side_by_side: steps at
    a time; now: seconds at the beginning.
    """

    def __init__(self, planned, side_by_side, now):
        self.planned, self.side_by_side, self.began = planned, side_by_side, now
        self.errors, self.nothing = [], False
        self.done, self.steps = 0, None
        self._left = Counter()  # steps of a rule that are to be done
        self._rule, self._since = None, {}  # job id -> (rule, when it began)
        self._took = self._plan = 0.0  # seconds of the steps that are done, and by plan
        self._counting, self._last = False, ""

    def read(self, line, now):
        """Take a line of the log; returns a line for the terminal, or None."""
        if "Nothing to be done" in line:
            self.nothing = True
        elif line.startswith("error:"):  # the one line of a step that failed
            if line not in self.errors:
                self.errors.append(line)
                return line
        elif line.startswith("Job stats:"):
            self._counting = self.steps is None
        elif self._counting and (match := re.fullmatch(r"(\w+) +(\d+)", line)):
            if match[1] == "total":
                self._counting, self.steps = False, int(match[2])
            else:
                self._left[match[1]] = int(match[2])
        elif match := re.match(r"(?:local)?(?:rule|checkpoint) (\w+):", line):
            self._rule = match[1]
        elif match := re.match(r" +jobid: (\d+)", line):
            self._since[match[1]] = self._rule, now
        elif match := re.match(r"Finished jobid: (\d+) \(Rule: (\w+)\)", line):
            self._finish(match[1], match[2], now)
        elif match := re.match(r"(\d+) of (\d+) steps \(", line):
            self.done, self.steps = map(int, match.groups())
            return f"{self.status(now)} · finished {self._last}"
        return None

    def _finish(self, job, rule, now):
        rule, since = self._since.pop(job, (rule, now))
        self._last = rule
        self._left[rule] -= 1
        if rule in self.planned:
            self._took += now - since
            self._plan += self.planned[rule]

    def status(self, now):
        """A line: minutes gone, steps done, minutes left."""
        gone = f"[{(now - self.began) / 60:5.1f} min]"
        if not self.steps:
            return f"{gone} starting"
        minutes = round(self.seconds_left(now) / 60)
        left = f"about {minutes} min" if minutes else "under a minute"
        return f"{gone} {self.done} of {self.steps} steps, {left} left"

    def seconds_left(self, now):
        """Seconds until the end, from what has been seen so far."""
        gone = [(self.planned.get(rule, 0), now - since) for rule, since in self._since.values()]
        # A step under way says something once it has taken longer than planned.
        late = [(plan, taken) for plan, taken in gone if taken > plan > 0]
        plan = TRUST + self._plan + sum(plan for plan, _ in late)
        pace = (TRUST + self._took + sum(taken for _, taken in late)) / plan
        whole = sum(max(0, n) * self.planned.get(rule, 0) for rule, n in self._left.items())
        # A late step is taken to be nearly done, for want of anything better; the later, the less.
        under_way = sum(min(plan, taken / pace, 0.9 * plan) for plan, taken in gone)
        overdue = sum(LATE * (taken - plan) for plan, taken in late)
        return max(0.0, (pace * (whole - under_way) + overdue) / self.side_by_side)


def planned_seconds(rows, steps):
    """{rule: seconds of one step} from `base.estimate.estimate`'s rows and `base.steps.CHAIN`."""
    count, seconds = ({row[0]: row[place] for row in rows} for place in (1, 3))
    once, train, *scoring = seconds
    planned = {step.rule: seconds[once] / count[once] for step in steps}
    scored = sum(seconds[phase] for phase in scoring) / count[scoring[0]]
    planned |= {"finetune": seconds[train] / max(1, count[train])}
    return planned | {"evaluate": scored, "evaluate_base": scored}
