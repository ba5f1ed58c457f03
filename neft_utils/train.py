"""One fine-tuning run, LoRA on a frozen base or all weights, with or without noise.

The recipe is the paper's in form: loss on the response only, AdamW, warm-up and cosine decay
(arXiv 2310.05914, appendix), 128 examples a step at its scale.

TRL's SFTTrainer does the work; the subclass below only changes how the loss is computed
(head on response tokens, see `model.response_token_nll`) and makes sure that the noise is
gone when `train()` ends, however it ends.
"""

import itertools
import math
import time
import warnings

import pandas as pd
import torch
from datasets import Dataset, disable_progress_bars
from peft import LoraConfig, get_peft_model
from transformers import TrainerCallback, set_seed
from transformers.trainer_callback import PrinterCallback
from trl import SFTConfig, SFTTrainer

from neft_utils import data, provenance
from neft_utils.config import as_dict
from neft_utils.fast import lean_lora
from neft_utils.keys import step_key
from neft_utils.model import (
    encode,
    load_base,
    load_tokenizer,
    out_of_memory,
    parameter_counts,
    require_device,
    response_nll,
    response_token_nll,
    weights_file,
)
from neft_utils.noise import NEFTuneCallback

LOG_COLUMNS = [
    "step",
    "epoch",
    "train_loss",
    "learning_rate",
    "grad_norm",
    "tokens",
    "seconds",
    "validation_nll",
]


def split_row(batch, tokens):
    """Cut a padding-free batch between documents into batches of at most `tokens` tokens.

    A document longer than that stands alone. Summed losses and gradients do not change.
    """
    offsets = batch["cu_seq_lens_q"].tolist()
    begin = 0
    while begin < len(offsets) - 1:
        end = begin + 1
        while end < len(offsets) - 1 and offsets[end + 1] - offsets[begin] <= tokens:
            end += 1
        a, b = offsets[begin], offsets[end]
        part = {name: batch[name][:, a:b] for name in ("input_ids", "labels", "position_ids")}
        own = batch["cu_seq_lens_q"][begin : end + 1] - a
        longest = max(y - x for x, y in itertools.pairwise(offsets[begin : end + 1]))
        part |= {"cu_seq_lens_q": own, "cu_seq_lens_k": own}
        yield part | {"max_length_q": longest, "max_length_k": longest}
        begin = end


class PaddingFreeTrainer(SFTTrainer):
    """SFTTrainer whose loss computes nothing for padding and no logits for prompt tokens.

    A step's examples come as one row; forward and backward take it in parts of at most
    `micro_batch_tokens` tokens (set by `build_trainer`): memory is bounded by tokens, not by
    examples.
    """

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if return_outputs:
            raise NotImplementedError("this trainer computes losses, not outputs")
        noise = next(
            (c.noise for c in self.callback_handler.callbacks if hasattr(c, "noise")), None
        )
        if noise is not None:
            noise.set_labels(inputs["labels"])  # the forward is not given them
        nll, _ = response_token_nll(model, inputs)
        return nll.sum() / (num_items_in_batch if num_items_in_batch is not None else len(nll))

    def training_step(self, model, inputs, num_items_in_batch=None):
        model.train()
        total = 0.0
        for part in split_row(self._prepare_inputs(inputs), self.micro_batch_tokens):
            loss = self.compute_loss(model, part, num_items_in_batch=num_items_in_batch)
            self.accelerator.backward(loss)
            total = total + loss.detach()
        return total

    def train(self, *args, **kwargs):
        try:
            return super().train(*args, **kwargs)
        finally:
            for callback in self.callback_handler.callbacks:
                if isinstance(callback, NEFTuneCallback):
                    callback.remove()


