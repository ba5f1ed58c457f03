"""Perturbed weights come back exactly, draws are shared by all arms, probabilities are right."""

import copy
import random
from string import ascii_lowercase

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.overrides import TorchFunctionMode

from neft_utils.base.profiles import Model
from neft_utils.base.read_profile import load_profile
from neft_utils.evaluate import stability
from neft_utils.train.base_models import load_base, load_tokenizer
from neft_utils.train.encoding import encode
from neft_utils.train.fast import lean_lora
from neft_utils.train.losses import response_nll

NANO = Model(source="nano")
ROWS = [
    {"id": "a", "prompt": "Name 3 colours, please.", "response": "Red, green and blue."},
    {"id": "b", "prompt": "Is water wet?", "response": "Yes"},
    {"id": "c", "prompt": "Say a lot", "response": "well, " * 12 + "well"},
    {"id": "d", "prompt": "One letter", "response": "x"},
]
TEXT = "The 2 quick brown foxes, over there, JUMP: über 10 % of all dogs!\n\tAnd so on... " * 40


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(NANO)


def lively(dtype=torch.float32):
    """The nano model with weights large enough that its losses depend on what it reads."""
    model = load_base(NANO, "bf16").float()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2:
                torch.nn.init.normal_(parameter, std=0.3 if "proj" in name else 1.0)
    return model.to(dtype)


def with_adapter(model):
    """The model inside a PEFT model whose adapters do something."""
    lora = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    tuned = get_peft_model(model, lora)
    for name, parameter in tuned.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return lean_lora(tuned).eval()


