"""The lean path equals PEFT's, transformers' and the padded reference's own arithmetic."""

import types

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model

from neft_utils.base.profiles import Model, Train
from neft_utils.train import fast
from neft_utils.train.base_models import load_base, load_tokenizer
from neft_utils.train.encoding import encode, flat_batch
from neft_utils.train.losses import response_token_nll
from neft_utils.train.trainer import split_row

NANO = Model(source="nano")
RECIPE = Train(learning_rate=1e-3, epochs=1, lora_rank=4, lora_alpha=8)


@pytest.fixture(scope="module")
def encoded():
    tokenizer = load_tokenizer(NANO)
    rows = [("Hi", "Good day to you."), ("Two and two?", "Four"), ("Say a lot", "well " * 60)]
    return [encode(tokenizer, {"prompt": p, "response": r}) for p, r in rows]


def adapted(lean, dtype=torch.float32, **changes):
    """The nano model with LoRA adapters that are not zero, PEFT's own forward or ours."""
    torch.manual_seed(0)
    options = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", **changes}
    model = get_peft_model(load_base(NANO, "bf16").to(dtype), LoraConfig(**options))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    return fast.lean_lora(model) if lean else model


def padded_reference(model, encoded):
    """Losses of response tokens from a right-padded batch, full float logits, plain SDPA."""
    model.set_attn_implementation("sdpa")
    width = max(len(e["input_ids"]) for e in encoded)
    pad = lambda values, fill: values + [fill] * (width - len(values))  # noqa: E731
    ids = torch.tensor([pad(e["input_ids"], 1) for e in encoded])
    response = torch.tensor([pad(e["completion_mask"], 0) for e in encoded]).bool()[:, 1:]
    mask = torch.tensor([pad([1] * len(e["input_ids"]), 0) for e in encoded])
    logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1]
    return F.cross_entropy(logits[response], ids[:, 1:][response], reduction="none")


def lora_gradients(model, nll):
    nll.sum().backward()
    return {n: p.grad for n, p in model.named_parameters() if p.requires_grad}


def test_loss_and_every_lora_gradient_equal_the_padded_reference(encoded):
    lean, plain = adapted(True).train(), adapted(False).train()
    nll, _ = response_token_nll(lean, flat_batch(encoded))
    reference = padded_reference(plain, encoded)
    torch.testing.assert_close(nll, reference, rtol=1e-5, atol=0)
    ours, theirs = lora_gradients(lean, nll), lora_gradients(plain, reference)
    assert ours.keys() == theirs.keys() and len(ours) == 2 * 7 * 2  # A and B, 7 layers, 2 blocks
    for name, gradient in theirs.items():
        assert gradient.abs().max() > 0, name
        assert (ours[name] - gradient).norm() <= 1e-5 * gradient.norm(), name


@pytest.mark.parametrize("tokens", [1, 90, 200, 10_000])
def test_a_row_taken_in_parts_has_the_same_loss_and_gradients(encoded, tokens):
    model = adapted(True).train()
    whole, _ = response_token_nll(model, flat_batch(encoded))
    expected = lora_gradients(model, whole)
    model.zero_grad()
    parts = list(split_row(flat_batch(encoded), tokens))
    longest = max(len(e["input_ids"]) for e in encoded)
    sizes = [part["input_ids"].shape[1] for part in parts]
    assert sum(sizes) == sum(len(e["input_ids"]) for e in encoded)
    assert max(sizes) <= max(tokens, longest)
    if tokens in (1, 10_000):
        assert len(parts) == {1: len(encoded), 10_000: 1}[tokens]
    for part in parts:
        lengths = part["cu_seq_lens_q"].diff()
        assert part["max_length_q"] == lengths.max() and lengths.sum() == part["labels"].shape[1]
        got = lora_gradients(model, response_token_nll(model, part)[0])
    for name, gradient in expected.items():
        assert (got[name] - gradient).norm() <= 1e-5 * gradient.norm(), name


def test_the_head_in_pieces_equals_cross_entropy(monkeypatch):
    torch.manual_seed(0)
    hidden, weight = torch.randn(37, 16, requires_grad=True), torch.randn(50, 16)
    targets, scale = torch.randint(0, 50, (37,)), torch.rand(37)
    reference = F.cross_entropy(hidden @ weight.T, targets, reduction="none")
    (expected,) = torch.autograd.grad((reference * scale).sum(), hidden)
    for rows in (1, 8, 37, 500):
        monkeypatch.setattr(fast, "HEAD_ROWS", rows)
        nll = fast._HeadNLL.apply(hidden, weight, targets)
        (gradient,) = torch.autograd.grad((nll * scale).sum(), hidden)
        torch.testing.assert_close(nll, reference)
        torch.testing.assert_close(gradient, expected)


