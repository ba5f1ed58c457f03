"""The table of libraries: every cell recomputed from the rule, and by the libraries themselves."""

import inspect
import math
import re

import pytest
import torch
from datasets import Dataset
from transformers import DataCollatorWithFlattening, Trainer, TrainingArguments, set_seed
from transformers.integrations.neftune import activate_neftune, neftune_post_forward_hook
from trl import SFTConfig
from trl.data_utils import pack_dataset
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from neft_utils.base.files import ROOT
from neft_utils.base.pins import pins
from neft_utils.make import libraries
from neft_utils.make.libraries import LENGTHS, LIBRARIES, NOISE_ALPHA, PACKED, arrives
from neft_utils.noise import noisy_embeddings

HIDDEN = 64  # of the models here; with d in the denominator it falls out
ROWS = [{"input_ids": [5] * n} for n in LENGTHS]


class OnlyAnEmbedding(torch.nn.Module):
    """Puts out zeros, so that what is seen is the noise."""

    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Embedding.from_pretrained(torch.zeros(8, HIDDEN))

    def get_input_embeddings(self):
        return self.embed

    def forward(self, input_ids, **layout):
        return self.embed(input_ids)


def alpha_of(noise, lengths=LENGTHS):
    """The α that arrived at each sequence of one row laid end to end: uniform has var bound²/3."""
    parts = noise.reshape(-1, HIDDEN).split(list(lengths))
    return [part.std().item() * math.sqrt(3 * len(part) * HIDDEN) for part in parts]


def of_transformers(ids, real):
    """Noise of transformers' hook on the real tokens."""
    model = OnlyAnEmbedding().train()
    activate_neftune(model, NOISE_ALPHA)
    return model(ids)[real]


def test_every_cell_is_the_rule():
    """By hand: α·√(L/W), with d left out times √(d/rows)."""
    padded, free = max(LENGTHS), sum(LENGTHS)
    d = libraries.HIDDEN_SIZE
    by_hand = {
        ("sequence", "padded"): [5.0] * 4,
        ("width", "padded"): [5 * math.sqrt(n / padded) for n in LENGTHS],
        ("width", "padding-free"): [5 * math.sqrt(n / free) for n in LENGTHS],
        ("width", "packed"): [5 * math.sqrt(n / 2048) for n in LENGTHS],
        ("cells", "padded"): [5 * math.sqrt(n * d / (4 * padded)) for n in LENGTHS],
        ("cells", "padding-free"): [5 * math.sqrt(n * d / free) for n in LENGTHS],
        ("cells", "packed"): [5 * math.sqrt(n * d / 2048) for n in LENGTHS],
        ("width in fp16", "padded"): [0.0] * 4,
    }
    for rule, layout in {(one.rule, layout) for one in LIBRARIES for layout in one.layouts}:
        expected = by_hand.get((rule, layout), [5.0] * 4)
        assert arrives(rule, layout) == pytest.approx(expected), (rule, layout)
    rows = {one.name: one for one in LIBRARIES}
    assert rows["the authors' training code"].rule == "sequence"
    assert rows["the function in the authors' README"].rule == "width"


def test_the_text_says_what_the_cells_are_of():
    said = " ".join((ROOT / "README.md").read_text("utf-8").split())
    first, *more, last = LENGTHS
    assert (
        f"α = {NOISE_ALPHA:g} and have four rows of {first}, {more[0]}, {more[1]} and {last}"
        in said
    )
    assert f"to {last}. *Padding-free*: one row of {sum(LENGTHS)}." in said
    assert f"into a row of {PACKED:,}" in said and len(LENGTHS) == 4


def test_every_row_has_a_permalink_and_says_what_was_read():
    for one in LIBRARIES[:-1]:
        assert re.search(r"/blob/[0-9a-f]{40}/", one.address), one.name
        assert re.search(r"20\d\d-\d\d-\d\d|run here|not known", one.version), one.name
    for one in LIBRARIES:
        package = one.name.split(",")[0].lower()
        if "run here" in one.version:
            assert one.version.startswith(pins()[package]), f"{package} is of another version"


