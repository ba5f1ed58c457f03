"""Base models as ordinary Hugging Face folders: converted or downloaded once, checked by hash."""

import contextlib
import functools
import io
import json
import os
import re
import shutil
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from neft_utils.base import hub
from neft_utils.base.contents import content_of
from neft_utils.base.files import ROOT, sha256_file, write_json
from neft_utils.base.gguf import gguf_file, version_of
from neft_utils.base.paths import OWN_MODELS, find
from neft_utils.base.strict import ConfigError, one_line

SUMS = "sha256.json"  # in a folder of our cache: {file: sha256}
MODELS = ROOT / "data" / "models"


# ------------------------------------------------------------------------- base weights


def model_folder(model, base_weights=None):
    """Folder of the model's safetensors and tokenizer, made on first use.

    model: profiles.Model. base_weights "nf4_dequantized" are the bf16 weights after one trip
    through NF4 with double quantisation: what QLoRA's forward computes with, bit for bit,
    without dequantising again at every step. Made once and shared by all runs.
    """
    if model.source in OWN_MODELS:
        nano = model.source == "nano"
        plain = cache = MODELS / ("nano" if nano else f"{model.source}-{version_of(model.source)}")
        if not (plain / SUMS).exists():
            _publish(plain, _build_nano if nano else functools.partial(_convert, model.source))
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
    folder, known = find(model.source), model.revision
    if folder is None or not folder.is_dir():
        folder = hub.snapshot(model.source, model.revision, "model.source")
    else:
        known = content_of(folder)  # which may change
    if not (folder / "config.json").exists():
        raise ConfigError(f"model.source: {folder} holds no model (no config.json)")
    check_files(folder, model.base_weights)
    return folder, MODELS / f"{model.source.strip('/').replace('/', '--')}-{known[:12]}"


def check_files(folder, base_weights, key="model.source"):
    """Raise ConfigError unless transformers will read safetensors of this folder, and only those.

    Its index, its config.json and an adapter's file may each name other files, which torch would
    unpickle. key: the profile's key that named the folder, for messages.
    """
    if not list(folder.glob("*.safetensors")):
        raise ConfigError(f"{key}: {folder} has no *.safetensors: save it in that format")
    if (folder / "adapter_config.json").exists():
        raise ConfigError(
            f"{key}: {folder} holds an adapter (adapter_config.json): merge it into its"
            " base and save that, or move the file away"
        )
    config = _json_of(folder / "config.json", key)
    named = [("config.json", config[key]) for key in ("transformers_weights",) if config.get(key)]
    for index in sorted(folder.glob("*.index.json")):
        weights = _json_of(index, key).get("weight_map")
        if not isinstance(weights, dict):
            raise ConfigError(f"{key}: {index} has no weight_map: get the model again")
        named += [(index.name, name) for name in weights.values()]
    for place, name in dict.fromkeys((place, str(name)) for place, name in named):
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise ConfigError(
                f"{key}: {folder / place} names {name[:80]!r}: only *.safetensors beside it"
                " are read; save the model in that format"
            )
        if not (folder / name).exists():
            raise ConfigError(f"{key}: {folder} lacks {name}, which {place} names")
    stored = config.get("quantization_config")
    if stored and not (base_weights == "nf4" and "bitsandbytes" in str(stored)):
        kind = stored.get("quant_method") if isinstance(stored, dict) else stored
        raise ConfigError(
            f"{key}: {folder} is stored quantised ({kind}): take the model in bf16, which is"
            " rounded here (base_weights)"
        )


def _json_of(path, key):
    try:
        values = json.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{key}: {path} is not JSON ({error}): get it again") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{key}: {path} holds no JSON object: get it again")
    return values


def load_whole(folder, **options):
    """A causal LM from a folder, as AutoModelForCausalLM loads it, with every weight from there.

    Raises ConfigError of one line for what cannot be loaded, and for weights that are missing
    (transformers would draw them at random) or that the configuration has no place for.
    """
    with one_line(  # a foreign configuration may fail anywhere
        f"model.source: {folder} cannot be loaded ({{reason}}): correct its config.json, or save"
        " or download it again"
    ):
        model, info = AutoModelForCausalLM.from_pretrained(
            folder, local_files_only=True, use_safetensors=True, output_loading_info=True, **options
        )
    for names, problem in (
        (info["missing_keys"], "lack weights of the model"),
        (_unplaced(model, info["unexpected_keys"]), "hold more than its config.json has room for"),
    ):
        if names:
            some = ", ".join(sorted(names)[:3]) + (" …" if len(names) > 3 else "")
            raise ConfigError(
                f"model.source: the weights in {folder} {problem} ({len(names)} tensors: {some}):"
                " correct config.json, or get the weights again"
            )
    return model


def _unplaced(model, names):
    """Those of the left-over tensors that belong to the model: a bias of a layer that has none, a
    layer beyond the last. Not those of a part that is not loaded, as a vision tower."""
    modules = {re.sub(r"\d+", "N", name) for name, _ in model.named_modules()}
    known = {name for name, _ in model.named_buffers()}
    known |= {name for name, _ in model.named_parameters(remove_duplicate=False)}
    return [
        name
        for name in names
        if name not in known
        and {re.sub(r"\d+", "N", name.rpartition(".")[0]), re.split(r"\.\d+\.", name)[0]} & modules
    ]


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


def _convert(source, folder):
    with tempfile.TemporaryDirectory(dir=folder.parent) as room:
        path = gguf_file(source, Path(room))
        options = {"gguf_file": path.name, "local_files_only": True}
        tokenizer = AutoTokenizer.from_pretrained(path.parent, **options)
        with contextlib.redirect_stderr(io.StringIO()):  # a bar that no option hides
            model = AutoModelForCausalLM.from_pretrained(
                path.parent, dtype=torch.bfloat16, **options
            )
        _save(model, tokenizer, folder)


def _quantize_once(plain, folder):
    options = {"quantization_config": nf4_config(), **device_map()}
    model = load_whole(plain, dtype=torch.bfloat16, **options)
    _save(dequantized(model), AutoTokenizer.from_pretrained(plain), folder)


def nf4_config():
    """QLoRA's storage (Dettmers et al., arXiv 2305.14314): NF4, scales quantised too."""
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )


def dequantized(model):
    """A 4-bit model with its linear layers in bf16, each weight at its NF4 value; changed in place.

    Returns the model, which nothing takes for a 4-bit one any more.
    """
    return _unmarked(model.dequantize())


def _unmarked(model):
    """Clear what transformers leaves on a model whose weights are plain again, a GGUF's too.

    By these marks TRL still takes it for a 4-bit one, and `save_pretrained` refuses it.
    """
    for owner in (model, model.config):
        for name in ("quantization_config", "hf_quantizer", "_pre_quantization_dtype"):
            if hasattr(owner, name):
                delattr(owner, name)
    model.is_quantized = model.is_loaded_in_4bit = False
    return model


def _save(model, tokenizer, folder):
    _unmarked(model).to(torch.bfloat16).save_pretrained(folder)
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


def device_map():
    """What from_pretrained needs to load onto the first GPU, where there is one: a dict."""
    return {"device_map": {"": 0}} if torch.cuda.is_available() else {}


def weights_file(model):
    """The (first) safetensors file of the base weights that runs of this profiles.Model use."""
    folder = model_folder(model, "bf16" if model.base_weights == "nf4" else None)
    return sorted(Path(folder).glob("*.safetensors"))[0]
