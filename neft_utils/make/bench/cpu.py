"""What training and answering cost: ours beside plain TRL, in one run on an idle machine.

Every row trains the same examples with the same LoRA for the same steps in processes of its
own, ours in the environment that `make reproduce` gives its runs.
"""

import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

from neft_utils.base.files import write_json
from neft_utils.base.provenance import describe, peak_memory_gb
from neft_utils.train.base_models import load_base, load_tokenizer
from neft_utils.train.encoding import encode
from neft_utils.train.folders import model_folder
from neft_utils.train.trainer import build_trainer, lora_model

BATCH = 8  # examples an optimiser step: TRL's own default of per_device_train_batch_size
NOISE_ALPHA = 5.0
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


def spread(values):
    """{"median", "low", "high"} of repeats."""
    values = [float(value) for value in values]
    found = {"median": statistics.median(values), "low": min(values), "high": max(values)}
    return {name: round(value, 2) for name, value in found.items()}


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
    lines = [
        "| row | processes × threads | real tokens/s | padded tokens/s | peak GB | loss |",
        "|---|---|---|---|---|---|",
    ]
    for name, row in found["rows"].items():
        real = row["real_tokens_per_second"]
        lines.append(
            f"| {name} | {row['processes']} × {row['threads']} | {real['median']:.0f}"
            f" [{real['low']:.0f}, {real['high']:.0f}]"
            f" | {row['padded_tokens_per_second']['median']:.0f}"
            f" | {row['peak_memory_gb']:.2f} | {row['loss']:.3f} |"
        )
        for key, text in (
            ("answers_one_by_one", "answers, `generate` one by one"),
            ("answers", "answers, one batch of all test prompts"),
            ("forward", "losses, no gradient"),
        ):
            if key in row:
                one = row[key]
                lines.append(
                    f"| {text} | 1 × 2 | {one['median']:.0f} [{one['low']:.0f},"
                    f" {one['high']:.0f}] | | | |"
                )
    lines += ["", "| | measured | goal |", "|---|---|---|"]
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


def trl_trainer(model, tokenizer, encoded, recipe, seed, folder, noise_alpha, **options):
    """Plain TRL with its own NEFTune flag and our recipe's LoRA.

    options: SFTConfig's; what neither they nor this function name is TRL's default.
    """
    from datasets import Dataset
    from peft import LoraConfig
    from trl import SFTConfig, SFTTrainer

    return SFTTrainer(
        model=model,
        args=SFTConfig(
            output_dir=str(folder),
            seed=seed,
            data_seed=seed,
            num_train_epochs=1,
            learning_rate=recipe.learning_rate,
            max_length=None,
            completion_only_loss=True,
            neftune_noise_alpha=noise_alpha,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            **options,
        ),
        processing_class=tokenizer,
        train_dataset=Dataset.from_list(encoded),
        peft_config=LoraConfig(
            r=recipe.lora_rank,
            lora_alpha=recipe.lora_alpha,
            target_modules="all-linear",
            task_type="CAUSAL_LM",
        ),
    )


def batch_token_counts(trainer, padded_batch):
    """A list that gets (real, padded) tokens of every batch that the trainer collates.

    Padded is what groups of `padded_batch` examples cost when padded to their longest.
    """
    sizes, collate = [], trainer.data_collator

    def counted(features):
        lengths = [len(one["input_ids"]) for one in features]
        groups = (lengths[i : i + padded_batch] for i in range(0, len(lengths), padded_batch))
        sizes.append((sum(lengths), sum(len(group) * max(group) for group in groups)))
        return collate(features)

    trainer.data_collator = counted
    return sizes


