"""bf16 products in float32, for processors without instructions for them, in a process of its own:
what torch calls is replaced there for good."""

import subprocess
import sys

import pytest

BEGIN = """
import torch
import torch.nn.functional as F
from neft_utils.train.bf16_products import widen_products

torch.manual_seed(0)
a, b, c = (torch.randn(*s).bfloat16() for s in ((7, 40), (40, 9), (7, 9)))
many, others = torch.randn(3, 7, 40).bfloat16(), torch.randn(3, 40, 9).bfloat16()
vector, query = torch.randn(40).bfloat16(), torch.randn(1, 2, 11, 8).bfloat16()
x, y = torch.randn(7, 40), torch.randn(40, 9)
before = x @ y, torch.mm(x, y, out=torch.empty(7, 9)), torch.addmm(c.float(), x, y, beta=0.5)
plain = a @ b
assert widen_products(True) and widen_products(True)


def same(found, wanted):  # wanted: in float32; the result is that, rounded once
    assert found.dtype == torch.bfloat16 and torch.equal(found, wanted.bfloat16())
"""
BODIES = {
    "products": """
same(a @ b, a.float() @ b.float())
out = torch.empty(7, 9, dtype=torch.bfloat16)
assert torch.mm(a, b, out=out) is out
same(out, a.float() @ b.float())
scaled = {'beta': 0.5, 'alpha': 2}
same(torch.addmm(c, a, b, **scaled), torch.addmm(c.float(), a.float(), b.float(), **scaled))
kept = c.clone()
assert kept.addmm_(a, b, alpha=2) is kept
same(kept, torch.addmm(c.float(), a.float(), b.float(), alpha=2))
torch.addmm(c, a, b, out=kept)
same(kept, torch.addmm(c.float(), a.float(), b.float()))
same(torch.bmm(many, others), many.float() @ others.float())
held = torch.empty(3, 7, 9, dtype=torch.bfloat16)
torch.bmm(many, others, out=held)
same(held, many.float() @ others.float())
same(torch.baddbmm(held, many, others), torch.baddbmm(held.float(), many.float(), others.float()))
same(F.linear(many, b.T.contiguous()), many.float() @ b.float())
same(F.linear(a, b.T, c[0]), F.linear(a.float(), b.T.float(), c[0].float()))
""",
    "one row and other dtypes are torch's own": """
one = a[:1].float() @ b.float()
assert ((a[:1] @ b).float() - one).abs().max() < 0.02 * one.abs().max()
after = x @ y, torch.mm(x, y, out=torch.empty(7, 9)), torch.addmm(c.float(), x, y, beta=0.5)
assert all(torch.equal(*pair) for pair in zip(before, after))
assert (a.half() @ b.half()).dtype == torch.float16
try:
    torch.mm(a, y)
except RuntimeError as error:
    assert "dtype" in str(error) or "same" in str(error), error
else:
    raise AssertionError("torch multiplies no two dtypes")
""",
    "gradients": """
def gradients(*inputs):
    inputs = [one.clone().requires_grad_() for one in inputs]
    a, b, query = inputs
    out = F.scaled_dot_product_attention(query, query, query, is_causal=True)
    (F.linear(a, b.T).float().pow(2).sum() + out.float().pow(2).sum()).backward()
    return [one.grad for one in inputs]
found = gradients(a, b, query)
for mine, wanted in zip(found, gradients(*(one.float() for one in (a, b, query)))):
    assert mine.dtype == torch.bfloat16
    assert (mine.float() - wanted).abs().max() < 0.02 * wanted.abs().max()
""",
    "a model's losses": """
from neft_utils.base.profiles import Model
from neft_utils.train.base_models import load_base
model = load_base(Model(source="nano"))
ids = torch.randint(5, 200, (2, 60))
narrow = model(input_ids=ids, labels=ids).loss.detach()
assert abs(float(narrow) - float(model.float()(input_ids=ids, labels=ids).loss.detach())) < 0.01
""",
}


@pytest.mark.parametrize("body", BODIES)
def test_a_product_is_that_of_float32_rounded_once(body):
    done = subprocess.run(
        [sys.executable, "-c", BEGIN + BODIES[body]], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr, done.stderr


def test_a_processor_is_asked_unless_told():
    script = (
        "from unittest import mock\n"
        "from neft_utils.train import bf16_products as products\n"
        "for without in (False, True):\n"
        "    with mock.patch.object(products, 'without_bf16', lambda: without):\n"
        "        assert products.widen_products() is without\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
