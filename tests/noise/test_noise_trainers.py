"""The noise inside real trainers and wrappers: Trainer, SFTTrainer, PEFT, compile, DDP."""

import copy
import os
import socket

import peft
import pytest
import torch
from datasets import Dataset
from test_noise import drawn, looked_up, ragged, real, silenced, tiny
from tokenizers import Tokenizer, models
from torch.utils.checkpoint import checkpoint
from transformers import (
    BitsAndBytesConfig,
    PreTrainedTokenizerFast,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from trl import SFTConfig, SFTTrainer

from neft_utils.noise import NEFTuneCallback, noisy_embeddings

SIZES = [5, 12, 3, 9, 7, 11, 4, 8, 6, 10, 12, 3]
ROWS = [
    {"input_ids": [(3 * i + t) % 60 + 3 for t in range(n)], "labels": [5] * n}
    for i, n in enumerate(SIZES)
]


def pad(rows):
    batch = ragged([len(row["input_ids"]) for row in rows])
    for ids, row in zip(batch["input_ids"], rows, strict=True):
        ids[: len(row["input_ids"])] = torch.tensor(row["input_ids"])
    return batch | {"labels": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)}


class Watch(TrainerCallback):
    """Sees what the embedding puts out in training; comes after the noise."""

    def __init__(self):
        self.rows, self.ids, self.handle = [], [], None

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.stop()

        def see(module, inputs, output):
            if module.training and torch.is_grad_enabled():
                self.ids.append(inputs[0].clone())
                output = output.detach().flatten(0, 1)
                self.rows.append(output[output.any(1)].clone())

        self.handle = model.get_input_embeddings().register_forward_hook(see)

    def on_train_end(self, *args, **kwargs):
        self.stop()

    def stop(self):
        if self.handle is not None:
            self.handle.remove()

    @property
    def noise(self):
        """(real tokens, hidden) of all sequences in the order of training."""
        return torch.cat(self.rows)


def quiet(model=None):
    """A model whose frozen embedding is zero, so that what comes out of it is the noise."""
    model = silenced(tiny() if model is None else model)
    model.get_input_embeddings().weight.requires_grad_(False)
    return model


def arguments(folder, kind=TrainingArguments, **changes):
    settings = {
        "per_device_train_batch_size": 4,
        "num_train_epochs": 1,
        "learning_rate": 1e-2,
        "use_cpu": True,
        "report_to": [],
        "disable_tqdm": True,
        "save_strategy": "no",
        "logging_strategy": "no",
    }
    return kind(str(folder), **settings | changes)


def trained(folder, model=None, callback=None, watch=None, resume=None, extra=(), **changes):
    """Train with transformers' Trainer; returns (model, callback, what was seen)."""
    model = quiet() if model is None else model
    callback = NEFTuneCallback(5.0) if callback is None else callback
    watch = Watch() if watch is None else watch
    Trainer(
        model=model,
        args=arguments(folder, **changes),
        train_dataset=ROWS,
        data_collator=pad,
        callbacks=[callback, watch, *extra],
    ).train(resume_from_checkpoint=resume)
    return model, callback, watch


# ----------------------------------------------------------------------------------- Trainer


def test_trainer_gets_fresh_noise_at_every_step_and_none_afterwards(tmp_path):
    model, callback, watch = trained(tmp_path)
    report = callback.report()
    assert (report["calls"], report["tokens"]) == (3, sum(SIZES)) == (3, len(watch.noise))
    assert report["noise_rms"] == pytest.approx(report["expected_rms"], rel=0.05)
    assert report["effective_alpha_p10"] == 5.0
    assert watch.noise.unique(dim=0).size(0) == sum(SIZES)
    assert not callback.noise.attached
    assert not looked_up(model.train(), **pad(ROWS[:2])).any()


