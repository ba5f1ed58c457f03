"""Causal attention within each document of a padding-free row, with the model's window if any."""

import contextlib

import torch
import torch.nn.functional as F
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

ATTENTION = "per_document"
_whole_mask = False  # whether masks are given for all layers alike, and so hold no window


@contextlib.contextmanager
def whole_mask():
    """In here a mask says who is there, for all layers alike: each layer's window is added to it.

    Elsewhere transformers makes the masks, with the windows in them.
    """
    global _whole_mask
    before, _whole_mask = _whole_mask, True
    try:
        yield
    finally:
        _whole_mask = before


def _seen(queries, keys, window, device):
    """Mask (queries, keys), true where a query sees a key: the last `window` ones, itself included.

    The last query stands at the last key.
    """
    key = torch.arange(keys, device=device)
    query = key[keys - queries :, None]
    return (key <= query) & (key > query - window)


def per_document_attention(
    module, query, key, value, attention_mask, cu_seq_lens_q=None, sliding_window=None, **kwargs
):
    """Causal attention within each document of a padding-free row; masked SDPA without one.

    query, key, value: (1, heads, tokens, head size); cu_seq_lens_q: (documents + 1,) offsets;
    sliding_window: how many tokens a layer looks back, itself included. On a GPU in half precision
    FlashAttention takes the whole row at once; elsewhere SDPA takes one document after the other.
    """
    scale = kwargs.get("scaling")
    if cu_seq_lens_q is None:
        if _whole_mask and sliding_window is not None and attention_mask is not None:
            sizes = query.shape[2], key.shape[2]
            if sizes[1] > sliding_window:
                near = _seen(*sizes, sliding_window, query.device)
                # Padding sees itself alone, which is within any window.
                attention_mask = attention_mask & near
        if query.device.type != "cpu" or attention_mask is None:
            return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
        # transformers would copy keys and values for every query head of a group.
        out = F.scaled_dot_product_attention(
            query, key, value, attn_mask=attention_mask, scale=scale, enable_gqa=True
        )
        return out.transpose(1, 2).contiguous(), None
    half = (torch.float16, torch.bfloat16)
    computed = query.dtype
    if torch.is_autocast_enabled(query.device.type):  # some norms give float32 queries under it
        computed = torch.get_autocast_dtype(query.device.type)
    if query.device.type == "cuda" and computed in half:
        from torch.nn.attention.varlen import varlen_attn

        query, key, value = (x.to(computed) for x in (query, key, value))
        longest, offsets = kwargs["max_length_q"], cu_seq_lens_q.int()
        # Keys and values once for every query head: not every torch takes groups here.
        groups = query.shape[1] // key.shape[1]
        if groups > 1:
            key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
        rows = (x[0].transpose(0, 1).contiguous() for x in (query, key, value))
        back = -1 if sliding_window is None else sliding_window - 1
        options = {"window_size": (back, 0), "scale": scale}
        out = varlen_attn(*rows, offsets, offsets, longest, longest, **options)
        return out[None], None
    dtype, lengths = query.dtype, cu_seq_lens_q.diff().tolist()
    if query.device.type == "cpu" and query.requires_grad:
        # The bf16 kernel's backward is the slow part; its forward is the faster one.
        query, key, value = query.float(), key.float(), value.float()
    # split, not slices: the gradient of a split is one concatenation.
    documents = zip(*(x.split(lengths, dim=2) for x in (query, key, value)), strict=True)
    parts = [_document(*one, sliding_window, scale) for one in documents]
    return torch.cat(parts, dim=2).transpose(1, 2).contiguous().to(dtype), None


def _document(query, key, value, window, scale):
    length, options = query.shape[2], {"is_causal": True}
    if window is not None and length > window:
        options = {"attn_mask": _seen(length, length, window, query.device)}
    options |= {"scale": scale, "enable_gqa": True}
    return F.scaled_dot_product_attention(query, key, value, **options)


def register():
    """Make ATTENTION known to transformers."""
    AttentionInterface.register(ATTENTION, per_document_attention)
    # Without a mask function transformers drops the mask of a padded batch without a word.
    AttentionMaskInterface.register(ATTENTION, sdpa_mask)
