"""Anybody's fine-tune in memory: a folder or hub id of whole weights, or an adapter on its base."""

import contextlib
import json
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTuner

from neft_utils.base import hub
from neft_utils.base.model_config import position_limit
from neft_utils.base.paths import OWN_MODELS, find
from neft_utils.base.profiles import Model
from neft_utils.base.strict import ConfigError, one_line
from neft_utils.train.base_models import open_tokenizer
from neft_utils.train.fast import make_fast
from neft_utils.train.folders import dequantized, device_map, load_whole, model_folder, nf4_config

ADAPTER = "adapter_config.json"
HUB_ID = "owner/name@COMMIT (40 hex digits)"


@dataclass(frozen=True)
class Finetune:
    """Where a fine-tune is: its whole weights, or an adapter and the weights that it goes onto."""

    source: str  # as it was given
    weights: Path
    adapter: Path | None


def find_finetune(source, base=None):
    """The `Finetune` of a folder, a hub id with its commit, or one of `paths.OWN_MODELS`.

    base: of an adapter, where it is not at the place that adapter_config.json names. A relative
    path counts from the working directory. Raises ConfigError of one line.
    """
    source = str(source)
    folder = _folder(source)
    if not (folder / ADAPTER).exists():
        return Finetune(source, _weights(source, folder), None)
    if not (folder / "adapter_model.safetensors").exists():
        raise ConfigError(
            f"{source}: has {ADAPTER} and no adapter_model.safetensors: save the adapter again by"
            " save_pretrained"
        )
    named = base if base is not None else _named_base(source, folder)
    try:
        under = _folder(str(named))
        if (under / ADAPTER).exists():
            raise ConfigError(f"{named} is an adapter itself")
        return Finetune(source, _weights(str(named), under), folder)
    except ConfigError as error:
        raise ConfigError(
            f"{source}: an adapter without its base ({error}): name the base's folder, or"
            f" {HUB_ID}, by base (--base)"
        ) from None


def read_tokenizer(finetune):
    """The tokenizer that lies beside the adapter, else the one of the weights; it can pad.

    Raises ConfigError where there is none, or none that can end an answer.
    """
    folder = finetune.adapter
    if folder is None or not (folder / "tokenizer_config.json").exists():
        folder = finetune.weights
    return open_tokenizer(
        folder,
        f"{finetune.source}: no tokenizer can be read in {folder} ({{reason}}): save it beside"
        " the model",
        f"{finetune.source}: its tokenizer has no eos_token, which ends an answer: set it and"
        " save the tokenizer again",
    )


def longest_text(finetune):
    """The number of tokens that a fine-tune reads, None where its config.json names none."""
    return position_limit(json.loads((finetune.weights / "config.json").read_text("utf-8")))


def with_each(finetunes, work, nf4=False):
    """[work(finetune, model)] of each `Finetune`, one model in memory at a time.

    A base is loaded once for the adapters that follow each other on it. work: its model is in
    eval mode, fast where that is right. nf4: the base of adapters is rounded to 4 bits first, as
    QLoRA has it (arXiv 2305.14314): held so on a GPU, as the same values in bf16 without one. Else
    weights keep the precision that they are stored in. Raises ConfigError for what cannot be
    loaded.
    """
    out, place, base = [], None, None
    for one in finetunes:
        with _of(one.source):
            if one.adapter is None:
                place = base = None  # frees it before the next is loaded
                out.append(work(one, make_fast(_load(one.weights)).eval()))
                continue
            if place != one.weights:
                base = None
                place, base = one.weights, _load(one.weights, nf4)
            model = _with_adapter(base, one.adapter)
            out.append(work(one, make_fast(model).eval()))
            if isinstance(model.base_model, BaseTuner):
                base = model.unload()
            else:  # a kind of adapter that cannot be taken off
                place = base = None
            del model
    return out


def _folder(source):
    if source in OWN_MODELS:
        return model_folder(Model(source=source), "bf16")
    path = Path(source).expanduser()
    if path.is_dir():
        return path.resolve()
    if (stored := find(source)) is not None and stored.is_dir():  # as our own adapters name it
        return stored
    name, _, commit = source.partition("@")
    if not commit:
        raise ConfigError(f"{source}: there is no such folder; of the hub give {HUB_ID}")
    with _of(source):
        return hub.snapshot(name, commit, "model.source")


def _weights(source, folder):
    """The folder, once its files are what transformers may read."""
    with _of(source):
        return model_folder(Model(source=str(folder)), "bf16")


def _named_base(source, folder):
    try:
        config = json.loads((folder / ADAPTER).read_text("utf-8"))
        name, commit = config["base_model_name_or_path"], config.get("revision")
    except (ValueError, KeyError, TypeError, AttributeError):
        name = None
    if not name:
        raise ConfigError(f"{source}: {ADAPTER} names no base: name it by base (--base)")
    return f"{name}@{commit}" if commit and not Path(name).is_dir() else name


def _load(folder, nf4=False):
    options = {"dtype": "auto", **device_map()}
    if not nf4:
        return load_whole(folder, **options)
    options |= {"dtype": torch.bfloat16, "quantization_config": nf4_config()}
    model = load_whole(folder, **options)
    return model if torch.cuda.is_available() else dequantized(model)


def _with_adapter(base, folder):
    with (
        one_line(
            "its adapter does not fit onto its base ({reason}): name the right base by base"
            " (--base), or save the adapter again"
        ),
        warnings.catch_warnings(),
    ):
        # PEFT warns of these and leaves them at random, or leaves out what has no place.
        warnings.filterwarnings("error", message=".*(missing|unexpected) adapter keys")
        return PeftModel.from_pretrained(base, folder, use_safetensors=True)


@contextlib.contextmanager
def _of(source):
    """Errors below begin with what was given, where a profile's key would stand."""
    try:
        yield
    except ConfigError as error:
        text = str(error).removeprefix("model.source: ").replace("model.revision: ", "")
        raise ConfigError(text if text.startswith(source) else f"{source}: {text}") from None
