"""What training and answering cost: ours beside plain TRL, in one run on an idle machine.

Every row trains the same examples with the same LoRA for the same steps in processes of its
own, ours in the environment that `make reproduce` gives its runs.
"""

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

from neft_utils.base.files import write_json
from neft_utils.base.provenance import describe, peak_memory_gb
from neft_utils.make.bench.measures import MEASURES
from neft_utils.make.bench.shared import (
    BATCH,
    NOISE_ALPHA,
    batch_token_counts,
    clocked,
    headed,
    logged_losses,
    our_trainer,
    spread,
    trl_trainer,
    with_range,
)

# For one row of TRL: glibc keeps freed memory in the process, so that the kernel need not clear
# it again. It matters where tensors of hundreds of megabytes come and go, as padded logits do.
KEEP_MEMORY = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": "17179869184",
    "THP_MEM_ALLOC_ENABLE": "1",
}


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the table: `processes` side by side, each with `threads` threads."""

    name: str
    kind: str  # "ours", "trl" (checkpointing off) or "trl_defaults"
    processes: int
    threads: int
    keep_memory: bool = False
    noise_alpha: float = NOISE_ALPHA
    also: tuple[str, ...] = ()  # what the process measures besides training


ROWS = [
    Row("trl_2x1", "trl", 2, 1),
    Row("ours_2x1", "ours", 2, 1),
    Row("trl_1x2", "trl", 1, 2, also=("answers_one_by_one",)),
    Row("ours_1x2", "ours", 1, 2, also=("forward", "answers", "noise")),
    Row("ours_1x2_no_noise", "ours", 1, 2, noise_alpha=0.0),
    Row("trl_1x2_keep_memory", "trl", 1, 2, keep_memory=True),
    Row("trl_defaults_1x2", "trl_defaults", 1, 2),
]


def bench(profile, reference, paths, steps=6, say=print):
    """Run all rows; returns what goes to bench.json. The first step of each warms up."""
    rows = {}
    for row in ROWS:
        found = _launch(row, reference, paths.out, steps)
        rows[row.name] = line = {**dataclasses.asdict(row), "steps": steps - 1, **found[0]}
        for key in ("real_tokens_per_second", "padded_tokens_per_second"):
            line[key] = {name: round(sum(one[key][name] for one in found), 2) for name in line[key]}
        line["peak_memory_gb"] = max(one["peak_memory_gb"] for one in found)
        say(f"{row.name}: {line['real_tokens_per_second']['median']:.0f} real tokens/s")

    def ratio(ours, theirs, key="real_tokens_per_second"):
        return round(rows[ours][key]["median"] / rows[theirs][key]["median"], 2)

    ours, alone = rows["ours_1x2"], rows["trl_1x2"]
    return {
        "profile": profile.name,
        "train_ratio_vs_trl": ratio("ours_2x1", "trl_2x1"),
        "train_ratio_vs_trl_one_run": ratio("ours_1x2", "trl_1x2"),
        "train_ratio_vs_trl_keep_memory": ratio("ours_1x2", "trl_1x2_keep_memory"),
        "train_ratio_vs_trl_defaults": ratio("ours_1x2", "trl_defaults_1x2"),
        "generation_ratio": round(
            ours["answers"]["median"] / alone["answers_one_by_one"]["median"], 2
        ),
        "forward_ratio": round(
            ours["forward"]["median"] / ours["real_tokens_per_second"]["median"], 2
        ),
        **ours.pop("noise"),
        "peak_memory_gb": max(rows[name]["peak_memory_gb"] for name in ("ours_2x1", "ours_1x2")),
        "load_seconds": ours["load_seconds"],
        "rows": rows,
        **{
            key: value
            for key, value in describe().items()
            if key in ("commit", "dirty", "device", "cores", "versions")
        },
    }


GOALS = {  # what the README shows, and the (least, most) that we hold ourselves to
    "train_ratio_vs_trl": ("training, two runs of one thread each, ours over TRL", 4, None),
    "train_ratio_vs_trl_one_run": ("training, one run of two threads, ours over TRL", 4, None),
    "train_ratio_vs_trl_keep_memory": ("the same, TRL told to keep freed memory", None, None),
    "train_ratio_vs_trl_defaults": ("the same, TRL's true defaults", None, None),
    "generation_ratio": ("answers, all test prompts in one batch over one by one", 15, None),
    "forward_ratio": ("scoring losses over training", 2, None),
    "noise_overhead_percent": ("noise, per cent of a training step", None, 0.5),
    "peak_memory_gb": ("peak memory of one training run, GB", None, 3),
}


def _goal(value, least, most):
    if least is None and most is None:
        return ""
    text = f"≤ {most}" if least is None else f"≥ {least}"
    reached = value <= most if least is None else value >= least
    return text if reached else f"{text}, missed"


def table(found):
    """The result as two Markdown tables: rates of every row, then ratios beside their goals."""
    columns = ("row", "processes × threads", "real tokens/s", "padded tokens/s", "peak GB", "loss")
    lines = headed(*columns)
    for name, row in found["rows"].items():
        lines.append(
            f"| {name} | {row['processes']} × {row['threads']}"
            f" | {with_range(row['real_tokens_per_second'])}"
            f" | {row['padded_tokens_per_second']['median']:.0f}"
            f" | {row['peak_memory_gb']:.2f} | {row['loss']:.3f} |"
        )
        for key, text in (
            ("answers_one_by_one", "answers, `generate` one by one"),
            ("answers", "answers, one batch of all test prompts"),
            ("forward", "losses, no gradient"),
        ):
            if key in row:
                lines.append(f"| {text} | 1 × 2 | {with_range(row[key])} | | | |")
    lines += ["", *headed("", "measured", "goal")]
    for key, (text, least, most) in GOALS.items():
        goal = _goal(found[key], least, most)
        lines.append(f"| {text} (`{key}`) | {found[key]:.2f} | {goal} |")
    return "\n".join(lines) + "\n"


def _launch(row, reference, out, steps):
    """Run a row's processes side by side; returns the results of each."""
    from neft_utils.make.workflow import ONEDNN, one_line

    environment = dict(os.environ, CUDA_VISIBLE_DEVICES="", TOKENIZERS_PARALLELISM="false")
    environment |= {"OMP_NUM_THREADS": str(row.threads), "MKL_NUM_THREADS": str(row.threads)}
    for name in (*KEEP_MEMORY, *ONEDNN):
        environment.pop(name, None)
    environment |= ONEDNN if row.kind == "ours" else KEEP_MEMORY if row.keep_memory else {}
    with tempfile.TemporaryDirectory() as folder:
        processes = []
        for number in range(row.processes):
            task = {
                "row": dataclasses.asdict(row),
                "profile": reference,
                "out": out,
                "steps": steps,
                "folder": folder,
                "number": number,
                "started": time.time(),
            }
            command = [sys.executable, "-m", "neft_utils.make.bench.cpu", json.dumps(task)]
            with open(Path(folder) / f"log-{number}", "w") as log:
                processes.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log))
        codes = _wait(processes)
        for number, code in enumerate(codes):
            if code:
                tail = (Path(folder) / f"log-{number}").read_text("utf-8").strip().splitlines()
                reason = one_line(ValueError(tail[-1] if tail else f"exit code {code}"))
                raise RuntimeError(f"bench {row.name}: {reason}")
        files = [Path(folder) / f"result-{number}.json" for number in range(row.processes)]
        return [json.loads(file.read_text("utf-8")) for file in files]


