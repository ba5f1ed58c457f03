"""The measures of answers and losses against numbers worked out by hand."""

from __future__ import annotations

import json
import subprocess
import sys
from math import exp, isnan, log, nan
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from neft_utils.evaluate import text_metrics

ROOT = Path(text_metrics.__file__).parents[1]
words = st.lists(st.sampled_from(["a", "b", "c", "dd"]), max_size=12).map(" ".join)
quick = settings(max_examples=60, deadline=None)


def answers(**columns) -> pd.DataFrame:
    """Three answers: six words that repeat, one word, nothing."""
    table = {
        "set": ["test", "test", "ood"],
        "example_id": ["x1", "x2", "x1"],
        "decoding": ["greedy"] * 3,
        "n_tokens": [10, 2, 0],
        "stopped": [True, False, True],
        "text": ["to be or to be too", "Yes.", ""],
    }
    return pd.DataFrame(table | columns)


def losses(**columns) -> pd.DataFrame:
    table = {
        "split": ["train", "train", "test", "test", "ood"],
        "example_id": ["a", "b", "c", "d", "a"],
        "n_tokens": [100, 2, 5, 5, 5],
        "nll": [1.0, 2.0, 2.5, 3.5, 0.25],
    }
    return pd.DataFrame(table | columns)


@pytest.mark.parametrize(
    "text, count", [("", 0), (" \n\t ", 0), ("one", 1), ("two  words\n", 2), ("a-b c.d", 2)]
)
def test_word_count(text, count):
    assert text_metrics.word_count(text) == count


def test_two_gram_repetition_by_hand():
    # "to be or to be": to-be, be-or, or-to, to-be: 3 of 4 are different, 25 % repeated.
    assert text_metrics.two_gram_repetition(["to be or to be too"], 5) == (pytest.approx(25), 1)
    # The sixth word adds be-too: 4 of 5. A text of just `chunk` words still counts.
    assert text_metrics.two_gram_repetition(["to be or to be too"], 6) == (pytest.approx(20), 1)
    assert text_metrics.two_gram_repetition(["to be or to be too"], 7) == (
        pytest.approx(nan, nan_ok=True),
        0,
    )
    # Mean over texts, not over pairs; the short one is dropped.
    texts = ["x x x", "a b c d e f", "a b"]
    assert text_metrics.two_gram_repetition(texts, 3) == (pytest.approx((50 + 0) / 2), 2)


def test_two_gram_repetition_of_nothing_is_nan_and_not_zero():
    for texts in ([], [""], ["too short"]):
        percent, used = text_metrics.two_gram_repetition(texts, 3)
        assert isnan(percent) and used == 0


@pytest.mark.parametrize("chunk", [1, 0, -5])
def test_chunks_without_pairs_are_refused(chunk):
    with pytest.raises(ValueError, match=f"chunk must be at least 2 words, got {chunk}"):
        text_metrics.two_gram_repetition(["a b c"], chunk)


def test_log_diversity_by_hand():
    text = "a b a b a b"
    # Textbook: 2 of 5 pairs, 2 of 4 triples and 2 of 3 quadruples are different:
    # D = 2/5 * 2/4 * 2/3 = 2/15.
    textbook = -log(1 - 2 / 15)
    # Paper: the last n-gram is left out (2/4, 2/3, 2/2) and shares are divided by 100:
    # D = (1 - 0.005) (1 - 1/300) (1 - 0).
    paper = -log(1 - (1 - 0.5 / 100) * (1 - (1 / 3) / 100))
    assert text_metrics.log_diversity([text], "textbook") == pytest.approx(textbook)
    assert text_metrics.log_diversity([text]) == pytest.approx(paper)
    assert text_metrics.log_diversity([text], "paper") == pytest.approx(paper)
    assert text_metrics.log_diversity([text, "one two three four five"]) == pytest.approx(
        (paper + 20) / 2
    )


