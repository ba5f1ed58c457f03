"""What is promoted is complete, hangs together, and is what the README shows."""

import json
import math
import re

import nbformat
import pandas as pd
import pytest

from neft_utils.base.files import ROOT
from neft_utils.base.paths import BASE, Paths
from neft_utils.base.read_profile import load_profile
from neft_utils.compare import claims, stats
from neft_utils.compare.results import Results
from neft_utils.compare.runs import OlderItems, OlderScoring, load_runs, missing_runs

STORED = sorted((ROOT / "results" / "reference").glob("*/claims.json"))
PARTIAL = sorted((ROOT / "results" / "partial").glob("*/claims.json"))


def results_in(paths):
    """A fixture: (profile, folder) of the results whose claims.json stand in `paths`."""

    @pytest.fixture(params=paths, ids=lambda path: f"{path.parent.parent.name}-{path.parent.name}")
    def found(request):
        folder = request.param.parent
        return load_profile(folder.name), folder

    return found


stored, partial, kept = results_in(STORED), results_in(PARTIAL), results_in([*STORED, *PARTIAL])


def test_the_default_profile_is_promoted():
    assert "cpu" in {path.parent.name for path in STORED}


def test_every_run_is_there_from_a_clean_commit(stored):
    profile, folder = stored
    runs = load_runs(folder / "runs")
    assert set(runs) == {(BASE, 0), *profile.runs()}
    assert all(re.fullmatch(r"[0-9a-f]{40}", run["provenance"]["commit"]) for run in runs.values())
    assert not any(run["provenance"]["dirty"] for run in runs.values())


def test_every_run_scored_the_same_test_rows(kept):
    _, folder = kept
    tests = [
        set(run["losses"].query("split == 'test'").example_id)
        for run in load_runs(folder / "runs").values()
    ]
    assert tests[0] and all(ids == tests[0] for ids in tests)


def of_this_version(folder):
    """Whether stored tables are of today's claims; else only the per-item files are read."""
    rows = json.loads((folder / "claims.json").read_text("utf-8"))
    return [row["id"] for row in rows] == list(claims.CLAIMS)


def by_token(rows):
    return (rows.nll * rows.n_tokens).sum() / rows.n_tokens.sum()


def test_the_main_table_again_with_pandas_alone(kept):
    """Nothing of the package computes here: files in, means over items, then over seeds."""
    _, folder = kept
    main = Results(folder).main.set_index("arm")
    if of_this_version(folder):
        read = pd.read_csv(folder / "tables" / "main.csv").set_index("arm")
        pd.testing.assert_frame_equal(read, main, check_dtype=False, rtol=1e-12)
    found = {}
    for run in sorted((folder / "runs").iterdir()):
        arm, seed = run.name.rsplit("-s", 1)
        losses = pd.read_csv(run / "losses.csv")
        splits = dict(list(losses.groupby("split")))
        row = {f"{split}_nll": by_token(rows) for split, rows in splits.items()}
        row["test_nll_by_row"] = splits["test"].nll.mean()
        if "train_nll" in row:
            row["gap"] = row["test_nll"] - row["train_nll"]
        if "end_nll" in losses:
            row["end_nll"] = splits["test"].end_nll.mean()
            row["content_nll"] = content(splits["test"])
        if lengths := answer_lengths(run):
            row["answer_length"] = sum(map(math.log, lengths.values())) / len(lengths)
        items = pd.read_csv(run / "task_items.csv")
        by_task = items.groupby("task")
        row |= by_task.correct.mean().filter(like="verifiable_").to_dict()
        right = by_task.correct_norm.mean()
        row |= {task: right[task] for task in ("openbookqa", "siqa") if task in right}
        if "margin" in items:  # else scored by an older version, the right answer alone
            both = items.task.isin(["openbookqa", "siqa"])
            row["arithmetic"] = items.margin[items.task == "asdiv"].mean()
            row["knowledge"] = items.margin[both].mean()
        found.setdefault(arm, []).append(row)
    assert set(found) == set(main.index)
    checked = 0
    for arm, rows in found.items():
        means = pd.DataFrame(rows).mean()  # of the seeds that were asked
        for name in set(means.index) & set(main.columns):
            assert main.loc[arm, name] == pytest.approx(means[name], abs=1e-9, nan_ok=True), (
                arm,
                name,
            )
            checked += 1
    assert checked >= 4 * len(found)


def content(rows):
    """NLL per token of a losses.csv's rows without their end of turn."""
    return (rows.nll * rows.n_tokens - rows.end_nll).sum() / (rows.n_tokens - 1).sum()


