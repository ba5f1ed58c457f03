"""The contract of the noise, row by row; each library's known mistake would fail a test here."""

import copy
import gc
import io
import math
import warnings
import weakref

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from neft_utils.noise import (
    EmbeddingNoise,
    NEFTuneCallback,
    _mix,
    _signed,
    noise_scale,
    noisy_embeddings,
    suggest_noise_alpha,
)

try:
    from transformers.integrations.neftune import activate_neftune, deactivate_neftune
except ImportError:  # transformers 4: the hook alone, which its Trainer puts on like this
    from transformers.trainer_utils import neftune_post_forward_hook

    def activate_neftune(model, noise_alpha):
        model.get_input_embeddings().neftune_noise_alpha = noise_alpha
        return model.get_input_embeddings().register_forward_hook(neftune_post_forward_hook)

    def deactivate_neftune(model, handle):
        handle.remove()
        del model.get_input_embeddings().neftune_noise_alpha


torch.set_num_threads(1)
LENGTHS = [100, 10, 1, 37]
_COMMON = {"vocab_size": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_SHORT = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
_LLAMA = _SHORT | {"intermediate_size": 48, "num_key_value_heads": 2}
FAMILIES = {
    "Llama": _LLAMA,
    "Mistral": _LLAMA,
    "Qwen2": _LLAMA,
    "Qwen3": _LLAMA | {"head_dim": 16},
    "Gemma": _LLAMA | {"head_dim": 16},  # scales embeddings by √d, ties its head
    "OPT": _SHORT | {"ffn_dim": 48, "word_embed_proj_dim": 32, "dropout": 0.0},
    "GPT2": {"n_embd": 32, "n_layer": 1, "n_head": 2, "embd_pdrop": 0.0},
    "GPTNeoX": _SHORT | {"intermediate_size": 48},
    "Phi": _LLAMA,
    "Falcon": _SHORT,
    "Bloom": {"hidden_size": 32, "n_layer": 1, "n_head": 2},
}
TAKES_POSITIONS = [name for name in FAMILIES if name != "Bloom"]


def tiny(family="Llama", **changes):
    if not hasattr(transformers, f"{family}Config"):
        pytest.skip(f"transformers {transformers.__version__} has no {family}")
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**_COMMON | FAMILIES[family] | changes)
    return transformers.AutoModelForCausalLM.from_config(config).train()


class Toy(torch.nn.Module):
    """An embedding and nothing else, for tests of many shapes; all-zero, so output = noise."""

    def __init__(self, hidden=16, dtype=torch.float32, device="cpu", fill=0.0):
        super().__init__()
        self.embed = torch.nn.Embedding(8, hidden, dtype=dtype, device=device)
        torch.nn.init.constant_(self.embed.weight, fill)

    def get_input_embeddings(self):
        return self.embed

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        cu_seq_lens_q=None,
        labels=None,
        inputs_embeds=None,
    ):
        return self.embed(input_ids) if inputs_embeds is None else inputs_embeds


def silenced(model):
    """The model with an embedding of zeros, so that what comes out of it is the noise."""
    torch.nn.init.zeros_(model.get_input_embeddings().weight)
    return model


def looked_up(model, *args, **inputs):
    """What the embedding put out in one forward, hooks included."""
    seen = []
    handle = model.get_input_embeddings().register_forward_hook(
        lambda module, args, output: seen.append(output.detach().clone())
    )
    try:
        model(*args, **inputs)
    finally:
        handle.remove()
    (output,) = seen
    return output


def drawn(model, noise_alpha=5.0, options=None, step=None, **inputs):
    with noisy_embeddings(model, noise_alpha, **(options or {})) as noise:
        if step is not None:
            noise.set_step(step)
        return looked_up(model, **inputs)