@pytest.mark.parametrize("variant, shortest", [("textbook", 4), ("paper", 5)])
def test_log_diversity_is_20_at_most_and_needs_a_4_gram(variant, shortest):
    text = " ".join("abcdefgh"[:shortest])
    assert text_metrics.log_diversity([text], variant) == pytest.approx(20)
    assert text_metrics.log_diversity([text, "too short", ""], variant) == pytest.approx(20)
    assert isnan(text_metrics.log_diversity([text[:-2]], variant))
    assert isnan(text_metrics.log_diversity([], variant))


@quick
@given(st.integers(5, 60), st.integers(2, 6))
def test_log_diversity_variants_differ_by_at_most_ln_100(n_words, n_kinds):
    """Dividing shares by 100 lifts -ln(sum of shares) by ln 100, where nothing is capped."""
    text = " ".join(str(i * i % n_kinds) for i in range(n_words))
    last = text.split()[
        :-1
    ]  # the paper's variant leaves the last n-gram out: compare like with like
    paper = text_metrics.log_diversity([text], "paper")
    if len(last) >= 4:
        textbook = text_metrics.log_diversity([" ".join(last)], "textbook")
        assert textbook - 1e-9 <= paper <= textbook + log(100) + 0.03


def test_log_diversity_refuses_other_variants():
    with pytest.raises(ValueError, match="variant must be 'paper' or 'textbook', got 'simctg'"):
        text_metrics.log_diversity(["a b c d e"], "simctg")


def test_distinct_n_pools_the_texts():
    texts = ["a b a", "a b", ""]
    assert text_metrics.distinct_n(texts, 1) == pytest.approx(2 / 5)
    assert text_metrics.distinct_n(texts, 2) == pytest.approx(
        2 / 3
    )  # ab, ba, ab; none across texts
    assert text_metrics.distinct_n(texts, 3) == 1
    assert isnan(text_metrics.distinct_n(texts, 4))
    with pytest.raises(ValueError, match="n must be at least 1, got 0"):
        text_metrics.distinct_n(texts, 0)


@quick
@given(st.lists(words, max_size=5), st.randoms(use_true_random=False))
def test_set_measures_ignore_order_and_spacing(texts, random):
    shuffled = random.sample(texts, len(texts))
    spaced = [f"\n{text.replace(' ', '  ')} " for text in shuffled]
    for measure in (
        lambda ts: text_metrics.two_gram_repetition(ts, 3)[0],
        lambda ts: text_metrics.log_diversity(ts, "paper"),
        lambda ts: text_metrics.log_diversity(ts, "textbook"),
        lambda ts: text_metrics.distinct_n(ts, 2),
    ):
        assert measure(spaced) == pytest.approx(measure(texts), nan_ok=True)


def test_rouge_l_by_hand():
    # Longest common subsequence "the cat sat" of 3: precision 3/4, recall 3/6, F = 0.6.
    f_measure = text_metrics.rouge_l("The cat quietly sat!", "the cat has just now sat")
    assert f_measure == pytest.approx(0.6)
    assert text_metrics.rouge_l("running dogs", "run dog") == 1  # stemmed
    assert text_metrics.rouge_l("", "some reference") == text_metrics.rouge_l("answer", "") == 0
    assert text_metrics.rouge_l("b a", "a b") == pytest.approx(0.5)  # order counts


def test_bleu_by_hand():
    # All n-grams match up to n = 3, half the length: brevity penalty exp(1 - 6/3).
    half = text_metrics.bleu("the cat sat", "the cat sat on the mat")
    assert half == pytest.approx(exp(-1))
    # 3 of 4 words, 1 of 3 pairs; no triple of 2 (smoothed to 1/2 of one), no quadruple of 1
    # (to 1/4 of one); as long as its reference.
    smoothed = (3 / 4 * 1 / 3 * (1 / 2) / 2 * (1 / 4) / 1) ** (1 / 4)
    assert text_metrics.bleu("a b x c", "a b c d") == pytest.approx(smoothed)
    assert text_metrics.bleu("Yes.", "Yes.") == pytest.approx(1)  # fewer than four tokens
    assert text_metrics.bleu("a b c d e", "a b c d e") == pytest.approx(1)
    assert (
        text_metrics.bleu("e f g", "a b c")
        == text_metrics.bleu("", "a b")
        == text_metrics.bleu("a", "")
        == 0
    )


