"""The commands as a user runs them: the nano chain, interrupted and misused.

Everything happens in copies of the repository in temporary folders, started from another
working directory; only the downloaded wheels and converted models are shared.
"""

import json
import os
import re
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pandas as pd
import pytest
from chains import copy_of_the_repository, mine, neft, surroundings

from neft_utils.base.files import ROOT
from neft_utils.base.paths import NOTEBOOKS, STEPS
from neft_utils.make.workflow import settings

CANARY = "canary-5d41402abc"


@pytest.fixture(scope="module")
def nano(tmp_path_factory):
    """A finished nano chain: (repository copy, results folder)."""
    folder = copy_of_the_repository(tmp_path_factory.mktemp("nano"))
    keys = {"OPENAI_API_KEY": CANARY, "HF_TOKEN": CANARY}
    done = neft(folder, "reproduce", "--profile", "nano", **keys)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder, folder / "results" / "local" / "nano", done


SCORED = {
    "losses.csv",
    "generations.jsonl",
    "task_items.csv",
    "perturbed_losses.csv",
    "stopping.csv",
    "preferences.csv",
    "rewards.csv",
    "scores.json",
}


def test_the_chain_writes_every_file(nano):
    _, results, _ = nano
    for arm, seed in [("baseline", 0), ("baseline", 1), ("neft_a15", 0), ("neft_a15", 1)]:
        run = results / "runs" / f"{arm}-s{seed}"
        names = {path.name for path in run.iterdir()}
        assert names >= {
            "config.json",
            "provenance.json",
            "train_log.csv",
            "noise.json",
            "adapter",
            *SCORED,
        }
    base = {path.name for path in (results / "runs" / "base-s0").iterdir()}
    assert base == {"config.json", "provenance.json", *SCORED}
    for name in (
        "claims.json",
        "manifest.json",
        "noise_check.json",
        "tables/main.md",
        "tables/contrasts.csv",
        "tables/by_seed.csv",
        "published/leaderboard.csv",
    ):
        assert (results / name).stat().st_size > 0
    figures = {path.name for path in (results / "figures").iterdir()}
    assert (results / "notebooks" / "90_exercise_solutions.ipynb").exists()
    for stem in (
        "00_pipeline",
        "02_noise_energy",
        "05_confirmatory",
        "05_learning_curves",
        "05_ledger",
    ):
        assert {f"{stem}.png", f"{stem}.svg"} <= figures


def test_no_key_of_the_environment_is_written_anywhere(nano):
    folder, _, done = nano
    assert CANARY not in done.stdout + done.stderr
    for top in ("results/local", ".snakemake", "data/processed"):
        for path in (folder / top).rglob("*"):
            assert not path.is_file() or CANARY.encode() not in path.read_bytes(), path


def test_it_says_how_far_it_is_and_ends_with_the_answer(nano):
    _, results, done = nano
    assert re.search(
        r"\[ +[\d.]+ min\] \d+ of \d+ steps, (about \d+ min|under a minute) left · finished",
        done.stdout,
    )
    rows = json.loads((results / "claims.json").read_text("utf-8"))
    primary = [row for row in rows if row["primary"]]
    *_, steps, end = re.split(r"(·[^·]*\n)(?=Models trained)", done.stdout)
    lines = end.rstrip().splitlines()
    assert [row["id"] for row in primary] == ["answer_length", "end_nll", "content_nll"]
    for row, three in zip(primary, (lines[:3], lines[3:6], lines[6:9]), strict=True):
        assert row["estimate"] is not None
        said = row["verdict"]
        assert three[:2] == [row["claim"], f"  {said[:1].upper()}{said[1:]}."]
        assert three[2] == "  Expected: no reference of this profile has it."
    assert len(lines) < 25 and not any(line.startswith("|") for line in lines)
    assert "other claims: " in end and "tables/claims.md" in end and "tables/main.md" in end
    assert lines[-1].startswith("results in ")


