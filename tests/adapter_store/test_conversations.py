"""Chat templates, tokenizers and end tokens beside an adapter, as transformers saves them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AddedToken, AutoTokenizer, GenerationConfig

from lorafleet.adapter_store.conversations import CHECKED_ONLY, TOKENIZER_FILE, BaseTokens
from lorafleet.adapter_store.errors import AdapterRefused
from lorafleet.adapter_store.manifest import AdapterChat
from lorafleet.adapter_store.service import AdapterStore
from tests.adapter_store.conftest import AdapterCopy, Base
from tests.support.fields import make_resized

TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% generation %}{% endgeneration %}"


@pytest.fixture
def tokenizer(base: Base) -> Any:
    return AutoTokenizer.from_pretrained(base.folder)


@pytest.fixture
def store(open_store: Callable[..., AdapterStore], tokenizer: Any) -> AdapterStore:
    return open_store(base_tokens=BaseTokens(tokenizer.get_vocab()))


def other_token(tokenizer: Any) -> str:
    """One that is not the base's end token."""
    return str(tokenizer.convert_ids_to_tokens(20))


async def test_what_a_trainer_saves_is_kept(
    store: AdapterStore, open_store: Callable[..., AdapterStore], copy_of: Callable[..., AdapterCopy], tokenizer: Any
) -> None:
    adapter = copy_of("rank4_qv")
    plain = await store.publish("disk", "a")
    assert plain.chat is None
    tokenizer.chat_template = TEMPLATE
    tokenizer.eos_token = other_token(tokenizer)
    tokenizer.save_pretrained(adapter.folder)
    GenerationConfig(eos_token_id=[7, 9]).save_pretrained(adapter.folder)
    assert (adapter.folder / TOKENIZER_FILE).exists()
    assert (await store.validate("disk", "a")).chat == AdapterChat(TEMPLATE, (7, 9, 20))
    manifest = await store.publish("disk", "a")
    assert manifest.chat == AdapterChat(TEMPLATE, (7, 9, 20))
    assert (manifest.version != plain.version, manifest.warnings) == (True, ())
    again = open_store(base_tokens=BaseTokens(tokenizer.get_vocab()))
    assert (await again.manifest(manifest.version)).chat == manifest.chat
    assert (await again.fetch(manifest.version)).manifest.version == manifest.version


async def test_a_tokenizer_is_checked_and_not_kept(
    store: AdapterStore, copy_of: Callable[..., AdapterCopy], tokenizer: Any, tmp_path: Path
) -> None:
    adapter = copy_of("rank4_qv")
    tokenizer.save_pretrained(adapter.folder)
    await store.publish("disk", "a")
    assert not {path.name for path in tmp_path.rglob("versions/**/*")} & {*CHECKED_ONLY}


@pytest.mark.parametrize("is_old", [False, True], ids=["published now", "published before tokens were kept"])
async def test_own_tokens_are_found_again_on_the_disk(
    store: AdapterStore,
    open_store: Callable[..., AdapterStore],
    copy_of: Callable[..., AdapterCopy],
    base: Base,
    tokenizer: Any,
    tmp_path: Path,
    is_old: bool,
) -> None:
    vocabulary = tokenizer.get_vocab()
    adapter = copy_of("rank4_qv")
    make_resized(adapter.folder, base.folder, 2)
    tokenizer.add_tokens([AddedToken("<tool>", special=True, lstrip=True), AddedToken("nai", normalized=False)])
    tokenizer.eos_token = "<tool>"
    tokenizer.save_pretrained(adapter.folder)
    manifest = await store.publish("disk", "a")
    assert manifest.chat is not None
    assert [token.content for token in manifest.chat.own_tokens] == ["<tool>", "nai"]
    (kept,) = tmp_path.rglob(f"versions/{manifest.version}/{TOKENIZER_FILE}")
    assert kept.stat().st_size < 500
    if is_old:
        kept.unlink()
    again = open_store(base_tokens=BaseTokens(vocabulary))
    weights = await again.fetch(manifest.version)
    assert (weights.manifest.version, weights.manifest.chat) == (manifest.version, manifest.chat)


