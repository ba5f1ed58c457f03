"""Rows in the formats that people have: the same rows from each, or one line that says why not."""

import csv
import gzip
import json

import datasets
import pandas as pd
import pytest

from neft_utils.base import paths
from neft_utils.base.profiles import Data
from neft_utils.data import records, sources
from neft_utils.data.sources import DataError

ROWS = [
    {"instruction": "Name a fruit.", "input": "", "output": "A pear, or a plum."},
    {"instruction": 'Say "so"\nin two lines.', "input": "é 🙂", "output": "So;\tso."},
    {"instruction": "Add one.", "input": "NA", "output": "12"},
    {"instruction": "Give the word for nothing.", "input": "", "output": "null"},
]
TEXTS = [(r["instruction"], r["input"], r["output"]) for r in ROWS]
ARRAY = json.dumps(ROWS, indent=1)
LINES = "\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS) + "\n"


def rows_of(path, source="json"):
    return sources.load_source(Data(source=source, path=str(path)))[1]


def expected():
    more = [f"\n\n### Input:\n{more}" if more else "" for _, more, _ in TEXTS]
    return [(a + b, c) for (a, _, c), b in zip(TEXTS, more, strict=True)]


def table(path, mark):
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(ROWS[0]), delimiter=mark)
        writer.writeheader()
        writer.writerows(ROWS)


def packed(path, text):
    path.write_bytes(gzip.compress(text.encode("utf-8")))


def packed_table(path):
    table(path.with_name("plain"), ",")
    packed(path, path.with_name("plain").read_text("utf-8"))


def saved_splits(path):
    whole = datasets.Dataset.from_list(ROWS)
    datasets.DatasetDict(train=whole, test=whole.select([0])).save_to_disk(path)


def plain_folder(path):
    path.mkdir()
    (path / "train.jsonl").write_text(LINES, "utf-8")


WRITERS = {
    "rows.json": lambda path: path.write_text(ARRAY, "utf-8"),
    "rows.jsonl": lambda path: path.write_text(LINES, "utf-8"),
    "rows.ndjson": lambda path: path.write_text(LINES, "utf-8"),
    "lines.json": lambda path: path.write_text(LINES, "utf-8"),
    "array.jsonl": lambda path: path.write_text(ARRAY, "utf-8"),
    "mark.JSON": lambda path: path.write_text("\ufeff" + ARRAY, "utf-8"),
    "rows.JSONL": lambda path: path.write_text(LINES, "utf-8"),
    "windows.jsonl": lambda path: path.write_bytes(LINES.replace("\n", "\r\n").encode()),
    "rows.json.gz": lambda path: packed(path, ARRAY),
    "rows.jsonl.GZ": lambda path: packed(path, LINES),
    "rows.csv": lambda path: table(path, ","),
    "rows.CSV": lambda path: table(path, ";"),
    "rows.tsv": lambda path: table(path, "\t"),
    "rows.csv.gz": packed_table,
    "rows.parquet": lambda path: pd.DataFrame(ROWS).to_parquet(path),
    "saved": lambda path: datasets.Dataset.from_list(ROWS).save_to_disk(path),
    "saved splits": saved_splits,
    "folder": plain_folder,
}


@pytest.mark.parametrize("source", ["json", "alpaca"])
@pytest.mark.parametrize("name", WRITERS)
def test_the_same_rows_from_every_format(tmp_path, monkeypatch, name, source):
    WRITERS[name](tmp_path / name)
    cache = tmp_path / "cache"
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
    rows = rows_of(tmp_path / name, source)
    assert [(row["prompt"], row["response"]) for row in rows] == expected()
    assert [row["id"] for row in rows] == [f"row-{n:06d}" for n in (1, 2, 3, 4)]
    kept = [path for path in cache.rglob("*") if path.is_file() and path.stat().st_size]
    assert kept == []  # no copy of the rows is left anywhere


def test_conversations_come_through_tables_and_parquet(tmp_path):
    turns = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}]
    pd.DataFrame({"messages": [turns] * 2}).to_parquet(tmp_path / "rows.parquet")
    pd.DataFrame({"messages": [json.dumps(turns)] * 2}).to_csv(tmp_path / "rows.csv", index=False)
    datasets.Dataset.from_list([{"messages": turns}] * 2).save_to_disk(tmp_path / "saved")
    for name in ("rows.parquet", "rows.csv", "saved"):
        rows = rows_of(tmp_path / name)
        assert [(row["prompt"], row["response"]) for row in rows] == [("Why?", "So.")] * 2


