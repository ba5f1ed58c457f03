"""What others measured of NEFTune: their numbers as printed, and the table of docs/others.md.

Only sources that were opened are here, each under an address that leads to the numbers.
"""

import statistics
from dataclasses import dataclass

_SWIFT = (
    "https://github.com/modelscope/ms-swift/blob/46922151e06cdfc110882e182757674f12352f2c"
    "/docs/source_en/LLM/Benchmark.md#tuners"
)
_QQCHAT = (
    "https://github.com/despaoy/qqchat-enhanced/blob/446765a41d039ef4623fe10524d09fb0f43b870c"
    "/docs/research/reviews/KISAKI_SEED42_BLIND_REVIEW_RESULT.md"
)
# Table 1 of arXiv 2405.14394: without noise and with, for the training sets Alpagasus Alpaca 5k,
# Dolly 3k, Dolly 9k, Less Tydiqa, Less MMLU Chat, Less BBH ICL and LIMA. AlpacaEval win rates in
# per cent, MT-Bench out of 10, the mean of 18 tasks in per cent.
SHI = {
    "AlpacaEval 1": (
        (16.29, 13.42, 21.54, 5.12, 4.42, 36.20, 33.06),
        (21.37, 14.04, 31.61, 8.35, 6.22, 39.81, 30.51),
    ),
    "AlpacaEval 2": (
        (2.46, 2.00, 2.28, 1.88, 1.20, 2.36, 2.58),
        (2.37, 2.03, 2.84, 2.58, 1.06, 2.87, 2.43),
    ),
    "MT-Bench": (
        (3.62, 4.23, 4.33, 4.08, 3.86, 4.78, 4.77),
        (3.50, 4.42, 4.21, 4.19, 4.06, 5.05, 4.79),
    ),
    "18 tasks": (
        (45.29, 46.58, 45.54, 48.21, 47.18, 48.28, 48.79),
        (45.62, 47.07, 45.99, 47.47, 47.74, 49.03, 48.70),
    ),
}
SWIFT = {  # rows lora and lora+neftune
    "evaluation loss": (1.01, 1.02),
    "GSM8K": (0.462, 0.456),
    "ARC": (0.676, 0.671),
    "C-Eval": (0.304, 0.401),
}
QQCHAT = {"won": 32, "lost": 26, "tied": 62, "p": 0.512}


@dataclass(frozen=True)
class Study:
    name: str
    address: str
    setup: str
    seeds: str
    effect: str  # of the noise


def changes(measure):
    """With noise minus without, of each training set of SHI."""
    return [noisy - plain for plain, noisy in zip(*SHI[measure], strict=True)]


def studies():
    """The rows of the table, as `Study`s."""
    means = {name: statistics.mean(changes(name)) for name in SHI}
    first = ", ".join(f"{x:+.1f}" for x in changes("AlpacaEval 1"))
    first += f" points, mean {means.pop('AlpacaEval 1'):+.1f}"
    others = ", ".join(f"{name} {x:+.2f}" for name, x in means.items())
    swift = ", ".join(f"{name} {a:g} to {b:g}" for name, (a, b) in SWIFT.items())
    judged = f"{QQCHAT['won']} won, {QQCHAT['lost']} lost, {QQCHAT['tied']} tied"
    return [
        Study(
            "Shi et al., NeurIPS 2024, Table 1",
            "https://arxiv.org/abs/2405.14394",
            "LLaMA-2-7B, full fine-tuning, α = 5, seven sets of 1,030 to 13,533 rows; one row a"
            " GPU, so that the padded length is the true one",
            "not stated",
            f"AlpacaEval 1: {first}; means of the others: {others}",
        ),
        Study(
            "ms-swift, benchmark of tuners",
            _SWIFT,
            "Qwen-7B-chat, LoRA of rank 8, 87,543 rows, α = 15",
            "1",
            swift,
        ),
        Study(
            "qqchat-enhanced, blind review of July 2026",
            _QQCHAT,
            "Qwen3-8B, LoRA of rank 32, 826 rows of one role's dialogue, α = 5; pairs judged by a"
            " model and confirmed by the project's lead",
            "1",
            f"of {sum(QQCHAT[k] for k in ('won', 'lost', 'tied'))} pairs {judged},"
            f" sign test p = {QQCHAT['p']:g}",
        ),
        Study(
            "Christophe et al., EMNLP Findings 2024",
            "https://arxiv.org/abs/2409.14988",
            "Mistral-7B and Mixtral-8x7B, clinical questions; only the abstract was read",
            "not known",
            "“additional gains on our benchmark”",
        ),
    ]


def others_table():
    """The table as Markdown."""
    lines = ["| source | set-up | seeds | effect of the noise |", "|---|---|---|---|"]
    for one in studies():
        cells = (f"[{one.name}]({one.address})", one.setup, one.seeds, one.effect)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"
