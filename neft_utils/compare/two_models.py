"""Did a change make a model better, or later to stop? Any two fine-tunes, on rows of one's own."""

import math
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from neft_utils.base.files import write_csv
from neft_utils.base.profiles import Data
from neft_utils.base.strict import ConfigError
from neft_utils.compare import end_of_turn, end_of_turn_plots, plots, words
from neft_utils.compare.metrics import quantity
from neft_utils.data.sources import load_source
from neft_utils.evaluate.generate import answer
from neft_utils.evaluate.losses import score_losses
from neft_utils.train.encoding import encode
from neft_utils.train.finetunes import find_finetune, longest_text, read_tokenizer, with_each

BATCH_TOKENS, BATCH_ANSWERS = 2048, 16  # of one forward
NAMES = {
    "end_nll": "Stopping",
    "content_nll": "Content",
    "test_nll": "All tokens",
    "answer_length": "Own answers",
}


@dataclass(frozen=True)
class Comparison:
    """What `compare_models` found; `str()` gives its sentences."""

    measures: pd.DataFrame  # measure, unit, estimate, ci_low, ci_high, n_pairs, n_rows, sentence
    rows: pd.DataFrame  # seed (pair), example_id, n_tokens, p_end, end_nll, content_nll, test_nll
    answers: (
        pd.DataFrame
    )  # seed, example_id, control, treatment (tokens), cut, answer_length; or empty
    scope: str  # over what the intervals are

    def __str__(self):
        return "\n".join([*self.measures.sentence, self.scope])

    def figure(self):
        """Change of P(end) and of content over the reference's length: a matplotlib Figure."""
        return end_of_turn_plots.figure(self.rows.assign(label="treatment minus control"))

    def write(self, folder):
        """measures.csv, rows.csv, by_length.csv, answers.csv and end_of_turn.png and .svg."""
        folder = Path(folder)
        write_csv(folder / "measures.csv", self.measures)
        write_csv(folder / "rows.csv", self.rows)
        by_length = end_of_turn.by_length(self.rows.assign(label="treatment minus control"))
        write_csv(folder / "by_length.csv", by_length)
        if len(self.answers):
            write_csv(folder / "answers.csv", self.answers)
        plots.save(self.figure(), folder, "end_of_turn", end_of_turn_plots.ALT)


def compare_models(
    control,
    treatment,
    rows,
    *,
    base=None,
    nf4=False,
    answers=0,
    max_new_tokens=256,
    say=print,
):
    """What a change does to stopping, content, loss and length of answers: a `Comparison`.

    control, treatment: a model each, or lists of S of them, pair by pair (trainings that differ in
    nothing but the change; a pair is a seed). A model is a folder, or a hub id with its commit
    (owner/name@COMMIT), of whole weights or of a PEFT adapter. base: the adapters' base, where it
    is not at the place that they name; nf4: whether it is rounded to 4 bits first, as in QLoRA.
    rows: a file in any layout of `data.layouts`, or a list of {"prompt", "response"} with an "id"
    or without; neither model may have been trained on them. answers: how many of the first prompts
    are answered as well, greedily with repetition penalty 1.2, by at most max_new_tokens tokens.

    Every number is treatment minus control over N rows, noise and dropout off:

        end_nll        -log P(end of turn) where the reference answer ends, nats
        content_nll    nats per response token without the end of turn, rows weighted by tokens
        test_nll       nats per response token, rows weighted by tokens, as training does
        answer_length  mean log ratio of tokens, prompt by prompt, shown in per cent; an answer's
                       tokens include its end of turn, so that an empty one has one

    Intervals (95 %) are over pairs and rows (`stats.confirmatory_interval`); with one pair over
    rows alone (`end_of_turn.rows_interval`), which says nothing about another seed. They are not
    corrected for being several.

    Raises ConfigError for models that cannot be read, an adapter without its base, models whose
    tokenizers or templates make other tokens of the rows, and rows without anything usable;
    DataError for a file of rows in no known layout.
    """
    pairs = _pairs(control, treatment)
    found = {s: find_finetune(s, base) for s in dict.fromkeys(x for pair in pairs for x in pair)}
    tokenizers = {source: read_tokenizer(one) for source, one in found.items()}
    rows = _fitting(_usable(rows), tokenizers, found, say)
    asked = [row["prompt"] for row in rows[:answers]]
    if len(asked) < answers:
        say(f"{len(asked)} of {answers} prompts are there to be answered")

    def measured(one, model):
        tokenizer = tokenizers[one.source]
        known = model.get_input_embeddings().weight.shape[0]
        if known < len(tokenizer):
            raise ConfigError(
                f"the model knows {known} tokens and its tokenizer {len(tokenizer)}: take the"
                " tokenizer that belongs to it"
            )
        losses = score_losses(model, tokenizer, {"test": rows}, BATCH_TOKENS, lambda text: None)
        how = {"max_new_tokens": max_new_tokens, "batch_size": BATCH_ANSWERS, "say": say}
        return losses, answer(model, tokenizer, asked, **how)

    scored = dict(zip(found, with_each(found.values(), measured, nf4), strict=True))
    changes, lengths = [], []
    for seed, (one, other) in enumerate(pairs):
        (losses, said), (changed, says) = scored[one], scored[other]
        name = f"{other} against {one}"
        changes.append(end_of_turn.row_changes(losses, changed, name).assign(seed=seed))
        lengths.append(_lengths(said, says, rows).assign(seed=seed))
    changes = pd.concat(changes, ignore_index=True)
    return _comparison(changes, pd.concat(lengths, ignore_index=True))


