"""Plain values from YAML into frozen dataclasses, strictly.

A field's type hint says what it takes; its metadata, set by `at_least`, `within` and `one_of`,
what range or choice. Whatever does not fit is a ConfigError of one line that names every such key,
its value and the remedy.
"""

import contextlib
import dataclasses
import difflib
import reprlib
import types
import typing
from dataclasses import field

LARGEST = 2**32 - 1  # of whole numbers: seeds of numpy and torch, and more than any size here
UNKNOWN = object()  # stands where a value was refused, so that the others are still looked at


class ConfigError(ValueError):
    """A profile, arm, seed or path that cannot be; the message says what is allowed."""


@contextlib.contextmanager
def one_line(text):
    """Whatever a library raises in here becomes a ConfigError of one line.

    text: the message, with "{reason}" where the error's kind and words go. Too little memory stays
    what it is: others handle it.
    """
    try:
        yield
    except Exception as error:  # a library's own kinds are a dozen
        if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
            raise
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
        raise ConfigError(text.replace("{reason}", reason)) from None


def at_least(low, default=dataclasses.MISSING):
    """A field whose number must not be smaller; without a default it must be given."""
    return within(f"[{low}, inf)", default)


def within(interval, default=dataclasses.MISSING):
    """A field whose number must lie in an interval, written as in mathematics: "(0, 1]"."""
    return field(default=default, metadata={"interval": interval})


def one_of(*choices, default=dataclasses.MISSING):
    """A field that takes one of these values, or a tuple of them."""
    return field(default=default, metadata={"choices": choices})


def build(cls, values):
    """(an instance of a dataclass from a mapping, what was refused as a list of messages).

    Where a value was refused or is missing, the instance has UNKNOWN.
    """
    faults = []
    return _build(cls, values, "", faults), faults


def shown(value):
    """repr of any value, short: thousands of digits and nested aliases make a repr without end."""
    text = _SHORT.repr(value)
    return text if len(text) <= 100 else f"{text[:100]}…"


class _Short(reprlib.Repr):
    def repr_int(self, value, level):
        return super().repr_int(value, level) if abs(value) < 10**40 else "a number of many digits"


_SHORT = _Short()
_SHORT.maxstring = _SHORT.maxother = 60
_SHORT.maxlevel = 3


def _build(cls, values, where, faults):
    front, inside = (f"{where}: ", f"{where}.") if where else ("", "")
    if not isinstance(values, dict):
        faults.append(f"{front}expected keys of {cls.__name__.lower()}, not {shown(values)}")
        return UNKNOWN
    fields = {f.name: f for f in dataclasses.fields(cls)}
    unknown = [key for key in values if key not in fields]
    close = {key: difflib.get_close_matches(str(key)[:60], fields, 1) for key in unknown}
    faults += [
        f"{front}unknown key {shown(key)}: did you mean {close[key][0]}?"
        for key in unknown
        if close[key]
    ]
    if others := [shown(key) for key in unknown if not close[key]]:
        names = ", ".join(name for name, spec in fields.items() if not spec.metadata.get("ours"))
        faults.append(f"{front}unknown key {', '.join(others[:9])}: allowed: {names}")
    hints, out = typing.get_type_hints(cls), {}
    for key, spec in fields.items():
        if key in values:
            out[key] = _convert(hints[key], values[key], f"{inside}{key}", spec.metadata, faults)
        elif _must_be_given(spec):
            inner = dataclasses.fields(hints[key]) if dataclasses.is_dataclass(hints[key]) else ()
            needs = ", ".join(f.name for f in inner if _must_be_given(f))
            faults.append(f"{front}key {key!r} is missing" + (f" (with {needs})" if needs else ""))
            out[key] = UNKNOWN
    return cls(**out)


def _must_be_given(spec):
    return dataclasses.MISSING is spec.default is spec.default_factory


def _convert(hint, value, where, limits, faults):
    """The value as the hint wants it, or UNKNOWN with a message in `faults`."""
    if dataclasses.is_dataclass(hint):
        return _build(hint, value, where, faults)
    arguments = typing.get_args(hint)
    if isinstance(hint, types.UnionType):
        if value is None:
            return None
        inner = next(a for a in arguments if a is not type(None))
        return _convert(inner, value, where, limits, faults)
    if typing.get_origin(hint) is dict:
        if not isinstance(value, dict):
            faults.append(f"{where}: expected a mapping of names, not {shown(value)}")
            return UNKNOWN
        for name in value:
            if not (isinstance(name, str) and name.isidentifier()):
                faults.append(f"{where}: {shown(name)} must be a name of letters, digits and _")
        inner = arguments[1]
        return {n: _convert(inner, v, f"{where}.{n}", {}, faults) for n, v in value.items()}
    if typing.get_origin(hint) is tuple:
        if not isinstance(value, list):
            faults.append(f"{where}: expected a list, not {shown(value)}")
            return UNKNOWN
        each = {"interval": "[0, inf)"} if arguments[0] is int else limits
        items = tuple(_convert(arguments[0], v, where, each, faults) for v in value)
        if UNKNOWN in items:
            return UNKNOWN
        if len(set(items)) != len(items):
            faults.append(f"{where}: {shown(value)} names something twice")
        return items
    if hint is float and type(value) is int and abs(value) < 10**300:
        value = float(value)
    if fault := _fault(hint, value, limits):
        faults.append(f"{where}: {fault}")
        return UNKNOWN
    return value


def _fault(hint, value, limits):
    """What is wrong with a single value, or None."""
    if hint is float and type(value) in (int, float) and not abs(value) < 1e300:
        return f"must be finite, not {shown(value)}"
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        quoted = hint in (int, float) and isinstance(value, str) and value.strip("+-")[:1].isdigit()
        remedy = " (a number has no quotes)" if quoted else ""
        return f"expected {hint.__name__}, not {shown(value)}{remedy}"
    if hint is str and "\0" in value:
        return f"{shown(value)} holds a zero byte"
    if interval := limits.get("interval"):
        bounds = interval[1:-1].split(",")
        low, high = map(float, bounds)
        if interval[0] == "[" and value < low:
            return f"must be at least {bounds[0]}, not {shown(value)}"
        too_low = value < low or (value == low and interval[0] == "(")
        if too_low or value > high or (value == high and interval[-1] == ")"):
            return f"must lie in {interval}, not {shown(value)}"
    if hint is int and value > LARGEST:
        return f"must be at most {LARGEST}, not {shown(value)}"
    choices = limits.get("choices")
    if choices and value not in choices:
        return f"must be one of {', '.join(choices)}, not {shown(value)}"
    return None
