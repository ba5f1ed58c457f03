"""The public submission: pinned, read as coded, and saying what it says."""

from __future__ import annotations

import json
import subprocess
import sys
from math import isnan

import numpy as np
import pandas as pd
import pytest
from scipy.special import expit

from neft_utils.base.files import ROOT, sha256_file
from neft_utils.base.paths import NOTEBOOKS, Paths
from neft_utils.base.wheels import NoNetworkError, ProvenanceError
from neft_utils.compare import (
    facts,
    length_control,
    length_pairs,
    published,
    published_plots,
    published_views,
)
from neft_utils.evaluate import alpaca_eval

CACHE = ROOT / "data" / "downloads" / "alpaca_eval"
NOWHERE = "http://127.0.0.1:9"  # nothing listens there


def write(folder, answers, judged):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model_outputs.json").write_text(json.dumps(answers), "utf-8")
    (folder / "annotations.json").write_text(json.dumps(judged), "utf-8")
    return folder


def submission(folder, texts, preferences, reference="r" * 40):
    """A folder of answers to the instructions q0, q1, ..."""
    answers = [{"instruction": f"q{i}", "output": text} for i, text in enumerate(texts)]
    judged = [
        {"instruction": f"q{i}", "output_1": reference, "output_2": text, "preference": preference}
        for i, (text, preference) in enumerate(zip(texts, preferences, strict=True))
    ]
    return write(folder, answers, judged)


@pytest.fixture
def pair(tmp_path):
    """60 prompts; the judge likes length, and the treatment beyond it."""
    rng = np.random.default_rng(0)
    folders = []
    for name, mean, theta in (("control", 3.4, -0.5), ("treatment", 3.9, 0.5)):
        lengths = np.exp(rng.normal(mean, 0.5, 60)).astype(int) + 1
        wins = rng.random(60) < expit(theta + np.log(lengths / 40))
        texts = ["x" * length for length in lengths]
        folders.append(submission(tmp_path / name, texts, [1 + int(win) for win in wins]))
    return folders


def cli(*folders):
    command = [sys.executable, "-m", "neft_utils.compare.published", *map(str, folders)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT)


# ------------------------------------------------------------------------------ reading


def test_preferences_are_coded_as_the_judge_meant_them(tmp_path):
    preferences = [1, 2, 2.0, 0, 1.5, None, 1.25]
    texts = ["a" * n for n in range(1, 8)]
    arm = published.read_arm(submission(tmp_path, texts, preferences))
    assert arm.preference[:5].tolist() == [0, 1, 1, 0.5, 0.5]
    assert isnan(arm.preference[5]) and arm.preference[6] == 0.25
    assert arm.chars.tolist() == list(range(1, 8)) and set(arm.reference_chars) == {40}
    assert not any("q" in key for key in arm.prompt_id)


@pytest.mark.parametrize(
    "damage, words",
    [
        (lambda f: (f / "annotations.json").unlink(), "annotations.json is missing"),
        (lambda f: (f / "model_outputs.json").write_text("[{"), "cannot be read as JSON"),
        (lambda f: (f / "model_outputs.json").write_bytes(b"\xff\xfe["), "cannot be read"),
        (lambda f: (f / "annotations.json").write_text("{}"), "list of objects"),
        (lambda f: (f / "annotations.json").write_text("[3]"), "row 0 has no text"),
        (lambda f: submission(f, ["a", "b"], [1, 3]), "preference 3 is not"),
        (lambda f: submission(f, ["a", "b"], [1, "2"]), "preference '2' is not"),
        (lambda f: submission(f, ["a", "b"], [1, True]), "preference True is not"),
    ],
)
def test_a_bad_folder_is_one_line_that_names_it(tmp_path, pair, damage, words):
    damage(pair[1])
    with pytest.raises(ValueError, match=words) as caught:
        published.compare(*pair, n_resamples=10)
    assert str(pair[1]) in str(caught.value) and "\n" not in str(caught.value)


