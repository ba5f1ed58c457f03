"""The steps from rows to splits: filters, duplicates, clusters, the split itself, and its files.

A *row* is {"id", "prompt", "response", "n_prompt_tokens", "n_response_tokens", "cluster"}: an
instruction and its answer, their lengths in tokens of the model's chat template, and the group
of similar rows it belongs to. Splits are made of whole clusters, so that no test row has a near
copy in training. Everything is a function of the source, the configuration and the seeds.
"""

import math
from collections import defaultdict
from pathlib import Path

import numpy as np

from neft_utils.base.files import sha256_file, write_json, write_jsonl
from neft_utils.data.filters import SHAREGPT_FILTERS, connected, grams, similar_pairs
from neft_utils.data.layouts import FILTERS
from neft_utils.data.records import DataError, parse_json, read_jsonl, read_text
from neft_utils.data.sources import hashes_of

MAX_PROMPT_TOKENS = 130  # ShareGPT only: 100 of the user's and about 30 of the chat template
MIN_RESPONSE_TOKENS = 8  # ShareGPT only: shorter answers are "Yes." and cut-off fragments
DUPLICATE = 0.5  # 3-gram Jaccard from which two ShareGPT rows count as one
SIMILAR = 0.3  # 3-gram Jaccard from which two rows must not be on both sides of a split
CONTAMINATED = 0.5  # share of an evaluation prompt's 3-grams from which a row is dropped
# What to do where a filter has left no row; elsewhere the profile may ask for too much.
REMEDIES = {
    "non-empty": "give rows with a prompt and an answer each",
    **dict.fromkeys(FILTERS, "give rows of one prompt and its answer, as text"),
}
KEYS = ("id", "prompt", "response", "n_prompt_tokens", "n_response_tokens", "cluster")


class Funnel:
    """Rows on their way through the filters, and how many each filter left: `rows`, `steps`.

    steps: what `load_source` gives, [{"step", "rows"}], as the manifest has them. Raises DataError
    if no row came through them.
    """

    def __init__(self, steps, rows):
        self.rows, self.steps = rows, list(steps)
        self._require_rows()

    def keep(self, step, test):
        """Keep the rows for which test(row) is true; returns how many were dropped.

        Raises DataError if none is left.
        """
        before, self.rows = len(self.rows), [row for row in self.rows if test(row)]
        self.steps.append({"step": step, "rows": len(self.rows)})
        self._require_rows()
        return before - len(self.rows)

    def _require_rows(self):
        if not self.rows:
            counts = [step["rows"] for step in self.steps]
            lost, worst = max((counts[i] - counts[i + 1], -i) for i in range(len(counts) - 1))
            name = self.steps[1 - worst]["step"]
            remedy = REMEDIES.get(name, "give other rows or change data.max_tokens")
            raise DataError(
                f"{self.steps[0]['step']}: no row of {counts[0]} is left after the filters; most,"
                f" {lost}, fell to {name!r}: {remedy}"
            )


def sieve(funnel, config, count_tokens, ood=()):
    """Send a funnel through all filters, in their order; yields (name, rows that it dropped).

    config: profiles.Data; count_tokens: see `count`; ood: rows whose prompts no row may hold. At
    the end every row has its lengths and its cluster.
    """
    for name, keeps in text_filters(config).items():
        yield name, funnel.keep(name, keeps)
    count(funnel.rows, count_tokens)
    for name, keeps in length_filters(config).items():
        yield name, funnel.keep(name, keeps)
    name, kept = find_copies(funnel.rows, config.source)
    yield name, funnel.keep(name, lambda row: row["id"] in kept)
    if ood:
        name = "no evaluation prompt inside"
        yield name, funnel.keep(name, holds_no(ood))


