"""Base and fine-tuned models in memory, and their tokenizers."""

import copy

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from neft_utils.base.model_config import check_lengths
from neft_utils.base.strict import ConfigError, one_line
from neft_utils.train.encoding import prompt_ids
from neft_utils.train.fast import make_fast
from neft_utils.train.folders import device_map, load_whole, model_folder, nf4_config


def load_tokenizer(model):
    """The tokenizer; one without pad token pads with its end-of-sequence token.

    Raises ConfigError where there is none, or none that can end an answer.
    """
    folder = model_folder(model, "bf16")
    tokenizer = open_tokenizer(
        folder,
        f"model.source: {model.source} has no tokenizer that can be read ({{reason}}): save it"
        " beside the model",
        f"model.source: the tokenizer of {model.source} has no eos_token, which ends an answer:"
        " set it and save the tokenizer again",
    )
    asked = "Name three primary colours."
    if asked not in tokenizer.decode(prompt_ids(tokenizer, asked)):
        raise ConfigError(
            f"model.source: the chat template of {model.source} leaves out what a user asks, or"
            " its tokenizer changes it: correct chat_template and save the tokenizer again"
        )
    return tokenizer


def open_tokenizer(folder, unreadable, endless):
    """The tokenizer in a folder; one without pad token pads with its end-of-sequence token.

    Raises ConfigError where there is none, with the text `unreadable` and its "{reason}", and where
    it has no end of sequence, with the text `endless`.
    """
    with one_line(unreadable):
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    if tokenizer.eos_token is None:
        raise ConfigError(endless)
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
    """The base model in dtype (or 4-bit for "nf4"), in eval mode, fast where that is right.

    Raises ConfigError for a model that cannot be loaded, or whose weights are not all there.
    """
    base_weights = base_weights or model.base_weights
    options = {"dtype": dtype, **device_map()}
    if base_weights == "nf4":
        options["quantization_config"] = nf4_config()
    return make_fast(load_whole(model_folder(model, base_weights), **options)).eval()


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
    make_fast(model, profile.data.max_tokens)  # beyond every window that its rows can reach
    for name, weight in model.named_parameters():
        if weight.is_floating_point() and not torch.isfinite(weight).all():
            raise ConfigError(f"{where} has weights that are not finite ({name}): get it again")
    check_lengths(profile, model.config.to_dict())
    if profile.train.method == "lora":
        _check_adapters(model)
    return model, tokenizer


def _check_adapters(model):
    """Raise ConfigError where PEFT has no adapter for a model's layers, as some of Mamba's."""
    with torch.device("meta"):  # its shapes alone
        shape = AutoModelForCausalLM.from_config(copy.deepcopy(model.config))
    try:
        get_peft_model(shape, LoraConfig(r=1, target_modules="all-linear", task_type="CAUSAL_LM"))
    except ValueError as error:
        reason = " ".join(str(error).split())[:160]
        raise ConfigError(
            f"model.source: PEFT has no adapters for this model, a {model.config.model_type}"
            f" ({reason}): use train.method full with base_weights bf16, or another model"
        ) from None


@torch.no_grad()
def embedding_norm(model):
    """Mean length of the rows of the input embedding, the yardstick for the noise.

    Measured behind the embedding module, where the noise is added: some modules scale (Gemma's).
    """
    return float(embedding_rows(model).norm(dim=1).mean())


@torch.no_grad()
def embedding_rows(model):
    """What the embedding module gives for every token: (vocabulary, hidden size), float32."""
    module = model.get_input_embeddings()
    ids = torch.arange(len(module.weight), device=module.weight.device)
    return torch.cat([module(some[None])[0].float() for some in ids.split(4096)])
