# The steps of a profile as a graph; `make reproduce` calls it, nothing else schedules.
# A step is redone when its inputs or its `key` change: see neft_utils.base.keys.step_key.
from neft_utils.base.paths import BASE, Paths
from neft_utils.base.read_profile import load_profile
from neft_utils.evaluate.vllm.locate import WORKER, vllm_python
from neft_utils.base.keys import step_key
from neft_utils.base.files import sha256_file

PROFILE = load_profile(config["profile"])
PATHS = Paths(PROFILE.name, config["out"])
R, P = str(PATHS.results), str(PATHS.processed)
RUNS = PROFILE.runs()
SPLITS = ["pool", "validation", "test", "ood", *(f"train-s{s}" for s in PROFILE.all_seeds())]
DATA = [f"{P}/{name}.jsonl" for name in SPLITS]
SCORES = [str(PATHS.run(arm, seed) / "scores.json") for arm, seed in [(BASE, 0), *RUNS]]
ITEMS = ["losses.csv", "generations.jsonl", "task_items.csv", "perturbed_losses.csv",
         "stopping.csv", "preferences.csv", "scores.json"]
MEMORY = int(PROFILE.memory_gb * 1000)
# Of steps that load no model of the profile. Each asks, or Slurm lends a whole node's memory.
LIGHT = min(MEMORY, 4000)
GPUS = 1 if PROFILE.device == "cuda" else 0
THREADS = int(config.get("threads", 1))  # of a job; neft_utils.make.workflow says why
# Runs whose answers come from vLLM, all from one engine; none where it is not asked for or not here.
VLLM = PROFILE.asked_runs() if vllm_python(PROFILE) else []


def command(step, run=""):
    return (
        f"python -m neft_utils notebook {step} --profile {config['profile']!r}"
        f" --out {config['out']!r} {run}"
    )


def key(step):
    def of(wildcards):
        seed = wildcards.get("seed")
        return step_key(PROFILE, step, wildcards.get("arm"), None if seed is None else int(seed))

    return of


def control(wildcards):
    """The control's answers, where answers are cut to the control's length."""
    arm = PROFILE.control_of(wildcards.arm)
    seed = int(wildcards.seed)
    if not PROFILE.evaluate.length_arm_prompts or arm == wildcards.arm:
        return []
    return str(PATHS.run(arm, seed) / "generations.jsonl") if (arm, seed) in RUNS else []


def stored(arm, seed):
    """A run's answers from vLLM, where it has any."""
    return [str(PATHS.stored_answers(arm, seed))] if (arm, seed) in VLLM else []


wildcard_constraints:
    arm="|".join([BASE, *PROFILE.arms]),
    seed=r"\d+",


rule all:
    input:
        *SCORES,  # else a run whose folder is deleted would not be missed
        f"{R}/claims.json",
        f"{R}/notebooks/00_start_here.ipynb",
        f"{R}/notebooks/02_noisy_embeddings.ipynb",
        f"{R}/notebooks/07_reuse_in_your_notebook.ipynb",
        f"{R}/notebooks/90_exercise_solutions.ipynb",


rule start:
    output: f"{R}/notebooks/00_start_here.ipynb",
    params: key=key(0),
    resources: mem_mb=LIGHT,
    shell: command(0)


rule prepare:
    output: *DATA, f"{P}/manifest.json", f"{R}/manifest.json", f"{R}/notebooks/01_prepare_data.ipynb",
    params: key=key(1),
    resources: mem_mb=MEMORY,
    shell: command(1)


rule noise:
    input: f"{P}/manifest.json",
    output: f"{R}/noise_check.json", f"{R}/notebooks/02_noisy_embeddings.ipynb",
    params: key=key(2),
    resources: mem_mb=MEMORY,
    shell: command(2)


rule finetune:
    input: f"{P}/train-s{{seed}}.jsonl", f"{P}/validation.jsonl",
    output:
        *[f"{R}/runs/{{arm}}-s{{seed}}/{name}" for name in ("config.json", "train_log.csv",
          "noise.json", PROFILE.weights, "provenance.json")],
        f"{R}/notebooks/03_finetune_qlora__{{arm}}-s{{seed}}.ipynb",
    params: key=key(3),
    resources: mem_mb=MEMORY, gpu=GPUS,
    threads: THREADS,
    priority: 1
    shell: command(3, "--arm {wildcards.arm} --seed {wildcards.seed}")


# The one step without a notebook: it only fills what notebook 4 reads. Alone on its machine, since
# vLLM takes all of a GPU's memory.
if VLLM:

    rule answer:
        input: *[str(PATHS.run(*run) / PROFILE.weights) for run in VLLM if run[0] != BASE], *DATA,
        output: *[str(PATHS.stored_answers(*run)) for run in VLLM],
        params: key=[sha256_file(WORKER), *(step_key(PROFILE, 4, *run) for run in VLLM)],
        resources: mem_mb=MEMORY, gpu=GPUS,
        threads: int(config.get("whole", 1)),
        shell:
            f"python -m neft_utils answer --profile {config['profile']!r} --out {config['out']!r}"


rule evaluate:
    input:
        f"{R}/runs/{{arm}}-s{{seed}}/{PROFILE.weights}", *DATA[1:4], control,
        lambda wildcards: stored(wildcards.arm, int(wildcards.seed)),
    output:
        *[f"{R}/runs/{{arm}}-s{{seed}}/{name}" for name in ITEMS],
        f"{R}/notebooks/04_evaluate__{{arm}}-s{{seed}}.ipynb",
    params: key=key(4),
    resources: mem_mb=MEMORY, gpu=GPUS,
    threads: THREADS,
    shell: command(4, "--arm {wildcards.arm} --seed {wildcards.seed}")


# The untrained model has no adapter to wait for, and says itself what it is.
rule evaluate_base:
    input: *DATA, *stored(BASE, 0),
    output:
        *[f"{R}/runs/{BASE}-s0/{name}" for name in (*ITEMS, "config.json", "provenance.json")],
        f"{R}/notebooks/04_evaluate__{BASE}-s0.ipynb",
    params: key=step_key(PROFILE, 4, BASE, 0),
    resources: mem_mb=MEMORY, gpu=GPUS,
    threads: THREADS,
    shell: command(4, f"--arm {BASE} --seed 0")


ruleorder: evaluate_base > evaluate


rule published:
    output: f"{R}/published/leaderboard.csv", f"{R}/notebooks/06_published_results_revisited.ipynb",
    params: key=key(6),
    resources: mem_mb=LIGHT,
    shell: command(6)


rule compare:
    input: *SCORES, f"{R}/published/leaderboard.csv",
    output: f"{R}/claims.json", f"{R}/tables/main.csv", f"{R}/tables/main.md",
        f"{R}/tables/claims.md",
        f"{R}/notebooks/05_compare_and_plot.ipynb",
    params: key=key(5),
    resources: mem_mb=LIGHT,
    shell: command(5)


rule reuse:
    input: f"{P}/manifest.json",  # not read: notebook 1 fetches the model, and two would at once
    output: f"{R}/notebooks/07_reuse_in_your_notebook.ipynb",
    params: key=key(7),
    resources: mem_mb=MEMORY, gpu=GPUS,
    shell: command(7)


rule solutions:
    input: f"{R}/claims.json", f"{R}/manifest.json",
    output: f"{R}/notebooks/90_exercise_solutions.ipynb",
    params: key=key(90),
    resources: mem_mb=MEMORY,
    shell: command(90)