def test_stop_rate():
    assert text_metrics.stop_rate([True, False, True, True]) == 0.75
    assert text_metrics.stop_rate(np.array([False, False])) == 0
    assert isnan(text_metrics.stop_rate([]))
    for value in (nan, None, "true", 1):
        with pytest.raises(ValueError, match="stopped must be true or false, got"):
            text_metrics.stop_rate([True, value])


def test_summarise_answers_by_hand():
    references = {"x1": "to be or to be too", "x2": "No.", "unused": "..."}
    summary = text_metrics.summarise_answers(answers(), references, chunk=5)
    # "Yes." and "No." share the full stop: 1 of 2 tokens, and their pair is smoothed to 1/2.
    bleu_of_yes = (1 / 2 * 1 / 2) ** (1 / 2)
    expected = {
        "n": 3,
        "n_tokens": 4,
        "n_tokens_median": 2,
        "chars": (18 + 4 + 0) / 3,
        "words": (6 + 1 + 0) / 3,
        "stop_rate": 2 / 3,
        "two_gram_repetition": 25,
        # "to be or to be" without its last n-grams: three pairs, two triples, one quadruple.
        "log_diversity": 20,
        # With them: 3 of 4 pairs are different, all triples and quadruples.
        "log_diversity_textbook": -log(1 - 3 / 4),
        "distinct_2": 3 / 4,
        "n_chunks": 1,
        "rouge_l": (1 + 0 + 0) / 3,
        "bleu": (1 + bleu_of_yes + 0) / 3,
    }
    assert summary == pytest.approx(expected)
    json.dumps(summary)  # plain numbers


def test_summary_looks_at_the_first_words_only():
    text = "a b a b a b different words follow here"
    table = answers(text=[text, "Yes.", ""])
    summary = text_metrics.summarise_answers(table, None, chunk=6)
    assert summary["log_diversity"] == pytest.approx(text_metrics.log_diversity(["a b a b a b"]))
    assert summary["log_diversity"] != pytest.approx(text_metrics.log_diversity([text]))
    assert isnan(summary["rouge_l"]) and isnan(summary["bleu"])
    textbook = text_metrics.log_diversity(["a b a b a b"], "textbook")
    assert summary["log_diversity_textbook"] == pytest.approx(textbook)
    assert summary["distinct_2"] == pytest.approx(2 / 5)


def test_summary_of_empty_answers_has_length_zero_and_no_repetition():
    summary = text_metrics.summarise_answers(
        answers(text=["", " ", "\n"], n_tokens=0), {"x1": "", "x2": ""}, 2
    )
    assert summary["n_tokens"] == summary["words"] == summary["rouge_l"] == summary["n_chunks"] == 0
    assert summary["bleu"] == 0
    for name in ("two_gram_repetition", "log_diversity", "log_diversity_textbook", "distinct_2"):
        assert isnan(summary[name]), name


def test_summary_survives_the_file_format(tmp_path):
    path = tmp_path / "generations.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in answers().to_dict("records")))
    read = pd.DataFrame([json.loads(line) for line in path.read_text().splitlines()])
    expected = text_metrics.summarise_answers(answers(), None, 5)
    assert text_metrics.summarise_answers(read, None, 5) == pytest.approx(expected, nan_ok=True)


