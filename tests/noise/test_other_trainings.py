"""What the noise does in trainings other than supervised fine-tuning, in numbers, and after one."""

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from test_noise import drawn, packed, ragged, silenced, tiny
from test_noise_trainers import ROWS, arguments, pad, quiet, tokenizer, trained
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer

from neft_utils.noise import NEFTuneCallback, noisy_embeddings, suggest_noise_alpha

assert tokenizer  # a fixture of another file


# ---------------------------------------------------------------- after an exception in train()


class Stop(TrainerCallback):
    def __init__(self, error):
        self.error = error

    def on_step_end(self, *args, **kwargs):
        raise self.error


def noise_seen(model):
    """Largest entry of what the embedding of zeros puts out, as a list that fills."""
    seen = []
    model.get_input_embeddings().register_forward_hook(
        lambda module, args, output: seen.append(float(output.detach().abs().max()))
    )
    return seen


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("then", ["another trainer", "the same trainer's evaluation", "a loop"])
def test_a_control_run_after_an_exception_is_clean(tmp_path, error, then):
    model, callback = quiet(), NEFTuneCallback(5.0)
    with pytest.raises(error):
        trained(tmp_path, model, callback, extra=[Stop(error)])
    seen = noise_seen(model)
    if then == "another trainer":
        trained(tmp_path, model, TrainerCallback())
    elif then == "a loop":
        model.train()
        for _ in range(2):
            model(**pad(ROWS[:4])).loss.backward()
    else:
        trainer = Trainer(model, arguments(tmp_path), eval_dataset=ROWS, data_collator=pad)
        trainer.evaluate()
    assert seen and max(seen) == 0
    assert not callback.noise.attached or then == "the same trainer's evaluation"


def test_a_trainer_that_lives_on_after_an_exception_keeps_no_noise_on_its_model(tmp_path):
    model = quiet()
    callback = NEFTuneCallback(5.0)
    trainer = Trainer(
        model,
        arguments(tmp_path),
        train_dataset=ROWS,
        data_collator=pad,
        callbacks=[callback, Stop(KeyboardInterrupt)],
    )
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    seen = noise_seen(model)
    model.train()
    model(**pad(ROWS[:4]))
    assert seen == [0]
    trainer.pop_callback(Stop)
    trainer.train()
    assert callback.report()["calls"] == 3


def test_a_second_train_of_one_callback_draws_the_first_ones_noise_again(tmp_path):
    callback = NEFTuneCallback(5.0)
    first, second = (trained(tmp_path, quiet(), callback)[2].noise for _ in range(2))
    assert torch.equal(first, second)


def test_the_context_manager_around_a_trainer_takes_each_micro_batch_for_a_step(tmp_path):
    class Calls(TrainerCallback):
        steps = ()

        def on_substep_end(self, *args, **kwargs):
            self.steps = (*self.steps, self.noise._step)

        on_step_end = on_substep_end

    model, calls = quiet(), Calls()
    with noisy_embeddings(model, 5.0) as calls.noise:
        trained(
            tmp_path,
            model,
            calls,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
        )
    assert calls.steps == (1, 2, 3, 4, 5, 6)  # of 3 optimiser steps


# ------------------------------------------------------------------------- preference pairs


def test_sides_give_both_rows_of_a_pair_the_same_numbers():
    chosen, rejected = [6, 4], [6, 3]
    batch = ragged(chosen + rejected)
    whole = drawn(silenced(tiny()), options={"sides": 2}, step=0, **batch)
    assert torch.equal(whole[0], whole[2])  # as long: the same noise
    assert torch.allclose(whole[1, :3] * (4 / 3) ** 0.5, whole[3, :3])  # else at its own scale
    assert torch.equal(whole[:2], drawn(silenced(tiny()), step=0, **ragged(chosen)))
    apart = drawn(silenced(tiny()), step=0, **batch)
    assert not torch.equal(apart[0], apart[2])
    for bad in (0, 1.5, True):
        with pytest.raises((TypeError, ValueError), match="sides must be"):
            NEFTuneCallback(5.0, sides=bad)
    for odd in (ragged([4, 3, 2]), packed([4, 3, 2]) | {"use_cache": False}):
        with pytest.raises(ValueError, match="sides=2 needs that many sequences"):
            drawn(tiny(), options={"sides": 2}, **odd)
    row = packed(chosen + rejected) | {"use_cache": False}
    flat = drawn(silenced(tiny()), options={"sides": 2}, step=0, **row)
    assert torch.equal(flat[0], whole[batch["attention_mask"].bool()])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("sides", [1, 2])
def test_dpo_on_identical_pairs_has_no_margin_with_two_sides(tmp_path, tokenizer, sides):
    pair = {"prompt": "w5 w6", "chosen": "w7 w8 w9", "rejected": "w7 w8 w9"}
    trainer = DPOTrainer(
        tiny(),
        args=arguments(tmp_path, DPOConfig, bf16=False, logging_strategy="steps", logging_steps=1),
        train_dataset=Dataset.from_list([pair] * 8),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"),
        callbacks=[NEFTuneCallback(5.0, sides=sides)],
    )
    trainer.train()
    margins = [row["rewards/margins"] for row in trainer.state.log_history if "loss" in row]
    largest = max(abs(margin) for margin in margins)
    assert largest < 1e-6 if sides == 2 else largest > 1e-4


# --------------------------------------------------------------------- GRPO, and PPO likewise


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("alpha", [0.0, "a quarter"])
def test_grpo_compares_noised_with_clean_probabilities(tmp_path, tokenizer, alpha):
    tiny().save_pretrained(tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    torch.nn.init.normal_(model.get_input_embeddings().weight)
    model.save_pretrained(tmp_path / "model")
    if alpha:
        alpha = suggest_noise_alpha(model, [10])
    trainer = GRPOTrainer(
        model,
        reward_funcs=lambda completions, **_: [float(len(c)) for c in completions],
        args=arguments(
            tmp_path,
            GRPOConfig,
            bf16=False,
            num_generations=4,
            num_iterations=2,
            max_completion_length=8,
            beta=0.1,
            epsilon=1e-3,  # of a model that has learned nothing all ratios are close to 1
            learning_rate=0.0,
            max_steps=2,
            logging_strategy="steps",
            logging_steps=1,
        ),
        train_dataset=Dataset.from_list([{"prompt": "w5 w6"}] * 8),
        processing_class=tokenizer,
        callbacks=[NEFTuneCallback(alpha)],
    )
    trainer.train()
    first, second = [row for row in trainer.state.log_history if "kl" in row][:2]
    if not alpha:  # the learning rate is 0: the policy is the reference and the old policy
        assert first["kl"] == second["kl"] == 0
        assert first["clip_ratio/region_mean"] == second["clip_ratio/region_mean"] == 0
    else:
        assert min(first["kl"], second["kl"]) > 1e-4
        assert min(row["clip_ratio/region_mean"] for row in (first, second)) > 0.1
