"""A difference in one plain sentence: its direction, its size with its interval, what is excluded.

Every table, figure and page says it by `str()` of a `Verdict`; nothing else puts a difference into
words, and nothing but Python is needed for it, since `make reproduce` ends with such sentences.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import expm1, hypot, isfinite, nan
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:  # stats needs pandas and scipy
    from neft_utils.compare.stats import Interval

LOG_RATIO = "log ratio"  # shown as per cent


@dataclass(frozen=True)
class Quantity:
    """What is measured, and how people speak of more and less of it."""

    unit: str = ""
    subject: str = ""  # with its verb: "answers are"
    higher: str = "higher"
    lower: str = "lower"
    better: int = 0  # +1: higher is better, -1: lower is, 0: neither


@dataclass(frozen=True)
class Verdict:
    """What an interval says of an effect, as data; `str()` is its sentence.

    Numbers are in the metric's own unit. `verdict` makes one.
    """

    outcome: Literal["higher", "lower", "not_seen", "not_testable"]
    quantity: Quantity
    interval: Interval | None = None
    claimed: int = 0  # sign that a claim predicts; 0: none
    adjusted_p: float | None = None  # from `stats.holm`, where several were tested
    taken_back: bool = False  # the interval excludes 0 and after Holm's correction does not count
    share: float | None = None  # of what fine-tuning gained, where that is known; 0.01 is 1 %
    margin: float | None = None  # how much worse still counts as "no worse"
    held: bool | None = None  # whether `non_inferiority` holds; None without margin or interval
    elsewhere: str | None = None  # profile that can test it
    missing: str | None = None  # why nothing was measured

    @property
    def testable(self) -> bool:
        return self.outcome != "not_testable"

    @property
    def seen(self) -> bool:
        """Whether there is a difference, of either sign."""
        return self.outcome in ("higher", "lower")

    @property
    def claim_words(self) -> str:
        """The claimed direction as a word; "" for a claim of none."""
        return {1: self.quantity.higher, -1: self.quantity.lower, 0: ""}[self.claimed]

    def __str__(self) -> str:
        words = self._words()
        if self.held is None:
            return words
        bound = f"{self.margin:g} {plain(self.quantity.unit)}".strip()
        said = f"worse by less than {bound}" if self.held else f"a loss of {bound} is not excluded"
        return f"{words}; {said}"

    @property
    def sentence(self) -> str:
        """`str()` as a sentence by itself, with a capital and a full stop."""
        said = str(self)
        return f"{capital(said)}."

    def _words(self) -> str:
        if self.interval is None:
            elsewhere = f" (see profile {self.elsewhere})" if self.elsewhere else ""
            return f"{self.missing or 'not measured here'}{elsewhere}"
        if not self.testable:
            one = self.interval.n_seeds == 1
            why = "one seed pair, so no interval" if one else "no spread, so no interval"
            return f"{why}: {self._moved()}"
        if self.seen:
            return self._moved()
        if self.taken_back:
            after = f"after correction for the other claims (p = {self.adjusted_p:.2g})"
            return f"{self._moved()}, which does not hold {after}"
        return f"no difference seen; {self._excluded()}"

    def _moved(self) -> str:
        """Direction and size, the interval in the same direction."""
        one, words = self.interval, self.quantity
        if one.estimate == 0:
            return f"{words.subject} the same".strip()
        up = one.estimate > 0
        sizes = [one.estimate, *sorted((one.ci_low, one.ci_high), reverse=not up)]
        sizes = [size(x, words.unit) * (1 if up else -1) for x in sizes]
        number, *ends = (digits(x, words.unit) for x in sizes)
        span = f" [{', '.join(ends)}]" if isfinite(one.ci_low) else ""
        way = words.higher if up else words.lower
        share = f", {100 * self.share:.2g} % of what fine-tuning gained" if self.share else ""
        return f"{words.subject} {way} by {number} {plain(words.unit)}{span}{share}".strip()

    def _excluded(self) -> str:
        """What the interval leaves out: in the claimed direction, or in both without a claim."""
        ends, words = {1: self.interval.ci_high, -1: self.interval.ci_low}, self.quantity
        signs = (self.claimed,) if self.claimed else (words.better or 1, -(words.better or 1))
        said = []
        for sign in signs:
            bound = digits(abs(size(ends[sign], words.unit)), words.unit)
            if words.better:
                what = f"a {'gain' if sign == words.better else 'loss'} over {bound}"
            else:
                what = f"{words.higher if sign > 0 else words.lower} by more than {bound}"
            said.append(f"{what} {plain(words.unit)}".strip())
        return f"{' and '.join(said)} {'is' if len(said) == 1 else 'are'} excluded"


def verdict(
    interval: Interval | None,
    quantity: Quantity = Quantity(),
    claimed: int = 0,
    adjusted_p: float | None = None,
    margin: float | None = None,
    gained: float | None = None,
    elsewhere: str | None = None,
    missing: str | None = None,
) -> Verdict:
    """Whether the interval shows an effect, and how large it is, as a `Verdict`.

    "higher" or "lower" if the interval excludes 0, "not_seen" if not, "not_testable" without one
    (None, or its ends are NaN). adjusted_p: from `stats.holm`; at 0.05 or more it takes an effect
    back. margin: for a claim of "no worse"; `held` says whether `non_inferiority` holds. gained:
    what fine-tuning gained in the quantity, in its unit; the size is given as a share of it where
    it is positive. elsewhere, missing: for the words. ValueError for a bootstrap, whose interval
    is for a second look.
    """
    about = {"claimed": claimed, "margin": margin, "elsewhere": elsewhere, "missing": missing}
    share = abs(interval.estimate) / gained if interval and gained and gained > 0 else None
    if interval is None or not isfinite(interval.ci_low):
        return Verdict("not_testable", quantity, interval, share=share, **about)
    if not isfinite(interval.detectable):
        raise ValueError("verdict needs confirmatory_interval or seed_interval, not a bootstrap")
    excludes = interval.ci_low > 0 or interval.ci_high < 0
    taken_back = excludes and adjusted_p is not None and adjusted_p >= 0.05
    outcome = "not_seen"
    if excludes and not taken_back:
        outcome = "higher" if interval.estimate > 0 else "lower"
    held = None if margin is None else non_inferiority(interval, margin, quantity.better >= 0)
    about |= {"adjusted_p": adjusted_p, "taken_back": taken_back, "share": share, "held": held}
    return Verdict(outcome, quantity, interval, **about)


def non_inferiority(interval: Interval, margin: float, higher_is_better: bool) -> bool:
    """True if the whole interval lies on the good side of "worse by margin" (metric's unit).

    A 95 % interval makes this a one-sided test at 2.5 %. Without an interval (NaN): False.
    """
    if not (isfinite(margin) and margin > 0):
        raise ValueError(f"margin must be a positive number in the metric's unit, got {margin!r}")
    worst = interval.ci_low if higher_is_better else -interval.ci_high
    return bool(worst > -margin)


# What `held` says of two estimates of one contrast.
AGREES, DIFFERS = "as expected", "outside"
NO_INTERVAL, NO_REFERENCE = "no interval to hold it by", "no reference"


def held(here: Interval | None, there: Interval | None) -> tuple[float, str]:
    """(tolerance, one of the words above) of a contrast here and in another place.

    Two independent estimates with 95 % intervals of half widths a and b lie within sqrt(a^2 + b^2)
    of each other in about 95 of 100 cases: that is the tolerance, in the contrast's unit. Results
    that share rows and seeds lie nearer, so it is generous. NaN where one side has no interval.
    """
    if here is None or there is None:
        return nan, NO_REFERENCE
    halves = [(one.ci_high - one.ci_low) / 2 for one in (here, there)]
    if not all(map(isfinite, halves)):
        return nan, NO_INTERVAL
    tolerance = hypot(*halves)
    near = abs(here.estimate - there.estimate) <= tolerance
    return tolerance, AGREES if near else DIFFERS


# ---------------------------------------------------------------------------------- numbers


def capital(text: str) -> str:
    """A text with a capital letter at its beginning."""
    return text[:1].upper() + text[1:]


def size(value: float, unit: str) -> float:
    """A difference as people weigh it: a log ratio in per cent, others as they are."""
    return 100 * expm1(value) if unit == LOG_RATIO else value


def plain(unit: str) -> str:
    """A unit in words."""
    return {LOG_RATIO: "%", "nats/token": "nats per token", "share": ""}.get(unit, unit)


def digits_of(unit: str) -> int:
    """How many digits after the point a number of this unit is shown with."""
    fixed = {"nats/token": 4, "nats per token": 4, "nats": 3, "tokens": 1, "s": 1, "points": 1}
    return fixed.get(unit, 1 if unit in ("%", LOG_RATIO) else 2)


def digits(value: float, unit: str) -> str:
    return show(value, digits_of(unit))


def show(number: float | None, after_point: int = 4) -> str:
    """A number for a table: a thin dash where there is none."""
    if number is None or not isfinite(number):
        return "–"
    text = f"{number:.{after_point}f}"
    return text.removeprefix("-") if float(text) == 0 else text  # no "-0"


def with_interval(interval: Interval, unit: str) -> str:
    """ "+6.1 [+2.0, +10.2] %": signed, as people weigh it; without ends where there are none."""
    ends = (interval.estimate, interval.ci_low, interval.ci_high)
    number, *ends = (f"{size(x, unit):+.{digits_of(unit)}f}" for x in ends)
    span = f" [{', '.join(ends)}]" if isfinite(interval.ci_low) else ""
    return f"{number}{span} {plain(unit)}".strip()
