"""What a model does off its training point: perturbed weights, mistyped prompts, when to stop.

NEFTune is said to make models less sensitive. Three measures of that, all teacher-forced (the
response is given, only its probability is looked at), in eval mode and without noise:

- the NLL of the responses once the weights, or the letters of the prompts, are perturbed;
- the probability of the end-of-turn token at the end of the response and before it;
- how often noise of a given α makes a token's embedding look like another token's.

Every draw depends on the seed and on the name of a parameter or an example, never on the run or
on global random state. All arms are thus perturbed alike and their differences are paired.
"""

import contextlib
import hashlib
import math
import random
import time
from string import ascii_lowercase

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from transformers.pytorch_utils import Conv1D

from neft_utils.noise import noise_scale
from neft_utils.train.encoding import encode, end_of_turn, flat_batch, token_batches
from neft_utils.train.losses import response_nll, response_token_nll

PERTURBED_COLUMNS = ["kind", "level", "example_id", "nll"]
STOPPING_COLUMNS = ["example_id", "n_tokens", "p_end", *(f"p_quarter_{k}" for k in (1, 2, 3, 4))]
FLIP_ROWS = 256  # noised tokens compared with the whole table at once


def perturbed_losses(
    model,
    tokenizer,
    rows,
    batch_tokens,
    weight_levels=(0.05, 0.1),
    typo_rates=(0.02, 0.1),
    seed=0,
    say=print,
):
    """Response NLL of every row as it is, with perturbed weights and with mistyped prompts.

    rows: examples with id, prompt and response. weight_levels: relative sizes, see
    `perturbed_weights`; typo_rates: shares of letters, see `typos`; all above 0 and at most 1. The
    defaults were set once on the untrained SmolLM2-135M-Instruct, where they add 0.04 to 0.5 nats.
    With perturbed weights an example's NLL is the mean over W + step and W - step: the slope along
    the step, which has nothing to do with flatness and would drown it, cancels.

    Returns a DataFrame of PERTURBED_COLUMNS, one row per condition and example: kind is "none"
    (level 0), "weights" or "prompt", nll in nats per response token. Raises ValueError for no
    rows, a repeated id, levels out of range, and weights that cannot be perturbed.
    """
    _check_rows(rows)
    for name, values in (("weight_levels", weight_levels), ("typo_rates", typo_rates)):
        if bad := [value for value in values if not 0 < value <= 1]:
            raise ValueError(f"{name} must be above 0 and at most 1, not {bad[0]!r}")
    if weight_levels:
        linear_weights(model)  # fails before anything is computed
    conditions = [("none", 0.0), *(("weights", level) for level in weight_levels)]
    conditions += [("prompt", rate) for rate in typo_rates]
    ids, frames = [row["id"] for row in rows], []
    for kind, level in conditions:
        started = time.perf_counter()
        examples = [_mistyped(row, level, seed) for row in rows] if kind == "prompt" else rows
        encoded = [encode(tokenizer, row) for row in examples]
        signs, nll = (1, -1) if kind == "weights" else (0,), 0
        for sign in signs:
            with perturbed_weights(model, sign * level, seed):
                nll = nll + np.array(response_nll(model, encoded, batch_tokens)) / len(signs)
        frame = {"kind": kind, "level": float(level), "example_id": ids, "nll": nll}
        frames.append(pd.DataFrame(frame)[PERTURBED_COLUMNS])
        mean = frames[-1].nll.mean()
        rise, seconds = mean - frames[0].nll.mean(), time.perf_counter() - started
        say(f"{kind} {level:g}: mean NLL {mean:.4f} ({rise:+.4f}), {seconds:.1f} s")
    return pd.concat(frames, ignore_index=True)


def _check_rows(rows):
    ids = [row["id"] for row in rows]
    if not ids:
        raise ValueError("there are no rows to score: pass at least one example")
    if len(set(ids)) < len(ids):
        twice = next(one for one in ids if ids.count(one) > 1)
        raise ValueError(f"example_id {twice} is there twice: pass every example once")


# ------------------------------------------------------------------------------- weights


