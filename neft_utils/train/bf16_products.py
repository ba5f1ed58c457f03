"""Products of bf16 matrices on processors that have no instructions for them.

Most laptops have none: there torch takes seven times as long for a product of bf16 matrices as
for one of float32. Here both sides are widened, multiplied in float32, and the result is rounded
to bf16 once, which is what the instructions do too; only the order of the sums differs.
"""

import functools
import warnings

import torch

from neft_utils.base.provenance import without_bf16

# A product with a single row reads each weight once and is bound by memory: torch's own is best.
PRODUCTS = ("mm", "mm.out", "addmm", "addmm.out", "addmm_", "bmm", "bmm.out", "baddbmm")
SDPA = "_scaled_dot_product_flash_attention_for_cpu"
_library = []  # torch keeps what is replaced as long as this lives


def widen_products(wanted=None):
    """Let torch multiply bf16 matrices on the CPU in float32, in this process from now on.

    wanted: True or False; None asks the processor. Returns whether it is so. Products on a GPU and
    of other dtypes are torch's own.
    """
    if wanted is None:
        wanted = without_bf16()
    if wanted and not _library:
        _library.append(torch.library.Library("aten", "IMPL"))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch tells everyone who replaces a kernel
            for name in (*PRODUCTS, SDPA, f"{SDPA}_backward"):
                own = torch.library.get_kernel(f"aten::{name}", "CPU")
                replacement = functools.partial(_wide, name, own)
                _library[0].impl(name, replacement, "CPU", with_keyset=True)
    return bool(_library)


def _wide(name, own, keys, *args, out=None, **kwargs):
    """A kernel of torch with its bf16 tensors widened, and what it gives rounded again.

    out: the tensor to write to; "addmm_" writes to its first argument.
    """
    given = {} if out is None else {"out": out}
    tensors = [x for x in args if isinstance(x, torch.Tensor)]
    # Of attention's backward some are float32; a product of two dtypes is torch's to refuse.
    narrow = [x.dtype == torch.bfloat16 for x in tensors]
    wanted = all(narrow) if name in PRODUCTS else narrow[0]
    if not wanted or _one_row(name, args):
        return own.call_boxed(keys, *args, **given, **kwargs)
    if name == "addmm_":
        name, out = "addmm", args[0]
    operator = getattr(torch.ops.aten, name.split(".")[0]).default
    kwargs = {key: _widened(value) for key, value in kwargs.items()}
    found = operator(*map(_widened, args), **kwargs)
    if out is not None:
        return out.copy_(found)
    if name == SDPA:  # the second is the logarithm of each row's sum, float32 in either case
        return found[0].bfloat16(), found[1]
    if isinstance(found, tuple):
        return tuple(x.bfloat16() for x in found)
    return found.bfloat16()


def _widened(value):
    bf16 = isinstance(value, torch.Tensor) and value.dtype == torch.bfloat16
    return value.float() if bf16 else value


def _one_row(name, args):
    return name == "mm" and args[0].shape[0] == 1
