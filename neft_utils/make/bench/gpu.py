"""Training speed and memory of a 7B model on one GPU: ours beside TRL's QLoRA, same examples.

Speed depends on shapes, not on what the weights are: a random Llama of Llama-2-7B's shape is
built on the device, and examples are random tokens as long as real Alpaca examples. Every
row runs in a process of its own, because a memory peak is a process's; one that cannot run
says why. A row is on disk as soon as it is measured, and not measured again. Nothing is
downloaded. Shape "tiny" takes the same path on a CPU in seconds.
"""

import importlib.util
import json
import math
import os
import subprocess
import sys
import time

import torch

from neft_utils.base.files import read_json, write_json
from neft_utils.base.provenance import describe
from neft_utils.make.bench.gpu_row import SHAPES, in_four_bits
from neft_utils.make.bench.shared import headed, with_range

ROWS = {
    "ours": "bf16 weights, no padding, no checkpointing",
    "ours_small_card": "NF4 weights, no padding, checkpointing, 2048 tokens a forward",
    "trl": "TRL's QLoRA: NF4 weights (on a CPU bf16), padded batches, checkpointing",
}
NO_TIME = "no time left"
# Without which no row is begun: to build the model, and as many steps at what a slow row may do.
ROW_SECONDS = {"llama2-7b": 75, "tiny": 5}
# For Llama-2-7B's shape. 0.41 is the share of the peak in the best published figure for LoRA
# at this size; on one H200 (788 TFLOP/s measured, 26.8 GFLOP a token) 12,000 tokens/s.
GOALS = {
    "real_tokens_per_second": ("at least", 12000),
    "model_flops_utilisation": ("at least", 0.41),
    "ratio_vs_trl": ("at least", 3.0),
    "small_card_peak_gb": ("at most", 12.0),
}


# ------------------------------------------------------------------------------ the table


def bench_gpu(shape="llama2-7b", steps=6, say=print, keep=None, minutes=None):
    """Measure all rows; steps: optimiser steps a row, of which the first warms up.

    keep: path of a JSON file, written after every row; rows of this very set-up that an earlier
    call measured are taken from it. minutes: no row is begun that would not fit, and one that is
    under way when they are over is stopped; both say so, and a later call measures them.
    Returns the file's content: rows by name and what they come to; None where not measured.
    """
    if shape not in SHAPES:
        raise ValueError(f"shape must be one of {', '.join(SHAPES)}, not {shape!r}")
    if steps < 2:
        raise ValueError(f"steps must be at least 2, not {steps}: the first one warms up")
    end = math.inf if minutes is None else time.monotonic() + 60 * minutes
    facts = describe()
    set_up = {"shape": shape, "steps": steps, **{key: facts[key] for key in ("device", "versions")}}
    code = {key: facts[key] for key in ("commit", "dirty")}
    rows = measured_before(keep, set_up)
    for kind in ROWS:
        if kind in rows:
            say(f"{kind}: {rows[kind]['real_tokens_per_second']['median']:.0f} (measured before)")
            continue
        left = end - time.monotonic()
        if left < ROW_SECONDS[shape]:
            rows[kind] = {"skipped": NO_TIME}
        else:
            row = measure_row(kind, shape, steps, None if left == math.inf else left)
            rows[kind] = row if "skipped" in row else row | code
        found = _summary(set_up, rows)
        if keep is not None:
            write_json(keep, found)
        if skipped := rows[kind].get("skipped"):
            say(f"{kind}: skipped: {skipped}")
        else:
            say(f"{kind}: {rows[kind]['real_tokens_per_second']['median']:.0f} real tokens/s")
    return _summary(set_up, rows)


def measured_before(keep, set_up):
    """{row: what was measured} in a file of an earlier call with the same set-up."""
    found = (read_json(keep) if keep is not None else None) or {}
    if any(found.get(name) != value for name, value in set_up.items()):
        return {}
    return {name: row for name, row in found["rows"].items() if "skipped" not in row}


def _summary(set_up, rows):
    """The file's content: the rows, what they come to, and whether that reaches the goals."""
    rates = {
        kind: row.get("real_tokens_per_second", {}).get("median") for kind, row in rows.items()
    }
    both = rates.get("ours") and rates.get("trl")
    found = {
        "real_tokens_per_second": rates.get("ours"),
        "ratio_vs_trl": round(rates["ours"] / rates["trl"], 2) if both else None,
        "small_card_peak_gb": rows.get("ours_small_card", {}).get("peak_memory_gb"),
        "model_flops_utilisation": rows.get("ours", {}).get("model_flops_utilisation"),
    }
    goals = {}
    for name, (sense, goal) in GOALS.items():
        value, reached = found[name], None
        if value is not None and set_up["shape"] == "llama2-7b":
            reached = value >= goal if sense == "at least" else value <= goal
        goals[name] = {"goal": f"{sense} {goal}", "reached": reached}
    rows = {kind: rows[kind] for kind in ROWS if kind in rows}
    dirty = any(row.get("dirty", False) for row in rows.values())
    return set_up | {"dirty": dirty, "rows": rows, **found, "goals": goals}


def measure_row(kind, shape, steps, seconds=None):
    """One row, measured in a process of its own, or {"skipped": reason}; seconds: then stopped."""
    reason = _cannot_run(kind, shape)
    if reason:
        return {"skipped": reason}
    # One GPU: transformers would spread a batch over all that it sees.
    first = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    environment = dict(os.environ, CUDA_VISIBLE_DEVICES=first, TOKENIZERS_PARALLELISM="false")
    command = [sys.executable, "-m", "neft_utils.make.bench.gpu_row", kind, shape, str(steps)]
    try:
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=seconds
        )
    except subprocess.TimeoutExpired:
        return {"skipped": f"stopped: not done within {seconds:.1f} s"}
    if done.returncode:
        error = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        return {"skipped": f"failed: {error[:200]}"}
    return json.loads(done.stdout.strip().splitlines()[-1])


def _cannot_run(kind, shape):
    if not torch.cuda.is_available() and (shape != "tiny" or kind == "ours_small_card"):
        return "needs a CUDA GPU"
    needed = ["trl", "peft", "datasets", *(["bitsandbytes"] if in_four_bits(kind) else [])]
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    return f"not installed: pip install {' '.join(missing)}" if missing else None


def format_table(found):
    """The result of `bench_gpu` as lines of Markdown."""
    lines = [
        f"{found['shape']} on {found['device']}\n",
        *headed(
            *("row", "real tokens/s", "padded tokens/s", "utilisation", "peak GB"),
            *("noise, % of a step", "loss"),
        ),
    ]
    for kind, row in found["rows"].items():
        if "skipped" in row:
            lines.append(f"| {kind} | skipped: {row['skipped']} | | | | | |")
            continue
        peak, noise = row["peak_memory_gb"], row.get("noise_percent")
        lines.append(
            f"| {kind} | {with_range(row['real_tokens_per_second'])}"
            f" | {row['padded_tokens_per_second']['median']:.0f}"
            f" | {row['model_flops_utilisation']:.3f} | {'' if peak is None else f'{peak:.2f}'}"
            f" | {'' if noise is None else f'{noise:.3f}'} | {row['loss']:.3f} |"
        )
    lines += ["", *(f"{kind}: {text}" for kind, text in ROWS.items()), ""]
    for name, goal in found["goals"].items():
        verdict = {None: "not judged", True: "reached", False: "missed"}[goal["reached"]]
        lines.append(f"{name}: {found[name]} (goal: {goal['goal']}, {verdict})")
    return "\n".join(lines)