def test_executed_copies_ran_in_order_and_carry_no_machine_path(nano):
    folder, results, _ = nano
    copies = sorted((results / "notebooks").glob("*.ipynb"))
    names = {re.sub(r"__.*", "", path.stem) for path in copies}
    assert names == set(STEPS.values())
    assert len([path for path in copies if path.stem.startswith("04")]) == 5
    for path in copies:
        notebook = nbformat.read(path, as_version=4)
        code = [cell for cell in notebook.cells if cell.cell_type == "code"]
        assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
        assert not any(o.output_type == "error" for cell in code for o in cell.outputs)
        text = path.read_text("utf-8")
        assert not any(str(place) in text for place in (folder, ROOT, Path.home()))
        source = nbformat.read(NOTEBOOKS / f"{re.sub('__.*', '', path.stem)}.ipynb", as_version=4)
        ours = [
            c.source
            for c in notebook.cells
            if "injected-parameters" not in c.metadata.get("tags", [])
        ]
        assert ours == [cell.source for cell in source.cells]


def breaks(folder, step, line):
    """Put a line in front of the last code cell of a copy's notebook."""
    path = folder / "notebooks" / f"{STEPS[step]}.ipynb"
    cells = json.loads(path.read_text("utf-8"))
    last = [cell for cell in cells["cells"] if cell["cell_type"] == "code"][-1]
    last["source"].insert(0, f"{line}\n")
    path.write_text(json.dumps(cells), "utf-8")


def test_a_step_that_fails_leaves_the_others_and_the_end_names_it(nano, tmp_path):
    folder = tmp_path / "clone"
    shutil.copytree(nano[0], folder, symlinks=True)
    shutil.rmtree(folder / ".snakemake")  # what it remembers lies at other paths
    breaks(folder, 2, "raise ValueError('no noise')")
    breaks(folder, 7, "1 / 0")
    breaks(folder, 90, "print('still here')")
    copies = folder / "results" / "local" / "nano" / "notebooks"
    for step in (2, 7, 90):
        (copies / f"{STEPS[step]}.ipynb").unlink()
    done = neft(folder, "reproduce", "--profile", "nano")
    assert done.returncode == 1
    assert "still here" in (copies / f"{STEPS[90]}.ipynb").read_text("utf-8")
    lines = done.stderr.strip().splitlines()
    for step, words in ((2, "ValueError: no noise"), (7, "ZeroDivisionError: division by zero")):
        failed = f"results/local/nano/notebooks/{STEPS[step]}.failed.ipynb"
        (line,) = (one for one in lines if one.startswith(f"error: {STEPS[step]}: {words}"))
        assert line.endswith(f", {failed})") and (folder / failed).exists()
    assert "2 steps failed: " in lines[-2] and STEPS[2] in lines[-2] and STEPS[7] in lines[-2]
    assert re.match(r"stopped: \d+ of \d+ steps are done; the same command goes on", lines[-1])


def test_other_rows_at_the_same_path_are_prepared_again(tmp_path):
    folder = copy_of_the_repository(tmp_path / "clone")
    file = tmp_path / "rows.json"
    rows = [{"prompt": f"Say {n}{n * n}.", "response": f"{n}, a{n * 7}b."} for n in range(10, 60)]
    file.write_text(json.dumps(rows), "utf-8")
    own = {"source": "json", "path": str(file), "max_tokens": 400, "train_rows": 4}
    own |= {"validation_rows": 2, "test_rows": 2}
    profile = mine(tmp_path, data=own, evaluate={})
    target = folder / "data" / "processed" / "mine" / "manifest.json"
    command = [sys.executable, "-m", "snakemake", "--cores", "1", "--nolock", "--rerun-triggers"]
    command += ["mtime", "params", "input", "--config", *settings(str(profile), "results/local")]
    told = {"cwd": folder, "env": surroundings(folder), "capture_output": True, "text": True}
    done = subprocess.run([*command, "--", str(target)], **told)
    assert done.returncode == 0 and target.exists(), done.stderr

    def planned():
        said = subprocess.run([*command, "--dry-run", "--", str(target)], **told)
        return said.stdout + said.stderr

    assert "Nothing to be done" in planned()
    before, text = file.stat(), file.read_text("utf-8")
    file.write_text(text.replace("Say 11121", "Ask 11121"), "utf-8")
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert file.stat().st_size == before.st_size
    assert "rule prepare" in planned() and "Params have changed" in planned()