def text_filters(config):
    """{name: function of a row, true for a row that stays} of the filters that read texts.

    config: profiles.Data. The ShareGPT ones are harsh on purpose: those rows were scraped without
    their writers' consent and serve one end, measuring how well a small model predicts plain
    English answers. Losing a good row costs nothing, keeping a private one does.
    """
    filters = {"non-empty": lambda row: row["prompt"] and row["response"]}
    return filters | (SHAREGPT_FILTERS if config.source == "sharegpt" else {})


def length_filters(config):
    """The same of the filters that look at lengths in tokens, so after `count`."""
    filters = {}
    if config.source == "sharegpt":
        name = f"prompt <= {MAX_PROMPT_TOKENS} and response >= {MIN_RESPONSE_TOKENS} tokens"
        filters[name] = lambda row: (
            row["n_prompt_tokens"] <= MAX_PROMPT_TOKENS
            and row["n_response_tokens"] >= MIN_RESPONSE_TOKENS
        )
    most = config.max_tokens
    return filters | {f"total <= {most} tokens": lambda row: total_tokens(row) <= most}


def count(rows, count_tokens):
    """Give every row its lengths, in place. count_tokens: rows -> [(prompt, response) tokens],
    template and end-of-turn included."""
    for row, (prompt, response) in zip(rows, count_tokens(rows) if rows else [], strict=True):
        row["n_prompt_tokens"], row["n_response_tokens"] = int(prompt), int(response)


def total_tokens(row):
    """Tokens of prompt and response together."""
    return row["n_prompt_tokens"] + row["n_response_tokens"]


def find_copies(rows, source):
    """Give every row its cluster, in place; returns (name of the filter, ids of rows to keep).

    Kept is the first of each group of copies: near ones (3-gram Jaccard from DUPLICATE) of
    ShareGPT, exact ones elsewhere. A cluster joins rows that are alike from SIMILAR on.
    """
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
    return step, {rows[root]["id"] for root in roots}


def holds_no(prompts):
    """A filter of rows that hold no good part (CONTAMINATED) of any of these rows' prompts."""
    asked = [words for row in prompts if (words := grams(row["prompt"]))]

    def clean(row):
        own = grams(row["prompt"]) | grams(row["response"])
        return not any(len(own & prompt) >= CONTAMINATED * len(prompt) for prompt in asked)

    return clean


def split(rows, config):
    """{"pool", "validation", "test"}: whole clusters in random order, none on two sides.

    Each cluster goes where it still fits, test first, else to pool; the first `test_offset` rows
    are no test rows. Rows of a split are in random order, so its first n rows are a random sample
    of it. Raises DataError for too few rows.
    """
    clusters = defaultdict(list)
    for row in rows:
        clusters[row["cluster"]].append(row)
    groups = list(clusters.values())
    splits = _placed(groups, config, config.test_rows, config.validation_rows)
    wanted = (config.test_rows, config.validation_rows, config.train_rows)
    if not _enough(splits, *wanted):
        raise DataError(
            f"{len(rows)} rows in {len(groups)} groups of similar rows are left, too few for"
            f" test_rows {wanted[0]} + validation_rows {wanted[1]} + train_rows {wanted[2]}:"
            f" {_remedy(groups, config, wanted)}raise max_tokens or add rows"
        )
    return splits


def _placed(groups, config, test, validation):
    splits = {"pool": [], "validation": [], "test": []}
    sizes = {"test": test, "validation": validation, "pool": math.inf}
    placed = 0
    for i in np.random.default_rng(config.split_seed).permutation(len(groups)):
        fits = (name for name in sizes if len(splits[name]) + len(groups[i]) <= sizes[name])
        name = next(one for one in fits if one != "test" or placed >= config.test_offset)
        splits[name].extend(groups[i])
        placed += len(groups[i])
    return splits


def _enough(splits, test, validation, train):
    wanted = {"test": test, "validation": validation, "pool": train}
    return all(len(splits[name]) >= n for name, n in wanted.items())