def test_gradient_accumulation_changes_nothing(tmp_path):
    runs = [
        trained(tmp_path, per_device_train_batch_size=size, gradient_accumulation_steps=4 // size)
        for size in (4, 2, 1)
    ]
    for model, _, watch in runs[1:]:
        assert torch.equal(watch.noise, runs[0][2].noise)
        for name, weight in model.state_dict().items():
            assert torch.allclose(weight, runs[0][0].state_dict()[name], atol=1e-4), name


def test_trainers_seed_is_the_noises_unless_one_is_given(tmp_path):
    def noise(of_noise, of_trainer):
        callback = NEFTuneCallback(5.0, seed=of_noise)
        return trained(tmp_path, callback=callback, seed=of_trainer, data_seed=0)[2].noise

    assert torch.equal(noise(None, 3), noise(3, 4))
    assert not torch.equal(noise(None, 3), noise(None, 4))


class Interrupt(TrainerCallback):
    def __init__(self, step, error):
        self.step, self.error = step, error

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise self.error


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("next_one", ["same callback", "new callback", "context manager", "remove"])
def test_what_an_exception_in_train_leaves_behind_is_cleared_and_never_doubled(
    tmp_path, error, next_one
):
    # transformers stacks a second hook: noise x 1.41 from the second train() on.
    reference = trained(tmp_path)[2].noise
    model, callback, watch = quiet(), NEFTuneCallback(5.0), Watch()
    with pytest.raises(error):
        trained(tmp_path, model, callback, watch, extra=[Interrupt(1, error)])
    watch.stop()
    assert callback.noise.attached  # nobody told it
    if next_one == "context manager":
        batch = pad(ROWS[:4])
        model.train()
        assert torch.equal(drawn(model, **batch), drawn(quiet(), **batch))
    elif next_one == "remove":
        callback.remove()
        assert not looked_up(model.train(), **pad(ROWS[:4])).any()
    else:
        again = callback if next_one == "same callback" else None
        noise = trained(tmp_path, model, again)[2].noise
        assert torch.equal(noise, reference)
    assert not callback.noise.attached
    assert not looked_up(model.train(), **pad(ROWS[:4])).any()


def test_a_resumed_run_draws_what_the_uninterrupted_one_would_have_drawn(tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 3}
    whole, _, all_steps = trained(tmp_path / "whole", **saving)
    part, _, rest = trained(
        tmp_path / "rest", resume=str(tmp_path / "whole" / "checkpoint-1"), **saving
    )
    assert len(rest.rows) == 2 and len(all_steps.rows) == 3
    for a, b in zip(rest.rows, all_steps.rows[1:], strict=True):
        assert torch.equal(a, b)
    for name, weight in part.state_dict().items():
        assert torch.equal(weight, whole.state_dict()[name]), name


def lora(model, **changes):
    settings = {"r": 2, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
    torch.manual_seed(1)
    return peft.get_peft_model(model, peft.LoraConfig(**settings | changes))


def dropped_and_ids(folder, noise_alpha, transformers_alpha=None):
    model, watch, dropped = lora(tiny(), lora_dropout=0.5), Watch(), []
    for name, module in model.named_modules():
        if name.endswith("lora_dropout.default"):
            module.register_forward_hook(lambda m, a, o: dropped.append((o == 0) & (a[0] != 0)))
    Trainer(
        model=model,
        args=arguments(folder, neftune_noise_alpha=transformers_alpha),
        train_dataset=ROWS,
        data_collator=pad,
        callbacks=[watch] if noise_alpha is None else [NEFTuneCallback(noise_alpha), watch],
    ).train()
    return dropped, watch.ids


def test_dropout_masks_and_data_order_are_those_of_the_run_without_noise(tmp_path):
    reference, order = dropped_and_ids(tmp_path, None)
    assert len(reference) == 6 and 0.2 < reference[0].float().mean() < 0.5  # padding has none
    for noise_alpha in (0, 5.0):
        dropped, ids = dropped_and_ids(tmp_path, noise_alpha)
        assert all(torch.equal(a, b) for a, b in zip(order, ids, strict=True))
        assert all(torch.equal(a, b) for a, b in zip(reference, dropped, strict=True))
    dropped, _ = dropped_and_ids(tmp_path, None, transformers_alpha=5.0)  # it shares the stream
    assert not all(torch.equal(a, b) for a, b in zip(reference, dropped, strict=True))


def test_transformers_own_argument_beside_the_callback_is_an_error(tmp_path):
    with pytest.raises(RuntimeError, match="unset neftune_noise_alpha"):
        trained(tmp_path, neftune_noise_alpha=5.0)
    model = quiet()
    with (
        pytest.raises(RuntimeError, match="unset neftune_noise_alpha"),
        noisy_embeddings(model),
    ):
        trained(tmp_path, model, callback=TrainerCallback(), neftune_noise_alpha=5.0)


def test_two_callbacks_on_one_model_are_an_error(tmp_path):
    with pytest.raises(RuntimeError, match="attached already"):
        trained(tmp_path, extra=[NEFTuneCallback(5.0)])


@pytest.mark.parametrize("from_step", [0, 1])
def test_the_callback_fails_after_an_optimiser_step_without_noise(tmp_path, from_step):
    class Evaluating(Trainer):
        def compute_loss(self, model, inputs, **kwargs):
            model.train(self.state.global_step < from_step)
            return super().compute_loss(model, inputs, **kwargs)

    callback = NEFTuneCallback(5.0)
    trainer = Evaluating(
        model=tiny(),
        args=arguments(tmp_path),
        train_dataset=ROWS,
        data_collator=pad,
        callbacks=[callback],
    )
    message = f"no noise was added in optimiser step {from_step + 1}"
    with pytest.raises(RuntimeError, match=message):
        trainer.train()
    callback.remove()


def test_evaluation_during_training_is_clean(tmp_path):
    seen = []

    class Clean(TrainerCallback):
        def on_evaluate(self, args, state, control, metrics, **kwargs):
            seen.append(metrics["eval_loss"])

    often = {"eval_strategy": "steps", "eval_steps": 1, "learning_rate": 0.0}
    trainer = Trainer(
        model=tiny(),
        args=arguments(tmp_path, **often),
        train_dataset=ROWS,
        eval_dataset=ROWS,
        data_collator=pad,
        callbacks=[NEFTuneCallback(100.0), Clean()],
    )
    trainer.train()
    clean = trainer.evaluate()["eval_loss"]  # the learning rate is 0
    assert seen == pytest.approx([clean] * 4, abs=1e-6)


@pytest.mark.parametrize("bf16", [False, True])
def test_mixed_precision_of_the_trainer(tmp_path, bf16):
    _, callback, watch = trained(tmp_path, bf16=bf16)
    assert callback.report()["tokens"] == sum(SIZES)
    assert torch.equal(watch.noise, trained(tmp_path)[2].noise)


# --------------------------------------------------------------------------------- SFTTrainer


@pytest.fixture(scope="module")
def tokenizer():
    words = {f"w{i}": i for i in range(64)}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="w1")),
        pad_token="w0",
        eos_token="w2",
        unk_token="w1",
    )


