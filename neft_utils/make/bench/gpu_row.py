"""One row of `make bench-gpu`, in a process of its own: a random 7B-shaped model, and its training.

What needs peft or trl is imported where it is used: without them the table says so.
"""

import json
import math
import statistics
import sys
import tempfile
import warnings

import torch

from neft_utils.base.provenance import matmul_gflops
from neft_utils.make.bench.examples import SEED, random_examples
from neft_utils.make.bench.shared import (
    NOISE_ALPHA,
    adapted,
    batch_token_counts,
    clocked,
    logged_losses,
    noise_clock,
    our_trainer,
    spread,
    trl_trainer,
)

# shape: vocabulary, hidden, intermediate, layers, heads; examples of an optimiser step;
# examples of one padded batch, which TRL accumulates to the step
SHAPES = {
    "llama2-7b": (32000, 4096, 11008, 32, 32, 128, 8),
    "tiny": (512, 64, 128, 2, 4, 8, 4),
}


def in_four_bits(kind):
    return kind == "ours_small_card" or (kind == "trl" and torch.cuda.is_available())


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
    model = random_llama(shape, "cuda:0" if cuda else "cpu", in_four_bits(kind))
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
    spent = None if kind == "trl" else noise_clock()  # TRL's own noise is no hook of ours
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
    noise = None
    if spent is not None:  # of the steps that are timed
        begin, end = times[0][1], times[-1][1]
        noise = round(100 * spent(begin, end) / (end - begin), 4)
    adapters = next(p.dtype for p in trainer.model.parameters() if p.requires_grad)
    return {
        "real_tokens_per_second": spread(real),
        "padded_tokens_per_second": spread(padded),
        "steps": len(real),
        "peak_memory_gb": peak,
        "loss": round(losses[-1], 4),
        "model_gflops_per_second": flops["model_gflops_per_second"],
        "model_flops_utilisation": flops["model_flops_utilisation"],
        "peak_bf16_gflops": round(matmul_gflops(), 1),  # what utilisation is a share of
        "noise_percent": noise,
        "gradient_checkpointing": trainer.args.gradient_checkpointing,
        "base_weights": "nf4" if in_four_bits(kind) else "bf16",
        "adapters": str(adapters).removeprefix("torch."),
        "micro_batch_tokens": None if kind == "trl" else recipe.micro_batch_tokens,
    }


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(_measure(sys.argv[1], sys.argv[2], int(sys.argv[3]), folder)))
