"""The same arithmetic in fewer passes over memory: LoRA layers, the head's loss, attention.

On two CPU cores less than a third of a plain training step is matrix products. The rest goes
to casts between float32 and bf16, to logits of 49,152 words in float32, and to padding. What
is computed stays the same: `tests/test_fast.py` holds losses and gradients against PEFT's and
transformers' own layers, in float32 within 1e-5.
"""

import contextlib

import torch
import torch.nn.functional as F
from peft.tuners.lora import Linear as PeftLinear

from neft_utils.train.attention import ATTENTION, register
from neft_utils.train.bf16_products import widen_products
from neft_utils.train.encoding import flat_batch
from neft_utils.train.own_path import agrees, inner_model, once, own_attention, own_nll

HEAD_ROWS = 256  # tokens whose logits are held at once: 256 × 49,152 × (2 + 4) bytes = 75 MB

# ---------------------------------------------------------------------------------- LoRA


class _LoraProduct(torch.autograd.Function):
    """y = x Wᵀ + s (x Aᵀ) Bᵀ with W frozen; A and B float32, multiplied in x's dtype.

    x (..., in), W (out, in), A (rank, in), B (out, rank). The adapter's share is added inside
    the product (addmm), so nothing of size (tokens, out) is cast, scaled or added on its own.
    """

    @staticmethod
    def forward(ctx, x, weight, lora_a, lora_b, scaling):
        a, b = lora_a.to(x.dtype), lora_b.to(x.dtype)
        flat = x.reshape(-1, x.shape[-1])
        low = flat @ a.T
        y = (flat @ weight.T).addmm_(low, b.T, alpha=scaling)
        ctx.save_for_backward(flat, weight, a, b, low)
        ctx.shape, ctx.scaling, ctx.dtype = x.shape, scaling, lora_a.dtype
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx, grad):
        x, weight, a, b, low = ctx.saved_tensors
        grad = grad.reshape(-1, grad.shape[-1])
        grad_low = (grad @ b).mul_(ctx.scaling)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = (grad @ weight).addmm_(grad_low, a).view(ctx.shape)
        grad_a = (grad_low.T @ x).to(ctx.dtype)
        grad_b = (grad.T @ low).to(ctx.dtype).mul_(ctx.scaling)
        return grad_x, None, grad_a, grad_b, None


class LeanLoraLinear(PeftLinear):
    """PEFT's LoRA layer whose plain case is one product; everything else is PEFT's forward."""

    def forward(self, x, *args, **kwargs):
        adapter, base = self.active_adapters[0], self.base_layer
        if (
            args
            or kwargs
            or len(self.active_adapters) != 1
            or self.disable_adapters
            or self.merged
            or adapter not in self.lora_A
            or adapter in self.lora_variant  # DoRA and others
            or self.lora_bias[adapter]
            or base.bias is not None
            or base.weight.requires_grad
            or x.dtype != base.weight.dtype
            or (self.training and not isinstance(self.lora_dropout[adapter], torch.nn.Identity))
        ):
            return super().forward(x, *args, **kwargs)
        a, b = self.lora_A[adapter].weight, self.lora_B[adapter].weight
        return _LoraProduct.apply(x, base.weight, a, b, self.scaling[adapter])


def lean_lora(model):
    """Give a PEFT model's plain LoRA layers the lean forward, in place; returns the model."""
    for module in model.modules():
        if type(module) is PeftLinear:
            module.__class__ = LeanLoraLinear
    return model


# ---------------------------------------------------------------------------------- head


