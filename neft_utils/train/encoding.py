"""How an example becomes tokens: the template, the loss mask, rows without padding."""

import functools

import torch
import torch.nn.functional as F

from neft_utils.base.strict import ConfigError, one_line
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
    """Token ids of a user prompt up to where the answer begins.

    Raises ConfigError for a chat template that fails, or leaves the prompt out.
    """
    return _prompts_ids(tokenizer, [prompt])[0]


def _prompts_ids(tokenizer, prompts):
    if tokenizer.chat_template is None:
        texts = [alpaca_prompt(prompt) for prompt in prompts]
        whole = tokenizer(texts)["input_ids"]
        own = tokenizer(texts, add_special_tokens=False)["input_ids"]
        return [_opened(*pair) for pair in zip(whole, own, strict=True)]
    messages = [[{"role": "user", "content": prompt}] for prompt in prompts]
    texts = _rendered(tokenizer, messages, add_generation_prompt=True)
    return tokenizer(texts, add_special_tokens=False)["input_ids"]


def _opened(whole, own):
    """Ids of a text that goes on: with what the tokenizer puts before it (`whole` has it, `own` has
    not), not with what it puts behind it (an end of sequence, for one)."""
    for begin in range(len(whole) - len(own) + 1):
        if whole[begin : begin + len(own)] == own:
            return whole[:begin] + own
    raise ConfigError(
        "model.source: its tokenizer breaks a text into other tokens when it adds special ones:"
        " give it a chat template"
    )


def _rendered(tokenizer, messages, **options):
    with one_line(  # a template is a program, and may raise what it likes
        "model.source: its chat template cannot show a user's prompt ({reason}): correct"
        " chat_template and save the tokenizer again"
    ):
        return tokenizer.apply_chat_template(messages, tokenize=False, **options)


def end_of_turn(tokenizer):
    """The id that ends an answer: the special token that the chat template puts behind one.

    The tokenizer's eos_token where there is no template, or none that ends an answer.
    """
    return _end_of_turn(tokenizer, str(tokenizer.chat_template), tokenizer.eos_token_id)


@functools.lru_cache(maxsize=16)
def _end_of_turn(tokenizer, template, eos):
    if tokenizer.chat_template is None:
        return eos
    mark = "Quince and medlar."
    turns = [("user", "Name two fruits."), ("assistant", mark)]
    try:
        text = _rendered(tokenizer, [{"role": r, "content": c} for r, c in turns])
    except ConfigError:
        return eos  # a template of prompts alone
    if mark not in text:
        return eos
    rest = tokenizer(text.rpartition(mark)[2], add_special_tokens=False)["input_ids"]
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    return next((i for i in rest if i in special), eos)


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
    end = end_of_turn(tokenizer)
    return [[*ids, end] for ids in encoded]


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
