"""Models that several test files share."""

import torch

from neft_utils import model as m
from neft_utils.config import Model


def lively_nano():
    """The nano model with weights large enough that its answers depend on what they follow.

    As initialised it repeats one byte for ever, whatever the prompt.
    """
    model = m.load_base(Model(source="nano"), "bf16").float()
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=0.3 if "proj" in name else 1.0)
    return model
