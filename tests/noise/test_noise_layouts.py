"""Every layout that trainers produce gets the noise of its sequences, or is refused by name.

One matrix: layouts down, models of each kind across. What a layout gives is compared bit for bit
with a padded batch of the same sequences. A second list holds what is refused, and why.
"""

import warnings

import pytest
import torch
import transformers
from datasets import Dataset
from test_noise import Toy, drawn, packed, ragged, real, silenced, tiny
from torch.nn.attention.flex_attention import create_block_mask
from transformers import DataCollatorWithFlattening
from trl import pack_dataset
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from neft_utils.noise import noisy_embeddings
from neft_utils.train.attention import ATTENTION

masking_utils = pytest.importorskip("transformers.masking_utils")
LENGTHS = [9, 4, 1, 6]
TOTAL = sum(LENGTHS)
DOCUMENT = torch.cat([torch.full((n,), i) for i, n in enumerate(LENGTHS)])[None]
EDGES = torch.tensor([0, *LENGTHS]).cumsum(0).to(torch.int32)
ROW = packed(LENGTHS)
ROWS = [{"input_ids": (torch.arange(n) % 5 + 3).tolist()} for n in LENGTHS]
BLOCKS = (DOCUMENT[0][:, None] == DOCUMENT[0]) & torch.ones(TOTAL, TOTAL).tril().bool()
NOT_TO_BE_ADDED = torch.finfo(torch.float32).min


def flat(**more):
    return {"input_ids": ROW["input_ids"], **more}


def with_tail(value, pads=4, name="input_ids", row=None):
    """The row's tensor of that name with `pads` more cells, of `value` or counting on."""
    row = (ROW if row is None else row)[name]
    more = torch.full((1, pads), value) if value is not None else row[:, -1:] + 1 + torch.arange(4)
    return torch.cat([row, more.to(row.dtype)], 1)


def labelled(pads=4):
    """Labels that learn every token but each document's first, and no padding."""
    labels = ROW["input_ids"].masked_fill(ROW["position_ids"] == 0, -100)
    return torch.cat([labels, torch.full((1, pads), -100)], 1)


def trl(**options):
    return DataCollatorForLanguageModeling(pad_token_id=0, **options)(ROWS)


def flattened(**options):
    return DataCollatorWithFlattening(return_tensors="pt", **options)(ROWS)


def packed_by_trl(strategy, width):
    rows = Dataset.from_list(ROWS).with_format("arrow")
    rows = pack_dataset(rows, width, strategy).with_format(None)
    lengths = [n for row in rows for n in row.get("seq_lengths", [len(row["input_ids"])])]
    free = strategy != "wrapped"
    batch = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=free)(list(rows))
    return batch | {"LENGTHS": lengths}


def mrope(*leading):
    """Positions of text alone: all coordinates are equal."""
    return ROW["position_ids"].expand(*leading, 1, TOTAL)


def image_positions():
    """Two documents: 2 words, 2x2 of an image, 3 words; and 2x2 of an image, 7 words."""
    text = [torch.arange(2).expand(3, 2), torch.arange(3).expand(3, 3) + 4]
    image = torch.tensor([[0, 0, 0, 0], [0, 0, 1, 1], [0, 1, 0, 1]])
    first = torch.cat([text[0], image + 2, text[1]], 1)
    second = torch.cat([image, torch.arange(7).expand(3, 7) + 2], 1)
    return torch.cat([first, second], 1)[:, None]


def mixed_rows():
    """Rows of 9 | 4, 1, 6: several documents a row, and padding behind the first."""
    ids, mask = torch.zeros(2, 11, dtype=torch.long), torch.zeros(2, 11, dtype=torch.long)
    positions = torch.zeros(2, 11, dtype=torch.long)
    ids[0, :9], ids[1] = ROW["input_ids"][0, :9], ROW["input_ids"][0, 9:]
    positions[0, :9], positions[1] = ROW["position_ids"][0, :9], ROW["position_ids"][0, 9:]
    mask[0, :9], mask[1] = 1, 1
    return {"input_ids": ids, "attention_mask": mask, "position_ids": positions}


def padded_without_mask():
    batch = ragged(LENGTHS)
    mask = batch.pop("attention_mask")
    return batch | {"labels": batch["input_ids"].masked_fill(mask == 0, -100), "REAL": mask}


