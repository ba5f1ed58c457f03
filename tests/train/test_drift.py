"""What we rely on in libraries, so that an upgrade fails here first, with a line that says where.

Signatures with the defaults that matter, attributes that our subclasses read, and the meaning of
TRL's padding-free batches.
"""

import importlib
import inspect
from importlib.metadata import version

import pytest
import torch

REQUIRED, ANY = inspect.Parameter.empty, object()
# Where it is -> its parameters that we pass or build upon, with their defaults where they matter.
CALLS = {
    "transformers:Trainer.training_step": {"model": ANY, "inputs": ANY, "num_items_in_batch": None},
    "transformers:Trainer.compute_loss": {
        "model": ANY,
        "inputs": ANY,
        "return_outputs": False,
        "num_items_in_batch": None,
    },
    "transformers:Trainer.train": {"resume_from_checkpoint": None},
    "transformers:set_seed": {"seed": ANY},
    "transformers:TrainingArguments": {
        "neftune_noise_alpha": None,
        "data_seed": None,
        "use_cpu": False,
        "logging_nan_inf_filter": True,
        "save_total_limit": None,
        "optim": ANY,
    },
    "transformers:BitsAndBytesConfig": {
        "load_in_4bit": False,
        "bnb_4bit_quant_type": ANY,
        "bnb_4bit_use_double_quant": False,
        "bnb_4bit_compute_dtype": None,
    },
    "transformers:LlamaForCausalLM.forward": {
        "input_ids": None,
        "attention_mask": None,
        "position_ids": None,
        "past_key_values": None,
        "inputs_embeds": None,
        "use_cache": None,
        "logits_to_keep": 0,
    },
    "transformers.integrations.neftune:activate_neftune": {
        "model": ANY,
        "neftune_noise_alpha": ANY,
    },
    "transformers.integrations.neftune:deactivate_neftune": {"model": ANY, "hook_handle": ANY},
    "trl:SFTConfig": {
        "padding_free": False,
        "packing": False,
        "completion_only_loss": None,
        "max_length": 1024,
        "gradient_checkpointing": True,
    },
    "trl:SFTTrainer.__init__": {
        "model": ANY,
        "args": None,
        "train_dataset": None,
        "processing_class": None,
        "callbacks": None,
        "peft_config": None,
    },
    "peft:LoraConfig": {
        "r": 8,
        "lora_alpha": 8,
        "lora_dropout": 0.0,
        "target_modules": None,
        "task_type": None,
        "lora_bias": False,
    },
    "peft:get_peft_model": {"model": ANY, "peft_config": ANY, "autocast_adapter_dtype": True},
    "peft:PeftModel.from_pretrained": {
        "model": ANY,
        "model_id": ANY,
        "autocast_adapter_dtype": True,
    },
    "datasets:Dataset.from_list": {"mapping": ANY},
    "datasets:load_dataset": {"path": REQUIRED, "data_files": None, "split": None},
    "papermill:execute_notebook": {
        "input_path": REQUIRED,
        "output_path": REQUIRED,
        "parameters": None,
        "kernel_name": None,
        "progress_bar": True,
        "log_output": False,
        "cwd": None,
    },
    "papermill:inspect_notebook": {"notebook_path": REQUIRED},
    "lm_eval:simple_evaluate": {
        "num_fewshot": None,
        "limit": None,
        "bootstrap_iters": ANY,
        "task_manager": None,
    },
    "lm_eval.models.huggingface:HFLM": {"pretrained": REQUIRED, "softmax_dtype": None},
    "huggingface_hub:snapshot_download": {
        "repo_id": REQUIRED,
        "repo_type": None,
        "revision": None,
        "local_files_only": False,
        "ignore_patterns": None,
    },
}
ATTRIBUTES = {
    "peft.tuners.lora:Linear": ["forward", "merged", "disable_adapters", "active_adapters"],
    "transformers:AttentionInterface": ["register"],
    "transformers:AttentionMaskInterface": ["register"],
    "transformers:TrainerCallback": ["on_train_begin", "on_step_begin", "on_step_end", "on_save"],
}


def found(place):
    module, _, path = place.partition(":")
    value = importlib.import_module(module)
    for name in path.split("."):
        value = getattr(value, name, None)
    library = module.split(".")[0]
    try:
        release = version(library.replace("_", "-"))
    except importlib.metadata.PackageNotFoundError:
        release = "?"
    return value, f"{library} {release}: {path}"


@pytest.mark.parametrize("place", CALLS)
def test_a_call_that_we_make_still_takes_what_we_pass(place):
    call, where = found(place)
    assert call is not None, f"{where} is gone"
    parameters = inspect.signature(call).parameters
    for name, default in CALLS[place].items():
        assert name in parameters, f"{where} has no parameter {name} any more"
        if default is not ANY:
            now = parameters[name].default
            assert now == default, f"{where}: the default of {name} is {now!r}, was {default!r}"


@pytest.mark.parametrize("place", ATTRIBUTES)
def test_what_our_subclasses_read_is_still_there(place):
    owner, where = found(place)
    for name in ATTRIBUTES[place]:
        assert hasattr(owner, name), f"{where} has no {name} any more"


def test_a_lora_layer_is_made_of_what_the_lean_one_reads():
    from peft import LoraConfig, get_peft_model

    layers = torch.nn.Sequential(torch.nn.Linear(4, 3, bias=False))
    layer = get_peft_model(layers, LoraConfig(r=2, target_modules=["0"])).base_model.model[0]
    name = layer.active_adapters[0]
    for part in ("lora_A", "lora_B", "lora_dropout", "scaling", "lora_bias"):
        assert name in getattr(layer, part), f"peft: a LoRA layer has no {part} any more"
    assert name not in layer.lora_variant and layer.base_layer.weight.shape == (3, 4)
    assert isinstance(layer.lora_dropout[name], torch.nn.Identity)  # at dropout 0


def test_trls_padding_free_batch_means_what_the_noise_reads():
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    collate = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)
    rows = [
        {"input_ids": [5, 6, 7], "completion_mask": [0, 1, 1]},
        {"input_ids": [8, 9], "completion_mask": [0, 1]},
    ]
    batch = collate(rows)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 9]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1]]
    assert batch["labels"].tolist() == [[-100, 6, 7, -100, 9]]
    assert batch["cu_seq_lens_q"].tolist() == [0, 3, 5] == batch["cu_seq_lens_k"].tolist()
    assert "attention_mask" not in batch


def test_a_cache_layer_holds_keys_and_values_by_these_names():
    from transformers.cache_utils import DynamicLayer

    layer = DynamicLayer()
    keys = torch.zeros(1, 2, 3, 4)
    layer.update(keys, keys)
    assert layer.keys.shape == layer.values.shape == keys.shape and layer.get_seq_length() == 3
