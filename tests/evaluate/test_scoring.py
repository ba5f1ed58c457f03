"""Notebook 04 on the nano model: every file of every run, and what the tables make of them."""

import json
import math

import pandas as pd
import pytest
from tiny import Lab

from neft_utils.base.files import read_json, write_json
from neft_utils.base.paths import BASE
from neft_utils.base.strict import ConfigError
from neft_utils.compare import claims, tables
from neft_utils.compare.results import Results
from neft_utils.data.sources import read_jsonl
from neft_utils.data.splits import load_split
from neft_utils.evaluate.scoring import ITEM_COLUMNS
from neft_utils.train.base_models import load_tokenizer
from neft_utils.train.encoding import encode, flat_batch
from neft_utils.train.losses import response_losses, response_token_nll

LEDGER = [
    "answer_length",
    "end_nll",
    "content_nll",
    "held_out_loss",
    "better_answers",
    "reasoning",
    "less_overfitting",
    "beyond_early_stopping",
    "low_data",
    "alpha_sensitive",
    "too_strong_breaks",
    "across_models",
    "beyond_length",
    "concise_tasks",
    "no_new_knowledge",
    "input_robustness",
    "flat_minimum",
    "vs_dropout_decay",
]


def _check_secondary(profile, paths, rows):
    """Seed 0 has the secondary measures, seed 1 has not; Table 5's arms by role."""
    settings, run = profile.evaluate, paths.run("neft_a15", 0)
    sets = pd.DataFrame(rows).groupby("set").size().to_dict()
    assert sets["verifiable"] == 3 * settings.verifiable_per_family
    assert sets["train"] == settings.train_answer_prompts
    assert sets["shown"] == len(settings.shown_prompts) == 3
    assert not any("shown" in name for name in json.loads((run / "scores.json").read_text()))
    assert "test_long_prompt" not in sets and "test_min_tokens" not in sets
    control = pd.DataFrame(read_jsonl(paths.run("baseline", 0) / "generations.jsonl"))
    assert {"test_long_prompt", "test_min_tokens"} <= set(control.set)
    assert (control[control.set == "test_min_tokens"].n_tokens == settings.max_new_tokens).all()
    penalised = control[(control.set == "test") & (control.decoding != "greedy")]
    limits = penalised.set_index("example_id").n_tokens
    cut = [row for row in rows if row["set"] == "test_cut"]
    assert len(cut) == settings.answer_prompts
    assert all(row["n_tokens"] <= limits[row["example_id"]] for row in cut)
    perturbed = pd.read_csv(run / "perturbed_losses.csv")
    assert set(perturbed.kind) == {"none", "weights", "prompt"}
    assert perturbed.example_id.nunique() == settings.stability_rows
    assert len(pd.read_csv(run / "stopping.csv")) == settings.stability_rows
    items = pd.read_csv(run / "task_items.csv")
    assert items.groupby("task").size().tolist() == [settings.verifiable_per_family] * 3
    assert pd.read_csv(paths.run("neft_a15", 1) / "task_items.csv").empty


@pytest.fixture(scope="module")
def nano(tmp_path_factory):
    """A Lab with every run trained and scored."""
    with pytest.MonkeyPatch.context() as patch:
        lab = Lab(tmp_path_factory.mktemp("nano"), patch).prepare()
        for arm, seed in lab.profile.runs():
            lab.train(arm, seed)
        for arm, seed in [(BASE, 0), *lab.profile.runs()]:
            lab.score(arm, seed)
        yield lab


def test_every_file_has_its_columns_and_no_prompt(nano):
    run = nano.paths.run("neft_a15", 0)
    assert (pd.read_csv(run / "losses.csv").nll > 0).all()
    rows = read_jsonl(run / "generations.jsonl")
    columns = ["set", "example_id", "decoding", "n_tokens", "stopped", "text"]
    assert all(list(row) == columns for row in rows)
    assert {row["decoding"] for row in rows} == {"greedy_penalty_1.2", "greedy"}
    prompts = {row["prompt"] for row in load_split(nano.paths.processed, "test")}
    assert not prompts & {row["text"] for row in rows}
    for name, columns in ITEM_COLUMNS.items():
        assert list(pd.read_csv(run / name).columns) == columns
    _check_secondary(nano.profile, nano.paths, rows)