BAD_ANSWERS = [
    (answers(n_tokens=[10, nan, 0]), "n_tokens is not a finite count: set test, example_id x2"),
    (answers(n_tokens=[10, 2, np.inf]), "n_tokens is not a finite count: set ood, example_id x1"),
    (answers(n_tokens=[-1, 2, 0]), "n_tokens is not a finite count: set test, example_id x1"),
    (answers(n_tokens=["ten", 2, 0]), "n_tokens is not a finite count: set test, example_id x1"),
    (answers(stopped=[True, None, True]), "stopped is not true or false: set test, example_id x2"),
    (answers(text=["a", "b", None]), "text is not a string: set ood, example_id x1"),
    (answers(text=["a", 5, "c"]), "text is not a string: set test, example_id x2"),
    (answers(set="test"), "generations has more than one row: set test, example_id x1"),
    (answers(example_id=["x1", None, "x1"]), "generations has a row without a name: set test"),
    (answers(decoding=["greedy", "greedy", "sampled"]), "mixes the decodings .*one at a time"),
    (answers().iloc[:0], "generations has no rows"),
    (
        answers().drop(columns=["text", "stopped"]),
        r"generations lacks the columns \['stopped', 'text'\]",
    ),
]


@pytest.mark.parametrize("table, message", BAD_ANSWERS)
def test_bad_answers_are_refused_by_name(table, message):
    with pytest.raises(ValueError, match=message) as caught:
        text_metrics.summarise_answers(table, None, 5)
    assert "\n" not in str(caught.value)


def test_a_missing_reference_is_refused_by_name():
    with pytest.raises(ValueError, match="no reference: set test, example_id x2"):
        text_metrics.summarise_answers(answers(), {"x1": "reference"}, 5)


def test_nll_summary_weighs_examples_by_tokens():
    train = (100 * 1.0 + 2 * 2.0) / 102
    expected = {"train_nll": train, "test_nll": 3.0, "ood_nll": 0.25, "gap": 3 - train}
    assert text_metrics.nll_summary(losses()) == pytest.approx(expected)
    json.dumps(text_metrics.nll_summary(losses()))


@pytest.mark.parametrize("kept", ["train", "test"])
def test_nll_summary_has_no_gap_without_both_splits(kept):
    table = losses()
    assert set(text_metrics.nll_summary(table[table["split"] == kept])) == {f"{kept}_nll"}


@quick
@given(st.integers(-40, 40).map(lambda k: k / 8), st.permutations(range(5)))
def test_nll_summary_shifts_with_the_losses_and_ignores_their_order(shift, order):
    before = text_metrics.nll_summary(losses())
    table = losses()
    after = text_metrics.nll_summary(table.assign(nll=table["nll"] + shift).iloc[order])
    assert after.pop("gap") == pytest.approx(before.pop("gap"))
    assert after == pytest.approx({name: value + shift for name, value in before.items()})


BAD_LOSSES = [
    (losses(nll=[1, 2, nan, 4, 5]), "nll is not finite: split test, example_id c"),
    (losses(nll=[1, np.inf, 3, 4, 5]), "nll is not finite: split train, example_id b"),
    (losses(nll=[1, 2, 3, 4, "?"]), "nll is not finite: split ood, example_id a"),
    (losses(n_tokens=[1, 2, 3, nan, 5]), "n_tokens is not finite: split test, example_id d"),
    (losses(split=["test"] * 5), "losses has more than one row: split test, example_id a"),
    (
        losses(split=["train", None, "test", "test", "ood"]),
        "losses has a row without a name: split",
    ),
    (losses().iloc[:0], "losses has no rows"),
    (losses().drop(columns="nll"), r"losses lacks the columns \['nll'\]; it has"),
]


@pytest.mark.parametrize("table, message", BAD_LOSSES)
def test_bad_losses_are_refused_by_name(table, message):
    with pytest.raises(ValueError, match=message) as caught:
        text_metrics.nll_summary(table)
    assert "\n" not in str(caught.value)


def test_importing_the_module_stays_light():
    heavy = {"torch", "nltk", "rouge_score", "sacrebleu"}
    code = f"import sys, neft_utils.evaluate.text_metrics; print({heavy} & set(sys.modules))"
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert out.stdout.strip() == "set()"