def ragged(lengths=LENGTHS, side="right", extra=0):
    """Padded (input_ids, attention_mask); token ids 3.. so that padding (0) is recognisable."""
    width = max(lengths) + extra
    ids = torch.zeros(len(lengths), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, n in enumerate(lengths):
        where = slice(0, n) if side == "right" else slice(width - n, width)
        ids[row, where] = torch.arange(n) % 5 + 3
        mask[row, where] = 1
    return {"input_ids": ids, "attention_mask": mask}


def packed(lengths=LENGTHS):
    """The same tokens as one padding-free row, with position ids that restart."""
    ids = torch.cat([torch.arange(n) % 5 + 3 for n in lengths])[None]
    return {"input_ids": ids, "position_ids": torch.cat([torch.arange(n) for n in lengths])[None]}


def real(output, batch):
    """The rows of real tokens in order, (tokens, hidden)."""
    return output[batch["attention_mask"].bool()]


def per_sequence(rows, lengths=LENGTHS):
    return rows.split(list(lengths))


# ------------------------------------------------------------------------------------ scale


def test_scale_is_alpha_over_the_root_of_length_times_size():
    assert noise_scale([100, 10], 64, 5.0).tolist() == pytest.approx([5 / 80, 5 / 640**0.5])
    assert noise_scale(torch.tensor([1]), 1, 0.5).item() == 0.5  # α need not be an integer


def test_scale_is_finite_where_length_times_size_overflows_float16_and_int32():
    for dtype in (torch.int32, torch.int64, torch.float16):
        lengths = torch.tensor([512, 60000], dtype=dtype)
        assert noise_scale(lengths, 65536, 5.0).tolist() == pytest.approx(
            [5 / math.sqrt(512 * 65536), 5 / math.sqrt(lengths[1].item() * 65536)]
        )
    assert noise_scale([131072], 8192, 5.0).dtype == torch.float32


@pytest.mark.parametrize("hidden", [8, 32, 256])
def test_expected_energy_of_a_sequence_is_a_third_of_alpha_squared_for_every_length_and_size(
    hidden,
):
    # Formulas without d (PaddleNLP, InstructLab: α/√(B·L)) or with the padded width fail this.
    batch = ragged([400, 40, 7])
    model = Toy(hidden)
    energies = torch.zeros(3)
    with noisy_embeddings(model, 5.0):
        for _ in range(200):
            energies += model(**batch).detach().square().sum((1, 2)) / 200
    cells = torch.tensor([400.0, 40, 7]) * hidden * 200
    tolerance = 5 * (0.8 / cells).sqrt()  # relative standard error of a mean square is √(0.8/n)
    assert ((energies / (25 / 3) - 1).abs() < tolerance).all()


@pytest.mark.parametrize("family", FAMILIES)
def test_noise_reaches_the_token_embedding_of_every_family_within_its_bound(family):
    model, batch = silenced(tiny(family)), ragged()
    sequences = per_sequence(real(drawn(model, **batch), batch))
    for n, rows in zip(LENGTHS, sequences, strict=True):
        bound = 5.0 / math.sqrt(n * 32)
        assert rows.abs().max() <= bound * (1 + 1e-6)
        assert rows.abs().max() > 0.8 * bound  # (0.8^32 = 0.0008 by chance; draws are fixed)
        if n > 5:
            assert rows.var().item() == pytest.approx(bound**2 / 3, rel=5 * (0.8 / n / 32) ** 0.5)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("family", FAMILIES)
def test_padding_is_exactly_zero_on_either_side(family, side):
    model, batch = tiny(family), ragged(side=side, extra=3)
    torch.nn.init.normal_(model.get_input_embeddings().weight)  # padding's own row as well
    padding = batch["attention_mask"] == 0
    with torch.no_grad():
        clean = looked_up(model, **batch)
    noisy = drawn(model, **batch)
    assert torch.equal(noisy[padding], clean[padding])
    assert not (noisy == clean).all(-1)[~padding].any()


@pytest.mark.parametrize("family", ["OPT", "GPT2"])
def test_position_embeddings_stay_clean(family):  # ms-swift hooks every nn.Embedding
    model, batch = tiny(family), ragged()
    token = model.get_input_embeddings()
    others = [m for m in model.modules() if isinstance(m, torch.nn.Embedding) and m is not token]
    assert others
    seen = []
    handles = [m.register_forward_hook(lambda m, a, o: seen.append(o.clone())) for m in others]
    model(**batch)
    clean, seen[:] = list(seen), []
    drawn(model, **batch)
    assert seen and all(torch.equal(a, b) for a, b in zip(clean, seen, strict=True))
    for handle in handles:
        handle.remove()


def test_token_types_that_gpt2_looks_up_in_the_token_embedding_stay_clean():
    model = silenced(tiny("GPT2"))
    ids, types = torch.randint(3, 60, (2, 5)), torch.randint(3, 60, (2, 5))
    seen = []
    with noisy_embeddings(model) as noise:
        handle = model.get_input_embeddings().register_forward_hook(
            lambda m, a, o: seen.append(float(o.detach().abs().sum()))
        )
        model(input_ids=ids, token_type_ids=types)
        handle.remove()
        assert noise.report()["calls"] == 1
    assert seen[0] > 0 and seen[1] == 0


@pytest.mark.parametrize("family", ["Gemma", "GPT2"])
def test_tied_heads_stay_clean(family):
    model, batch = tiny(family), ragged()
    head = model.get_output_embeddings()
    assert head.weight is model.get_input_embeddings().weight
    before = head.weight.detach().clone()
    seen = []
    handle = head.register_forward_hook(lambda m, a, o: seen.append((a[0], o)))
    drawn(model, noise_alpha=100.0, **batch)
    handle.remove()
    assert torch.equal(head.weight, before)
    assert torch.equal(seen[0][1], torch.nn.functional.linear(seen[0][0], before))


# -------------------------------------------------------------------------- a pure function


def test_random_numbers_are_those_of_splitmix64():
    # First outputs for seed 1234567, as published for the reference implementation.
    state, outputs = 1234567, []
    for _ in range(3):
        state += 0x9E3779B97F4A7C15
        outputs.append(_mix(torch.tensor([_signed(state)])).item() % 2**64)
    assert outputs == [6457827717110365317, 3203168211198807973, 9817491932198370423]


def expected_cell(seed, rank, step, k, t, j):
    """The uniform draw in plain Python integers."""

    def mix(z):
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
        return z ^ (z >> 31)

    weyl, key = 0x9E3779B97F4A7C15, 0
    for word in (seed, rank, step):
        key = mix(((key + word) * weyl + weyl) % 2**64)
    key = mix(((k + 1) * weyl + key) % 2**64)
    key = mix((key + t * weyl) % 2**64)
    top = mix((key + (j + 1) * weyl) % 2**64) >> 40
    return ((top - 2**24 if top >= 2**23 else top) + 0.5) / 2**23


@pytest.mark.parametrize("seed, rank, step", [(0, 0, 0), (7, 3, 11), (-1, 0, 2), (2**70 + 5, 1, 0)])
def test_noise_is_a_function_of_seed_rank_step_sequence_token_and_dimension(seed, rank, step):
    lengths = [3, 5]
    batch = ragged(lengths)
    noise = drawn(Toy(4), 5.0, {"seed": seed, "rank": rank}, step, **batch)
    for k, n in enumerate(lengths):
        for t in range(n):
            wanted = [
                expected_cell(seed, rank, step, k, t, j) * 5 / math.sqrt(n * 4) for j in range(4)
            ]
            assert noise[k, t].tolist() == pytest.approx(wanted, rel=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_left_padding_equals_right_padding_equals_padding_free_equals_micro_batches(family):
    model, batch = silenced(tiny(family)), ragged()
    reference = real(drawn(model, **batch), batch)
    left = ragged(side="left", extra=5)
    assert torch.equal(real(drawn(model, **left), left), reference)
    if family in TAKES_POSITIONS:
        left["position_ids"] = (left["attention_mask"].cumsum(1) - 1).clamp(min=0)
        assert torch.equal(real(drawn(model, **left), left), reference)
        assert torch.equal(drawn(model, **packed())[0], reference)
    for split in ([1, 3], [2, 2], [1, 1, 1, 1]):
        parts = []
        with noisy_embeddings(model) as noise:
            noise.set_step(0)
            start = 0
            for size in split:
                part = ragged(LENGTHS[start : start + size])
                parts.append(real(looked_up(model, **part), part))
                start += size
        assert torch.equal(torch.cat(parts), reference)


@pytest.mark.parametrize("distribution", ["uniform", "gaussian", "rademacher"])
def test_cumulative_lengths_mark_the_sequences_of_a_padding_free_row(distribution):
    options, batch = {"distribution": distribution}, ragged()
    reference = real(drawn(Toy(), options=options, **batch), batch)
    row = {"input_ids": packed()["input_ids"]}
    edges = torch.tensor([0, *LENGTHS]).cumsum(0).to(torch.int32)
    for cu in (edges, torch.cat([edges, edges[-1:], edges[-1:]])):  # padded with the last one
        assert torch.equal(drawn(Toy(), options=options, cu_seq_lens_q=cu, **row)[0], reference)
    # Without either, the row is one long sequence, and that shows.
    assert not torch.equal(drawn(Toy(), options=options, **row)[0], reference)


def test_cumulative_lengths_may_end_before_a_padded_row_does():
    row = {"input_ids": torch.ones(1, 12, dtype=torch.long)}
    row["attention_mask"] = (torch.arange(12) < 9)[None].long()
    noise = drawn(Toy(), cu_seq_lens_q=torch.tensor([0, 4, 9], dtype=torch.int32), **row)
    batch = ragged([4, 5])
    assert torch.equal(noise[0, :9], real(drawn(Toy(), **batch), batch))
    assert not noise[0, 9:].any()


def test_a_document_of_a_row_may_begin_with_masked_tokens():
    mask = torch.tensor([[1, 1, 0, 1, 1, 1]])
    cu = torch.tensor([0, 2, 6], dtype=torch.int32)
    noise = drawn(Toy(), input_ids=mask, attention_mask=mask, cu_seq_lens_q=cu)
    alone = ragged([2, 3])
    assert torch.equal(noise[mask.bool()], real(drawn(Toy(), **alone), alone))


def test_documents_packed_into_a_padded_batch_are_sequences_of_their_own():
    positions = torch.tensor([[0, 1, 2, 0, 1, 1], [0, 0, 1, 2, 3, 0]])
    mask = torch.tensor([[1, 1, 1, 1, 1, 0], [1, 1, 1, 1, 1, 1]])
    ids = torch.ones_like(mask)
    noise = drawn(Toy(), input_ids=ids, attention_mask=mask, position_ids=positions)
    alone = ragged([3, 2, 1, 4, 1])
    assert torch.equal(noise[mask.bool()], real(drawn(Toy(), **alone), alone))


@pytest.mark.parametrize("how", ["counted", "columns"])
def test_masked_tokens_in_the_middle_do_not_split_a_sequence(how):
    mask = torch.tensor([[1, 1, 0, 0, 1, 1, 1], [0, 1, 1, 1, 0, 1, 0]])
    positions = mask.cumsum(1) - 1 if how == "counted" else torch.arange(7).expand(2, 7)
    ids = torch.ones_like(mask)
    noise = drawn(Toy(), input_ids=ids, attention_mask=mask, position_ids=positions)
    alone = ragged([5, 4])
    assert torch.equal(noise[mask.bool()], real(drawn(Toy(), **alone), alone))


def test_empty_rows_are_no_sequences():
    with_empty = ragged([0, 4, 0, 0, 6, 0])
    without = ragged([4, 6])
    assert torch.equal(
        real(drawn(Toy(), **with_empty), with_empty), real(drawn(Toy(), **without), without)
    )
    nothing = {
        "input_ids": torch.ones(2, 3, dtype=torch.long),
        "attention_mask": torch.zeros(2, 3),
    }
    assert not drawn(Toy(), **nothing).any()


shapes = st.tuples(st.integers(1, 5), st.integers(1, 12)).flatmap(
    lambda s: st.lists(
        st.lists(st.integers(0, 1), min_size=s[1], max_size=s[1]), min_size=s[0], max_size=s[0]
    )
)


@given(
    mask=shapes,
    hidden=st.integers(1, 9),
    noise_alpha=st.floats(1e-3, 1e3),
    distribution=st.sampled_from(["uniform", "gaussian", "rademacher"]),
    seed=st.integers(-(2**63), 2**64),
    step=st.integers(0, 2**40),
)
@settings(max_examples=150, deadline=None)
def test_any_mask_gives_the_noise_of_its_sequences_alone(
    mask, hidden, noise_alpha, distribution, seed, step
):
    mask = torch.tensor(mask)
    options = {"seed": seed, "distribution": distribution}
    ids = torch.ones_like(mask)
    model = Toy(hidden)
    noise = drawn(model, noise_alpha, options, step, input_ids=ids, attention_mask=mask)
    assert not noise[mask == 0].any() and noise.isfinite().all()
    lengths = [n for n in mask.sum(1).tolist() if n]
    if not lengths:
        return
    row = drawn(model, noise_alpha, options, step, **packed(lengths))
    assert torch.equal(noise[mask.bool()], row[0])
    if distribution != "gaussian":
        for n, rows in zip(lengths, row[0].split(lengths), strict=True):
            bound = noise_alpha / math.sqrt(n * hidden)
            assert rows.abs().max() <= bound * (1 + 1e-6)


def test_every_plain_forward_is_a_step_of_its_own_and_a_set_step_repeats():
    batch, model = ragged([4, 6]), Toy()
    with noisy_embeddings(model) as noise:
        first, second = looked_up(model, **batch), looked_up(model, **batch)
        noise.set_step(1)
        again = looked_up(model, **batch)
        more = looked_up(model, **batch)  # a micro-batch of the same step: other sequences
        noise.set_step(0)
        assert torch.equal(looked_up(model, **batch), first)
    assert torch.equal(again, second) and not torch.equal(first, second)
    assert not torch.equal(more, again)


def test_noise_is_reproducible_and_depends_on_the_seed_and_the_rank():
    batch = ragged([4, 6])
    draws = [
        drawn(Toy(), options=o, **batch) for o in ({}, {}, {"seed": 1}, {"rank": 1}, {"rank": 0})
    ]
    assert torch.equal(draws[0], draws[1]) and torch.equal(draws[0], draws[4])
    assert not torch.equal(draws[0], draws[2]) and not torch.equal(draws[0], draws[3])


@pytest.mark.parametrize("generator", [False, True])
def test_global_random_state_is_never_touched(generator):
    options = {"length": "padded", "generator": torch.Generator()} if generator else {}
    model, batch = tiny(), ragged()
    before = torch.get_rng_state()
    noise = drawn(model, options=options, **batch)
    assert torch.equal(torch.get_rng_state(), before)
    assert noise.abs().sum() > 0


# Four steps x two ranks x 8 sequences x 256 tokens x 640 dimensions: 10.5 million draws.
@pytest.fixture(scope="module", params=["uniform", "gaussian", "rademacher"])
def draws(request):
    model, ids = Toy(640), torch.zeros(8, 256, dtype=torch.long)
    out = torch.empty(4, 2, 8, 256, 640)
    for rank in range(2):
        options = {"rank": rank, "distribution": request.param}
        with noisy_embeddings(model, math.sqrt(256 * 640), **options):
            for step in range(4):
                out[step, rank] = model(ids).detach()
    return request.param, out


def test_ten_million_draws_have_mean_zero_and_the_uniforms_variance(draws):
    # U(0, 1) noise (a public NEFTEmbedding) has mean 1/2.
    name, x = draws
    n = x.numel()
    assert abs(x.mean(dtype=torch.float64)) < 5 * math.sqrt(1 / 3 / n)
    kurtosis = {"uniform": 9 / 5, "gaussian": 3, "rademacher": 1}[name]
    error = math.sqrt(max(kurtosis - 1, 1e-9) / n)
    assert 3 * x.square().mean(dtype=torch.float64).item() == pytest.approx(1, abs=5 * error + 1e-7)
    if name == "gaussian":
        fourth = 9 * x.double().pow(4).mean().item()
        assert fourth == pytest.approx(3, abs=5 * math.sqrt(96 / n))


def test_ten_million_uniform_draws_pass_chi_square_over_a_thousand_bins(draws):
    name, x = draws
    if name == "rademacher":
        assert x.unique().numel() == 2
        return
    y = x if name == "uniform" else torch.erf(x * math.sqrt(1.5))  # to (-1, 1) either way
    assert x.isfinite().all() and (name == "gaussian" or y.abs().max() < 1)
    counts = torch.histc(y, 1000, -1, 1).double()
    expected = x.numel() / 1000
    chi = ((counts - expected) ** 2 / expected).sum().item()
    assert abs(chi - 999) < 5 * math.sqrt(2 * 999)


@pytest.mark.parametrize(
    "axis", [0, 1, 2, 3, 4], ids=["steps", "ranks", "sequences", "positions", "dimensions"]
)
@pytest.mark.parametrize("lag", [1, 2, 3])
def test_ten_million_draws_are_uncorrelated_along(draws, axis, lag):
    _, x = draws
    size = x.size(axis) - lag
    if size < 1:
        return
    product = x.narrow(axis, 0, size) * x.narrow(axis, lag, size)
    correlation = 3 * product.mean(dtype=torch.float64).item()
    assert abs(correlation) < 5 / math.sqrt(product.numel())


def test_no_row_of_ten_million_draws_repeats_nor_any_stretch_of_one(draws):
    name, x = draws
    rows = x.reshape(-1, 640)
    if name == "rademacher":
        keys = (rows[:, :62] > 0).long() @ (2 ** torch.arange(62))
        assert keys.unique().numel() == len(rows)
    else:  # 48 random bits in two neighbours: 0.2 repeats among 10 million are chance
        bits = rows.contiguous().view(torch.int32).long()
        keys = (bits[:, :-1] << 32) + bits[:, 1:]
        assert keys.unique().numel() >= keys.numel() - 5


# ------------------------------------------------------------- other libraries' L, imitated


def test_padded_length_is_the_width_of_the_batch():
    batch = ragged()
    ours, theirs = drawn(Toy(), **batch), drawn(Toy(), options={"length": "padded"}, **batch)
    for row, n in enumerate(LENGTHS):  # the same draw at another scale
        assert torch.allclose(theirs[row] * math.sqrt(100 / n), ours[row], rtol=1e-5)


def test_padded_length_of_a_padding_free_row_is_the_longest_sequence():
    options, batch = {"length": "padded"}, ragged()
    reference = real(drawn(Toy(), options=options, **batch), batch)
    row = packed()
    assert torch.equal(drawn(Toy(), options=options, **row)[0], reference)
    cu = torch.tensor([0, *LENGTHS]).cumsum(0).to(torch.int32)
    flat = drawn(Toy(), options=options, input_ids=row["input_ids"], cu_seq_lens_q=cu)
    assert torch.equal(flat[0], reference)
    # A single padded sequence is no padding-free row: its width counts, as in transformers.
    single = ragged([10], extra=90)
    ratio = drawn(Toy(), **single)[0, :10] / drawn(Toy(), options=options, **single)[0, :10]
    assert torch.allclose(ratio, torch.tensor(math.sqrt(10)))


def test_packed_length_is_all_real_tokens_of_the_row():
    options, row, batch = {"length": "packed"}, packed(), ragged()
    ours, theirs = drawn(Toy(), **row)[0], drawn(Toy(), options=options, **row)[0]
    sequences = zip(LENGTHS, per_sequence(ours), per_sequence(theirs), strict=True)
    for n, mine, other in sequences:
        assert torch.allclose(other * math.sqrt(sum(LENGTHS) / n), mine, rtol=1e-5)
    padded = drawn(Toy(), options=options, **batch)  # in a padded batch: each row's own
    assert torch.equal(padded, drawn(Toy(), **batch))


def with_transformers_hook(model, seed, **inputs):
    handle = activate_neftune(model, 5.0)
    torch.manual_seed(seed)
    output = looked_up(model, **inputs)
    deactivate_neftune(model, handle)
    return output


@pytest.mark.parametrize("family", ["Llama", "Gemma", "GPT2"])
def test_padded_length_with_a_generator_is_transformers_hook_bit_for_bit(family):
    model, batch = tiny(family), ragged()
    options = {"length": "padded", "generator": torch.Generator().manual_seed(3)}
    ours, theirs = drawn(model, options=options, **batch), with_transformers_hook(model, 3, **batch)
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_padded_length_with_a_generator_is_transformers_hook_within_a_rounding(dtype):
    model, batch = tiny().to(dtype), ragged()
    options = {"length": "padded", "generator": torch.Generator().manual_seed(3)}
    ours, theirs = drawn(model, options=options, **batch), with_transformers_hook(model, 3, **batch)
    assert torch.allclose(ours, theirs, rtol=torch.finfo(dtype).eps, atol=0)


def test_transformers_hook_gives_a_short_row_beside_a_long_one_three_times_too_little():
    model = silenced(tiny(hidden_size=1024))
    batch = ragged([100, 10])
    wanted = 5.0 / math.sqrt(3 * 10 * 1024)
    theirs = with_transformers_hook(model, 0, **batch)
    assert theirs[1, :10].std().item() == pytest.approx(wanted / math.sqrt(10), rel=0.03)
    assert theirs[1, 10:].std() > 0  # and noise on its padding
    ours = drawn(model, **batch)
    assert ours[1, :10].std().item() == pytest.approx(wanted, rel=0.03)
    assert (ours[1, :10].std() / theirs[1, :10].std()).item() == pytest.approx(3.16, abs=0.15)
    assert ours[0].std().item() == pytest.approx(theirs[0].std().item(), rel=0.03)


# ------------------------------------------------------------------------------------ where


@pytest.mark.parametrize("given_by", ["forward", "set_labels"])
def test_where_chooses_prompt_or_response_tokens_by_their_labels(given_by):
    batch, model = ragged([6, 4]), Toy()
    labels = torch.full((2, 6), -100)
    labels[0, 3:], labels[1, 2:4] = 1, 1
    whole = drawn(model, **batch)
    for where, chosen in (("response", labels != -100), ("prompt", labels == -100)):
        with noisy_embeddings(model, where=where) as noise:
            if given_by == "forward":
                some = looked_up(model, labels=labels, **batch)
            else:
                noise.set_labels(labels)
                some = looked_up(model, **batch)
            assert noise.report()["tokens"] == (chosen & batch["attention_mask"].bool()).sum()
        assert torch.equal(some, whole * chosen[..., None])


def test_where_without_labels_is_an_error_that_says_so_and_labels_serve_one_forward():
    batch, model = ragged([6, 4]), Toy()
    with noisy_embeddings(model, where="prompt") as noise:
        with pytest.raises(RuntimeError, match="needs labels.*set_labels"):
            model(**batch)
        noise.set_labels(torch.zeros(2, 6, dtype=torch.long))
        model(**batch)
        with pytest.raises(RuntimeError, match="needs labels"):
            model(**batch)
        with pytest.raises(ValueError, match=r"labels have shape \(2, 5\), token ids \(2, 6\)"):
            model(labels=torch.zeros(2, 5, dtype=torch.long), **batch)


# ------------------------------------------------------------------------------------- when


@pytest.mark.parametrize("family", FAMILIES)
def test_never_in_eval_no_grad_inference_or_generate(family):
    model, batch = tiny(family), ragged([9, 6])
    clean = torch.nn.functional.embedding
    with pytest.warns(UserWarning, match="no noise was added"), noisy_embeddings(model) as noise:
        with torch.no_grad():  # in training mode: a reference pass
            first = looked_up(model, **batch)
        with torch.inference_mode():
            assert torch.equal(looked_up(model, **batch), first)
        model.generate(
            **ragged([9, 6], side="left"), max_new_tokens=2, do_sample=False, pad_token_id=0
        )
        model.eval()
        assert torch.equal(looked_up(model, **batch), first)
        assert noise.report()["calls"] == 0
    if family != "Gemma":
        weight = model.get_input_embeddings().weight
        assert torch.equal(first, clean(batch["input_ids"], weight))


def test_embedding_in_eval_mode_stays_clean_in_a_training_model():
    model, batch = Toy(), ragged([4])
    model.embed.eval()
    with pytest.warns(UserWarning, match="no noise was added"):
        assert not drawn(model, **batch).any()


# ---------------------------------------------------------------------------------- lengths


@pytest.mark.parametrize("family", ["Llama", "Qwen3", "OPT", "GPTNeoX"])
def test_a_mask_given_by_position_counts(family):
    model, batch = silenced(tiny(family)), ragged()
    with noisy_embeddings(model):
        by_place = looked_up(model, batch["input_ids"], batch["attention_mask"])
    assert torch.equal(by_place, drawn(model, **batch))


def test_the_nearest_enclosing_module_that_has_a_mask_decides():
    class Wrapper(torch.nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def get_input_embeddings(self):
            return self.inner.embed

        def forward(self, input_ids, attention_mask=None, *, inner_mask=None):
            return self.inner(input_ids, attention_mask=inner_mask)

    model = Wrapper(Toy())
    ids = torch.ones(1, 8, dtype=torch.long)
    outer, inner = torch.ones(1, 8), torch.tensor([[1, 1, 1, 0, 0, 0, 0, 0]])
    with noisy_embeddings(model):
        assert (looked_up(model, ids, outer, inner_mask=inner) != 0).all(-1).sum() == 3
        assert (looked_up(model, ids, inner) != 0).all(-1).sum() == 3  # only the outer one has it
        assert (looked_up(model, ids) != 0).all(-1).sum() == 8  # forgotten: all tokens are real
        seen = []
        handle = model.inner.embed.register_forward_hook(lambda m, a, o: seen.append(o))
        model.inner(ids, attention_mask=inner)  # a trainer that calls the inner model
        handle.remove()
    assert (seen[0] != 0).all(-1).sum() == 3


@pytest.mark.parametrize("shape", [(2, 1, 6, 6), (6,), (2, 4), (3, 6)])
def test_masks_that_are_not_those_of_the_tokens_are_refused(shape):
    model = Toy()
    with noisy_embeddings(model), pytest.raises(ValueError, match="attention_mask has shape"):
        model(torch.ones(2, 6, dtype=torch.long), attention_mask=torch.ones(shape))


def test_an_embedding_call_outside_any_forward_is_an_error_unless_without_gradients():
    model = tiny()
    with noisy_embeddings(model):
        embedding = model.get_input_embeddings()
        with pytest.raises(RuntimeError, match="outside the model's forward.*no_grad"):
            embedding(torch.ones(1, 3, dtype=torch.long))
        with torch.no_grad():
            embedding(torch.ones(1, 3, dtype=torch.long))
        model(**ragged([3]))


def test_inputs_embeds_without_any_embedding_call_warn_once():  # silent in transformers
    model, embeds = tiny(), torch.zeros(1, 3, 32)
    with noisy_embeddings(model):
        with pytest.warns(UserWarning, match="inputs_embeds was given.*yourself"):
            model(inputs_embeds=embeds)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model(inputs_embeds=embeds)
            with torch.no_grad():
                model(inputs_embeds=embeds)
            model(**ragged([3]))


def test_a_model_whose_embedding_was_replaced_is_an_error():
    model = Toy()
    with noisy_embeddings(model):
        model.embed = torch.nn.Embedding(8, 16)
        with pytest.raises(RuntimeError, match="attach after the last change of the model"):
            model(torch.ones(1, 3, dtype=torch.long))


def test_scalar_helper_look_ups_inside_a_forward_pass_through():  # transformers: IndexError
    class Helper(Toy):
        def forward(self, input_ids=None, **kwargs):
            self.helped = self.embed(torch.tensor(3)), self.embed(torch.tensor([3, 4]))
            return super().forward(input_ids)

    model = Helper()
    with noisy_embeddings(model) as noise:
        assert model(torch.ones(1, 3, dtype=torch.long)).any()
        assert noise.report()["calls"] == 1
    assert not model.helped[0].any() and not model.helped[1].any()


# ----------------------------------------------------------------------------------- safety


def hooks_of(model):
    return sum(
        len(hooks)
        for module in model.modules()
        for hooks in (
            module._forward_hooks,
            module._forward_pre_hooks,
            module._forward_hooks_with_kwargs,
            module._forward_hooks_always_called,
            module._forward_pre_hooks_with_kwargs,
        )
    )


@pytest.mark.parametrize("error", [None, RuntimeError, KeyboardInterrupt, SystemExit])
def test_the_context_manager_is_gone_on_every_exit(error):
    # transformers leaves its hook behind and stacks a second one: noise x 1.41 in the next run.
    model, batch = silenced(tiny()), ragged([9])
    before = hooks_of(model)
    reference = drawn(model, **batch)
    for _ in range(2):
        try:
            with noisy_embeddings(model) as noise:
                model(**batch)
                if error:
                    raise error
        except BaseException as raised:
            assert type(raised) is error
        assert hooks_of(model) == before and not noise.attached
        assert not looked_up(model, **batch).any()
    assert torch.equal(drawn(model, **batch), reference)
    assert not hasattr(model.get_input_embeddings(), "neftune_noise_alpha")


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_forward_cut_in_the_middle_leaves_the_next_one_right(error):
    model, batch, cut = silenced(tiny()), ragged([9, 4]), [True]

    def fail(module, args):
        if cut[0]:
            raise error

    handle = model.model.layers[0].register_forward_pre_hook(fail)
    reference = drawn_without(model, handle, batch)
    handle = model.model.layers[0].register_forward_pre_hook(fail)
    with noisy_embeddings(model, where="all") as noise:
        noise.set_labels(torch.zeros(2, 9, dtype=torch.long))
        with pytest.raises(error):
            model(**batch)
        cut[0] = False
        noise.set_step(0)
        seen = []
        look = model.model.embed_tokens.register_forward_hook(
            lambda m, a, o: seen.append(o.detach().clone())
        )
        model.model(**batch)  # the inner model this time
        noise.set_step(0)
        model(**batch)
        assert not noise._frames
        look.remove()
    handle.remove()
    assert torch.equal(seen[0], reference) and torch.equal(seen[1], reference)


def drawn_without(model, handle, batch):
    handle.remove()
    return drawn(model, **batch)


def test_attaching_twice_is_an_error_and_the_first_stays():
    model, batch = Toy(), ragged([5])
    with noisy_embeddings(model) as noise:
        with pytest.raises(RuntimeError, match=r"attached already: remove\(\) it first"):
            EmbeddingNoise().attach(model)
        with pytest.raises(RuntimeError, match="attached already"):
            noise.attach(Toy())
        once = looked_up(model, **batch)
    assert torch.equal(once, drawn(model, **batch))
    noise.remove()
    noise.remove()
    noise.attach(model).remove()


def test_transformers_hook_beside_ours_is_an_error_in_either_order():
    model, batch = tiny(), ragged([5])
    handle = activate_neftune(model, 5.0)
    with pytest.raises(RuntimeError, match="unset neftune_noise_alpha"):
        EmbeddingNoise().attach(model)
    deactivate_neftune(model, handle)
    with noisy_embeddings(model):
        model(**batch)
        handle = activate_neftune(model, 5.0)
        with pytest.raises(RuntimeError, match="unset neftune_noise_alpha"):
            model(**batch)
        deactivate_neftune(model, handle)


def test_never_in_the_state_dict_or_a_saved_model(tmp_path):
    model, batch = tiny(), ragged([5])
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with noisy_embeddings(model, 100.0):
        model(**batch)
        after = model.state_dict()
        model.save_pretrained(tmp_path)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[k], after[k]) for k in before)
    text = (tmp_path / "config.json").read_text() + str([f.name for f in tmp_path.iterdir()])
    assert "noise" not in text
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).train()
    assert hooks_of(loaded) == 0
    assert all(torch.equal(before[k], v) for k, v in loaded.state_dict().items())


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_a_copy_made_while_attached_is_inert(how):  # transformers' copy is noisy
    model, batch = silenced(tiny()), ragged([5])
    with noisy_embeddings(model) as noise:
        if how == "deepcopy":
            copied = copy.deepcopy(model)
        else:
            file = io.BytesIO()
            torch.save(model, file)
            file.seek(0)
            copied = torch.load(file, weights_only=False)
        assert not looked_up(copied, **batch).any()
        assert noise.report()["calls"] == 0
        assert looked_up(model, **batch).any()
        with noisy_embeddings(copied) as other:  # it can have noise of its own
            assert looked_up(copied, **batch).any()
            assert (noise.report()["calls"], other.report()["calls"]) == (1, 1)


