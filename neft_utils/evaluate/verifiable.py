"""Instructions that a program can check: does an answer do what was asked, whoever judges it?

Each item is a held-out prompt plus one constraint in the words of its checker, e.g. "Answer with
at least 80 words." The checkers are those of IFEval (Zhou et al. 2023, arXiv:2311.07911) as
packaged in `if-verifiable`; the prompts are not, so this is an **IFEval-style composed set, not
IFEval**, and its rates compare arms of this repository with each other and with nothing else.

Noisy embeddings are said to make answers longer, so a rate over all items could rise or fall by
length alone. The items therefore come in families, to be reported apart:

- `length_up`: adding words to an answer can only help,
- `length_down`: adding words can only hurt; words, letters and keywords mirror `length_up`,
- `neutral`: about form, which plain words do not make. Still, an answer cut off at the token limit
  never reaches its closing quote, brace, phrase or postscript: read this family beside the rate of
  stopping.

A gain in `length_up` paid for in `length_down` is verbosity. What answers to the same prompts
*without* constraint pass is the floor of a family: for the untrained model (on the answers that
`WORDS` is set by) a quarter of `length_up`, a half of `length_down`, next to nothing of `neutral`.
A repetition penalty also falls on the words of the prompt, so on keywords asked for and forbidden:
compare arms under one way of decoding only.

Left out of IFEval's 25 checkers: two need tokeniser data from the network (number of sentences,
words in capitals); three guess the language, by sampling, and count text without a guess as right
(all lowercase, all capitals, another language); numbers of bullets and paragraphs must be met
exactly, which has no direction; the rest is beyond a small model (placeholders, two answers, ...).
"""

import copy
import math

import numpy as np
import pandas as pd

COLUMNS = ["task", "item_id", "correct", "gold_logprob"]  # of task_items.csv
KEYS = ("item_id", "family", "instruction_id", "kwargs")  # what `check` reads of an item
MAX_CHARS = 20_000  # 2048 tokens of English are about 9000; see `check`

# Thresholds come from 64 answers of the untrained SmolLM2-135M-Instruct to prompts without any
# constraint (greedy, penalty 1.2): 51, 74 and 108 words at the quartiles. Near the median, where
# an answer that ignores the constraint is right half of the time, both families have room to rise
# and to fall. The letters' counts are medians of the same answers.
WORDS = (60, 80, 100)
LETTERS = (("g", 8), ("p", 9), ("w", 7))
# Words that fit any topic and hide in few others: most keywords are searched for as substrings.
PAIRS = (("also", "because"), ("different", "however"), ("example", "people"))
TWICE = ("also", "because", "example")  # of these answers at most 1 in 50 has one twice

# {family: {instruction id: keyword arguments of its checker, in turn}}. Every argument is given:
# a checker draws a missing one from the global random generator.
KINDS = {
    "length_up": {
        "length_constraints:number_words": [
            {"num_words": n, "relation": "at least"} for n in WORDS
        ],
        "keywords:frequency": [
            {"keyword": word, "frequency": 2, "relation": "at least"} for word in TWICE
        ],
        "keywords:letter_frequency": [
            {"letter": letter, "let_frequency": n, "let_relation": "at least"}
            for letter, n in LETTERS
        ],
        "keywords:existence": [{"keywords": list(pair)} for pair in PAIRS],
    },
    "length_down": {
        "length_constraints:number_words": [
            {"num_words": n, "relation": "less than"} for n in WORDS
        ],
        "punctuation:no_comma": [{}],
        "keywords:letter_frequency": [
            {"letter": letter, "let_frequency": n, "let_relation": "less than"}
            for letter, n in LETTERS
        ],
        "keywords:forbidden_words": [{"forbidden_words": list(pair)} for pair in PAIRS],
    },
    "neutral": {
        "detectable_format:title": [{}],
        "detectable_format:number_highlighted_sections": [
            {"num_highlights": 1},
            {"num_highlights": 2},
        ],
        "startend:quotation": [{}],
        "startend:end_checker": [  # IFEval's own two
            {"end_phrase": "Any other questions?"},
            {"end_phrase": "Is there anything else I can help with?"},
        ],
        "detectable_format:json_format": [{}],
        "detectable_content:postscript": [
            {"postscript_marker": "P.S."},
            {"postscript_marker": "P.P.S"},
        ],
    },
}
FAMILIES = tuple(KINDS)


def n_rows(per_family):
    """Number of rows that `compose` needs: every item has a prompt of its own."""
    return per_family * len(FAMILIES)