# ------------------------------------------------------- the libraries that are installed here


def padded_batch():
    mask = torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]
    return 5 * mask.long(), mask


def test_transformers_padded_and_flattened():
    found = alpha_of(of_transformers(*padded_batch()))
    assert found == pytest.approx(arrives("width", "padded"), rel=0.05)
    batch = DataCollatorWithFlattening(return_tensors="pt")(ROWS)
    ids = batch["input_ids"]
    found = alpha_of(of_transformers(ids, torch.ones_like(ids, dtype=torch.bool)))
    assert found == pytest.approx(arrives("width", "padding-free"), rel=0.05)


def test_trl_padded_padding_free_and_packed():
    assert SFTConfig.__dataclass_fields__["neftune_noise_alpha"].default is None  # inherited
    assert "neftune_noise_alpha" not in SFTConfig.__annotations__
    for free, layout in ((False, "padded"), (True, "padding-free")):
        batch = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=free)(ROWS)
        found = alpha_of(of_transformers(batch["input_ids"], batch["input_ids"] != 0))
        assert found == pytest.approx(arrives("width", layout), rel=0.05)
    # Rows that fill a packed one: ours, and fillers for the rest.
    filler = PACKED - sum(LENGTHS)
    rows = Dataset.from_list([*ROWS, {"input_ids": [6] * filler}])
    packed = pack_dataset(rows, PACKED)
    collator = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)
    batch = collator(list(packed))
    assert batch["input_ids"].shape == (1, PACKED)
    sizes = batch["cu_seq_lens_q"].diff().tolist()
    noise = of_transformers(batch["input_ids"], batch["input_ids"] != 0)
    found = dict(zip(sizes, alpha_of(noise, sizes), strict=True))
    assert [found[n] for n in LENGTHS] == pytest.approx(arrives("width", "packed"), rel=0.05)


def test_ours_keeps_alpha_in_every_layout():
    ids, mask = padded_batch()
    numbers = torch.repeat_interleave(torch.arange(1, 5), torch.tensor(LENGTHS))[None]
    row = torch.full_like(numbers, 5)
    for given, real in (
        ({"input_ids": ids, "attention_mask": mask.long()}, mask),
        ({"input_ids": row, "attention_mask": numbers}, row != 0),
    ):
        model = OnlyAnEmbedding().train()
        with noisy_embeddings(model, NOISE_ALPHA, seed=0):
            found = alpha_of(model(**given)[real])
        assert found == pytest.approx([NOISE_ALPHA] * 4, rel=0.05)


def test_fp16_overflows_where_the_width_is_multiplied_in_it():
    """The rule of NeMo AutoModel: width times d in the output's dtype."""
    width, d = libraries.LAYOUTS["padded"][1], libraries.HIDDEN_SIZE
    bounds = {
        dtype: NOISE_ALPHA / torch.sqrt(torch.tensor(width * d, dtype=dtype)).item()
        for dtype in (torch.float16, torch.bfloat16)
    }
    assert bounds[torch.float16] == 0
    assert bounds[torch.bfloat16] == pytest.approx(NOISE_ALPHA / math.sqrt(width * d), rel=0.01)


def test_transformers_gives_every_rank_one_seed():
    """What the README says of several GPUs."""
    assert "set_seed(self.args.seed)" in inspect.getsource(Trainer.__init__)
    assert TrainingArguments.__dataclass_fields__["seed"].default == 42
    ids, real = padded_batch()
    drawn = []
    for _rank in range(2):
        set_seed(42)
        drawn.append(of_transformers(ids, real))
    assert torch.equal(*drawn) and drawn[0].any()
    assert "attention_mask" not in inspect.getsource(neftune_post_forward_hook)
