"""Nano models, rows and runs that several test files share."""

import torch
import yaml
from cells import run_cells
from peft import PeftModel
from transformers import TrainerCallback

from neft_utils.base import paths as places
from neft_utils.base.paths import PROFILES, Paths
from neft_utils.base.profiles import Model
from neft_utils.base.read_profile import load_profile
from neft_utils.data.splits import write_splits
from neft_utils.make.rows import rows_of
from neft_utils.train.base_models import load_base, load_tokenizer
from neft_utils.train.encoding import count_tokens
from neft_utils.train.fast import make_fast


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


def prepare(config, seeds, folder, count, **files):
    """Write the splits of a data section to `folder`; returns the manifest."""
    return write_splits(folder, *rows_of(config, seeds, count, **files))


class Lab:
    """A nano profile with changes in a folder of its own: its rows, and its runs by notebook.

    changes: {section: {key: value}} or {key: value} of the profile's YAML.
    """

    def __init__(self, folder, monkeypatch=None, **changes):
        values = yaml.safe_load((PROFILES / "nano.yaml").read_text("utf-8"))
        for key, value in changes.items():
            old = values.get(key)
            values[key] = {**old, **value} if isinstance(value, dict) and old else value
        self.file = folder / "lab.yaml"
        self.file.write_text(yaml.safe_dump(values), "utf-8")
        self.profile = load_profile(self.file)
        self.paths = Paths("lab", str(folder / "results"))
        if monkeypatch is not None:
            monkeypatch.setattr(places, "ROOT", folder)  # where processed data and results are

    def prepare(self):
        """Make the rows, as notebook 01 does."""
        count = count_tokens(load_tokenizer(self.profile.model))
        prepare(self.profile.data, self.profile.all_seeds(), self.paths.processed, count)
        return self

    def train(self, arm="neft_a15", seed=0, **how):
        """Run notebook 03; returns its names."""
        return self._run(3, arm, seed, **how)

    def score(self, arm="neft_a15", seed=0, **how):
        """Run notebook 04; returns its names."""
        return self._run(4, arm, seed, **how)

    def _run(self, step, arm, seed, **how):
        where = {"PROFILE": str(self.file), "OUT": self.paths.out}
        return run_cells(step, ARM=arm, SEED=seed, **where, **how)

    def tuned(self, run):
        """The base with the adapter of a run's folder, ready to be measured."""
        base = load_base(self.profile.model)
        return make_fast(PeftModel.from_pretrained(base, run / "adapter")).eval()


class Cut(TrainerCallback):
    """Ends training as a kill does, after the third step's checkpoint."""

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 3:
            raise KeyboardInterrupt


# For `edits` of notebook 03: ends training as a kill does, after the third step's checkpoint.
CUT = (
    "callbacks=[noise, log],",
    "callbacks=[noise, log, __import__('tiny').Cut()],",
)
