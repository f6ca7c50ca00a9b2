"""Reads an adapter's chat template and end tokens, as trainers save them in its folder.

Its tokenizer is not kept, since it must map tokens as the base's does.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from transformers.utils.chat_template_utils import _compile_jinja_template

from lorafleet.adapter_store.errors import AdapterRefused
from lorafleet.adapter_store.manifest import AdapterChat, shared_chat

TEMPLATE_FILE = "chat_template.jinja"
TOKENIZER_CONFIG_FILE = "tokenizer_config.json"
GENERATION_CONFIG_FILE = "generation_config.json"
TOKENIZER_FILE = "tokenizer.json"
ADDED_TOKENS_FILE = "added_tokens.json"

CHAT_FILES: Mapping[str, int] = {
    TEMPLATE_FILE: 2**20,
    TOKENIZER_CONFIG_FILE: 2**24,
    GENERATION_CONFIG_FILE: 2**20,
    ADDED_TOKENS_FILE: 2**24,
    TOKENIZER_FILE: 2**27,
}
"""Files beside the weights that count, and the most bytes of each."""
CHECKED_ONLY = (TOKENIZER_FILE, ADDED_TOKENS_FILE)
"""Of these nothing is served, so they are not kept."""

_KNOWN_GOOD = 64


@dataclass(frozen=True, slots=True, eq=False)
class BaseTokens:
    """The tokens of the base's tokenizer."""

    ids: Mapping[str, int]
    """Of every token, added ones included."""


def read_chat(folder: Path, base: BaseTokens | None) -> AdapterChat | None:
    """Read the folder's chat template and end tokens. None: it has none, or the base's tokens are not known.

    Rules `broken_chat_file`, `tokenizer_differs`.
    """
    if base is None:
        return None
    _check_tokens(folder, base)
    config = _object(folder / TOKENIZER_CONFIG_FILE)
    template = _template(folder, config)
    ends = [*_end_ids(folder), *_end_token(config, base)]
    if template is None and not ends:
        return None
    return shared_chat(template, tuple(sorted(set(ends))))


def noted(folder: Path, base: BaseTokens | None) -> Iterator[str]:
    """Warnings: what of these files changes nothing."""
    if base is not None:
        return
    for name, why in (
        (TEMPLATE_FILE, "chats are written by the base's template"),
        (TOKENIZER_CONFIG_FILE, "texts are read by the base's tokenizer"),
        (ADDED_TOKENS_FILE, "the base's tokenizer has its own tokens only"),
    ):
        if (folder / name).exists():
            yield f"{name} is ignored: {why}"


def drop_checked(folder: Path) -> None:
    """Remove what was only to be checked."""
    for name in CHECKED_ONLY:
        (folder / name).unlink(missing_ok=True)


def _template(folder: Path, config: Mapping[str, Any]) -> str | None:
    path = folder / TEMPLATE_FILE
    found = config.get("chat_template")
    if isinstance(found, list):  # several by name, as older trainers save them
        named = {each.get("name"): each.get("template") for each in found if isinstance(each, dict)}
        found = named.get("default")
    source = TOKENIZER_CONFIG_FILE
    if path.exists():
        source = TEMPLATE_FILE
        try:
            found = path.read_bytes().decode()
        except UnicodeDecodeError:
            raise AdapterRefused("broken_chat_file", f"{source} is not UTF-8", source) from None
    if not found:
        return None
    if not isinstance(found, str):
        raise AdapterRefused("broken_chat_file", f"chat_template in {source} must be a text", source)
    _check_template(found, source)
    return found


@lru_cache(maxsize=_KNOWN_GOOD)
def _check_template(template: str, source: str) -> None:
    try:
        _compile_jinja_template(template)
    except (TemplateError, RecursionError) as error:
        message = f"the chat template in {source} cannot be read: {str(error)[:200]}"
        raise AdapterRefused("broken_chat_file", message, source) from None


def _end_token(config: Mapping[str, Any], base: BaseTokens) -> Iterator[int]:
    token = config.get("eos_token")
    content = token.get("content") if isinstance(token, dict) else token
    if content is None:
        return
    if not isinstance(content, str) or content not in base.ids:
        message = f"eos_token in {TOKENIZER_CONFIG_FILE} is {str(content)[:80]!r}, which is not a token of the base"
        raise AdapterRefused("tokenizer_differs", message, TOKENIZER_CONFIG_FILE)
    yield base.ids[content]


def _end_ids(folder: Path) -> Iterator[int]:
    found = _object(folder / GENERATION_CONFIG_FILE).get("eos_token_id")
    for token_id in found if isinstance(found, list) else [] if found is None else [found]:
        if type(token_id) is not int or not 0 <= token_id < 2**31:
            message = f"eos_token_id in {GENERATION_CONFIG_FILE} has {str(token_id)[:80]}, which is not a token id"
            raise AdapterRefused("broken_chat_file", message, GENERATION_CONFIG_FILE)
        yield token_id


def _check_tokens(folder: Path, base: BaseTokens) -> None:
    """Every token that the folder's tokenizer has must be the base's, under the same id."""
    _check_ids(_object(folder / ADDED_TOKENS_FILE).items(), ADDED_TOKENS_FILE, base)
    path = folder / TOKENIZER_FILE
    if path.exists() and (raw := path.read_bytes()):
        # Adapters of one base bring the same file: it is parsed once.
        digest = hashlib.sha256(raw).digest()
        if digest not in _good(base):
            _check_ids(_tokens_of(_parsed(raw, TOKENIZER_FILE)), TOKENIZER_FILE, base)
            if len(_good(base)) < _KNOWN_GOOD:
                _good(base).add(digest)


@lru_cache(maxsize=4)
def _good(base: BaseTokens) -> set[bytes]:
    """Digests of tokenizers that map tokens as this base's."""
    return set()


def _check_ids(tokens: Iterable[tuple[Any, Any]], source: str, base: BaseTokens) -> None:
    for token, token_id in tokens:
        known = base.ids.get(token) if isinstance(token, str) else None
        if known != token_id:
            where = "which the base lacks" if known is None else f"which is {known} in the base"
            message = f"{source} has token {str(token)[:80]!r} as {str(token_id)[:20]}, {where}"
            raise AdapterRefused("tokenizer_differs", message, source)


def _tokens_of(fields: Mapping[str, Any]) -> Iterator[tuple[Any, Any]]:
    """(token, id) of a tokenizers file: its vocabulary, by token or in the ids' order, and the tokens added to it."""
    model = fields.get("model")
    vocab = model.get("vocab", {}) if isinstance(model, dict) else {}
    if isinstance(vocab, dict):
        yield from vocab.items()
    elif isinstance(vocab, list):
        for token_id, entry in enumerate(vocab):
            yield (entry[0] if isinstance(entry, list) and entry else None), token_id
    for entry in fields.get("added_tokens") or ():
        if isinstance(entry, dict):
            yield entry.get("content"), entry.get("id")


def _object(path: Path) -> Mapping[str, Any]:
    """A JSON object; empty where there is no file, or an empty one."""
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        return {}
    return _parsed(raw, path.name) if raw else {}


def _parsed(raw: bytes, name: str) -> Mapping[str, Any]:
    try:
        found = json.loads(raw)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise AdapterRefused("broken_chat_file", f"{name} is not a JSON object", name)
    return found
