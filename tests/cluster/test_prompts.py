"""Prompts against the tokenizer that they wrap, and pieces of tokens against the text that they make."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from lorafleet.cluster.errors import BadRequest, ContextLengthExceeded
from lorafleet.cluster.serving.prompts import LONG_TEXT, Prompts
from lorafleet.workers.request import GenerateRequest
from tests.support.bases import VOCAB_SIZE, make_tokenizer

TEXT = "The fox says: wörld 🦊, 日本.\n  Twice\tspaced."


def byte_level_with_bos() -> PreTrainedTokenizerFast:
    """As Llama 3 has it: encoding puts the bos token in front, and the chat template writes its own."""
    tokenizer = make_tokenizer()
    bos = (tokenizer.bos_token, tokenizer.bos_token_id)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos[0]} $A", pair=f"{bos[0]} $A $B", special_tokens=[bos]
    )
    return tokenizer


def byte_fallback() -> PreTrainedTokenizerFast:
    """As Llama 2 and Gemma have it: words begin with ▁, and rare characters fall back to bytes."""
    trainer = trainers.BpeTrainer(special_tokens=["<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))])
    tokenizer = Tokenizer(models.BPE(byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    tokenizer.train_from_iterator(["the fox says twice spaced", "The Twice."], trainer)
    vocabulary = tokenizer.get_vocab()
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def prompts_of(tokenizer: PreTrainedTokenizerBase | None, max_model_len: int = 512) -> Prompts:
    return Prompts(tokenizer, vocab_size=VOCAB_SIZE, max_model_len=max_model_len)


class OfItsOwn(PreTrainedTokenizerFast):  # type: ignore[misc]
    """As Code Llama's: it does something to texts before the backend has them."""

    def _encode_plus(self, text: str, *args: Any, **kwargs: Any) -> Any:
        return super()._encode_plus(text.replace("fox", "owl"), *args, **kwargs)


@pytest.mark.parametrize("kind", [PreTrainedTokenizerFast, OfItsOwn])
async def test_text_is_encoded_as_transformers_does(kind: type[PreTrainedTokenizerFast]) -> None:
    plain = byte_level_with_bos()
    backend = plain.backend_tokenizer
    backend.enable_truncation(4)  # as some files have it; transformers turns it off
    tokenizer = kind(tokenizer_object=backend, bos_token=plain.bos_token)
    prompts = prompts_of(tokenizer)
    for text in (TEXT, f"{plain.bos_token} in the text{plain.bos_token}"):
        for special in (True, False):
            request = GenerateRequest(model="m", prompt=text, add_special_tokens=special)
            token_ids = await prompts.tokenize(request)
            assert list(token_ids) == tokenizer(text, add_special_tokens=special)["input_ids"]
            assert token_ids.count(tokenizer.bos_token_id) == text.count(plain.bos_token) + special


@pytest.mark.parametrize("kind", [PreTrainedTokenizerFast, OfItsOwn])
async def test_half_a_character_is_refused(kind: type[PreTrainedTokenizerFast]) -> None:
    """A Python caller's: in JSON it is no text."""
    prompts = prompts_of(kind(tokenizer_object=byte_level_with_bos().backend_tokenizer))
    with pytest.raises(BadRequest, match="prompt has a lone surrogate"):
        await prompts.tokenize(GenerateRequest(model="m", prompt="a\ud800b"))


async def test_chats_are_rendered_as_transformers_does_with_one_bos() -> None:
    tokenizer = byte_level_with_bos()
    messages = ({"role": "system", "content": "Be brief."}, {"role": "user", "content": TEXT})
    token_ids = await prompts_of(tokenizer).tokenize(GenerateRequest(model="m", messages=messages))
    expected = tokenizer.apply_chat_template(list(messages), tokenize=True, add_generation_prompt=True)
    assert list(token_ids) == expected["input_ids"]
    assert token_ids.count(tokenizer.bos_token_id) == 1


async def test_long_text_leaves_the_event_loop() -> None:
    tokenizer = make_tokenizer()
    text = "the fox " * LONG_TEXT
    prompts = prompts_of(tokenizer, max_model_len=10**6)
    assert list(await prompts.tokenize(GenerateRequest(model="m", prompt=text))) == tokenizer(text)["input_ids"]


