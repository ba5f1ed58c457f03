"""Training speed and memory of a 7B model on one GPU: ours beside TRL's QLoRA, same examples.

Speed depends on shapes, not on what the weights are: a random Llama of Llama-2-7B's shape is
built on the device, and examples are random tokens as long as real Alpaca examples. Every
row runs in a process of its own, because a memory peak is a process's. A row that cannot run
says why. Nothing is downloaded; shape "tiny" takes the same path on a CPU in seconds.
"""

import importlib.util
import json
import math
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch

from neft_utils import provenance
from neft_utils.bench import spread

# Modules that need peft or trl are imported where they are used: without these packages a
# row is skipped, with its reason, and the table still comes out.

ALPACA_LENGTHS = Path(__file__).resolve().parent / "facts" / "alpaca_lengths.csv"
MAX_TOKENS = 512  # of an example; 99.8 % of Alpaca's tokens lie within
NOISE_ALPHA = 5.0
SEED = 0
ALPACA_INPUT_TEMPLATE = (
    "Below is an instruction that describes a task, paired with an input that provides further"
    " context. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{prompt}\n\n### Input:\n{input}\n\n### Response:\n"
)


@dataclass(frozen=True)
class Shape:
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    examples: int  # of an optimiser step
    padded_batch: int  # examples of one forward of TRL's, which accumulates to `examples`


SHAPES = {
    "llama2-7b": Shape(32000, 4096, 11008, 32, 32, examples=128, padded_batch=8),
    "tiny": Shape(512, 64, 128, 2, 4, examples=8, padded_batch=4),
}
ROWS = {
    "ours": "bf16 weights, no padding, FlashAttention, no checkpointing",
    "ours_small_card": "NF4 weights, no padding, checkpointing, 2048 tokens a forward",
    "trl": "TRL's QLoRA: NF4 weights, padded batches, checkpointing",
}
# At Llama-2-7B's shape; the first for one H200, whose best published rate for such a LoRA
# (41 % of the matrix products' peak) is 12,000 tokens/s.
GOALS = {
    "real_tokens_per_second": ("at least", 12000),
    "model_flops_utilisation": ("at least", 0.41),
    "ratio_vs_trl": ("at least", 3.0),
    "small_card_peak_gb": ("at most", 12.0),
}


# ------------------------------------------------------------------------------- examples


def length_histogram(rows, tokenizer):
    """How many rows have how many tokens: prompt_tokens, response_tokens, rows; sorted.

    rows: [{"instruction", "input", "output"}]. Prompts stand in Alpaca's templates, with or
    without an input; a response's count includes its end token.
    """
    from neft_utils.model import ALPACA_TEMPLATE

    lengths = []
    for row in rows:
        template = ALPACA_INPUT_TEMPLATE if row["input"] else ALPACA_TEMPLATE
        prompt = template.format(prompt=row["instruction"], input=row["input"])
        response = tokenizer(row["output"], add_special_tokens=False)["input_ids"]
        lengths.append((len(tokenizer(prompt)["input_ids"]), len(response) + 1))
    frame = pd.DataFrame(lengths, columns=["prompt_tokens", "response_tokens"])
    return frame.value_counts(sort=False).rename("rows").reset_index()


def alpaca_lengths():
    """`length_histogram` of 999 Alpaca rows, kept as numbers without their texts.

    Counted with SmolLM2's tokenizer; with 49,152 words it makes slightly fewer tokens of an
    English text than Llama-2's 32,000, so that lengths err on the short side.
    """
    return pd.read_csv(ALPACA_LENGTHS)


def drawn_lengths(count, seed=SEED, max_tokens=MAX_TOKENS):
    """[(prompt, response)] tokens of `count` examples drawn from `alpaca_lengths`.

    A long example loses the end of its response, as truncation does; one token stays.
    """
    table = alpaca_lengths()
    pairs = list(zip(table.prompt_tokens.tolist(), table.response_tokens.tolist(), strict=True))
    drawn = random.Random(seed).choices(pairs, weights=table.rows.tolist(), k=count)
    drawn = [(min(prompt, max_tokens - 1), response) for prompt, response in drawn]
    return [(prompt, min(response, max_tokens - prompt)) for prompt, response in drawn]


