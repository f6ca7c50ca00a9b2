"""Reads an adapter's chat template, end tokens and own tokens, as trainers save them in its folder.

Its tokenizer is not kept, since it must map all other tokens as the base's does.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, NoReturn

from jinja2 import TemplateError
from transformers.utils.chat_template_utils import _compile_jinja_template

from lorafleet.adapter_store.errors import AdapterRefused
from lorafleet.adapter_store.manifest import AdapterChat, OwnToken, shared_chat
from lorafleet.adapter_store.peft_config import is_unicode

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
"""Of these only the adapter's own tokens are kept."""

_KNOWN_GOOD = 64


@dataclass(frozen=True, eq=False)
class BaseTokens:
    """The tokens of the base's tokenizer."""

    ids: Mapping[str, int]
    """Of every token, added ones included."""

    @cached_property
    def next_id(self) -> int:
        """Id of the first token that a trainer adds."""
        return max(self.ids.values(), default=-1) + 1


def read_chat(folder: Path, base: BaseTokens | None, num_rows: int) -> AdapterChat | None:
    """Read the folder's chat template, end tokens and own tokens.

    num_rows: how many tokens have a row in the adapter's embedding. None: the folder has nothing of its own, or the
    base's tokens are not known.

    Rules `broken_chat_file`, `tokenizer_differs`.
    """
    if base is None:
        return None
    config = _object(folder / TOKENIZER_CONFIG_FILE)
    own = _own_tokens(folder, config, base, num_rows)
    template = _template(folder, config)
    ends = [*_end_ids(folder), *_end_token(config, base, {token.content: token.id for token in own})]
    if template is None and not ends and not own:
        return None
    if not is_unicode([template, *(token.content for token in own)]):
        message = "the chat template, or a token that the adapter adds, has half of a surrogate pair"
        raise AdapterRefused("broken_chat_file", message, TOKENIZER_CONFIG_FILE)
    return shared_chat(template, tuple(sorted(set(ends))), own)


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


def keep_own_tokens(folder: Path, own: tuple[OwnToken, ...]) -> None:
    """Leave of the tokenizer's files what `read_chat` needs to find these tokens again."""
    for name in CHECKED_ONLY:
        (folder / name).unlink(missing_ok=True)
    if own:
        (folder / TOKENIZER_FILE).write_text(json.dumps({"added_tokens": [asdict(token) for token in own]}))


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


def _end_token(config: Mapping[str, Any], base: BaseTokens, own: Mapping[str, int]) -> Iterator[int]:
    token = config.get("eos_token")
    content = token.get("content") if isinstance(token, dict) else token
    if content is None:
        return
    found = own.get(content, base.ids.get(content)) if isinstance(content, str) else None
    if found is None:
        message = f"eos_token in {TOKENIZER_CONFIG_FILE} is {str(content)[:80]!r}, which is not a token of the base"
        raise AdapterRefused("tokenizer_differs", message, TOKENIZER_CONFIG_FILE)
    yield found


def _end_ids(folder: Path) -> Iterator[int]:
    found = _object(folder / GENERATION_CONFIG_FILE).get("eos_token_id")
    for token_id in found if isinstance(found, list) else [] if found is None else [found]:
        if type(token_id) is not int or not 0 <= token_id < 2**31:
            message = f"eos_token_id in {GENERATION_CONFIG_FILE} has {str(token_id)[:80]}, which is not a token id"
            raise AdapterRefused("broken_chat_file", message, GENERATION_CONFIG_FILE)
        yield token_id