def test_rows_that_do_not_belong_together_are_refused(tmp_path):
    row = {"instruction": "q", "output_1": "ref", "output_2": "old answer", "preference": 1}
    answers = [{"instruction": "q", "output": "new answer"}]
    with pytest.raises(ValueError, match="annotate these outputs again"):
        published.read_arm(write(tmp_path / "a", answers, [row]))
    swapped = {**row, "output_1": "new answer", "output_2": "ref"}
    with pytest.raises(ValueError, match="swap the two"):
        published.read_arm(write(tmp_path / "b", answers, [swapped]))
    with pytest.raises(ValueError, match="twice"):
        published.read_arm(write(tmp_path / "c", answers * 2, [row]))
    other = [{"instruction": "another", "output": "x"}]
    with pytest.raises(ValueError, match="no instruction is in both"):
        published.read_arm(write(tmp_path / "d", other, [row]))


# ---------------------------------------------------------------------------- comparing


def test_the_command_prints_every_view_as_json(pair):
    done = cli(*pair)
    assert done.returncode == 0 and done.stderr == ""
    found = json.loads(done.stdout)
    pairs = length_pairs.pair_arms(*map(published.read_arm, pair))
    wins = [pairs[f"preference_{arm}"] for arm in length_pairs.ARMS]
    assert found["raw_difference"] == pytest.approx(100 * (wins[1] - wins[0]).mean())
    low, high = found["raw_ci"]
    assert low < found["raw_difference"] < high
    assert tuple(found["length_controlled"]) == length_control.FORMS
    for estimate, low, high in found["length_controlled"].values():
        assert low < estimate < high
    assert list(found["length_matched"]) == ["0.2", "0.5"]
    assert all(isinstance(row[2], int) for row in found["length_matched"].values())
    assert found["mean_chars"] == pytest.approx(
        [pairs.chars_control.mean(), pairs.chars_treatment.mean()]
    )
    assert found["same_reference"] and found["n"] == 60
    assert found == published.compare(*pair)


def test_swapping_the_folders_turns_the_sign(pair):
    there, back = published.compare(*pair, 50), published.compare(*reversed(pair), 50)
    assert back["raw_difference"] == pytest.approx(-there["raw_difference"])
    for form in length_control.FORMS:
        ours, theirs = there["length_controlled"][form][0], back["length_controlled"][form][0]
        assert ours == pytest.approx(-theirs, abs=1e-6)


@pytest.mark.parametrize("what", ["missing", "corrupt", "same prompts"])
def test_the_command_ends_with_one_line_and_code_2(pair, tmp_path, what):
    if what == "missing":
        pair[0] = tmp_path / "nowhere"
    elif what == "corrupt":
        (pair[0] / "annotations.json").write_text("[", "utf-8")
    else:
        answers = [{"instruction": "else", "output": "x"}]
        write(pair[0], answers, [{"instruction": "else", "output_1": "y", "preference": 1}])
    done = cli(*pair)
    assert done.returncode == 2 and done.stdout == ""
    assert len(done.stderr.splitlines()) == 1 and done.stderr.startswith("error: ")


def test_what_cannot_be_estimated_is_null(tmp_path):
    folders = [
        submission(tmp_path / name, ["same"] * 6, preferences)
        for name, preferences in (("a", [1, 2, 1, 1, 2, 1]), ("b", [2, 2, 1, 2, 2, 1]))
    ]
    done = cli(*folders)
    assert done.returncode == 0 and done.stderr == ""
    found = json.loads(done.stdout)
    assert found["length_controlled"]["tanh"] == [None, None, None]
    assert found["length_matched"]["0.2"][2] == 6 and found["raw_difference"] > 0


# ------------------------------------------------------------------- the pinned download


