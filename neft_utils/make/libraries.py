"""Which α arrives in which library: each one's rule as its source states it, on one example batch.

A rule is a denominator: the bound of the noise is α over its root. The paper's is L·d, a sequence's
own number of tokens times the embedding size, so the α that arrives at a sequence is
α·√(L·d / denominator). A test recomputes every cell, and runs transformers' and TRL's own code.
"""

import math
from dataclasses import dataclass

NOISE_ALPHA, HIDDEN_SIZE = 5.0, 4096
LENGTHS = (64, 128, 256, 512)  # tokens of the example's rows, prompt and answer
PACKED = 2048  # tokens of a packed row
FP16_MAX = 65504
# How a trainer hands the rows to the model: (rows of the tensor, its width).
LAYOUTS = {
    "padded": (len(LENGTHS), max(LENGTHS)),
    "padding-free": (1, sum(LENGTHS)),
    "packed": (1, PACKED),
}
RULES = {  # denominator by (length of the sequence, rows, width, d)
    "sequence": lambda length, rows, width, d: length * d,
    "width": lambda length, rows, width, d: width * d,
    "cells": lambda length, rows, width, d: rows * width,  # d is left out
    "width in fp16": lambda length, rows, width, d: width * d if width * d < FP16_MAX else math.inf,
}


@dataclass(frozen=True)
class Library:
    name: str
    rule: str  # of RULES
    layouts: tuple[str, ...]  # of LAYOUTS, those that it has
    version: str  # and, where it is known, the date of the commit that was read
    address: str  # permalink to the line that makes the noise, or hands α on
    note: str = ""


def _blob(repository, commit, path):
    return f"https://github.com/{repository}/blob/{commit}/{path}"


_ALL = tuple(LAYOUTS)
_AUTHORS = ("neelsjain/NEFTune", "09d4909b57b9f4e50506722e2abf3db7a5650082")
_HF = ("huggingface/transformers", "0d7e95d96b4e187c651e2b2406ed98ed40d74963")
_TRL = ("huggingface/trl", "f2cd57710ae345ea6428ae95363267fcf38a3dc8")
_AXOLOTL = ("axolotl-ai-cloud/axolotl", "067b021c8b87a9e5e380b9173c704cf7340e30f5")
_FACTORY = ("hiyouga/LLaMA-Factory", "ff6d4d12eeb035d6ce06805a5733dd7b29f2ac30")
_SWIFT = ("modelscope/ms-swift", "3602360a562313afbf2ef6065fdf61f271a2c5b9")
_UNSLOTH = ("unslothai/unsloth", "015bdef0d94a241bcd94eec7a405b1700632180d")
_LUDWIG = ("ludwig-ai/ludwig", "5d19f3e632124e2f92266faca773047aeeeb0da4")
_H2O = ("h2oai/h2o-llmstudio", "a4971c11ed2c93e531607670df7ae9cb673936b4")
_NEMO = ("NVIDIA-NeMo/Automodel", "36044ad3d139363fb6c73c24af2e7c6b65ec52f6")
_INSTRUCTLAB = ("instructlab/training", "fa5b53b51166df1faded9fe5d30b5b07e5a889c8")
_PADDLE = ("PaddlePaddle/PaddleNLP", "005f2ad3ce1e452598710d9289bf6d3f7d22e883")