def random_examples(count, vocabulary, seed=SEED):
    """Encoded examples of random tokens, without the first two: start, end and padding."""
    generator = random.Random(seed)
    return [
        {
            "input_ids": generator.choices(range(2, vocabulary), k=prompt + response),
            "completion_mask": [0] * prompt + [1] * response,
        }
        for prompt, response in drawn_lengths(count, seed)
    ]


# ------------------------------------------------------------------------------ the table


def bench_gpu(shape="llama2-7b", steps=6, say=print):
    """Measure all rows; steps: optimiser steps a row, of which the first warms up.

    Returns a dict for JSON: rows by name and what they come to; None where not measured.
    """
    if shape not in SHAPES:
        raise ValueError(f"shape must be one of {', '.join(SHAPES)}, not {shape!r}")
    if steps < 2:
        raise ValueError(f"steps must be at least 2, not {steps}: the first one warms up")
    rows = {}
    for kind in ROWS:
        rows[kind] = row = measure_row(kind, shape, steps)
        rate = row.get("real_tokens_per_second", {}).get("median")
        say(f"{kind}: " + (f"{rate:.0f} real tokens/s" if rate else f"skipped: {row['skipped']}"))

    def median(kind):
        return rows[kind].get("real_tokens_per_second", {}).get("median")

    ours, trl = median("ours"), median("trl")
    found = {
        "real_tokens_per_second": ours,
        "ratio_vs_trl": round(ours / trl, 2) if ours and trl else None,
        "small_card_peak_gb": rows["ours_small_card"].get("peak_memory_gb"),
        "model_flops_utilisation": rows["ours"].get("model_flops_utilisation"),
    }
    goals = {}
    for name, (sense, goal) in GOALS.items():
        value = found[name] if shape == "llama2-7b" else None
        met = None if value is None else value >= goal if sense == "at least" else value <= goal
        goals[name] = {"goal": f"{sense} {goal}", "reached": met}
    facts = provenance.describe()
    keep = ("device", "versions", "commit", "dirty")
    return {"shape": shape, **{k: facts[k] for k in keep}, "rows": rows, **found, "goals": goals}