def serve(monkeypatch, tmp_path):
    """A tree like the source's, of own small files, and pins to match; returns its URL."""
    rows, root = [], tmp_path / "server"
    for model, texts in ((published.CONTROL, ["a", "bb"]), (published.TREATMENT, ["ccc", "d"])):
        made = submission(tmp_path / "made" / model, texts, [1, 2])
        for name in published.NAMES:
            path = root / "results" / model / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes((made / name).read_bytes())
            rows.append([model, name, f"results/{model}/{name}", sha256_file(path)])
    facts = tmp_path / "facts"
    facts.mkdir()
    columns = ["model", "name", "path", "sha256"]
    pd.DataFrame(rows, columns=columns).to_csv(facts / "alpaca_eval_files.csv", index=False)
    monkeypatch.setattr(alpaca_eval, "FACTS", facts)
    return root.as_uri()


def test_a_missing_file_is_downloaded_once_and_verified_every_time(monkeypatch, tmp_path):
    source, cache = serve(monkeypatch, tmp_path), tmp_path / "cache"
    folder = published.submission(published.CONTROL, cache, source)
    assert published.read_arm(folder).chars.tolist() == [1, 2]
    assert sorted(path.name for path in folder.iterdir()) == sorted(published.NAMES)
    assert published.submission(published.CONTROL, cache, NOWHERE) == folder  # from the cache
    with open(folder / "annotations.json", "a", encoding="utf-8") as file:
        file.write(" ")
    with pytest.raises(ProvenanceError, match="delete it and run again") as caught:
        published.submission(published.CONTROL, cache, source)
    assert "annotations.json has sha256" in str(caught.value)
    assert not isinstance(caught.value, NoNetworkError)


def test_what_arrives_wrong_is_not_kept(monkeypatch, tmp_path):
    source, cache = serve(monkeypatch, tmp_path), tmp_path / "cache"
    (tmp_path / "server" / "results" / published.CONTROL / published.NAMES[0]).write_text("[]")
    with pytest.raises(ProvenanceError, match="expected"):
        published.submission(published.CONTROL, cache, source)
    assert not list(cache.rglob("*.json"))


def test_without_network_it_says_so_in_one_line(tmp_path):
    with pytest.raises(NoNetworkError, match="cannot download") as caught:
        published.submission(published.TREATMENT, tmp_path, NOWHERE)
    assert "\n" not in str(caught.value)
    assert str(tmp_path / published.TREATMENT) in str(caught.value)  # where to put it


def test_the_pins_are_whole():
    files = pd.read_csv(alpaca_eval.FACTS / "alpaca_eval_files.csv")
    assert files.sha256.str.fullmatch(r"[0-9a-f]{64}").all() and files.sha256.is_unique
    assert sorted(zip(files.model, files.name, strict=True)) == sorted(
        (model, name)
        for model in (published.CONTROL, published.TREATMENT)
        for name in published.NAMES
    )
    assert len(alpaca_eval.COMMIT) == 40 and int(alpaca_eval.COMMIT, 16)
    assert alpaca_eval.COMMIT in alpaca_eval.SOURCE and alpaca_eval.SOURCE.startswith("https://")


# --------------------------------------------------------------------------- revisiting


def here(monkeypatch, tmp_path):
    monkeypatch.setattr("neft_utils.base.paths.ROOT", tmp_path)
    return Paths("smoke", "out")


def test_offline_only_the_leaderboard_is_left(monkeypatch, tmp_path):
    paths, said = here(monkeypatch, tmp_path), []
    monkeypatch.setattr("neft_utils.base.wheels.pinned_file", refuse)
    found = published.revisit(paths, said.append, cache=tmp_path / "empty")
    assert found["source"] == "leaderboard" and found["comparison"] is None
    assert len(said) == 1 and said[0].startswith("leaderboard rows only: ")
    assert found["views"].kind.tolist() == ["raw", "official", "raw", "forced", "forced"]
    assert found["views"].estimate.tolist()[:2] == [found["pair"]["raw"][2], 5.32]
    names = {path.name for path in (paths.results / "published").iterdir()}
    assert names == {"leaderboard.csv", "views.csv"}
    figure = published_plots.length_views(found["views"])
    assert "+35 points as judged, +5 once" in " ".join(figure.get_suptitle().split())
    said = published_views.by_model(None, found["views"])
    assert said.endswith("The leaderboard's length control leaves +5.3.")


