"""One fine-tuning run, LoRA on a frozen base or all weights, with or without noise.

The recipe is the paper's in form: loss on the response only, AdamW, warm-up and cosine decay
(arXiv 2310.05914, appendix), 128 examples a step at its scale.

TRL's SFTTrainer does the work; the subclass below only changes how the loss is computed
(head on response tokens, see `model.response_token_nll`) and makes sure that the noise is
gone when `train()` ends, however it ends.
"""

import itertools
import math
import shutil
import time
import warnings

import pandas as pd
import torch
from datasets import Dataset, disable_progress_bars
from peft import LoraConfig, get_peft_model
from transformers import set_seed
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
    require_device,
    response_token_nll,
    weights_file,
)
from neft_utils.noise import NEFTuneCallback
from neft_utils.recording import LOG_COLUMNS, RunLog, last_checkpoint, throughput


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
            save_strategy="steps" if recipe.checkpoint_steps else "no",
            save_steps=recipe.checkpoint_steps or 1,
            save_total_limit=2,  # the newest may be cut
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

    log = RunLog(model, tokens_of_step, validation, profile.evaluate.batch_tokens, say)
    folder = run / "trainer" / key[:16]  # a checkpoint of other code or settings is no beginning
    trainer = build_trainer(model, tokenizer, encoded, recipe, seed, [callback, log], folder)
    checkpoint = last_checkpoint(folder, log)
    with (
        warnings.catch_warnings(),
        out_of_memory("train.micro_batch_tokens", recipe.micro_batch_tokens),
    ):
        warnings.simplefilter("ignore", FutureWarning)  # of TRL at transformers, not ours
        trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
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
    resumed = {"from_step": int(checkpoint.name.split("-")[1])} if checkpoint else {}
    provenance.write_json(run / "noise.json", callback.report() | resumed)
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
    shutil.rmtree(run / "trainer", ignore_errors=True)
    return run
