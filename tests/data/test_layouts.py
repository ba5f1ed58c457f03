"""Rows in the layouts that people have: used rightly, left out and counted, or refused."""

import json

import pytest

from neft_utils.base.profiles import Data
from neft_utils.data import layouts, sources, splits
from neft_utils.data.sources import DataError

PLAIN = {"instruction": "Name a fruit.", "output": "A pear."}


def load(folder, *records):
    """(steps, rows) of these records behind a plain one, which is dropped again."""
    path = folder / "rows.jsonl"
    path.write_text("\n".join(json.dumps(one) for one in (PLAIN, *records)), "utf-8")
    steps, rows, _ = sources.load_source(Data(source="json", path=str(path)))
    assert rows[0] == {"id": "row-000001", "prompt": "Name a fruit.", "response": "A pear."}
    return steps, rows[1:]


def said(*turns, role="role", content="content"):
    return [{role: name, content: text} for name, text in turns]


def messages(*turns, **more):
    return {"messages": said(*turns), **more}


ASKED, ANSWERED = ("user", "Why?"), ("assistant", "So.")
CALL = [{"type": "function", "function": {"name": "w", "arguments": "{}"}}]


@pytest.mark.parametrize(
    "record, prompt, response",
    [
        (messages(ASKED, ANSWERED), "Why?", "So."),
        (messages(ASKED, ANSWERED, ("user", "And?"), ("assistant", "Else.")), "Why?", "So."),
        (messages(("developer", "Be brief."), ASKED, ANSWERED), "Be brief.\n\nWhy?", "So."),
        (messages(("system", "A."), ("system", "B."), ASKED, ANSWERED), "A.\n\nB.\n\nWhy?", "So."),
        (messages(("User", "Why?"), ("ASSISTANT ", "So.")), "Why?", "So."),
        (messages(("human", "Why?"), ("model", "So.")), "Why?", "So."),
        (messages(ASKED, ANSWERED, tools=[], weight=1), "Why?", "So."),
        (
            {
                "conversations": said(
                    ("human", "Why?"), ("gpt", "So."), role="from", content="value"
                )
            },
            "Why?",
            "So.",
        ),
        ({"conversation": said(ASKED, ANSWERED, role="from")}, "Why?", "So."),
        ({"messages": json.dumps(said(ASKED, ANSWERED))}, "Why?", "So."),
        ({"messages": {"role": ["user", "assistant"], "content": ["Why?", "So."]}}, "Why?", "So."),
        (
            {
                "messages": [
                    {"Role": "user", "Content": "Why?"},
                    {"role": "assistant", "content": 7},
                ]
            },
            "Why?",
            "7",
        ),
        (
            {
                "messages": [
                    {"role": "user", "content": [{"type": "text", "text": "Wh"}, "y?"]},
                    {"role": "assistant", "content": [{"type": "output_text", "text": "So."}]},
                ]
            },
            "Why?",
            "So.",
        ),
        ({"prompt": said(ASKED), "completion": said(ANSWERED)}, "Why?", "So."),
        ({"prompt": said(ASKED), "completion": "So."}, "Why?", "So."),
        ({"prompt": "Why?", "completion": "So."}, "Why?", "So."),
        ({"Instruction": "Why?", " Output": "So."}, "Why?", "So."),
        ({"instruction": "Add.", "context": "1 1", "response": 2}, "Add.\n\n### Input:\n1 1", "2"),
        ({"prompt": "Add.", "input": "1 1", "response": 2}, "Add.\n\n### Input:\n1 1", "2"),
        ({"instruction": "Is it empty?", "input": "[]", "output": True}, None, "true"),
        ({**PLAIN, "system": "Be brief."}, "Be brief.\n\nName a fruit.", "A pear."),
        ({**PLAIN, "system": "", "history": []}, "Name a fruit.", "A pear."),
        ({**PLAIN, "history": [["", ""]]}, "Name a fruit.", "A pear."),
        ({"prompt": 3, "response": 0.5}, "3", "0.5"),
        ({"prompt": "How many?", "response": 0}, "How many?", "0"),
    ],
)
def test_a_record_becomes_this_row(tmp_path, record, prompt, response):
    steps, (row,) = load(tmp_path, record)
    assert (row["id"], row["response"]) == ("row-000002", response)
    assert row["prompt"] == (prompt or "Is it empty?\n\n### Input:\n[]")
    assert [step["rows"] for step in steps] == [2]


