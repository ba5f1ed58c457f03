"""What the tables for CPU and GPU share: trainers of both kinds, counts, a clock, pieces of tables.

What needs torch, peft or trl is imported where it is used: the GPU's table says what is missing.
"""

import math
import statistics
import time
import warnings

BATCH = 8  # examples an optimiser step: TRL's own default of per_device_train_batch_size
NOISE_ALPHA = 5.0


# ----------------------------------------------------------------------------- trainers


def adapted(base, recipe, seed):
    """The base with a recipe's fresh LoRA adapters on all linear layers."""
    from peft import get_peft_model
    from transformers import set_seed

    set_seed(seed)
    return get_peft_model(base, _lora(recipe))


def _lora(recipe):
    from peft import LoraConfig

    return LoraConfig(
        r=recipe.lora_rank,
        lora_alpha=recipe.lora_alpha,
        lora_dropout=recipe.lora_dropout,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )


def our_trainer(base, tokenizer, encoded, recipe, seed, folder, noise_alpha):
    """What notebook 03 trains with, on encoded examples: no padding, fast layers, our noise."""
    import torch

    from neft_utils.noise import NEFTuneCallback
    from neft_utils.train.trainer import PaddingFreeTrainer

    steps = math.ceil(len(encoded) / recipe.batch_size) * recipe.epochs
    with warnings.catch_warnings():
        # TRL warns at padding-free without FlashAttention; attention is per document here.
        warnings.simplefilter("ignore")
        return PaddingFreeTrainer(
            model=adapted(base, recipe, seed),
            callbacks=[NEFTuneCallback(noise_alpha)],
            micro_batch_tokens=recipe.micro_batch_tokens,
            **_common(
                tokenizer,
                encoded,
                recipe,
                seed,
                folder,
                per_device_train_batch_size=recipe.batch_size,
                num_train_epochs=recipe.epochs,
                lr_scheduler_type="cosine",
                warmup_steps=round(recipe.warmup_fraction * steps),
                weight_decay=recipe.weight_decay,
                max_grad_norm=recipe.max_grad_norm,
                padding_free=True,
                gradient_checkpointing=recipe.gradient_checkpointing,
                bf16=False,  # adapters are float32
                **({"optim": "adamw_bnb_8bit"} if recipe.optimizer == "adamw_8bit" else {}),
                use_cpu=not torch.cuda.is_available(),
                dataloader_pin_memory=False,
                logging_nan_inf_filter=False,
            ),
        )


def trl_trainer(model, tokenizer, encoded, recipe, seed, folder, noise_alpha, **options):
    """Plain TRL with its own NEFTune flag and our recipe's LoRA.

    options: SFTConfig's; what neither they nor this file names is TRL's default.
    """
    from trl import SFTTrainer

    options |= {"num_train_epochs": 1, "neftune_noise_alpha": noise_alpha}
    common = _common(tokenizer, encoded, recipe, seed, folder, **options)
    return SFTTrainer(model=model, peft_config=_lora(recipe), **common)


def _common(tokenizer, encoded, recipe, seed, folder, **options):
    """What trainers of both kinds are given; options: SFTConfig's."""
    from datasets import Dataset, disable_progress_bars
    from trl import SFTConfig

    disable_progress_bars()
    arguments = SFTConfig(
        output_dir=str(folder),
        seed=seed,
        data_seed=seed,
        learning_rate=recipe.learning_rate,
        max_length=None,
        completion_only_loss=True,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        **options,
    )
    rows = Dataset.from_list(encoded)
    return {"args": arguments, "processing_class": tokenizer, "train_dataset": rows}


# ------------------------------------------------------------------------------- counts


def batch_token_counts(trainer, padded_batch):
    """A list that gets (real, padded) tokens of every batch that the trainer collates.

    Padded is what groups of `padded_batch` examples cost when padded to their longest.
    """
    sizes, collate = [], trainer.data_collator

    def counted(features):
        lengths = [len(one["input_ids"]) for one in features]
        groups = (lengths[i : i + padded_batch] for i in range(0, len(lengths), padded_batch))
        sizes.append((sum(lengths), sum(len(group) * max(group) for group in groups)))
        return collate(features)

    trainer.data_collator = counted
    return sizes


def clocked(trainer, ready=None):
    """A list that gets (begin, end) of every step that the trainer makes, in seconds of a clock.

    ready: called when training is about to begin. A GPU's kernels are waited for.
    """
    import torch
    from transformers import TrainerCallback

    times = []

    class Clock(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            if ready is not None:
                ready()

        def on_step_begin(self, args, state, control, **kwargs):
            self.begun = time.perf_counter()

        def on_step_end(self, args, state, control, **kwargs):
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            times.append((self.begun, time.perf_counter()))

    trainer.add_callback(Clock())
    return times


def noise_clock():
    """Time the noise of this process from now on, for a process that measures and ends.

    Returns a function of two readings of time.perf_counter that gives the seconds between them
    which our noise took: on a GPU by events in its stream, so that nothing waits for the device.
    """
    import torch

    from neft_utils.noise import EmbeddingNoise

    cuda, spans, add_noise = torch.cuda.is_available(), [], EmbeddingNoise._add_noise

    def mark():
        if not cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def timed(self, *args):
        called, begin = time.perf_counter(), mark()
        output = add_noise(self, *args)
        spans.append((called, begin, mark()))
        return output

    def spent(begin, end):
        if cuda:
            torch.cuda.synchronize()
        took = [
            (a.elapsed_time(b) / 1000 if cuda else b - a) for at, a, b in spans if begin <= at < end
        ]
        return sum(took)

    EmbeddingNoise._add_noise = timed
    return spent


def logged_losses(trainer):
    """The loss of every step; FloatingPointError where one is missing or not finite."""
    losses = [float(one["loss"]) for one in trainer.state.log_history if "loss" in one]
    if len(losses) != trainer.state.global_step or not all(map(math.isfinite, losses)):
        raise FloatingPointError(f"losses of {trainer.state.global_step} steps: {losses}")
    return losses


def spread(values):
    """{"median", "low", "high"} of repeats."""
    values = [float(value) for value in values]
    found = {"median": statistics.median(values), "low": min(values), "high": max(values)}
    return {name: round(value, 2) for name, value in found.items()}


# ------------------------------------------------------------------------------- tables


def headed(*columns):
    """The first two lines of a Markdown table."""
    cells = (f" {name} " if name else " " for name in columns)
    return ["|" + "|".join(cells) + "|", "|" + "---|" * len(columns)]


def with_range(rate):
    """Cell of a `spread`."""
    return f"{rate['median']:.0f} [{rate['low']:.0f}, {rate['high']:.0f}]"