def documents_with_own_padding():
    """Each document padded to a multiple of 4, as context-parallel collators do."""
    ids, positions, labels = [], [], []
    for row in ROWS:
        pads = -len(row["input_ids"]) % 4
        ids += row["input_ids"] + [0] * pads
        positions += range(len(row["input_ids"]) + pads)
        labels += row["input_ids"] + [-100] * pads
    named = {"input_ids": ids, "position_ids": positions, "labels": labels}
    return {name: torch.tensor([values]) for name, values in named.items()}


# Name: a batch whose sequences are those of LENGTHS (or of its own "LENGTHS"). Cells that are no
# padding are those whose id is not 0 (or "REAL").
LAYOUTS = {
    "padded right": lambda: ragged(LENGTHS),
    "padded left": lambda: ragged(LENGTHS, "left", extra=3),
    "padded, mask of booleans": lambda: _changed(ragged(LENGTHS), attention_mask=torch.bool),
    "padded, mask of floats": lambda: _changed(ragged(LENGTHS), attention_mask=torch.float32),
    "padded, labels and no mask": padded_without_mask,
    "padded rows of several documents": mixed_rows,
    "row, position_ids": lambda: flat(position_ids=ROW["position_ids"]),
    "row, position_ids from 2": lambda: flat(position_ids=ROW["position_ids"] + 2),
    "row, one dimension of position_ids": lambda: flat(position_ids=ROW["position_ids"][0]),
    "row, position_ids and a mask of ones": lambda: ROW | {"attention_mask": torch.ones(1, TOTAL)},
    "row, cu_seq_lens_q": lambda: flat(cu_seq_lens_q=EDGES),
    "row, cu_seq_lens_q repeated at the end": lambda: flat(
        cu_seq_lens_q=torch.cat([EDGES, EDGES[-1:]])
    ),
    "row, cu_seq_lens_q of (1, n)": lambda: flat(cu_seq_lens_q=EDGES[None]),
    "row, seq_idx": lambda: flat(seq_idx=DOCUMENT.int()),
    "row, document ids in the mask": lambda: flat(attention_mask=DOCUMENT + 1),
    "row, document ids and padding in the mask": lambda: {
        "input_ids": with_tail(0),
        "attention_mask": with_tail(-1, name="d", row={"d": DOCUMENT}) + 1,
    },
    "row, 3 coordinates": lambda: flat(position_ids=mrope(3)),
    "row, text and 3 coordinates": lambda: flat(position_ids=mrope(4)),
    "row, 2 x 3 coordinates": lambda: flat(position_ids=mrope(2, 3)),
    "row of text and images": lambda: {
        "input_ids": ROW["input_ids"],
        "position_ids": image_positions(),
        "LENGTHS": [9, 11],
    },
    "row, 4-D mask": lambda: ROW | {"attention_mask": BLOCKS[None, None]},
    "row, 4-D mask to be added": lambda: (
        ROW | {"attention_mask": torch.where(BLOCKS, 0.0, NOT_TO_BE_ADDED)[None, None]}
    ),
    "row, 4-D mask, seq_idx": lambda: flat(
        seq_idx=DOCUMENT, attention_mask=BLOCKS[None, None].float()
    ),
    "row, masks by layer": lambda: (
        ROW | {"attention_mask": {"full_attention": BLOCKS[None, None], "sliding_attention": None}}
    ),
    "row, flex BlockMask": lambda: ROW | {"attention_mask": _block_mask()},
    "row, padding at position 0": lambda: {
        "input_ids": with_tail(0),
        "position_ids": with_tail(0, name="position_ids"),
    },
    "row, padding as one document": lambda: {
        "input_ids": with_tail(0),
        "position_ids": torch.cat([ROW["position_ids"], torch.arange(4)[None]], 1),
    },
    "row, padding that counts on": lambda: {
        "input_ids": with_tail(0),
        "position_ids": with_tail(None, name="position_ids"),
        "labels": labelled(),
    },
    "row, padding behind cu_seq_lens_q": lambda: {
        "input_ids": with_tail(0),
        "cu_seq_lens_q": EDGES,
    },
    "row, padding as a document of cu_seq_lens_q": lambda: {
        "input_ids": with_tail(0),
        "cu_seq_lens_q": torch.cat([EDGES, EDGES[-1:] + 4]),
    },
    "row, padding of seq_idx -1": lambda: {
        "input_ids": with_tail(0),
        "seq_idx": with_tail(-1, name="d", row={"d": DOCUMENT}),
    },
    "row, padding blocked in a 4-D mask": lambda: {
        "input_ids": with_tail(0),
        "position_ids": with_tail(None, name="position_ids"),
        "attention_mask": torch.nn.functional.pad(BLOCKS, (0, 4, 0, 4))[None, None],
    },
    "row, each document padded": documents_with_own_padding,
    "TRL padded": trl,
    "TRL padding-free": lambda: trl(padding_free=True),
    "TRL padding-free, pad_to_multiple_of": lambda: trl(padding_free=True, pad_to_multiple_of=8),
    "TRL padded with position_ids": lambda: trl(return_position_ids=True, pad_to_multiple_of=8),
    "TRL packed bfd": lambda: packed_by_trl("bfd", 12),
    "TRL packed bfd_split": lambda: packed_by_trl("bfd_split", 8),
    "TRL packed wrapped": lambda: packed_by_trl("wrapped", 10),
    "transformers flattening": flattened,
    "transformers flattening, from 2": lambda: flattened(position_ids_start=2),
    "transformers flattening, seq_idx": lambda: flattened(
        return_seq_idx=True, return_position_ids=False
    ),
    "transformers flattening, all": lambda: flattened(
        return_seq_idx=True, return_flash_attn_kwargs=True, separator_id=7
    ),
}
FAMILIES = {
    "Toy": ("Toy", {}),
    "Llama": ("Llama", {}),  # positions, one mask
    "Llama, pad is eos": ("Llama", {"eos_token_id": 0}),
    "Llama, no pad": ("Llama", {"pad_token_id": None}),
    "Qwen2": ("Qwen2", {}),  # masks by layer
    "GPT2": ("GPT2", {}),  # a second embedding, of positions
    "Gemma": ("Gemma", {}),  # scaled inside the embedding
}
# Without an id of padding nothing tells these from documents, and where it is the id of the end
# as well, a document that has no end (like ours) keeps the first of its padding.
NEEDS_PAD_ID = {
    "padded, labels and no mask",
    "row, padding at position 0",
    "row, padding as one document",
    "row, padding that counts on",
    "row, padding as a document of cu_seq_lens_q",
    "row, each document padded",
    "TRL packed bfd",  # ends with a document of one token, which looks like padding
}
NEEDS_AN_END = {
    "padded, labels and no mask",
    "row, padding that counts on",
    "row, each document padded",
}


