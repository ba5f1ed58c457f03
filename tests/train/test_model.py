"""The fast path computes what the padded reference computes; answers do not depend on batches."""

import copy

import pytest
import torch
import torch.nn.functional as F
from tiny import lively_nano
from transformers import LogitsProcessorList, RepetitionPenaltyLogitsProcessor

from neft_utils.base.paths import PACKAGE
from neft_utils.base.profiles import Model
from neft_utils.base.strict import ConfigError
from neft_utils.data.layouts import INPUT
from neft_utils.evaluate import generate
from neft_utils.train import folders
from neft_utils.train.base_models import load_base, load_tokenizer
from neft_utils.train.encoding import count_tokens, encode, flat_batch, prompt_ids
from neft_utils.train.fast import ATTENTION
from neft_utils.train.folders import _verify, model_folder
from neft_utils.train.losses import response_nll, response_token_nll

NANO = Model(source="nano")


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(NANO)


@pytest.fixture
def nano():
    return load_base(NANO, "bf16").float()


@pytest.fixture
def lively():
    return lively_nano()


@pytest.fixture(scope="module")
def encoded(tokenizer):
    rows = [("Hi", "Good day to you."), ("Two and two?", "Four"), ("Say a lot", "well " * 30)]
    return [encode(tokenizer, {"prompt": p, "response": r}) for p, r in rows]


def padded_token_nll(model, encoded):
    """Right-padded batch, full logits, plain SDPA: the textbook way."""
    model.set_attn_implementation("sdpa")
    width = max(len(e["input_ids"]) for e in encoded)
    pad = lambda values, fill: values + [fill] * (width - len(values))  # noqa: E731
    ids = torch.tensor([pad(e["input_ids"], 1) for e in encoded])
    response = torch.tensor([pad(e["completion_mask"], 0) for e in encoded]).bool()
    mask = torch.tensor([pad([1] * len(e["input_ids"]), 0) for e in encoded])
    logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1]
    nll = F.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
    model.set_attn_implementation(ATTENTION)
    return nll, response[:, 1:]


def test_loss_and_gradients_equal_the_padded_reference(nano, encoded):
    nll, _ = response_token_nll(nano, flat_batch(encoded))
    nll.sum().backward()
    ours = {name: p.grad.clone() for name, p in nano.named_parameters()}
    nano.zero_grad()
    reference, chosen = padded_token_nll(nano, encoded)
    reference[chosen].sum().backward()
    torch.testing.assert_close(nll, reference[chosen], rtol=1e-5, atol=1e-5)
    for name, p in nano.named_parameters():
        scale = p.grad.abs().max()
        assert (ours[name] - p.grad).abs().max() <= 1e-5 * scale, name


def test_response_nll_is_the_mean_over_response_tokens_whatever_the_batch(nano, encoded):
    with torch.no_grad():
        reference, chosen = padded_token_nll(nano.eval(), encoded)
    expected = [float(n[c].mean()) for n, c in zip(reference, chosen, strict=True)]
    for batch_tokens in (16, 60, 5000):
        assert response_nll(nano, encoded, batch_tokens) == pytest.approx(expected, rel=1e-5)


def test_the_mask_covers_the_response_and_its_end_only(tokenizer):
    one = encode(tokenizer, {"prompt": "Hi", "response": "Yo"})
    marked = [i for i, k in zip(one["input_ids"], one["completion_mask"], strict=True) if k]
    assert tokenizer.decode(marked) == "Yo<|im_end|>"
    # The prompt holds the same end-of-turn id, unmarked: masks are not made from ids.
    assert one["input_ids"].count(tokenizer.eos_token_id) == 2


