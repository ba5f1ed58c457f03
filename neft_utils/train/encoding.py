"""How an example becomes tokens: the template, the loss mask, rows without padding."""

import torch
import torch.nn.functional as F

from neft_utils.data.layouts import INPUT

# Prompt format of models without a chat template: Stanford Alpaca's, as the paper used; a prompt
# with an input (`layouts.INPUT`) has another first sentence.
ALPACA_TEMPLATE = (
    "Below is an instruction that describes a task{more}. Write a response that appropriately"
    " completes the request.\n\n### Instruction:\n{prompt}\n\n### Response:"
)
ALPACA_MORE = ", paired with an input that provides further context"


# ----------------------------------------------------------------------- tokens and loss


def prompt_ids(tokenizer, prompt):
    """Token ids of a user prompt up to where the answer begins."""
    return _prompts_ids(tokenizer, [prompt])[0]


def _prompts_ids(tokenizer, prompts):
    if tokenizer.chat_template is None:
        return tokenizer([alpaca_prompt(prompt) for prompt in prompts])["input_ids"]
    messages = [[{"role": "user", "content": prompt}] for prompt in prompts]
    texts = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    return tokenizer(texts, add_special_tokens=False)["input_ids"]


def alpaca_prompt(prompt):
    """A prompt in Stanford Alpaca's template, with its input where it has one."""
    return ALPACA_TEMPLATE.format(prompt=prompt, more=ALPACA_MORE if INPUT in prompt else "")


def encode(tokenizer, example):
    """{"input_ids", "completion_mask"} of an example: the mask is 1 on the response.

    The response ends with the end-of-turn token, which counts; the newline that chat
    templates put behind it does not. The mask is made from where the response stands, never
    from token ids: SmolLM2's padding token is its end-of-turn token.
    """
    prompt = prompt_ids(tokenizer, example["prompt"])
    response = _responses_ids(tokenizer, [example["response"]])[0]
    return {
        "input_ids": prompt + response,
        "completion_mask": [0] * len(prompt) + [1] * len(response),
    }


def _responses_ids(tokenizer, responses):
    encoded = tokenizer(responses, add_special_tokens=False)["input_ids"]
    return [[*ids, tokenizer.eos_token_id] for ids in encoded]


def count_tokens(tokenizer):
    """A function from examples to [(prompt tokens, response tokens)], for `splits.count`.

    All at a time: one by one, the calls take longer than the tokens.
    """

    def count(examples):
        prompts = _prompts_ids(tokenizer, [example["prompt"] for example in examples])
        responses = _responses_ids(tokenizer, [example["response"] for example in examples])
        return [(len(p), len(r)) for p, r in zip(prompts, responses, strict=True)]

    return count


def flat_batch(encoded, device="cpu"):
    """One padding-free row of several encoded examples, as TRL's collator lays it out."""
    lengths = torch.tensor([len(e["input_ids"]) for e in encoded])
    ids = torch.tensor([i for e in encoded for i in e["input_ids"]])
    mask = torch.tensor([m for e in encoded for m in e["completion_mask"]], dtype=torch.bool)
    offsets = F.pad(lengths.cumsum(0), (1, 0)).int()
    batch = {
        "input_ids": ids[None],
        "labels": torch.where(mask, ids, -100)[None],
        "position_ids": torch.cat([torch.arange(n) for n in lengths.tolist()])[None],
        "cu_seq_lens_q": offsets,
        "cu_seq_lens_k": offsets,
        "max_length_q": int(lengths.max()),
        "max_length_k": int(lengths.max()),
    }
    return {k: v.to(device) if torch.is_tensor(v) else v for k, v in batch.items()}


def token_batches(encoded, order, batch_tokens):
    """Yield `order` in pieces: lists of indices whose examples have at most `batch_tokens` tokens.

    An example longer than that is a piece by itself.
    """
    piece, total = [], 0
    for i in order:
        length = len(encoded[i]["input_ids"])
        if piece and total + length > batch_tokens:
            yield piece
            piece, total = [], 0
        piece.append(i)
        total += length
    if piece:
        yield piece