def answer_lengths(run):
    """{example: tokens} of a run's penalised test answers."""
    lines = (run / "generations.jsonl").read_text("utf-8").splitlines()
    return {
        row["example_id"]: row["n_tokens"]
        for row in map(json.loads, lines)
        if row["set"] == "test" and row["decoding"] == "greedy_penalty_1.2"
    }


def test_the_primary_estimates_again_with_pandas_alone(kept):
    """Weighted and unweighted, seed pair by seed pair."""
    profile, folder = kept
    found, pair, ours = {}, profile.confirmatory, Results(folder)
    for seed in profile.seeds_of(pair.treatment):
        runs = [folder / "runs" / f"{arm}-s{seed}" for arm in (pair.treatment, pair.control)]
        if not all(run.exists() for run in runs):
            continue
        losses = [pd.read_csv(run / "losses.csv") for run in runs]
        tests = [one.query("split == 'test'") for one in losses]
        pairs = {"test_nll": map(by_token, tests)}
        pairs["test_nll_by_row"] = (one.nll.mean() for one in tests)
        pairs["gap"] = (
            by_token(test) - by_token(one.query("split == 'train'"))
            for test, one in zip(tests, losses, strict=True)
        )
        if "end_nll" in losses[0]:
            pairs["end_nll"] = (one.end_nll.mean() for one in tests)
            pairs["content_nll"] = map(content, tests)
        lengths = [answer_lengths(run) for run in runs]
        if all(lengths):
            logs = [sum(map(math.log, one.values())) / len(one) for one in lengths]
            pairs["answer_length"] = logs
        for name, (noisy, plain) in pairs.items():
            found.setdefault(name, []).append(noisy - plain)
    assert {"test_nll", "test_nll_by_row", "gap"} <= set(found)
    for name, values in found.items():
        interval = ours.contrast(claims.confirmatory(profile), name)
        assert interval.estimate == pytest.approx(sum(values) / len(values), abs=1e-12), name
        if len(values) > 1:  # never narrower than t over the seed pairs
            floor = stats.seed_interval(values)
            width, least = interval.ci_high - interval.ci_low, floor.ci_high - floor.ci_low
            assert width >= least * (1 - 1e-9), name


def test_the_stored_ledger_is_what_the_per_item_files_say(kept):
    _, folder = kept
    rows = json.loads((folder / "claims.json").read_text("utf-8"))
    ledger = Results(folder).ledger
    if not of_this_version(folder):
        # Its first claim was the test loss with every row alike, by the same method.
        (old,) = (row for row in rows if row["id"] == "confirmatory")
        results = Results(folder)
        one = results.contrast(claims.confirmatory(results.profile), "test_nll_by_row")
        for name in ("estimate", "ci_low", "ci_high", "detectable"):
            assert getattr(one, name) == pytest.approx(old[name], abs=1e-12), name
        return
    for row, found in zip(rows, ledger.values(), strict=True):
        again = found.as_json()
        for name in ("contrast", "metric", "unit", "verdict"):
            assert again[name] == row[name], (row["id"], name)
        for name in ("estimate", "ci_low", "ci_high", "detectable"):
            both = [math.nan if one[name] is None else one[name] for one in (again, row)]
            assert both[0] == pytest.approx(both[1], abs=1e-12, nan_ok=True), (row["id"], name)
        assert (row["ci_low"] is None) == (not found.verdict.testable), row["id"]


def test_stored_tables_say_what_their_runs_are(kept):
    _, folder = kept
    older = OlderItems, OlderScoring
    notes = [one for one in Results(folder).caveats if not isinstance(one, older)]
    for name in ("main.md", "claims.md"):
        text = (folder / "tables" / name).read_text("utf-8")
        assert all(f"\n{note}\n" in text for note in notes), name


def test_noise_was_what_the_profile_says(stored):
    profile, folder = stored
    for arm, seed in profile.runs():
        noise = json.loads((folder / "runs" / f"{arm}-s{seed}" / "noise.json").read_text("utf-8"))
        alpha = profile.arms[arm].noise_alpha
        assert noise["noise_alpha"] == alpha and noise["calls"] > 0
        if alpha:
            assert noise["noise_rms"] == pytest.approx(noise["expected_rms"], rel=0.01)


def test_executed_copies_ran_in_order(stored):
    _, folder = stored
    copies = sorted((folder / "notebooks").glob("*.ipynb"))
    assert len(copies) >= 8
    for path in copies:
        code = [c for c in nbformat.read(path, as_version=4).cells if c.cell_type == "code"]
        assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
        assert not any(o.output_type == "error" for cell in code for o in cell.outputs)