def _wait(processes):
    """Exit codes. When one fails the others are stopped, which would wait for it to begin; they
    count as 0."""
    while None in (codes := [process.poll() for process in processes]) and not any(codes):
        time.sleep(0.1)
    for process in processes:
        process.terminate()
        process.wait()
    return [code or 0 for code in codes]


# --------------------------------------------------------------------- in a process of its own


def _process(task):
    warnings.simplefilter("ignore")
    import torch

    from neft_utils.base.paths import Paths
    from neft_utils.base.profiles import Train
    from neft_utils.base.read_profile import load_profile
    from neft_utils.data import splits
    from neft_utils.train.base_models import load_base, load_tokenizer
    from neft_utils.train.encoding import encode
    from neft_utils.train.folders import model_folder

    row, profile = Row(**task["row"]), load_profile(task["profile"])
    torch.set_num_threads(row.threads)
    paths, seed = Paths(profile.name, task["out"]), profile.all_seeds()[0]
    # The default of train.micro_batch_tokens; a profile lowers it to run several in little memory.
    usual = dataclasses.replace(profile.train, micro_batch_tokens=Train.micro_batch_tokens)
    recipe = dataclasses.replace(usual, batch_size=BATCH, epochs=1)
    tokenizer = load_tokenizer(profile.model)
    examples = splits.load_split(paths.processed, f"train-s{seed}") * task["steps"]
    encoded = [encode(tokenizer, one) for one in examples[: BATCH * task["steps"]]]
    folder, number = Path(task["folder"]), task["number"]

    def ready():  # start together with the other process
        (folder / f"ready-{number}").touch()
        while len(list(folder.glob("ready-*"))) < row.processes:
            time.sleep(0.01)

    if row.kind == "ours":
        base = load_base(profile.model)
        trainer = our_trainer(base, tokenizer, encoded, recipe, seed, folder, row.noise_alpha)
    else:
        off = {"gradient_checkpointing": False} if row.kind == "trl" else {}
        trainer = trl_trainer(
            str(model_folder(profile.model)),
            tokenizer,
            encoded,
            recipe,
            seed,
            folder,
            noise_alpha=row.noise_alpha,
            per_device_train_batch_size=BATCH,
            lr_scheduler_type="cosine",
            warmup_steps=round(recipe.warmup_fraction * task["steps"]),
            use_cpu=True,
            dataloader_pin_memory=False,
            **off,
        )
    trained = [p.dtype for p in trainer.model.parameters() if p.requires_grad]
    assert set(trained) == {torch.float32}, "rows differ in the dtype of their adapters"
    sizes = batch_token_counts(trainer, BATCH)
    times = clocked(trainer, ready)
    loaded = time.time() - task["started"]
    trainer.train()
    seconds = [end - begin for begin, end in times]
    timed = list(zip(sizes, seconds, strict=True))[1:]
    found = {
        "load_seconds": round(loaded, 1),
        "real_tokens_per_second": spread(real / took for (real, _), took in timed),
        "padded_tokens_per_second": spread(padded / took for (_, padded), took in timed),
        "peak_memory_gb": peak_memory_gb(),
        "loss": round(logged_losses(trainer)[-1], 4),
    }
    test = splits.load_split(paths.processed, "test")
    for name in row.also:
        found[name] = MEASURES[name](profile, trainer.model.eval(), tokenizer, test, encoded)
    write_json(folder / f"result-{number}.json", found)


if __name__ == "__main__":
    _process(json.loads(sys.argv[1]))
