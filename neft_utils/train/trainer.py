"""TRL's SFTTrainer, faster: nothing is computed for padding, and no logits for prompt tokens.

The subclass only changes how the loss is computed (`losses.response_token_nll`), and makes sure
that the noise is gone when `train()` ends, however it ends.
"""

import itertools

import torch
from transformers.trainer_callback import PrinterCallback
from trl import SFTTrainer

from neft_utils.base.strict import ConfigError
from neft_utils.noise import NEFTuneCallback
from neft_utils.train.fast import make_fast
from neft_utils.train.losses import response_token_nll
from neft_utils.train.own_path import inner_model


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
    it in parts of at most `micro_batch_tokens` tokens, so that tokens bound memory, not examples.
    What is trained stays float32, also on a 4-bit base, where TRL rounds it to bf16.
    """

    def __init__(self, model, *args, micro_batch_tokens=2048, **kwargs):
        trained = [(p, p.data) for p in model.parameters() if p.requires_grad]
        super().__init__(model, *args, **kwargs)
        for parameter, values in trained:
            parameter.data = values.to(parameter.device, torch.float32)
        self.micro_batch_tokens = micro_batch_tokens
        make_fast(self.model, max(len(ids) for ids in self.train_dataset["input_ids"]))
        self._refuse_widths()
        self.remove_callback(PrinterCallback)  # a run log writes the rows

    def _refuse_widths(self):
        """Noise by the width of a row needs rows: a model that takes single documents has none."""
        noise = self._noise()
        if inner_model(self.model).neft_apart and noise is not None and noise.length != "sequence":
            raise ConfigError(
                f"length: {noise.length}: this model takes one document at a time, so no row is"
                " wider than its document: use length: sequence"
            )

    def _noise(self):
        found = (c.noise for c in self.callback_handler.callbacks if hasattr(c, "noise"))
        return next(found, None)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if return_outputs:
            raise NotImplementedError("this trainer computes losses, not outputs")
        noise = self._noise()
        if noise is not None:
            noise.set_labels(inputs["labels"])  # the forward is not given them
        nll, _ = response_token_nll(model, inputs)
        return nll.sum() / (num_items_in_batch if num_items_in_batch is not None else len(nll))

    def training_step(self, model, inputs, num_items_in_batch=None):
        model.train()
        total = 0.0
        tokens = 1 if inner_model(self.model).neft_apart else self.micro_batch_tokens
        for part in split_row(self._prepare_inputs(inputs), tokens):
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
