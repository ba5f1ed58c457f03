"""The steps of the reproduction, declared once: notebooks, files, order, diagram and keys.

Snakefile, keys, diagram, plan and commands all follow from `CHAIN`. No key depends on the code of
this file (see `keys`): a step's own declaration is in its key where an outcome depends on it.
"""

from dataclasses import dataclass

RUN = "{results}/runs/{arm}-s{seed}"
WEIGHTS = f"{RUN}/{{weights}}"
TRAIN = "{processed}/train-s{seed}.jsonl"
VALIDATION, TEST = "{processed}/validation.jsonl", "{processed}/test.jsonl"
OOD = "{processed}/ood.jsonl"
MANIFESTS = ("{processed}/manifest.json", "{results}/manifest.json")
CLAIMS, SCORES = "{results}/claims.json", f"{RUN}/scores.json"
LEADERBOARD = "{results}/published/leaderboard.csv"
ABOUT = (f"{RUN}/config.json", f"{RUN}/provenance.json")  # what a run says of itself
_TRAINED = ("train_log.csv", "losses_by_epoch.csv", "noise.json")
_ITEMS = ("losses.csv", "generations.jsonl", "task_items.csv", "perturbed_losses.csv")
_ITEMS += ("stopping.csv", "preferences.csv", "rewards.csv")


@dataclass(frozen=True)
class Step:
    """One notebook: what it is called, what it reads and writes, and where it stands."""

    number: int
    stem: str  # of the notebook's file
    rule: str  # its name in Snakemake
    label: str = ""  # words of its box in the diagram, which shows those that have a place
    place: tuple[float, ...] = ()  # (x, y) of the box's middle
    after: tuple[int, ...] = ()  # whence arrows lead to it: whose data it takes, or who explains it
    reads: tuple[str, ...] = ()  # files of other steps, for `expand`
    writes: tuple[str, ...] = ()  # files besides its executed copy that others, or people, wait for
    # What its key depends on besides code: names of the profile's parts, or all_seeds, arm, seed
    # and change (what the arm changes); none: the whole profile.
    depends: tuple[str, ...] = ()
    facts: bool = False  # its key depends on neft_utils/facts too
    per_run: bool = False  # once per arm and seed
    on_device: bool = False  # on the profile's device, which may be a GPU; the others on a CPU
    loads_model: bool = False  # as much memory as a run; the others take little
    figures: bool = False  # `make figures` does it again


CHAIN = (
    Step(0, "00_start_here", "start", "start", (0.6, 0), figures=True),
    Step(
        1,
        "01_prepare_data",
        "prepare",
        label="data",
        place=(1.9, 0),
        after=(0,),
        writes=("{processed}/pool.jsonl", VALIDATION, TEST, OOD, TRAIN, *MANIFESTS),
        depends=("model", "data", "all_seeds"),
        loads_model=True,
    ),
    Step(
        2,
        "02_noisy_embeddings",
        "noise",
        label="noise",
        place=(3.2, 1),
        reads=MANIFESTS[:1],
        writes=("{results}/noise_check.json",),
        depends=("model", "arms"),
        loads_model=True,
        figures=True,
    ),
    Step(
        3,
        "03_finetune_qlora",
        "finetune",
        label="fine-tune",
        place=(3.2, 0),
        after=(1, 2),
        reads=(TRAIN, VALIDATION),
        writes=(*ABOUT, *(f"{RUN}/{name}" for name in _TRAINED), WEIGHTS),
        depends=("model", "train", "change", "seed"),
        per_run=True,
        on_device=True,
        loads_model=True,
    ),
    Step(
        4,
        "04_evaluate",
        "evaluate",
        label="evaluate",
        place=(4.5, 0),
        after=(3,),
        reads=(WEIGHTS, VALIDATION, TEST, OOD),
        writes=(*(f"{RUN}/{name}" for name in _ITEMS), SCORES),
        depends=("model", "evaluate", "arm", "change", "seed"),
        per_run=True,
        on_device=True,
        loads_model=True,
    ),
    Step(
        5,
        "05_compare_and_plot",
        "compare",
        label="compare",
        place=(5.8, 0),
        after=(4, 6),
        reads=(SCORES, LEADERBOARD),
        writes=(CLAIMS, *(f"{{results}}/tables/{n}" for n in ("main.csv", "main.md", "claims.md"))),
        facts=True,
        figures=True,
    ),
    Step(
        6,
        "06_published_results_revisited",
        "published",
        label="published",
        place=(5.8, 1),
        writes=(LEADERBOARD,),
        facts=True,
        figures=True,
    ),
    Step(
        7,
        "07_reuse_in_your_notebook",
        "reuse",
        label="reuse",
        place=(1.9, 1),
        after=(2,),
        reads=MANIFESTS[:1],  # not read, but step 1 fetches the model, and two would at once
        loads_model=True,
        on_device=True,
    ),
    Step(
        90,
        "90_exercise_solutions",
        "solutions",
        reads=(CLAIMS, MANIFESTS[1]),
        loads_model=True,
    ),
)


def step(number):
    """The step of that number."""
    return next(one for one in CHAIN if one.number == number)


def needs(one):
    """Numbers of the steps that write what a step reads, sorted."""
    return [other.number for other in CHAIN if set(other.writes) & set(one.reads)]


def ordered(chosen):
    """Some steps so that each comes after those it reads, else by number."""
    done = []
    for one in sorted(chosen, key=lambda one: one.number):
        before = [other for other in chosen if other.number in needs(one)]
        done += [other for other in [*ordered(before), one] if other not in done]
    return done


def ends():
    """Numbers of the steps whose files no other step reads."""
    read = {number for one in CHAIN for number in needs(one)}
    return [one.number for one in CHAIN if one.number not in read]


def expand(files, profile, paths, runs=(("{arm}", "{seed}"),)):
    """Paths of a step's files for these runs, [(arm, seed)]; without runs, Snakemake's patterns."""
    places = {"results": paths.results, "processed": paths.processed, "weights": profile.weights}
    named = [file.format(arm=arm, seed=seed, **places) for file in files for arm, seed in runs]
    return list(dict.fromkeys(named))
