"""Continuations that share a prompt have the probabilities that each has by itself."""

import pytest
import torch
from tiny import lively_nano
from transformers import BloomConfig, BloomForCausalLM

from neft_utils.evaluate.branches import ROW_TOKENS, continuation_logprobs


def made_items(count, vocabulary=64):
    """Items of 2 to 4 continuations of 1 to 5 tokens, after prompts of 3 to 40."""
    draw = torch.Generator().manual_seed(0)

    def ids(low, high):
        size = int(torch.randint(low, high + 1, (1,), generator=draw))
        return torch.randint(3, vocabulary, (size,), generator=draw).tolist()

    return [(ids(3, 40), [ids(1, 5) for _ in range(2 + n % 3)]) for n in range(count)]


@torch.no_grad()
def alone(model, prompt, ids):
    logprobs = model(torch.tensor([prompt + ids])).logits[0].float().log_softmax(-1)
    places = range(len(prompt) - 1, len(prompt) + len(ids) - 1)
    return sum(float(logprobs[at, token]) for at, token in zip(places, ids, strict=True))


def check(model, items, said):
    found = continuation_logprobs(model, items, said.append)
    for (prompt, some), values in zip(items, found, strict=True):
        assert values == pytest.approx([alone(model, prompt, ids) for ids in some], abs=1e-3)


def test_many_items_in_several_rows_are_as_each_alone():
    items, said = made_items(40), []
    assert sum(len(prompt) for prompt, _ in items) > ROW_TOKENS
    items.append((items[0][0] * 20, [[5, 6]]))  # longer than a row by itself
    check(lively_nano(), items, said)
    assert said == []


def test_where_places_in_the_row_count_each_is_computed_by_itself():
    torch.manual_seed(0)
    config = BloomConfig(
        vocab_size=64, hidden_size=32, n_layer=2, n_head=2, pad_token_id=0, initializer_range=0.5
    )
    said = []
    check(BloomForCausalLM(config).eval(), made_items(3), said)
    assert any("a prompt shared by its continuations differs" in line for line in said)
