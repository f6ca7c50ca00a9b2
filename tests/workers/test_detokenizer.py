"""Text as tokens come, against decoding them all at once."""

from __future__ import annotations

from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from lorafleet.workers.detokenizer import Detokenizer
from tests.support.bases import VOCAB_SIZE, make_tokenizer


@cache
def byte_level() -> PreTrainedTokenizerBase:
    """GPT-2's way: every token is some bytes."""
    return make_tokenizer()


@cache
def byte_fallback() -> PreTrainedTokenizerBase:
    """Llama's way: words that carry their space in front, and single bytes for what is in no word."""
    vocab = {"<unk>": 0, "</s>": 1}
    vocab |= {f"<0x{byte:02X}>": 2 + byte for byte in range(256)}
    for word in ("▁", "▁the", "▁cat", "at", "s", "!", "é", "▁naïve", "STOP", "ST", "OP"):
        vocab[word] = len(vocab)
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>", byte_fallback=True))
    tokenizer.add_special_tokens(["<unk>", "</s>"])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>", clean_up_tokenization_spaces=False
    )


TOKENIZERS = {"byte_level": (byte_level, VOCAB_SIZE), "byte_fallback": (byte_fallback, 2 + 256 + 11)}


def say(
    tokenizer: PreTrainedTokenizerBase, token_ids: list[int], prompt: list[int], stop: tuple[str, ...] = ()
) -> tuple[list[str], Detokenizer]:
    """The text of each token, and of what was withheld at the end."""
    detokenizer = Detokenizer(tokenizer, stop, tuple(prompt))
    texts = []
    for token_id in token_ids:
        texts.append(detokenizer.append((token_id,), check_stop=True))
        if detokenizer.matched_stop is not None:
            break
    return [*texts, detokenizer.flush()], detokenizer


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False)
    return ids