def test_a_model_without_chat_template_gets_the_alpaca_prompt(tokenizer):
    plain = copy.deepcopy(tokenizer)
    plain.chat_template = None
    text = plain.decode(prompt_ids(plain, "Name a colour."))
    assert text.endswith("### Instruction:\nName a colour.\n\n### Response:")
    assert "paired with an input" not in text
    text = plain.decode(prompt_ids(plain, "Add." + INPUT + "1 2"))
    assert "describes a task, paired with an input that provides further context. Write" in text
    assert text.endswith("### Instruction:\nAdd.\n\n### Input:\n1 2\n\n### Response:")


def test_a_base_model_without_a_beginning_of_text_gets_none(tokenizer):
    """Some families have no such token; nothing is made up in its place."""
    plain = copy.deepcopy(tokenizer)
    plain.chat_template = plain.bos_token = None
    text = plain.decode(prompt_ids(plain, "Name a colour."))
    assert text.startswith("Below is an instruction")
    one = encode(plain, {"prompt": "Name a colour.", "response": "Red"})
    assert one["input_ids"][-1] == plain.eos_token_id and sum(one["completion_mask"]) > 1


@pytest.mark.parametrize("ends", [False, True])
def test_what_a_tokenizer_appends_is_not_put_before_the_answer(tokenizer, ends):
    """With a template or without, the end of sequence stands where the answer ends, and only there.

    What a tokenizer puts before a text stays.
    """
    from tokenizers.processors import TemplateProcessing

    plain = copy.deepcopy(tokenizer)
    plain.chat_template = None
    before = prompt_ids(plain, "Name a colour.")
    single = "<|im_start|> $A <|im_end|>" if ends else "<|im_start|> $A"
    plain.backend_tokenizer.post_processor = TemplateProcessing(
        single=single, special_tokens=[("<|im_start|>", 0), ("<|im_end|>", 1)]
    )
    assert prompt_ids(plain, "Name a colour.") == [0, *before]
    one = encode(plain, {"prompt": "Name a colour.", "response": "Red"})
    assert one["input_ids"].count(1) == 1 and one["input_ids"][-1] == 1
    plain.chat_template = tokenizer.chat_template
    example = {"prompt": "Name a colour.", "response": "Red"}
    assert encode(plain, example) == encode(tokenizer, example)


def test_an_answer_ends_with_the_templates_end_of_turn(lively, tokenizer):
    other = copy.deepcopy(tokenizer)
    other.add_special_tokens({"additional_special_tokens": ["<turn>", "<eos>"]})
    other.eos_token = "<eos>"
    turn, eos = other.convert_tokens_to_ids(["<turn>", "<eos>"])
    example = {"prompt": "Hi", "response": "Yo"}
    cases = {
        "{% for m in messages %}{{ m.role }}: {{ m.content }} <turn>\n{% endfor %}": turn,
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n<turn><eos>{% endfor %}": turn,
        "{% for m in messages %}{{ m.content }}<eos>{% endfor %}": eos,
        "{% for m in messages %}{{ m.content }}\n{% endfor %}": eos,  # none that ends an answer
        "{{ messages[0].content }}": eos,  # no answers at all
        "{% if messages[-1].role == 'assistant' %}{{ raise_exception('no') }}{% endif %}"
        "{{ messages[0].content }}": eos,
    }
    for template, expected in cases.items():
        other.chat_template = template
        assert encode(other, example)["input_ids"][-1] == expected, template
        assert {expected, eos} <= set(generate.stop_ids(lively.generation_config, other))
    other.chat_template = None
    assert encode(other, example)["input_ids"][-1] == eos
    assert encode(tokenizer, example)["input_ids"][-1] == tokenizer.eos_token_id


def test_an_answer_longer_than_the_model_reads_is_refused(lively, tokenizer):
    width = len(prompt_ids(tokenizer, "Hi"))
    options = {"batch_size": 1, "max_new_tokens": 1024 - width + 1}
    with pytest.raises(ConfigError, match="exceeds the 1024 tokens that the model reads"):
        generate.answer(lively, tokenizer, ["Hi"], **options)


