"""Training speed and memory of a 7B model on one GPU: ours beside TRL's QLoRA, same examples.

Speed depends on shapes, not on what the weights are: a random Llama of Llama-2-7B's shape is
built on the device, and examples are random tokens as long as real Alpaca examples. Every
row runs in a process of its own, because a memory peak is a process's; one that cannot run
says why. Nothing is downloaded. Shape "tiny" takes the same path on a CPU in seconds.
"""

import importlib.util
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import warnings

import torch

from neft_utils.base.provenance import describe
from neft_utils.make.bench.examples import SEED, random_examples
from neft_utils.make.bench.shared import (
    NOISE_ALPHA,
    adapted,
    batch_token_counts,
    clocked,
    headed,
    logged_losses,
    our_trainer,
    spread,
    trl_trainer,
    with_range,
)

# What needs peft or trl is imported where it is used: without them the table says so.

# shape: vocabulary, hidden, intermediate, layers, heads; examples of an optimiser step;
# examples of one padded batch, which TRL accumulates to the step
SHAPES = {
    "llama2-7b": (32000, 4096, 11008, 32, 32, 128, 8),
    "tiny": (512, 64, 128, 2, 4, 8, 4),
}
ROWS = {
    "ours": "bf16 weights, no padding, no checkpointing",
    "ours_small_card": "NF4 weights, no padding, checkpointing, 2048 tokens a forward",
    "trl": "TRL's QLoRA: NF4 weights (on a CPU bf16), padded batches, checkpointing",
}
# For Llama-2-7B's shape. 0.41 is the share of the peak in the best published figure for LoRA
# at this size; on one H200 (788 TFLOP/s measured, 26.8 GFLOP a token) 12,000 tokens/s.
GOALS = {
    "real_tokens_per_second": ("at least", 12000),
    "model_flops_utilisation": ("at least", 0.41),
    "ratio_vs_trl": ("at least", 3.0),
    "small_card_peak_gb": ("at most", 12.0),
}


# ------------------------------------------------------------------------------ the table


def bench_gpu(shape="llama2-7b", steps=6, say=print):
    """Measure all rows; steps: optimiser steps a row, of which the first warms up.

    Returns a dict for JSON: rows by name and what they come to; None where not measured.
    """
    if shape not in SHAPES:
        raise ValueError(f"shape must be one of {', '.join(SHAPES)}, not {shape!r}")
    if steps < 2:
        raise ValueError(f"steps must be at least 2, not {steps}: the first one warms up")
    rows, rates = {}, {}
    for kind in ROWS:
        rows[kind] = row = measure_row(kind, shape, steps)
        rates[kind] = rate = row.get("real_tokens_per_second", {}).get("median")
        say(f"{kind}: " + (f"{rate:.0f} real tokens/s" if rate else f"skipped: {row['skipped']}"))
    both = rates["ours"] and rates["trl"]
    found = {
        "real_tokens_per_second": rates["ours"],
        "ratio_vs_trl": round(rates["ours"] / rates["trl"], 2) if both else None,
        "small_card_peak_gb": rows["ours_small_card"].get("peak_memory_gb"),
        "model_flops_utilisation": rows["ours"].get("model_flops_utilisation"),
    }
    goals = {}
    for name, (sense, goal) in GOALS.items():
        value, reached = found[name], None
        if value is not None and shape == "llama2-7b":
            reached = value >= goal if sense == "at least" else value <= goal
        goals[name] = {"goal": f"{sense} {goal}", "reached": reached}
    facts = describe()
    facts = {key: facts[key] for key in ("device", "versions", "commit", "dirty")}
    return {"shape": shape, **facts, "rows": rows, **found, "goals": goals}