def test_noise_keeps_no_model_alive():
    model = tiny()
    noise = EmbeddingNoise().attach(model)
    model(**ragged([5]))
    watch = weakref.ref(model.get_input_embeddings())
    del model, noise
    gc.collect()
    assert watch() is None


def test_data_parallel_threads_are_refused():
    model = tiny()
    with noisy_embeddings(model), pytest.raises(RuntimeError, match="DataParallel.*torchrun"):
        model._replicate_for_data_parallel()(**ragged([5]))
    with noisy_embeddings(model):
        model(**ragged([5]))


# -------------------------------------------------------------------------------- precision


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("length, hidden", [(1, 8), (512, 4096), (131072, 8)])
def test_noise_is_finite_and_of_the_right_size_in_every_dtype_at_any_length(dtype, length, hidden):
    # 512 * 4096 overflows float16: NeMo AutoModel divides by inf there and adds nothing.
    model = Toy(hidden, dtype)
    noise = drawn(model, input_ids=torch.zeros(1, length, dtype=torch.long))
    assert noise.dtype == dtype and noise.isfinite().all()
    bound = 5.0 / math.sqrt(length * hidden)
    assert noise.abs().max() <= bound * (1 + torch.finfo(dtype).eps)
    if length > 1:
        assert noise.double().std().item() == pytest.approx(bound / math.sqrt(3), rel=0.01)


