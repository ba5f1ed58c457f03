"""The noise on a CUDA GPU: in every layout the bits of a CPU, and no wait for the device."""

import contextlib

import pytest
import torch
from test_noise import LENGTHS, Toy, drawn, packed, ragged

from neft_utils.noise import noisy_embeddings

pytestmark = pytest.mark.gpu
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
OFFSETS = torch.tensor([0, *torch.tensor(LENGTHS).cumsum(0)], dtype=torch.int32)
LAYOUTS = {
    "padded right": lambda: ragged(),
    "padded left": lambda: ragged(side="left", extra=3),
    "positions": lambda: packed(),
    "offsets": lambda: {"input_ids": packed()["input_ids"], "cu_seq_lens_q": OFFSETS},
}


def there(batch):
    return {name: value.to(DEVICE) for name, value in batch.items()}


@contextlib.contextmanager
def no_wait():
    """In here whatever waits for the device is an error."""
    if DEVICE == "cpu":
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("length", ["sequence", "padded", "packed"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_has_the_bits_that_it_has_on_a_cpu(layout, length, dtype):
    batch, options = LAYOUTS[layout](), {"length": length}
    here = drawn(Toy(dtype=dtype), 5.0, options, step=3, **batch)
    card = drawn(Toy(dtype=dtype, device=DEVICE), 5.0, options, step=3, **there(batch))
    assert here.abs().sum() > 0 and torch.equal(card.cpu(), here)


@pytest.mark.parametrize("where", ["all", "prompt", "response"])
@pytest.mark.parametrize("distribution", ["uniform", "gaussian", "rademacher"])
def test_no_forward_waits_for_the_card(distribution, where):
    model, batches = Toy(device=DEVICE), [there(make()) for make in LAYOUTS.values()]
    labels = [batch["input_ids"].clone() for batch in batches]
    for one in labels:
        one[:, :2] = -100
    with noisy_embeddings(model, distribution=distribution, where=where) as noise:
        model(**batches[0], labels=labels[0])  # constants may come to the card once
        with no_wait():
            for batch, label in zip(batches, labels, strict=True):
                model(**batch, labels=label)
        assert noise._calls == 1 + len(batches)