def linear_weights(model):
    """{name: weight (out, in)} of the linear layers of a causal LM's body, without its head.

    Names are the base model's own, with or without LoRA around it; LoRA's matrices are not
    among them. Raises ValueError where there are none, or where they are quantised.
    """
    head = set(model.get_output_embeddings().modules())
    weights = {}
    for name, module in model.named_modules():
        parts = name.removeprefix("base_model.model.").split(".")
        if (
            isinstance(module, torch.nn.Linear | Conv1D)
            and module not in head
            and not any(part.startswith("lora_") for part in parts)
        ):
            parts = [part for part in parts if part != "base_layer"]
            transposed = isinstance(module, Conv1D)  # of GPT-2 and its kin: rows are outputs here
            weight = module.weight.detach().T if transposed else module.weight
            weights[".".join([*parts, "weight"])] = weight
    if not weights:
        raise ValueError("the model has no linear layer besides its head to perturb")
    if bad := [name for name, weight in weights.items() if not weight.is_floating_point()]:
        raise ValueError(
            f"{bad[0]} is quantised and cannot be perturbed: load the model with base_weights"
            " nf4_dequantized, which computes the same"
        )
    return weights


@contextlib.contextmanager
def perturbed_weights(model, level, seed=0):
    """Inside, every linear weight W of the body is W + level · rms(row of W) · N(0, 1).

    The perturbation is relative to each row's size, as in filter-normalised loss landscapes
    (Li et al. 2018, arXiv:1712.09913). A direction belongs to (seed, name of the weight): levels
    scale it, negative ones turn it round. On leaving, also by an error, the weights are what they
    were, bit for bit; that takes one copy of them, in main memory.

    Under LoRA the frozen base is perturbed and the adapter left alone. All arms therefore get the
    very same perturbed base, and flatness is measured in the base's coordinates: how much the
    loss that fine-tuning reached depends on exact base weights. In bf16 W + perturbation is
    rounded to 8 significant bits, in all arms alike.
    """
    if not math.isfinite(level):
        raise ValueError(f"level must be finite, not {level!r}")
    kept = []
    try:
        if level:
            for name, weight in linear_weights(model).items():
                kept.append((weight, weight.detach().to("cpu", copy=True)))
                with torch.no_grad():
                    weight.copy_(_perturbed(weight, level, f"{seed}/{name}"))
        yield
    finally:
        with torch.no_grad():
            for weight, original in kept:
                weight.copy_(original)