class _Log(TrainerCallback):
    """Collects one row per optimiser step and the clean validation NLL after each epoch."""

    def __init__(self, model, tokens_of_step, validation, batch_tokens, say):
        self.model, self.tokens_of_step, self.say = model, tokens_of_step, say
        self.validation, self.batch_tokens = validation, batch_tokens
        self.rows, self.started, self.scoring = [], time.perf_counter(), 0.0

    def validate(self):
        started = time.perf_counter()
        scores = response_nll(self.model, self.validation, self.batch_tokens)
        self.model.train()
        self.scoring += time.perf_counter() - started
        return sum(scores) / len(scores)

    def on_train_begin(self, args, state, control, **kwargs):
        self.started = time.perf_counter()
        self.rows.append({"step": 0, "epoch": 0.0, "validation_nll": self.validate()})

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" not in (logs or {}):
            return
        if not math.isfinite(logs["loss"]):
            raise FloatingPointError(
                f"the training loss is {logs['loss']} at step {state.global_step}: lower"
                " train.learning_rate or noise_alpha"
            )
        seconds = time.perf_counter() - self.started - self.scoring
        row = {
            "step": state.global_step,
            "epoch": logs["epoch"],
            "train_loss": logs["loss"],
            "learning_rate": logs["learning_rate"],
            "grad_norm": logs["grad_norm"],
            "tokens": self.tokens_of_step(state.global_step),
            "seconds": round(seconds, 2),
        }
        self.rows.append(row)
        if state.global_step % math.ceil(state.max_steps / 8) == 0:
            self.say(f"step {state.global_step}/{state.max_steps}  loss {logs['loss']:.3f}")

    def on_epoch_end(self, args, state, control, **kwargs):
        self.rows[-1]["validation_nll"] = self.validate()
        self.say(f"epoch {state.epoch:.0f}  validation NLL {self.rows[-1]['validation_nll']:.4f}")


