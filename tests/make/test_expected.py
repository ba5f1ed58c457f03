"""Expected values beside ours, and which stored results are read."""

import json
import shutil

import pandas as pd
import pytest

from neft_utils.base.files import ROOT
from neft_utils.base.paths import BASE, REFERENCE, Paths
from neft_utils.base.strict import ConfigError
from neft_utils.compare import expected
from neft_utils.compare.runs import load_runs, open_results
from neft_utils.compare.tables import side_by_side


@pytest.fixture
def places(monkeypatch, tmp_path):
    """Paths of smoke here, and the folder of its reference."""
    monkeypatch.setattr("neft_utils.base.paths.ROOT", tmp_path)
    return Paths("smoke", "results/local"), Paths("smoke", REFERENCE).results


def write(folder, name, nll):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    pd.DataFrame({"split": ["train", "test", "ood"], "nll": nll}).to_csv(path, index=False)


def by_split(losses):
    return losses.groupby("split").nll.mean()


def test_ours_beside_the_reference(places):
    paths, reference = places
    write(paths.results, "losses.csv", [1.0, 2.0, 3.0])
    assert list(expected.beside(paths, "losses.csv", by_split).columns) == ["here"]
    write(reference, "losses.csv", [1.02, 2.04, None])
    table = expected.beside(paths, "losses.csv", by_split)
    assert table.verdict.to_dict() == {
        "train": "as expected",
        "test": "outside",
        "ood": "no reference",
    }
    assert table.here["test"] == 2.0 and table.expected["test"] == 2.04
    assert set(table.tolerance) == {"± 0.03 nats/token"}
    wider = expected.beside(paths, "losses.csv", by_split, "share")
    assert wider.verdict["test"] == "as expected"


def test_the_same_files_or_which_differ(places):
    paths, reference = places
    manifest = {"files": {"a.jsonl": "1", "b.jsonl": "2"}}
    assert "no reference of profile smoke" in expected.same_files(paths, manifest)
    reference.mkdir(parents=True)
    (reference / "manifest.json").write_text(json.dumps(manifest))
    assert expected.same_files(paths, manifest).startswith("all 2 files have")
    other = {"files": {"a.jsonl": "1", "b.jsonl": "3"}}
    assert "not the reference's files: b.jsonl" in expected.same_files(paths, other)


def test_how_long_a_notebook_took(places):
    paths, reference = places
    assert "no reference run" in expected.how_long(paths, 3)
    for profile, durations in ((reference.with_name("cpu"), (60, 130, 110)), (reference, (30,))):
        (profile / "notebooks").mkdir(parents=True)
        for seed, duration in enumerate(durations):
            about = {"metadata": {"papermill": {"duration": duration}}}
            copy = profile / "notebooks" / f"03_finetune_qlora__baseline-s{seed}.ipynb"
            copy.write_text(json.dumps(about))
        (profile / "runs" / "baseline-s0").mkdir(parents=True)
        about = {"device": "Abacus", "threads": 1, "peak_memory_gb": 2.25}
        (profile / "runs" / "baseline-s0" / "provenance.json").write_text(json.dumps(about))
    assert expected.how_long(paths, 3) == (
        "30 s in the reference run of profile smoke (Abacus, 1 thread)"
    )
    fallen_back = expected.how_long(Paths("mine", paths.out), 3)
    assert fallen_back == (
        "1.8 min (median of 3 runs, at most 2.2 GB) in the reference run of profile cpu"
        " (Abacus, 1 thread)"
    )
    assert expected.how_long(Paths("cpu", paths.out), 3, short=True) == "1.8 min a run"


def test_answers_side_by_side():
    rows = pd.DataFrame(
        {"set": ["test", "shown", "shown"], "example_id": ["shown-1", "shown-0", "shown-1"]}
    ).assign(text=["no", "short", "x" * 30])
    empty = pd.DataFrame()
    runs = {(BASE, 0): {"generations": rows}, ("noisy", 3): {"generations": rows}}
    runs |= {("noisy", 1): {"generations": empty}, ("plain", 0): {"generations": empty}}
    table = side_by_side(runs, [BASE, "plain", "noisy"], ["one?", "two?"], longest=10)
    assert list(table.columns) == ["base, seed 0", "noisy, seed 3"]
    assert table.loc["one?"].tolist() == ["short"] * 2
    assert table.loc["two?", "base, seed 0"] == "x" * 10 + "…"


# --------------------------------------------------------------------------- stored results


def test_without_own_results_the_evidence_is_read(tmp_path, capsys):
    profile, paths, runs = open_results("smoke", str(tmp_path))
    assert profile.name in expected.EVIDENCE and ("baseline", 0) in runs
    assert paths.out == str(tmp_path)
    said = capsys.readouterr().out
    assert said == f"no finished smoke runs in {tmp_path}: reading {REFERENCE}/{profile.name}\n"


def test_a_run_of_an_older_version_is_named(tmp_path):
    run = tmp_path / "runs" / "baseline-s0"
    shutil.copytree(ROOT / REFERENCE / "cpu" / "runs" / "baseline-s0", run)
    (run / "stopping.csv").unlink()
    with pytest.raises(ConfigError, match="^run baseline-s0 has no stopping: .*make reproduce$"):
        load_runs(tmp_path / "runs")
