"""Verifiable instructions: what passes and what fails, directions of the families, no surprises."""

import json
import os
import random
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from neft_utils.evaluate import verifiable
from neft_utils.evaluate.verifiable import FAMILIES, KINDS, check, compose

ROOT = Path(verifiable.__file__).parents[1]
ROWS = [{"id": f"r{i:02d}", "prompt": f"Question {i}?", "response": "Yes."} for i in range(40)]
LONG = "A plan with five steps works well for most of us, and it goes on " * 10  # 150 words
G, P, W = "giggling gagged go", "puppet poppy pepper", "window wow willow we"  # 8 g, 9 p, 7 w

# (family, instruction id, which of its keyword arguments): (answers that pass, that fail)
ANSWERS = {
    ("length_up", "length_constraints:number_words", 0): (["a " * 60, LONG], ["a " * 59, "No."]),
    ("length_up", "length_constraints:number_words", 1): (["a " * 80], ["a " * 79]),
    ("length_up", "length_constraints:number_words", 2): (["a, " * 100], ["a, " * 99]),
    ("length_up", "keywords:frequency", 0): (
        ["Also this; also that."],
        ["Also this.", "al so also"],
    ),
    ("length_up", "keywords:frequency", 1): (["Because! because?"], ["Because I said so."]),
    ("length_up", "keywords:frequency", 2): (["Examples and an example."], ["One example."]),
    ("length_up", "keywords:letter_frequency", 0): ([G], ["giggling gagged"]),
    ("length_up", "keywords:letter_frequency", 1): ([P.upper()], ["puppet poppy pep"]),
    ("length_up", "keywords:letter_frequency", 2): ([W], ["window wow willow"]),
    ("length_up", "keywords:existence", 0): (["Also because of it."], ["Because.", "Also."]),
    ("length_up", "keywords:existence", 1): (["However different"], ["How ever different"]),
    ("length_up", "keywords:existence", 2): (["PEOPLE, for example"], ["people"]),
    ("length_down", "length_constraints:number_words", 0): (["Yes.", "a " * 59], ["a " * 60]),
    ("length_down", "length_constraints:number_words", 1): (["a " * 79], ["a " * 80]),
    ("length_down", "length_constraints:number_words", 2): (["a " * 99], ["a " * 100]),
    ("length_down", "punctuation:no_comma", 0): (["One; two."], ["One, two.", "1,000"]),
    ("length_down", "keywords:letter_frequency", 0): (["G" * 7], [G]),
    ("length_down", "keywords:letter_frequency", 1): (["P" * 8], [P]),
    ("length_down", "keywords:letter_frequency", 2): (["w" * 6], [W]),
    ("length_down", "keywords:forbidden_words", 0): (["Thus it is."], ["Also.", "JUST BECAUSE"]),
    ("length_down", "keywords:forbidden_words", 1): (["differently"], ["a different one"]),
    ("length_down", "keywords:forbidden_words", 2): (["examples"], ["an example", "people"]),
    ("neutral", "detectable_format:title", 0): (["<<Tea>>\nBoil water."], ["<Tea>", "<<>>", "Tea"]),
    ("neutral", "detectable_format:number_highlighted_sections", 0): (
        ["Boil *fresh* water.", "**Boil** water."],
        ["Boil water.", "* Boil\n* Pour", "****", "5 * 3"],
    ),
    ("neutral", "detectable_format:number_highlighted_sections", 1): (
        ["*Boil* and *pour*.", "**Boil** and *pour*."],
        ["*Boil* and pour.", "*Boil and\npour*"],
    ),
    ("neutral", "startend:quotation", 0): (['"Yes."', ' "a"\n'], ['"Yes', "'Yes'", '"', "“Yes.”"]),
    ("neutral", "startend:end_checker", 0): (
        ["Yes. Any other questions?", 'Yes. any other questions?"'],
        ["Any other questions? No.", "Any other question?"],
    ),
    ("neutral", "startend:end_checker", 1): (
        ["Tea. Is there anything else I can help with?"],
        ["Tea. Is there anything else I can help you with?"],
    ),
    ("neutral", "detectable_format:json_format", 0): (
        ['{"answer": "yes"}', '```json\n["a", 1]\n```'],
        ["{answer: yes}", 'Here it is: {"a": 1}', '{"a": 1', "__import__('os')"],
    ),
    ("neutral", "detectable_content:postscript", 0): (["Tea.\n\nP.S. Use milk."], ["Tea. PS milk"]),
    ("neutral", "detectable_content:postscript", 1): (["Tea.\nP.P.S. milk"], ["Tea.\nP.S. milk"]),
}


