"""How a model answers: greedy, batched, with the paper's repetition penalty of 1.2.

The penalty follows CTRL (Keskar et al., arXiv 1909.05858) as in transformers, with two
exemptions. The end-of-turn token: SmolLM2's prompts contain it, so penalising seen tokens
would punish stopping in every arm, and length is what we measure. Padding: it would make
an answer depend on its neighbours in the batch.
"""

import contextlib
import functools
import math

import torch
from transformers import Cache, GenerationConfig, LogitsProcessor
from transformers.cache_utils import DynamicLayer

from neft_utils.base.model_config import position_limit
from neft_utils.base.strict import ConfigError
from neft_utils.train.attention import whole_mask
from neft_utils.train.encoding import end_of_turn, prompt_ids
from neft_utils.train.own_path import (
    FLOAT32_WEIGHTS,
    agrees,
    float32_weights,
    inner_model,
    once,
    own_attention,
    own_logits,
)


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


def stop_ids(generation_config, tokenizer):
    """Ids that end an answer: the tokenizer's, the template's end of turn, and the model's own."""
    ids = generation_config.eos_token_id
    ids = ids if isinstance(ids, list) else [ids]
    ends = {tokenizer.eos_token_id, end_of_turn(tokenizer)}
    return sorted(ends | {i for i in ids if i is not None})


class _Layer(DynamicLayer):
    """Keys and values of one layer in buffers with room for every token to come.

    transformers' own layer copies all of the past at every token; this one writes one column.
    """

    def __init__(self, room):
        super().__init__()
        self.room, self.used = room, 0

    def lazy_initialization(self, keys, values):
        super().lazy_initialization(keys, values)
        batch, heads, _, size = keys.shape
        self.keys = keys.new_empty(batch, heads, self.room, size)
        self.values = torch.empty_like(self.keys)

    def update(self, keys, values, *args, **kwargs):
        if not self.is_initialized:
            self.lazy_initialization(keys, values)
        new = slice(self.used, self.used + keys.shape[2])
        self.keys[:, :, new], self.values[:, :, new] = keys, values
        self.used = new.stop
        return self.keys[:, :, : self.used], self.values[:, :, : self.used]

    def get_seq_length(self):
        return self.used


@torch.no_grad()
def answer(
    model,
    tokenizer,
    prompts,
    *,
    max_new_tokens,
    batch_size,
    repetition_penalty=1.2,
    min_new_tokens=0,
    say=print,
):
    """Greedy answers to user prompts, in order: [{"n_tokens", "stopped", "text"}].

    n_tokens counts up to and including the first end of turn, `stopped` says whether there
    was one within `max_new_tokens`; before `min_new_tokens` there can be none. Prompts are
    batched by length, padded on the left; rows that have ended leave the batch. Where that differs
    from the model's own path, prompts are answered one by one, and `say` is told. On a CPU the
    weights are float32 meanwhile, see `_steady`. Raises ConfigError for an answer that would be
    longer than the model reads.
    """
    model.eval()
    stops = stop_ids(model.generation_config, tokenizer)
    penalty = None
    if repetition_penalty != 1.0:
        penalty = RepetitionPenalty(repetition_penalty, [*stops, tokenizer.pad_token_id])
    encoded = [prompt_ids(tokenizer, prompt) for prompt in prompts]
    order = sorted(range(len(encoded)), key=lambda i: len(encoded[i]))
    out = [None] * len(encoded)
    if not encoded:
        return out
    longest = max(map(len, encoded)) + max_new_tokens
    limit = position_limit(inner_model(model).config.to_dict())
    if limit is not None and longest > limit:
        raise ConfigError(
            f"evaluate.max_new_tokens {max_new_tokens} after a prompt of"
            f" {longest - max_new_tokens} tokens exceeds the {limit} tokens that the model reads:"
            " lower it"
        )
    size = math.ceil(len(order) / max(1, math.ceil(len(order) / batch_size)))  # even batches
    with _steady(model):
        decode = way_to_decode(model, longest, say)
        for begin in range(0, len(order), size):
            chosen = order[begin : begin + size]
            limits = min_new_tokens, max_new_tokens
            some, pad = [encoded[i] for i in chosen], tokenizer.pad_token_id
            new = decode(model, some, limits, penalty, stops, pad)
            for i, tokens in zip(chosen, new, strict=True):
                out[i] = first_turn(tokenizer, tokens, stops)
    return out


def _steady(model):
    """Float32 weights, in here, of a model of up to FLOAT32_WEIGHTS of them on a CPU.

    In bf16 the two most probable tokens are often a rounding apart, and processors round
    differently: the untrained base answered 48 prompts with 127 tokens on one and 169 on another.
    """
    weights = list(model.parameters())
    cpu = all(w.device.type == "cpu" and w.is_floating_point() for w in weights)
    fits = cpu and sum(w.numel() for w in weights) <= FLOAT32_WEIGHTS
    return float32_weights(weights) if fits else contextlib.nullcontext()


# -------------------------------------------------------------------------- ways to decode


def way_to_decode(model, longest, say=print):
    """The fastest function like `_decode` that agrees with the model's own path.

    longest: tokens of the longest prompt with its answer. `say` is told which, if it is not the
    first. The last one is that path itself, the whole text anew for every token.
    """
    difference = None
    ways = {"one prompt at a time": _generate, "one prompt at a time, without a cache": _plainly}
    for name, way in {"in batches": _decode, **ways}.items():
        if way is _plainly:
            break
        found = agrees(model, longest, name, functools.partial(_greedy, way))
        if not found:
            break
        difference = difference or found
    if difference:
        found = f"answers in batches differ from the model's own path ({difference});"
        once(say, model, "answers", f"{found} it answers {name}, slower and right")
    return way


