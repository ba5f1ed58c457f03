"""How a model answers: greedy, batched, with the paper's repetition penalty of 1.2.

The penalty follows CTRL (Keskar et al., arXiv 1909.05858) as in transformers, with two
exemptions. The end-of-turn token: SmolLM2's prompts contain it, so penalising seen tokens
would punish stopping in every arm, and length is what we measure. Padding: it would make
an answer depend on its neighbours in the batch.
"""

import torch
from transformers import LogitsProcessor, LogitsProcessorList

from neft_utils.model import prompt_ids


class RepetitionPenalty(LogitsProcessor):
    """Divide positive and multiply negative logits of seen tokens, some ids exempt."""

    def __init__(self, penalty, exempt):
        self.penalty, self.exempt = penalty, sorted(set(exempt))

    def __call__(self, input_ids, scores):
        seen = scores.gather(1, input_ids)
        seen = torch.where(seen > 0, seen / self.penalty, seen * self.penalty)
        out = scores.scatter(1, input_ids, seen)
        out[:, self.exempt] = scores[:, self.exempt]
        return out


def stop_ids(model, tokenizer):
    """Ids that end an answer: the tokenizer's end of turn and the model's own."""
    ids = model.generation_config.eos_token_id
    ids = ids if isinstance(ids, list) else [ids]
    return sorted({tokenizer.eos_token_id, *(i for i in ids if i is not None)})


@torch.no_grad()
def answer(model, tokenizer, prompts, *, max_new_tokens, batch_size, repetition_penalty=1.2):
    """Greedy answers to user prompts, in order: [{"n_tokens", "stopped", "text"}].

    n_tokens counts up to and including the first end of turn, `stopped` says whether there
    was one within `max_new_tokens`. Prompts are batched by length, padded on the left.
    """
    model.eval()
    attention = model.config._attn_implementation
    model.set_attn_implementation("sdpa")  # padded batches need a mask
    stops = stop_ids(model, tokenizer)
    processors = LogitsProcessorList()
    if repetition_penalty != 1.0:
        processors.append(RepetitionPenalty(repetition_penalty, [*stops, tokenizer.pad_token_id]))
    encoded = [prompt_ids(tokenizer, prompt) for prompt in prompts]
    order = sorted(range(len(encoded)), key=lambda i: len(encoded[i]))
    out = [None] * len(encoded)
    try:
        for begin in range(0, len(order), batch_size):
            chosen = order[begin : begin + batch_size]
            width = max(len(encoded[i]) for i in chosen)
            ids = torch.full((len(chosen), width), tokenizer.pad_token_id)
            mask = torch.zeros_like(ids)
            for row, i in enumerate(chosen):
                ids[row, width - len(encoded[i]) :] = torch.tensor(encoded[i])
                mask[row, width - len(encoded[i]) :] = 1
            device = next(model.parameters()).device
            new = model.generate(
                input_ids=ids.to(device),
                attention_mask=mask.to(device),
                do_sample=False,
                max_new_tokens=max_new_tokens,
                logits_processor=processors,
                eos_token_id=stops,
                pad_token_id=tokenizer.pad_token_id,
                temperature=None,
                top_p=None,
                top_k=None,
                repetition_penalty=None,
            )[:, width:].tolist()
            for i, tokens in zip(chosen, new, strict=True):
                out[i] = _first_turn(tokenizer, tokens, stops)
    finally:
        model.set_attn_implementation(attention)
    return out


def _first_turn(tokenizer, tokens, stops):
    end = next((n for n, token in enumerate(tokens) if token in stops), None)
    count = len(tokens) if end is None else end + 1
    text = tokenizer.decode(tokens[:end], skip_special_tokens=True)
    return {"n_tokens": count, "stopped": end is not None, "text": text}