def measure_row(kind, shape, steps):
    """One row, measured in a process of its own, or {"skipped": reason}."""
    reason = _cannot_run(kind, shape)
    if reason:
        return {"skipped": reason}
    # One GPU: transformers would spread a batch over all that it sees.
    first = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    environment = dict(os.environ, CUDA_VISIBLE_DEVICES=first, TOKENIZERS_PARALLELISM="false")
    command = [sys.executable, "-m", "neft_utils.bench_gpu", kind, shape, str(steps)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        error = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        return {"skipped": f"failed: {error[:200]}"}
    return json.loads(done.stdout.strip().splitlines()[-1])


def _four_bit(kind):
    # On a CPU the row of TRL's trains in bf16: its path is what the tiny shape is for.
    return kind == "ours_small_card" or (kind == "trl" and torch.cuda.is_available())


def _cannot_run(kind, shape):
    needed = ["trl", "peft", "datasets"] + ["bitsandbytes"] * _four_bit(kind)
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if not torch.cuda.is_available() and (shape != "tiny" or kind == "ours_small_card"):
        return "needs a CUDA GPU"
    return f"pip install {' '.join(missing)}" if missing else None


def format_table(found):
    """The result of `bench_gpu` as lines of Markdown."""
    lines = [
        f"{found['shape']} on {found['device']}",
        "",
        "| row | real tokens/s | padded tokens/s | utilisation | peak GB | loss |",
        "|---|---|---|---|---|---|",
    ]
    for kind, row in found["rows"].items():
        if "skipped" in row:
            lines.append(f"| {kind} | skipped: {row['skipped']} | | | | |")
            continue
        real, peak = row["real_tokens_per_second"], row["peak_memory_gb"]
        lines.append(
            f"| {kind} | {real['median']:.0f} [{real['low']:.0f}, {real['high']:.0f}]"
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


def random_llama(shape, four_bit, attention, device):
    """A Llama with random weights on the device: in bf16, or NF4 with double quantisation."""
    from transformers import BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

    s = SHAPES[shape]
    config = LlamaConfig(
        vocab_size=s.vocab_size,
        hidden_size=s.hidden_size,
        intermediate_size=s.intermediate_size,
        num_hidden_layers=s.num_hidden_layers,
        num_attention_heads=s.num_attention_heads,
        num_key_value_heads=s.num_attention_heads,
        max_position_embeddings=4096,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    options = {"dtype": torch.bfloat16, "attn_implementation": attention}
    torch.manual_seed(SEED)
    if not four_bit:
        with torch.device(device):
            return LlamaForCausalLM._from_config(config, **options)
    with torch.device("meta"):
        sizes = {name: w.shape for name, w in LlamaForCausalLM(config).state_dict().items()}
    # What is quantised is copied, so that all layers may come from one tensor of each name:
    # 0.5 billion random numbers instead of 6.7.
    weights, of_name = {}, {}
    for name, size in sizes.items():
        fresh = {"size": size, "dtype": torch.bfloat16, "device": device}
        if len(size) == 1:
            weights[name] = torch.ones(**fresh)
            continue
        module = name.split(".")[-2]
        if module not in of_name:
            of_name[module] = torch.randn(**fresh).mul_(config.initializer_range)
        weights[name] = of_name[module]
    nf4 = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    options |= {"quantization_config": nf4, "device_map": {"": device}}
    return LlamaForCausalLM.from_pretrained(None, config=config, state_dict=weights, **options)


def micro_batch_tokens(shape, memory):
    """Tokens a forward without checkpointing that fit into `memory` bytes; a power of two.

    A token leaves in a layer, in bytes, 22 · hidden (inputs of two norms in float32, their
    outputs, q, k, v and the attention's result twice in bf16) and 8 · intermediate (gate,
    its SiLU, up and their product): 5.7 MB in 32 layers of Llama-2-7B. Weights take 2 bytes;
    3 GB are for adapters, optimiser, head and fragments. 16,384 are one step of 128 examples.
    """
    s = SHAPES[shape]
    body = s.num_hidden_layers * s.hidden_size * (4 * s.hidden_size + 3 * s.intermediate_size)
    token = s.num_hidden_layers * (22 * s.hidden_size + 8 * s.intermediate_size)
    free = memory - 2 * (body + 2 * s.vocab_size * s.hidden_size) - 3e9
    return min(16384, 2 ** int(math.log2(max(512, free / token))))


def _recipe(kind, shape):
    from neft_utils.config import Train

    tokens = 2048
    if kind == "ours":
        cuda = torch.cuda.is_available()
        memory = torch.cuda.get_device_properties(0).total_memory if cuda else math.inf
        tokens = 16384 if memory == math.inf else micro_batch_tokens(shape, memory)
    return Train(
        learning_rate=2e-4,
        epochs=1,
        batch_size=SHAPES[shape].examples,
        micro_batch_tokens=tokens,
        gradient_checkpointing=kind == "ours_small_card",
    )


def _trl_trainer(model, tokenizer, encoded, recipe, shape, folder):
    """TRL as its users write a QLoRA with noise; all that is not named is its default."""
    from datasets import Dataset
    from peft import LoraConfig
    from trl import SFTConfig, SFTTrainer

    size = SHAPES[shape].padded_batch
    return SFTTrainer(
        model=model,
        args=SFTConfig(
            output_dir=str(folder),
            seed=SEED,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=recipe.batch_size // size,
            num_train_epochs=1,
            learning_rate=recipe.learning_rate,
            completion_only_loss=True,
            neftune_noise_alpha=NOISE_ALPHA,
            use_cpu=not torch.cuda.is_available(),
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
        ),
        processing_class=tokenizer,
        train_dataset=Dataset.from_list(encoded),
        peft_config=LoraConfig(
            r=recipe.lora_rank,
            lora_alpha=recipe.lora_alpha,
            target_modules="all-linear",
            task_type="CAUSAL_LM",
        ),
    )


def _measure(kind, shape, steps, folder):
    from transformers import TrainerCallback

    from neft_utils import train
    from neft_utils.config import Model
    from neft_utils.fast import ATTENTION
    from neft_utils.model import load_tokenizer
    from neft_utils.noise import NEFTuneCallback

    cuda, size = torch.cuda.is_available(), SHAPES[shape].padded_batch
    device = "cuda:0" if cuda else "cpu"
    recipe = _recipe(kind, shape)
    encoded = random_examples(recipe.batch_size * steps, SHAPES[shape].vocab_size)
    tokenizer = load_tokenizer(Model(source="nano"))  # pads with token 1; encodes nothing here
    attention = "sdpa" if kind == "trl" else ATTENTION
    base = random_llama(shape, _four_bit(kind), attention, device)
    if cuda:  # the peak is training's: real weights come quantised or are read piece by piece
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    if kind == "trl":
        trainer = _trl_trainer(base, tokenizer, encoded, recipe, shape, folder)
    else:
        model, noise = train.lora_model(base, recipe, SEED), NEFTuneCallback(NOISE_ALPHA)
        trainer = train.build_trainer(model, tokenizer, encoded, recipe, SEED, [noise], folder)
    ends, batches = [], []  # when steps end; (real, padded) tokens of each batch collated

    class Clock(TrainerCallback):
        """From step's end to step's end: fetching, collating and logging count."""

        def on_step_end(self, args, state, control, **kwargs):
            if cuda:
                torch.cuda.synchronize()
            ends.append(time.perf_counter())

    collate = trainer.data_collator

    def counted(features):
        lengths = [len(one["input_ids"]) for one in features]
        groups = [lengths[i : i + size] for i in range(0, len(lengths), size)]
        batches.append((sum(lengths), sum(len(group) * max(group) for group in groups)))
        return collate(features)

    trainer.data_collator = counted
    trainer.add_callback(Clock())
    trainer.train()
    peak = round(torch.cuda.max_memory_allocated() / 1e9, 3) if cuda else None
    losses = [one["loss"] for one in trainer.state.log_history if "loss" in one]
    if len(losses) != steps or not math.isfinite(losses[-1]):
        raise RuntimeError(f"losses of {steps} steps are {losses}")
    dtype = next(p.dtype for p in trainer.model.parameters() if p.requires_grad)
    share = len(batches) // steps  # batches of a step
    rates = []
    for step in range(1, steps):
        took, mine = ends[step] - ends[step - 1], batches[step * share : (step + 1) * share]
        rates.append([sum(tokens) / took for tokens in zip(*mine, strict=True)])
    real, padded = zip(*rates, strict=True)
    # Utilisation at the median rate. Parameters are counted on a model without storage:
    # packed 4-bit weights have half as many elements.
    with torch.device("meta"):
        bare = random_llama(shape, False, "sdpa", "meta")
    seconds = sum(len(one["input_ids"]) for one in encoded) / statistics.median(real)
    flops = train.throughput(train.lora_model(bare, recipe, SEED), recipe, encoded, seconds)
    return {
        "real_tokens_per_second": spread(real),
        "padded_tokens_per_second": spread(padded),
        "steps": len(real),
        "peak_memory_gb": peak,
        "loss": round(float(losses[-1]), 4),
        "model_tflops_per_second": round(flops["model_gflops_per_second"] / 1e3, 2),
        "model_flops_utilisation": flops["model_flops_utilisation"],
        "four_bit": _four_bit(kind),
        "adapters": str(dtype).removeprefix("torch."),
        "micro_batch_tokens": None if kind == "trl" else recipe.micro_batch_tokens,
    }


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as out:
        print(json.dumps(_measure(sys.argv[1], sys.argv[2], int(sys.argv[3]), out)))
