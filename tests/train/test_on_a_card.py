"""What notebooks 3 and 4 do on a CUDA GPU and nowhere else, held against what a CPU does."""

import json

import bitsandbytes.functional as bnb
import pandas as pd
import pytest
import torch
from bitsandbytes.nn import Linear4bit
from tiny import CUT, Lab

from neft_utils.base.profiles import Model
from neft_utils.train.attention import per_document_attention
from neft_utils.train.base_models import load_base

pytestmark = pytest.mark.gpu
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NANO = Model(source="nano")


@pytest.fixture
def lab(tmp_path, monkeypatch):
    """A function that makes a prepared Lab on the card."""
    return lambda **changes: Lab(tmp_path, monkeypatch, device=DEVICE, **changes).prepare()


@pytest.mark.parametrize("window", [None, 16])
@pytest.mark.parametrize(("heads", "size"), [((9, 3), 64), ((4, 1), 256)])
def test_attention_of_a_whole_row_is_that_of_its_documents(heads, size, window):
    """SmolLM2's and Gemma's heads; outputs and gradients, against SDPA in float32."""
    torch.manual_seed(0)
    offsets, count = torch.tensor([0, 5, 69, 269], dtype=torch.int32), (heads[0], *[heads[1]] * 2)
    rows = [torch.randn(1, n, 269, size, device=DEVICE).bfloat16() for n in count]
    options = {"cu_seq_lens_q": offsets.to(DEVICE), "max_length_q": 200, "scaling": size**-0.5}
    options["sliding_window"] = window
    found = []
    for dtype in (torch.bfloat16, torch.float32):
        parts = [row.to(dtype).requires_grad_(True) for row in rows]
        out, _ = per_document_attention(None, *parts, None, **options)
        (out.float() * torch.linspace(-1, 1, size, device=DEVICE)).sum().backward()
        found.append([out, *(part.grad for part in parts)])
    for name, whole, single in zip(("out", "query", "key", "value"), *found, strict=True):
        close = {"rtol": 3e-2, "atol": 3e-2 * float(single.float().abs().max())}
        torch.testing.assert_close(whole.float(), single.float(), **close, msg=name)


def test_a_model_in_4_bits_computes_what_its_rounded_weights_do():
    packed = load_base(NANO, "nf4")
    plain = load_base(NANO, "nf4_dequantized")
    layers = {n: m for n, m in packed.named_modules() if isinstance(m, Linear4bit)}
    assert layers
    for name, layer in layers.items():
        weight = bnb.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
        assert torch.equal(weight, plain.get_submodule(name).weight), name
    ids = torch.arange(200, device=DEVICE)[None] % 250
    with torch.no_grad():
        both = [model(input_ids=ids).logits.float() for model in (packed, plain)]
    torch.testing.assert_close(*both, rtol=2e-2, atol=2e-2 * float(both[1].abs().max()))


def test_rounding_to_4_bits_is_the_cpus():
    """Parcels and caches hold weights that another machine has rounded."""
    torch.manual_seed(0)
    weight = torch.randn(512, 640).bfloat16()
    back = []
    for device in ("cpu", DEVICE):
        packed, state = bnb.quantize_4bit(
            weight.to(device), quant_type="nf4", compress_statistics=True
        )
        back.append(bnb.dequantize_4bit(packed, state).cpu())
    assert (back[0] == back[1]).float().mean() > 0.999  # but for ties between two levels


def test_a_cut_run_goes_on_from_its_checkpoint(lab):
    often = lab(train={"checkpoint_steps": 1})
    run = often.train()["run"].folder
    whole = pd.read_csv(run / "train_log.csv")
    with pytest.raises(KeyboardInterrupt):
        often.train(edits=[CUT])
    assert not (run / "provenance.json").exists()
    often.train()
    assert json.loads((run / "noise.json").read_text("utf-8"))["from_step"] == 3
    resumed = pd.read_csv(run / "train_log.csv")
    assert resumed.step.tolist() == whole.step.tolist()
    # FlashAttention adds gradients in no fixed order.
    assert resumed.train_loss.tolist() == pytest.approx(whole.train_loss.tolist(), rel=1e-3)
    noise = json.loads((run / "noise.json").read_text("utf-8"))
    assert noise["noise_rms"] == pytest.approx(noise["expected_rms"], rel=0.02)


@pytest.mark.parametrize(
    "changes",
    [
        {"model": {"base_weights": "nf4"}, "evaluate": {"stability_rows": 0}},
        {"model": {"base_weights": "bf16"}, "train": {"method": "full", "learning_rate": 1e-3}},
        {"train": {"gradient_checkpointing": True}},
    ],
    ids=["4 bits", "full", "checkpointing"],
)
def test_it_trains_and_scores_there(lab, changes):
    asked = {"length_arm_prompts": 0, **changes.pop("evaluate", {})}
    nano = lab(evaluate=asked, **changes)
    run = nano.train()["run"].folder
    log = pd.read_csv(run / "train_log.csv").validation_nll.dropna()
    assert log.iloc[-1] < log.iloc[0]
    assert nano.score()["losses"].nll.gt(0).all()
    noise = json.loads((run / "noise.json").read_text("utf-8"))
    assert noise["noise_rms"] == pytest.approx(noise["expected_rms"], rel=0.02)