def test_half_precision_noise_is_the_float32_noise_rounded_once():
    batch = ragged()
    for dtype in (torch.float16, torch.bfloat16):
        assert torch.equal(drawn(Toy(dtype=dtype), **batch), drawn(Toy(), **batch).to(dtype))
    # and it is added in the embedding's dtype
    clean = torch.tensor(0.3, dtype=torch.bfloat16)
    model = Toy(dtype=torch.bfloat16, fill=0.3)
    wanted = torch.where(
        batch["attention_mask"].bool()[..., None], clean + drawn(Toy(), **batch).bfloat16(), clean
    )
    assert torch.equal(drawn(model, **batch), wanted)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_default_dtype_changes_nothing(dtype):
    batch = ragged([300] * 3)
    reference = drawn(Toy(), **batch)
    torch.set_default_dtype(dtype)
    try:
        model = Toy()
        with noisy_embeddings(model) as noise:
            assert torch.equal(looked_up(model, **batch), reference)
            for _ in range(400):  # more sequences than a half-precision counter can hold
                model(**batch)
            assert noise._sums[4:].sum() == 1203
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.gpu
@pytest.mark.parametrize("distribution", ["uniform", "gaussian", "rademacher"])
def test_noise_is_identical_on_every_device(distribution):
    batch, options = ragged(), {"distribution": distribution}
    there = {name: value.cuda() for name, value in batch.items()}
    noise = drawn(Toy(), 5.0, options, **batch)
    assert torch.equal(drawn(Toy(device="cuda"), 5.0, options, **there).cpu(), noise)