def _own_tokens(folder: Path, config: Mapping[str, Any], base: BaseTokens, num_rows: int) -> tuple[OwnToken, ...]:
    """The tokens that a trainer added. Every other one must be the base's, under the same id."""
    own = {token.content: token for token in _in_tokenizer(folder / TOKENIZER_FILE, base)}
    described = config.get("added_tokens_decoder")
    described = described if isinstance(described, dict) else {}
    for content, token_id in _object(folder / ADDED_TOKENS_FILE).items():
        entry = described.get(str(token_id))
        token = _own_token({**(entry if isinstance(entry, dict) else {}), "content": content, "id": token_id})
        if content not in own and not _is_the_bases(token.content, token.id, ADDED_TOKENS_FILE, base):
            own[content] = token
    found = tuple(sorted(own.values(), key=lambda token: token.id))
    for place, token in enumerate(found):
        if token.id != base.next_id + place:
            why = f"tokens that a trainer adds follow the base's last one, which is {base.next_id - 1}, without a gap"
        elif token.id >= num_rows:
            why = f"there are rows of {num_rows} tokens: save the resized matrices too (save_embedding_layers=True)"
        else:
            continue
        message = f"the adapter's tokenizer has {token.content[:80]!r} as {token.id}, which the base lacks, and {why}"
        raise AdapterRefused("tokenizer_differs", message, TOKENIZER_FILE)
    return found


def _in_tokenizer(path: Path, base: BaseTokens) -> tuple[OwnToken, ...]:
    raw = path.read_bytes() if path.exists() else b""
    if not raw:
        return ()
    # Adapters of one base bring the same file: it is parsed once.
    digest, known = hashlib.sha256(raw).digest(), _known_tokenizers(base)
    if digest not in known:
        fields = _parsed(raw, TOKENIZER_FILE)
        entries = fields.get("added_tokens")
        added = [_own_token(entry) for entry in (entries if isinstance(entries, list) else ())]
        own = tuple(token for token in added if not _is_the_bases(token.content, token.id, TOKENIZER_FILE, base))
        ids = {token.content: token.id for token in own}
        for content, token_id in _vocabulary_of(fields):
            # Some have their added tokens in the vocabulary as well.
            if ids.get(content, -1) != token_id and not _is_the_bases(content, token_id, TOKENIZER_FILE, base):
                _refuse(content, token_id, TOKENIZER_FILE, "which the base lacks")
        if len(known) >= _KNOWN_GOOD:
            return own
        known[digest] = own
    return known[digest]


@lru_cache(maxsize=4)
def _known_tokenizers(base: BaseTokens) -> dict[bytes, tuple[OwnToken, ...]]:
    """Digests of tokenizers that map the base's tokens as the base's -> what they add."""
    return {}


def _is_the_bases(content: Any, token_id: Any, source: str, base: BaseTokens) -> bool:
    """Return True for a token of the base; False for one that the base lacks. Raises AdapterRefused."""
    known = base.ids.get(content) if isinstance(content, str) else None
    if known is None and isinstance(content, str) and type(token_id) is int and token_id >= base.next_id:
        return False
    if known != token_id or known is None:
        where = "where the base has another one" if known is None else f"which is {known} in the base"
        _refuse(content, token_id, source, where)
    return True


def _refuse(content: Any, token_id: Any, source: str, why: str) -> NoReturn:
    message = f"{source} has token {str(content)[:80]!r} as {str(token_id)[:20]}, {why}"
    raise AdapterRefused("tokenizer_differs", message, source)


def _own_token(entry: Any) -> OwnToken:
    """An entry of a tokenizer's added tokens. What it says otherwise than tokenizers do is refused by its id."""
    fields = entry if isinstance(entry, dict) else {}
    content = fields.get("content")
    is_special = fields.get("special") is True
    flags = {name: fields.get(name) is True for name in ("single_word", "lstrip", "rstrip")}
    normalized = fields.get("normalized", not is_special) is True
    return OwnToken(fields.get("id", -1), content if isinstance(content, str) else "", is_special, normalized, **flags)


def _vocabulary_of(fields: Mapping[str, Any]) -> Iterator[tuple[Any, Any]]:
    """(token, id) of the vocabulary of a tokenizers file: by token, or in the ids' order."""
    model = fields.get("model")
    vocab = model.get("vocab", {}) if isinstance(model, dict) else {}
    if isinstance(vocab, dict):
        yield from vocab.items()
    elif isinstance(vocab, list):
        for token_id, entry in enumerate(vocab):
            yield (entry[0] if isinstance(entry, list) and entry else None), token_id


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