@pytest.mark.parametrize(
    "step, record",
    [
        (layouts.NO_TOOLS, {"messages": [*said(ASKED, ANSWERED)[:1], tool]})
        for tool in (
            {"role": "assistant", "content": "Let me look.", "tool_calls": CALL},
            {"role": "assistant", "content": "Look.", "function_call": {"name": "w"}},
            {"role": "assistant", "content": [{"type": "tool_use", "name": "w"}]},
            {"role": "tool", "content": "22"},
        )
    ]
    + [
        (layouts.NO_TOOLS, messages(ASKED, ANSWERED, tools=CALL)),
        (layouts.NO_TOOLS, messages(ASKED, ANSWERED, ("user", "And?"), ("function", "22"))),
        (layouts.NO_TOOLS, {**PLAIN, "tools": '[{"name": "w"}]'}),
        (
            layouts.NO_TOOLS,
            {
                "conversations": said(
                    ("human", "Why?"),
                    ("function_call", "w()"),
                    ("observation", "22"),
                    ("gpt", "So."),
                )
            },
        ),
        (layouts.TRAINED, {"messages": [*said(ASKED), {**said(ANSWERED)[0], "weight": 0}]}),
        (layouts.TRAINED, {"messages": [*said(ASKED), {**said(ANSWERED)[0], "train": False}]}),
        (layouts.TRAINED, {**PLAIN, "weight": 0.0}),
        (layouts.TRAINED, {**PLAIN, "weight": "0"}),
        (layouts.NO_HISTORY, {**PLAIN, "history": [["Earlier?", "Before."]]}),
        (
            layouts.NO_HISTORY,
            {"prompt": said(ASKED, ANSWERED, ("user", "And?")), "completion": said(ANSWERED)},
        ),
        (layouts.NO_HISTORY, {"prompt": said(ASKED, ANSWERED), "completion": "More."}),
        (layouts.ONLY_TEXT, {**PLAIN, "image": "a.png"}),
        (layouts.ONLY_TEXT, messages(ASKED, ANSWERED, images=["a.png"])),
        (
            layouts.ONLY_TEXT,
            messages(("user", [{"type": "image_url", "image_url": {"url": "a"}}]), ANSWERED),
        ),
        (layouts.IN_ORDER, messages(ANSWERED, ASKED, ANSWERED)),
        (layouts.IN_ORDER, messages(ASKED, ASKED, ANSWERED)),
    ],
)
def test_what_would_become_another_row_is_left_out_and_counted(tmp_path, step, record):
    steps, rows = load(tmp_path, record)
    assert rows == []
    assert steps[1:] == [{"step": step, "rows": 1}]


def test_a_later_answer_of_weight_0_leaves_the_first_alone(tmp_path):
    turns = said(ASKED, ANSWERED, ("user", "And?"), ("assistant", "Else."))
    turns[1]["weight"], turns[3]["weight"] = 1, 0
    _, (row,) = load(tmp_path, {"messages": turns})
    assert (row["prompt"], row["response"]) == ("Why?", "So.")


@pytest.mark.parametrize(
    "record",
    [
        {"instruction": "Name a fruit.", "output": answer}
        for answer in ("", " \n", None, float("nan"))
    ]
    + [
        {"instruction": "Name a fruit."},
        messages(ASKED),
        messages(ASKED, ("assistant", None)),
        messages(ASKED, ("assistant", [])),
        messages(("system", "Be brief.")),
        {"messages": []},
        {"prompt": said(ASKED), "completion": []},
        {"instruction": None, "output": "So."},
    ],
)
def test_an_empty_or_missing_answer_drops_the_row_and_counts_it(tmp_path, record):
    steps, rows = load(tmp_path, record)
    funnel = splits.Funnel(steps, [PLAIN | {"prompt": "a", "response": "b"}, *rows])
    keeps = splits.text_filters(Data(source="json"))["non-empty"]
    assert funnel.keep("non-empty", keeps) == 1
    assert funnel.steps[-1] == {"step": "non-empty", "rows": 1}


@pytest.mark.parametrize(
    "record, says",
    [
        (messages(("narrator", "Once."), ANSWERED), "role 'narrator' is unknown; wanted: system"),
        (messages((None, "Once.")), "role None is unknown"),
        ({"messages": "hi"}, "messages must be a list"),
        ({"messages": {"role": ["user"], "content": []}}, "messages must be a list"),
        ({"conversations": ["hi"]}, "conversations must be a list"),
        ({"prompt": ["hi"], "completion": "So."}, "prompt must be a list"),
        (messages(ASKED, ("assistant", {"a": 1})), "content is dict; wanted: text"),
        (messages(ASKED, ("assistant", [["a"]])), "a part of content is list; wanted: text"),
        ({**PLAIN, "output": ["a", "b"]}, "output is list; wanted: text"),
        ({**PLAIN, "input": [1]}, "input is list; wanted: text"),
        ({**PLAIN, "weight": 0.5}, "weight is 0.5; wanted: 0 (left out) or 1"),
        ({**PLAIN, "weight": "much"}, "weight is 'much'; wanted: 0"),
        ({"question": "a", "answer": "b"}, "has columns question, answer; wanted: (instruction"),
    ],
)
def test_what_nobody_can_mean_is_refused_with_its_place(tmp_path, record, says):
    with pytest.raises(DataError) as caught:
        load(tmp_path, record)
    assert "rows.jsonl, row 2" in str(caught.value) and says in str(caught.value)


def test_a_file_without_any_column_of_answers_names_its_columns(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([{"prompt": "a", "chosen": "b", "rejected": "c"}] * 3))
    with pytest.raises(DataError, match="row 1: has columns prompt, chosen, rejected; wanted"):
        sources.load_source(Data(source="json", path=str(path)))


def test_what_is_not_used_is_said(tmp_path):
    steps, _ = load(
        tmp_path,
        messages(ASKED, ANSWERED, ("user", "And?"), ("assistant", "Else."), source="web"),
        {"messages": [*said(ASKED), {**said(ANSWERED)[0], "reasoning_content": "Hm."}]},
        {**PLAIN, "system": "Be brief.", "source": "book", "empty": ""},
    )
    assert steps[0]["remarks"] == [
        "of 1 conversations the first exchange is the row, 2 later turns are not used",
        "1 system messages stand in front of their prompts",
        "not used: source (2), messages.reasoning_content (1)",
    ]
    assert "remarks" not in load(tmp_path, PLAIN)[0][0]


def test_half_a_character_in_an_id_is_no_bar_to_writing_it(tmp_path):
    _, (row,) = load(tmp_path, {**PLAIN, "id": "odd \ud800"})
    assert row["id"] == "odd ?"
