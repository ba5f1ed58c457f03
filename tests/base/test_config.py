"""Profiles are read strictly."""

import dataclasses
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
    pairs = {(arm, seed) for arm in ("baseline", "neft_a15") for seed in (0, 1, 2)}
    assert set(profile.runs()) == pairs
    assert profile.arms["baseline"].noise_alpha == 0
    assert profile.confirmatory == Confirmatory("neft_a15", "baseline")
    assert profile.data.test_rows >= 400 and profile.evaluate.answer_prompts >= 96


BAD = [
    ("evaluate.shown_prompts", [" "], "shown_prompts: a prompt must not be empty"),
    ("evaluate.shown_prompts", "Why?", "expected a list, not 'Why?'"),
    ("train.learning_rat", 1.0, "unknown key 'learning_rat': did you mean learning_rate?"),
    ("colour", "red", "unknown key 'colour'"),
    ("train.epochs", "two", "epochs: expected int, not 'two'"),
    ("train.epochs", True, "epochs: expected int, not True"),
    ("train.epochs", 0, "epochs: must be at least 1, not 0"),
    ("train.validate_epochs", 9, "validate_epochs: 9 is longer than the 2 epochs of arm baseline"),
    ("train.learning_rate", "0.001", "expected float, not '0.001' (a number has no quotes)"),
    ("train.learning_rate", 0, "learning_rate: must lie in (0, 1], not 0.0"),
    ("train.learning_rate", 1.5, "learning_rate: must lie in (0, 1], not 1.5"),
    ("arms.neft_a15.learning_rate", 0, "learning_rate: must lie in (0, 1], not 0.0"),
    ("train.lora_dropout", 1, "lora_dropout: must lie in [0, 1), not 1.0"),
    ("train.lora_dropout", 5.0, "lora_dropout: must lie in [0, 1), not 5.0"),
    ("arms.neft_a15.lora_dropout", 1.0, "lora_dropout: must lie in [0, 1), not 1.0"),
    ("train.lora_dropout", -0.1, "lora_dropout: must be at least 0, not -0.1"),
    ("train.warmup_fraction", 1.01, "warmup_fraction: must lie in [0, 1], not 1.01"),
    ("arms.neft_a15.noise_alpha", 1e30, "noise_alpha: must lie in [0.0, 1e6], not 1e+30"),
    ("seeds", [2**32], "seeds: must be at most 4294967295, not 4294967296"),
    ("arms.neft_a15.seeds", [2**32], "arms.neft_a15.seeds: must be at most 4294967295"),
    ("data.split_seed", 2**40, "data.split_seed: must be at most 4294967295"),
    ("train.batch_size", 10**30, "batch_size: must be at most 4294967295"),
    ("train.epochs", 10**80, "epochs: must be at most 4294967295, not a number of many digits"),
    ("train.learning_rate", 10**400, "learning_rate: must be finite, not a number of many digits"),
    ("model.source", "a\0b", "model.source: 'a\\x00b' holds a zero byte"),
    ("data.source", "json", "data.path: source json needs `path`"),
    ("arms.neft_a15.data_fraction", 0.01, "data_fraction: 0.01 of data.train_rows 16 is no row"),
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
    ("confirmatory.metrics", ["accuracy"], "must be one of answer_length, end_nll, content_nll"),
    ("train.micro_batch_tokens", 3, "must be at least 16"),
    ("name", "other", "the file's name is the name"),
    ("arms.neft_a15.control", "plain", "control: 'plain' is no arm: use baseline, neft_a15"),
    ("arms.neft_a15.data_fraction", 0, "data_fraction: must lie in (0, 1], not 0.0"),
    ("arms.neft_a15.data_fraction", 1.5, "data_fraction: must lie in (0, 1], not 1.5"),
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


def own(folder, text, name="mine"):
    """Path of a profile with this text."""
    path = folder / f"{name}.yaml"
    path.write_text(text, "utf-8")
    return path


def refusal(path):
    """The one line with which a profile is refused."""
    with pytest.raises(ConfigError) as caught:
        load_profile(path)
    line = str(caught.value)
    assert path.name in line and "\n" not in line and len(line) < 3000
    return line


@pytest.mark.parametrize(
    "old, new, message",
    [
        ("seeds: [0, 1]", "seeds: [2020-99-99]", "seeds: expected int, not '2020-99-99'"),
        ("seeds: [0, 1]", "seeds: [2020-01-01]", "seeds: expected int, not '2020-01-01'"),
        ("seeds: [0, 1]", "seeds: [1:30]", "seeds: expected int, not '1:30'"),
        ("seeds: [0, 1]", f"seeds: [{'9' * 5000}]", "line 10, seeds: 99999999999999999999…"),
        ("seeds: [0, 1]", f"seeds: [0x{'f' * 5000}]", "not a number of many digits"),
        ("seeds: [0, 1]", "seeds: [!!int x]", "line 10, seeds: 'x' is no int"),
        ("epochs: 2", f"epochs: {'1' * 4301}", "line 4, train.epochs: 1111"),
        ("epochs: 2", "epochs: !!float x", "line 4, train.epochs: 'x' is no float"),
        ("epochs: 2", "epochs: !!timestamp 2020-99-99", "line 4, train.epochs: '2020-99-99' is no"),
        ("epochs: 2", "epochs: !!python/object:os.system x", "is not YAML: could not determine"),
        ("epochs: 2", "epochs: 2, epochs: 3", "line 4: key 'epochs' is given twice, first in line"),
        ("seeds: [0, 1]", "seeds: [0]\nseeds: [5]", "line 11: key 'seeds' is given twice"),
        ("1.0e-2", "1e-3e", "train.learning_rate: expected float, not '1e-3e'"),
        ("1.0e-2", "1.2.3", "train.learning_rate: expected float, not '1.2.3'"),
        ("1.0e-2", f"1{'0' * 400}", "learning_rate: must be finite"),
        ("1.0e-2", "1e999", "learning_rate: must be finite, not inf"),
        ("1.0e-2", ".nan", "learning_rate: must be finite, not nan"),
        ("seeds: [0, 1]", f"seeds: {'[' * 3000}", "nested too deeply"),
        ("description:", "? [1, 2]\n: 3\ndescription:", "line 1: a key must be a name"),
    ],
)
def test_odd_yaml_names_the_place(tmp_path, old, new, message):
    text = (PROFILES / "nano.yaml").read_text("utf-8")
    assert old in text
    assert message in refusal(own(tmp_path, text.replace(old, new, 1)))


def test_aliases_of_aliases_are_refused_in_a_short_line(tmp_path):
    levels = "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 30))
    assert "unknown key 'a0', 'a1'" in refusal(own(tmp_path, f"a0: &a0 [x]\n{levels}"))
    bomb = own(tmp_path, f"description: &a0 [x]\n{levels}seeds: *a29\n")
    assert "seeds: expected int" in refusal(bomb)


def test_of_very_many_faults_some_are_named_and_the_others_counted(tmp_path):
    nano = (PROFILES / "nano.yaml").read_text("utf-8")
    line = refusal(own(tmp_path, nano.replace("[0, 1]", f"[{'a, ' * 5000} 1]")))
    assert "seeds: expected int, not 'a'" in line and line.endswith("and 4970 more")


@pytest.mark.parametrize(
    "text, number", [("1e-3", 0.001), ("1E-3", 0.001), ("5e-1", 0.5), (".5", 0.5), ("1", 1.0)]
)
def test_numbers_are_read_as_people_write_them(tmp_path, text, number):
    nano = (PROFILES / "nano.yaml").read_text("utf-8")
    path = own(tmp_path, nano.replace("1.0e-2", text).replace("[0, 1]", "[010, 1_000, 0x10]"))
    loaded = load_profile(path)
    assert loaded.train.learning_rate == number and type(loaded.train.learning_rate) is float
    assert loaded.seeds == (10, 1000, 16)


def test_all_that_is_missing_or_wrong_is_said_at_once(tmp_path):
    """A first profile, with a model, rows and arms, and without all else."""
    line = refusal(
        own(
            tmp_path,
            "model: {source: m, base_wieghts: nf4}\n"
            "data: {source: json, path: rows.json, max_tokens: 5}\n"
            "arms: {baseline: {noise_alpha: -1}, neft_a5: {noise_alpha: 5, where: prompts}}\n"
            "confirmatory: {treatment: neft_a15, control: baseline}\n"
            "evaluate: {benchmarks: [mmlu]}\n",
        )
    )
    for words in (
        "model: unknown key 'base_wieghts': did you mean base_weights?",
        "data.max_tokens: must be at least 16, not 5",
        "key 'train' is missing (with learning_rate, epochs)",
        "key 'seeds' is missing",
        "arms.baseline.noise_alpha: must be at least 0.0, not -1.0",
        "arms.neft_a5.where: must be one of all, prompt, response, not 'prompts'",
        "confirmatory.treatment: 'neft_a15' is no arm: use baseline, neft_a5",
        "evaluate.benchmarks: must be one of",
        "begins with extends: cpu",
    ):
        assert words in line
    assert line.count("mine.yaml") == 1 and "description" not in line


EXTENDS = "extends: {base}\nseeds: [3]\nevaluate: {{answer_seeds: [3], secondary_seeds: [3]}}\n"


def test_a_profile_names_only_what_differs(tmp_path):
    path = own(
        tmp_path,
        "extends: cpu\n"
        "model: {source: some/folder}\n"
        "train: {learning_rate: 1e-4}\n"
        "arms: {neft_a5: null, neft_a30: {noise_alpha: 30}, baseline: {noise_alpha: 0}}\n"
        "margins: {arithmetic: null}\n",
    )
    cpu, mine = load_profile("cpu"), load_profile(path)
    assert list(mine.arms) == ["baseline", "neft_a15", "neft_a30"]
    assert mine.train == dataclasses.replace(cpu.train, learning_rate=1e-4)
    assert mine.margins == {"knowledge": 0.05}
    assert (mine.data, mine.evaluate, mine.seeds) == (cpu.data, cpu.evaluate, cpu.seeds)
    assert mine.model == dataclasses.replace(cpu.model, source="some/folder")
    assert cpu.speed.measured and not mine.speed.measured  # not with this model
    assert "cpu" in mine.description and "SmolLM2" not in mine.description


def test_a_profile_extends_one_of_ones_own_and_the_path_is_from_the_file(tmp_path, monkeypatch):
    (tmp_path / "below").mkdir()
    own(tmp_path / "below", EXTENDS.format(base="cpu"), "first")
    second = own(tmp_path, "extends: below/first.yaml\ntrain: {epochs: 7}\n", "second")
    monkeypatch.chdir("/")
    loaded = load_profile(second)
    assert (loaded.seeds, loaded.train.epochs, loaded.name) == ((3,), 7, "second")


def test_another_model_or_other_rows_do_not_keep_the_commit_of_those_before(tmp_path):
    text = "extends: llama2-7b-alpaca-qlora\nmodel: {source: owner/other}\n"
    text += "data: {source: json, path: rows.json}\n"
    base, mine = load_profile("llama2-7b-alpaca-qlora"), load_profile(own(tmp_path, text))
    assert base.model.revision and base.data.revision
    assert mine.model.revision is None and mine.data.revision is None
    assert mine.data.path == "rows.json"


@pytest.mark.parametrize(
    "text, message",
    [
        ("extends: cpuu\n", "mine.yaml: extends: no profile 'cpuu': use one of"),
        ("extends: gone.yaml\n", "mine.yaml: extends: no profile"),
        ("extends: mine.yaml\n", "extends: mine.yaml leads back to itself"),
        ("extends: [cpu]\n", "extends: give a profile's name or path, not ['cpu']"),
        ("extends: cpu\nsedes: [0]\n", "unknown key 'sedes': did you mean seeds?"),
        ("extends: cpu\narms: 3\n", "arms: expected a mapping of names, not 3"),
        ("extends: cpu\narms: {a: {noise_alpha: 1}, baseline: null}\n", "'baseline' is no arm"),
    ],
)
def test_what_extends_wrongly(tmp_path, text, message):
    assert message in refusal(own(tmp_path, text))


@pytest.mark.parametrize("name", ["cpu", "CPU", "smoke", "nano", "llama2-7b-alpaca-full"])
def test_a_built_in_profiles_name_is_refused(tmp_path, name):
    line = refusal(own(tmp_path, (PROFILES / "nano.yaml").read_text("utf-8"), name))
    assert f"the built-in profile {name.lower()} has this name" in line and "rename" in line
    loaded = load_profile(PROFILES / f"{name.lower()}.yaml")  # the built-in one by its path
    assert loaded == load_profile(name.lower())


@pytest.mark.parametrize("name", [".", "..", ".hidden", " mine", "a\nb", "a\x1b[31m"])
def test_a_name_that_leads_out_of_its_folder_is_refused(tmp_path, name):
    with pytest.raises(ConfigError, match="its name is that of a folder") as caught:
        load_profile(own(tmp_path, (PROFILES / "nano.yaml").read_text("utf-8"), name))
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("name", ["007", "a b", "1e3", "true", "null", "-x", "ß", "2020-01-01"])
def test_odd_names_are_names(tmp_path, name):
    path = own(tmp_path, (PROFILES / "nano.yaml").read_text("utf-8"), name)
    assert load_profile(path).name == name


def test_unknown_profile_arm_and_seed_say_what_there_is():
    said = r"no profile 'cpuu': use one of .*cpu, .* \(did you mean cpu\?\)"
    with pytest.raises(ConfigError, match=said):
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
