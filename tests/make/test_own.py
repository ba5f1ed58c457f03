"""A profile of one's own: the one in docs/profiles.md, and what `make profile` begins."""

import json
import os
import re
import resource
import subprocess
import sys

import pytest
import yaml

from neft_utils.base.files import ROOT
from neft_utils.base.profiles import Model
from neft_utils.base.read_profile import load_profile
from neft_utils.base.strict import ConfigError
from neft_utils.make.commands import main
from neft_utils.make.own import write_profile
from neft_utils.train.base_models import load_base, load_tokenizer

PAGE = (ROOT / "docs" / "profiles.md").read_text("utf-8")
WORDS = " ".join(path.read_text("utf-8") for path in sorted(ROOT.glob("docs/*.md"))).split()


def rows(count, longer=0):
    """Rows that are alike in nothing: words of docs/ in another order each."""
    texts = [" ".join(WORDS[n :: 401 + n % 7][:4]) for n in range(2 * count)]
    return [
        {
            "instruction": f"{n} {texts[2 * n]}?",
            "output": f"{texts[2 * n + 1]} {n}." + " a" * longer,
        }
        for n in range(count)
    ]


def save_model(folder):
    for part in (load_tokenizer(Model(source="nano")), load_base(Model(source="nano"), "bf16")):
        part.save_pretrained(folder)


def said(*arguments):
    assert main([str(one) for one in arguments]) == 0


@pytest.mark.wheels
def test_the_pages_profile_runs_as_it_stands(tmp_path, monkeypatch, capsys):
    """Literally, with a model and rows at the paths that it names."""
    (snippet,) = re.findall(r"```yaml\n(.*?)```", PAGE, re.S)
    (tmp_path / "mine.yaml").write_text(snippet, "utf-8")
    values = yaml.safe_load(snippet)
    wanted = values["data"]["train_rows"] + values["data"]["test_rows"]
    (tmp_path / values["data"]["path"]).write_text(json.dumps(rows(wanted + 150)), "utf-8")
    save_model(tmp_path / values["model"]["source"])
    monkeypatch.chdir(tmp_path)
    said("check", "--profile", "mine.yaml")
    found = capsys.readouterr().out
    assert f"train-s0 {values['data']['train_rows']}" in found and "test 100" in found
    said("plan", "--profile", "mine.yaml")
    found = capsys.readouterr().out
    assert "arm prompt_only: noise_alpha 5, seeds 0\n" in found and "neft_a15" not in found
    assert "estimated, not measured" in found


def test_a_profile_is_refused_at_once_and_before_torch_is_imported(tmp_path):
    """Twenty seconds a fault, one fault a time, was what a first profile took."""
    path = tmp_path / "mine.yaml"
    path.write_text("model: {source: m}\narms: {a: {noise_alpha: x}}\n", "utf-8")
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    for command in ("check", "plan", "reproduce"):
        code = f"import sys; from neft_utils.make.commands import main; main(['{command}',"
        code += " '--profile', sys.argv[1]]); print(sorted({'torch', 'transformers', 'snakemake'}"
        code += " & set(sys.modules)))"
        done = subprocess.run(
            [sys.executable, "-c", code, str(path)], cwd=ROOT, capture_output=True, text=True
        )
        assert done.stdout.strip() == "[]"
        (line,) = done.stderr.strip().splitlines()
        assert "arms.a.noise_alpha: expected float" in line and "key 'train' is missing" in line
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 3 * 3  # seconds


def test_make_profile_writes_sizes_that_fit(tmp_path, monkeypatch, capsys):
    (tmp_path / "rows.json").write_text(json.dumps([*rows(77), *rows(3, longer=900)]), "utf-8")
    save_model(tmp_path / "my model")
    monkeypatch.chdir(tmp_path)
    where = ("--name", "mine", "--model", "my model", "--rows", "rows.json")
    said("profile", "--profile", "nano", *where)
    text = (tmp_path / "mine.yaml").read_text("utf-8")
    assert "extends: nano" in text and "# train:" in text and "80 rows, median" in text
    mine, nano = load_profile("mine.yaml"), load_profile("nano")
    assert 'source: "my model"' in text or "source: my model" in text  # as it was given
    assert (
        mine.model.source == str(tmp_path / "my model")
        and mine.train == nano.train
        and mine.arms == nano.arms
    )
    total = mine.data.train_rows + mine.data.validation_rows + mine.data.test_rows
    assert 30 <= total <= 34 and mine.data.max_tokens < 400 and mine.data.max_tokens % 32 == 0
    capsys.readouterr()
    said("check", "--profile", "mine.yaml")
    assert f"test {mine.data.test_rows}, " in capsys.readouterr().out
    # What stands there as a comment is right when the mark is taken away.
    (tmp_path / "all.yaml").write_text(text.replace("# seeds:", "seeds:"), "utf-8")
    assert load_profile("all.yaml").seeds == nano.seeds
    with pytest.raises(ConfigError, match="mine.yaml exists: delete it, or give another NAME"):
        write_profile("mine", "nano")


@pytest.mark.parametrize(
    "name, base, rows_of, message",
    [
        ("cpu", "nano", None, "the built-in profile cpu has this name"),
        ("a/b", "nano", None, "give a name, no path"),
        ("", "nano", None, "give a name, no path"),
        ("..", "nano", None, "its name is that of a folder"),
        ("mine", "nanno", None, "no profile 'nanno'"),
        ("mine", "nano", [], "holds no rows"),
        ("mine", "nano", rows(6), "6 usable rows of at most"),
    ],
)
def test_make_profile_refuses_and_writes_nothing(
    tmp_path, monkeypatch, capsys, name, base, rows_of, message
):
    monkeypatch.chdir(tmp_path)
    arguments = ["profile", "--profile", base, "--name", name]
    if rows_of is not None:
        (tmp_path / "rows.json").write_text(json.dumps(rows_of), "utf-8")
        arguments += ["--rows", "rows.json"]
    assert main(arguments) == 1
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert message in line and not list(tmp_path.glob("*.yaml"))


@pytest.mark.parametrize("letters", ["latin-1", "ascii"])
def test_a_terminal_without_our_letters_is_no_reason_to_stop(tmp_path, letters):
    def plan(text):
        path = tmp_path / "mine.yaml"
        path.write_text(text, "utf-8")
        command = [sys.executable, "-m", "neft_utils", "plan", "--profile", str(path)]
        there = {"PYTHONIOENCODING": letters, "PYTHONUTF8": "0"}
        return subprocess.run(
            command, cwd=ROOT, env=os.environ | there, capture_output=True, encoding=letters
        )

    done = plan("extends: nano\ndescription: 'α ≥ 5 \u2026'\n")
    assert done.returncode == 0 and "profile mine: ? ? 5 ?\n" in done.stdout, done.stderr
    done = plan("extends: nano\narms: {'≥ 5': {}}\n")
    assert done.returncode == 1 and "'? 5' must be a name of letters" in done.stderr
    assert len(done.stderr.splitlines()) == 1