def by_hand(paths):
    """Every primary estimate and two losses, from the per-item files with pandas alone."""
    found = {}
    for seed in (0, 1):
        sides = {}
        for arm in ("neft_a15", "baseline"):
            run = paths.run(arm, seed)
            rows = pd.read_csv(run / "losses.csv").query("split == 'test'")
            content = (rows.nll * rows.n_tokens - rows.end_nll).sum()
            lengths = [
                math.log(row["n_tokens"])
                for row in read_jsonl(run / "generations.jsonl")
                if row["set"] == "test" and row["decoding"] == "greedy_penalty_1.2"
            ]
            sides[arm] = {
                **({"answer_length": sum(lengths) / len(lengths)} if lengths else {}),
                "end_nll": rows.end_nll.mean(),
                "content_nll": content / (rows.n_tokens - 1).sum(),
                "held_out_loss": (rows.nll * rows.n_tokens).sum() / rows.n_tokens.sum(),
            }
        for name in sides["baseline"]:
            found.setdefault(name, []).append(sides["neft_a15"][name] - sides["baseline"][name])
    assert len(found["answer_length"]) == 1  # only seed 0 answers
    return {name: sum(values) / len(values) for name, values in found.items()}


def test_tables_follow_from_the_files(nano):
    profile, paths = nano.profile, nano.paths
    found = Results(paths.results, profile)
    runs = found.runs
    contrasts = tables.contrasts(runs, found.seeds, profile, found.decoding)
    frames = {"main": found.main, "contrasts": contrasts}
    claims.write_tables(paths, frames, found.ledger.values(), found.caveats)
    ledger = {row["id"]: row for row in json.loads((paths.results / "claims.json").read_text())}
    assert list(ledger) == LEDGER
    for name, expected in by_hand(paths).items():
        assert ledger[name]["estimate"] == pytest.approx(expected, abs=1e-12), name
    assert all(row["verdict"] and row["paper"] and row["note"] for row in ledger.values())
    assert ledger["better_answers"]["verdict"] == (
        "not measured here (see profile llama2-7b-alpaca-full)"
    )
    main = pd.read_csv(paths.tables / "main.csv")
    assert main.arm.tolist() == ["base", "baseline", "neft_a15"]
    assert main.n_seeds.tolist() == [1, 2, 2]
    tests = [runs["baseline", s]["losses"].query("split == 'test'") for s in (0, 1)]
    by_row = [one.nll.mean() for one in tests]
    by_token = [(one.nll * one.n_tokens).sum() / one.n_tokens.sum() for one in tests]
    assert main.set_index("arm").test_nll["baseline"] == pytest.approx(sum(by_token) / 2)
    assert main.set_index("arm").test_nll_by_row["baseline"] == pytest.approx(sum(by_row) / 2)
    assert math.isnan(main.set_index("arm").test_nll_ci_low["base"])
    assert contrasts.set_index("metric").loc["test_nll", "n_seeds"] == 2


def test_end_nll_is_the_loss_of_the_end_of_turn_alone(nano):
    tokenizer = load_tokenizer(nano.profile.model)
    model = nano.tuned(nano.paths.run("neft_a15", 0))
    rows = load_split(nano.paths.processed, "test")[:5]
    encoded = [encode(tokenizer, row) for row in rows]
    means, ends = response_losses(model, encoded, 200)
    for one, mean, end in zip(encoded, means, ends, strict=True):
        nll, _ = response_token_nll(model, flat_batch([one]))
        assert one["input_ids"][-1] == tokenizer.eos_token_id
        assert mean == pytest.approx(nll.mean().item(), rel=1e-3)
        assert end == pytest.approx(nll[-1].item(), rel=1e-2)


def test_the_base_is_scored_on_the_rows_of_the_first_seed_there_is(tmp_path, monkeypatch):
    late = Lab(tmp_path, monkeypatch, seeds=[1]).prepare()
    names = late.score(BASE, until="score_losses(")
    assert names["rows"]["train"] == load_split(late.paths.processed, "train-s1")
    assert late.profile.answers("baseline", 1)


def test_an_adapter_of_another_base_is_refused(tmp_path, monkeypatch):
    lab = Lab(tmp_path, monkeypatch).prepare()
    run = lab.paths.run("baseline", 0)
    write_json(run / "provenance.json", {"base_sha256": "0" * 64})
    with pytest.raises(ConfigError, match="run baseline-s0 was trained on other base weights"):
        lab.score("baseline")
    assert [path.name for path in run.iterdir()] == ["provenance.json"]
    assert read_json(run / "provenance.json") == {"base_sha256": "0" * 64}