@pytest.mark.parametrize("length", ["sequence", "padded", "packed"])
@pytest.mark.parametrize("distribution", ["uniform", "gaussian", "rademacher"])
def test_no_forward_waits_for_the_device(length, distribution):
    # On the meta device nothing has a value: a forward that read one would fail.
    model, batch = Toy(device="meta"), ragged()
    inputs = {k: v.to("meta") for k, v in batch.items()}
    row = {k: v.to("meta") for k, v in packed().items()}
    cu = torch.zeros(5, dtype=torch.int32, device="meta")
    options = {"length": length, "distribution": distribution, "where": "prompt"}
    with noisy_embeddings(model, **options) as noise:
        for _ in range(2):
            model(**inputs, labels=inputs["input_ids"])
            model(**row, labels=row["input_ids"])
            model(input_ids=row["input_ids"], labels=row["input_ids"], cu_seq_lens_q=cu)
        assert noise._calls == 6


def test_scratch_memory_is_bounded_whatever_the_batch():
    class Largest(TorchDispatchMode):
        bytes = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.untyped_storage().nbytes() != whole:
                self.bytes = max(self.bytes, out.untyped_storage().nbytes())
            return out

    model, ids = Toy(256, torch.bfloat16), torch.zeros(64, 512, dtype=torch.long)
    whole = ids.numel() * 256 * 2  # 16 MiB: the embedding's output, the noise, and their sum
    with noisy_embeddings(model), Largest() as largest:
        model(ids)
    assert 0 < largest.bytes <= 2**20


