"""What the fast path does not compute as a model's own does goes the model's own way, said once."""

import functools

import pytest
import torch
import torch.nn.functional as F
from tiny import Lab
from transformers import AutoConfig, AutoModelForCausalLM

from neft_utils.base.profiles import Model
from neft_utils.base.strict import ConfigError
from neft_utils.evaluate.generate import answer
from neft_utils.evaluate.stability import perturbed_weights
from neft_utils.train import attention, own_path
from neft_utils.train.base_models import check_model, embedding_norm, load_base, load_tokenizer
from neft_utils.train.encoding import encode, prompt_ids
from neft_utils.train.fast import make_fast
from neft_utils.train.losses import response_nll

NANO = Model(source="nano")
BASE = {
    **{"vocab_size": 258, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512},
    **{"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1},
}
OLD = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 512}
LONGROPE = {
    "rope_theta": 1e4,
    "rope_type": "longrope",
    "original_max_position_embeddings": 30,
    "short_factor": [1.0] * 8,
    "long_factor": [4.0] * 8,
}
# name -> (model type, what its config says, whether losses and answers are the fast path's)
FAMILIES = {
    "window": ("mistral", {"sliding_window": 16}, (True, True)),
    "window in some layers": (
        "gemma3_text",
        {
            **{"head_dim": 16, "sliding_window": 16},
            "layer_types": ["sliding_attention", "full_attention"],
        },
        (True, True),
    ),
    "window of a row's length": ("qwen3", {"head_dim": 16}, (True, True)),
    "classes of its own": ("gptj", {**OLD, "rotary_dim": 8}, (True, False)),
    "absolute positions": ("gpt2", OLD, (True, True)),
    "cap on the scores": (
        "gemma2",
        {"head_dim": 16, "attn_logit_softcapping": 1.0, "sliding_window": 400},
        (False, False),
    ),
    "sinks": (
        "gpt_oss",
        {"head_dim": 16, "num_local_experts": 2, "num_experts_per_tok": 1, "sliding_window": 16},
        (False, False),
    ),
    "chunks": (
        "llama4_text",
        {
            **{"num_local_experts": 2, "num_experts_per_tok": 1, "head_dim": 16},
            **{"attention_chunk_size": 16, "intermediate_size_mlp": 96},
            "interleave_moe_layer_step": 1,
        },
        (False, False),
    ),
    "ALiBi": ("bloom", {"n_head": 4, "n_layer": 2}, (False, False)),
    "rotations that depend on the longest row": (
        "phi3",
        {"rope_parameters": LONGROPE, "original_max_position_embeddings": 30},
        (False, False),
    ),
    "a state": ("mamba", {"state_size": 8}, (False, False)),
    "a state of another kind": ("rwkv", {}, (False, False)),
    "convolutions": ("lfm2", {"layer_types": ["conv", "full_attention"]}, (False, False)),
}
ROWS = [("Say hi.", "Hi there!"), ("Why?", "Because " + "it is so. " * 9), ("Count.", "One two.")]


@functools.cache
def tokenizer():
    return load_tokenizer(NANO)


def family(kind, values):
    """A random model whose words depend on what stands before them; no weight is near zero."""
    config = AutoConfig.for_model(kind, **{**BASE, **values})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config).float().eval()
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if weight.dim() > 1:
                    weight.mul_(8.0 if "embed" in name else 4.0)
                elif "sink" in name:
                    weight.normal_()
    return model


def plain_losses(model, encoded):
    """Mean loss of each response by the model as transformers has it, one document at a time."""
    out = []
    for one in encoded:
        ids = torch.tensor(one["input_ids"])
        with torch.no_grad():
            logits = model(input_ids=ids[None], use_cache=False).logits[0, :-1]
        chosen = torch.tensor(one["completion_mask"][1:]).bool()
        out.append(F.cross_entropy(logits[chosen], ids[1:][chosen]).item())
    return out


