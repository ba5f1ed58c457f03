"""Profiles from YAML files, read strictly: what does not fit is one line with key and remedy."""

from pathlib import Path

import yaml

from neft_utils.base.paths import BASE, PROFILES, located
from neft_utils.base.profiles import Profile
from neft_utils.base.strict import ConfigError, build

# ------------------------------------------------------------------------- strict reading


def load_profile(profile):
    """Profile from a name in notebooks/profiles/ or the path of a YAML file."""
    text = str(profile)
    path = Path(text) if text.endswith((".yaml", ".yml")) else PROFILES / f"{text}.yaml"
    if not path.is_file():
        names = ", ".join(sorted(p.stem for p in PROFILES.glob("*.yaml")))
        raise ConfigError(f"no profile {text!r}: use one of {names}, or the path of a YAML file")
    try:
        values = yaml.safe_load(path.read_text("utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path.name} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path.name} must be a mapping of keys, not {type(values).__name__}")
    if "name" in values:
        raise ConfigError(f"{path.name}: key name is not allowed, the file's name is the name")
    values = located(values, path.resolve().parent)
    loaded = build(Profile, {**values, "name": path.stem}, path.name)
    _check_consistency(loaded, path.name)
    return loaded


def _check_consistency(profile, where):
    if not profile.arms or BASE in profile.arms:
        raise ConfigError(f"{where}: arms must name at least one arm, and none may be {BASE!r}")
    if not profile.seeds:
        raise ConfigError(f"{where}: seeds must name at least one seed")
    for role in ("treatment", "control"):
        arm = getattr(profile.confirmatory, role)
        if arm not in profile.arms:
            names = ", ".join(profile.arms)
            raise ConfigError(f"{where}: confirmatory.{role}: {arm!r} is no arm: use {names}")
    for name, arm in profile.arms.items():
        if arm.control is not None and arm.control not in profile.arms:
            names = ", ".join(profile.arms)
            raise ConfigError(
                f"{where}: arms.{name}.control: {arm.control!r} is no arm: use {names}"
            )
        if not 0 < arm.data_fraction <= 1:
            raise ConfigError(
                f"{where}: arms.{name}.data_fraction: {arm.data_fraction:g} must lie in (0, 1]"
            )
    pair = profile.confirmatory
    if pair.treatment == pair.control:
        raise ConfigError(f"{where}: confirmatory: treatment and control are both {pair.control}")
    if not set(profile.seeds_of(pair.treatment)) & set(profile.seeds_of(pair.control)):
        raise ConfigError(
            f"{where}: confirmatory: {pair.treatment} and {pair.control} share no seed, so"
            " nothing can be paired"
        )
    if profile.train.method == "full" and profile.model.base_weights != "bf16":
        raise ConfigError(
            f"{where}: train.method: full trains every weight, which a 4-bit base has rounded"
            " away: use base_weights bf16"
        )
    asked = profile.evaluate
    for name in ("answer_seeds", "secondary_seeds"):
        if unknown := sorted(set(getattr(asked, name) or ()) - set(profile.all_seeds())):
            have = ", ".join(map(str, profile.all_seeds()))
            raise ConfigError(f"{where}: evaluate.{name}: no run has seed {unknown[0]}: use {have}")
    if asked.answer_prompts_without_penalty and asked.repetition_penalty == 1:
        raise ConfigError(
            f"{where}: evaluate.answer_prompts_without_penalty: with repetition_penalty 1 all"
            " prompts are answered without: use 0"
        )
    if asked.stability_rows and profile.model.base_weights == "nf4":
        raise ConfigError(
            f"{where}: evaluate.stability_rows: {asked.stability_rows} needs weights that can be"
            " changed and restored: use base_weights nf4_dequantized or bf16, or 0"
        )
    if 3 * asked.verifiable_per_family > profile.data.test_rows:  # a prompt of its own for each
        raise ConfigError(
            f"{where}: evaluate.verifiable_per_family: {asked.verifiable_per_family} needs"
            f" {3 * asked.verifiable_per_family} test rows, data.test_rows is"
            f" {profile.data.test_rows}"
        )
    if any(not prompt.strip() for prompt in asked.shown_prompts):
        raise ConfigError(f"{where}: evaluate.shown_prompts: a prompt must not be empty")
    for name, margin in profile.margins.items():
        if margin <= 0:
            raise ConfigError(f"{where}: margins.{name}: {margin:g} must be positive")
