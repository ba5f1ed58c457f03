"""`make bench` times what notebook 03 trains: the same settings, adapters and start."""

import torch
from tiny import Lab

from neft_utils.base.profiles import Train
from neft_utils.make.bench.shared import our_trainer
from neft_utils.train.base_models import load_base

# Of the notebook alone: where it saves, and that it saves at all.
PLACES = {"output_dir", "logging_dir", "run_name", "save_strategy", "save_steps"}
PLACES |= {"save_total_limit"}


def test_ours_in_the_bench_is_the_trainer_of_notebook_03(tmp_path, monkeypatch):
    lab = Lab(tmp_path, monkeypatch).prepare()
    names = lab.train("neft_a15", until="with recorded(")
    there = names["trainer"]
    recipe, base = lab.profile.recipe("neft_a15"), load_base(lab.profile.model)
    assert isinstance(recipe, Train)
    here = our_trainer(base, names["tokenizer"], names["train"], recipe, 0, tmp_path, 15.0)
    settings = [trainer.args.to_dict() for trainer in (here, there)]
    differ = {name for name in settings[0] if settings[0][name] != settings[1][name]}
    assert differ <= PLACES, differ
    assert here.micro_batch_tokens == there.micro_batch_tokens
    pairs = zip(here.model.named_parameters(), there.model.named_parameters(), strict=True)
    for (one, a), (other, b) in pairs:
        assert one == other and a.requires_grad == b.requires_grad and torch.equal(a, b), one