def _perturbed(weight, level, key):
    """float32 W + level · rms(row) · N(0, 1), drawn on the CPU so that devices agree."""
    digest = hashlib.sha256(key.encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big"))
    step = torch.randn(weight.shape, generator=generator).to(weight.device)
    exact = weight.detach().float()
    step *= level * exact.square().mean(1, keepdim=True).sqrt()
    return step.add_(exact)


# ------------------------------------------------------------------------------- prompts


def typos(text, rate, seed):
    """The text with a share `rate` (0 to 1) of its letters mistyped; a function of its arguments.

    A letter is swapped with the next one, deleted, or replaced by another of a-z in its case, each
    a third of the time; where there is nothing to swap with it is replaced. Digits, punctuation
    and spaces stay, in order. A higher rate makes the typos of a lower one and more, up to
    letters that a swap has already moved. A text of which no letter or sign would be left is
    returned unchanged. seed: integer or string. Raises ValueError for another rate.
    """
    if not 0 <= rate <= 1:
        raise ValueError(f"rate must be between 0 and 1, not {rate!r}")
    draw = random.Random(str(seed))
    # Drawn for every character, mistyped or not, so that rates share their draws.
    plan = [
        (draw.random(), draw.choice(["swap", "delete", "replace"]), draw.randint(1, 25))
        for _ in text
    ]
    out, moved = [], False
    for i, (letter, (chance, edit, shift)) in enumerate(zip(text, plan, strict=True)):
        following = text[i + 1 : i + 2]
        if moved:  # already written, before the letter that it was swapped with
            moved = False
        elif not letter.isalpha() or chance >= rate:
            out.append(letter)
        elif edit == "swap" and following.isalpha() and following != letter:
            out += [following, letter]
            moved = True
        elif edit != "delete":
            other = ascii_lowercase[(ascii_lowercase.find(letter.lower()) + shift) % 26]
            out.append(other.upper() if letter.isupper() else other)
    mistyped = "".join(out)
    return mistyped if mistyped.strip() else text


def _mistyped(row, rate, seed):
    """The example with typos in the user's prompt; the template and the response are as before."""
    return {**row, "prompt": typos(row["prompt"], rate, f"{seed}/{row['id']}")}


# ------------------------------------------------------------------------------- stopping


@torch.no_grad()
def stopping(model, tokenizer, rows, batch_tokens):
    """Probability of the end-of-turn token along each response, given the response so far.

    Returns a DataFrame of STOPPING_COLUMNS, one row per example: n_tokens of the response with
    its end; p_end, the probability where the response does end; p_quarter_1 to 4, the mean over
    the positions of each quarter of the response before its end (NaN for a quarter without
    tokens; earlier quarters are the longer ones). No repetition penalty. The head runs on pieces
    of the response positions (`fast.token_nll`). Raises ValueError for no rows or a repeated id.
    """
    _check_rows(rows)
    model.eval()
    device = next(model.parameters()).device
    encoded, out = [encode(tokenizer, row) for row in rows], []
    for piece in token_batches(encoded, range(len(rows)), batch_tokens):
        some = [encoded[i] for i in piece]
        batch = flat_batch(some, device)
        # The NLL of the end of turn as the target everywhere, where each response token stands.
        labels = batch["labels"]
        batch["labels"] = labels.masked_fill(labels != -100, end_of_turn(tokenizer))
        p = response_token_nll(model, batch)[0].neg().exp().cpu()
        for one in p.split([sum(e["completion_mask"]) for e in some]):
            quarters = [float(q.mean()) for q in one[:-1].tensor_split(4)]
            out.append([rows[len(out)]["id"], len(one), float(one[-1]), *quarters])
    return pd.DataFrame(out, columns=STOPPING_COLUMNS)


# ------------------------------------------------------------------------------- embeddings


@torch.no_grad()
def token_flips(weight, length, noise_alpha, n_tokens=1024, seed=0, distance="cosine"):
    """Share of tokens whose nearest clean embedding is another token's once noise is added.

    weight: (vocabulary, hidden_size) embedding table; the noise is uniform with the bound
    α/√(L·d) for sequences of `length` tokens (paper, appendix on token flips). `n_tokens` tokens
    are drawn from the vocabulary without replacement, all of it if it is smaller. distance:
    "cosine" or "euclidean". A token flips when another row is strictly nearer than its own. Equal
    rows do not count, but rows that training has hardly parted do: SmolLM2's unused special tokens
    flip at any α. The noise of a seed is scaled by α and the points nearest to a row form a convex
    set, so the share never falls as α grows. Raises ValueError for bad values.
    """
    if distance not in ("cosine", "euclidean"):
        raise ValueError(f"distance must be 'cosine' or 'euclidean', not {distance!r}")
    if n_tokens < 1:
        raise ValueError(f"n_tokens must be at least 1, not {n_tokens!r}")
    bound = noise_scale([length], weight.shape[1], noise_alpha).item()
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(len(weight), generator=generator)[:n_tokens]
    noise = torch.rand(len(chosen), weight.shape[1], generator=generator) * 2 - 1
    table = weight.detach().float()
    noised = table[chosen] + bound * noise.to(table.device)
    # Nearest is the largest x · w - shift: unit rows for the angle, |w|²/2 for the distance.
    if distance == "cosine":
        table, shift = F.normalize(table), table.new_zeros(len(table))
    else:
        shift = table.square().sum(1) / 2
    flips = 0
    for own, x in zip(chosen.split(FLIP_ROWS), noised.split(FLIP_ROWS), strict=True):
        nearest = (x @ table.T - shift).argmax(1)
        # float32 cannot tell rows that almost agree: the two candidates are compared in float64.
        own, other = (_far(x, weight[rows.to(weight.device)], distance) for rows in (own, nearest))
        flips += int((other < own - 1e-12).sum())
    return flips / len(chosen)


def _far(x, rows, distance):
    """Distance of each x to its row, both (tokens, hidden_size), in float64."""
    x, rows = x.double(), rows.double()
    if distance == "cosine":
        return 1 - F.cosine_similarity(x, rows)
    return (x - rows).norm(dim=1)