def plain_answer(model, prompt, count):
    """The most probable token, `count` times, with the whole text anew for each."""
    ids = prompt_ids(tokenizer(), prompt)
    new = []
    for _ in range(count):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids + new]), use_cache=False).logits
        new.append(int(logits[0, -1].argmax()))
        if new[-1] == 1:
            break
    return tokenizer().decode(new, skip_special_tokens=True)


@pytest.mark.parametrize("name", FAMILIES)
def test_losses_and_answers_are_those_of_the_models_own_path(name):
    kind, values, (losses_fast, answers_fast) = FAMILIES[name]
    encoded = [encode(tokenizer(), {"prompt": p, "response": r}) for p, r in ROWS]
    model = family(kind, values)
    expected = plain_losses(model, encoded)
    texts = [plain_answer(model, prompt, 10) for prompt, _ in ROWS]
    own_path._KNOWN.clear(), own_path._SAID.clear()
    said = []
    got = response_nll(make_fast(model, 400, said.append), encoded, 10_000)
    assert got == pytest.approx(expected, abs=1e-4)
    options = {"max_new_tokens": 10, "batch_size": 4, "repetition_penalty": 1.0}
    for _ in range(2):
        answers = answer(model, tokenizer(), [p for p, _ in ROWS], say=said.append, **options)
        assert [one["text"] for one in answers] == texts
    lines = [
        part
        for part, fast in zip(
            ("the fast path", "answers in"), (losses_fast, answers_fast), strict=True
        )
        if not fast
    ]
    assert len(said) == len(lines)  # once each, however often it is asked
    for line, part in zip(said, lines, strict=True):
        assert line.startswith(f"{model.config.model_type}: {part}") and "slower and right" in line


def test_an_attention_that_forgets_the_window_is_found(monkeypatch):
    """The check itself: the same model as above, with a fast path that is wrong past the window."""
    whole = attention._document
    monkeypatch.setattr(attention, "_document", lambda q, k, v, window, s: whole(q, k, v, None, s))
    own_path._KNOWN.clear()
    model = family("mistral", {"sliding_window": 16})
    encoded = [encode(tokenizer(), {"prompt": p, "response": r}) for p, r in ROWS]
    expected = plain_losses(model, encoded)
    assert make_fast(model, longest=10, say=lambda text: None).neft_apart is True
    own_path._KNOWN.clear()
    wide = family("mistral", {"sliding_window": 100})
    assert make_fast(wide, longest=90).neft_apart is False  # no row reaches the window
    assert make_fast(wide, longest=101, say=lambda text: None).neft_apart is True
    assert response_nll(model, encoded, 10_000) == pytest.approx(expected, abs=1e-5)
    own_path._KNOWN.clear()


def test_asking_changes_neither_weights_nor_modes_nor_random_numbers():
    own_path._KNOWN.clear()
    model = load_base(NANO, "bf16").train()
    model.model.norm.eval()
    before = {name: (p, p.data, p.data.clone()) for name, p in model.named_parameters()}
    buffers = {name: b.clone() for name, b in model.named_buffers()}
    own_path._KNOWN.clear()
    torch.manual_seed(3)
    state = torch.random.get_rng_state()
    make_fast(model)
    assert own_path._KNOWN  # it did ask
    assert torch.equal(torch.random.get_rng_state(), state)
    assert model.training and not model.model.norm.training
    for name, parameter in model.named_parameters():
        same, data, values = before[name]
        assert parameter is same and parameter.data_ptr() == data.data_ptr(), name
        assert parameter.dtype == torch.bfloat16 and torch.equal(parameter, values), name
    assert all(torch.equal(b, buffers[name]) for name, b in model.named_buffers())


def test_a_model_that_sees_what_comes_after_is_refused():
    encoder = family("bert", {"is_decoder": False})
    with pytest.raises(ConfigError, match="predicts a token from those after it"):
        make_fast(encoder)