# ---------------------------------------------------------------------------------- honesty

REPORT = {
    "noise_alpha",
    "calls",
    "tokens",
    "noise_rms",
    "expected_rms",
    "relative_rms",
    "effective_alpha_p10",
    "effective_alpha_p50",
    "effective_alpha_p90",
}


@pytest.mark.parametrize("generator", [False, True])
def test_report_says_what_was_really_added(generator):
    model, batch = tiny(), ragged()
    torch.nn.init.normal_(model.get_input_embeddings().weight)
    options = {"length": "padded", "generator": torch.Generator()} if generator else {}
    with noisy_embeddings(model, 5.0, **options) as noise:
        noisy = real(looked_up(model, **batch), batch)
        report = noise.report()
    clean = model.get_input_embeddings().weight[batch["input_ids"]].detach()
    clean = real(clean, batch)
    added = noisy - clean
    assert report.keys() == REPORT
    assert (report["noise_alpha"], report["calls"], report["tokens"]) == (5.0, 1, sum(LENGTHS))
    assert report["noise_rms"] == pytest.approx(added.square().mean().sqrt().item(), rel=1e-4)
    assert report["relative_rms"] == pytest.approx((added.norm() / clean.norm()).item(), rel=1e-4)
    cells = sum(LENGTHS) * 32
    energy = sum(25 / 3 * (n / 100 if generator else 1) for n in LENGTHS)
    assert report["expected_rms"] == pytest.approx(math.sqrt(energy / cells), rel=1e-5)
    assert report["noise_rms"] == pytest.approx(report["expected_rms"], rel=0.1)
    assert all(type(value) in (int, float) for value in report.values())


