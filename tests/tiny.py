"""Models, places and cuts that several test files share."""

import dataclasses

import pytest
import torch
from transformers import TrainerCallback

from neft_utils.base.paths import Paths
from neft_utils.base.profiles import Model
from neft_utils.data import splits
from neft_utils.train import trainer
from neft_utils.train.base_models import load_base, load_tokenizer
from neft_utils.train.encoding import count_tokens
from neft_utils.train.finetune import finetune
from neft_utils.train.trainer import build_trainer


def lively_nano():
    """The nano model with weights large enough that its answers depend on what they follow.

    As initialised it repeats one byte for ever, whatever the prompt.
    """
    model = load_base(Model(source="nano"), "bf16").float()
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=0.3 if "proj" in name else 1.0)
    return model


def silent(text):
    pass


class Places(Paths):
    """Paths with the processed data elsewhere."""

    @property
    def processed(self):
        return self.folder


def places(profile, out, processed):
    """Places of a profile whose results go below `out`."""
    paths = Places(profile.name, str(out))
    object.__setattr__(paths, "folder", processed)
    return paths


def prepare(profile, folder):
    """Write a profile's processed data to `folder`."""
    count = count_tokens(load_tokenizer(profile.model))
    splits.prepare(profile.data, profile.all_seeds(), folder, count)


class Cut(TrainerCallback):
    """Ends training as a kill does, after the third step's checkpoint."""

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 3:
            raise KeyboardInterrupt


def saving(profile, **recipe):
    """The profile with a checkpoint after every step."""
    changed = dataclasses.replace(profile.train, checkpoint_steps=1, **recipe)
    return dataclasses.replace(profile, train=changed)


def cut_run(profile, arm, paths, monkeypatch):
    """Train seed 0 of an arm until it is cut; returns the folder with its checkpoints."""
    build = build_trainer
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "build_trainer", lambda *a: build(*a[:5], [*a[5], Cut()], a[6]))
        with pytest.raises(KeyboardInterrupt):
            finetune(profile, arm, 0, paths, silent)
    return next((paths.run(arm, 0) / "trainer").iterdir())
