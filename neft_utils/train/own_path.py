"""A model's own path, one document at a time, and whether a faster one computes the same.

What the fast path may serve is not a list of families: each kind of model is asked, once a
process, on two short documents of random tokens. Windows, chunks, sinks, caps, position biases
and states that run on from one document into the next all show there.
"""

import contextlib
import inspect
import itertools

import torch
import torch.nn.functional as F

from neft_utils.base.model_config import edges, position_limit
from neft_utils.base.strict import ConfigError, one_line
from neft_utils.train.attention import ATTENTION

TOLERANCE = 1e-3  # nats a token, in float32
# In half precision two right ways differ by rounding, a single token by a tenth of a nat: there
# the mean over STRETCH tokens counts.
HALF_TOLERANCE, STRETCH = 0.15, 32
FLOAT32_WEIGHTS = 1_000_000_000  # above, a copy in float32 costs more than it is worth
SHORT, LONG = 17, 33  # tokens of the two documents, if the model has no window
_KNOWN, _SAID = {}, set()  # what is asked -> its outcome; what was said


def inner_model(model):
    """The Hugging Face model inside PEFT's wrapper, or the model itself."""
    return model.get_base_model() if hasattr(model, "peft_config") else model


def probe(model, longest):
    """Two documents of random token ids: one beyond every window below `longest` tokens, one short.

    The same for a kind of model in every process; special tokens are left out.
    """
    config = inner_model(model).config
    limit = position_limit(config.to_dict()) or 10**9
    passed = [one for one in edges(config.to_dict()) if one < longest]
    sizes = min(max(passed, default=0) + LONG, limit), min(SHORT, limit)
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    ids = (getattr(config, name, None) for name in names)
    special = {i for one in ids for i in (one if isinstance(one, list) else [one])}
    rows = inner_model(model).get_input_embeddings().weight.shape[0]
    usable = torch.tensor([i for i in range(min(rows, 20_000)) if i not in special])
    generator = torch.Generator().manual_seed(0)
    return [usable[torch.randint(len(usable), (n,), generator=generator)] for n in sizes]


def own_logits(model, ids, positions):
    """Logits (positions, vocabulary) in float32 of one document, by the model as it comes.

    ids: (tokens,) on any device; positions: which rows of the logits.
    """
    inner = inner_model(model)
    device, taken = inner.get_input_embeddings().weight.device, inspect.signature(inner.forward)
    ids, positions = ids.to(device), positions.to(device)
    any_name = any(p.kind is p.VAR_KEYWORD for p in taken.parameters.values())
    inputs = {"input_ids": ids[None]}
    if any_name or "use_cache" in taken.parameters:
        inputs["use_cache"] = False
    if "logits_to_keep" in taken.parameters:
        return model(**inputs, logits_to_keep=positions).logits[0].float()
    return model(**inputs).logits[0, positions].float()


def own_nll(model, ids, positions):
    """NLL (positions,) in nats of the tokens at these positions of one document, never its first"""
    logits = own_logits(model, ids, positions - 1)
    return F.cross_entropy(logits, ids[positions].to(logits.device), reduction="none")


@contextlib.contextmanager
def own_attention(model):
    """The attention that the model came with, in here."""
    inner = inner_model(model)
    if inner.config._attn_implementation != ATTENTION:
        yield
        return
    inner.set_attn_implementation(inner.neft_attention)
    try:
        yield
    finally:
        inner.set_attn_implementation(ATTENTION)


# ----------------------------------------------------------------------------- the question