def mamba_lab(tmp_path, monkeypatch, train, noise):
    """A profile that fine-tunes all of a small Mamba, with rows."""
    folder = tmp_path / "mamba"
    family("mamba", {"state_size": 8}).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return Lab(
        tmp_path,
        monkeypatch,
        model={"source": str(folder), "base_weights": "bf16"},
        train={"method": "full", **train},
        arms={"baseline": {"noise_alpha": 0}, "neft_a15": noise},
    ).prepare()


def test_a_model_with_a_state_is_trained_document_by_document(tmp_path, monkeypatch):
    """Step by step the same as one document a forward by transformers; the noise knows its row."""
    lab = mamba_lab(
        tmp_path, monkeypatch, {"epochs": 1, "learning_rate": 1e-4}, {"noise_alpha": 15}
    )
    names = lab.train("neft_a15", until="with recorded(")
    trainer, noise = names["trainer"], names["noise"].noise.attach(names["trainer"].model)
    rows = [trainer.train_dataset[n] for n in range(4)]
    batch = trainer.data_collator(rows)
    trainer.training_step(trainer.model, batch, num_items_in_batch=10)
    report = noise.report()
    assert report["tokens"] == batch["input_ids"].numel()
    assert report["effective_alpha_p10"] == report["effective_alpha_p50"] == 15
    trainer.model.zero_grad()
    noise.remove()
    loss = trainer.training_step(trainer.model, batch, num_items_in_batch=10)
    ours = {n: p.grad.clone() for n, p in trainer.model.named_parameters()}
    trainer.model.zero_grad()
    plain, total = trainer.model.train(), 0.0
    for one in names["train"][:4]:
        ids = torch.tensor(one["input_ids"])
        chosen = torch.tensor(one["completion_mask"][1:]).bool()
        logits = plain(input_ids=ids[None], use_cache=False).logits[0, :-1]
        part = F.cross_entropy(logits[chosen], ids[1:][chosen], reduction="sum") / 10
        part.backward()
        total += part.item()
    assert loss.item() == pytest.approx(total, rel=1e-5)
    for name, p in plain.named_parameters():
        assert (ours[name] - p.grad).norm() <= 1e-4 * p.grad.norm() + 1e-7, name


def test_noise_by_the_rows_width_needs_rows(tmp_path, monkeypatch):
    lab = mamba_lab(tmp_path, monkeypatch, {}, {"noise_alpha": 15, "length": "packed"})
    with pytest.raises(ConfigError, match="use length: sequence"):
        lab.train("neft_a15", until="with recorded(")


def test_the_norm_of_an_embedding_is_measured_behind_its_scale():
    values = {"head_dim": 16, "sliding_window": 400}
    model = family("gemma3_text", values)
    raw = model.get_input_embeddings().weight.norm(dim=1).mean().item()
    assert embedding_norm(model) == pytest.approx(raw * 8, rel=1e-5)  # √64 of the hidden size
    plain = family("llama", {})
    raw = plain.get_input_embeddings().weight.norm(dim=1).mean().item()
    assert embedding_norm(plain) == pytest.approx(raw, rel=1e-6)


def test_a_model_that_peft_has_no_adapters_for_is_refused_before_training(tmp_path):
    folder = tmp_path / "mamba"
    family("mamba", {"state_size": 8}).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    model = {"source": str(folder), "base_weights": "bf16"}
    with pytest.raises(ConfigError, match=r"no adapters for this model, a mamba .*method full"):
        check_model(Lab(tmp_path, model=model).profile)
    check_model(Lab(tmp_path, model=model, train={"method": "full"}).profile)


def test_layers_that_store_the_transpose_are_perturbed_by_output_and_put_back():
    model = family("gpt2", OLD)
    weight = model.transformer.h[0].attn.c_attn.weight
    with torch.no_grad():
        weight[:, 0] = 100.0  # one output far larger than the others
    before = weight.detach().clone()
    with perturbed_weights(model, 0.1):
        step = (weight - before).detach()
        assert step[:, 0].square().mean().sqrt() == pytest.approx(10, rel=0.5)
        assert 0 < step[:, 1:].abs().max() < 1
    assert torch.equal(weight, before)
