"""Notebook 07 with a reader's own model and rows: from a folder, from a hub, and given wrongly."""

import json
import os
import subprocess
import sys

import pytest
from cells import run_cells
from loopback import COMMIT, hub

from neft_utils.base.files import ROOT
from neft_utils.base.profiles import Model
from neft_utils.train.folders import model_folder

FROM_HUB = """
import sys
from cells import run_cells
names = run_cells(7, PROFILE="nano", MODEL=sys.argv[1], REVISION=sys.argv[2], SEEDS=[0])
print(type(names["tuned"]).__name__, len(names["table"]), names["found"].n_seeds)
"""


@pytest.fixture
def rows(tmp_path):
    """A file of eight rows in Alpaca's columns."""
    made = [{"instruction": f"Say {n} in words.", "output": f"{n} is a number."} for n in range(8)]
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(made), "utf-8")
    return path


def test_a_folder_and_rows_of_ones_own_end_in_an_interval(rows, capsys):
    folder = str(model_folder(Model(source="nano"), "bf16"))
    names = run_cells(7, PROFILE="nano", MODEL=folder, ROWS=str(rows))
    assert len(names["held_out"]) == 3 and len(names["train_rows"]) == 5
    table, found = names["table"], names["found"]
    assert table.groupby("seed").size().tolist() == [3, 3]
    assert found.n_seeds == 2 and found.ci_low < found.estimate < found.ci_high
    assert found.estimate == pytest.approx(table.delta.mean())
    said = capsys.readouterr().out
    assert "95 % interval" in said and "AFTER" in said
    # The same models, loaded from their folders, on the same rows.
    again = names["comparison"].rows
    assert again.test_nll.to_numpy() == pytest.approx(table.delta.to_numpy(), abs=2e-3)
    assert again.n_tokens.unique().size == 1 and "over 2 pairs of models and 3 rows" in said
    first = names["train_one"](0, 0)[0], names["train_one"](0, 0)[0]
    assert first[0] == first[1]  # the same seed without noise: the same losses to the last bit


def test_a_hub_id_with_its_commit_is_taken_as_it_is(tmp_path):
    folder = model_folder(Model(source="nano"), "bf16")
    with hub({("models", "owner/name"): folder}) as (address, asked):
        done = subprocess.run(
            [sys.executable, "-c", FROM_HUB, "owner/name", COMMIT],
            env={
                **os.environ,
                "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}",
                "MPLBACKEND": "agg",
                "HF_ENDPOINT": address,
                "HF_HOME": str(tmp_path),
                "HF_HUB_DISABLE_XET": "1",
                "HF_HUB_DISABLE_TELEMETRY": "1",
            },
            capture_output=True,
            text=True,
            timeout=300,
        )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.splitlines()[-1] == "PeftModelForCausalLM 12 1"
    assert any("model.safetensors" in path for path in asked)


@pytest.mark.parametrize(
    "given, words",
    [
        ({"MODEL": "./no/such/folder"}, "MODEL './no/such/folder': wanted a folder"),
        ({"ROWS": "nowhere.json"}, "nowhere.json: cannot be read"),
        ({"ROWS": "columns"}, "has columns question; wanted: "),
        ({"ROWS": "few"}, "ROWS: wanted at least 5 rows"),
    ],
)
def test_what_is_given_wrongly_is_one_line(given, words, tmp_path):
    contents = {"columns": [{"question": "a"}], "few": [{"prompt": "a", "response": "b"}] * 2}
    name = given.get("ROWS")
    if name in contents:
        given = {"ROWS": str(tmp_path / f"{name}.json")}
        (tmp_path / f"{name}.json").write_text(json.dumps(contents[name]), "utf-8")
    with pytest.raises(ValueError) as caught:
        run_cells(7, PROFILE="nano", **given)
    assert words in str(caught.value) and "\n" not in str(caught.value)