def test_weights_that_are_missing_are_not_rounded_either(nano, tokenizer, tmp_path, monkeypatch):
    from safetensors.torch import load_file, save_file

    monkeypatch.setattr(folders, "MODELS", tmp_path / "cache")
    nano.to(torch.bfloat16).save_pretrained(tmp_path / "mine")
    tokenizer.save_pretrained(tmp_path / "mine")
    file = tmp_path / "mine" / "model.safetensors"
    held = load_file(file)
    del held["model.layers.1.mlp.up_proj.weight"]
    save_file(held, file, {"format": "pt"})
    for base_weights in ("bf16", "nf4_dequantized"):
        with pytest.raises(ConfigError, match=r"1 tensors: model.layers.1.mlp.up_proj.weight\)"):
            load_base(Model(source=str(tmp_path / "mine"), base_weights=base_weights))
    assert not list((tmp_path / "cache").glob("*"))


def test_quantising_once_rounds_linear_layers_and_leaves_embeddings():
    plain, rounded = load_base(NANO, "bf16"), load_base(NANO, "nf4_dequantized")
    for (name, a), (_, b) in zip(plain.named_parameters(), rounded.named_parameters(), strict=True):
        assert torch.equal(a, b) == ("proj" not in name), name
        assert b.dtype == torch.bfloat16
    # NF4 has 16 levels a block of 64: no block of a rounded weight holds more.
    block = rounded.model.layers[0].self_attn.q_proj.weight.flatten()[:64]
    assert len(block.unique()) <= 16


def test_a_model_of_ones_own_is_rounded_to_nf4_once_and_again_when_it_changes(
    nano, tokenizer, tmp_path, monkeypatch
):
    monkeypatch.setattr(folders, "MODELS", tmp_path / "cache")
    nano.to(torch.bfloat16).save_pretrained(tmp_path / "mine")
    tokenizer.save_pretrained(tmp_path / "mine")
    mine = Model(source=str(tmp_path / "mine"))
    ours = load_base(NANO, "nf4_dequantized")  # of the package's own copy of the same weights
    theirs = load_base(mine)
    for (name, a), (_, b) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        assert torch.equal(a, b), name
    first = model_folder(mine)
    assert first == model_folder(mine) and first.parent == tmp_path / "cache"
    (tmp_path / "mine" / "note.txt").write_text("other")
    assert model_folder(mine) != first


def test_a_cached_model_without_sums_is_made_anew(tmp_path, monkeypatch):
    monkeypatch.setattr(folders, "MODELS", tmp_path)
    (tmp_path / "nano").mkdir()
    (tmp_path / "nano" / "config.json").write_text("{}")
    assert (model_folder(NANO, "bf16") / "model.safetensors").exists()


def test_a_cached_model_that_changed_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(folders, "MODELS", tmp_path)
    folder = model_folder(NANO, "bf16")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    _verify.cache_clear()  # as in another process
    with pytest.raises(ConfigError, match="model.safetensors has changed since .*: delete"):
        model_folder(NANO, "bf16")
    _verify.cache_clear()


@pytest.mark.parametrize(
    "model, message",
    [
        (Model(source="someone/some-model"), "pin a commit of someone/some-model"),
        (Model(source=str(PACKAGE)), "holds no model"),
        (Model(source="./not/there"), "neither a folder nor a hub id"),
    ],
)
def test_a_model_that_is_not_there_says_so(model, message):
    with pytest.raises(ConfigError, match=message):
        model_folder(model)


def test_batched_answers_equal_single_ones(lively, tokenizer):
    prompts = ["Hi", "A much longer prompt than the first one", "Why?", "Name three colours"]
    options = {"max_new_tokens": 24, "repetition_penalty": 1.2}
    together = generate.answer(lively, tokenizer, prompts, batch_size=4, **options)
    alone = generate.answer(lively, tokenizer, prompts, batch_size=1, **options)
    assert together == alone
    assert len({row["text"] for row in together}) == 4


