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
from neft_utils.compare.runs import OlderItems, load_runs, missing_runs

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


def test_every_run_is_there_from_one_clean_commit(stored):
    profile, folder = stored
    runs = load_runs(folder / "runs")
    assert set(runs) == {(BASE, 0), *profile.runs()}
    commits = {run["provenance"]["commit"] for run in runs.values()}
    assert len(commits) == 1 and re.fullmatch(r"[0-9a-f]{40}", commits.pop())
    assert not any(run["provenance"]["dirty"] for run in runs.values())


def test_every_run_scored_the_same_test_rows(kept):
    _, folder = kept
    tests = [
        set(run["losses"].query("split == 'test'").example_id)
        for run in load_runs(folder / "runs").values()
    ]
    assert tests[0] and all(ids == tests[0] for ids in tests)


def test_tables_follow_from_per_item_files(stored):
    profile, folder = stored
    main = pd.read_csv(folder / "tables" / "main.csv").set_index("arm")
    for arm in profile.arms:
        files = [folder / "runs" / f"{arm}-s{s}" / "losses.csv" for s in profile.seeds_of(arm)]
        frames = [pd.read_csv(file).groupby("split").nll.mean() for file in files]
        for split in ("train", "test", "ood"):
            mean = sum(frame[split] for frame in frames) / len(frames)
            assert main.loc[arm, f"{split}_nll"] == pytest.approx(mean, abs=1e-12)


def test_the_main_table_again_with_pandas_alone(kept):
    """Nothing of the package computes here: files in, means over items, then over seeds."""
    profile, folder = kept
    main = pd.read_csv(folder / "tables" / "main.csv").set_index("arm")
    found = {}
    for run in sorted((folder / "runs").iterdir()):
        arm, seed = run.name.rsplit("-s", 1)
        losses = pd.read_csv(run / "losses.csv").groupby("split").nll.mean().add_suffix("_nll")
        row = {**losses, "gap": losses.test_nll - losses.train_nll}
        items = pd.read_csv(run / "task_items.csv")
        by_task = items.groupby("task")
        row |= by_task.correct.mean().filter(like="verifiable_").to_dict()
        right = by_task.correct_norm.mean()
        row |= {task: right[task] for task in ("openbookqa", "siqa") if task in right}
        if "asdiv" in set(items.task):
            both = items.task.isin(["openbookqa", "siqa"])
            # Scored by an older version, the right answer alone.
            value = items.margin if "margin" in items else items.gold_logprob
            row["arithmetic"], row["knowledge"] = (
                value[items.task == "asdiv"].mean(),
                value[both].mean(),
            )
        found.setdefault(arm, []).append(row)
    assert set(found) == set(main.index)
    checked = 0
    for arm, rows in found.items():
        means = pd.DataFrame(rows).mean()  # of the seeds that were asked
        for name in set(means.index) & set(main.columns):
            assert main.loc[arm, name] == pytest.approx(means[name], abs=1e-9), (arm, name)
            checked += 1
    assert checked >= 4 * len(found)


def test_the_stored_ledger_is_what_the_per_item_files_say(kept):
    _, folder = kept
    rows = json.loads((folder / "claims.json").read_text("utf-8"))
    assert [row["id"] for row in rows] == list(claims.CLAIMS)
    results = Results(folder)
    older = any(isinstance(one, OlderItems) for one in results.caveats)
    for row, found in zip(rows, results.ledger.values(), strict=True):
        if row["id"] in ("reasoning", "no_new_knowledge") and found.interval is None:
            assert older or row["estimate"] is None  # then of the right answer alone
            continue
        again = found.as_json()
        # Two claims fewer, so Holm's correction of the others is milder.
        for name in ("contrast", "metric", "unit", *(() if older else ("verdict",))):
            assert again[name] == row[name], (row["id"], name)
        for name in ("estimate", "ci_low", "ci_high", "detectable"):
            both = [math.nan if one[name] is None else one[name] for one in (again, row)]
            assert both[0] == pytest.approx(both[1], abs=1e-12, nan_ok=True), (row["id"], name)
        assert (row["ci_low"] is None) == (found.verdict.outcome == "not_testable"), row["id"]


def test_stored_tables_say_what_their_runs_are(kept):
    _, folder = kept
    notes = [one for one in Results(folder).caveats if not isinstance(one, OlderItems)]
    for name in ("main.md", "claims.md"):
        text = (folder / "tables" / name).read_text("utf-8")
        assert all(f"\n{note}\n" in text for note in notes), name


def test_the_confirmatory_claim_follows_from_per_item_files(kept):
    profile, folder = kept
    rows = json.loads((folder / "claims.json").read_text("utf-8"))
    claim, pair = next(row for row in rows if row["id"] == "confirmatory"), profile.confirmatory
    frames = []
    for seed in profile.seeds_of(pair.treatment):
        names = (f"{arm}-s{seed}" for arm in (pair.treatment, pair.control))
        files = [folder / "runs" / name / "losses.csv" for name in names]
        if all(file.exists() for file in files):
            tests = [pd.read_csv(file).query("split == 'test'") for file in files]
            sides = [one.set_index("example_id").nll for one in tests]
            frames.append((sides[0] - sides[1]).rename("delta").reset_index().assign(seed=seed))
    interval = stats.confirmatory_interval(pd.concat(frames))
    assert claim["estimate"] == pytest.approx(interval.estimate, abs=1e-12)
    for end in ("ci_low", "ci_high"):
        if interval.n_seeds == 1:  # smoke
            assert claim[end] is None
        else:
            assert claim[end] == pytest.approx(getattr(interval, end), abs=1e-12)
    assert claim["verdict"] == str(stats.verdict(interval, unit="nats/token", claimed=-1))


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
    _, folder = kept
    hidden = 0
    for path in (folder / "notebooks").glob("*.ipynb"):
        for cell in nbformat.read(path, as_version=4).cells:
            text = "".join(out.get("text", "") for out in cell.get("outputs", []))
            hidden += "they are not published" in text
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
    _, folder = stored
    names = {path.name for path in (folder / "figures").iterdir()}
    for stem in (
        "02_noise_energy",
        "02_effective_alpha",
        "05_learning_curves",
        "05_confirmatory",
        "05_answer_length",
        "05_ledger",
        "05_false_alarms",
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
    found = claims.dose(runs, pd.read_csv(folder / "tables" / "by_seed.csv"), profile)
    for row in found.itertuples():
        control = profile.control_of(row.arm)
        sides = [
            pd.read_csv(folder / "runs" / f"{arm}-s{row.seed}" / "losses.csv")
            for arm in (row.arm, control)
        ]
        noisy, plain = (side.groupby("split").nll.mean() for side in sides)
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