def test_the_head_in_pieces_survives_logits_that_overflow_an_exponential():
    hidden, weight = torch.full((1, 1), 1.0), torch.tensor([[300.0], [-300.0]])
    nll = fast._HeadNLL.apply(hidden, weight, torch.tensor([1]))
    assert nll.item() == pytest.approx(600.0)


@pytest.mark.parametrize("change", ["bias", "softcap", "trained head"])
def test_a_head_that_is_not_plain_goes_the_usual_way(encoded, change):
    model = load_base(NANO, "bf16").float()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    head = model.get_output_embeddings()
    if change == "bias":
        head.bias = torch.nn.Parameter(torch.randn(head.weight.shape[0]), requires_grad=False)
    elif change == "softcap":
        model.config.final_logit_softcapping = 1e-3  # Gemma's name; Llama's forward ignores it
    else:
        head.weight.requires_grad_(True)
    nll, _ = response_token_nll(model, flat_batch(encoded))
    torch.testing.assert_close(nll, padded_reference(model, encoded), rtol=1e-5, atol=1e-6)
    if change == "trained head":
        assert lora_gradients(model, nll)["model.embed_tokens.weight"].abs().max() > 0  # tied


def test_a_failing_forward_leaves_the_head_in_place(encoded):
    model = adapted(True)
    batch = flat_batch(encoded)
    with pytest.raises(ValueError, match="exactly one of"):
        fast.token_nll(model, {**batch, "input_ids": None}, torch.tensor([0]), torch.tensor([0]))
    assert "forward" not in vars(model.get_output_embeddings())
    assert model(input_ids=torch.tensor([[1, 2]])).logits.shape == (1, 2, 258)


@pytest.mark.filterwarnings("ignore:.lora_bias=True. was passed")  # by PEFT, beside the test
@pytest.mark.parametrize("case", ["disabled", "merged", "dora", "lora_bias", "dropout", "two"])
def test_what_is_not_plain_is_left_to_peft(case):
    changes = {
        "dora": {"use_dora": True},
        "lora_bias": {"lora_bias": True},
        "dropout": {"lora_dropout": 0.5},
    }.get(case, {})
    ids = torch.arange(20)[None]
    outs = []
    for lean in (False, True):
        model = adapted(lean, **changes).eval()
        if case == "dropout":
            model.train()
        if case == "merged":
            model.merge_adapter()
        if case == "two":
            model.add_adapter("other", model.peft_config["default"])
            model.base_model.set_adapter(["default", "other"])
        torch.manual_seed(1)
        if case == "disabled":
            with model.disable_adapter():
                outs.append(model(input_ids=ids).logits)
        else:
            outs.append(model(input_ids=ids).logits)
    torch.testing.assert_close(*outs, rtol=0, atol=0)


def test_the_plain_case_is_taken(monkeypatch):
    """Else the tests above would hold PEFT against itself."""
    calls = []
    real = fast._LoraProduct.apply
    spy = types.SimpleNamespace(apply=lambda *args: calls.append(1) or real(*args))
    monkeypatch.setattr(fast, "_LoraProduct", spy)
    adapted(True)(input_ids=torch.arange(9)[None])
    assert len(calls) == 7 * 2


def test_adapters_of_a_bf16_model_stay_float32_and_get_float32_gradients(encoded):
    model = fast.make_fast(
        get_peft_model(load_base(NANO), LoraConfig(r=4, target_modules="all-linear"))
    ).train()
    nll, _ = response_token_nll(model, flat_batch(encoded))
    gradients = lora_gradients(model, nll)
    assert gradients and all(g.dtype == torch.float32 for g in gradients.values())
    assert nll.dtype == torch.float32


def test_saved_adapters_are_plain_peft_files(tmp_path):
    from peft import PeftModel

    lean = adapted(True)
    lean.save_pretrained(tmp_path)
    plain = PeftModel.from_pretrained(load_base(NANO, "bf16").float(), tmp_path)
    ids = torch.arange(30)[None]
    torch.testing.assert_close(lean(input_ids=ids).logits, plain(input_ids=ids).logits)


def test_attention_with_a_mask_equals_transformers_on_a_left_padded_batch():
    model = load_base(NANO, "bf16").float()
    ids = torch.tensor([[1, 1, 9, 30, 31], [40, 41, 42, 43, 44]])
    real = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]]).bool()
    causal = torch.ones(5, 5).tril().bool()
    mask = ((causal & real[:, None]) | torch.eye(5).bool())[:, None]
    position = (real.long().cumsum(1) - 1).clamp(min=0)
    ours = model(input_ids=ids, attention_mask=mask, position_ids=position).logits
    model.set_attn_implementation("eager")
    theirs = model(input_ids=ids, attention_mask=real.long(), position_ids=position).logits
    torch.testing.assert_close(ours[real], theirs[real], rtol=1e-5, atol=1e-5)