def test_numbers_and_gaps_of_a_typed_table(tmp_path):
    frame = pd.DataFrame({"prompt": ["a", "b", "c"], "response": [1.5, None, 2]})
    frame.to_parquet(tmp_path / "rows.parquet")
    assert [row["response"] for row in rows_of(tmp_path / "rows.parquet")] == ["1.5", "", "2.0"]


def test_a_cell_of_a_megabyte_is_read_and_leaves_no_setting_changed(tmp_path):
    limit = csv.field_size_limit()
    (tmp_path / "rows.csv").write_text(f"prompt,response\na,{'word ' * 200_000}\n")
    assert len(rows_of(tmp_path / "rows.csv")[0]["response"]) == 999_999
    assert csv.field_size_limit() == limit


@pytest.mark.parametrize(
    "name, content, says",
    [
        ("rows.csv", "prompt,response\na,b,c\n", "row 1: has 3 values for 2 columns: quote"),
        ("rows.csv", "prompt,response\na\n", "row 1: has 1 values for 2 columns"),
        ("rows.csv", 'prompt,response\n"a,b\n', "is no CSV table (unexpected end of data)"),
        ("rows.csv", "prompt,Prompt ,response\na,b,c\n", "has column 'prompt' twice"),
        ("rows.csv", "", "holds no rows"),
        ("rows.csv", "prompt,response\n", "holds no rows"),
        ("rows.tsv", "question\tanswer\na\tb\n", "row 1: has columns question, answer; wanted"),
        ("rows.csv", "prompt,response\né,b\n".encode("latin-1"), "is not UTF-8: save it as UTF-8"),
        ("rows.json.gz", b"no gzip", "is no whole gzip file"),
        ("rows.json.gz", gzip.compress(ARRAY.encode())[:-9], "is no whole gzip file"),
        ("rows.parquet", b"PAR1", "cannot be loaded"),
        ("rows.txt", b"hello", "cannot tell its format; wanted: .json, .jsonl"),
        ("rows.gz", b"hello", "cannot tell its format"),
        ("rows", b"hello", "cannot tell its format"),
        ("rows.jsonl", LINES + "{oops", "not JSON at line 5, column 2"),
        ("rows.json", LINES + "{oops", "not JSON at line 5, column 2"),
        ("rows.json", ARRAY[:-4], "not JSON at line 2"),
        ("rows.json", '{\n "data": []\n}', "holds one dict; wanted: a list"),
        ("rows.jsonl", "9" * 5000, "line 1 cannot be read (Exceeds the limit"),
    ],
)
def test_a_file_that_cannot_be_read_is_one_line_that_names_it(tmp_path, name, content, says):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError) as caught:
        rows_of(path)
    assert says in str(caught.value) and name in str(caught.value) and "\n" not in str(caught.value)


def test_a_folder_without_rows_or_without_train_is_said(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="empty cannot be loaded .*or give one file"):
        rows_of(tmp_path / "empty")
    one = datasets.Dataset.from_list(ROWS)
    datasets.DatasetDict(a=one, b=one).save_to_disk(tmp_path / "saved")
    with pytest.raises(DataError, match="has splits a, b and no train"):
        rows_of(tmp_path / "saved")
    datasets.DatasetDict(a=one).save_to_disk(tmp_path / "only")
    assert len(rows_of(tmp_path / "only")) == 4


def test_reading_changes_nothing_of_line_ends_within_json(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"a": "one\r\ntwo\rthree"}) + "\r\n")
    assert records.read_jsonl(path) == [{"a": "one\r\ntwo\rthree"}]


def test_a_relative_path_never_counts_from_the_current_folder(tmp_path, monkeypatch):
    root, here = tmp_path / "root", tmp_path / "here"
    for folder in (root, here):
        folder.mkdir()
    monkeypatch.setattr(paths, "ROOT", root)
    monkeypatch.chdir(here)
    (here / "rows.json").write_text(ARRAY)
    with pytest.raises(DataError, match="counts from the profile's folder, then from the repos"):
        rows_of("rows.json")
    (root / "rows.json").write_text(json.dumps(ROWS[:1]))
    assert len(rows_of("rows.json")) == 1
