# The steps of a profile as a graph; `make reproduce` calls it, nothing else schedules.
# What the steps are, read and write is declared in neft_utils.base.steps.
# A step is redone when its inputs or its `key` change: see neft_utils.base.keys.step_key.
import shlex
from urllib.parse import unquote

from neft_utils.base import steps
from neft_utils.base.files import sha256_file
from neft_utils.base.keys import step_key
from neft_utils.base.paths import BASE, Paths
from neft_utils.base.read_profile import load_profile
from neft_utils.evaluate.vllm.locate import WORKER, vllm_python
from neft_utils.make.workflow import TEXT

NAMED, OUT = (unquote(str(config[key]).removeprefix(TEXT)) for key in ("profile", "out"))
PROFILE = load_profile(NAMED)
PATHS = Paths(PROFILE.name, OUT)
RUNS = PROFILE.runs()
MODELS = [(BASE, 0), *RUNS]
PREPARE, FINETUNE, EVALUATE = (steps.step(number) for number in (1, 3, 4))
MEMORY = int(PROFILE.memory_gb * 1000)
# Of steps that load no model of the profile. Each asks, or Slurm lends a whole node's memory.
LIGHT = min(MEMORY, 4000)
GPUS = 1 if PROFILE.device == "cuda" else 0
THREADS = int(config.get("threads", 1))  # of a job; neft_utils.make.workflow says why
# Runs whose answers come from vLLM, all from one engine; none where it is not asked for or not here.
VLLM = PROFILE.asked_runs() if vllm_python(PROFILE) else []


def files(names, runs=RUNS):
    return steps.expand(names, PROFILE, PATHS, runs)


def of_a_run(names):
    """Files of whatever run the wildcards name."""
    return steps.expand(names, PROFILE, PATHS)


def executed(step, *run):
    return str(PATHS.notebook(step.number, *run))


def neft(name, *words):
    """A command of ours. What people name is quoted for the shell, braces for Snakemake."""
    named = shlex.join(["--profile", NAMED, "--out", OUT]).replace("{", "{{").replace("}", "}}")
    return " ".join(["python -m neft_utils", name, *words, named])


def asks(step):
    """Resources of a job of the step."""
    wanted = {"mem_mb": MEMORY if step.loads_model else LIGHT}
    return wanted | ({"gpu": GPUS} if step.on_device else {})


def key(number):
    def of(wildcards):
        seed = wildcards.get("seed")
        return step_key(PROFILE, number, wildcards.get("arm"), None if seed is None else int(seed))

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


DATA = [name for name in files(PREPARE.writes) if name.endswith(".jsonl")]
RUN = "--arm {wildcards.arm} --seed {wildcards.seed}"


wildcard_constraints:
    arm="|".join(PROFILE.arms),
    seed=r"\d+",


rule all:
    input:
        files([steps.SCORES], MODELS),  # else a run whose folder is deleted would not be missed
        files([steps.CLAIMS]),
        [executed(steps.step(number)) for number in steps.ends()],


rule:
    name: PREPARE.rule
    output: files(PREPARE.writes), executed(PREPARE),
    params: key=key(PREPARE.number),
    resources: **asks(PREPARE),
    shell: neft("notebook", str(PREPARE.number))


rule:
    name: FINETUNE.rule
    input: of_a_run(FINETUNE.reads),
    output: of_a_run(FINETUNE.writes), executed(FINETUNE, "{arm}", "{seed}"),
    params: key=key(FINETUNE.number),
    resources: **asks(FINETUNE),
    threads: THREADS,
    shell: neft("notebook", str(FINETUNE.number), RUN)


# The one step without a notebook: it only fills what notebook 4 reads. Alone on its machine, since
# vLLM takes all of a GPU's memory.
if VLLM:

    rule answer:
        input: files([steps.WEIGHTS], [run for run in VLLM if run[0] != BASE]), DATA,
        output: [str(PATHS.stored_answers(*run)) for run in VLLM],
        params: key=[sha256_file(WORKER), *(step_key(PROFILE, 4, *run) for run in VLLM)],
        resources: mem_mb=MEMORY, gpu=GPUS,
        threads: int(config.get("whole", 1)),
        shell: neft("answer")


rule:
    name: EVALUATE.rule
    input:
        of_a_run(EVALUATE.reads), control,
        lambda wildcards: stored(wildcards.arm, int(wildcards.seed)),
    output: of_a_run(EVALUATE.writes), executed(EVALUATE, "{arm}", "{seed}"),
    params: key=key(EVALUATE.number),
    resources: **asks(EVALUATE),
    threads: THREADS,
    priority: 1  # before other trainings, so that a cut leaves whole runs
    shell: neft("notebook", str(EVALUATE.number), RUN)


# The untrained model has no adapter to wait for, and says itself what it is.
rule evaluate_base:
    input: DATA, stored(BASE, 0),
    output: files([*EVALUATE.writes, *steps.ABOUT], [(BASE, 0)]), executed(EVALUATE, BASE, 0),
    params: key=step_key(PROFILE, EVALUATE.number, BASE, 0),
    resources: **asks(EVALUATE),
    threads: THREADS,
    shell: neft("notebook", str(EVALUATE.number), f"--arm {BASE} --seed 0")


for step in steps.CHAIN:
    if step not in (PREPARE, FINETUNE, EVALUATE):

        rule:
            name: step.rule
            input: files(step.reads, MODELS),
            output: files(step.writes), executed(step),
            # The command is put together when the loop is over: the number goes through params.
            params: key=key(step.number), number=step.number,
            resources: **asks(step),
            shell: neft("notebook", "{params.number}")