def test_table_5_is_the_papers_and_is_said_with_its_caveat():
    table = facts.table_5()
    gains = table.gain.round(1).to_dict()
    assert gains["min new tokens 250"] == 23.4 and gains["plain"] == 29.6
    assert gains["prompt: long and comprehensive"] == 14.0 and gains["NEFTune"] == 0
    forced, noisy = table.loc["min new tokens 250"], table.loc["NEFTune"]
    assert (forced.chars, noisy.chars) == (1111, 1058) and forced.win_rate == 38.58
    said = published_views.by_force()
    for words in ("1,111 characters and wins 38.6 %", "NEFTune 1,058 and 62.0 %, +23.4 points"):
        assert words in said
    assert "+14.0 points ahead" in said and "one run an arm, one judge" in said


def test_the_papers_numbers_in_prose_are_those_of_its_tables():
    """Notebook 0 types the cells that are nearest to our runs."""
    cells = json.loads((NOTEBOOKS / "00_start_here.ipynb").read_text("utf-8"))["cells"]
    text = " ".join("".join("".join(cell["source"]) for cell in cells).split())
    paper = facts.paper_results()
    wins = paper[paper.metric == "win_rate_vs_davinci003"]
    for rows in ("Alpaca", "ShareGPT"):
        plain, noisy = wins[(wins.table == "1/7") & (wins.train_data == rows)].value
        assert f"{plain:.2f} % → {noisy:.2f} %" in text
    plain, *noisy = wins.query("table == '3' and model == 'LLaMA-2-7B'").value[:4]
    assert f"{plain:.2f} % → {min(noisy):.2f} to {max(noisy):.2f} %" in text
    chars = paper.query("metric == 'response_chars' and table == '4'").set_index("train_data").value
    assert f"{chars['ShareGPT'].iloc[1] / chars['ShareGPT'].iloc[0]:.2f} times as long" in text
    assert chars["Alpaca"].iloc[1] / chars["Alpaca"].iloc[0] == pytest.approx(3, abs=0.2)


def refuse(url, expected, path):
    raise NoNetworkError(f"cannot download {url}")


def title(figure):
    return figure.get_suptitle()


def test_a_damaged_cache_is_not_taken_for_no_network(monkeypatch, tmp_path):
    folder = tmp_path / "cache" / published.CONTROL
    folder.mkdir(parents=True)
    (folder / "model_outputs.json").write_text("[]")
    with pytest.raises(ProvenanceError, match="delete it"):
        published.revisit(here(monkeypatch, tmp_path), cache=tmp_path / "cache")


# ----------------------------------------------------- the real files, where they are here


@pytest.fixture(scope="module")
def real():
    folders = [CACHE / name for name in (published.CONTROL, published.TREATMENT)]
    if not all((folder / name).exists() for folder in folders for name in published.NAMES):
        pytest.skip("the public submission is not in data/downloads/alpaca_eval")
    return [published.submission(folder.name, CACHE, NOWHERE) for folder in folders]