LIBRARIES = (
    Library(
        "the authors' training code",
        "sequence",
        ("padded",),
        "09d4909, 2024-05-17",
        _blob(*_AUTHORS, "experiment_code/train.py#L149-L157"),
        "LLaMA under FSDP alone; elsewhere no noise at all",
    ),
    Library(
        "the function in the authors' README",
        "width",
        ("padded",),
        "09d4909, 2024-05-17",
        _blob(*_AUTHORS, "README.md?plain=1#L31-L34"),
        "not the rule of their training code",
    ),
    Library(
        "transformers, `Trainer`",
        "width",
        ("padded", "padding-free"),
        "5.23.0, run here",
        _blob(*_HF, "src/transformers/integrations/neftune.py#L47-L51"),
    ),
    Library(
        "TRL, `SFTTrainer`",
        "width",
        _ALL,
        "1.16.0, run here; f2cd577, 2026-07-24",
        _blob(*_TRL, "trl/trainer/sft_trainer.py#L1141-L1143"),
        "by transformers; `packing=True` flattens the whole micro-batch",
    ),
    Library(
        "axolotl",
        "width",
        _ALL,
        "0.18.0, 2026-07-24",
        _blob(*_AXOLOTL, "src/axolotl/core/builders/causal.py#L346-L349"),
        "by transformers; `batch_flattening` is padding-free, a row of `sample_packing` has"
        " micro_batch_size · sequence_len tokens (2,048 in the example)",
    ),
    Library(
        "LLaMA-Factory",
        "width",
        ("padded", "packed"),
        "0.9.5, 2026-08-18",
        _blob(*_FACTORY, "README.md?plain=1#L254"),
        "by transformers; the slider of its web page ends at 10",
    ),
    Library(
        "ms-swift",
        "width",
        _ALL,
        "4.4.3, 2026-08-22",
        _blob(*_SWIFT, "docs/source_en/Instruction/Command-line-parameters.md?plain=1#L309"),
        "by transformers; its own tuner noises position embeddings, too",
    ),
    Library(
        "Unsloth",
        "width",
        _ALL,
        "2026.8.19, 2026-08-22",
        _blob(*_UNSLOTH, "unsloth/tokenizer_utils.py#L1571-L1575"),
        "padding-free unless told otherwise, padded for images and some models",
    ),
    Library(
        "ludwig",
        "width",
        ("padded",),
        "0.17.8, 2026-07-26",
        _blob(*_LUDWIG, "ludwig/modules/training_hooks.py#L74-L78"),
        "α must be a whole number",
    ),
    Library(
        "H2O LLM Studio",
        "width",
        ("padded",),
        "1.14.9, 2026-03-09",
        _blob(*_H2O, "llm_studio/src/utils/modeling_utils.py#L953-L957"),
    ),
    Library(
        "NeMo AutoModel, bf16",
        "width",
        ("padded",),
        "0.5.0, 2026-08-22",
        _blob(*_NEMO, "nemo_automodel/components/training/neftune.py#L57-L61"),
    ),
    Library(
        "NeMo AutoModel, fp16",
        "width in fp16",
        ("padded",),
        "0.5.0, 2026-08-22",
        _blob(*_NEMO, "nemo_automodel/components/training/neftune.py#L57-L61"),
        "width times d overflows: no noise",
    ),
    Library(
        "InstructLab training",
        "cells",
        ("padding-free",),
        "0.16.1, 2026-04-30",
        _blob(*_INSTRUCTLAB, "src/instructlab/training/utils.py#L150-L154"),
        "d is left out",
    ),
    Library(
        "PaddleNLP",
        "cells",
        ("padded", "packed"),
        "005f2ad, date not known",
        _blob(*_PADDLE, "llm/run_finetune.py"),
        "d is left out",
    ),
    Library(
        "**this repository**",
        "sequence",
        _ALL,
        "",
        "neft_utils/noise.py",
        "padding stays clean",
    ),
)


def arrives(rule, layout, lengths=LENGTHS, hidden_size=HIDDEN_SIZE, noise_alpha=NOISE_ALPHA):
    """The α that arrives at each sequence, a list: rule of RULES, layout of LAYOUTS."""
    rows, width = LAYOUTS[layout]
    shares = [n * hidden_size / RULES[rule](n, rows, width, hidden_size) for n in lengths]
    return [noise_alpha * math.sqrt(share) for share in shares]


def library_table():
    """The README's table as Markdown: a row a library, a column a layout."""
    heads = ["library", *LAYOUTS, "version, date", "note"]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for one in LIBRARIES:
        cells = [_range(one, layout) for layout in LAYOUTS]
        row = [f"[{one.name}]({one.address})", *cells, one.version, one.note]
        lines.append(f"| {' | '.join(row)} |")
    return "\n".join(lines) + "\n"


def _range(library, layout):
    """α at the shortest and at the longest row; a dash where the library has no such layout."""
    if layout not in library.layouts:
        return "–"
    found = arrives(library.rule, layout)
    first, last = (f"{x:.0f}" if x >= 20 else f"{x:.1f}" for x in (found[0], found[-1]))
    return first if first == last else f"{first} to {last}"
