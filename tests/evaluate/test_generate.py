"""Answers that another processor gives too."""

import copy

import torch
from tiny import lively_nano, silent

from neft_utils.base.profiles import Model
from neft_utils.evaluate import generate
from neft_utils.train.base_models import load_tokenizer
from neft_utils.train.encoding import prompt_ids


def test_on_a_cpu_answers_are_those_of_float32_weights_and_the_weights_stay():
    model, tokenizer = lively_nano().bfloat16(), load_tokenizer(Model(source="nano"))
    how = {"max_new_tokens": 24, "batch_size": 3, "say": silent}
    prompts = ["One?", "Two or more?", "Three."]
    before = [weight.data_ptr() for weight in model.parameters()]
    found = generate.answer(model, tokenizer, prompts, **how)
    after = [weight.data_ptr() for weight in model.parameters()]
    assert after == before and model.dtype == torch.bfloat16
    assert found == generate.answer(copy.deepcopy(model).float(), tokenizer, prompts, **how)
    # In bf16 itself this model soon says something else.
    encoded = [prompt_ids(tokenizer, prompt) for prompt in prompts]
    stops, pad = generate.stop_ids(model.generation_config, tokenizer), tokenizer.pad_token_id
    penalty = generate.RepetitionPenalty(1.2, [*stops, pad])
    rounded = generate._decode(model, encoded, (0, 24), penalty, stops, pad)
    assert [generate.first_turn(tokenizer, one, stops) for one in rounded] != found
