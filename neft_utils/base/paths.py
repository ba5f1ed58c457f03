"""Where everything lies: the steps in order, and the folders of a profile."""

from dataclasses import dataclass
from pathlib import Path

from neft_utils.base.files import ROOT

PACKAGE = Path(__file__).resolve().parents[1]
NOTEBOOKS = PACKAGE.parent / "notebooks"
PROFILES = NOTEBOOKS / "profiles"
STEPS = {
    0: "00_start_here",
    1: "01_prepare_data",
    2: "02_noisy_embeddings",
    3: "03_finetune_qlora",
    4: "04_evaluate",
    5: "05_compare_and_plot",
    6: "06_published_results_revisited",
    7: "07_reuse_in_your_notebook",
    90: "90_exercise_solutions",
}
BASE = "base"  # the untrained model, evaluated as run base-s0
REFERENCE = "results/reference"  # results that `make promote` put under version control


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