def test_the_public_pair_lands_on_what_is_known_of_it(real):
    found = published.compare(*real)
    assert found["n"] == 803 and found["n_missing"] == 2
    assert found["win_rates"] == pytest.approx([26.5, 61.6], abs=0.1)
    pair = facts.leaderboard_pair()
    assert found["raw_difference"] == pytest.approx(pair["raw"][2], abs=0.2)
    assert found["raw_ci"] == pytest.approx([31.2, 39.0], abs=0.1)
    assert found["mean_chars"] == pytest.approx([pair["chars"][0], pair["chars"][1]], abs=2)
    known = {
        "tanh": (2.4, -5.3, 9.9),
        "pooled_tanh": (-1.2, -7.6, 5.1),
        "log_ratio": (27.2, 21.7, 32.7),
        "pooled_log_ratio": (19.0, 13.8, 24.3),
    }
    for form, (estimate, low, high) in known.items():
        assert found["length_controlled"][form][0] == pytest.approx(estimate, abs=0.06)
        assert found["length_controlled"][form][1:] == pytest.approx([low, high], abs=1.0)
    assert found["length_matched"]["0.2"] == pytest.approx([6.4, 7.1, 47], abs=0.06)
    assert found["length_matched"]["0.5"] == pytest.approx([11.0, 4.3, 118], abs=0.06)
    gains = [row["estimate"] for row in found["quintiles"]]
    assert gains == pytest.approx([9, 30, 34, 44, 58], abs=0.5)
    assert found["fit"][0]["form"] == "tanh" and not found["overlap"]["identifiable"]
    views = published_views.views(found, pair).set_index("kind")
    assert views.loc["weighted", "estimate"] == pytest.approx(2.0, abs=0.06)
    assert views.loc["refuted", "view"].tolist() == ["log ratio", "pooled log ratio"]
    # The official value has terms for difficulty; the plain form is near it, not on it.
    official = pair["length_controlled"][:2]
    assert found["equal_length_win_rates"]["tanh"] == pytest.approx(official, abs=4)


def test_revisiting_writes_numbers_and_no_texts(real, monkeypatch, tmp_path):
    paths = here(monkeypatch, tmp_path)
    found = published.revisit(paths, cache=CACHE)
    folder = paths.results / "published"
    assert found["source"] == "annotations"
    written = {path.name: path.read_text("utf-8") for path in folder.iterdir()}
    assert {"comparison.json", "matched.csv", "quintiles.csv", "text_statistics.csv"} <= set(
        written
    )
    texts = [
        row["output"] for row in json.loads((real[1] / "model_outputs.json").read_text("utf-8"))
    ]
    words = {word for text in texts for word in text.split() if len(word) > 12 and word.isalpha()}
    assert len(words) > 100
    for name, content in written.items():
        assert len(content) < 10_000 and not any(word in content for word in words), name
    grown = published_plots.gain_by_length_change(found["quintiles"])
    assert "grows with" in title(grown)
    # Later, offline: the numbers of this run, which are of the same files.
    monkeypatch.setattr("neft_utils.base.wheels.pinned_file", refuse)
    again = published.revisit(paths, lambda line: None, cache=tmp_path / "empty")
    assert again["source"] == "stored" and again["comparison"] == found["comparison"]
    pd.testing.assert_frame_equal(again["text_statistics"], found["text_statistics"])


def test_decoding_is_what_the_submission_says_of_itself(real):
    rows = json.loads((real[1] / "model_outputs.json").read_text("utf-8"))
    said = {json.dumps(json.loads(row["metadata"]), sort_keys=True) for row in rows}
    assert len(said) == 1
    said = json.loads(said.pop())
    ours = facts.decoding_rows().set_index("model").loc[published.TREATMENT]
    assert ours.do_sample == said["do_sample"]
    assert ours.repetition_penalty == said["repetition_penalty"]
    assert ours.max_length == f"{said['max_length']} tokens"


def test_text_statistics_stand_beside_table_4(real):
    table = published.text_statistics(dict(zip(("control", "treatment"), real, strict=True)))
    assert table.arm.tolist() == [
        "control",
        "treatment",
        "paper, noise none",
        "paper, noise uniform",
    ]
    noisy, paper = table.iloc[1], table.iloc[3]
    assert noisy.chars == pytest.approx(paper.chars, rel=0.02)
    assert noisy.log_diversity == pytest.approx(paper.log_diversity, abs=0.1)
    assert noisy.two_gram_repetition == pytest.approx(paper.two_gram_repetition, abs=0.4)
    assert table.iloc[0].two_gram_repetition > 2 * table.iloc[2].two_gram_repetition
