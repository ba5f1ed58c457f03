"""Rows that spell a special token are dropped, by notebook 1 and by `make check` alike."""

import json

import pytest
from cells import run_cells
from tiny import Lab

from neft_utils.base.profiles import Model
from neft_utils.data.special_tokens import spells_no_special_token
from neft_utils.make.rows import check_rows
from neft_utils.train.base_models import load_tokenizer

NAME = "no special token spelled out"


def test_a_text_that_spells_a_special_token_is_one_to_the_tokenizer():
    """What the filter is there for: without it an answer would hold two ends of turn."""
    tokenizer = load_tokenizer(Model(source="nano"))
    keeps, mark = spells_no_special_token(tokenizer), tokenizer.eos_token
    ids = tokenizer(f"one {mark} two", add_special_tokens=False)["input_ids"]
    assert tokenizer.eos_token_id in ids
    assert keeps({"prompt": "a", "response": "<b> | end"})
    assert not keeps({"prompt": "a", "response": f"one {mark} two"})
    assert not keeps({"prompt": f"{mark} is what?", "response": "b"})


@pytest.mark.parametrize("place", ["prompt", "response"])
def test_such_rows_are_dropped_and_counted(tmp_path, monkeypatch, place):
    tokenizer = load_tokenizer(Model(source="nano"))
    rows = [
        {"prompt": f"What is {i} and {i * 7}?", "response": f"It is {i * 8}."} for i in range(99)
    ]
    for row in rows[:5]:
        row[place] += f" {tokenizer.eos_token}"
    (tmp_path / "rows.json").write_text(json.dumps(rows), "utf-8")
    data = {"source": "json", "path": str(tmp_path / "rows.json"), "ood_rows": 0}
    lab = Lab(tmp_path, monkeypatch, data=data, evaluate={"verifiable_per_family": 0})
    run_cells(1, PROFILE=str(lab.file), OUT=lab.paths.out)
    manifest = json.loads((lab.paths.results / "manifest.json").read_text("utf-8"))
    steps = [step["step"] for step in manifest["funnel"]]
    at = steps.index(NAME)
    left = [step["rows"] for step in manifest["funnel"]]
    assert left[at - 1] - left[at] == 5
    said = next(line for line in check_rows(lab.profile, tokenizer) if NAME in line)
    assert said.split() == [*NAME.split(), "drops", "5"]