def state(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def same_bits(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# ------------------------------------------------------------------------------- weights


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_are_perturbed_by_their_level_and_restored_exactly(dtype):
    model = lively(dtype)
    before = state(model)
    with stability.perturbed_weights(model, 0.02, seed=3):
        steps = []
        for name, weight in stability.linear_weights(model).items():
            clean = before[name].float()
            step = (weight.float() - clean) / clean.square().mean(1, keepdim=True).sqrt()
            rows = step.square().mean(1).sqrt()  # over 64 or 128 columns: 40 % is 4 SD or more
            assert ((rows - 0.02).abs() < 0.4 * 0.02).all(), name
            steps.append(step.flatten())
        steps = torch.cat(steps) / 0.02
        assert steps.square().mean().sqrt().item() == pytest.approx(1, rel=0.02)
        assert steps.mean().abs() < 0.02 and steps.abs().max() < 6
        share = (steps.abs() < 1).float().mean().item()
        assert share == pytest.approx(0.683, abs=0.02)  # of a normal distribution
        changed = {name for name in before if not torch.equal(before[name], state(model)[name])}
    assert changed == {name for name in before if "_proj" in name}  # no embedding, head or norm
    assert same_bits(before, state(model))


def test_levels_share_directions_and_parameters_and_seeds_do_not():
    model = lively()
    before = state(model)
    steps = {}
    for level, seed in ((0.01, 0), (0.04, 0), (0.01, 1), (-0.01, 0)):
        with stability.perturbed_weights(model, level, seed):
            steps[level, seed] = {
                name: weight.detach() - before[name]
                for name, weight in stability.linear_weights(model).items()
            }
    q, k = (f"model.layers.0.self_attn.{name}_proj.weight" for name in "qk")
    v = k.replace("k_proj", "v_proj")
    for level, times in ((0.04, 4), (-0.01, -1)):
        torch.testing.assert_close(
            steps[level, 0][q], times * steps[0.01, 0][q], rtol=1e-3, atol=1e-6
        )

    def correlation(one, other):
        return torch.corrcoef(torch.stack([one.flatten(), other.flatten()]))[0, 1].abs()

    assert steps[0.01, 0][k].shape == steps[0.01, 0][v].shape
    assert correlation(steps[0.01, 0][k], steps[0.01, 0][v]) < 0.1
    assert correlation(steps[0.01, 0][q], steps[0.01, 1][q]) < 0.1


def test_every_arm_gets_the_same_base_and_keeps_its_adapter():
    plain, tuned = lively(), with_adapter(lively())
    adapters = {name: value for name, value in state(tuned).items() if "lora_" in name}
    before = state(tuned)
    weights = stability.linear_weights(tuned)
    assert weights.keys() == stability.linear_weights(plain).keys()
    torch.manual_seed(1)  # whatever the global state is
    with stability.perturbed_weights(plain, 0.05), stability.perturbed_weights(tuned, 0.05):
        for name, weight in stability.linear_weights(plain).items():
            assert torch.equal(weight, weights[name]), name
        inside = state(tuned)
        assert all(torch.equal(inside[name], value) for name, value in adapters.items())
        assert not same_bits(before, inside)
    assert adapters and same_bits(before, state(tuned))


def test_weights_are_restored_after_an_error_in_the_forward(tokenizer):
    model = lively(torch.bfloat16)
    before, calls = state(model), []

    def second_call_fails(module, args):
        calls.append(not same_bits(before, state(model)))
        if len(calls) == 2:
            raise KeyboardInterrupt

    handle = model.model.layers[1].register_forward_pre_hook(second_call_fails)
    with pytest.raises(KeyboardInterrupt):
        stability.perturbed_losses(model, tokenizer, ROWS, 5000, say=lambda line: None)
    handle.remove()
    assert calls == [False, True]  # the second call did see perturbed weights
    assert same_bits(before, state(model))


def test_weights_are_restored_after_an_error_while_perturbing():
    class FifthDrawFails(TorchFunctionMode):
        draws = 0

        def __torch_function__(self, function, types, args=(), kwargs=None):
            if function is torch.randn:
                self.draws += 1
                if self.draws == 5:
                    raise MemoryError
            return function(*args, **(kwargs or {}))

    model = lively()
    before = state(model)
    with pytest.raises(MemoryError), FifthDrawFails(), stability.perturbed_weights(model, 0.1):
        pytest.fail("entered")
    assert same_bits(before, state(model))


def test_weights_that_cannot_be_perturbed_are_refused(tokenizer):
    model = lively()
    layer = model.model.layers[0].mlp.up_proj
    layer.weight = torch.nn.Parameter(torch.zeros(4, 4, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(ValueError, match="layers.0.mlp.up_proj.weight is quantised.*dequantized"):
        stability.perturbed_losses(model, tokenizer, ROWS, 5000)
    for level in (float("nan"), float("inf")):
        with (
            pytest.raises(ValueError, match="level must be finite, not"),
            stability.perturbed_weights(model, level),
        ):
            pass


# --------------------------------------------------------------------------------- losses


def test_perturbed_losses_are_the_losses_of_what_they_say(tokenizer):
    model, lines = lively(), []
    options = {"weight_levels": (0.05, 0.1), "typo_rates": (0.3,), "seed": 5}
    before, rng = state(model), (torch.get_rng_state(), random.getstate())
    table = stability.perturbed_losses(model, tokenizer, ROWS, 100, **options, say=lines.append)
    assert torch.equal(torch.get_rng_state(), rng[0]) and random.getstate() == rng[1]
    assert same_bits(before, state(model)) and len(lines) == 4
    assert list(table.columns) == stability.PERTURBED_COLUMNS
    assert list(table.example_id) == ["a", "b", "c", "d"] * 4
    found = {key: group.nll.tolist() for key, group in table.groupby(["kind", "level"], sort=False)}
    assert list(found) == [("none", 0), ("weights", 0.05), ("weights", 0.1), ("prompt", 0.3)]

    def losses(network, rows):
        return pytest.approx(
            response_nll(network, [encode(tokenizer, row) for row in rows], 100), rel=1e-4
        )

    assert found["none", 0] == losses(model, ROWS)
    both = []
    for level in (0.1, -0.1):  # the mean over the two directions
        with stability.perturbed_weights(model, level, seed=5):
            broken = copy.deepcopy(model)
        both.append(response_nll(broken, [encode(tokenizer, row) for row in ROWS], 100))
    mean = [(plus + minus) / 2 for plus, minus in zip(*both, strict=True)]
    assert both[0] != pytest.approx(both[1], rel=1e-3)
    assert found["weights", 0.1] == pytest.approx(mean, rel=1e-4)
    assert found["weights", 0.05] != found["none", 0]
    mistyped = [
        {**row, "prompt": stability.typos(row["prompt"], 0.3, f"5/{row['id']}")} for row in ROWS
    ]
    assert (
        found["prompt", 0.3] == losses(model, mistyped) and found["prompt", 0.3] != found["none", 0]
    )


def test_an_example_is_perturbed_alike_whatever_stands_beside_it(tokenizer):
    model = lively()
    options = {"typo_rates": (0.3,), "weight_levels": (0.1,), "say": lambda line: None}
    whole = stability.perturbed_losses(model, tokenizer, ROWS, 100, **options)
    two = stability.perturbed_losses(model, tokenizer, [ROWS[3], ROWS[0]], 5000, **options)
    both = whole.merge(two, on=["kind", "level", "example_id"], suffixes=("", "_two"))
    assert len(both) == len(two) == 6
    assert both.nll.tolist() == pytest.approx(both.nll_two.tolist(), rel=1e-4)
    other = stability.perturbed_losses(model, tokenizer, ROWS, 100, seed=1, **options)
    moved = (whole.nll - other.nll).abs() > 1e-3
    assert not moved[whole.kind == "none"].any() and moved[whole.kind == "weights"].all()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"weight_levels": (0.1, 0)}, "weight_levels must be above 0 and at most 1, not 0"),
        (
            {"weight_levels": (float("nan"),)},
            "weight_levels must be above 0 and at most 1, not nan",
        ),
        ({"typo_rates": (1.5,)}, "typo_rates must be above 0 and at most 1, not 1.5"),
        ({"rows": []}, "no rows to score: pass at least one example"),
        ({"rows": [ROWS[0], ROWS[1], ROWS[0]]}, "example_id a is there twice"),
    ],
)
def test_bad_input_is_one_line(tokenizer, change, message):
    options = {"rows": ROWS, "batch_tokens": 100} | change
    with pytest.raises(ValueError, match=message) as caught:
        stability.perturbed_losses(load_base(NANO, "bf16"), tokenizer, **options)
    assert "\n" not in str(caught.value)


