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
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

ATTENTION = "per_document"
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
        or head.weight.requires_grad
        or any(getattr(config, name, None) for name in special)
    ):
        return F.cross_entropy(model(**inputs).logits[0].float(), targets, reduction="none")
    with _identity(head):
        hidden = model(**inputs).logits[0]
    return _HeadNLL.apply(hidden, head.weight, targets)


# ----------------------------------------------------------------------------- attention


def per_document_attention(module, query, key, value, attention_mask, cu_seq_lens_q=None, **kwargs):
    """Causal attention within each document of a padding-free row; masked SDPA without one.

    query, key, value: (1, heads, tokens, head size); cu_seq_lens_q: (documents + 1,) offsets.
    On a GPU in half precision FlashAttention takes the whole row at once; elsewhere SDPA takes
    one document after the other.
    """
    scale = kwargs.get("scaling")
    if cu_seq_lens_q is None:
        if query.device.type != "cpu" or attention_mask is None:
            return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
        # transformers would copy keys and values for every query head of a group.
        out = F.scaled_dot_product_attention(
            query, key, value, attn_mask=attention_mask, scale=scale, enable_gqa=True
        )
        return out.transpose(1, 2).contiguous(), None
    if query.device.type == "cuda" and query.dtype in (torch.float16, torch.bfloat16):
        from torch.nn.attention.varlen import varlen_attn

        longest, offsets = kwargs["max_length_q"], cu_seq_lens_q.int()
        # Keys and values once for every query head: not every torch takes groups here.
        groups = query.shape[1] // key.shape[1]
        if groups > 1:
            key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
        rows = (x[0].transpose(0, 1).contiguous() for x in (query, key, value))
        options = {"window_size": (-1, 0), "scale": scale}
        out = varlen_attn(*rows, offsets, offsets, longest, longest, **options)
        return out[None], None
    dtype, lengths = query.dtype, cu_seq_lens_q.diff().tolist()
    if query.device.type == "cpu" and query.requires_grad:
        # The bf16 kernel's backward is the slow part; its forward is the faster one.
        query, key, value = query.float(), key.float(), value.float()
    # split, not slices: the gradient of a split is one concatenation.
    documents = zip(*(x.split(lengths, dim=2) for x in (query, key, value)), strict=True)
    options = {"is_causal": True, "scale": scale, "enable_gqa": True}
    parts = [F.scaled_dot_product_attention(*one, **options) for one in documents]
    return torch.cat(parts, dim=2).transpose(1, 2).contiguous().to(dtype), None


def make_fast(model):
    """Give a model the layers of this module, in place: lean LoRA and attention per document.

    model: a Hugging Face causal LM, with or without PEFT's adapters. Returns the model.
    """
    AttentionInterface.register(ATTENTION, per_document_attention)
    # Without a mask function transformers drops the mask of a padded batch without a word.
    AttentionMaskInterface.register(ATTENTION, sdpa_mask)
    inner = model.get_base_model() if hasattr(model, "peft_config") else model
    inner.set_attn_implementation(ATTENTION)
    return lean_lora(model)