def item_of(family, instruction_id, choice, name="x"):
    kwargs = KINDS[family][instruction_id][choice]
    return {
        "item_id": name,
        "family": family,
        "instruction_id": instruction_id,
        "kwargs": kwargs,
    }


ALL = [item_of(*key, name="/".join(map(str, key))) for key in ANSWERS]


def verdicts(items, text):
    return check(items, [text] * len(items)).correct.tolist()


# -------------------------------------------------------------------------------- verdicts


def test_every_kind_and_choice_has_answers():
    there = {
        (family, kind, i)
        for family, kinds in KINDS.items()
        for kind, choices in kinds.items()
        for i in range(len(choices))
    }
    assert set(ANSWERS) == there


@pytest.mark.parametrize("key", ANSWERS, ids=lambda key: "-".join(map(str, key)))
def test_answers_that_pass_and_that_fail(key):
    good, bad = ANSWERS[key]
    assert [verdicts([item_of(*key)], text) for text in good] == [[1]] * len(good)
    assert [verdicts([item_of(*key)], text) for text in bad] == [[0]] * len(bad)


def test_an_empty_answer_fails_every_item():
    for text in ("", " \n\t "):
        assert verdicts(ALL, text) == [0] * len(ALL)


def test_same_verdicts_as_the_package_in_strict_mode():
    from if_verifiable.common import evaluate_instructions
    from if_verifiable.ifeval import INSTRUCTION_DICT

    texts = [text for good, bad in ANSWERS.values() for text in good + bad] + ["", LONG]
    for item in ALL:
        mine = [verdicts([item], text)[0] for text in texts]
        name, kwargs = [item["instruction_id"]], [item["kwargs"]]
        theirs = [evaluate_instructions(t, name, kwargs, "", INSTRUCTION_DICT)[0] for t in texts]
        assert mine == [int(bool(r) and r[0].strict_pass) for r in theirs], item["item_id"]


def test_the_table():
    items = compose(ROWS, 2)
    table = check(items, ["Also, an answer."] * 6)
    assert list(table.columns) == ["task", "item_id", "correct", "gold_logprob"]
    assert list(table.task) == [f"verifiable_{family}" for family in FAMILIES for _ in range(2)]
    assert list(table.item_id) == [item["item_id"] for item in items]
    assert set(table.correct) <= {0, 1} and table.correct.dtype == int
    assert table.gold_logprob.isna().all()


def test_items_are_json_and_need_no_prompt_to_be_checked():
    items = compose(ROWS, 12)
    stored = json.loads(json.dumps([{k: v for k, v in i.items() if k != "prompt"} for i in items]))
    assert verdicts(stored, LONG) == verdicts(items, LONG)
    assert {0, 1} == set(verdicts(items, LONG))


@pytest.mark.parametrize(
    "text",
    [
        "[" * 100_000,  # deeper than Python recurses
        '{"a":' * 20_000,
        ">>" + "<" * 100_000,  # quadratic for the title's pattern
        "x" + " \t" * 50_000 + "x",  # quadratic for the postscript's
        "\ud800" * 100_000,
        "سلام " * 20_000,
        "9" * 100_000,
        "The quick brown fox, again. " * 4_000,
    ],
    ids=["brackets", "objects", "angles", "spaces", "surrogates", "arabic", "digits", "english"],
)
def test_hostile_text_gets_a_quick_verdict(text):
    check(ALL, ["warm up"] * len(ALL))  # the first call imports the package, in seconds
    started = time.perf_counter()
    found = dict(zip([item["item_id"] for item in ALL], verdicts(ALL, text), strict=True))
    assert time.perf_counter() - started < 10
    assert found["neutral/detectable_format:json_format/0"] == 0


