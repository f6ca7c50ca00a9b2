"""Finds the source and key that a path stands for, as vLLM's and SGLang's load routes give one.

Judged in the store's process: its disk is the one that counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lorafleet.adapter_store.errors import InvalidKey, UnknownKey
from lorafleet.adapter_store.source_config import DirectoryConfig, HubConfig, SourceConfig


def locate(path: str, sources: Sequence[SourceConfig]) -> tuple[str, str]:
    """The source and key that a path stands for. Raises InvalidKey for what is no path, and as `_locate`."""
    try:
        return _locate(path, sources)
    except (OSError, RuntimeError, ValueError) as error:  # too long, of an unknown user, with a null byte
        raise InvalidKey("invalid_key", "lora_path is not a valid path", "lora_path") from error


def _locate(path: str, sources: Sequence[SourceConfig]) -> tuple[str, str]:
    """The source and key that a path stands for.

    Tried in order: an absolute or relative path inside a source's folder; a key in the first source that has such a
    folder; a repository of the hub, if there is a hub source. Raises InvalidKey for a path outside
    all sources, UnknownKey for one that no source has.
    """
    folders = [source for source in sources if isinstance(source, DirectoryConfig)]
    resolved = Path(path).expanduser().resolve()
    for source in folders:
        root = source.root.resolve()
        if resolved.is_relative_to(root) and resolved != root:
            return source.name, resolved.relative_to(root).as_posix()
    if Path(path).is_absolute() or path.startswith("~") or ".." in Path(path).parts or not path:
        raise InvalidKey(
            "key_outside_root", "lora_path must lie in the folder of a source of adapters.sources", "lora_path"
        )
    for source in folders:
        if (source.root / path).is_dir():
            return source.name, path
    for hub in sources:
        if isinstance(hub, HubConfig) and (hub.namespace is None) == ("/" in path.partition("@")[0]):
            return hub.name, path
    raise UnknownKey("key_not_found", "no source of adapters.sources has an adapter at lora_path", "lora_path")