# --------------------------------------------------------------------------------- prompts


def test_typos_hit_letters_at_their_rate_and_nothing_else():
    assert stability.typos(TEXT, 0, 0) == TEXT
    for rate in (0.02, 0.3, 1):
        mistyped = stability.typos(TEXT, rate, 0)
        assert mistyped == stability.typos(TEXT, rate, 0) != stability.typos(TEXT, rate, 1)
        rest = [[c for c in text if not c.isalpha()] for text in (TEXT, mistyped)]
        assert rest[0] == rest[1]
        letters = sum(c.isalpha() for c in TEXT)
        lost = (len(TEXT) - len(mistyped)) / letters  # a third of the edits deletes
        assert lost == pytest.approx(rate / 3, abs=4 * (rate / 3 / letters) ** 0.5 + rate / 10)
        cases = [sum(c.isupper() for c in text) for text in (TEXT, mistyped)]
        assert 0.4 <= cases[1] / cases[0] <= 1.2  # a replaced letter keeps its case


@pytest.mark.parametrize("rate", [0.02, 0.1, 0.5])
def test_letters_that_stand_alone_are_replaced_or_deleted_at_the_rate(rate):
    letters = [ascii_lowercase[i % 26] for i in range(4000)]
    found = stability.typos(" ".join(letters), rate, 0).split(" ")
    assert len(found) == 4000 and all(len(one) <= 1 for one in found)  # no swap with a space
    hit = sum(one != letter for one, letter in zip(found, letters, strict=True)) / 4000
    assert hit == pytest.approx(rate, abs=4 * (rate * (1 - rate) / 4000) ** 0.5)
    assert found.count("") / 4000 / hit == pytest.approx(1 / 3, abs=0.2 if rate < 0.1 else 0.1)