# ------------------------------------------------------------------------------ directions

VOCABULARY = ["tea", "Also,", "because", "people", "example", "however", "different", G, P, W]
texts = st.lists(st.sampled_from(VOCABULARY), min_size=1, max_size=30).map(" ".join)
UP, DOWN = ([i for i in ALL if i["family"] == f"length_{way}"] for way in ("up", "down"))


@settings(max_examples=200, deadline=None)
@given(texts, st.integers(1, 4), texts)
def test_more_words_never_hurt_up_and_never_help_down(text, times, more):
    short = " ".join([text] * times)
    longer = f"{short} {more}"
    assert all(a <= b for a, b in zip(verdicts(UP, short), verdicts(UP, longer), strict=True))
    assert all(a >= b for a, b in zip(verdicts(DOWN, short), verdicts(DOWN, longer), strict=True))


def test_enough_words_turn_every_item_of_a_direction():
    # So the property above is about verdicts that do change.
    full = " ".join(VOCABULARY * 8)
    assert set(verdicts(UP, "tea")) == {0} and set(verdicts(UP, f"tea {full}")) == {1}
    assert set(verdicts(DOWN, "tea")) == {1} and set(verdicts(DOWN, f"tea {full}")) == {0}


@pytest.mark.parametrize(
    "kind", ["length_constraints:number_words", "keywords:letter_frequency"], ids=["words", "g"]
)
@pytest.mark.parametrize("text", ["tea", LONG, "a " * 60, G, "a " * 85])
def test_the_directions_mirror_each_other(kind, text):
    for choice in range(3):
        up, down = (item_of(f"length_{way}", kind, choice) for way in ("up", "down"))
        assert verdicts([up], text)[0] + verdicts([down], text)[0] == 1


# ------------------------------------------------------------------------------ composition


def test_a_prompt_is_the_rows_and_the_checkers_words():
    prompts = {row["id"]: row["prompt"] for row in ROWS}
    items = compose(ROWS, 12)
    for item in items:
        assert item["prompt"].startswith(prompts[item["example_id"]] + "\n\n")
    first = items[0]["prompt"].split("\n\n")[1]
    assert first == "Answer with at least 60 words."
    for item in items:  # what is counted or looked for is named
        for value in item["kwargs"].values():
            for part in value if isinstance(value, list) else [value]:
                assert str(part) in item["prompt"]


def test_families_and_kinds_are_balanced_and_prompts_differ():
    items = compose(ROWS, 12)
    assert [i["item_id"] for i in items] == [f"{f}/{n:03d}" for f in FAMILIES for n in range(12)]
    assert len({i["example_id"] for i in items}) == len(items) == verifiable.n_rows(12)
    counts = Counter((i["family"], i["instruction_id"]) for i in items)
    assert {f: {counts[f, kind] for kind in KINDS[f]} for f in FAMILIES} == {
        "length_up": {3},
        "length_down": {3},
        "neutral": {2},
    }
    used = {(i["instruction_id"], json.dumps(i["kwargs"])) for i in items}
    assert used == {(i["instruction_id"], json.dumps(i["kwargs"])) for i in ALL}
    for size in range(1, 13):
        counts = Counter((i["family"], i["instruction_id"]) for i in compose(ROWS, size))
        for family in FAMILIES:
            found = [counts[family, kind] for kind in KINDS[family]]
            assert max(found) - min(found) <= 1


def test_more_items_are_added_and_the_seed_moves_prompts():
    small, large = compose(ROWS, 4), {i["item_id"]: i for i in compose(ROWS, 12)}
    assert all(large[item["item_id"]] == item for item in small)
    other = compose(ROWS, 4, seed=1)
    assert [i["kwargs"] for i in other] == [i["kwargs"] for i in small]
    assert [i["example_id"] for i in other] != [i["example_id"] for i in small]


def test_nothing_is_drawn_from_the_global_generators():
    before, legacy = random.getstate(), np.random.get_state()[1].tolist()
    check(compose(ROWS, 12), [LONG] * 36)
    assert random.getstate() == before and np.random.get_state()[1].tolist() == legacy