@pytest.mark.parametrize("name", TOKENIZERS)
@given(data=st.data())
@settings(max_examples=200, deadline=None)
def test_the_pieces_are_the_whole(name: str, data: st.DataObject) -> None:
    make, vocab_size = TOKENIZERS[name]
    tokenizer = make()
    prompt = encode(tokenizer, data.draw(st.sampled_from(["the cat", "x", "!!", "a naïve cat"])))
    # Bytes of characters more often than chance has them.
    token = st.integers(0, vocab_size - 1) | st.sampled_from(encode(tokenizer, "é😀 ￿"))
    token_ids = data.draw(st.lists(token, max_size=80))
    texts, _ = say(tokenizer, token_ids, prompt)
    whole = tokenizer.decode(prompt + token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    before = tokenizer.decode(prompt, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    if name == "byte_level":
        assert "".join(texts) == whole.removeprefix(before)
    else:
        # One bad byte spoils all bytes around it here, those too that stood when they were said.
        is_spoilt = "\ufffd" in whole
        assert is_spoilt or "".join(texts) == whole.removeprefix(before)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_character_comes_when_its_last_byte_does(name: str) -> None:
    tokenizer = TOKENIZERS[name][0]()
    texts, _ = say(tokenizer, encode(tokenizer, "aé😀!"), encode(tokenizer, "x"))
    assert [text for text in texts if text] == ["a", "é", "😀", "!"]
    assert len(texts) > 6


def test_a_space_in_front_of_a_word_is_kept() -> None:
    tokenizer = byte_fallback()
    the, cat = tokenizer.convert_tokens_to_ids(["▁the", "▁cat"])
    assert say(tokenizer, [cat, cat], [the])[0] == [" cat", " cat", ""]


def test_an_unfinished_character_is_flushed() -> None:
    tokenizer = byte_level()
    tokens = encode(tokenizer, "a😀")
    assert say(tokenizer, tokens[:-1], encode(tokenizer, "x"))[0] == ["a", *[""] * (len(tokens) - 2), "\ufffd"]


def test_special_tokens_have_no_text_and_leave_no_trace() -> None:
    tokenizer = byte_level()
    eos = tokenizer.eos_token_id
    first, second = encode(tokenizer, "é")
    detokenizer = Detokenizer(tokenizer, (), (eos,))
    texts = [detokenizer.append((token,), check_stop=True) for token in (eos, first, eos, second, *[eos] * 500)]
    assert texts[:5] == ["", "", "", "é", ""]
    assert detokenizer._context is not None
    assert len(detokenizer._context) < 10


def test_bytes_that_are_no_characters_do_not_pile_up() -> None:
    tokenizer = byte_level()
    lone = encode(tokenizer, "é")[1]
    detokenizer = Detokenizer(tokenizer, (), tuple(encode(tokenizer, "x")))
    text = ""
    for _ in range(300):
        text += detokenizer.append((lone,), check_stop=True)
        assert detokenizer._context is not None
        assert len(detokenizer._context) < 60
    assert text + detokenizer.flush() == "\ufffd" * 300


def test_tokens_without_text_do_not_pile_up() -> None:
    """Ids beyond the tokenizer's: a base's logits have more of them than its tokenizer."""
    tokenizer = byte_level()
    detokenizer = Detokenizer(tokenizer, (), tuple(encode(tokenizer, "x")))
    for begin in ("", " and", "é"):
        said = "".join(detokenizer.append((token,), check_stop=True) for token in encode(tokenizer, begin))
        assert said == begin
        for _ in range(300):
            assert detokenizer.append((len(tokenizer) + 5,), check_stop=True) == ""
            assert detokenizer._context is not None
            assert len(detokenizer._context) < 40
    assert detokenizer.append(tuple(encode(tokenizer, " more")), check_stop=True) == " more"


STOPS = {
    "within a token": ("The quick", ("quic",), "The ", "quic"),
    "over many tokens": ("abcdefgh", ("cdefg",), "ab", "cdefg"),
    "the earliest of two": ("hello world", ("world", "lo"), "hel", "lo"),
    "two at one place": ("hello world", ("lo wo", "lo"), "hel", "lo"),
    "false start": ("ababac", ("abac",), "ab", "abac"),
    "almost at the end": ("hello wor", ("world",), "hello wor", None),
    "bytes of a character": ("so 😀 it is", ("😀",), "so ", "😀"),
    "at once": ("STOP", ("STOP",), "", "STOP"),
}


@pytest.mark.parametrize(("text", "stop", "expected", "matched"), STOPS.values(), ids=STOPS)
def test_stop_strings(text: str, stop: tuple[str, ...], expected: str, matched: str | None) -> None:
    tokenizer = byte_level()
    texts, detokenizer = say(tokenizer, encode(tokenizer, text), encode(tokenizer, "x"), stop)
    assert ("".join(texts), detokenizer.matched_stop) == (expected, matched)


@given(
    text=st.text(alphabet="abAB é😀", max_size=40),
    stop=st.lists(st.text(alphabet="abAB é😀", min_size=1, max_size=5), min_size=1, max_size=3).map(tuple),
)
@settings(max_examples=300, deadline=None)
@pytest.mark.slow
def test_nothing_said_before_a_stop_string_is_taken_back(text: str, stop: tuple[str, ...]) -> None:
    tokenizer = byte_level()
    tokens = encode(tokenizer, text)
    texts, detokenizer = say(tokenizer, tokens, encode(tokenizer, "x"), stop)
    said = "".join(texts)
    if detokenizer.matched_stop is None:
        assert said == text
        assert not any(one in text for one in stop)
    else:
        assert text.startswith(said + detokenizer.matched_stop)
        assert not any(one in said for one in stop)


def test_stop_strings_do_not_count_yet() -> None:
    tokenizer = byte_level()
    detokenizer = Detokenizer(tokenizer, ("b",), tuple(encode(tokenizer, "x")))
    texts = [
        detokenizer.append((token,), check_stop=number >= 2) for number, token in enumerate(encode(tokenizer, "abcb"))
    ]
    assert "".join(texts) == "abc"
    assert detokenizer.matched_stop == "b"


def test_without_a_tokenizer_there_is_no_text() -> None:
    detokenizer = Detokenizer(None, ("a",), (1, 2))
    assert detokenizer.append((3,), check_stop=True) == ""
    assert detokenizer.flush() == ""