def test_effective_alpha_is_the_papers_for_sequences_and_less_for_widths():
    batch = ragged([100] * 2 + [25] * 6 + [4] * 2)
    wanted = {
        "sequence": (5.0, 5.0, 5.0),
        "padded": (1.0, 2.5, 5.0),  # α√(l/100)
    }
    for length, values in wanted.items():
        model = Toy()
        with noisy_embeddings(model, 5.0, length=length) as noise:
            for _ in range(3):
                model(**batch)
            report = noise.report()
        got = tuple(report[f"effective_alpha_p{p}"] for p in (10, 50, 90))
        assert got == pytest.approx(values, abs=0.005)
    model = Toy()
    with noisy_embeddings(model, 5.0, length="packed") as noise:
        model(**packed([110] + [110] * 9 + [948]))  # an Alpaca-like row of 2048 tokens
        assert noise.report()["effective_alpha_p50"] == pytest.approx(1.16, abs=0.01)


def test_alpha_zero_is_off_and_counted_honestly():
    model, batch = tiny(), ragged([5])
    with noisy_embeddings(model, 0) as noise:
        noisy = looked_up(model, **batch)
        report = noise.report()
    assert torch.equal(noisy, model.get_input_embeddings()(batch["input_ids"]))
    assert report.keys() == REPORT and (report["calls"], report["tokens"]) == (1, 0)
    assert report["noise_rms"] is None


