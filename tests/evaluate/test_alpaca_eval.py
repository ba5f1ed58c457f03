"""AlpacaEval's prompts, put to a run and exported: own texts in the submission's layout."""

import json

import pandas as pd
import pytest
from tiny import Lab

from neft_utils.base.paths import BASE
from neft_utils.data.sources import DataError
from neft_utils.evaluate import alpaca_eval

TEXTS = ["Name a colour.", "Count to three.", "Say hello."]


@pytest.fixture
def submission(tmp_path, monkeypatch):
    """The prompts and reference answers, of our own."""
    folder = tmp_path / "alpaca_eval"
    folder.mkdir()
    rows = [{"instruction": text, "output_1": text.upper(), "preference": 1} for text in TEXTS]
    (folder / "annotations.json").write_text(json.dumps(rows), "utf-8")
    monkeypatch.setattr(alpaca_eval, "submission", lambda model, cache=None: folder)
    return folder


@pytest.fixture
def scored(submission, tmp_path, monkeypatch):
    """The nano base, asked the first two prompts; its run's folder."""
    asked = {"alpaca_eval_prompts": 2, "length_arm_prompts": 0, "stability_rows": 0}
    lab = Lab(tmp_path, monkeypatch, evaluate=asked).prepare()
    return lab.score(BASE)["scoring"].folder


def test_rows_have_the_reference_and_an_id_that_hides_the_text(submission):
    rows = alpaca_eval.rows(2)
    assert [row["prompt"] for row in rows] == TEXTS[:2]
    assert rows[0]["response"] == "NAME A COLOUR." and len(rows[0]["id"]) == 16
    assert len({row["id"] for row in alpaca_eval.rows()}) == 3


def test_answers_are_kept_apart_and_exported_in_alpacaevals_format(scored, tmp_path, capsys):
    answers = [json.loads(x) for x in (scored / "generations.jsonl").read_text().splitlines()]
    answers = pd.DataFrame(answers)
    ours = answers[answers.set == alpaca_eval.SET]
    assert ours.example_id.tolist() == [alpaca_eval.prompt_id(text) for text in TEXTS[:2]]
    assert "Name a colour" not in (scored / "generations.jsonl").read_text()
    scores = json.loads((scored / "scores.json").read_text())
    front = f"alpaca_eval/{ours.decoding.iloc[0]}/"
    assert any(name.startswith(front) for name in scores)
    assert alpaca_eval.main([str(scored), str(tmp_path / "out")]) == 0
    assert capsys.readouterr().out.startswith("2 answers in ")
    outputs = json.loads((tmp_path / "out" / "model_outputs.json").read_text())
    assert [one["instruction"] for one in outputs] == TEXTS[:2]
    assert [one["output"] for one in outputs] == ours.text.tolist()
    assert {one["generator"] for one in outputs} == {"base-s0"}


def test_a_run_that_was_not_asked_says_so(submission, tmp_path, capsys):
    run = tmp_path / "baseline-s0"
    run.mkdir()
    (run / "generations.jsonl").write_text('{"set": "test", "example_id": "1", "text": "x"}\n')
    with pytest.raises(DataError, match="set evaluate.alpaca_eval_prompts"):
        alpaca_eval.export(run, tmp_path / "out")
    assert alpaca_eval.main([str(run), str(tmp_path / "out")]) == 1
    assert capsys.readouterr().err.startswith("error: ") and not (tmp_path / "out").exists()
