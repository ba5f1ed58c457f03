"""What a profile takes: notebooks, tokens and seconds of each phase, before anything runs."""

import dataclasses
import json
import math

from neft_utils.base.files import ROOT, read_json
from neft_utils.base.paths import BASE, REFERENCE
from neft_utils.base.provenance import without_bf16
from neft_utils.base.steps import CHAIN

# How many times longer the default model takes on a processor without instructions for bf16,
# measured on one core with AVX2 (72, 190 and 51 tokens/s) beside one with AMX (350, 1,400 and 130).
SLOWER = {"train": 4.9, "forward": 7.4, "answers": 2.5}
BENCH_GPU = "bench-gpu.json"  # what `make bench-gpu` writes, and `make promote` keeps
SHAPES = {"NousResearch/Llama-2-7b-hf": "llama2-7b"}  # model -> the shape that has its sizes there
# How many times longer training with LoRA dropout takes on a CPU, where the lean product of
# adapters serves dropout 0 alone (results/LOG.md, cpu-long of 2026-11-26).
WITH_DROPOUT = 1.5


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
    training = sum(_training_seconds(profile, arm, total, speed) for arm, _ in runs)
    scored_train = min(asked.train_rows or rows.train_rows, rows.train_rows)
    fixed = scored_train + rows.validation_rows + rows.test_rows
    scored = len(models) * (fixed * total + rows.ood_rows * 300)
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
        ("fine-tune", len(runs), train, len(runs) * start + training),
        ("score losses", len(models), scored, len(models) * start + scored / speed.forward),
        ("answer prompts", answering, answers, answers / speed.answers),
        ("secondary measures", measuring, measured, seconds),
    ]


def scored_on_the_way(profile, arm):
    """How many rows a run of an arm scores before training, every few epochs and at its end.

    Validation rows, and where `train.validate_train` asks for it the rows that it trains on.
    """
    recipe, data = profile.recipe(arm), profile.data
    times = 1 + math.ceil(recipe.epochs / recipe.validate_epochs)
    own = data.train_rows * profile.data_fraction(arm) if recipe.validate_train else 0
    return times * (data.validation_rows + own)


def _training_seconds(profile, arm, length, speed):
    """Seconds of one training without its notebook's start, at `length` tokens a row."""
    recipe = profile.recipe(arm)
    rows = profile.data.train_rows * profile.data_fraction(arm) * recipe.epochs
    slower = WITH_DROPOUT if recipe.lora_dropout and profile.device == "cpu" else 1
    steps = slower * rows / speed.train
    return length * (steps + scored_on_the_way(profile, arm) / speed.forward)


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
