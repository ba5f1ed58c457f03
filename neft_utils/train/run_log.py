"""What a run writes down while it trains: a row a step, checkpoints of both, and its speed."""

import json
import math
import time
from pathlib import Path

from transformers import TrainerCallback

from neft_utils.base.files import write_json
from neft_utils.base.provenance import matmul_gflops
from neft_utils.train.losses import response_nll

ROWS = "rows.json"  # in a checkpoint; written last, so that a checkpoint with it is a whole one

LOG_COLUMNS = [
    "step",
    "epoch",
    "train_loss",
    "learning_rate",
    "grad_norm",
    "tokens",
    "seconds",
    "validation_nll",
]


class RunLog(TrainerCallback):
    """Collects one row per optimiser step and the clean validation NLL after each epoch.

    train, validation: encoded examples; batch_tokens: tokens per forward when scoring. `rows`
    become train_log.csv, `started` and `scoring` are seconds. Raises FloatingPointError for a loss
    that is not finite.
    """

    def __init__(self, train, validation, batch_tokens, say=print):
        self.train, self.validation, self.batch_tokens = train, validation, batch_tokens
        self.say, self.rows = say, []
        self.started, self.scoring = time.perf_counter(), 0.0
        self.mean_tokens = sum(len(one["input_ids"]) for one in train) / len(train)

    def tokens_of_step(self, step, args):
        """Training tokens seen by the end of a step; args: the trainer's arguments."""
        seen = min(step * args.per_device_train_batch_size, len(self.train) * args.num_train_epochs)
        return round(seen * self.mean_tokens)

    def validate(self, model):
        """Mean NLL of the validation examples, noise off; its time is not training time."""
        started = time.perf_counter()
        scores = response_nll(model, self.validation, self.batch_tokens)
        model.train()
        self.scoring += time.perf_counter() - started
        return sum(scores) / len(scores)

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.started = time.perf_counter()
        if self.rows:  # of the checkpoint that training goes on from
            self.say(f"goes on at step {state.global_step}/{state.max_steps}")
            last = self.rows[-1]
            self.started -= last.get("seconds", 0.0)
            if float(last["epoch"]).is_integer() and "validation_nll" not in last:
                last["validation_nll"] = self.validate(model)  # a checkpoint comes before it
            return
        self.rows.append({"step": 0, "epoch": 0.0, "validation_nll": self.validate(model)})

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" not in (logs or {}):
            return
        if not math.isfinite(logs["loss"]):
            raise FloatingPointError(
                f"the training loss is {logs['loss']} at step {state.global_step}: lower"
                " train.learning_rate or noise_alpha"
            )
        seconds = time.perf_counter() - self.started - self.scoring
        row = {
            "step": state.global_step,
            "epoch": logs["epoch"],
            "train_loss": logs["loss"],
            "learning_rate": logs["learning_rate"],
            "grad_norm": logs["grad_norm"],
            "tokens": self.tokens_of_step(state.global_step, args),
            "seconds": round(seconds, 2),
        }
        self.rows.append(row)
        if state.global_step % math.ceil(state.max_steps / 8) == 0:
            self.say(f"step {state.global_step}/{state.max_steps}  loss {logs['loss']:.3f}")

    def on_epoch_end(self, args, state, control, model=None, **kwargs):
        self.rows[-1]["validation_nll"] = self.validate(model)
        self.say(f"epoch {state.epoch:.0f}  validation NLL {self.rows[-1]['validation_nll']:.4f}")

    def on_save(self, args, state, control, **kwargs):
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        write_json(folder / ROWS, self.rows)


def last_checkpoint(folder, log):
    """The newest whole checkpoint below a trainer's folder, or None; `log` takes over its rows."""
    found = [path for path in Path(folder).glob("checkpoint-*") if (path / ROWS).exists()]
    newest = max(found, key=lambda path: int(path.name.split("-")[1]), default=None)
    if newest is not None:
        log.rows = json.loads((newest / ROWS).read_text("utf-8"))
    return newest


def throughput(model, recipe, encoded, seconds):
    """Real and padded tokens/s, model FLOP/s and utilisation of training.

    FLOPs per token: 4 per frozen weight (forward 2, gradient of the input 2, no gradient of
    the weight), 6 per trained weight; the head's only on response tokens, which is why the
    embedding's own weights, a look-up, are not counted. Attention is left out (under 3 %
    below 400 tokens). Utilisation is the share of the fastest bf16 matrix product measured
    in this process (`provenance.matmul_gflops`). Padded counts what batches padded to their
    longest example would cost.
    """
    lengths = [len(e["input_ids"]) for e in encoded]
    responses = sum(sum(e["completion_mask"]) for e in encoded)
    size = recipe.batch_size
    padded = sum(
        max(lengths[i : i + size]) * len(lengths[i : i + size])
        for i in range(0, len(lengths), size)
    )
    count = parameter_counts(model)
    embedding = model.get_input_embeddings().weight.numel()
    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    rest = embedding + (0 if tied else count["head"])
    if recipe.method == "full":
        each, head = 6 * (count["trainable"] - rest), 6 * count["head"]
    else:
        each, head = 4 * (count["frozen"] - rest) + 6 * count["trainable"], 4 * count["head"]
    flops = recipe.epochs * (sum(lengths) * each + responses * head)
    return {
        "tokens_per_second": round(recipe.epochs * sum(lengths) / seconds, 2),
        "padded_tokens_per_second": round(recipe.epochs * padded / seconds, 2),
        "model_gflops_per_second": round(flops / seconds / 1e9, 2),
        "model_flops_utilisation": round(flops / seconds / 1e9 / matmul_gflops(), 4),
        "trainable_parameters": count["trainable"],
    }


def parameter_counts(model):
    """{"frozen", "trainable", "head"}: numbers of parameters, for FLOP accounting."""
    count = {True: 0, False: 0}
    for p in model.parameters():
        packed = getattr(p, "quant_state", None)  # of a 4-bit weight, two values a byte
        count[p.requires_grad] += p.numel() if packed is None else packed.shape.numel()
    head = model.get_output_embeddings().weight.numel()
    return {"frozen": count[False], "trainable": count[True], "head": head}