def test_a_typo_changes_the_word_by_one_swap_deletion_or_replacement():
    word, seen = "plausibly", set()
    for seed in range(300):
        new = stability.typos(word, 0.05, seed)
        if new == word:
            continue
        deletions = {word[:i] + word[i + 1 :] for i in range(9)}
        swaps = {word[:i] + word[i + 1] + word[i] + word[i + 2 :] for i in range(8)}
        differing = sum(a != b for a, b in zip(word, new, strict=False))
        if new in deletions:
            seen.add("delete")
        elif new in swaps:
            seen.add("swap")
        elif len(new) == 9 and differing == 1:
            seen.add("replace")
    assert seen == {"delete", "swap", "replace"}
    # Alone, a letter cannot be swapped; it is replaced by another one or kept from deletion.
    alone = [stability.typos("z", 1, seed) for seed in range(300)]
    assert (
        60 < alone.count("z") < 140 and set(alone) <= set(ascii_lowercase) and len(set(alone)) == 26
    )


def test_higher_rates_keep_the_typos_of_lower_ones():
    low, high = (stability.typos(TEXT, rate, 7) for rate in (0.01, 0.05))
    words = [text.split() for text in (TEXT, low, high)]
    hit = [{i for i, w in enumerate(some) if w != words[0][i]} for some in words[1:]]
    assert hit[0] and hit[0] < hit[1]


@pytest.mark.parametrize("text", ["", "a", "ab", "  x ", "7?", "ß", "你好"])
def test_a_text_is_never_typed_away(text):
    for seed in range(60):
        new = stability.typos(text, 1, seed)
        assert new.strip() or not text.strip()
        if not any(c.isalpha() for c in text):
            assert new == text


def test_typos_refuses_other_rates():
    for rate in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="rate must be between 0 and 1, not"):
            stability.typos("text", rate, 0)


# -------------------------------------------------------------------------------- stopping


@pytest.mark.parametrize("batch_tokens", [1, 150, 5000])
def test_stopping_equals_the_softmax_of_all_logits(tokenizer, batch_tokens):
    model = lively().train()  # must be put into eval mode
    table = stability.stopping(model, tokenizer, ROWS, batch_tokens)
    assert not model.training and list(table.columns) == stability.STOPPING_COLUMNS
    assert list(table.example_id) == ["a", "b", "c", "d"]
    for row, found in zip(ROWS, table.itertuples(index=False), strict=True):
        encoded = encode(tokenizer, row)
        with torch.no_grad():
            logits = model(torch.tensor([encoded["input_ids"]])).logits[0]
        response = sum(encoded["completion_mask"])
        assert encoded["input_ids"][-1] == tokenizer.eos_token_id
        p = logits.softmax(1)[-response - 1 : -1, tokenizer.eos_token_id].tolist()
        assert found.n_tokens == response
        assert found.p_end == pytest.approx(p[-1], rel=1e-4)
        size, extra = divmod(response - 1, 4)
        edges = [k * size + min(k, extra) for k in range(5)]
        for k in range(4):
            quarter = p[edges[k] : edges[k + 1]]
            value = sum(quarter) / len(quarter) if quarter else float("nan")
            expected = pytest.approx(value, rel=1e-4, nan_ok=True)
            assert getattr(found, f"p_quarter_{k + 1}") == expected


def test_stopping_refuses_nothing_to_score(tokenizer):
    with pytest.raises(ValueError, match="no rows to score"):
        stability.stopping(load_base(NANO, "bf16"), tokenizer, [], 100)


# ------------------------------------------------------------------------------ embeddings