def test_changing_an_item_changes_no_other_and_no_constant():
    items = compose(ROWS, 12)
    items[3]["kwargs"]["keywords"].append("spoilt")
    assert compose(ROWS, 12)[3]["kwargs"] == {"keywords": ["also", "because"]}


ELSEWHERE = """
import json, random, sys
asked = []
def watch(event, args):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname"):
        asked.append(event)
        raise OSError("no network here")
sys.addaudithook(watch)
random.seed(int(sys.argv[1]))
from neft_utils.evaluate.verifiable import check, compose
rows, texts = json.load(sys.stdin)
items = compose(rows, 12, seed=3)
correct = [check(items, [text] * len(items)).correct.tolist() for text in texts]
print(json.dumps([items, correct, asked]))
"""


def test_same_items_and_verdicts_in_another_process_without_network():
    texts = [LONG, LONG.upper(), "ok then", "*a* b", '{"a": 1}']
    items = compose(ROWS, 12, seed=3)
    expected = [items, [verdicts(items, text) for text in texts], []]
    hash_seed = "2" if os.environ.get("PYTHONHASHSEED") == "1" else "1"
    done = subprocess.run(
        [sys.executable, "-c", ELSEWHERE, "7"],
        input=json.dumps([ROWS, texts]),
        env={**os.environ, "PYTHONHASHSEED": hash_seed, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == expected


# -------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("rows", "options", "words"),
    [
        (ROWS[:35], {}, "12 items in each of 3 families need 36 rows, 35 are there: ask for fewer"),
        (ROWS, {"per_family": 0}, "per_family must be an integer of at least 1, not 0"),
        (ROWS, {"per_family": True}, "per_family must be an integer of at least 1, not True"),
        (ROWS, {"per_family": 1.0}, "per_family must be an integer of at least 1, not 1.0"),
        (ROWS, {"seed": -1}, "seed must be an integer of at least 0, not -1"),
        (ROWS + ROWS[:1], {}, "row 'r00' is there twice: give every row once"),
        ([*ROWS, {"id": "e", "prompt": " "}], {}, "row 'e' has no id or no prompt: leave it out"),
        ([*ROWS, {"id": "e", "prompt": 3}], {}, "row 'e' has no id or no prompt: leave it out"),
        ([*ROWS, {"prompt": "Why?"}], {}, "row None has no id or no prompt: leave it out"),
    ],
)
def test_compose_refuses(rows, options, words):
    with pytest.raises(ValueError) as caught:
        compose(rows, **{"per_family": 12} | options)
    assert words in str(caught.value) and "\n" not in str(caught.value)


ITEM = item_of("length_up", "keywords:letter_frequency", 0)


@pytest.mark.parametrize(
    ("items", "texts", "words"),
    [
        ([ITEM], [], "1 items but 0 texts: give one answer an item"),
        ([ITEM], [None], "the answer to 'x' is NoneType, not text"),
        ([ITEM, ITEM], ["a", "b"], "item 'x' is there twice: give every item once"),
        ([{"item_id": "x"}], ["a"], "an item lacks family, instruction_id, kwargs: give items"),
        ([ITEM | {"family": "up"}], ["a"], "no family 'up': use length_up, length_down, neutral"),
        (
            [ITEM | {"instruction_id": "a:b"}],
            ["a"],
            "no checker 'a:b': use one of detectable_content:",
        ),
        ([ITEM | {"kwargs": {"letters": "g"}}], ["a"], "letter_frequency does not take {'letters'"),
        ([ITEM | {"kwargs": {}}], ["a"], "letter_frequency does not take {}: it made them {"),
        (
            [ITEM | {"kwargs": ITEM["kwargs"] | {"let_relation": "above"}}],
            ["a"],
            "letter_frequency does not take {'letter': 'g'",
        ),
        (  # not a letter: the checker would draw one
            [ITEM | {"kwargs": ITEM["kwargs"] | {"letter": "#"}}],
            ["a"],
            "letter_frequency does not take {'letter': '#'",
        ),
    ],
)
def test_check_refuses(items, texts, words):
    with pytest.raises(ValueError) as caught:
        check(items, texts)
    assert words in str(caught.value) and "\n" not in str(caught.value)
