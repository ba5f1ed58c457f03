"""Plain values from YAML into frozen dataclasses, strictly.

A field's type hint says what it takes; its metadata, set by `at_least` and `one_of`, what range
or choice. Whatever does not fit is a ConfigError of one line that names key, value and remedy.
"""

import dataclasses
import difflib
import math
import types
import typing
from dataclasses import field


class ConfigError(ValueError):
    """A profile, arm, seed or path that cannot be; the message says what is allowed."""


def at_least(low, default=dataclasses.MISSING):
    """A field whose number must not be smaller; without a default it must be given."""
    return field(default=default, metadata={"low": low})


def one_of(*choices, default=dataclasses.MISSING):
    """A field that takes one of these values, or a tuple of them."""
    return field(default=default, metadata={"choices": choices})


def build(cls, values, where):
    """An instance of a dataclass from a mapping; where: what messages call its place."""
    if not isinstance(values, dict):
        raise ConfigError(f"{where}: expected keys of {cls.__name__.lower()}, not {values!r}")
    fields = {f.name: f for f in dataclasses.fields(cls)}
    for key in values:
        if key not in fields:
            close = difflib.get_close_matches(str(key), fields, 1)
            hint = f"did you mean {close[0]}? " if close else ""
            raise ConfigError(f"{where}: unknown key {key!r}: {hint}allowed: {', '.join(fields)}")
    hints = typing.get_type_hints(cls)
    out = {}
    for key, spec in fields.items():
        if key in values:
            out[key] = _convert(hints[key], values[key], f"{where}: {key}", spec.metadata)
        elif dataclasses.MISSING is spec.default is spec.default_factory:
            raise ConfigError(f"{where}: key {key!r} is missing")
    return cls(**out)


def _convert(hint, value, where, limits):
    if dataclasses.is_dataclass(hint):
        return build(hint, value, where)
    arguments = typing.get_args(hint)
    if isinstance(hint, types.UnionType):
        if value is None:
            return None
        return _convert(next(a for a in arguments if a is not type(None)), value, where, limits)
    if typing.get_origin(hint) is dict:
        if not isinstance(value, dict):
            raise ConfigError(f"{where}: expected a mapping of names, not {value!r}")
        for name in value:
            if not (isinstance(name, str) and name.isidentifier()):
                raise ConfigError(f"{where}: {name!r} must be a name of letters, digits and _")
        return {n: _convert(arguments[1], v, f"{where}.{n}", {}) for n, v in value.items()}
    if typing.get_origin(hint) is tuple:
        if not isinstance(value, list):
            raise ConfigError(f"{where}: expected a list, not {value!r}")
        each = {"low": 0} if arguments[0] is int else limits
        items = tuple(_convert(arguments[0], v, where, each) for v in value)
        if len(set(items)) != len(items):
            raise ConfigError(f"{where}: {value!r} names something twice")
        return items
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        hint_1e = " (YAML reads 1e-3 as text: write 1.0e-3)" if hint is float else ""
        raise ConfigError(f"{where}: expected {hint.__name__}, not {value!r}{hint_1e}")
    if hint is float and not math.isfinite(value):
        raise ConfigError(f"{where}: must be finite, not {value!r}")
    low, choices = limits.get("low"), limits.get("choices")
    if low is not None and value < low:
        raise ConfigError(f"{where}: must be at least {low}, not {value!r}")
    if choices and value not in choices:
        raise ConfigError(f"{where}: must be one of {', '.join(choices)}, not {value!r}")
    return value