async def test_the_length_bound_is_exact() -> None:
    prompts = prompts_of(make_tokenizer(), max_model_len=10)
    for num_prompt, max_tokens in ((9, None), (9, 1), (4, 6)):
        await prompts.tokenize(GenerateRequest(model="m", prompt=(5,) * num_prompt, max_tokens=max_tokens))
    for num_prompt, max_tokens in ((10, None), (9, 2), (4, 7), (10_000, 1)):
        with pytest.raises(ContextLengthExceeded, match="maximum context length is 10 tokens") as caught:
            await prompts.tokenize(GenerateRequest(model="m", prompt=(5,) * num_prompt, max_tokens=max_tokens))
        assert (caught.value.code, caught.value.param) == ("context_length_exceeded", "prompt")


async def test_token_ids_outside_the_vocabulary() -> None:
    prompts = prompts_of(make_tokenizer())
    await prompts.tokenize(GenerateRequest(model="m", prompt=(0, VOCAB_SIZE - 1)))
    for wrong in (-1, VOCAB_SIZE, 2**70):
        with pytest.raises(BadRequest, match=f"token id {wrong}; the vocabulary is 0 to {VOCAB_SIZE - 1}"):
            await prompts.tokenize(GenerateRequest(model="m", prompt=(5, wrong)))


async def test_without_a_tokenizer_only_token_ids_are_served() -> None:
    prompts = prompts_of(None)
    assert await prompts.tokenize(GenerateRequest(model="m", prompt=(5, 6))) == (5, 6)
    for request, code in (
        (GenerateRequest(model="m", prompt="Hello"), "no_tokenizer"),
        (GenerateRequest(model="m", messages=({"role": "user", "content": "Hello"},)), "no_chat_template"),
    ):
        with pytest.raises(BadRequest) as caught:
            await prompts.tokenize(request)
        assert caught.value.code == code
    assert prompts.vocabulary.text_of((5, 6)) == prompts.vocabulary.piece(5).text == ""


@pytest.mark.parametrize(
    ("template", "code", "message"),
    [
        (None, "no_chat_template", "no chat template"),
        ("{{ raise_exception('roles must alternate') }}", "chat_template_failed", "roles must alternate"),
        ("{{ messages[0]['content'] + 1 }}", "chat_template_failed", "refuses these messages"),
        ("{{ messages[7].content.upper() }}", "chat_template_failed", "refuses these messages"),
        ("", "no_chat_template", "no chat template"),
        ("{# says nothing #}", "empty_prompt", "empty"),
    ],
)
async def test_chat_templates_that_do_not_serve(template: str | None, code: str, message: str) -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    request = GenerateRequest(model="m", messages=({"role": "user", "content": "Hello"},))
    with pytest.raises(BadRequest, match=message) as caught:
        await prompts_of(tokenizer).tokenize(request)
    assert (caught.value.code, caught.value.param) == (code, "messages")


@pytest.mark.parametrize("make", [make_tokenizer, byte_fallback])
def test_pieces_spell_the_text(make: type[PreTrainedTokenizerFast]) -> None:
    tokenizer = make()
    prompts = prompts_of(tokenizer)
    pieces = [prompts.vocabulary.piece(token_id) for token_id in tokenizer(TEXT)["input_ids"]]
    assert b"".join(piece.utf8 for piece in pieces).decode() == TEXT
    for piece in pieces:
        assert piece.text.encode() == piece.utf8 or piece.text == "bytes:" + "".join(rf"\x{b:02x}" for b in piece.utf8)


SHARED = prompts_of(make_tokenizer())


@given(text=st.text(max_size=50))
def test_pieces_spell_any_text(text: str) -> None:
    assert SHARED.tokenizer is not None
    pieces = [SHARED.vocabulary.piece(token_id) for token_id in SHARED.tokenizer(text)["input_ids"]]
    assert b"".join(piece.utf8 for piece in pieces).decode() == text


def test_pieces_of_special_and_of_no_tokens() -> None:
    tokenizer = make_tokenizer()
    prompts = Prompts(tokenizer, vocab_size=VOCAB_SIZE + 16, max_model_len=512)
    special = prompts.vocabulary.piece(tokenizer.eos_token_id)
    assert (special.text, special.is_special) == (tokenizer.eos_token, True)
    padding = prompts.vocabulary.piece(VOCAB_SIZE + 3)  # a row of the embedding that no token has
    assert (padding.text, padding.utf8) == ("", b"")
