"""Where everything lies: the notebooks, the folders of a profile, and what a profile names."""

from dataclasses import dataclass
from pathlib import Path

from neft_utils.base.files import ROOT
from neft_utils.base.gguf import MODELS
from neft_utils.base.steps import CHAIN

PACKAGE = Path(__file__).resolve().parents[1]
NOTEBOOKS = PACKAGE.parent / "notebooks"
PROFILES = NOTEBOOKS / "profiles"
STEPS = {step.number: step.stem for step in CHAIN}
BASE = "base"  # the untrained model, evaluated as run base-s0
OWN_MODELS = ("nano", *MODELS)  # sources of models that are no paths
REFERENCE = "results/reference"  # results that `make promote` put under version control


def is_path(profile):
    """Whether a profile is named by the path of its YAML file, not by a built-in one's name."""
    return str(profile).lower().endswith((".yaml", ".yml"))


# ------------------------------------------------------------------- what a profile names


def find(path, folder=None):
    """Path of an existing file or folder that a profile names, None where there is none.

    The one rule for relative paths: beside the profile (folder), then the repository's root.
    Never the current folder, which is another one in a notebook than in a shell.
    """
    if not str(path).strip():
        return None
    try:
        path = Path(path).expanduser()
        places = [place / path for place in (folder, ROOT) if place is not None]
        return next((place for place in places if place.exists()), None)
    except (OSError, RuntimeError, ValueError):  # longer than a name may be, or nobody's home
        return None


def located(values, folder):
    """YAML values of a profile with the paths in them as `find` finds them from anywhere: relative
    to the root where they are below it, else absolute. What is not there stays as it is.

    folder: where the file with these values is.
    """
    for section, key in (("data", "path"), ("model", "source")):
        part = values.get(section)
        name = part.get(key) if isinstance(part, dict) else None
        if not isinstance(name, str) or name in OWN_MODELS:
            continue
        if (found := find(name, folder)) is not None:
            found = found.relative_to(ROOT) if found.is_relative_to(ROOT) else found
            values = {**values, section: {**part, key: str(found)}}
    return values


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
