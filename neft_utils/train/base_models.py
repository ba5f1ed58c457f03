"""Base and fine-tuned models in memory, and their tokenizers."""

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer

from neft_utils.base.strict import ConfigError
from neft_utils.train.fast import make_fast
from neft_utils.train.folders import device_map, model_folder, nf4_config


def load_tokenizer(model):
    """The tokenizer; one without pad token pads with its end-of-sequence token.

    Raises ConfigError where there is none, or none that can end an answer.
    """
    folder = model_folder(model, "bf16")
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # a dozen kinds, from a missing file to its parser
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
        raise ConfigError(
            f"model.source: {model.source} has no tokenizer that can be read ({reason}): save it"
            " beside the model"
        ) from None
    if tokenizer.eos_token is None:
        raise ConfigError(
            f"model.source: the tokenizer of {model.source} has no eos_token, which ends an answer:"
            " set it and save the tokenizer again"
        )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def require_device(profile):
    """Raise ConfigError for a GPU profile where torch sees no GPU: it would take days on a CPU."""
    if profile.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            f"profile {profile.name} needs a GPU and torch sees none: use PROFILE=cpu, or a build"
            " of torch with CUDA"
        )


def load_base(model, base_weights=None, dtype=torch.bfloat16):
    """The base model in dtype (or 4-bit for "nf4"), in eval mode, with per-document attention."""
    base_weights = base_weights or model.base_weights
    options = {"dtype": dtype, **device_map()}
    if base_weights == "nf4":
        options["quantization_config"] = nf4_config()
    folder = model_folder(model, base_weights)
    try:
        loaded = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True, **options)
    except (OSError, ValueError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:160]
        raise ConfigError(
            f"model.source: {model.source} cannot be loaded ({reason}): save or download it again"
        ) from None
    return make_fast(loaded).eval()


def check_model(profile):
    """(model, tokenizer) of a profile, held against each other and against its sizes.

    Raises ConfigError for a vocabulary that is not the model's, for weights that are not finite
    and for rows or answers that are longer than the model reads.
    """
    model, tokenizer = load_base(profile.model), load_tokenizer(profile.model)
    where, rows = f"model.source: {profile.model.source}", model.get_input_embeddings().weight
    if len(tokenizer) > len(rows):
        raise ConfigError(
            f"{where} knows {len(rows)} tokens and its tokenizer {len(tokenizer)}: take the"
            " tokenizer that belongs to the model"
        )
    for name, weight in model.named_parameters():
        if weight.is_floating_point() and not torch.isfinite(weight).all():
            raise ConfigError(f"{where} has weights that are not finite ({name}): get it again")
    limit = getattr(model.config, "max_position_embeddings", None)
    longest = profile.data.max_tokens + profile.evaluate.max_new_tokens
    if limit is not None and longest > limit:
        raise ConfigError(
            f"data.max_tokens {profile.data.max_tokens} and evaluate.max_new_tokens"
            f" {profile.evaluate.max_new_tokens} together exceed the {limit} tokens that"
            f" {profile.model.source} reads: lower one of them"
        )
    return model, tokenizer


def embedding_norm(model):
    """Mean length of the rows of the input embedding, the yardstick for the noise."""
    weight = model.get_input_embeddings().weight
    return float(weight.detach().float().norm(dim=1).mean())
