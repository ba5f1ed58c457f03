"""Encoder-decoder, speech and image models, and models that look their tokens up twice."""

import warnings

import pytest
import torch
import transformers
from test_noise import Toy, drawn, ragged, tiny

from neft_utils.noise import (
    EmbeddingNoise,
    _step_key,
    _token_keys,
    _unit_noise,
    noise_scale,
    noisy_embeddings,
)

SPECIAL = {"vocab_size": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
BART = SPECIAL | {
    "decoder_start_token_id": 2,
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "max_position_embeddings": 64,
}
T5 = SPECIAL | {
    "decoder_start_token_id": 0,
    "d_model": 32,
    "d_kv": 16,
    "d_ff": 48,
    "num_layers": 1,
    "num_heads": 2,
}
UNTIED = BART | {
    "share_encoder_decoder_embeddings": False,
    "decoder_vocab_size": 64,
    "tie_word_embeddings": False,
}
SEQ2SEQ = {
    "T5": ("T5ForConditionalGeneration", "T5Config", T5),
    "MT5": ("MT5ForConditionalGeneration", "MT5Config", T5),
    "BART": ("BartForConditionalGeneration", "BartConfig", BART),
    "mBART": ("MBartForConditionalGeneration", "MBartConfig", BART),
    "Pegasus": ("PegasusForConditionalGeneration", "PegasusConfig", BART),
    "Marian": ("MarianMTModel", "MarianConfig", BART),
    "Marian, two vocabularies": ("MarianMTModel", "MarianConfig", UNTIED),
}
ENCODED, DECODED = [9, 5], [4, 2]


def seq2seq(name):
    model, config, settings = SEQ2SEQ[name]
    torch.manual_seed(0)
    return getattr(transformers, model)(getattr(transformers, config)(**settings)).train()


def expected(lengths, look_up, hidden=32):
    """The contract without any layout: the noise of each sequence, (tokens, hidden)."""
    rows = []
    for k, n in enumerate(lengths):
        keys = _token_keys(_step_key(0, 0, 0, look_up), torch.full((n,), k), torch.arange(n))
        scale = noise_scale([n], hidden, 5.0)[:, None]
        rows.append(_unit_noise(keys, hidden, "uniform") * scale)
    return torch.cat(rows)


def look_ups(model, batch, **options):
    """(ids, noise) of each look-up of one noisy forward, and the report."""
    modules = [m for m in model.modules() if isinstance(m, torch.nn.Embedding)]
    seen = []

    def see(module, args, output):
        if isinstance(args[0], torch.Tensor):  # else positions of a shape
            with torch.no_grad():
                clean = type(module).forward(module, args[0])
            seen.append((args[0], output.detach() - clean))

    with noisy_embeddings(model, 5.0, **options) as noise:
        noise.set_step(0)
        handles = [m.register_forward_hook(see) for m in modules]
        model(**batch)
        for handle in handles:
            handle.remove()
        report = noise.report()
    return [(ids, e) for ids, e in seen if ids.dim() == 2 and e.any()], report


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", SEQ2SEQ)
@pytest.mark.parametrize("told_by", ["labels", "decoder mask", "both"])
def test_encoder_and_decoder_each_go_by_their_own_mask(name, told_by):
    batch = ragged(ENCODED)
    target = ragged(DECODED)
    labels = target["input_ids"].masked_fill(target["attention_mask"] == 0, -100)
    if told_by != "decoder mask":
        batch["labels"] = labels
    if told_by != "labels":
        batch["decoder_attention_mask"] = target["attention_mask"]
    if told_by == "decoder mask":
        batch["decoder_input_ids"] = target["input_ids"]
    (encoder, decoder), report = look_ups(seq2seq(name), batch)
    assert report["tokens"] == sum(ENCODED) + sum(DECODED)
    for (_, noise), mask, lengths, n in (
        (encoder, batch["attention_mask"], ENCODED, 0),
        (decoder, target["attention_mask"], DECODED, 1),
    ):
        assert torch.allclose(noise[mask.bool()], expected(lengths, n), atol=1e-6)
        assert not noise[mask == 0].any()


def test_a_mask_of_sound_says_nothing_about_the_words():
    config = transformers.WhisperConfig(
        **{n: v for n, v in BART.items() if n != "max_position_embeddings"},
        num_mel_bins=8,
        max_source_positions=10,
        max_target_positions=20,
    )
    model = transformers.WhisperForConditionalGeneration(config).train()
    frames = (torch.arange(20) < 12).long().expand(2, 20)
    labels = torch.full((2, 6), 7)
    labels[1, 4:] = -100
    batch = {"input_features": torch.randn(2, 8, 20), "attention_mask": frames, "labels": labels}
    (words,), report = look_ups(model, batch)
    assert report["tokens"] == 10
    assert torch.allclose(words[1][labels != -100], expected([6, 4], 0), atol=1e-6)


def test_prompt_and_response_are_for_models_without_an_encoder():
    for where in ("prompt", "response"):
        with pytest.raises(ValueError, match=f"where='{where}' is for decoder-only models"):
            EmbeddingNoise(5.0, where=where).attach(seq2seq("T5"))


def test_an_encoder_without_a_decoder_to_ask_for_is_refused():
    class Unknown(Toy):
        config = transformers.T5Config()

    with pytest.raises(ValueError, match="Unknown has an encoder and no get_decoder"):
        EmbeddingNoise().attach(Unknown())


def test_two_look_ups_of_a_forward_differ_and_do_not_depend_on_micro_batches():
    class TwoHeads(Toy):
        """Looks the next tokens up as well, as multi-token prediction does."""

        def forward(self, input_ids, attention_mask=None):
            return torch.cat([self.embed(input_ids), self.embed(input_ids.roll(-1, 1))], 2)

    model, ids = TwoHeads(), torch.full((3, 6), 5)
    with noisy_embeddings(model, 5.0) as noise:
        noise.set_step(0)
        whole = model(ids)
        noise.set_step(0)
        parts = torch.cat([model(ids[:1]), model(ids[1:])])
    assert torch.equal(whole, parts)
    assert not torch.equal(whole[..., :16], whole[..., 16:])
    assert torch.equal(whole[..., :16], drawn(Toy(), step=0, input_ids=ids))


# --------------------------------------------------------------------------- images in the row


class Seeing(Toy):
    config = transformers.LlavaConfig(image_token_index=6)


def test_text_leaves_placeholders_of_images_out_of_noise_and_length():
    ids = torch.tensor([[6] * 10 + [5] * 4])
    whole, text = Seeing(), Seeing()
    with noisy_embeddings(whole, 5.0) as noise:
        noise.set_step(0)
        assert whole(ids).all()
        assert noise.report()["tokens"] == 14
    with noisy_embeddings(text, 5.0, where="text") as noise:
        noise.set_step(0)
        out = text(ids, position_ids=torch.arange(14)[None]).detach()
        assert noise.report()["tokens"] == 4
    assert not out[0, :10].any()
    assert torch.equal(out[0, 10:], drawn(Toy(), step=0, **ragged([4]))[0])


def test_text_is_all_where_a_model_has_no_placeholders():
    batch = ragged([4, 6])
    assert torch.equal(drawn(Toy(), options={"where": "text"}, **batch), drawn(Toy(), **batch))


# ----------------------------------------------------------------------- a batch of no rows


def test_an_empty_batch_passes():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert drawn(Toy(), input_ids=torch.zeros(0, 5, dtype=torch.long)).shape == (0, 5, 16)
        assert drawn(Toy(), input_ids=torch.zeros(2, 0, dtype=torch.long)).shape == (2, 0, 16)
    model = Toy()
    with noisy_embeddings(model) as noise:
        noise.set_step(0)
        model(torch.zeros(0, 5, dtype=torch.long))
        after = model(**ragged([5])).detach()
    assert torch.equal(after, drawn(Toy(), step=0, **ragged([5])))


# ------------------------------------------------------------------- another noise beside ours


def test_a_replaced_forward_is_refused_before_and_after_and_accelerates_is_not():
    from accelerate.hooks import ModelHook, add_hook_to_module

    model = Toy()
    clean = model.embed.forward
    model.embed.forward = lambda ids: clean(ids) + torch.rand(16)
    with pytest.raises(RuntimeError, match="(?s)forward was replaced.*del model"):
        EmbeddingNoise().attach(model)
    del model.embed.forward
    ids = torch.full((1, 5), 3)
    with noisy_embeddings(model):
        model(ids)
        model.embed.forward = lambda ids: clean(ids) + torch.rand(16)
        with pytest.raises(RuntimeError, match="forward was replaced"):
            model(ids)
        del model.embed.forward
    wanted = drawn(Toy(), input_ids=ids)
    add_hook_to_module(model.embed, ModelHook())
    assert "forward" in vars(model.embed)
    assert torch.equal(drawn(model, input_ids=ids), wanted)


def test_a_hook_that_is_called_neftune_by_another_library_is_refused():
    def neftune_hook(module, args, output):
        return output

    model = Toy()
    model.embed.register_forward_hook(neftune_hook)
    with pytest.raises(RuntimeError, match="NEFTune hook is on this model"):
        EmbeddingNoise().attach(model)


def test_an_attribute_without_a_hook_is_no_second_noise():
    model, batch = Toy(), ragged([5])
    model.embed.neftune_noise_alpha = 5.0
    assert torch.equal(drawn(model, **batch), drawn(Toy(), **batch))


# ----------------------------------------------------------------------------- what report says


@pytest.mark.parametrize("alpha, words", [(0.1, "too little to matter"), (1e30, "hides the")])
def test_report_warns_of_noise_that_is_nothing_or_everything(alpha, words):
    model = tiny()
    torch.nn.init.normal_(model.get_input_embeddings().weight)
    with noisy_embeddings(model, alpha) as noise:
        for _ in range(2):
            model(**ragged([50]))
        with pytest.warns(UserWarning, match=f"{words}.*suggest_noise_alpha"):
            noise.report()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            noise.report()  # once is enough


@pytest.mark.parametrize("why", ["mask", "labels"])
def test_a_whole_run_without_a_noised_token_warns(why):
    ids = torch.full((2, 5), 3)
    if why == "mask":
        given, options = {"attention_mask": torch.zeros(2, 5)}, {}
    else:
        given, options = {"labels": torch.full((2, 5), -100)}, {"where": "response"}
    model = Toy()
    with (
        pytest.warns(UserWarning, match="no noise was added: of 3 look-ups"),
        noisy_embeddings(model, 5.0, **options),
    ):
        for _ in range(3):
            model(ids, **given)
