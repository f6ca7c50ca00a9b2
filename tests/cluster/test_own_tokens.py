"""Adapters with tokens of their own, as text: their own tokenizers, loaded by transformers, are the oracle."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import AddedToken, AutoTokenizer

from lorafleet.adapter_store.conversations import BaseTokens
from lorafleet.adapter_store.errors import AdapterRefused
from tests.cluster.engines import engine_service
from tests.cluster.serving import BASE_ID, Service
from tests.cluster.test_tools import TOOLS, answers_of
from tests.support.bases import VOCAB_SIZE, BaseKind
from tests.support.fields import make_resized
from tests.workers.harness import Shelf

TEXT = "The <|tool|>dog [X] sleeps,[X]<|tool|> all\u00efve day"
TOOL, SHOWN, WORD = range(VOCAB_SIZE, VOCAB_SIZE + 3)
TEMPLATE = "{% for m in messages %}<|tool|>{{ m.content }}[X]{% endfor %}"
ADDED = [
    AddedToken("<|tool|>", special=True, normalized=False),
    AddedToken("[X]", special=False, normalized=False, lstrip=True),
    AddedToken("\u00efve", special=False, normalized=True),
]


@pytest.fixture(scope="module")
def shelf(base_of: Callable[[BaseKind], Path], tmp_path_factory: pytest.TempPathFactory) -> Shelf:
    base, folder = base_of("llama"), tmp_path_factory.mktemp("own-tokens")
    tokenizer: Any = AutoTokenizer.from_pretrained(base)
    shelf = Shelf(base, base_tokens=BaseTokens(tokenizer.get_vocab()))
    for name, tokens in (("own", ADDED), ("other", [AddedToken("<other>", special=True)])):
        made, tokenizer = make_resized(folder / name, base, len(tokens)), AutoTokenizer.from_pretrained(base)
        tokenizer.add_tokens(tokens)
        if name == "own":
            tokenizer.chat_template = TEMPLATE
        else:
            tokenizer.eos_token = "<other>"
        tokenizer.save_pretrained(made)
        shelf.put(made)
    return shelf


@pytest.fixture(scope="module")
def service(shelf: Shelf) -> Iterator[Service]:
    with engine_service(shelf) as running:
        manifests = {name: shelf.weights[version].manifest for name, version in running.store.versions.items()}
        running.store.chats = {name: each.chat for name, each in manifests.items() if each.chat}
        running.store.vocabularies = {name: each.vocabulary for name, each in manifests.items() if each.vocabulary}
        yield running


@pytest.fixture(scope="module")
def tokenizers(shelf: Shelf) -> dict[str, Any]:
    """By model, as transformers loads them."""
    folders = {BASE_ID: shelf.base, **{folder.name: folder for folder in shelf.folders.values()}}
    return {name: AutoTokenizer.from_pretrained(folder) for name, folder in folders.items()}


@pytest.mark.parametrize("model", ["own", "other", BASE_ID])
def test_texts_are_read_by_the_adapters_tokenizer(service: Service, tokenizers: dict[str, Any], model: str) -> None:
    tokenizer, text = tokenizers[model], f"{TEXT} <other>"
    wanted = tokenizer(text)["input_ids"]
    with service.http() as http:
        tokenized = http.post("/tokenize", json={"model": model, "prompt": text, "return_token_strs": True}).json()
        back = http.post("/detokenize", json={"model": model, "tokens": wanted}).json()["prompt"]
        fields = {"model": model, "max_tokens": 1, "return_token_ids": True, "echo": True, "prompt": wanted}
        asked = [http.post("/v1/completions", json=fields | {"prompt": prompt}).json() for prompt in (text, wanted)]
    assert tokenized["tokens"] == wanted
    assert tokenized["token_strs"] == tokenizer.convert_ids_to_tokens(wanted)
    assert back == tokenizer.decode(wanted)
    assert [reply["choices"][0]["prompt_token_ids"] for reply in asked] == [wanted, wanted]
    assert asked[1]["choices"][0]["text"].startswith(tokenizer.decode(wanted, skip_special_tokens=True))


def asked(service: Service, stream: bool, **fields: Any) -> tuple[str, list[int], Any]:
    """Text, tokens and last choice."""
    body = {"model": "own", "prompt": TEXT, "max_tokens": 24, "seed": 3, "temperature": 1.0, "ignore_eos": True}
    body |= {"return_token_ids": True, "stream": stream, **fields}
    text, last = "", None
    tokens: list[int] = []
    with service.http() as http:
        reply = http.post("/v1/completions", json=body)
        assert reply.status_code == 200, reply.text
        lines = [line[6:] for line in reply.text.splitlines() if line.startswith("data: {")] if stream else [reply.text]
    for chunk in map(json.loads, lines):
        for last in chunk["choices"]:
            text, tokens = text + last["text"], tokens + (last["token_ids"] or [])
    return text, tokens, last


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_what_is_generated_reads_as_the_adapters_tokenizer_says(
    service: Service, tokenizers: dict[str, Any], stream: bool
) -> None:
    tokenizer = tokenizers["own"]
    often: Any = {"logit_bias": {str(token): 9.0 for token in (TOOL, SHOWN, WORD)}}
    prompt = tokenizer(TEXT)["input_ids"]
    for seed in range(2):
        text, tokens, _ = asked(service, stream, seed=seed, **often)
        assert {TOOL, SHOWN, WORD} <= {*tokens}
        whole, before = (tokenizer.decode(ids, skip_special_tokens=True) for ids in (prompt + tokens, prompt))
        assert text == whole[len(before) :]
        text, again, _ = asked(service, stream, seed=seed, skip_special_tokens=False, **often)
        assert again == tokens
        assert text == tokenizer.decode(prompt + tokens)[len(tokenizer.decode(prompt)) :]
        stopped, tokens, last = asked(service, stream, seed=seed, stop=["[X]"], **often)
        assert last["finish_reason"] == "stop"
        assert (tokens[-1], "[X]" in stopped) == (SHOWN, False)
        for special, shows in ((SHOWN, True), (TOOL, False)):
            assert asked(service, stream, logit_bias={str(special): 90.0}, max_tokens=2)[0] == "[X]" * 2 * shows
    _, tokens, last = asked(service, stream, logit_bias={str(WORD): 90.0}, logprobs=1, max_tokens=1)
    assert last["logprobs"]["tokens"] == ["\u00efve"]


def test_conversations_have_them(service: Service, tokenizers: dict[str, Any]) -> None:
    messages: Any = [{"role": "user", "content": "a <|tool|> b"}]
    wanted = tokenizers["own"].apply_chat_template(messages, tokenize=True, return_dict=True)["input_ids"]
    before, service.prompts.answers = service.prompts.answers, answers_of("hermes", "think_tags")
    try:
        with service.http() as http:
            counted = http.post("/v1/messages/count_tokens", json={"model": "own", "messages": messages}).json()
            body = {"model": "own", "messages": messages, "max_tokens": 2, "return_token_ids": True, "tools": TOOLS}
            reply = http.post("/v1/chat/completions", json=body)
            assert reply.status_code == 200, reply.text
            schema = {"type": "json_object"}
            assert http.post("/v1/chat/completions", json=body | {"response_format": schema}).status_code != 500
    finally:
        service.prompts.answers = before
    assert reply.json()["prompt_token_ids"] == wanted
    assert counted["input_tokens"] == len(wanted)


def test_an_own_token_may_end_answers(service: Service) -> None:
    ended = asked(service, False, model="other", ignore_eos=False, logit_bias={str(VOCAB_SIZE): 90.0})
    assert (ended[0], ended[1], ended[2]["finish_reason"]) == ("", [VOCAB_SIZE], "stop")


@pytest.mark.parametrize(
    ("num_rows", "tokens", "words"),
    [(1, ["<a>", "<b>"], "rows of 305 tokens"), (2, ["<a>"], ""), (0, ["<a>"], "rows of 304 tokens"), (0, [], "")],
)
def test_tokens_without_rows_are_refused(
    shelf: Shelf, tmp_path: Path, num_rows: int, tokens: list[str], words: str
) -> None:
    folder = make_resized(tmp_path / "a", shelf.base, num_rows)
    tokenizer: Any = AutoTokenizer.from_pretrained(shelf.base)
    tokenizer.add_tokens(tokens)
    tokenizer.save_pretrained(folder)
    (folder / "added_tokens.json").write_text(json.dumps({token: VOCAB_SIZE + i for i, token in enumerate(tokens)}))
    if not words:
        chat = shelf.weights[shelf.put(folder)].manifest.chat
        assert chat is not None
        assert [token.content for token in chat.own_tokens] == tokens
        return
    with pytest.raises(AdapterRefused, match=words) as found:
        shelf.put(folder)
    assert found.value.code == "tokenizer_differs"