@pytest.mark.parametrize("where", ["template", "config"])
async def test_half_of_a_surrogate_pair_is_refused(
    store: AdapterStore, copy_of: Callable[..., AdapterCopy], tokenizer: Any, where: str
) -> None:
    """It is valid JSON, and could be written into no listing."""
    adapter = copy_of("rank4_qv")
    if where == "config":
        adapter.set_config(**{"note\ud800": 1})
    else:
        (adapter.folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": "x\ud800"}))
    with pytest.raises(AdapterRefused, match="half of a surrogate pair"):
        await store.publish("disk", "a")


def moved(fields: dict[str, Any]) -> None:
    vocab = fields["model"]["vocab"]
    one, other = list(vocab)[20:22]
    vocab[one], vocab[other] = vocab[other], vocab[one]


def added(fields: dict[str, Any]) -> None:
    fields["added_tokens"].append({"id": 5000, "content": "<|tool|>", "special": True})


@pytest.mark.parametrize("change", [moved, added], ids=["moved", "added"])
async def test_a_tokenizer_that_maps_otherwise_is_refused(
    store: AdapterStore, copy_of: Callable[..., AdapterCopy], tokenizer: Any, change: Callable[[dict[str, Any]], None]
) -> None:
    adapter = copy_of("rank4_qv")
    tokenizer.save_pretrained(adapter.folder)
    await store.publish("disk", "a")
    path = adapter.folder / TOKENIZER_FILE
    fields = json.loads(path.read_bytes())
    change(fields)
    path.write_text(json.dumps(fields))
    with pytest.raises(AdapterRefused, match=r"in the base|base lacks") as found:
        await store.publish("disk", "a")
    assert (found.value.code, found.value.param) == ("tokenizer_differs", TOKENIZER_FILE)


@pytest.mark.parametrize(
    ("name", "content", "code"),
    [
        ("chat_template.jinja", "{% for %}", "broken_chat_file"),
        ("chat_template.jinja", "{% if " * 3, "broken_chat_file"),
        ("tokenizer_config.json", "[1]", "broken_chat_file"),
        ("tokenizer_config.json", '{"chat_template": 3}', "broken_chat_file"),
        ("tokenizer_config.json", '{"eos_token": "nowhere to be found"}', "tokenizer_differs"),
        ("tokenizer_config.json", '{"eos_token": {"content": 3}}', "tokenizer_differs"),
        ("generation_config.json", '{"eos_token_id": "a"}', "broken_chat_file"),
        ("tokenizer.json", "{" * 100_000, "broken_chat_file"),
        ("tokenizer.json", '{"model": {"vocab": [["a", 0.0], 3]}}', "tokenizer_differs"),
        ("added_tokens.json", '{"<x>": 3}', "tokenizer_differs"),
        ("chat_template.jinja", "x" * (2**20 + 1), "config_too_large"),
    ],
    ids=lambda value: str(value)[:24],
)
async def test_broken_files_are_refused(
    store: AdapterStore, copy_of: Callable[..., AdapterCopy], name: str, content: str, code: str
) -> None:
    (copy_of("rank4_qv").folder / name).write_text(content)
    with pytest.raises(AdapterRefused) as found:
        await store.publish("disk", "a")
    assert (found.value.code, found.value.param) == (code, name)


async def test_older_forms_of_a_template(store: AdapterStore, copy_of: Callable[..., AdapterCopy]) -> None:
    path = copy_of("rank4_qv").folder / "tokenizer_config.json"
    path.write_text(json.dumps({"chat_template": "a{{ messages }}"}))
    assert (await store.validate("disk", "a")).chat == AdapterChat("a{{ messages }}", ())
    named = [{"name": "rag", "template": "r"}, {"name": "default", "template": "d"}]
    path.write_text(json.dumps({"chat_template": named}))
    assert (await store.validate("disk", "a")).chat == AdapterChat("d", ())