def _remedy(groups, config, wanted):
    """Sizes in about the same proportions that fit, as the beginning of a remedy."""
    whole = sum(map(len, groups))
    for total in np.unique(np.linspace(whole, 3, 60, dtype=int))[::-1]:
        share = min(1, total / sum(wanted))
        for least in (1, 2, 4):  # a split of one row has no place for a group of two
            *held_out, train = (int(share * n) for n in wanted)
            test, validation = (max(least, n) for n in held_out)
            train = max(1, min(train, whole - test - validation))
            if _enough(_placed(groups, config, test, validation), test, validation, train):
                fitting = f"test_rows {test}, validation_rows {validation}, train_rows {train}"
                return f"{fitting} would fit; or "
    return "no sizes fit; "


def draw(pool, config, seed):
    """The training rows of a seed: `train_rows` of the pool in an order of its own.

    A smaller draw is the beginning of a larger one.
    """
    order = np.random.default_rng([config.split_seed, seed]).permutation(len(pool))
    return [pool[i] for i in order[: config.train_rows]]


# ------------------------------------------------------------------------------------ writing


def describe(config, seeds, funnel, splits, hashes):
    """The manifest: where the rows come from (hashes: {file: sha256}), how many and how long."""
    return {
        "source": config.source,
        "revision": config.revision,
        "sources": hashes,
        "max_tokens": config.max_tokens,
        "split_seed": config.split_seed,
        "seeds": list(seeds),
        "funnel": funnel.steps,
        "rows": {name: len(rows) for name, rows in splits.items()},
        "lengths": {name: _quantiles(rows) for name, rows in splits.items()},
        "pool_total_tokens": [total_tokens(row) for row in splits["pool"]],
    }


def _quantiles(rows):
    """p5 ... max, in tokens, of whole examples and of responses; None where there are no rows."""
    points = {"p5": 5, "p25": 25, "p50": 50, "p75": 75, "p95": 95, "max": 100}

    def of(lengths):
        if not lengths:
            return dict.fromkeys(points)
        values = np.percentile(lengths, list(points.values()), method="nearest")
        return dict(zip(points, values.tolist(), strict=True))

    return {
        "total": of([total_tokens(row) for row in rows]),
        "response": of([row["n_response_tokens"] for row in rows]),
    }


def write_splits(out_dir, splits, manifest):
    """Write every split as JSON Lines and the manifest, with their sha256; returns it.

    Splits first, manifest last: while there is no manifest, load_split gives no row.
    """
    out_dir = Path(out_dir)
    (out_dir / "manifest.json").unlink(missing_ok=True)
    paths = {name: out_dir / f"{name}.jsonl" for name in splits}
    for stale in set(out_dir.glob("train-s*.jsonl")) - set(paths.values()):
        stale.unlink()
    for name, path in paths.items():
        write_jsonl(path, [{key: row[key] for key in KEYS} for row in splits[name]])
    manifest["files"] = hashes_of(*paths.values())
    write_json(out_dir / "manifest.json", manifest)
    return manifest


# ------------------------------------------------------------------------------------ reading


def load_split(out_dir, name):
    """Rows of the split `name` ("pool", "train-s0", "validation", "test", "ood") of a prepared
    folder, held against its manifest. Raises DataError."""
    manifest, path = Path(out_dir) / "manifest.json", Path(out_dir) / f"{name}.jsonl"
    files = parse_json(read_text(manifest), manifest)["files"] if manifest.is_file() else {}
    if path.name not in files or not path.is_file():
        have = ", ".join(file.removesuffix(".jsonl") for file in files) or "nothing"
        raise DataError(f"{path} is missing: run notebook 01 first (prepared so far: {have})")
    if sha256_file(path) != files[path.name]:
        raise DataError(f"{path} has changed since it was prepared: run notebook 01 again")
    return read_jsonl(path)


def train_rows(profile, arm, seed, paths):
    """The rows that a run trains on: the seed's subset, or the arm's first share of it."""
    rows = load_split(paths.processed, f"train-s{seed}")
    return rows[: max(1, round(len(rows) * profile.data_fraction(arm)))]
