"""Profiles are read strictly."""

import json

import pytest
import yaml

from neft_utils.base.paths import PROFILES
from neft_utils.base.profiles import Confirmatory
from neft_utils.base.read_profile import load_profile
from neft_utils.base.strict import ConfigError

NAMES = sorted(path.stem for path in PROFILES.glob("*.yaml"))
GOOD = yaml.safe_load((PROFILES / "nano.yaml").read_text("utf-8"))


def changed(path, value):
    """nano's YAML with one dotted key set, or removed when value is ...; as text."""
    values = json.loads(json.dumps(GOOD))
    *parents, key = path.split(".")
    at = values
    for parent in parents:
        at = at[parent]
    if value is ...:
        del at[key]
    else:
        at[key] = value
    return yaml.safe_dump(values)


@pytest.mark.parametrize("name", NAMES)
def test_every_profile_loads(name):
    profile = load_profile(name)
    assert profile.runs() and profile.name == name
    for arm, seed in profile.runs():
        profile.check_run(arm, seed)


def test_cpu_profile_is_the_promised_one():
    profile = load_profile("cpu")
    runs = profile.runs()
    assert {(a, s) for a, s in runs if a != "neft_a5"} == {
        (arm, seed) for arm in ("baseline", "neft_a15") for seed in (0, 1, 2)
    }
    assert [run for run in runs if run[0] == "neft_a5"] == [("neft_a5", 0)]
    assert profile.arms["baseline"].noise_alpha == 0
    assert profile.confirmatory == Confirmatory("neft_a15", "baseline", "test_nll")
    assert profile.evaluate.answer_prompts >= 32


BAD = [
    ("evaluate.shown_prompts", [" "], "shown_prompts: a prompt must not be empty"),
    ("evaluate.shown_prompts", "Why?", "expected a list, not 'Why?'"),
    ("train.learning_rat", 1.0, "unknown key 'learning_rat': did you mean learning_rate?"),
    ("colour", "red", "unknown key 'colour'"),
    ("train.epochs", "two", "epochs: expected int, not 'two'"),
    ("train.epochs", True, "epochs: expected int, not True"),
    ("train.epochs", 0, "epochs: must be at least 1, not 0"),
    ("train.learning_rate", "1e-3", "write 1.0e-3"),
    ("train", ..., "key 'train' is missing"),
    ("train", 3, "expected keys of train, not 3"),
    ("data.source", "web", "must be one of sharegpt, alpaca, json, nano, not 'web'"),
    ("model.base_weights", "int8", "must be one of nf4, nf4_dequantized, bf16"),
    ("arms.neft_a15.noise_alpha", -1, "noise_alpha: must be at least 0.0, not -1.0"),
    ("arms.neft_a15.noise_alpha", float("nan"), "noise_alpha: must be finite, not nan"),
    ("arms.neft_a15.noise_alpha", float("inf"), "noise_alpha: must be finite, not inf"),
    ("arms.neft_a15.where", "middle", "must be one of all, prompt, response"),
    ("arms", {}, "arms must name at least one arm"),
    ("arms", [], "arms: expected a mapping"),
    ("arms", {"base": {"noise_alpha": 0}}, "none may be 'base'"),
    ("arms", {"my arm": {"noise_alpha": 0}}, "'my arm' must be a name"),
    ("seeds", [], "at least one seed"),
    ("seeds", [0, 0], "names something twice"),
    ("seeds", [-1], "must be at least 0"),
    ("seeds", 3, "seeds: expected a list"),
    ("confirmatory.treatment", "neft_a5", "'neft_a5' is no arm: use baseline, neft_a15"),
    ("confirmatory.metric", "accuracy", "must be one of test_nll"),
    ("train.micro_batch_tokens", 3, "must be at least 16"),
    ("name", "other", "the file's name is the name"),
    ("arms.neft_a15.control", "plain", "control: 'plain' is no arm: use baseline, neft_a15"),
    ("arms.neft_a15.data_fraction", 0, "data_fraction: 0 must lie in (0, 1]"),
    ("arms.neft_a15.data_fraction", 1.5, "data_fraction: 1.5 must lie in (0, 1]"),
    ("evaluate.benchmarks", ["mmlu"], "must be one of openbookqa, siqa, asdiv, mtbench, gsm8k"),
    ("evaluate.verifiable_per_family", 9, "9 needs 27 test rows, data.test_rows is 12"),
    ("evaluate.judge", {"modell": "x"}, "unknown key 'modell': did you mean model?"),
    ("model.base_weights", "nf4", "use base_weights nf4_dequantized or bf16"),
    ("margins", {"arithmetic": 0}, "margins.arithmetic: 0 must be positive"),
    ("confirmatory.control", "neft_a15", "treatment and control are both neft_a15"),
    ("arms.neft_a15.seeds", [7], "neft_a15 and baseline share no seed"),
    ("evaluate.answer_seeds", [5], "answer_seeds: no run has seed 5: use 0, 1"),
    ("evaluate.repetition_penalty", 1.0, "with repetition_penalty 1 all prompts"),
    ("train.method", "full", "full trains every weight"),
    ("train.method", "qlora", "must be one of lora, full"),
]


@pytest.mark.parametrize("path, value, message", BAD)
def test_a_bad_value_is_one_line_that_names_it(tmp_path, path, value, message):
    file = tmp_path / "mine.yaml"
    file.write_text(changed(path, value), "utf-8")
    with pytest.raises(ConfigError) as caught:
        load_profile(file)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value) and "mine.yaml" in str(caught.value)


@pytest.mark.parametrize(
    "text, message",
    [
        ("a: [1", "is not YAML"),
        ("- 1\n", "must be a mapping"),
        ("", "must be a mapping"),
    ],
)
def test_a_file_that_is_no_profile(tmp_path, text, message):
    file = tmp_path / "mine.yaml"
    file.write_text(text, "utf-8")
    with pytest.raises(ConfigError, match=message):
        load_profile(file)


def test_unknown_profile_arm_and_seed_say_what_there_is():
    with pytest.raises(ConfigError, match="no profile 'cpuu': use one of .*cpu, "):
        load_profile("cpuu")
    profile = load_profile("nano")
    with pytest.raises(ConfigError, match="no arm 'neft': it has base, baseline, neft_a15"):
        profile.check_run("neft", 0)
    with pytest.raises(ConfigError, match="no seed 7 for baseline: it has 0, 1"):
        profile.check_run("baseline", 7)
    with pytest.raises(ConfigError, match="no seed 1 for base: it has 0"):
        profile.check_run("base", 1)


def test_an_arm_changes_the_recipe_and_nothing_else(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text(changed("arms.neft_a15.lora_dropout", 0.5), "utf-8")
    profile = load_profile(file)
    assert profile.recipe("neft_a15").lora_dropout == 0.5
    assert profile.recipe("baseline") == profile.train
