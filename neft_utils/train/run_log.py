"""What a run writes down while it trains: a row a step, checkpoints of both, and its speed."""

import json
import math
import time
from pathlib import Path

from transformers import TrainerCallback

from neft_utils.base.files import write_json
from neft_utils.base.provenance import matmul_gflops
from neft_utils.train.losses import response_losses

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
CURVE_COLUMNS = ["epoch", "split", "row", "n_tokens", "nll", "end_nll"]


class RunLog(TrainerCallback):
    """Collects one row per optimiser step, and losses with the noise off every few epochs.

    train, validation: encoded examples; batch_tokens: tokens per forward when scoring; every:
    epochs from one scoring to the next (the last is always scored); on_train: whether the training
    rows are scored as well. `rows` become train_log.csv; `curve` losses_by_epoch.csv, a line per
    scored row in CURVE_COLUMNS, in nats as `losses.response_losses` has them. `started` and
    `scoring` are seconds. Raises FloatingPointError for a loss that is not finite.
    """

    def __init__(self, train, validation, batch_tokens, every=1, on_train=False, say=print):
        self.train, self.validation, self.batch_tokens = train, validation, batch_tokens
        self.every, self.on_train = every, on_train
        self.say, self.rows, self.curve = say, [], []
        self.started, self.scoring = time.perf_counter(), 0.0
        self.mean_tokens = sum(len(one["input_ids"]) for one in train) / len(train)

    def tokens_of_step(self, step, args):
        """Training tokens seen by the end of a step; args: the trainer's arguments."""
        seen = min(step * args.per_device_train_batch_size, len(self.train) * args.num_train_epochs)
        return round(seen * self.mean_tokens)

    def validate(self, model, epoch):
        """Mean NLL of the validation examples, noise off; its time is not training time."""
        started = time.perf_counter()
        scored = {"validation": self.validation} | ({"train": self.train} if self.on_train else {})
        for split, examples in scored.items():
            losses = response_losses(model, examples, self.batch_tokens)
            for row, (example, nll, end) in enumerate(zip(examples, *losses, strict=True)):
                tokens = sum(example["completion_mask"])
                values = (int(epoch), split, row, tokens, round(nll, 6), round(end, 6))
                self.curve.append(dict(zip(CURVE_COLUMNS, values, strict=True)))
            if split == "validation":
                mean = sum(losses[0]) / len(examples)
        model.train()
        self.scoring += time.perf_counter() - started
        return mean

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.started = time.perf_counter()
        if self.rows:  # of the checkpoint that training goes on from
            self.say(f"goes on at step {state.global_step}/{state.max_steps}")
            last = self.rows[-1]
            self.started -= last.get("seconds", 0.0)
            if self._due(last["epoch"], args) and "validation_nll" not in last:
                # A checkpoint comes before it.
                last["validation_nll"] = self.validate(model, last["epoch"])
            return
        self.rows.append({"step": 0, "epoch": 0.0, "validation_nll": self.validate(model, 0)})

    def _due(self, epoch, args):
        return epoch % self.every == 0 or epoch == args.num_train_epochs

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
        epoch = round(state.epoch)
        if self._due(epoch, args):
            self.rows[-1]["validation_nll"] = value = self.validate(model, epoch)
            self.say(f"epoch {epoch}  validation NLL {value:.4f}")

    def on_save(self, args, state, control, **kwargs):
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        write_json(folder / ROWS, {"rows": self.rows, "curve": self.curve})


def last_checkpoint(folder, log):
    """The newest whole checkpoint below a trainer's folder, or None; `log` takes over its rows."""
    found = [path for path in Path(folder).glob("checkpoint-*") if (path / ROWS).exists()]
    newest = max(found, key=lambda path: int(path.name.split("-")[1]), default=None)
    if newest is not None:
        saved = json.loads((newest / ROWS).read_text("utf-8"))
        log.rows, log.curve = saved["rows"], saved["curve"]
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