def _changed(batch, **dtypes):
    return batch | {name: batch[name].to(dtype) for name, dtype in dtypes.items()}


def _block_mask():
    document = DOCUMENT[0]
    same = lambda b, h, q, k: (q >= k) & (document[q] == document[k])  # noqa: E731
    return create_block_mask(same, 1, None, TOTAL, TOTAL, device="cpu")


class Seen(Exception):
    """Ends a forward behind the embedding: what the model then does is not looked at here."""


class Toys(Toy):
    """Takes whatever a batch holds."""

    config = transformers.LlamaConfig(pad_token_id=0, eos_token_id=2, bos_token_id=1)

    def forward(self, input_ids=None, **given):
        return self.embed(input_ids)


def model_of(name):
    family, changes = FAMILIES[name]
    return Toys(hidden=32) if family == "Toy" else silenced(tiny(family, **changes))


def noise_of(model, batch):
    """Noise that the embedding puts out for the batch, (batch, width, 32)."""
    seen = []

    def see(module, args, output):
        seen.append(output.detach().clone())
        raise Seen

    with noisy_embeddings(model, 5.0) as noise, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        noise.set_step(0)
        handle = model.get_input_embeddings().register_forward_hook(see)
        try:
            model(**batch)
        except Seen:
            pass
        finally:
            handle.remove()
    (output,) = seen
    return output


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_layout_gets_the_noise_of_its_sequences(layout, family):
    if family == "Llama, no pad" and layout in NEEDS_PAD_ID:
        pytest.skip("padding has no id here")
    if family == "Llama, pad is eos" and layout in NEEDS_AN_END:
        pytest.skip("our documents have no end")
    batch = LAYOUTS[layout]()
    lengths = batch.pop("LENGTHS", LENGTHS)
    kept = batch.pop("REAL", batch["input_ids"] != 0).bool()
    alone = ragged(lengths)
    wanted = real(drawn(Toy(32), step=0, **alone), alone)
    noise = noise_of(model_of(family), batch)
    assert not noise[~kept].any()
    # Where documents of a padding-free row stand in another order than here, so does the noise.
    assert torch.equal(noise[kept], wanted)