@pytest.fixture(scope="module")
def table():
    return torch.randn(700, 32, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("distance", ["cosine", "euclidean"])
def test_flips_grow_from_none_to_nearly_all(table, distance):
    alphas = [0, 40, 80, 120, 240, 480, 10_000]
    rng = torch.get_rng_state()
    flips = [stability.token_flips(table, 50, a, distance=distance) for a in alphas]
    assert torch.equal(rng, torch.get_rng_state())
    assert flips == sorted(flips) and flips[0] == 0 and flips[-1] > 0.98
    assert 0 < flips[3] < flips[4] < 1
    # A longer sequence gets weaker noise: four times the length is half of alpha.
    longer = stability.token_flips(table, 200, 240, distance=distance)
    assert longer == pytest.approx(flips[3])


@pytest.mark.parametrize("distance", ["cosine", "euclidean"])
def test_flips_equal_a_count_by_hand(table, distance):
    length, alpha, seed = 20, 90, 4
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(700, generator=generator)[:300]
    unit = torch.rand(300, 32, generator=generator) * 2 - 1
    noised = (table[chosen] + unit * alpha / (length * 32) ** 0.5).double()
    clean = table.double()
    if distance == "cosine":
        far = 1 - torch.cosine_similarity(noised[:, None], clean[None], dim=2)
    else:
        far = torch.cdist(noised, clean)
    expected = (far.argmin(1) != chosen).double().mean().item()
    found = stability.token_flips(table, length, alpha, 300, seed, distance)
    assert 0.05 < expected < 0.95 and found == expected


@pytest.mark.parametrize("distance", ["cosine", "euclidean"])
def test_equal_rows_and_empty_rows_are_no_flips(table, distance):
    twins = torch.cat([table, table, table * (1 + 1e-7), torch.zeros(5, 32)])
    assert stability.token_flips(twins, 50, 0, len(twins), distance=distance) == 0
    weight = twins.bfloat16()
    assert stability.token_flips(weight, 50, 0, len(twins), distance=distance) == 0


def test_bad_flips_are_refused(table):
    for options, message in (
        ({"distance": "l1"}, "distance must be 'cosine' or 'euclidean', not 'l1'"),
        ({"n_tokens": 0}, "n_tokens must be at least 1, not 0"),
        ({"length": 0}, "lengths and hidden_size must be at least 1"),
        ({"noise_alpha": -1}, "noise_alpha must be finite and >= 0, not -1"),
    ):
        with pytest.raises(ValueError, match=message):
            stability.token_flips(**{"weight": table, "length": 9, "noise_alpha": 5} | options)


# ------------------------------------------------------------------------- the real model


@pytest.mark.wheels
def test_the_real_base_gets_worse_with_every_level():
    profile = load_profile("cpu").model
    model, tokenizer = load_base(profile), load_tokenizer(profile)
    rows = [
        {
            "id": "france",
            "prompt": "What is the capital of France? Answer in one sentence.",
            "response": "The capital of France is Paris.",
        },
        {
            "id": "sky",
            "prompt": "Is the sky blue because sunlight is scattered by the air?",
            "response": "Yes, the sky is blue because sunlight is scattered by the air.",
        },
    ]
    table = stability.perturbed_losses(
        model, tokenizer, rows, 1024, weight_levels=(0.1, 0.4), typo_rates=(0.3,)
    )
    means = table.groupby(["kind", "level"]).nll.mean()
    assert 0 < means["none", 0] < 4
    assert means["none", 0] + 0.02 < means["weights", 0.4] > means["weights", 0.1]
    assert means["none", 0] < means["prompt", 0.3]
    stops = stability.stopping(model, tokenizer, rows, 1024)
    assert (stops.p_end > 10 * stops.p_quarter_2).all()  # it knows where to stop
    weight = model.get_input_embeddings().weight
    assert stability.token_flips(weight, 170, 15, 64) == 0
    assert stability.token_flips(weight, 170, 2000, 64) > 0.5