def test_a_copied_clone_runs_its_own_code_and_writes_at_home(tmp_path):
    """With a .venv that imports the package from another clone, as `cp -r` leaves it."""
    original = copy_of_the_repository(tmp_path / "original")
    clone = tmp_path / "clone"
    shutil.copytree(original, clone, symlinks=True)
    facts = clone / "neft_utils" / "base" / "paths.py"
    facts.write_text(facts.read_text("utf-8") + "\nprint('code of the copy')\n", "utf-8")
    # `python -m` finds the copy in its working directory; its kernels work in notebooks/.
    there = surroundings(original)
    command = [sys.executable, "-m", "neft_utils", "notebook", "6", "--profile", "nano"]
    done = subprocess.run(command, cwd=clone, env=there, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    made = "results/local/nano/notebooks/06_published_results_revisited.ipynb"
    assert not (original / made).exists()
    assert "code of the copy" in (clone / made).read_text("utf-8")
    # By hand, as in a Jupyter that was copied along: named, and nothing is written.
    code = "from neft_utils.base.read_profile import load_profile; load_profile('nano')"
    for place in (clone, clone / "notebooks"):
        command = [sys.executable, "-P", "-c", code]
        done = subprocess.run(command, cwd=place, env=there, capture_output=True, text=True)
        said = f"this is {clone}, but Python imports neft_utils from {original}: use make"
        assert done.returncode == 1 and said in done.stderr.splitlines()[-1]


def test_a_second_call_does_nothing_even_after_editing_prose(nano):
    folder, results, _ = nano
    before = {p: p.stat().st_mtime_ns for p in results.rglob("*") if p.suffix != ".log"}
    notebook = folder / "notebooks" / "03_finetune_qlora.ipynb"
    notebook.write_text(
        notebook.read_text("utf-8").replace("## What is trained", "## What we train")
    )
    started = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = neft(folder, "reproduce", "--profile", "nano")
    assert done.returncode == 0 and "nothing to do" in done.stdout
    used = resource.getrusage(resource.RUSAGE_CHILDREN)  # not the time, which neighbours take, too
    assert used.ru_utime + used.ru_stime - started.ru_utime - started.ru_stime < 15
    after = {p: p.stat().st_mtime_ns for p in results.rglob("*") if p.suffix != ".log"}
    assert {p: t for p, t in after.items() if p.is_file()} == {
        p: t for p, t in before.items() if p.is_file()
    }


def test_a_deleted_file_of_a_run_is_missed(nano, tmp_path):
    folder, results, _ = nano
    scores, kept = results / "runs" / "baseline-s1" / "scores.json", tmp_path / "scores.json"
    wanted = [sys.executable, "-m", "snakemake", "--dry-run", "--nolock", "--rerun-triggers"]
    wanted += ["mtime", "params", "input", "--config", "profile=nano", "out=results/local"]
    options = {"env": surroundings(folder), "cwd": folder, "capture_output": True, "text": True}
    done = subprocess.run(wanted, **options)
    assert "Nothing to be done" in done.stdout + done.stderr
    scores.rename(kept)  # and back, its time of change included
    done = subprocess.run(wanted, **options)
    kept.rename(scores)
    assert "04_evaluate__baseline-s1" in done.stdout and "03_finetune" not in done.stdout


def test_tables_can_be_recomputed_from_the_per_item_files(nano):
    _, results, _ = nano
    main = pd.read_csv(results / "tables" / "main.csv").set_index("arm")
    for arm in ("baseline", "neft_a15"):
        values = [
            pd.read_csv(results / "runs" / f"{arm}-s{seed}" / "losses.csv")
            .query("split == 'test'")
            .nll.mean()
            for seed in (0, 1)
        ]
        assert main.test_nll_by_row[arm] == pytest.approx(sum(values) / 2, abs=1e-12)


def test_misuse_is_one_line_and_a_failing_exit_code(nano, tmp_path):
    folder, _, _ = nano
    (tmp_path / "alpha").mkdir()
    alpha = mine(tmp_path / "alpha", arms={"baseline": {"noise_alpha": -1}})
    cpu = mine(tmp_path).rename(tmp_path / "cpu.yaml")
    cases = [
        (["plan", "--profile", "nanno"], "no profile 'nanno'"),
        (["reproduce", "--profile", alpha], "noise_alpha: must be at least 0.0, not -1.0"),
        (["notebook", 3, "--profile", "nano", "--arm", "neft", "--seed", 0], "no arm 'neft'"),
        (["notebook", 3, "--profile", "nano", "--arm", "baseline", "--seed", 9], "no seed 9"),
        (
            ["notebook", 1, "--profile", "nano", "--arm", "baseline", "--seed", 0],
            "has no parameter ARM",
        ),
        (["reproduce", "--profile", "nano", "--out", "/dev/null/x"], "Not a directory"),
        (["promote", "--profile", "nano"], "promote needs a clean commit"),
        (["promote", "--profile", mine(tmp_path)], "mine is a profile of your own"),
        (["promote", "--profile", cpu], "the built-in profile cpu has this name"),
        (["reproduce", "--profile", cpu], "the built-in profile cpu has this name"),
        (["compare", "--profile", "nano"], "nano/runs is missing: nothing to compare"),
        (["figures", "--profile", "smoke"], "no stored results of smoke"),
    ]
    for arguments, message in cases:
        done = neft(folder, *arguments)
        assert done.returncode == 1, arguments
        assert message in done.stderr and "Traceback" not in done.stderr
        assert len(done.stderr.strip().splitlines()) == 1, done.stderr


@pytest.mark.skipif(shutil.which("nvidia-smi") is not None, reason="has a GPU")
def test_notebook_0_refuses_a_machine_in_the_words_of_check(nano, tmp_path):
    folder, _, _ = nano
    done = neft(folder, "notebook", 0, "--profile", mine(tmp_path, device="cuda"))
    assert done.returncode == 1 and len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert "00_start_here: RuntimeError: profile mine needs a GPU and none is here" in done.stderr


@pytest.mark.parametrize(
    "rows, message",
    [
        ('[{"question": "a", "answer": "b"}]', "question, answer"),
        ("[]", "mine.json"),
        ('[{"prompt": "a", "response": ""}]', "row"),
    ],
)
def test_a_data_file_that_will_not_do_is_named(tmp_path, rows, message):
    folder = copy_of_the_repository(tmp_path)
    file = tmp_path / "mine.json"
    file.write_text(rows, "utf-8")
    own = {
        "source": "json",
        "path": str(file),
        "train_rows": 1,
        "validation_rows": 1,
        "test_rows": 1,
    }
    done = neft(folder, "notebook", 1, "--profile", mine(tmp_path, data=own, evaluate={}))
    assert done.returncode != 0
    line = next(x for x in done.stderr.splitlines() if x.startswith("error: 01_prepare_data"))
    assert "DataError" in line and message in line
    assert not (folder / "data" / "processed" / "mine" / "manifest.json").exists()


@pytest.mark.slow
def test_bench_times_all_rows_on_the_same_examples(nano):
    """Real trainers of both kinds; how fast they are is not for a busy machine to say."""
    folder, results, _ = nano
    done = neft(folder, "bench", "--profile", "nano", "--steps", "3")
    assert done.returncode == 0, done.stderr
    found = json.loads((results.parent / "bench.json").read_text("utf-8"))
    low, middle, high = (found[f"noise_overhead_percent{x}"] for x in ("_low", "", "_high"))
    assert 0 < low <= middle <= high < 100
    rows = found["rows"]
    speed = {name: row["real_tokens_per_second"]["median"] for name, row in rows.items()}
    assert found["train_ratio_vs_trl"] == pytest.approx(
        speed["ours_2x1"] / speed["trl_2x1"], abs=0.01
    )
    assert found["train_ratio_vs_trl_one_run"] == pytest.approx(
        speed["ours_1x2"] / speed["trl_1x2"], abs=0.01
    )
    for row in rows.values():
        assert row["real_tokens_per_second"]["low"] <= row["real_tokens_per_second"]["high"]
        assert row["padded_tokens_per_second"]["median"] > row["real_tokens_per_second"]["median"]
        assert row["peak_memory_gb"] > 0 and row["load_seconds"] > 0
    losses = [row["loss"] for row in rows.values() if row["noise_alpha"]]
    assert max(losses) - min(losses) < 0.1  # the same rows, steps and recipe
    wanted = {"generation_ratio": (15, ">= "), "noise_overhead_percent": (0.5, "<= ")}
    for key, (goal, sense) in wanted.items():
        line = next(x for x in done.stdout.splitlines() if f"`{key}`" in x)
        reached = found[key] >= goal if sense == ">= " else found[key] <= goal
        assert line.endswith("missed |") != reached
    for name in (*speed, "noise_overhead_percent", "generation_ratio", "forward_ratio"):
        assert name in done.stdout


def test_bench_without_data_says_what_to_run(nano, tmp_path):
    folder, _, _ = nano
    done = neft(folder, "bench", "--profile", mine(tmp_path))
    assert done.returncode == 1 and "run notebook 01 first" in done.stderr


def test_the_gpu_bench_without_a_gpu_says_so(nano):
    done = neft(nano[0], "bench-gpu")
    assert done.returncode == 1 and "error: make bench-gpu needs a CUDA GPU" in done.stderr


@pytest.fixture
def stored(nano):
    """Folder of a reference of nano, a copy of its results; gone after the test."""
    folder, results, _ = nano
    reference = folder / "results" / "reference" / "nano"
    shutil.copytree(results, reference, ignore=shutil.ignore_patterns("adapter"))
    yield reference
    shutil.rmtree(reference)


def test_compare_holds_like_with_like(nano, stored):
    folder, _, _ = nano
    same = neft(folder, "compare", "--profile", "nano")
    assert same.returncode == 0 and "MISS" not in same.stdout
    assert "ok baseline test_nll: reference" in same.stdout
    assert "ok neft_a15 - baseline content_nll: reference" in same.stdout
    # Every run of an arm is off by as much: with two seeds, one alone may be chance.
    tables = {}
    for seed in (0, 1):
        losses = stored / "runs" / f"neft_a15-s{seed}" / "losses.csv"
        tables[losses] = table = pd.read_csv(losses)
        table.assign(nll=table.nll + 1).to_csv(losses, index=False)
    other = neft(folder, "compare", "--profile", "nano")
    assert other.returncode == 1 and "MISS neft_a15 test_nll" in other.stdout
    assert "MISS baseline" not in other.stdout
    # What an older version scored is held as far as it goes, and named.
    for losses, table in tables.items():
        table.drop(columns="end_nll").to_csv(losses, index=False)
    older = neft(folder, "compare", "--profile", "nano")
    assert older.returncode == 0 and "MISS" not in older.stdout
    config = stored / "runs" / "baseline-s0" / "config.json"
    changed = json.loads(config.read_text("utf-8"))
    changed["train"]["learning_rate"] = 1.0
    config.write_text(json.dumps(changed), "utf-8")
    unlike = neft(folder, "compare", "--profile", "nano")
    assert unlike.returncode == 1 and "train.learning_rate 0.01 here and 1.0" in unlike.stderr
    manifest = json.loads((stored / "manifest.json").read_text("utf-8"))
    manifest["files"]["test.jsonl"] = "0"
    (stored / "manifest.json").write_text(json.dumps(manifest), "utf-8")
    rows = neft(folder, "compare", "--profile", "nano")
    assert rows.returncode == 1 and "different rows (test.jsonl)" in rows.stderr


def test_two_at_once_are_refused(nano):
    import fcntl

    folder, _, _ = nano
    with open(folder / ".snakemake" / "reproduce.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = neft(folder, "reproduce", "--profile", "nano")
    assert done.returncode == 1 and "another make reproduce is running" in done.stderr


def test_figures_are_made_again_from_stored_results(nano):
    folder, results, _ = nano
    before = (results / "tables" / "main.csv").read_bytes()
    (results / "figures" / "05_confirmatory.png").unlink()
    done = neft(folder, "figures", "--profile", "nano")
    assert done.returncode == 0, done.stderr
    assert (results / "figures" / "05_confirmatory.png").exists()
    assert (results / "tables" / "main.csv").read_bytes() == before


def git(folder, *arguments):
    identity = ["-c", "user.name=test", "-c", "user.email=test@localhost"]
    command = ["git", "-C", str(folder), *identity, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


@pytest.fixture
def repository(nano, tmp_path):
    """(A git clone with the finished nano chain, its runs as if of that commit)."""
    folder = tmp_path / "clone"
    shutil.copytree(nano[0], folder, symlinks=True)
    (folder / ".gitignore").write_text((ROOT / ".gitignore").read_text("utf-8"), "utf-8")
    (folder / "README.md").write_text("no blocks\n", "utf-8")
    git(folder, "init", "-q")
    git(folder, "add", "-A")
    git(folder, "commit", "-q", "-m", "all")
    runs = folder / "results" / "local" / "nano" / "runs"
    say_of_runs(runs, commit=git(folder, "rev-parse", "HEAD"), dirty=False)
    return folder, runs


def say_of_runs(runs, **about):
    for path in runs.glob("*/provenance.json"):
        path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | about), "utf-8")
    for path in runs.glob("*/scores.json"):
        scores = json.loads(path.read_text("utf-8"))
        path.write_text(json.dumps(scores | {"provenance": scores["provenance"] | about}), "utf-8")


def refused(folder, message, *more):
    done = neft(folder, "promote", "--profile", "nano", *more)
    assert done.returncode == 1 and done.stderr.startswith(f"error: {message}"), done.stderr
    assert not (folder / "results" / "reference" / "nano").exists()


def test_results_of_other_rows_or_without_git_are_not_promoted(repository, tmp_path):
    folder, runs = repository
    manifest = runs.parent / "manifest.json"
    text = manifest.read_text("utf-8")
    manifest.write_text(text.replace('"max_tokens": 400', '"max_tokens": 300'), "utf-8")
    refused(folder, "the rows in results/local/nano have max_tokens 300, profile nano has 400")
    manifest.write_text(text, "utf-8")
    (tmp_path / "bin").mkdir()
    done = neft(folder, "promote", "--profile", "nano", PATH=str(tmp_path / "bin"))
    assert done.returncode == 1 and done.stderr.startswith("error: promote needs git, which is not")


def test_whole_clean_results_are_promoted_without_weights(repository):
    folder, runs = repository
    refused(folder, "no run is missing: promote it without PARTIAL", "--partial")
    done = neft(folder, "promote", "--profile", "nano")
    assert done.returncode == 0 and "promoted 5 runs of" in done.stdout, done.stderr
    stored = folder / "results" / "reference" / "nano"
    assert {path.name for path in (stored / "runs").iterdir()} == {
        path.name for path in runs.iterdir()
    }
    assert not list(stored.rglob("*.safetensors"))
    assert (stored / "claims.json").read_bytes() == (runs.parent / "claims.json").read_bytes()


def test_a_missing_run_is_never_a_reference_and_partial_results_name_it(repository):
    folder, runs = repository
    (runs / "baseline-s1" / "scores.json").unlink()
    refused(folder, "run baseline-s1 is not complete: run make reproduce first")
    refused(folder, "the tables are of other runs: run make figures first", "--partial")
    tables = neft(folder, "notebook", 5, "--profile", "nano")
    assert tables.returncode == 0, tables.stderr
    done = neft(folder, "promote", "--profile", "nano", "--partial")
    assert done.returncode == 0 and "without baseline-s1" in done.stdout, done.stderr
    assert not (folder / "results" / "reference" / "nano").exists()
    stored = folder / "results" / "partial" / "nano"
    assert not (stored / "runs" / "baseline-s1").exists()
    copies = {path.stem.partition("__")[2] for path in (stored / "notebooks").glob("*__*.ipynb")}
    assert copies == {"base-s0", "baseline-s0", "neft_a15-s0", "neft_a15-s1"}
    for name in ("main.md", "claims.md"):
        text = (stored / "tables" / name).read_text("utf-8")
        assert "Not complete: 1 of 5 runs are missing, baseline-s1." in text
    shutil.rmtree(runs.parent)
    # Another machine goes on from there: what is stored is not made again.
    shutil.rmtree(folder / ".snakemake")
    shutil.rmtree(folder / "data" / "processed" / "nano")
    taken = neft(folder, "resume", "--profile", "nano")
    assert taken.returncode == 0 and "4 of 5 runs are taken from" in taken.stdout, taken.stderr
    scores = {path.parent.name: path.stat().st_mtime_ns for path in runs.glob("*/scores.json")}
    assert set(scores) == copies
    more = neft(folder, "reproduce", "--profile", "nano", timeout=900)
    assert more.returncode == 0 and more.stdout.count("finished finetune") == 2, more.stderr
    kept = {name: (runs / name / "scores.json").stat().st_mtime_ns for name in scores}
    # neft_a15-s1 is cut to the length of baseline-s1's answers, which are new.
    assert {name for name in scores if kept[name] != scores[name]} == {"neft_a15-s1"}
    again = neft(folder, "resume", "--profile", "nano")
    assert again.returncode == 1 and "no run that is missing here" in again.stderr
    shutil.rmtree(runs.parent)
    figures = neft(folder, "figures", "--profile", "nano")
    assert "these are the numbers of results/partial" in figures.stdout, figures.stderr
    for one in runs.glob("*"):
        (one / "scores.json").unlink()
    refused(folder, "no run is complete: run make reproduce first", "--partial")
    assert stored.is_dir()


def test_results_of_edited_or_unknown_or_older_code_are_not_promoted(repository):
    folder, runs = repository
    say_of_runs(runs, dirty=True)
    refused(folder, "run base-s0 ran with uncommitted changes: run it again")
    say_of_runs(runs, dirty=False, commit=None)
    refused(folder, "run base-s0 ran outside a git repository: run it again in a clone")
    say_of_runs(runs, commit="0" * 40)
    say_of_runs(runs, step_key="other")
    refused(folder, "run base-s0 is older than the code: run make reproduce")
    # Another Python gives other keys: the code of the commit is asked, by this one.
    say_of_runs(runs, python="3.99.0")
    refused(folder, "commit 000000000000, which made runs, is not in this repository")
    say_of_runs(runs, commit=git(folder, "rev-parse", "HEAD"))
    done = neft(folder, "promote", "--profile", "nano")
    assert done.returncode == 0, done.stderr
    shutil.rmtree(folder / "results" / "reference" / "nano")
    with open(
        folder / "neft_utils" / "evaluate" / "text_metrics.py", "a", encoding="utf-8"
    ) as file:
        file.write("EDITED = True\n")
    git(folder, "commit", "-q", "-a", "-m", "edited")
    refused(folder, "run base-s0 is older than the code: run make reproduce")
    (folder / "Snakefile").write_text("", "utf-8")
    refused(folder, "promote needs a clean commit: commit or undo your changes first")