@pytest.mark.parametrize("layout", ["row, padding at position 0", "row, padding that counts on"])
def test_padding_shifts_no_later_draw(layout):
    model = model_of("Llama")
    for batch in (ROW, LAYOUTS[layout]()):
        with noisy_embeddings(model) as noise, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            noise.set_step(0)
            model(**batch, use_cache=False)
            after = drawn_within(model, noise)
        if batch is ROW:
            wanted = after
    assert torch.equal(after, wanted)


def test_an_end_that_is_the_paddings_id_too_is_kept_and_padding_behind_it_is_not():
    model = model_of("Llama, pad is eos")
    ids = torch.tensor([[5, 6, 7, 0, 5, 6, 0, 0, 0, 0]])  # "5 6 7 end", "5 6 end", padding
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4, 5]])
    wanted = real(drawn(Toy(32), step=0, **ragged([4, 3])), ragged([4, 3]))
    for labelled_end in (True, False):
        labels = ids.clone()
        labels[0, [0, 4, 7, 8, 9]] = -100
        labels[0, [3, 6]] = 0 if labelled_end else -100
        noise = noise_of(model, {"input_ids": ids, "position_ids": positions, "labels": labels})
        assert torch.equal(noise[0, :7], wanted) and not noise[0, 7:].any()


def drawn_within(model, noise):
    """The noise of one more micro-batch of the same step."""
    seen = []
    look = model.get_input_embeddings().register_forward_hook(lambda m, a, o: seen.append(o))
    model(**ragged([5, 3]))
    look.remove()
    return seen[0].detach()


# -------------------------------------------------------------------------------- refused

REFUSED = {
    "a 4-D mask alone": (
        lambda: flat(attention_mask=BLOCKS[None, None]),
        r"attention_mask has shape \(1, 1, 20, 20\).*position_ids that restart",
    ),
    "a BlockMask alone": (
        lambda: flat(attention_mask=_block_mask()),
        "attention_mask has type BlockMask.*position_ids that restart",
    ),
    "masks by layer alone": (
        lambda: flat(attention_mask={"full_attention": BLOCKS[None, None]}),
        "attention_mask has type dict.*position_ids that restart",
    ),
    "a 3-D mask": (
        lambda: ROW | {"attention_mask": BLOCKS[None]},
        r"attention_mask has shape \(1, 20, 20\).*\(batch, tokens\) mask",
    ),
    "a list": (lambda: flat(attention_mask=[[1] * TOTAL]), "attention_mask has type list"),
    "a mask of other tokens": (
        lambda: flat(attention_mask=torch.ones(1, TOTAL + 3)),
        r"attention_mask has shape \(1, 23\), token ids \(1, 20\)",
    ),
    "position_ids of other tokens": (
        lambda: flat(position_ids=torch.arange(TOTAL + 1)[None]),
        r"position_ids have shape \(1, 21\), token ids \(1, 20\)",
    ),
    "the second half of a sequence": (
        lambda: flat(position_ids=torch.arange(TOTAL, 2 * TOTAL)[None]),
        "begin in their middle.*sequence parallelism",
    ),
    "the outer quarters of a sequence": (
        lambda: flat(position_ids=torch.cat([torch.arange(10), torch.arange(30, 40)])[None]),
        "begin in their middle",
    ),
    "cu_seq_lens_q of the whole of a divided row": (
        lambda: flat(cu_seq_lens_q=torch.tensor([0, 15, 40])),
        "begin in their middle",
    ),
    "coordinates of a piece": (
        lambda: flat(position_ids=torch.arange(9, 9 + TOTAL).expand(3, 1, TOTAL)),
        "begin in their middle",
    ),
}