def test_answers_equal_those_of_transformers_generate(lively, tokenizer):
    prompts = ["Hi", "A much longer prompt than the first one", "Why?", "Name three colours"]
    ours = generate.answer(lively, tokenizer, prompts, batch_size=4, max_new_tokens=24)
    stops = generate.stop_ids(lively.generation_config, tokenizer)
    penalty = generate.RepetitionPenalty(1.2, [*stops, tokenizer.pad_token_id])
    lively.set_attn_implementation("sdpa")
    for prompt, one in zip(prompts, ours, strict=True):
        ids = torch.tensor([prompt_ids(tokenizer, prompt)])
        out = lively.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=24,
            logits_processor=LogitsProcessorList([penalty]),
            eos_token_id=stops,
            pad_token_id=tokenizer.pad_token_id,
        )
        assert one == generate.first_turn(tokenizer, out[0, ids.shape[1] :].tolist(), stops)


def test_rows_that_end_leave_the_batch_and_change_no_other(lively, tokenizer, monkeypatch):
    """Many stop ids, so that the random model's answers end all over the place."""
    stops = list(range(0, 258, 16))
    monkeypatch.setattr(generate, "stop_ids", lambda generation_config, tokenizer: stops)
    batches = []
    forward = type(lively).forward
    monkeypatch.setattr(
        type(lively),
        "forward",
        lambda self, **kwargs: batches.append(len(kwargs["input_ids"])) or forward(self, **kwargs),
    )
    prompts = [f"{word} of number {n}" for n in range(6) for word in ("Tell me", "Sing", "A")]
    options = {"max_new_tokens": 40, "repetition_penalty": 1.2}
    together = generate.answer(lively, tokenizer, prompts, batch_size=18, **options)
    sizes = list(batches)
    assert together == [
        generate.answer(lively, tokenizer, [p], batch_size=1, **options)[0] for p in prompts
    ]
    assert len({row["n_tokens"] for row in together}) > 4 and sizes[0] == 18 and sizes[-1] < 9


def test_generate_of_transformers_reads_no_padding(lively, tokenizer):
    """Who calls `generate` on our models with a padded batch gets what single prompts get."""
    prompts = [prompt_ids(tokenizer, text) for text in ("Tell me of the sea", "Hi", "Why so?")]
    width = max(map(len, prompts))
    ids = torch.tensor([[1] * (width - len(one)) + one for one in prompts])
    mask = torch.tensor([[0] * (width - len(one)) + [1] * len(one) for one in prompts])
    options = {"do_sample": False, "max_new_tokens": 6, "min_new_tokens": 6, "pad_token_id": 1}
    together = lively.generate(input_ids=ids, attention_mask=mask, **options)
    for row, one in zip(together, prompts, strict=True):
        alone = lively.generate(
            input_ids=torch.tensor([one]), attention_mask=torch.ones(1, len(one)), **options
        )
        assert row[width:].tolist() == alone[0, len(one) :].tolist()


def test_no_answer_ends_before_its_minimum(lively, tokenizer, monkeypatch):
    """As transformers' min_new_tokens: the end of turn cannot be chosen before, but right after."""
    stops = list(range(0, 258, 8))
    monkeypatch.setattr(generate, "stop_ids", lambda generation_config, tokenizer: stops)
    prompts = [f"Tell me of number {n}" for n in range(8)]
    options = {"max_new_tokens": 40, "batch_size": 8}
    free = generate.answer(lively, tokenizer, prompts, **options)
    held = generate.answer(lively, tokenizer, prompts, min_new_tokens=12, **options)
    assert min(row["n_tokens"] for row in free) <= 12 < min(row["n_tokens"] for row in held)
    assert any(row["stopped"] for row in held)
    late = [n for n, row in enumerate(free) if row["n_tokens"] > 12]
    assert all(held[n] == free[n] for n in late)