def _process(task):
    warnings.simplefilter("ignore")
    import torch
    from transformers import TrainerCallback

    from neft_utils.base.paths import Paths
    from neft_utils.base.profiles import Train
    from neft_utils.base.read_profile import load_profile
    from neft_utils.data import splits
    from neft_utils.noise import NEFTuneCallback

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
    seconds = []  # of each step

    class Clock(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            (folder / f"ready-{number}").touch()  # start together with the other process
            while len(list(folder.glob("ready-*"))) < row.processes:
                time.sleep(0.01)

        def on_step_begin(self, args, state, control, **kwargs):
            self.begun = time.perf_counter()

        def on_step_end(self, args, state, control, **kwargs):
            seconds.append(time.perf_counter() - self.begun)

    if row.kind == "ours":
        tuned = lora_model(load_base(profile.model), recipe, seed)
        trainer = build_trainer(
            tuned, tokenizer, encoded, recipe, seed, [NEFTuneCallback(row.noise_alpha)], folder
        )
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
    trainer.add_callback(Clock())
    loaded = time.time() - task["started"]
    trainer.train()
    timed = list(zip(sizes, seconds, strict=True))[1:]
    losses = [one["loss"] for one in trainer.state.log_history if "loss" in one]
    found = {
        "load_seconds": round(loaded, 1),
        "real_tokens_per_second": spread(real / took for (real, _), took in timed),
        "padded_tokens_per_second": spread(padded / took for (_, padded), took in timed),
        "peak_memory_gb": peak_memory_gb(),
        "loss": round(float(losses[-1]), 4),
    }
    test = splits.load_split(paths.processed, "test")
    for name in row.also:
        found[name] = _MEASURES[name](profile, trainer.model.eval(), tokenizer, test, encoded)
    write_json(folder / f"result-{number}.json", found)


def _one_by_one(profile, tuned, tokenizer, test, encoded):
    """Tokens/s of transformers' `generate`, prompt by prompt, as a user would call it."""
    import torch

    from neft_utils.train.encoding import prompt_ids

    rates = []
    for row in test[:5]:
        ids = torch.tensor([prompt_ids(tokenizer, row["prompt"])])
        started = time.perf_counter()
        with torch.no_grad():
            out = tuned.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                max_new_tokens=profile.evaluate.max_new_tokens,
                repetition_penalty=profile.evaluate.repetition_penalty,
                pad_token_id=tokenizer.pad_token_id,
            )
        rates.append((out.shape[1] - ids.shape[1]) / (time.perf_counter() - started))
    return spread(rates)


def _answers(profile, tuned, tokenizer, test, encoded):
    """Tokens/s of every test prompt of the profile in one batch, five times.

    The rate grows with the batch: its last long answers are alone in every step.
    """
    from neft_utils.evaluate.generate import answer

    settings, rates = profile.evaluate, []
    prompts = [row["prompt"] for row in test]
    for _ in range(5):
        started = time.perf_counter()
        answers = answer(
            tuned,
            tokenizer,
            prompts,
            max_new_tokens=settings.max_new_tokens,
            batch_size=len(prompts),
            repetition_penalty=settings.repetition_penalty,
        )
        rates.append(sum(a["n_tokens"] for a in answers) / (time.perf_counter() - started))
    return spread(rates)


def _forward(profile, tuned, tokenizer, test, encoded):
    """Tokens/s of scoring the training examples without gradient, five times."""
    from neft_utils.train.losses import response_nll

    tokens, rates = sum(len(one["input_ids"]) for one in encoded), []
    for _ in range(5):
        started = time.perf_counter()
        response_nll(tuned, encoded, profile.evaluate.batch_tokens)
        rates.append(tokens / (time.perf_counter() - started))
    return spread(rates)


def _noise(profile, tuned, tokenizer, test, encoded):
    """The noise's share of a step in per cent: a stopwatch around its hook, one thread.

    Differences of a few thousandths between whole steps would drown. On a GPU kernels run on
    after the hook: this is meant for a CPU.
    """
    import torch

    from neft_utils.noise import EmbeddingNoise
    from neft_utils.train.encoding import flat_batch
    from neft_utils.train.losses import response_token_nll

    class Timed(EmbeddingNoise):
        spent = 0.0

        def _add_noise(self, *args):
            started = time.perf_counter()
            output = super()._add_noise(*args)
            self.spent += time.perf_counter() - started
            return output

    torch.set_num_threads(1)
    noise, shares = Timed(NOISE_ALPHA).attach(tuned.train()), []
    for begin in range(0, len(encoded), BATCH):
        batch, noise.spent = flat_batch(encoded[begin : begin + BATCH]), 0.0
        started = time.perf_counter()
        response_token_nll(tuned, batch)[0].mean().backward()
        shares.append(100 * noise.spent / (time.perf_counter() - started))
        tuned.zero_grad()
    noise.remove()
    shares = [round(share, 4) for share in shares[1:]]
    return {
        "noise_overhead_percent": statistics.median(shares),
        "noise_overhead_percent_low": min(shares),
        "noise_overhead_percent_high": max(shares),
    }


_MEASURES = {
    "answers_one_by_one": _one_by_one,
    "answers": _answers,
    "forward": _forward,
    "noise": _noise,
}


if __name__ == "__main__":
    _process(json.loads(sys.argv[1]))
