"""What each notebook is about stands in its cells, as calls that a reader can edit and rerun."""

import ast
import json

import pytest

from neft_utils.base.paths import NOTEBOOKS, PACKAGE, STEPS

# Notebook -> the calls that its reader is to learn, by the last part of their names.
CALLS = {
    1: "BitsAndBytesConfig from_pretrained dequantize_4bit apply_chat_template encode load_source"
    " sieve split draw write_splits",
    2: "noise_scale noisy_embeddings activate_neftune backward step suggest_noise_alpha",
    3: "BitsAndBytesConfig from_pretrained dequantized LoraConfig get_peft_model SFTConfig"
    " NEFTuneCallback PaddingFreeTrainer train save_pretrained generate recorded set_seed",
    4: "from_pretrained score_losses ask compose check score stopping perturbed_losses preferences"
    " answer_scores write finish",
    7: "noisy_embeddings NEFTuneCallback Trainer BitsAndBytesConfig from_pretrained LoraConfig"
    " SFTConfig SFTTrainer train confirmatory_interval suggest_noise_alpha compare_models",
}
WHOLE = {  # as they are written, with what they are called on
    3: (
        "AutoTokenizer.from_pretrained",
        "AutoModelForCausalLM.from_pretrained",
        "PeftModel.from_pretrained",
        "model.save_pretrained",
        "trainer.train",
    ),
    4: ("PeftModel.from_pretrained", "AutoModelForCausalLM.from_pretrained", "answers.ask"),
    7: ("AutoTokenizer.from_pretrained", "AutoModelForCausalLM.from_pretrained", "trainer.train"),
}


def calls(step):
    """Names of what a notebook's cells call, and of what they pass by keyword."""
    path = NOTEBOOKS / f"{STEPS[step]}.ipynb"
    cells = json.loads(path.read_text("utf-8"))["cells"]
    code = "\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "code")
    called, keywords = set(), set()
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Call):
            called.add(ast.unparse(node.func))
            keywords |= {one.arg for one in node.keywords}
    return called, keywords


@pytest.mark.parametrize("step", CALLS)
def test_the_calls_of_a_notebook_stand_in_its_cells(step):
    called, _ = calls(step)
    last = {name.rpartition(".")[2] for name in called}
    assert not set(CALLS[step].split()) - last
    assert not set(WHOLE.get(step, ())) - called


def test_notebook_3_sets_what_it_explains():
    _, keywords = calls(3)
    wanted = "quantization_config r lora_alpha lora_dropout target_modules warmup_steps"
    wanted += " max_grad_norm completion_only_loss padding_free gradient_checkpointing"
    wanted += " resume_from_checkpoint lr_scheduler_type micro_batch_tokens callbacks"
    assert not set(wanted.split()) - keywords


def test_no_function_of_the_package_does_a_notebook():
    """A run is trained by notebook 3 and scored by notebook 4, nowhere else."""
    for path in PACKAGE.rglob("*.py"):
        tree = ast.parse(path.read_text("utf-8"))
        names = {n.name for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)}
        assert not names & {"finetune", "evaluate", "train_run", "score_run"}, path.name
        if path.relative_to(PACKAGE).parts[0] != "make":  # bench times steps, and keeps no run
            called = {ast.unparse(n.func) for n in ast.walk(tree) if isinstance(n, ast.Call)}
            assert not {c for c in called if c.endswith(("trainer.train", "SFTConfig"))}, path.name
