"""Expected values beside ours, and the README's blocks, which are all made from files."""

import functools
import json
import shutil

import pandas as pd
import pytest

from neft_utils.base.files import ROOT
from neft_utils.base.paths import BASE, NOTEBOOKS, REFERENCE, Paths
from neft_utils.base.strict import ConfigError
from neft_utils.compare import claims, expected, facts
from neft_utils.compare.planning import variance_components
from neft_utils.compare.runs import load_runs, open_results
from neft_utils.compare.tables import Contrast, paired, side_by_side
from neft_utils.make import readme

README = (ROOT / "README.md").read_text("utf-8")


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


# ------------------------------------------------------------------------------- the README


def test_every_block_of_the_readme_is_what_the_files_say():
    found, stored = list(readme.BLOCK.finditer(README)), functools.cache(readme.stored_results)
    assert {match[2] for match in found} == set(readme.BLOCKS)
    assert README.count("<!-- /") == len(found)  # none is left open or misspelt
    for match in found:
        assert match[4] == readme.BLOCKS[match[2]](stored(match[3])), match[2]


def kept_dose(name):
    kept = readme.stored_results(name)
    found = claims.dose(kept.runs, kept.seeds, kept.profile)
    return found.groupby("arm")[["train_nll", "test_nll", "relative_rms"]].mean()


def said(words):
    """Whether the README says this, wherever its lines break."""
    return " ".join(words.split()) in " ".join(README.split())


def test_what_the_readme_says_of_the_curve_is_what_the_numbers_say():
    curve = kept_dose("gpu-small")
    assert said("what α = 7 and 11 are on LLaMA-2, raise the loss in both pairs that each has")
    # A quarter of the embedding at α = 5 there: a twentieth for each unit of α.
    shares = curve.relative_rms / 0.05
    assert [round(shares[arm]) for arm in ("neft_a30", "neft_a45")] == [7, 11]
    kept = readme.stored_results("gpu-small")
    each = claims.dose(kept.runs, kept.seeds, kept.profile).set_index("arm").test_nll
    for arm in ("neft_a30", "neft_a45"):
        assert (each[arm] > 0.005).all() and len(each[arm]) == 2
    assert said("with α = 5 and 10 two pairs show no difference")
    for arm in ("neft_a5", "neft_a10"):
        one = kept.contrast(Contrast(arm, ("baseline",)), "test_nll")
        assert one.n_seeds == 2 and one.ci_low < 0 < one.ci_high
    assert said(
        "in the one pair that there is, α = 45 over a packed row does less than α = 15 does"
    )
    rules = kept_dose("gpu-ablations")
    for metric in ("train_nll", "test_nll"):
        assert 0 < rules[metric]["packed_a45"] < rules[metric]["neft_a15"]


def test_what_the_readme_says_of_packing_is_what_notebook_2_measured():
    shares = []
    for name in ("cpu", "cpu-long", "gpu-small"):
        found = json.loads((ROOT / REFERENCE / name / "noise_check.json").read_text("utf-8"))
        alphas = found["median_effective_alpha"]
        shares.append(alphas["axolotl, TRL: packed to 2048"] / alphas["paper; this repository"])
    low, high = (f"{100 * one:.0f}" for one in (min(shares), max(shares)))
    assert said(f"packing to 2,048 tokens leaves {low} to {high} % of the noise on the rows here")


def test_what_the_readme_says_of_the_profiles_is_so():
    files = {
        name: ROOT / REFERENCE / name / "runs" / "base-s0" / "losses.csv"
        for name in ("cpu", "cpu-long")
    }
    rows = {n: set(pd.read_csv(f).query("split == 'test'").example_id) for n, f in files.items()}
    few, many = rows["cpu"], rows["cpu-long"]
    if few <= many:
        assert said(f"has all {len(few)} test rows of `cpu` among its {len(many)}")
    else:
        assert not said("test rows of `cpu` among its")
    for name in ("cpu-long", "gpu-small"):
        row = readme.stored_results(name)
        deltas = row.contrast(claims.confirmatory(row.profile), "test_nll")
        assert deltas.n_examples > 100
    assert said("Test rows differ more than seeds do")
    stored = readme.stored_results("cpu-long")
    pair = claims.confirmatory(stored.profile)
    table = paired(stored.runs, pair, "test_nll", stored.decoding)
    seed, row, _ = variance_components(table)
    assert row / table.example_id.nunique() > seed / table.seed.nunique()


def test_no_stored_run_turns_upward_or_holds_four_bits():
    """What notebook 5 and the README say of all stored runs."""
    assert said("(no stored run kept 4 bits)")
    curves = list(ROOT.glob("results/*/*/runs/*/train_log.csv"))
    assert len(curves) > 50
    for path in curves:
        after = pd.read_csv(path).validation_nll.dropna()
        assert after.iloc[-1] <= after.iloc[-2], path
        config = json.loads((path.parent / "config.json").read_text("utf-8"))
        assert config["model"]["base_weights"] != "nf4", path


def test_a_stale_block_is_written_anew(monkeypatch, tmp_path):
    stale = tmp_path / "README.md"
    monkeypatch.setattr(readme, "README", stale)
    block = next(m[0] for m in readme.BLOCK.finditer(README) if m[2] == "headline")
    stale.write_text(block.replace("29.79", "99.99"), "utf-8")
    assert "99.99" in stale.read_text("utf-8")
    assert readme.update_readme() and stale.read_text("utf-8") == block
    assert not readme.update_readme()


def test_the_headline_has_the_papers_the_leaderboards_and_our_numbers():
    match = next(m for m in readme.BLOCK.finditer(README) if m[2] == "headline")
    lines = [line for line in match[4].splitlines() if line.startswith("|")]
    rows = [line.split("|")[1:-1] for line in lines[2:]]
    paper = facts.paper_results().query("table == '1/7'").set_index("train_data").value
    for row, data in ((rows[0], "Alpaca"), (rows[2], "ShareGPT")):
        low, high = paper[data]
        assert [float(cell.split()[0]) for cell in row[1:]] == pytest.approx(
            [low, high, high - low]
        )
    assert README.count("29.79") == 1  # the headline once, the nearest set-up everywhere else
    board = facts.leaderboard_rows().query("leaderboard == 'AlpacaEval 1'").set_index("model")
    for row, column in ((rows[4], "win_rate"), (rows[5], "length_controlled_win_rate")):
        sides = board.loc[["alpaca-7b", "alpaca-7b-neft"], column]
        shown = [float(cell.split()[0]) for cell in row[1:3]]
        assert shown == pytest.approx(sides.tolist(), abs=0.051)
    means = []
    for arm in ("baseline", "neft_a15"):
        runs = (readme.stored_results(match[3]).folder / "runs").glob(f"{arm}-s*/losses.csv")
        tests = [pd.read_csv(path).query("split == 'test'") for path in runs]
        by_token = [(one.nll * one.n_tokens).sum() / one.n_tokens.sum() for one in tests]
        means.append(sum(by_token) / len(by_token))
    row = next(row for row in rows if "`test_nll`" in row[0])
    shown = [float(cell.split()[0]) for cell in row[1:]]
    assert shown == pytest.approx([*means, means[1] - means[0]], abs=6e-5)


def test_no_words_of_tests_are_left():
    text = README + "".join(path.read_text("utf-8") for path in NOTEBOOKS.glob("*.ipynb"))
    assert "opposite to the claim" not in text and "not detected" not in text.lower()


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