def agrees(model, longest, question, way):
    """How far a way of computing is from the model's own, as text; "" where they agree.

    longest: tokens of the longest document to come; question: a name for the way; way: a function
    of the model and `probe`'s documents that gives [(own, other)], what the model's own path makes
    of a document's tokens and what the way does, in nats. An error in the way is a disagreement.
    Asked once a process of a kind of model. Raises ConfigError where the model's own path cannot
    be computed or is none of a causal language model.
    """
    inner = inner_model(model)
    documents = probe(model, longest)
    weight = next(inner.parameters())
    kind = (type(inner), inner.config.to_json_string(), weight.dtype, weight.device.type)
    key = (*kind, question, len(documents[0]))
    if key not in _KNOWN:
        with _undisturbed(model):
            _check_own(model, documents[1])
            found = (_difference(model, documents, way, one) for one in _precisions(model))
            _KNOWN[key] = next((text for text in found if text), "")
    return _KNOWN[key]


def _difference(model, documents, way, precision):
    with precision as half:
        try:
            pairs = way(model, documents)
        except Exception as error:  # what a foreign forward may raise has no common kind
            if isinstance(error, MemoryError | torch.OutOfMemoryError):
                raise
            return f"it ends in {type(error).__name__}"
        worst = 0.0
        for own, other in pairs:
            apart = (own - other.to(own.device)).abs()
            if not torch.isfinite(apart).all():
                return "its losses are not numbers"
            apart = torch.stack([x.mean() for x in apart.split(STRETCH)]) if half else apart
            worst = max(worst, float(apart.max()))
    tolerance = HALF_TOLERANCE if half else TOLERANCE
    return f"a token by up to {worst:.2g} nats" if worst > tolerance else ""


def _check_own(model, ids):
    """Raise ConfigError unless a token's loss is a number that no later token changes."""
    name = inner_model(model).config.model_type
    positions = torch.arange(1, len(ids) // 2)
    fails = f"model.source: the model ({name}) cannot compute a loss ({{reason}}): correct its"
    fails += " config.json, or take a causal language model"
    with own_attention(model), _precisions(model)[0] as half, one_line(fails):
        whole, part = (own_nll(model, x, positions) for x in (ids, ids[: len(ids) // 2]))
    if not torch.isfinite(whole).all():
        raise ConfigError(f"model.source: the model ({name}) gives losses that are no numbers")
    if (whole - part).abs().mean() > (HALF_TOLERANCE if half else TOLERANCE):
        raise ConfigError(
            f"model.source: the model ({name}) predicts a token from those after it: take a causal"
            " language model"
        )


@contextlib.contextmanager
def _undisturbed(model):
    """Eval mode without gradients, in here; modes are put back one by one."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def _precisions(model):
    """Contexts in which to compare; each yields whether its arithmetic is of half precision.

    In float32 rounding hides nothing, but a GPU takes another kernel in half precision.
    """
    weights = list(model.parameters())
    plain = all(w.is_floating_point() for w in weights) and not getattr(
        inner_model(model), "is_quantized", False
    )
    count, cuda = sum(w.numel() for w in weights), any(w.is_cuda for w in weights)
    fits = plain and count <= FLOAT32_WEIGHTS
    if fits and cuda:
        fits = 4.5 * count < torch.cuda.mem_get_info()[0]
    half = not plain or any(w.dtype in (torch.float16, torch.bfloat16) for w in weights)
    contexts = [float32_weights(weights)] if fits else []
    return contexts + ([contextlib.nullcontext(half)] if cuda or not fits else [])


@contextlib.contextmanager
def float32_weights(weights):
    """The same weights in float32, in here; afterwards the very tensors of before."""
    before = [weight.data for weight in weights]
    try:
        for weight in weights:
            weight.data = weight.data.float()
        yield False
    finally:
        for weight, values in zip(weights, before, strict=True):
            weight.data = values


def once(say, model, question, line):
    """Say what was found of a kind of model, once a process. The line begins with its name."""
    config = inner_model(model).config
    if (key := (config.to_json_string(), question)) not in _SAID:
        _SAID.add(key)
        say(f"{config.model_type}: {line}")


def spans(offsets):
    """[(begin, end)] of the documents of a padding-free row."""
    return list(itertools.pairwise(offsets.tolist()))
