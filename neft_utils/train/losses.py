"""How a response is scored: nats per response token, the head on response positions only."""

import torch
import torch.nn.functional as F

from neft_utils.train.encoding import flat_batch, token_batches
from neft_utils.train.fast import make_fast, token_nll
from neft_utils.train.own_path import inner_model, own_logits, spans


def response_token_nll(model, batch):
    """NLL in nats of every response token of a padding-free batch: (nll, row positions).

    The head runs on the response positions only: 21 % of SmolLM2-135M's forward is its head. A
    model that the fast path does not serve (`fast.make_fast`) gets one document at a time.
    """
    labels = batch["labels"][0]
    positions = (labels != -100).nonzero()[:, 0]  # never a document's first token
    if getattr(inner_model(model), "neft_apart", False):
        nll = []
        for begin, end in spans(batch["cu_seq_lens_q"]):
            chosen = positions[(positions >= begin) & (positions < end)]
            own = own_logits(model, batch["input_ids"][0, begin:end], chosen - begin - 1)
            nll.append(F.cross_entropy(own, labels[chosen], reduction="none"))
        return torch.cat(nll), positions
    inputs = {k: v for k, v in batch.items() if k not in ("labels", "seq_idx")}
    return token_nll(model, inputs, positions - 1, labels[positions]), positions


@torch.no_grad()
def response_losses(model, encoded, batch_tokens):
    """(nll, end_nll) of encoded examples, two lists in the given order, in nats.

    nll: mean per response token; end_nll: of the last one alone, the end of turn. Puts the model
    in eval mode, so no noise and no dropout; examples are grouped by length into rows of at most
    `batch_tokens` tokens (one example at least).
    """
    model.eval()
    if hasattr(inner_model(model), "neft_apart") and encoded:  # else a model of one's own making
        make_fast(model, max(len(e["input_ids"]) for e in encoded))
    device = next(model.parameters()).device
    order = sorted(range(len(encoded)), key=lambda i: -len(encoded[i]["input_ids"]))
    means, ends = [0.0] * len(encoded), [0.0] * len(encoded)
    for chosen in token_batches(encoded, order, batch_tokens):
        nll, positions = response_token_nll(model, flat_batch([encoded[i] for i in chosen], device))
        stop = torch.tensor([len(encoded[i]["input_ids"]) for i in chosen], device=device).cumsum(0)
        document = torch.searchsorted(stop, positions, right=True)
        sums = torch.zeros(len(chosen), device=device).index_add_(0, document, nll)
        counts = [sum(encoded[i]["completion_mask"]) for i in chosen]
        last = nll[torch.tensor(counts, device=device).cumsum(0) - 1]
        rows = zip(chosen, sums.tolist(), counts, last.tolist(), strict=True)
        for i, value, count, end in rows:
            means[i], ends[i] = value / count, end
    return means, ends


def response_nll(model, encoded, batch_tokens):
    """The first of `response_losses`: mean NLL per response token of each example, in nats."""
    return response_losses(model, encoded, batch_tokens)[0]