def lora_model(base, recipe, seed):
    """The base with fresh float32 LoRA adapters on all linear layers; the seed fixes them."""
    set_seed(seed)
    config = LoraConfig(
        r=recipe.lora_rank,
        lora_alpha=recipe.lora_alpha,
        lora_dropout=recipe.lora_dropout,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    return lean_lora(get_peft_model(base, config))  # PEFT keeps adapters in float32


def trainable(base, recipe, seed):
    """The model that a recipe trains: adapters on the base, or the base itself in float32."""
    if recipe.method == "lora":
        return lora_model(base, recipe, seed)
    set_seed(seed)
    return base.float().requires_grad_(True)


def build_trainer(model, tokenizer, encoded, recipe, seed, callbacks, folder):
    """PaddingFreeTrainer on already encoded examples, with the recipe's optimiser.

    Adapters are float32 on bf16 weights; a fully trained model is float32, on a GPU with products
    in bf16 (autocast).
    """
    cuda = torch.cuda.is_available()
    steps = math.ceil(len(encoded) / recipe.batch_size) * recipe.epochs
    disable_progress_bars()
    with warnings.catch_warnings():
        # SFTConfig's own default warns, and TRL warns at padding-free without FlashAttention;
        # attention is per document here.
        warnings.simplefilter("ignore")
        arguments = SFTConfig(
            output_dir=str(folder),
            seed=seed,
            data_seed=seed,
            per_device_train_batch_size=recipe.batch_size,
            num_train_epochs=recipe.epochs,
            learning_rate=recipe.learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=round(recipe.warmup_fraction * steps),
            weight_decay=recipe.weight_decay,
            max_grad_norm=recipe.max_grad_norm,
            padding_free=True,
            max_length=None,
            completion_only_loss=True,
            gradient_checkpointing=recipe.gradient_checkpointing,
            bf16=cuda and recipe.method == "full",
            **({"optim": "adamw_bnb_8bit"} if recipe.optimizer == "adamw_8bit" else {}),
            use_cpu=not cuda,
            dataloader_pin_memory=False,
            logging_steps=1,
            logging_nan_inf_filter=False,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
        )
        trainer = PaddingFreeTrainer(
            model=model,
            args=arguments,
            processing_class=tokenizer,
            callbacks=callbacks,
            train_dataset=Dataset.from_list(encoded),
        )
    trainer.micro_batch_tokens = recipe.micro_batch_tokens
    for parameter in trainer.model.parameters():  # TRL makes them bf16 on a 4-bit base
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    trainer.remove_callback(PrinterCallback)  # rows go to train_log.csv
    return trainer


def train_rows(profile, arm, seed, paths):
    """The rows that a run trains on: the seed's subset, or the arm's first share of it."""
    rows = data.load_split(paths.processed, f"train-s{seed}")
    return rows[: max(1, round(len(rows) * profile.data_fraction(arm)))]


def finetune(profile, arm, seed, paths, say=print):
    """Train one run and write its folder; returns the run's folder.

    Writes config.json, train_log.csv (LOG_COLUMNS; row 0 is before training), noise.json,
    adapter/ (or model/, where all weights are trained) and, last, provenance.json, so that a
    folder with it is a whole run.
    """
    profile.check_run(arm, seed)
    require_device(profile)
    begun, key = provenance.begin(), step_key(profile, 3, arm, seed)
    recipe, change, run = profile.recipe(arm), profile.arms[arm], paths.run(arm, seed)
    for old in ("provenance.json", "scores.json"):  # of an earlier run: this one is not whole yet
        (run / old).unlink(missing_ok=True)
    tokenizer = load_tokenizer(profile.model)
    encoded = [encode(tokenizer, row) for row in train_rows(profile, arm, seed, paths)]
    validation = [encode(tokenizer, row) for row in data.load_split(paths.processed, "validation")]
    model = trainable(load_base(profile.model), recipe, seed)
    callback = NEFTuneCallback(
        change.noise_alpha,
        distribution=change.distribution,
        length=change.length,
        where=change.where,
    )
    mean_tokens = sum(len(e["input_ids"]) for e in encoded) / len(encoded)

    def tokens_of_step(step):
        return round(min(step * recipe.batch_size, len(encoded) * recipe.epochs) * mean_tokens)

    log = _Log(model, tokens_of_step, validation, profile.evaluate.batch_tokens, say)
    trainer = build_trainer(
        model, tokenizer, encoded, recipe, seed, [callback, log], run / "trainer"
    )
    with (
        warnings.catch_warnings(),
        out_of_memory("train.micro_batch_tokens", recipe.micro_batch_tokens),
    ):
        warnings.simplefilter("ignore", FutureWarning)  # of TRL at transformers, not ours
        trainer.train()
    seconds = time.perf_counter() - log.started - log.scoring
    provenance.write_json(
        run / "config.json",
        {
            "profile": profile.name,
            "arm": arm,
            "seed": seed,
            "model": as_dict(profile.model),
            "noise": as_dict(change),
            "train": as_dict(recipe),
            "step_key": key,
        },
    )
    provenance.write_csv(run / "train_log.csv", pd.DataFrame(log.rows).reindex(columns=LOG_COLUMNS))
    provenance.write_json(run / "noise.json", callback.report())
    whole, weights = recipe.method == "full", run / profile.weights
    (model.to(torch.bfloat16) if whole else model).save_pretrained(
        weights.parent, max_shard_size="1TB"
    )
    tokens = round(mean_tokens * len(encoded)) * recipe.epochs
    provenance.write_json(
        run / "provenance.json",
        provenance.describe(
            begun,
            arm=arm,
            seed=seed,
            train_seconds=round(seconds, 1),
            train_tokens=tokens,
            **throughput(model, recipe, encoded, seconds),
            adapter_sha256=provenance.sha256_file(weights),
            data_sha256=provenance.sha256_file(paths.processed / f"train-s{seed}.jsonl"),
            base_sha256=provenance.sha256_file(weights_file(profile.model)),
        ),
    )
    return run


def throughput(model, recipe, encoded, seconds):
    """Real and padded tokens/s, model FLOP/s and utilisation of training.

    FLOPs per token: 4 per frozen weight (forward 2, gradient of the input 2, no gradient of
    the weight), 6 per trained weight; the head's only on response tokens, which is why the
    embedding's own weights, a look-up, are not counted. Attention is left out (under 3 %
    below 400 tokens). Utilisation is the share of the fastest bf16 matrix product measured
    in this process (`provenance.matmul_gflops`). Padded counts what batches padded to their
    longest example would cost.
    """
    lengths = [len(e["input_ids"]) for e in encoded]
    responses = sum(sum(e["completion_mask"]) for e in encoded)
    size = recipe.batch_size
    padded = sum(
        max(lengths[i : i + size]) * len(lengths[i : i + size])
        for i in range(0, len(lengths), size)
    )
    count = parameter_counts(model)
    embedding = model.get_input_embeddings().weight.numel()
    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    rest = embedding + (0 if tied else count["head"])
    if recipe.method == "full":
        each, head = 6 * (count["trainable"] - rest), 6 * count["head"]
    else:
        each, head = 4 * (count["frozen"] - rest) + 6 * count["trainable"], 4 * count["head"]
    flops = recipe.epochs * (sum(lengths) * each + responses * head)
    return {
        "tokens_per_second": round(recipe.epochs * sum(lengths) / seconds, 2),
        "padded_tokens_per_second": round(recipe.epochs * padded / seconds, 2),
        "model_gflops_per_second": round(flops / seconds / 1e9, 2),
        "model_flops_utilisation": round(flops / seconds / 1e9 / provenance.matmul_gflops(), 4),
        "trainable_parameters": count["trainable"],
    }