def compose(rows, per_family, seed=0):
    """Items of the set: list of dicts, `per_family` of each family, families in order.

    rows: [{"id", "prompt", ...}], held-out, at least n_rows(per_family) of them. seed (an integer
    from 0) says which prompt meets which constraint; it belongs to the set, so that all arms and
    seeds of a profile answer the same items. Kinds of a family take turns: equally many of each
    if per_family is a multiple of 12, else one more of some. A larger per_family only adds items.

    Keys of an item: item_id ("length_up/003"), example_id (the row's id), family, instruction_id
    (IFEval's), kwargs (of its checker) and prompt: the row's, an empty line, the constraint.
    Raises ValueError for bad arguments, too few rows, a repeated id or a row without prompt.
    """
    rows = list(rows)
    for name, value, low in (("per_family", per_family, 1), ("seed", seed, 0)):
        if isinstance(value, bool) or not isinstance(value, int) or value < low:
            raise ValueError(f"{name} must be an integer of at least {low}, not {value!r}")
    if len(rows) < n_rows(per_family):
        raise ValueError(
            f"{per_family} items in each of {len(FAMILIES)} families need {n_rows(per_family)}"
            f" rows, {len(rows)} are there: ask for fewer items or raise data.test_rows"
        )
    seen = set()
    for row in rows:
        name, prompt = row.get("id"), row.get("prompt")
        if name is None or not isinstance(prompt, str) or not prompt.strip():
            raise ValueError(f"row {name!r} has no id or no prompt: leave it out")
        if name in seen:
            raise ValueError(f"row {name!r} is there twice: give every row once")
        seen.add(name)
    order = np.random.default_rng(seed).permutation(len(rows))
    items = []
    for start, family in enumerate(FAMILIES):
        kinds = list(KINDS[family].items())
        for number in range(per_family):
            instruction_id, choices = kinds[number % len(kinds)]
            kwargs = copy.deepcopy(choices[number // len(kinds) % len(choices)])
            row = rows[order[number * len(FAMILIES) + start]]
            _, constraint = _checker(instruction_id, kwargs)
            items.append(
                {
                    "item_id": f"{family}/{number:03d}",
                    "example_id": row["id"],
                    "family": family,
                    "instruction_id": instruction_id,
                    "kwargs": kwargs,
                    "prompt": f"{row['prompt'].rstrip()}\n\n{constraint}",
                }
            )
    return items


def check(items, texts):
    """DataFrame of task ("verifiable_<family>"), item_id, correct (1 or 0) and gold_logprob (NaN).

    items: dicts with item_id, family, instruction_id and kwargs (`compose`; prompts may be left
    out). texts: the answers, one an item, in the same order. This is IFEval's strict accuracy: the
    answer is taken as it is. gold_logprob is NaN because there is no gold answer.

    An empty answer fails every item, as in IFEval, also one such as "no commas": it follows the
    letter of the constraint, but answers nothing, and a model that stops at once would be best at
    `length_down`. Only the first MAX_CHARS characters are looked at: some patterns take quadratic
    time on text made for it, and a prefix keeps the directions of the families. Text is searched
    and parsed as JSON, never run. Known slack of the checkers, the same for every arm: any JSON
    value will do, "5" too; a word is a run of letters and digits, so "don't" is two; "2 * 3 * 4"
    holds a highlight, and a postscript may stand anywhere.

    Raises ValueError for different numbers of items and texts, a text that is no string, a
    repeated item_id, and an item that lacks a key, has another family or that no checker takes.
    """
    items, texts = list(items), list(texts)
    if len(items) != len(texts):
        raise ValueError(f"{len(items)} items but {len(texts)} texts: give one answer an item")
    records, seen = [], set()
    for item, text in zip(items, texts, strict=True):
        if missing := [key for key in KEYS if key not in item]:
            raise ValueError(f"an item lacks {', '.join(missing)}: give items made by compose")
        name, family = item["item_id"], item["family"]
        if name in seen:
            raise ValueError(f"item {name!r} is there twice: give every item once")
        if not isinstance(text, str):
            raise ValueError(f"the answer to {name!r} is {type(text).__name__}, not text")
        if family not in FAMILIES:
            raise ValueError(f"item {name!r}: no family {family!r}: use {', '.join(FAMILIES)}")
        seen.add(name)
        checker, _ = _checker(item["instruction_id"], item["kwargs"])
        records.append((f"verifiable_{family}", name, int(_follows(checker, text)), math.nan))
    return pd.DataFrame(records, columns=COLUMNS)


def _follows(checker, text):
    text = text[:MAX_CHARS]
    try:
        return bool(text.strip()) and bool(checker.check_following(text))
    except RecursionError:  # json.loads on thousands of open brackets, which are no JSON
        return False


def _checker(instruction_id, kwargs):
    """(IFEval's checker with these arguments, its constraint in words)."""
    # Imported late: the package pulls in `datasets`, seconds. Its IFBench half is left alone: that
    # tries a download when imported.
    from if_verifiable.ifeval.instructions_registry import INSTRUCTION_DICT

    if instruction_id not in INSTRUCTION_DICT:
        raise ValueError(f"no checker {instruction_id!r}: use one of {', '.join(_known())}")
    checker = INSTRUCTION_DICT[instruction_id](instruction_id)
    try:
        constraint = checker.build_description(**kwargs)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{instruction_id} does not take {kwargs}: {error}") from None
    # A checker replaces what is missing or impossible by a draw from the global generator.
    if (taken := checker.get_instruction_args() or {}) != kwargs:
        raise ValueError(f"{instruction_id} does not take {kwargs}: it made them {taken}")
    return checker, constraint


def _known():
    return sorted({name for kinds in KINDS.values() for name in kinds})
