"""Speed is counted as its docstring says."""

import types

import pytest
from peft import LoraConfig, get_peft_model

from neft_utils.base.read_profile import load_profile
from neft_utils.train import run_log
from neft_utils.train.base_models import load_base


def test_throughput_counts_what_the_docstring_says():
    profile = load_profile("nano")
    recipe = profile.train
    model = get_peft_model(load_base(profile.model), LoraConfig(target_modules="all-linear"))
    mask = [0] * 10 + [1] * 10
    encoded = [{"input_ids": [5] * 20, "completion_mask": mask}] * 4
    one = run_log.throughput(model, recipe, encoded, seconds=1.0)
    assert one["tokens_per_second"] == 80 * recipe.epochs == one["padded_tokens_per_second"]
    count = types.SimpleNamespace(**run_log.parameter_counts(model))
    body = count.frozen - count.head  # nano ties its head to the embedding
    flops = recipe.epochs * (80 * (4 * body + 6 * count.trainable) + 40 * 4 * count.head)
    assert one["model_gflops_per_second"] == pytest.approx(flops / 1e9, abs=0.01)