def _greedy(way, model, documents):
    """[(own, other)] for some new tokens of each document: their NLL, and the most likely one's."""
    seen, count = [], 6

    def look(ids, scores):
        seen.append(scores.float().log_softmax(1))
        return scores

    prompts = [ids.tolist() for ids in documents]
    new = way(model, prompts, (0, count), look, [], 0)
    # (document, token, vocabulary), whether the documents went together or one after the other
    seen = torch.stack(seen, 1) if len(seen) == count else torch.cat(seen).unflatten(0, (-1, count))
    out = []
    with own_attention(model):
        for prompt, tokens, theirs in zip(prompts, new, seen, strict=True):
            ids = torch.tensor(prompt + tokens)
            places = torch.arange(len(prompt) - 1, len(ids) - 1)
            own = own_logits(model, ids, places).log_softmax(1)
            chosen = torch.tensor(tokens, device=own.device)[:, None]
            out.append((own.gather(1, chosen)[:, 0], theirs.gather(1, chosen)[:, 0]))
            out.append((own.amax(1), theirs.amax(1)))
    return out


def _generate(model, prompts, limits, penalty, stops, pad):
    """As `_decode`, by the model's own `generate`, one prompt after the other."""
    inner, new = inner_model(model), []
    given = inner.generation_config
    minimum = {"min_new_tokens": limits[0]} if limits[0] else {}
    how = {"max_new_tokens": limits[1], "eos_token_id": stops or None, "pad_token_id": pad}
    try:  # else what the model's own file asks for (penalties, sampling) would be mixed in
        inner.generation_config = GenerationConfig(do_sample=False, **how, **minimum)
        for prompt in prompts:
            ids = torch.tensor([prompt], device=inner.get_input_embeddings().weight.device)
            found = model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                generation_config=inner.generation_config,
                logits_processor=[penalty] if penalty is not None else [],
            )
            new.append(found[0, len(prompt) :].tolist())
    finally:
        inner.generation_config = given
    return new


def _plainly(model, prompts, limits, penalty, stops, pad):
    """As `_decode`, with the whole text anew for every token."""
    new = []
    for prompt in prompts:
        ids = torch.tensor(prompt)
        for count in range(limits[1]):
            with own_attention(model):
                logits = own_logits(model, ids, torch.tensor([len(ids) - 1]))
            if penalty is not None:
                logits = penalty(ids[None].to(logits.device), logits)
            if count < limits[0]:
                logits[:, stops] = -torch.inf
            token = int(logits.argmax(1))
            ids = torch.cat([ids, torch.tensor([token])])
            if token in stops:
                break
        new.append(ids[len(prompt) :].tolist())
    return new


@whole_mask()
def _decode(model, prompts, limits, penalty, stops, pad):
    """The new token ids of each prompt, at least up to its first stop id; limits: (min, max)."""
    min_new_tokens, max_new_tokens = limits
    device = next(model.parameters()).device
    width = max(map(len, prompts))
    ids = torch.full((len(prompts), width + max_new_tokens), pad)
    for row, tokens in enumerate(prompts):
        ids[row, width - len(tokens) : width] = torch.tensor(tokens)
    ids = ids.to(device)
    start = width - torch.tensor([len(tokens) for tokens in prompts], device=device)
    columns = torch.arange(ids.shape[1], device=device)
    stop = torch.tensor(stops, dtype=torch.long, device=device)
    cache = Cache(layers=[_Layer(ids.shape[1]) for _ in range(model.config.num_hidden_layers)])
    rows = torch.arange(len(prompts), device=device)  # which prompt each row of the batch is
    # An index, not 1: torch multiplies the strided slice that 1 makes as a batch of products,
    # each with its own copy of the head.
    last = torch.tensor([-1], device=device)
    going = torch.ones_like(rows, dtype=torch.bool)
    new = [[] for _ in prompts]
    # Padding sees itself alone: a softmax over nothing would be nan, and nan times 0 is nan.
    own = columns[:width, None] == columns[:width]
    past = columns[:width, None] >= columns[:width]
    mask = (past & (columns[:width] >= start[:, None, None])) | own
    current, position = ids[:, :width], (columns[:width] - start[:, None]).clamp(min=0)
    for end in range(width, ids.shape[1]):
        logits = model(
            input_ids=current,
            attention_mask=mask[:, None],
            position_ids=position,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=last,
        ).logits[:, 0]
        logits = logits.float()
        if penalty is not None:
            logits = penalty(ids[:, :end], logits)
        if end - width < min_new_tokens:
            logits[:, stop] = -torch.inf
        token = logits.argmax(1)
        ids[:, end] = token
        for row, value in zip(rows.tolist(), token.tolist(), strict=True):
            new[row].append(value)
        going &= ~torch.isin(token, stop)
        left = int(going.sum())
        if not left:
            break
        if left <= 0.8 * len(rows):  # leaving costs a copy of the cache, so a few at a time
            keep = going.nonzero()[:, 0]
            rows, ids, start, token, going = (x[keep] for x in (rows, ids, start, token, going))
            for layer in cache.layers:
                layer.keys, layer.values = layer.keys[keep], layer.values[keep]
        current, position = token[:, None], (end - start)[:, None]
        mask = (columns[: end + 1] >= start[:, None])[:, None]
    return new


def first_turn(tokenizer, tokens, stops):
    """New token ids as {"n_tokens", "stopped", "text"}: up to the first of the ids `stops`."""
    end = next((n for n, token in enumerate(tokens) if token in stops), None)
    count = len(tokens) if end is None else end + 1
    text = tokenizer.decode(tokens[:end], skip_special_tokens=True)
    return {"n_tokens": count, "stopped": end is not None, "text": text}
