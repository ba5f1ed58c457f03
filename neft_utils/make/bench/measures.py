"""What a process measures besides training: answers, losses without gradient, the noise's share.

Each takes (profile, trained model, tokenizer, test rows, encoded training examples).
"""

import statistics
import time

from neft_utils.make.bench.shared import BATCH, NOISE_ALPHA, spread


def _one_by_one(profile, tuned, tokenizer, test, encoded):
    """Tokens/s of transformers' `generate`, prompt by prompt, as a user would call it."""
    import torch

    from neft_utils.train.encoding import prompt_ids

    rates = []
    for row in test[:5]:
        ids = torch.tensor([prompt_ids(tokenizer, row["prompt"])])
        started = time.perf_counter()
        with torch.no_grad():
            out = tuned.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                max_new_tokens=profile.evaluate.max_new_tokens,
                repetition_penalty=profile.evaluate.repetition_penalty,
                pad_token_id=tokenizer.pad_token_id,
            )
        rates.append((out.shape[1] - ids.shape[1]) / (time.perf_counter() - started))
    return spread(rates)


def _answers(profile, tuned, tokenizer, test, encoded):
    """Tokens/s of every test prompt of the profile in one batch, five times.

    The rate grows with the batch: its last long answers are alone in every step.
    """
    from neft_utils.evaluate.generate import answer

    settings, rates = profile.evaluate, []
    prompts = [row["prompt"] for row in test]
    for _ in range(5):
        started = time.perf_counter()
        answers = answer(
            tuned,
            tokenizer,
            prompts,
            max_new_tokens=settings.max_new_tokens,
            batch_size=len(prompts),
            repetition_penalty=settings.repetition_penalty,
        )
        rates.append(sum(a["n_tokens"] for a in answers) / (time.perf_counter() - started))
    return spread(rates)


def _forward(profile, tuned, tokenizer, test, encoded):
    """Tokens/s of scoring the training examples without gradient, five times."""
    from neft_utils.train.losses import response_nll

    tokens, rates = sum(len(one["input_ids"]) for one in encoded), []
    for _ in range(5):
        started = time.perf_counter()
        response_nll(tuned, encoded, profile.evaluate.batch_tokens)
        rates.append(tokens / (time.perf_counter() - started))
    return spread(rates)


def _noise(profile, tuned, tokenizer, test, encoded):
    """The noise's share of a step in per cent: a stopwatch around its hook, one thread.

    Differences of a few thousandths between whole steps would drown. On a GPU kernels run on
    after the hook: this is meant for a CPU.
    """
    import torch

    from neft_utils.noise import EmbeddingNoise
    from neft_utils.train.encoding import flat_batch
    from neft_utils.train.losses import response_token_nll

    class Timed(EmbeddingNoise):
        spent = 0.0

        def _add_noise(self, *args):
            started = time.perf_counter()
            output = super()._add_noise(*args)
            self.spent += time.perf_counter() - started
            return output

    torch.set_num_threads(1)
    noise, shares = Timed(NOISE_ALPHA).attach(tuned.train()), []
    for begin in range(0, len(encoded), BATCH):
        batch, noise.spent = flat_batch(encoded[begin : begin + BATCH]), 0.0
        started = time.perf_counter()
        response_token_nll(tuned, batch)[0].mean().backward()
        shares.append(100 * noise.spent / (time.perf_counter() - started))
        tuned.zero_grad()
    noise.remove()
    shares = [round(share, 4) for share in shares[1:]]
    return {
        "noise_overhead_percent": statistics.median(shares),
        "noise_overhead_percent_low": min(shares),
        "noise_overhead_percent_high": max(shares),
    }


MEASURES = {
    "answers_one_by_one": _one_by_one,
    "answers": _answers,
    "forward": _forward,
    "noise": _noise,
}