def sft(folder, tokenizer, callback, model=None, **changes):
    model, watch = quiet() if model is None else model, Watch()
    trainer = SFTTrainer(
        model=model,
        args=arguments(folder, SFTConfig, **{"max_length": None, "bf16": False} | changes),
        processing_class=tokenizer,
        train_dataset=Dataset.from_list([{"input_ids": row["input_ids"]} for row in ROWS]),
        callbacks=[callback, watch],
    )
    trainer.train()
    return watch


@pytest.mark.filterwarnings("ignore")
def test_sft_trainer_padded_and_padding_free_draw_the_same(tmp_path, tokenizer):
    watches, reports = [], []
    for padding_free in (False, True):
        callback = NEFTuneCallback(5.0)
        watches.append(sft(tmp_path, tokenizer, callback, padding_free=padding_free))
        reports.append(callback.report())
    assert watches[0].ids[0].size(0) == 4 and watches[1].ids[0].size(0) == 1
    assert len(watches[0].noise) == sum(SIZES)
    assert torch.equal(watches[0].noise, watches[1].noise)
    assert reports[0]["tokens"] == reports[1]["tokens"] == sum(SIZES)
    assert reports[0]["noise_rms"] == pytest.approx(reports[1]["noise_rms"])


@pytest.mark.filterwarnings("ignore")
def test_sft_trainer_packing_keeps_each_documents_own_length(tmp_path, tokenizer):
    # transformers scales by the packed row: for these rows effective α would be 5·√(l/64).
    callback = NEFTuneCallback(5.0)
    watch = sft(
        tmp_path, tokenizer, callback, packing=True, max_length=64, per_device_train_batch_size=1
    )
    report = callback.report()
    assert max(ids.size(1) for ids in watch.ids) > 2 * max(SIZES)
    assert report["effective_alpha_p10"] == report["effective_alpha_p90"] == 5.0
    energy = 25 / 3 * len(SIZES) / (sum(SIZES) * 32)
    assert report["expected_rms"] == pytest.approx(energy**0.5, rel=1e-5)
    assert watch.noise.square().mean().sqrt().item() == pytest.approx(energy**0.5, rel=0.1)