def test_no_row_of_the_dataset_is_promoted(kept):
    """Notebook 1 shows five rows that may be published, MT-Bench's, and two that are hidden."""
    _, folder = kept
    hidden = 0
    for path in (folder / "notebooks").glob("*.ipynb"):
        for cell in nbformat.read(path, as_version=4).cells:
            text = "".join(out.get("text", "") for out in cell.get("outputs", []))
            hidden += "they are not published" in text
            if "for row in (ood or sources.own_rows())[:5]:" not in cell.source:
                assert "PROMPT" not in text, path.name
    assert hidden >= 1  # notebook 1 shows two


def test_no_prompt_weight_or_machine_path_is_promoted(kept):
    _, folder = kept
    for path in folder.rglob("*"):
        assert path.suffix not in (".safetensors", ".gguf", ".whl", ".pt")
        if path.suffix in (".json", ".csv", ".jsonl", ".md", ".ipynb"):
            text = path.read_text("utf-8")
            if path.name == "generations.jsonl":  # a model may well write of /Users/
                rows = [json.loads(line) for line in text.splitlines()]
                text = json.dumps([{**row, "text": ""} for row in rows])
            assert not re.search(r"(?<![\w.])/(?:home|root|work|Users|mnt|tmp)/", text), path


def test_a_promoted_bench_ran_at_a_clean_commit(stored):
    _, folder = stored
    if not (folder / "bench.json").exists():
        pytest.skip(f"no bench.json was promoted with {folder.name}")
    found = json.loads((folder / "bench.json").read_text("utf-8"))
    assert found["profile"] == folder.name and not found["dirty"]
    assert all(row["steps"] >= 5 for row in found["rows"].values())


def test_figures_exist_as_png_and_svg(stored):
    profile, folder = stored
    answered = any(profile.answers(*run) for run in profile.runs())
    names = {path.name for path in (folder / "figures").iterdir()}
    for stem in (
        "02_noise_energy",
        "02_effective_alpha",
        "05_learning_curves",
        "05_confirmatory",
        *(["05_answer_length"] if answered else []),
        *(["05_overfitting"] if profile.train.validate_train else []),
        "05_ledger",
        "06_leaderboard",
        "06_length_control",
        "06_length_change",
    ):
        assert {f"{stem}.png", f"{stem}.svg"} <= names


def test_the_answers_of_the_promoted_runs_are_counted_as_they_say(stored):
    profile, folder = stored
    paths = Paths(profile.name, "results/reference")
    table = pd.read_csv(folder / "tables" / "by_seed.csv")
    for arm, seed in profile.runs():
        if not profile.answers(arm, seed):
            continue
        file = paths.run(arm, seed) / "generations.jsonl"
        rows = [json.loads(line) for line in file.read_text("utf-8").splitlines()]
        rows = [r for r in rows if r["decoding"] == "greedy_penalty_1.2" and r["set"] == "test"]
        assert len(rows) == profile.evaluate.answer_prompts
        mean = sum(row["n_tokens"] for row in rows) / len(rows)
        shown = table[(table.arm == arm) & (table.seed == seed)].answer_tokens.item()
        assert math.isclose(shown, mean)


def test_the_dose_again_with_pandas_alone(kept):
    profile, folder = kept
    runs = load_runs(folder / "runs")
    found = claims.dose(runs, Results(folder).seeds, profile)
    for row in found.itertuples():
        control = profile.control_of(row.arm)
        sides = [
            pd.read_csv(folder / "runs" / f"{arm}-s{row.seed}" / "losses.csv")
            for arm in (row.arm, control)
        ]
        noisy, plain = (
            {split: by_token(rows) for split, rows in side.groupby("split")} for side in sides
        )
        for split in ("train", "test"):
            delta = noisy[split] - plain[split]
            assert getattr(row, f"{split}_nll") == pytest.approx(delta, abs=1e-12)
        noise = json.loads((folder / "runs" / f"{row.arm}-s{row.seed}/noise.json").read_text())
        assert row.relative_rms == noise["relative_rms"]
    noisy = {(arm, s) for arm, s in runs if arm != BASE and profile.arms[arm].noise_alpha}
    assert set(zip(found.arm, found.seed, strict=True)) <= noisy and len(found)


# ------------------------------------------------------------------------ runs are missing


def test_a_reference_is_not_partial_too():
    assert not {path.parent.name for path in PARTIAL} & {path.parent.name for path in STORED}


def test_partial_results_are_clean_and_say_what_is_missing(partial):
    profile, folder = partial
    runs = load_runs(folder / "runs")
    missing = missing_runs(profile, runs)
    assert missing and len(runs) + len(missing) == len(profile.runs()) + 1
    assert len({run["provenance"]["commit"] for run in runs.values()}) == 1
    assert not any(run["provenance"]["dirty"] for run in runs.values())
    assert Results(folder).caveats[0].missing == tuple(missing)
