"""Log-probabilities of several continuations of one prompt, which is read once.

The continuations stand behind the prompt in one row; each sees the prompt and itself, at the
positions that it would have alone. Five candidates of four tokens after a chat prompt of ninety
take a quarter of the tokens that they take one by one.
"""

import torch

from neft_utils.train.attention import whole_mask
from neft_utils.train.fast import make_fast, token_nll
from neft_utils.train.losses import response_losses
from neft_utils.train.own_path import agrees, once, own_attention, own_nll

ROW_TOKENS = 512  # of one forward; attention looks at the square of it


@torch.no_grad()
def continuation_logprobs(model, items, say=print):
    """Log-probabilities in nats, summed over tokens: a list for each item, in the given order.

    items: [(ids of the prompt, [ids of each continuation])], none of them empty. Puts the model in
    eval mode. Where the shared prompt does not give what the model's own path gives (position
    biases, recurrent states), every continuation is computed by itself and `say` is told.
    """
    model.eval()
    longest = max(len(prompt) + len(one) for prompt, some in items for one in some)
    make_fast(model, longest)
    if difference := agrees(model, longest, "branches", _compare):
        found = "a prompt shared by its continuations differs from the model's own path"
        once(say, model, "branches", f"{found} ({difference}); each is computed by itself, slower")
        encoded = [
            {"input_ids": [*prompt, *one], "completion_mask": [0] * len(prompt) + [1] * len(one)}
            for prompt, some in items
            for one in some
        ]
        means = iter(response_losses(model, encoded, ROW_TOKENS)[0])
        return [[-next(means) * len(one) for one in some] for _, some in items]
    sizes = [len(prompt) + sum(map(len, some)) for prompt, some in items]
    out, row, total = [None] * len(items), [], 0
    for i in [*sorted(range(len(items)), key=sizes.__getitem__), None]:
        if row and (i is None or total + sizes[i] > ROW_TOKENS):
            for j, nll in zip(row, _row_nll(model, [items[j] for j in row]), strict=True):
                out[j] = [-float(one.sum()) for one in nll]
            row, total = [], 0
        if i is not None:
            row.append(i)
            total += sizes[i]
    return out


@whole_mask()
def _row_nll(model, items):
    """NLL in nats of every token of each continuation: a list of tensors for each item."""
    ids, places, item, branch, before = [], [], [], [], []
    for number, (prompt, some) in enumerate(items):
        last = len(ids) + len(prompt) - 1
        for which, tokens in enumerate([prompt, *some]):
            first, start = len(ids), 0 if which == 0 else len(prompt)
            if which:  # each token is predicted at the one before it, the first at the prompt's end
                before += [last, *range(first, first + len(tokens) - 1)]
            ids += tokens
            places += range(start, start + len(tokens))
            item += [number] * len(tokens)
            branch += [which] * len(tokens)
    device = next(model.parameters()).device
    ids, places, item, branch = (
        torch.tensor(x, device=device) for x in (ids, places, item, branch)
    )
    mask = (item[:, None] == item) & ((branch == 0) | (branch[:, None] == branch))
    inputs = {
        "input_ids": ids[None],
        "attention_mask": mask.tril()[None, None],
        "position_ids": places[None],
    }
    nll = token_nll(model, inputs, torch.tensor(before, device=device), ids[branch > 0])
    parts = iter(nll.float().split([len(one) for _, some in items for one in some]))
    return [[next(parts) for _ in some] for _, some in items]


def _compare(model, documents):
    """[(own, shared)] NLL of two halves behind the first half of each document."""
    items, own = [], []
    with own_attention(model):
        for ids in documents:
            half = len(ids) // 2
            others = [ids[half:], ids[half:].flip(0)]
            items.append((ids[:half].tolist(), [one.tolist() for one in others]))
            for one in others:
                whole = torch.cat([ids[:half], one])
                own.append(own_nll(model, whole, torch.arange(half, len(whole))))
    shared = [one for some in _row_nll(model, items) for one in some]
    return list(zip(own, shared, strict=True))