# --------------------------------------------------------------------------------------- PEFT

PEFT = {
    "lora": peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"),
    "lora on the embedding": peft.LoraConfig(
        r=2, target_modules=["q_proj", "embed_tokens"], task_type="CAUSAL_LM"
    ),
    "modules_to_save": peft.LoraConfig(
        r=2,
        target_modules=["q_proj"],
        modules_to_save=["embed_tokens", "lm_head"],
        task_type="CAUSAL_LM",
    ),
    "trainable tokens": peft.LoraConfig(
        r=2, target_modules=["q_proj"], trainable_token_indices=[3], task_type="CAUSAL_LM"
    ),
    "prompt tuning": peft.PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"),
    "prefix tuning": peft.PrefixTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"),
}


@pytest.mark.parametrize("kind", PEFT)
def test_peft_models_get_the_noise_of_the_plain_model(kind, tmp_path):
    batch = ragged([9, 4, 6])
    reference = drawn(tiny(), **batch)
    model = peft.get_peft_model(tiny(), copy.deepcopy(PEFT[kind])).train()
    with noisy_embeddings(model) as noise:
        assert torch.equal(looked_up(model, **batch), reference)
        noise.set_step(0)
        assert torch.equal(looked_up(model, *batch.values()), reference)  # by position
        noise.set_step(0)
        assert torch.equal(looked_up(model.get_base_model(), **batch), reference)
        model(**batch, labels=batch["input_ids"]).loss.backward()
        model.save_pretrained(tmp_path)
        names = list(model.state_dict()) + [file.name for file in tmp_path.iterdir()]
        assert not [name for name in names if "noise" in name]
    with torch.no_grad():
        clean = looked_up(model, **batch)
    assert torch.equal(looked_up(model, **batch), clean)


def test_soft_prompts_stay_clean_and_do_not_count():
    model = peft.get_peft_model(tiny(), copy.deepcopy(PEFT["prompt tuning"])).train()
    seen = []
    inner = model.get_base_model().model
    inner.register_forward_pre_hook(
        lambda m, a, k: seen.append(k["inputs_embeds"].detach().clone()), with_kwargs=True
    )
    batch = ragged([9, 4])
    with noisy_embeddings(model) as noise:
        model(**batch)
        assert noise.report()["tokens"] == 13
    model(**batch)
    noisy, clean = seen
    assert torch.equal(noisy[:, :4], clean[:, :4])
    assert not torch.equal(noisy[:, 4:], clean[:, 4:])


def test_a_4_bit_model_trains_with_noise_on_a_cpu(tmp_path):
    tiny(hidden_size=64, num_hidden_layers=1).save_pretrained(tmp_path / "base")
    settings = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
    )
    base = type(tiny()).from_pretrained(tmp_path / "base", quantization_config=settings)
    assert type(base.model.layers[0].self_attn.q_proj).__name__ == "Linear4bit"
    model = lora(base)
    before = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    _, callback, watch = trained(tmp_path, quiet(model), max_steps=2)
    assert torch.equal(
        watch.noise, trained(tmp_path, quiet(tiny(hidden_size=64)))[2].noise[: len(watch.noise)]
    )
    assert callback.report()["calls"] == 2
    after = dict(model.named_parameters())
    assert any(not torch.equal(before[n], after[n]) for n in before)


# ------------------------------------------------------------------------------ checkpointing


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("reentrant", [True, False])
def test_decoder_layer_checkpointing_draws_once(reentrant):
    batch = ragged([9, 4])
    labels = {"labels": batch["input_ids"]}

    def gradients(model):
        with noisy_embeddings(model) as noise:
            seen = looked_up(model, **batch, **labels, use_cache=False)
            noise.set_step(0)
            model(**batch, **labels, use_cache=False).loss.backward()
            assert noise.report()["calls"] == 2
        return seen, [p.grad for p in model.parameters()]

    reference, wanted = gradients(tiny(num_hidden_layers=2))
    model = tiny(num_hidden_layers=2)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    seen, got = gradients(model)
    assert torch.equal(seen, reference)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(wanted, got, strict=True))


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_around_the_embedding_is_refused_with_the_remedy(reentrant):
    model, batch = tiny(), ragged([9, 4])
    one = torch.ones(1, requires_grad=True)
    with noisy_embeddings(model):
        loss = checkpoint(
            lambda ids, x: model(ids).logits * x, batch["input_ids"], one, use_reentrant=reentrant
        ).sum()
        with pytest.raises(RuntimeError, match="checkpoint the decoder layers"):
            loss.backward()
        model(**batch).logits.sum().backward()  # and the next forward is fine


