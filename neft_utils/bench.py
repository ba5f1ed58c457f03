"""What the noise costs: its share of a training step, measured on an otherwise idle machine."""

import statistics
import time

import torch

from neft_utils import data, provenance
from neft_utils.model import encode, flat_batch, load_base, load_tokenizer, response_token_nll
from neft_utils.noise import EmbeddingNoise
from neft_utils.train import lora_model


class _TimedNoise(EmbeddingNoise):
    """The noise with a stopwatch around its hook on the embedding; seconds in `spent`."""

    spent = 0.0

    def _add_noise(self, *args):
        started = time.perf_counter()
        output = super()._add_noise(*args)
        self.spent += time.perf_counter() - started
        return output


def noise_overhead(profile, paths, steps=10):
    """{"noise_overhead_percent", "_low", "_high", "steps", "threads", …} of training steps.

    Times the noise inside real steps (forward and backward of one micro-batch, one thread),
    where differences of a few thousandths between whole steps would drown. The first step
    warms up and does not count. Meant for a CPU: on a GPU kernels run on after the hook.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    seed, size = profile.all_seeds()[0], profile.train.micro_batch_size
    tokenizer = load_tokenizer(profile.model)
    rows = data.load_split(paths.processed, f"train-s{seed}")[: size * (steps + 1)]
    encoded = [encode(tokenizer, row) for row in rows]
    model = lora_model(load_base(profile.model), profile.train, seed).train()
    alpha = profile.arms[profile.confirmatory.treatment].noise_alpha
    noise, shares = _TimedNoise(alpha).attach(model), []
    for begin in range(0, len(encoded), size):
        batch, noise.spent = flat_batch(encoded[begin : begin + size]), 0.0
        started = time.perf_counter()
        response_token_nll(model, batch)[0].mean().backward()
        shares.append(100 * noise.spent / (time.perf_counter() - started))
        model.zero_grad()
    noise.remove()
    torch.set_num_threads(threads)
    shares = shares[1:]
    return {
        "noise_overhead_percent": round(statistics.median(shares), 4),
        "noise_overhead_percent_low": round(min(shares), 4),
        "noise_overhead_percent_high": round(max(shares), 4),
        "steps": len(shares),
        "threads": 1,
        **{k: v for k, v in provenance.describe().items() if k in ("commit", "dirty", "device")},
    }
