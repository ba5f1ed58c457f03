"""What a profile takes: notebooks, tokens and seconds of each phase, before anything runs."""

import dataclasses
import json

from neft_utils.base.files import ROOT, read_json
from neft_utils.base.paths import BASE, REFERENCE
from neft_utils.base.provenance import without_bf16
from neft_utils.base.steps import CHAIN

# How many times longer the default model takes on a processor without instructions for bf16,
# measured on one core with AVX2 (72, 190 and 51 tokens/s) beside one with AMX (350, 1,400 and 130).
SLOWER = {"train": 4.9, "forward": 7.4, "answers": 2.5}
BENCH_GPU = "bench-gpu.json"  # what `make bench-gpu` writes, and `make promote` keeps
SHAPES = {"NousResearch/Llama-2-7b-hf": "llama2-7b"}  # model -> the shape that has its sizes there


def estimate(profile, paths):
    """[(phase, steps, tokens, seconds of one worker)] from sizes and the profile's speeds."""
    manifest = paths.processed / "manifest.json"
    # Until rows are there to count: typical rows fill 0.6 of what they may have at most.
    total = response = profile.speed.example_tokens or 0.6 * profile.data.max_tokens
    if manifest.exists():
        lengths = json.loads(manifest.read_text("utf-8"))["lengths"]
        total, response = (lengths["test"][name]["p50"] for name in ("total", "response"))
    speed, runs = speed_here(profile, paths), profile.runs()
    models = [(BASE, 0), *runs]
    start = speed.notebook_start
    once = sum(not step.per_run for step in CHAIN)
    rows, asked = profile.data, profile.evaluate
    train = sum(
        rows.train_rows * profile.data_fraction(arm) * profile.recipe(arm).epochs * total
        for arm, _ in runs
    )
    scored_train = min(asked.train_rows or rows.train_rows, rows.train_rows)
    fixed = scored_train + rows.validation_rows + rows.test_rows
    checks = len(runs) * (profile.train.epochs + 1) * rows.validation_rows * total
    scored = len(models) * (fixed * total + rows.ood_rows * 300) + checks
    answering = sum(profile.answers(*model) for model in models)
    prompts = asked.answer_prompts + asked.answer_prompts_without_penalty
    prompts += len(asked.shown_prompts) + asked.alpaca_eval_prompts
    longer = 2 * asked.length_arm_prompts
    length = min(1.5 * response, asked.max_new_tokens)
    answers = answering * (prompts + longer) * length
    measuring = sum(profile.secondary(*model) for model in models)
    extra = asked.train_answer_prompts + 3 * asked.verifiable_per_family
    # An item, its wrong answers included, has about 75 tokens; six passes over stability rows.
    passes = len(asked.benchmarks) * asked.benchmark_items * 75 + 6 * asked.stability_rows * total
    # Options times 400 tokens of examples and question.
    passes += len(asked.leaderboard) * asked.leaderboard_items * 4 * 400
    measured = measuring * (passes + extra * length)
    seconds = measuring * (passes / speed.forward + extra * length / speed.answers)
    return [
        ("prepare, explain, compare", once, 0, once * start + 60),
        ("fine-tune", len(runs), train, len(runs) * start + train / speed.train),
        ("score losses", len(models), scored, len(models) * start + scored / speed.forward),
        ("answer prompts", answering, answers, answers / speed.answers),
        ("secondary measures", measuring, measured, seconds),
    ]


def speed_here(profile, paths):
    """The profile's `Speed` on this machine: a CPU without bf16 is slower than it says, and how
    fast a 7B model trains is known where `make bench-gpu` has measured it."""
    speed = profile.speed
    if found := measured_training(profile, paths):
        return dataclasses.replace(speed, train=found[0])
    if profile.device != "cpu" or not without_bf16():
        return speed
    values = {name: getattr(speed, name) / times for name, times in SLOWER.items()}
    return dataclasses.replace(speed, **values)


def measured_training(profile, paths):
    """(tokens/s, device) of the row of `make bench-gpu` that trains what a profile trains: a model
    of its shape, weights in the same form, checkpointing alike. None without such a row.

    Local results come first, then promoted ones. The adapters' rank may differ, which costs little.
    """
    wanted = {
        "base_weights": profile.model.base_weights,
        "gradient_checkpointing": profile.train.gradient_checkpointing,
    }
    shape = SHAPES.get(profile.model.source)
    if shape is None or profile.device != "cuda" or profile.train.method != "lora":
        return None
    for folder in (paths.out, REFERENCE):
        found = read_json(ROOT / folder / BENCH_GPU) or {}
        rows = found.get("rows", {}).values() if found.get("shape") == shape else ()
        for row in rows:
            if all(row.get(name) == value for name, value in wanted.items()):
                return row["real_tokens_per_second"]["median"], found["device"]
    return None