# ------------------------------------------------------------------------------- torch.compile


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("backend", ["eager", pytest.param("aot_eager", marks=pytest.mark.slow)])
@pytest.mark.parametrize("how", ["torch.compile", "model.compile"])
@pytest.mark.parametrize("compiled_first", [True, False])
def test_attaching_to_and_detaching_from_a_compiled_model_takes_effect(
    backend, how, compiled_first
):
    batch = ragged([9, 4])
    batch |= {"labels": batch["input_ids"], "use_cache": False}

    def losses(model, times=2):
        return [model(**batch).loss.item() for _ in range(times)]

    plain = tiny()
    clean = losses(plain, 1)[0]
    with noisy_embeddings(plain, 50.0):
        noisy = losses(plain)
    assert abs(noisy[0] - clean) > 1e-4 and abs(noisy[0] - noisy[1]) > 1e-4

    model = tiny()
    if how == "torch.compile":
        compiled = torch.compile(model, backend=backend)
    else:
        model.compile(backend=backend)
        compiled = model
    if compiled_first:
        assert losses(compiled, 1) == pytest.approx([clean], abs=1e-5)
    # Attached, taken off, and put on again, by either name of the model.
    with noisy_embeddings(model, 50.0):
        assert losses(compiled) == pytest.approx(noisy, abs=1e-5)
    assert losses(compiled, 1) == pytest.approx([clean], abs=1e-5)
    with noisy_embeddings(compiled, 50.0) as noise:
        assert losses(compiled) == pytest.approx(noisy, abs=1e-5)
        assert noise.report()["calls"] == 2
    torch._dynamo.reset()


@pytest.mark.filterwarnings("ignore")
def test_a_graph_without_breaks_is_refused_in_words_that_name_the_noise():
    model = tiny()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with (
        noisy_embeddings(model),
        pytest.raises(Exception, match="(?s)NEFTune's noise is not for compiled.*fullgraph=False"),
    ):
        compiled(**ragged([5]), use_cache=False)
    torch._dynamo.reset()


# ---------------------------------------------------------------------------------------- DDP


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def be_rank(rank, port):
    """Make this process one of two, as torchrun does."""
    torch.set_num_threads(1)
    os.environ.update(
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE="2",
    )


def ddp_worker(rank, port, folder):
    be_rank(rank, port)
    seen = {}
    for name, alpha in (("ours", None), ("theirs", 5.0)):
        watch = Watch()
        same = {"input_ids": [3] * 6, "labels": [5] * 6}
        trainer = Trainer(
            model=quiet(),
            args=arguments(folder, max_steps=2, ddp_backend="gloo", neftune_noise_alpha=alpha),
            train_dataset=[same] * 32,
            data_collator=pad,
            callbacks=[watch] if alpha else [NEFTuneCallback(5.0), watch],
        )
        trainer.train()
        assert torch.distributed.get_world_size() == 2
        seen[name] = watch.noise
    torch.save(seen, f"{folder}/rank{rank}.pt")
    torch.distributed.destroy_process_group()


def test_ranks_of_a_ddp_run_draw_different_noise(tmp_path):
    torch.multiprocessing.spawn(ddp_worker, (free_port(), str(tmp_path)), nprocs=2)
    first, second = (torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2))
    assert first["ours"].shape == second["ours"].shape == (2 * 4 * 6, 32)
    together = torch.cat([first["ours"], second["ours"]])
    assert together.unique(dim=0).size(0) == len(together)
    assert torch.equal(first["theirs"], second["theirs"])  # one stream for all ranks
    alone = drawn(quiet(), options={"seed": 42}, **ragged([6] * 4))  # the trainer's seed
    assert torch.equal(first["ours"][:24], real(alone, ragged([6] * 4)))
