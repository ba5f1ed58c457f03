"""Profiles from YAML files, read strictly: all that does not fit is one line with keys and remedy.

`extends: cpu` takes another profile for what the file does not name.
"""

import difflib
from pathlib import Path

from neft_utils.base.consistency import faults_between
from neft_utils.base.files import check_code
from neft_utils.base.paths import PROFILES, is_path, located
from neft_utils.base.profiles import Profile
from neft_utils.base.strict import ConfigError, build, shown
from neft_utils.base.yaml_text import read_yaml

MANY = 30  # faults that are named, more are counted
_NAMED = ("arms", "margins")  # mappings of names that the user chooses: null takes one away
_SECTIONS = ("model", "data", "train", "evaluate", "confirmatory", "speed", *_NAMED)


def load_profile(profile):
    """Profile from a name in notebooks/profiles/ or the path of a YAML file.

    Raises ConfigError of one line that names every missing, unknown and impossible value.
    """
    check_code()
    path = find_profile(profile)
    check_name(path)
    values = _merged(path, ())
    if "name" in values:
        raise ConfigError(f"{path.name}: key name is not allowed, the file's name is the name")
    loaded, faults = build(Profile, {**values, "name": path.stem})
    faults += faults_between(loaded, bool(faults))
    if any(" is missing" in fault for fault in faults) and "extends" not in read_yaml(path):
        faults.append("a profile names only what differs where it begins with extends: cpu")
    if faults:
        more = len(faults) - MANY
        faults = faults[:MANY] + ([f"and {more} more"] if more > 0 else [])
        raise ConfigError(f"{path.name}: {'; '.join(faults)}")
    return loaded


def find_profile(profile):
    """Path of the file of a profile; ConfigError where there is none."""
    text = str(profile)
    path = Path(text).expanduser() if is_path(text) else PROFILES / f"{text}.yaml"
    if path.is_file() and "\0" not in text:
        return path
    names = sorted(p.stem for p in PROFILES.glob("*.yaml"))
    close = difflib.get_close_matches(text, names, 1)
    hint = f" (did you mean {close[0]}?)" if close else ""
    raise ConfigError(
        f"no profile {text!r}: use one of {', '.join(names)}, or the path of a YAML file{hint}"
    )


def is_built_in(path):
    """Whether a profile's file lies in notebooks/profiles."""
    return Path(path).resolve().parent == PROFILES.resolve()


def check_name(path):
    """Raise ConfigError for a file whose name cannot be that of a folder of results of its own."""
    name = path.stem
    if is_built_in(path):
        return
    taken = {own.stem.casefold(): own.stem for own in PROFILES.glob("*.yaml")}
    if name.casefold() in taken:
        raise ConfigError(
            f"{path.name}: the built-in profile {taken[name.casefold()]} has this name, and both"
            f" would write into one folder: rename the file, for instance to my-{name}.yaml"
        )
    if name.startswith(".") or name != name.strip() or not name.isprintable():
        raise ConfigError(
            f"{path.name!r}: its name is that of a folder of results: let it begin with a letter"
            " or digit and hold no line breaks"
        )


def _merged(path, seen):
    """Values of a file over those of the profile that it extends."""
    values = read_yaml(path)
    if not isinstance(values, dict):
        raise ConfigError(f"{path.name} must be a mapping of keys, not {type(values).__name__}")
    values = located(values, path.resolve().parent)
    if "extends" not in values:
        return values
    base = values.pop("extends")
    if not isinstance(base, str):
        raise ConfigError(f"{path.name}: extends: give a profile's name or path, not {shown(base)}")
    beside = path.parent / base if is_path(base) and not base.startswith("~") else base
    try:
        file = find_profile(beside)
    except ConfigError as error:
        raise ConfigError(f"{path.name}: extends: {error}") from None
    if file.resolve() in [one.resolve() for one in (*seen, path)]:
        raise ConfigError(f"{path.name}: extends: {base} leads back to itself")
    return _over(_merged(file, (*seen, path)), values, file.stem)


def _over(base, own, name):
    """A profile's values over those of the one that it extends."""
    out = {key: value for key, value in base.items() if key != "description"}
    out["description"] = f"Profile {name} with another {', another '.join(own) or 'name'}."
    for key, value in own.items():
        if (
            key not in _SECTIONS
            or not isinstance(value, dict)
            or not isinstance(base.get(key), dict)
        ):
            out[key] = value
            continue
        section = dict(base[key])
        if key in ("model", "data") and {"source", "path"} & set(value):
            for of_the_other in ("revision", "path"):  # of another model, other rows
                section.pop(of_the_other, None)
        section |= value
        if key in _NAMED:
            section = {one: change for one, change in section.items() if change is not None}
        out[key] = section
    # Speeds that were measured with another model, or on another device, were not with this one.
    measured = out.get("speed")
    if {"model", "data", "device"} & set(own) and "speed" not in own and isinstance(measured, dict):
        out["speed"] = {**measured, "measured": False}
    return out