def test_the_context_manager_warns_when_nothing_was_noised():
    warned = pytest.warns(UserWarning, match="no noise was added: no forward ran in training mode")
    with warned, noisy_embeddings(tiny()):
        pass


# ------------------------------------------------------------------------------- bad values


@pytest.mark.parametrize(
    "bad, error",
    [(-1, ValueError), (math.nan, ValueError), (math.inf, ValueError), (-math.inf, ValueError)]
    + [(True, TypeError), ("5", TypeError), (None, TypeError), ([5], TypeError)],
)
def test_a_bad_alpha_is_refused_everywhere(bad, error):
    model = Toy()
    for call in (
        lambda: noise_scale([1], 1, bad),
        lambda: EmbeddingNoise(bad),
        lambda: noisy_embeddings(model, bad).__enter__(),
        lambda: NEFTuneCallback(bad),
    ):
        with pytest.raises(error, match="noise_alpha must be .*>= 0, not"):
            call()
    assert hooks_of(model) == 0


@pytest.mark.parametrize("name", ["distribution", "length", "where"])
@pytest.mark.parametrize("bad", ["Uniform", "", None, 1])
def test_an_unknown_name_is_refused_with_those_allowed(name, bad):
    allowed = {"distribution": "gaussian", "length": "sequence", "where": "prompt"}[name]
    with pytest.raises(ValueError, match=f"{name} must be one of .*{allowed}"):
        NEFTuneCallback(5.0, **{name: bad})


@pytest.mark.parametrize("bad", [1.5, "0", True])
@pytest.mark.parametrize("name", ["seed", "rank"])
def test_a_seed_or_rank_that_is_no_integer_is_refused(name, bad):
    with pytest.raises(TypeError, match=f"{name} must be an integer"):
        EmbeddingNoise(**{name: bad})


def test_other_bad_arguments_are_refused():
    with pytest.raises(TypeError, match="step must be an integer"):
        EmbeddingNoise().set_step(None)
    with pytest.raises(ValueError, match="step must be >= 0"):
        EmbeddingNoise().set_step(-1)
    with pytest.raises(ValueError, match="needs length='padded'"):
        EmbeddingNoise(generator=torch.Generator())
    with pytest.raises(TypeError, match="unexpected keyword"):
        NEFTuneCallback(5.0, alpha=5)
    for lengths, hidden in (([0], 4), ([4], 0), ([math.nan], 4), ([4, -1], 4)):
        with pytest.raises(ValueError, match="must be at least 1"):
            noise_scale(lengths, hidden, 5.0)
    with pytest.raises(ValueError, match="Linear has no input embedding"):
        EmbeddingNoise().attach(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="cu_seq_lens_q with an attention_mask"):
        drawn(Toy(), cu_seq_lens_q=torch.tensor([0, 3, 6]), **ragged([3, 2]))


# -------------------------------------------------------------------------- suggested alpha


@pytest.mark.parametrize("family", ["Llama", "GPT2", "Gemma"])
def test_suggested_alpha_gives_noise_that_is_the_asked_share_of_the_embedding(family):
    # Gemma's module multiplies by √d, so its rows are √32 = 5.7 times the weight's; in
    # transformers 4 the model does it behind the module, which scales the noise as well.
    model, lengths = tiny(family), [40] * 5 + [10, 90]
    noise_alpha = suggest_noise_alpha(model, lengths, share=0.25)
    with noisy_embeddings(model, noise_alpha) as noise:
        for _ in range(20):
            model(input_ids=torch.arange(3, 43)[None])
    assert noise.report()["relative_rms"] == pytest.approx(0.25, rel=0.05)
    norms = model.get_input_embeddings().weight.norm(dim=1)
    inside = family == "Gemma" and not transformers.__version__.startswith("4.")
    scale = math.sqrt(32) if inside else 1
    wanted = 0.25 * norms.mean().item() * scale * math.sqrt(120)
    assert noise_alpha == pytest.approx(wanted, rel=1e-5)


def test_suggested_alpha_of_llama_like_rows_is_near_the_papers_five():
    model = Toy(4)
    torch.nn.init.constant_(model.embed.weight, 0.55)  # norm 1.1
    assert suggest_noise_alpha(model, [110]) == pytest.approx(5.0, abs=0.01)
    for lengths, share in (([], 0.25), ([0], 0.25), ([5], 0), ([5], math.nan), ([5], -1)):
        with pytest.raises(ValueError, match="must"):
            suggest_noise_alpha(model, lengths, share)
