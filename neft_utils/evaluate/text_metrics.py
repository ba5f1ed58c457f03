"""Measures of answers and losses, on plain strings and tables.

Beside how good an answer is, two things are asked of it: is it longer, and does it repeat itself?
NEFTune (Jain et al. 2023, arXiv:2310.05914, Section 5.2 and Table 4) reports longer answers that
are no more repetitive. Longer texts repeat more by themselves, so both of its measures look at the
first `chunk` words only and drop shorter answers: 50 words for Alpaca, 100 for Evol-Instruct, 150
for ShareGPT and OpenPlatypus, chosen so that at least half of the answers are longer.
Losses are summarised as in its Section 5.1: per example, response tokens only, noise off.

A word is what whitespace separates. An empty answer is an answer of length 0. A mean over nothing
is NaN, never 0.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from math import exp, log, nan, prod

import numpy as np
import pandas as pd


def word_count(text: str) -> int:
    """Number of whitespace-separated words; 0 for an empty text."""
    return len(text.split())


def two_gram_repetition(texts: Iterable[str], chunk: int) -> tuple[float, int]:
    """Share of repeated word pairs in the first `chunk` words, mean over texts, in percent.

    Per text 1 - unique/total over its chunk - 1 pairs of neighbours (paper, Table 4). Texts of
    fewer than `chunk` words are dropped. Returns (percent, number of texts used); (NaN, 0) if none
    is long enough. Raises ValueError if chunk is below 2, where there are no pairs.
    """
    shares = [_repetition(words, 2) for words in _first_words(texts, chunk)]
    return 100 * _mean(shares), len(shares)


def log_diversity(texts: Iterable[str], variant: str = "paper") -> float:
    """Log-diversity -ln(1 - D), D = prod over n = 2, 3, 4 of (1 - share of repeated n-grams).

    Mean over texts; higher is more diverse, at most 20, which a text without repetition gets. To
    compare with the paper pass the first `chunk` words of each text, as `summarise_answers` does.
    Texts too short for a 4-gram are dropped; NaN if none is left.

    variant "textbook" is the formula above (D: Su et al. 2022, arXiv:2202.06417). variant "paper"
    (Kirchenbauer et al. 2023, arXiv:2306.04634, the same group) differs in two places that look
    unintended: the shares, fractions already, are divided by 100 as if they were percent, which
    lifts a text that repeats by up to ln 100 = 4.6; and the last n-gram is left out. We infer that
    Table 4 used it: on public answers of a NEFTune model it gives 16.45 where the table says
    16.41, and the textbook gives 14.99. Raises ValueError for another variant.
    """
    if variant not in ("paper", "textbook"):
        raise ValueError(f"variant must be 'paper' or 'textbook', got {variant!r}")
    divisor, omitted = (100, 1) if variant == "paper" else (1, 0)
    values = []
    for words in map(str.split, texts):
        if len(words) >= 4 + omitted:
            shares = [_repetition(words, n, omitted) for n in (2, 3, 4)]
            diversity = prod(1 - share / divisor for share in shares)
            values.append(-log(max(1 - diversity, exp(-20))))
    return _mean(values)


def distinct_n(texts: Iterable[str], n: int) -> float:
    """Distinct over all n-grams of words, pooled over the texts (Li et al. 2016); 0 to 1.

    Falls with the amount of text, so compare sets of similar size. NaN without any n-gram. Raises
    ValueError if n is below 1.
    """
    if n < 1:
        raise ValueError(f"n must be at least 1, got {n!r}")
    grams = [gram for text in texts for gram in _ngrams(text.split(), n)]
    return len(set(grams)) / len(grams) if grams else nan


def rouge_l(text: str, reference: str) -> float:
    """ROUGE-L F-measure of one answer against one reference, 0 to 1 (Lin 2004; paper, Section 5.1).

    Longest common subsequence over stemmed lower-case words of a-z and 0-9, by `rouge-score`.
    0 if either side has no such word, which is every text in another script.
    """
    return float(_rouge_scorer().score(reference, text)["rougeL"].fmeasure)


def bleu(text: str, reference: str) -> float:
    """Sentence BLEU of one answer against one reference, 0 to 1 (paper, Section 5.1).

    Papineni et al. 2002, n-grams up to 4 with brevity penalty, by `sacrebleu` with its default
    tokeniser and exponential smoothing; only the n that the answer is long enough for count. The
    paper names no implementation, so compare arms, not its figures. 0 if either side is empty.
    """
    return float(_bleu_scorer().sentence_score(text, [reference]).score) / 100


def stop_rate(stopped: Sequence[bool]) -> float:
    """Share (0 to 1) of answers that ended by themselves rather than at the token limit.

    NaN for no answers. Raises ValueError for values other than true and false.
    """
    values = list(stopped)
    if bad := [value for value in values if not isinstance(value, (bool, np.bool_))]:
        raise ValueError(f"stopped must be true or false, got {bad[0]!r}")
    return _mean([float(value) for value in values])


def summarise_answers(
    generations: pd.DataFrame, references: Mapping[str, str] | None, chunk: int
) -> dict[str, float]:
    """All measures above of one run's answers under one decoding.

    generations: columns set, example_id, decoding, n_tokens, stopped, text (generations.jsonl),
    one row per answer. references: example_id -> reference answer for every row, or None.
    chunk: words looked at for repetition and diversity.

    Returns n (answers), n_tokens and n_tokens_median, chars and words (means per answer),
    stop_rate (0-1); over the first `chunk` words of n_chunks answers that are long enough (else
    NaN) two_gram_repetition (percent), log_diversity (variant "paper"), log_diversity_textbook and
    distinct_2 (0-1, pooled, so it falls as n_chunks grows); and rouge_l and bleu (means, 0-1; NaN
    without references). Raises ValueError, naming set and example_id, for a number that is not
    finite, a text that is no string, a repeated row or a missing reference, and for no rows or
    several decodings at once.
    """
    needed = ("set", "example_id", "decoding", "n_tokens", "stopped", "text")
    keys = _keys(generations, needed, "generations")
    if len(decodings := list(generations["decoding"].unique())) > 1:
        raise ValueError(f"generations mixes the decodings {decodings}; summarise one at a time")
    n_tokens = _numbers(generations["n_tokens"])
    _refuse(~(np.isfinite(n_tokens) & (n_tokens >= 0)), keys, "n_tokens is not a finite count")
    stopped = list(generations["stopped"])
    not_bool = [not isinstance(value, (bool, np.bool_)) for value in stopped]
    _refuse(not_bool, keys, "stopped is not true or false")
    texts = list(generations["text"])
    _refuse([not isinstance(text, str) for text in texts], keys, "text is not a string")

    similarity = {"rouge_l": nan, "bleu": nan}
    if references is not None:
        ids = list(generations["example_id"])
        _refuse([example_id not in references for example_id in ids], keys, "no reference")
        pairs = [(text, references[i]) for i, text in zip(ids, texts, strict=True)]
        for name, measure in (("rouge_l", rouge_l), ("bleu", bleu)):
            similarity[name] = _mean([measure(*pair) for pair in pairs])
    chunks = [" ".join(words) for words in _first_words(texts, chunk)]
    repetition, n_chunks = two_gram_repetition(texts, chunk)
    return {
        "n": len(texts),
        "n_tokens": float(n_tokens.mean()),
        "n_tokens_median": float(np.median(n_tokens)),
        "chars": _mean([len(text) for text in texts]),
        "words": _mean([word_count(text) for text in texts]),
        "stop_rate": stop_rate(stopped),
        "two_gram_repetition": repetition,
        "log_diversity": log_diversity(chunks),
        "log_diversity_textbook": log_diversity(chunks, "textbook"),
        "distinct_2": distinct_n(chunks, 2),
        "n_chunks": n_chunks,
        **similarity,
    }


def nll_summary(losses: pd.DataFrame) -> dict[str, float]:
    """Response NLL per split, noise off, in nats per response token: a mean over tokens.

    losses: columns split, example_id, n_tokens, nll (losses.csv), one row per example, nll being
    the mean over its n_tokens. Returns `<split>_nll` for each split, an example weighing as it has
    tokens, as in training, and gap = test_nll - train_nll if both splits are there. Raises
    ValueError, naming split and example_id, for a value that is not finite or a repeated row,
    and for no rows.
    """
    keys = _keys(losses, ("split", "example_id", "n_tokens", "nll"), "losses")
    for column in ("n_tokens", "nll"):
        _refuse(~np.isfinite(_numbers(losses[column])), keys, f"{column} is not finite")
    nll, tokens = (_numbers(losses[name]) for name in ("nll", "n_tokens"))
    sums = pd.DataFrame({"nll": nll * tokens, "n": tokens}).groupby(keys["split"].to_numpy()).sum()
    summary = {f"{split}_nll": float(mean) for split, mean in (sums.nll / sums.n).items()}
    if "test_nll" in summary and "train_nll" in summary:
        summary["gap"] = summary["test_nll"] - summary["train_nll"]
    return summary


def _ngrams(words: Sequence[str], n: int) -> list[tuple[str, ...]]:
    """All runs of n neighbouring words; none if there are fewer than n."""
    return [tuple(words[start : start + n]) for start in range(len(words) - n + 1)]


def _repetition(words: Sequence[str], n: int, omitted: int = 0) -> float:
    """1 - unique/total over the n-grams of words without the last `omitted` ones; at least one."""
    grams = _ngrams(words, n)
    grams = grams[: len(grams) - omitted]
    return 1 - len(set(grams)) / len(grams)


def _first_words(texts: Iterable[str], chunk: int) -> list[list[str]]:
    """First `chunk` words of the texts that have as many."""
    if chunk < 2:
        raise ValueError(f"chunk must be at least 2 words, got {chunk!r}")
    return [words[:chunk] for words in map(str.split, texts) if len(words) >= chunk]


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if len(values) else nan


def _numbers(column: pd.Series) -> np.ndarray:
    """A column as float64; what is no number becomes NaN, for the caller to refuse."""
    return pd.to_numeric(column, errors="coerce").to_numpy(dtype=float, na_value=nan)


def _keys(table: pd.DataFrame, needed: Sequence[str], name: str) -> pd.DataFrame:
    """The first two of the needed columns, which name a row, checked to be there and unique."""
    if missing := [column for column in needed if column not in table.columns]:
        raise ValueError(f"{name} lacks the columns {missing}; it has {list(table.columns)}")
    if table.empty:
        raise ValueError(f"{name} has no rows")
    keys = table[list(needed[:2])]
    _refuse(keys.isna().any(axis=1), keys, f"{name} has a row without a name")
    _refuse(keys.duplicated(), keys, f"{name} has more than one row")
    return keys


def _refuse(bad: Sequence[bool] | np.ndarray, keys: pd.DataFrame, what: str) -> None:
    """ValueError naming the first row of keys where bad is true, in the words of its columns."""
    if (flags := np.asarray(bad, dtype=bool)).any():
        first = keys.iloc[int(flags.argmax())]
        raise ValueError(f"{what}: " + ", ".join(f"{name} {first[name]}" for name in keys.columns))


@lru_cache(maxsize=1)
def _rouge_scorer():
    """One scorer for all answers. Imported late: it pulls in nltk, which takes a second."""
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeL"], use_stemmer=True)


@lru_cache(maxsize=1)
def _bleu_scorer():
    """One scorer for all answers. Imported late, as nothing else needs sacrebleu."""
    from sacrebleu.metrics import BLEU

    return BLEU(effective_order=True)