def test_the_penalty_is_transformers_but_for_exempt_ids():
    ids, scores = torch.tensor([[3, 5, 3], [2, 2, 7]]), torch.randn(2, 10)
    theirs = RepetitionPenaltyLogitsProcessor(1.2)(ids, scores.clone())
    ours = generate.RepetitionPenalty(1.2, [2])(ids, scores.clone())
    kept = [i for i in range(10) if i != 2]
    assert torch.equal(ours[:, kept], theirs[:, kept])
    assert torch.equal(ours[:, 2], scores[:, 2])
    assert not torch.equal(theirs[:, 2], scores[:, 2])


@pytest.mark.parametrize(
    "tokens, expected",
    [([5, 6, 1, 9, 9], (3, True)), ([1, 9], (1, True)), ([5, 6, 7], (3, False))],
)
def test_length_counts_to_the_first_end_of_turn(tokenizer, tokens, expected):
    one = generate.first_turn(tokenizer, tokens, [1])
    assert (one["n_tokens"], one["stopped"]) == expected


def test_greedy_answers_follow_the_arg_max(lively, tokenizer):
    """Without penalty an answer is the arg max of the padded-free forward, token by token."""
    ids = prompt_ids(tokenizer, "Hi")
    text = generate.answer(
        lively, tokenizer, ["Hi"], max_new_tokens=8, batch_size=1, repetition_penalty=1.0
    )[0]
    lively.set_attn_implementation("sdpa")
    new = []
    with torch.no_grad():
        for _ in range(8):
            logits = lively(input_ids=torch.tensor([ids + new])).logits[0, -1]
            new.append(int(logits.argmax()))
            if new[-1] in generate.stop_ids(lively.generation_config, tokenizer):
                break
    assert text["text"] == tokenizer.decode(new, skip_special_tokens=True)


@pytest.mark.parametrize("double", [True, False])
def test_dequantising_once_equals_bitsandbytes_bit_for_bit(double):
    """Where bitsandbytes dequantises before the product: its forward and gradient are ours."""
    import bitsandbytes as bnb

    torch.manual_seed(0)
    plain = torch.nn.Linear(128, 192, bias=False, dtype=torch.bfloat16)
    options = {"quant_type": "nf4", "compress_statistics": double, "quant_storage": torch.uint8}
    layer = bnb.nn.Linear4bit(128, 192, bias=False, compute_dtype=torch.bfloat16, **options)
    layer.load_state_dict(plain.state_dict())
    layer.to("cpu")  # quantises
    state = layer.weight.quant_state
    once = bnb.functional.dequantize_4bit(layer.weight.data, state).to(torch.bfloat16)
    outs = []
    for product in (layer.train(), lambda x: F.linear(x, once)):
        torch.manual_seed(1)
        x = torch.randn(600, 128, dtype=torch.bfloat16, requires_grad=True)
        y = product(x)
        y.backward(torch.randn_like(y))
        outs.append((y, x.grad))
    assert layer.weight.dtype == torch.uint8 and not torch.equal(once, plain.weight)
    assert torch.equal(outs[0][0], outs[1][0]) and torch.equal(outs[0][1], outs[1][1])


@pytest.mark.parametrize("template", [True, False])
def test_rows_counted_together_are_as_long_as_encoded_one_by_one(template):
    tokenizer = load_tokenizer(Model(source="nano"))
    if not template:
        tokenizer.chat_template = None
    pairs = (("Why?", "So."), ("Add." + INPUT + "1 1", "2"), ("é 🙂", " two\nlines "))
    rows = [{"prompt": prompt, "response": response} for prompt, response in pairs]
    masks = [encode(tokenizer, row)["completion_mask"] for row in rows]
    assert count_tokens(tokenizer)(rows) == [(len(m) - sum(m), sum(m)) for m in masks]