def measure_row(kind, shape, steps):
    """One row, measured in a process of its own, or {"skipped": reason}."""
    reason = _cannot_run(kind, shape)
    if reason:
        return {"skipped": reason}
    # One GPU: transformers would spread a batch over all that it sees.
    first = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    environment = dict(os.environ, CUDA_VISIBLE_DEVICES=first, TOKENIZERS_PARALLELISM="false")
    command = [sys.executable, "-m", "neft_utils.make.bench.gpu", kind, shape, str(steps)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        error = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        return {"skipped": f"failed: {error[:200]}"}
    return json.loads(done.stdout.strip().splitlines()[-1])


def _four_bit(kind):
    return kind == "ours_small_card" or (kind == "trl" and torch.cuda.is_available())


def _cannot_run(kind, shape):
    if not torch.cuda.is_available() and (shape != "tiny" or kind == "ours_small_card"):
        return "needs a CUDA GPU"
    needed = ["trl", "peft", "datasets", *(["bitsandbytes"] if _four_bit(kind) else [])]
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    return f"not installed: pip install {' '.join(missing)}" if missing else None


def format_table(found):
    """The result of `bench_gpu` as lines of Markdown."""
    lines = [
        f"{found['shape']} on {found['device']}\n",
        *headed("row", "real tokens/s", "padded tokens/s", "utilisation", "peak GB", "loss"),
    ]
    for kind, row in found["rows"].items():
        if "skipped" in row:
            lines.append(f"| {kind} | skipped: {row['skipped']} | | | | |")
            continue
        peak = row["peak_memory_gb"]
        lines.append(
            f"| {kind} | {with_range(row['real_tokens_per_second'])}"
            f" | {row['padded_tokens_per_second']['median']:.0f}"
            f" | {row['model_flops_utilisation']:.3f} | {'' if peak is None else f'{peak:.2f}'}"
            f" | {row['loss']:.3f} |"
        )
    lines += ["", *(f"{kind}: {text}" for kind, text in ROWS.items()), ""]
    for name, goal in found["goals"].items():
        verdict = {None: "not judged", True: "reached", False: "missed"}[goal["reached"]]
        lines.append(f"{name}: {found[name]} (goal: {goal['goal']}, {verdict})")
    return "\n".join(lines)


# ------------------------------------------------------------------ in a process of its own


def random_llama(shape, device, four_bit=False):
    """A Llama with random weights on the device: in bf16, or NF4 with double quantisation."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from neft_utils.train.folders import nf4_config

    vocabulary, hidden, intermediate, layers, heads = SHAPES[shape][:5]
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=4096,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    options = {"dtype": torch.bfloat16, "attn_implementation": "sdpa"}
    torch.manual_seed(SEED)
    with torch.device(device):
        model = LlamaForCausalLM._from_config(config, **options)
    if not four_bit:
        return model
    options |= {"quantization_config": nf4_config(), "device_map": {"": device}}
    weights = model.state_dict()  # both stand on the device for a moment: 13.5 + 3.4 GB
    return LlamaForCausalLM.from_pretrained(None, config=config, state_dict=weights, **options)


def micro_batch_tokens(shape, memory):
    """Tokens of one forward without checkpointing that fit into `memory` bytes.

    A token leaves in every layer, in bytes, 22 · hidden (two norms' inputs in float32; their
    outputs, q, k, v and attention's result twice in bf16) and 8 · intermediate (gate, its
    SiLU, up, their product): 5.7 MB in all of Llama-2-7B. Its weights take 13.5 GB; 3 GB are
    for adapters, optimiser and head. Rounded down to a power of two, 16,384 at most.
    """
    vocabulary, hidden, intermediate, layers = SHAPES[shape][:4]
    token = layers * (22 * hidden + 8 * intermediate)
    weights = layers * hidden * (4 * hidden + 3 * intermediate) + 2 * vocabulary * hidden
    fitting = (memory - 2 * weights - 3e9) / token
    return min(16384, 2 ** int(math.log2(max(fitting, 512))))


def _recipe(kind, shape):
    from neft_utils.base.profiles import Train

    tokens = 2048 if kind == "ours_small_card" else 16384
    if kind == "ours" and torch.cuda.is_available():
        tokens = micro_batch_tokens(shape, torch.cuda.get_device_properties(0).total_memory)
    return Train(
        learning_rate=2e-4,
        epochs=1,
        batch_size=SHAPES[shape][5],
        micro_batch_tokens=tokens,
        gradient_checkpointing=kind == "ours_small_card",
    )


def _measure(kind, shape, steps, folder):
    from neft_utils.base.profiles import Model
    from neft_utils.train import run_log
    from neft_utils.train.base_models import load_tokenizer

    cuda, padded_batch = torch.cuda.is_available(), SHAPES[shape][6]
    recipe = _recipe(kind, shape)
    encoded = random_examples(recipe.batch_size * steps, SHAPES[shape][0])
    tokenizer = load_tokenizer(Model(source="nano"))  # only its padding token, 1, is used
    model = random_llama(shape, "cuda:0" if cuda else "cpu", _four_bit(kind))
    if cuda:  # of training alone: real weights are quantised one by one as they are read
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    if kind == "trl":
        trainer = trl_trainer(
            model,
            tokenizer,
            encoded,
            recipe,
            SEED,
            folder,
            noise_alpha=NOISE_ALPHA,
            per_device_train_batch_size=padded_batch,
            gradient_accumulation_steps=recipe.batch_size // padded_batch,
            use_cpu=not cuda,
        )
    else:
        trainer = our_trainer(model, tokenizer, encoded, recipe, SEED, folder, NOISE_ALPHA)
    batches = batch_token_counts(trainer, padded_batch)
    times = clocked(trainer)
    trainer.train()
    peak = round(torch.cuda.max_memory_allocated() / 1e9, 3) if cuda else None
    losses = logged_losses(trainer)
    real, padded, share = [], [], len(batches) // steps
    for step in range(1, steps):
        # From the end of a step to the end of the next: fetching and logging count.
        seconds = times[step][1] - times[step - 1][1]
        for rates, tokens in zip((real, padded), zip(*batches, strict=True), strict=True):
            rates.append(sum(tokens[step * share : (step + 1) * share]) / seconds)
    # Utilisation at the median rate. The weights are counted on a model without storage: in
    # 4 bits a tensor has half as many elements as weights.
    bare = adapted(random_llama(shape, "meta"), recipe, SEED)
    seconds = sum(len(one["input_ids"]) for one in encoded) / statistics.median(real)
    flops = run_log.throughput(bare, recipe, encoded, seconds)
    adapters = next(p.dtype for p in trainer.model.parameters() if p.requires_grad)
    return {
        "real_tokens_per_second": spread(real),
        "padded_tokens_per_second": spread(padded),
        "steps": len(real),
        "peak_memory_gb": peak,
        "loss": round(losses[-1], 4),
        "model_gflops_per_second": flops["model_gflops_per_second"],
        "model_flops_utilisation": flops["model_flops_utilisation"],
        "base_weights": "nf4" if _four_bit(kind) else "bf16",
        "adapters": str(adapters).removeprefix("torch."),
        "micro_batch_tokens": None if kind == "trl" else recipe.micro_batch_tokens,
    }


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(_measure(sys.argv[1], sys.argv[2], int(sys.argv[3]), folder)))
