"""Where everything lies: the notebooks, and the folders of a profile."""

from dataclasses import dataclass
from pathlib import Path

from neft_utils.base.files import ROOT
from neft_utils.base.steps import CHAIN

PACKAGE = Path(__file__).resolve().parents[1]
NOTEBOOKS = PACKAGE.parent / "notebooks"
PROFILES = NOTEBOOKS / "profiles"
STEPS = {step.number: step.stem for step in CHAIN}
BASE = "base"  # the untrained model, evaluated as run base-s0
REFERENCE = "results/reference"  # results that `make promote` put under version control


def is_path(profile):
    """Whether a profile is named by the path of its YAML file, not by a built-in one's name."""
    return str(profile).lower().endswith((".yaml", ".yml"))


# ------------------------------------------------------------------------------- places


@dataclass(frozen=True)
class Paths:
    """Where a profile's files are; `out` is results/local unless a caller says otherwise."""

    profile: str
    out: str = "results/local"

    @property
    def results(self):
        return ROOT / self.out / self.profile

    @property
    def processed(self):
        return ROOT / "data" / "processed" / self.profile

    @property
    def figures(self):
        return self.results / "figures"

    @property
    def tables(self):
        return self.results / "tables"

    def run(self, arm, seed):
        return self.results / "runs" / f"{arm}-s{seed}"

    def stored_answers(self, arm, seed):
        return self.results / "vllm" / f"{arm}-s{seed}.json"

    def notebook(self, step, arm=None, seed=None):
        suffix = "" if arm is None else f"__{arm}-s{seed}"
        return self.results / "notebooks" / f"{STEPS[step]}{suffix}.ipynb"