# --------------------------------------------------------------------------------- what is given


def _pairs(control, treatment):
    sides = [
        [str(one) for one in ([side] if isinstance(side, str | Path) else side)]
        for side in (control, treatment)
    ]
    if len(sides[0]) != len(sides[1]) or not sides[0]:
        raise ConfigError(
            f"{len(sides[0])} controls and {len(sides[1])} treatments: give as many of each, pair"
            " by pair"
        )
    return list(zip(*sides, strict=True))


def _usable(rows):
    """Rows with id, prompt and response that are not empty, from a file or a list."""
    if isinstance(rows, str | Path):
        path = os.path.abspath(os.path.expanduser(rows))
        if not os.path.exists(path):
            raise ConfigError(f"rows: there is no file {rows}: check the path")
        what, rows = str(rows), load_source(Data(source="json", path=path))[1]
    else:
        what, rows = "rows", [{"id": str(n), **row} for n, row in enumerate(rows, 1)]
        for n, row in enumerate(rows, 1):
            if not all(isinstance(row.get(key), str) for key in ("prompt", "response")):
                raise ConfigError(f"rows: row {n} lacks a prompt or a response that is text")
        if len({row["id"] for row in rows}) < len(rows):
            raise ConfigError("rows: two rows have the same id: ids must differ")
    usable = [row for row in rows if row["prompt"].strip() and row["response"].strip()]
    if not usable:
        raise ConfigError(
            f"{what}: none of {len(rows)} rows has both a prompt and a response: give rows with"
            " both"
        )
    return usable


def _fitting(rows, tokenizers, found, say):
    """Rows that every model can read to the end; all of them must make the same tokens."""
    (first, tokenizer), *others = tokenizers.items()
    encoded = [encode(tokenizer, row) for row in rows]
    for source, other in others:
        for row, ids in zip(rows, encoded, strict=True):
            if encode(other, row) != ids:
                raise ConfigError(
                    f"{source} and {first} have different tokenizers or chat templates (row"
                    f" {row['id']} becomes other tokens): their losses cannot be compared"
                )
    limit = min((n for one in found.values() if (n := longest_text(one))), default=math.inf)
    fits = [r for r, ids in zip(rows, encoded, strict=True) if len(ids["input_ids"]) <= limit]
    if not fits:
        raise ConfigError(
            f"rows: all {len(rows)} are longer than the {limit} tokens that the models read: give"
            " shorter ones"
        )
    if len(fits) < len(rows):
        say(f"{len(rows) - len(fits)} of {len(rows)} rows are over {limit} tokens and left out")
    return fits


# -------------------------------------------------------------------------------- what was found


def _lengths(said, says, rows):
    table = pd.DataFrame(
        {
            "example_id": [row["id"] for row, _ in zip(rows, said, strict=False)],
            "control": [one["n_tokens"] for one in said],
            "treatment": [one["n_tokens"] for one in says],
            "cut": [not (a["stopped"] and b["stopped"]) for a, b in zip(said, says, strict=True)],
        }
    )
    ratio = table.treatment.astype(float) / table.control.astype(float)
    return table.assign(answer_length=np.log(ratio))


def _comparison(changes, lengths):
    rows = []
    for measure in NAMES:
        table = changes if measure != "answer_length" else lengths
        one, more = end_of_turn.interval(table, measure), ""
        if measure == "end_nll":
            points = round(100 * changes.p_end.mean(), 1) + 0  # no "-0.0"
            more = f" (P(end of turn) {points:+.1f} points)"
        elif measure == "answer_length" and lengths.cut.any():
            more = f" ({lengths.cut.sum()} of {len(lengths)} pairs of answers were cut)"
        if one is None:
            continue
        unit = quantity(measure).unit
        ends = (words.size(x, unit) for x in (one.estimate, one.ci_low, one.ci_high))
        rows.append(
            {
                "measure": measure,
                "unit": words.plain(unit),
                **dict(zip(("estimate", "ci_low", "ci_high"), ends, strict=True)),
                "n_pairs": one.n_seeds,
                "n_rows": one.n_examples,
                "sentence": f"{NAMES[measure]}: {_said(one, measure)}{more}.",
            }
        )
    pairs, count = changes.seed.nunique(), changes.example_id.nunique()
    scope = f"Intervals: 95 %, over {pairs} pairs of models and {count} rows."
    if pairs == 1:
        scope = (
            f"Intervals: 95 %, over {count} rows alone. They say nothing about another seed: give"
            " further pairs of trainings for that."
        )
    return Comparison(pd.DataFrame(rows), changes, lengths, scope)


def _said(interval, measure):
    """The one sentence of `words`; also where one pair has no interval over its rows."""
    about = quantity(measure)
    if not math.isfinite(interval.ci_low):
        if interval.estimate == 0:
            return "no difference at all"
        return f"{words.with_interval(interval, about.unit)}, without a spread for an interval"
    found = words.verdict(interval, about)
    if measure == "end_nll" and found.seen:
        return f"{'later' if found.outcome == 'higher' else 'sooner'} to stop, {found}"
    return str(found)