@pytest.mark.parametrize("layout", REFUSED)
@pytest.mark.parametrize("family", ["Toy", "Llama"])
def test_what_is_not_understood_is_refused_by_name(layout, family):
    batch, message = REFUSED[layout]
    model = model_of(family)
    with (
        noisy_embeddings(model),
        pytest.raises((ValueError, RuntimeError), match=f"(?s){message}"),
    ):
        model(**batch())


def test_later_chunks_of_a_sequence_are_refused_and_an_empty_cache_is_not():
    model = tiny()
    ids = torch.full((1, 8), 5)
    with noisy_embeddings(model):
        cache = model(input_ids=ids[:, :5], past_key_values=transformers.DynamicCache())
        with pytest.raises(RuntimeError, match="cache holds 5 earlier tokens"):
            model(input_ids=ids[:, 5:], past_key_values=cache.past_key_values)


def test_a_new_mask_of_transformers_must_be_placed_here():
    # 4-D tensors for eager and sdpa, (batch, tokens) or none for flash, BlockMask for flex:
    # each is a row of LAYOUTS. A new name may bring a new type of mask.
    known = {"sdpa", "eager", "flex_attention", ATTENTION}  # ours makes the masks of sdpa
    new = {n for n in masking_utils.AttentionMaskInterface._global_mapping if n not in known}
    assert all(name.startswith("flash_attention_") for name in new)
    makers = {getattr(f, "func", f).__name__ for f in _mask_makers()}
    assert makers <= {
        "create_causal_mask",
        "create_sliding_window_causal_mask",
        "create_chunked_causal_mask",
        "create_recurrent_attention_mask",  # (batch, tokens)
    }


def _mask_makers():
    found = masking_utils.LAYER_PATTERN_TO_MASK_FUNCTION_MAPPING.values()
    for maker in found:
        yield from maker.values() if isinstance(maker, dict) else [maker]


# ------------------------------------------------------------- documents that the model mixes


def mixes(model, batch):
    """Whether another first document changes what the model says of the last one."""
    model = model.eval()
    with torch.no_grad():
        other = batch["input_ids"].clone()
        other[0, :9] = 7
        a, b = model(**batch).logits, model(**batch | {"input_ids": other}).logits
    return not torch.allclose(a[0, 14:TOTAL], b[0, 14:TOTAL], atol=1e-5)


@pytest.mark.parametrize("use_cache", [False, True])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(
    "layout",
    [
        "row, position_ids",
        "row, position_ids and a mask of ones",
        "row, cu_seq_lens_q",
        "row, seq_idx",
        "row, document ids in the mask",
        "row, 4-D mask",
    ],
)
def test_one_warning_where_the_model_does_not_separate_documents(layout, attention, use_cache):
    model = tiny()
    model.set_attn_implementation(attention)
    batch = LAYOUTS[layout]() | {"use_cache": use_cache}
    if attention == "eager" and layout == "row, 4-D mask":
        batch["attention_mask"] = torch.where(BLOCKS, 0.0, NOT_TO_BE_ADDED)[None, None]
    with warnings.catch_warnings(record=True) as caught, noisy_embeddings(model):
        warnings.simplefilter("always")
        model.train()(**batch)
        model.train()(**batch)
    told = [w for w in caught if "the model does not" in str(w.message)]
    assert len(told) == int(mixes(model, batch))


def test_no_warning_about_mixing_for_rows_of_one_document():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        drawn(tiny(), **ragged(LENGTHS))
        drawn(tiny(), input_ids=torch.full((2, 6), 5))


def test_padding_without_a_mask_is_said():
    ids = torch.tensor([[5, 5, 5, 5, 5], [5, 5, 0, 0, 0]])
    for batch in (ids, ids.flip(1)):
        with pytest.warns(UserWarning, match=r"3 tokens have the id of the padding \(0\)"):
            drawn(tiny(), input_ids=batch)
    model = tiny()
    with warnings.catch_warnings(record=True) as caught, noisy_embeddings(model):
        warnings.simplefilter("always")
        for _ in range(3):  # more of them with every forward
            model(input_ids=ids)
    assert len(caught) == 1
    with pytest.warns(UserWarning, match="1 tokens have the id"):  # three in a row, not each eos
        drawn(tiny(eos_token_id=0), input_ids=ids)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        drawn(tiny(eos_token_id=0), input_ids=torch.tensor([[5, 5, 0, 5, 0]]))