class _HeadNLL(torch.autograd.Function):
    """-log softmax(h Wᵀ)[target] in nats, HEAD_ROWS tokens at a time, W frozen.

    The gradient of the hidden states is made in the forward, while the logits are there:
    d/dh = (softmax - one-hot) W. Logits are rounded to h's dtype, as the head's own would be,
    and the softmax is float32.
    """

    @staticmethod
    def forward(ctx, hidden, weight, targets):
        rows = min(HEAD_ROWS, len(hidden))
        product = hidden.new_empty(rows, len(weight))
        buffer = hidden.new_empty(rows, len(weight), dtype=torch.float32)
        nll = hidden.new_empty(len(hidden), dtype=torch.float32)
        grad = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        for begin in range(0, len(hidden), HEAD_ROWS):
            some = slice(begin, begin + HEAD_ROWS)
            target = targets[some, None]
            low = torch.mm(hidden[some], weight.T, out=product[: len(target)])
            logits = buffer[: len(target)].copy_(low)
            top, own = logits.amax(1, keepdim=True), logits.gather(1, target)
            total = logits.sub_(top).exp_().sum(1, keepdim=True)
            nll[some] = (top + total.log() - own)[:, 0]
            if grad is not None:
                logits.div_(total)
                logits.scatter_add_(1, target, logits.new_full(target.shape, -1))
                torch.mm(low.copy_(logits), weight, out=grad[some])
        ctx.save_for_backward(grad)
        return nll

    @staticmethod
    def backward(ctx, grad_nll):
        (grad,) = ctx.saved_tensors
        return grad * grad_nll[:, None].to(grad.dtype), None, None


@contextlib.contextmanager
def _identity(head):
    head.forward = lambda hidden: hidden
    try:
        yield
    finally:
        del head.forward


def token_nll(model, inputs, positions, targets):
    """NLL (tokens,) in nats of `targets` at row `positions` of a batch of one row.

    The head never sees the other positions. It is skipped in the model's own forward, hooks
    and wrappers included, and applied piecewise here; a head with a bias, or a model that
    scales or caps its logits, goes the usual way.
    """
    head, config = model.get_output_embeddings(), model.config
    special = ("final_logit_softcapping", "logits_scaling", "logit_scale")
    inputs = {**inputs, "logits_to_keep": positions, "use_cache": False}
    if (
        type(head) is not torch.nn.Linear
        or head.bias is not None
        or (head.weight.requires_grad and torch.is_grad_enabled())
        or any(getattr(config, name, None) for name in special)
    ):
        return F.cross_entropy(model(**inputs).logits[0].float(), targets, reduction="none")
    with _identity(head):
        hidden = model(**inputs).logits[0]
    return _HeadNLL.apply(hidden, head.weight, targets)


# --------------------------------------------------------------------- is it the same?


def make_fast(model, longest=0, say=print):
    """Give a model the layers of this module, in place, as far as they compute what its own do.

    model: a Hugging Face causal LM, with or without PEFT's adapters; longest: tokens of the
    longest document that it will be given. LoRA layers become lean. Attention becomes one per
    document if the losses of two documents in a row are those of each by itself, with the model's
    own attention; else the model keeps its own path, one document at a time, and `say` is told.
    On processors without bf16 products are computed in float32 (`bf16_products`), process-wide.
    Returns the model. Raises ConfigError for what is no causal language model.
    """
    register()
    widen_products()
    lean_lora(model)
    inner = inner_model(model)
    if inner.config._attn_implementation != ATTENTION:
        inner.neft_attention = inner.config._attn_implementation
    inner.neft_apart = True
    if difference := agrees(model, longest, "losses", _together):
        _use(inner, inner.neft_attention)
        found = f"the fast path differs from the model's own attention ({difference});"
        once(say, model, "losses", f"{found} one document is computed at a time, slower and right")
    else:
        _use(inner, ATTENTION)
        inner.neft_apart = False
    return model


def _use(inner, attention):
    # Some families have classes of their own for each attention; their masks part documents.
    if inner.config._attn_implementation != attention and inner._can_set_attn_implementation():
        inner.set_attn_implementation(attention)


def _together(model, documents):
    """[(own, fast)] losses in nats of each document: by itself, and in a row with the others."""
    inner, own = inner_model(model), []
    before = inner.config._attn_implementation
    with own_attention(model):
        own = [own_nll(model, ids, torch.arange(1, len(ids))) for ids in documents]
    masks = [[0] + [1] * (len(ids) - 1) for ids in documents]
    rows = [
        {"input_ids": ids.tolist(), "completion_mask": mask}
        for ids, mask in zip(documents, masks, strict=True)
    ]
    batch = flat_batch(rows, own[0].device)
    labels = batch.pop("labels")[0]
    positions = (labels != -100).nonzero()[:, 0]
    try:
        _use(inner, ATTENTION)
        nll = token_nll(model, batch, positions - 1, labels[positions])
    finally:
        _use(inner, before)
    return list(zip(own, nll.split([len(one) for one in own]), strict=True))
