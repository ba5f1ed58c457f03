"""One fine-tuning run, LoRA on a frozen base or all weights, with or without noise.

The recipe is the paper's in form: loss on the response only, AdamW, warm-up and cosine decay
(arXiv 2310.05914, appendix), 128 examples a step at its scale.

TRL's SFTTrainer does the work; the subclass below only changes how the loss is computed
(head on response tokens, see `model.response_token_nll`) and makes sure that the noise is
gone when `train()` ends, however it ends.
"""

import itertools
import math
import warnings

import torch
from datasets import Dataset, disable_progress_bars
from peft import LoraConfig, get_peft_model
from transformers import set_seed
from transformers.trainer_callback import PrinterCallback
from trl import SFTConfig, SFTTrainer

from neft_utils.noise import NEFTuneCallback
from neft_utils.train.fast import make_fast
from neft_utils.train.losses import response_token_nll


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

    A step's examples come as one row (SFTConfig's `padding_free=True`); forward and backward take
    it in parts of at most `micro_batch_tokens` tokens: tokens bound memory, not examples. What is trained is float32, also on a 4-bit base, where TRL makes it bf16.
    """

    def __init__(self, *args, micro_batch_tokens=2048, **kwargs):
        super().__init__(*args, **kwargs)
        self.micro_batch_tokens = micro_batch_tokens
        make_fast(self.model)
        for parameter in self.model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
        self.remove_callback(PrinterCallback)  # a run log writes the rows

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
    return get_peft_model(base, config)  # PEFT keeps adapters in float32


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
            micro_batch_tokens=recipe.micro_batch_tokens,
        )
    return trainer
