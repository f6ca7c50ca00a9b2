"""Sources of adapters: folders, the Hugging Face hub, object stores. Callers name a configured source and a key.

A source only copies the few files of an adapter into a staging folder and looks at none of them; all calls block.
"""

from __future__ import annotations

import contextlib
import os
import re
import stat
import time
from collections.abc import Mapping
from io import FileIO
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, Protocol

import fsspec
import huggingface_hub
from fsspec.implementations.local import LocalFileSystem
from huggingface_hub.errors import (
    EntryNotFoundError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from lorafleet.adapter_store.conversations import CHAT_FILES
from lorafleet.adapter_store.errors import AdapterRefused, InvalidKey, SourceUnavailable, StoreUnusable, UnknownKey
from lorafleet.adapter_store.files import unwritable
from lorafleet.adapter_store.peft_config import MAX_CONFIG_BYTES
from lorafleet.adapter_store.peft_format import CONFIG_FILE, OTHER_WEIGHTS_FILES, WEIGHTS_FILE
from lorafleet.adapter_store.source_config import DirectoryConfig, HubConfig, ObjectStoreConfig

_MAX_KEY_CHARS = 1024
_KEY_RULE = (
    f"a key is a relative path of up to {_MAX_KEY_CHARS} printable characters, without '.' or '..' as a part, "
    r"a ~ at the beginning of one, or any of \ : ? # % * [ ]"
)
_CHANGED_ATTEMPTS = 3
_TICK_NS = 10_000_000
"""At least one tick of a file system's clock."""
_REVISION = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*(?:[./][A-Za-z0-9_-]+)*")
"""Branches and tags without what could climb or mean something in a URL; `refs/pr/1` too."""


class Source(Protocol):
    """A place that has adapters under keys."""

    def fetch(self, key: str, into: Path, max_weights_bytes: int) -> None:
        """Copy the adapter's config, weights and `CHAT_FILES` into the empty folder `into`, as they were at one moment.

        Files that are not there are left out; of weights in other formats empty files are made.
        Raises InvalidKey, UnknownKey, SourceUnavailable, and AdapterRefused for a file that is too large.
        """


def open_source(config: DirectoryConfig | HubConfig | ObjectStoreConfig) -> Source:
    """The source that a config describes; nothing is contacted yet."""
    if isinstance(config, DirectoryConfig):
        return DirectorySource(config.name, config.root)
    if isinstance(config, HubConfig):
        return HubSource(config)
    filesystem, root = fsspec.core.url_to_fs(config.url, **config.storage_options)
    if isinstance(filesystem, LocalFileSystem):
        # A local path has symbolic links, which only the directory source keeps within the root.
        return DirectorySource(config.name, Path(root))
    return ObjectStoreSource(config.name, filesystem, root)


def checked_key(key: str) -> PurePosixPath:
    """A relative key that cannot climb or mean anything but a path. Raises InvalidKey `invalid_key`."""
    parts = key.split("/")
    if (
        not 0 < len(key) <= _MAX_KEY_CHARS
        or not key.isprintable()  # neither control characters nor halves of surrogate pairs
        or any(part in ("", ".", "..") or part.startswith("~") or len(part.encode()) > 255 for part in parts)
        or re.search(r"[\\:?#%*\[\]]", key)
    ):
        raise InvalidKey("invalid_key", f"key {key[:100]!r} is refused: {_KEY_RULE}", "key")
    return PurePosixPath(key)


class DirectorySource:
    """A folder. Nothing outside it is opened, whatever its links say and however they change meanwhile."""

    def __init__(self, name: str, root: Path) -> None:
        self._name = name
        self._root = root

    def fetch(self, key: str, into: Path, max_weights_bytes: int) -> None:
        path = checked_key(key)
        limits = _limits(max_weights_bytes)
        try:
            root = self._root.resolve(strict=True)
            for _ in range(_CHANGED_ATTEMPTS):
                with contextlib.suppress(FileNotFoundError):
                    if self._copied(root, path, into, limits):
                        return
        except OSError as error:
            raise SourceUnavailable("source_unavailable", f"source {self._name} cannot be read", "source") from error
        raise _changed(key, self._name)

    def _copied(self, root: Path, key: PurePosixPath, into: Path, limits: Mapping[str, int]) -> bool:
        """One try; False if the adapter changed under it."""
        folder = self._contained(root, root / key, str(key))
        if not folder.is_dir():
            raise UnknownKey("key_not_found", f"source {self._name} has no adapter {key}", "key")
        paths = {name: self._contained(root, folder / name, str(key)) for name in limits}
        before = {name: _identity_at(path) for name, path in paths.items()}
        if any(seen is not None and time.time_ns() - seen[-1] < _TICK_NS for seen in before.values()):
            # A second change within the tick of the file system's clock would leave the same time.
            time.sleep(_TICK_NS / 1e9)
        for name, limit in limits.items():
            if before[name] is None:
                (into / name).unlink(missing_ok=True)
                continue
            with _open_below(root, paths[name]) as file:
                if _identity(os.fstat(file.fileno())) != before[name]:
                    return False
                _copy(file, into / name, limit)
                if _identity(os.fstat(file.fileno())) != before[name]:
                    return False
        for name in OTHER_WEIGHTS_FILES:
            if (folder / name).exists():
                (into / name).touch()
        # Files replaced by renaming change neither of the open ones: look at the names again.
        again = self._contained(root, root / key, str(key))
        return all(_identity_at(self._contained(root, again / name, str(key))) == seen for name, seen in before.items())

    def _contained(self, root: Path, path: Path, key: str) -> Path:
        """The path with all links followed. Raises InvalidKey `key_outside_root`."""
        try:
            resolved = path.resolve()
        except RuntimeError as error:  # links in a circle
            raise InvalidKey("key_outside_root", f"{key} in source {self._name} is a circle of links", "key") from error
        if not resolved.is_relative_to(root):
            raise InvalidKey("key_outside_root", f"{key} leads out of source {self._name}", "key")
        return resolved


class HubSource:
    """The Hugging Face hub; what was fetched once is served from its cache when the hub cannot be reached."""

    def __init__(self, config: HubConfig) -> None:
        self._config = config

    def fetch(self, key: str, into: Path, max_weights_bytes: int) -> None:
        path, _, named = key.partition("@")
        if "@" in key and not _REVISION.fullmatch(named):
            raise InvalidKey("invalid_key", f"key {key[:100]!r} must name a branch, tag or commit after its @", "key")
        revision = named or self._config.revision
        parts = checked_key(path).parts
        if self._config.namespace is not None:
            parts = (self._config.namespace, *parts)
        if len(parts) < 2:
            raise InvalidKey("invalid_key", f"key {key!r} must be owner/repository", "key")
        repository, folder = "/".join(parts[:2]), "/".join(parts[2:])
        config, _ = self._copied(repository, folder, revision, into / CONFIG_FILE, MAX_CONFIG_BYTES)
        # The cache keeps files by commit: the weights are taken from the commit that the config came from.
        commit = _commit_of(config) if config is not None else revision
        weights, is_away = self._copied(repository, folder, commit, into / WEIGHTS_FILE, max_weights_bytes)
        for name, limit in CHAT_FILES.items() if weights is not None else ():
            self._copied(repository, folder, commit, into / name, limit, may_lack=is_away)
        for name in OTHER_WEIGHTS_FILES if weights is None else ():
            if self._exists(repository, folder, name, commit):
                (into / name).touch()

    def _copied(
        self, repository: str, folder: str, revision: str | None, to: Path, limit: int, *, may_lack: bool = False
    ) -> tuple[Path | None, bool]:
        """Copy one file. Say where the cache has it, None if the repository lacks it, and whether the hub was away.

        may_lack: while the hub cannot be reached, a file that the cache lacks counts as one that is not there.
        """
        size: int | None = 0
        where = {"subfolder": folder or None, "revision": revision}
        try:
            # Asked first, since it fails at once where a download would try again for half a minute.
            size = self._size(huggingface_hub.hf_hub_url(repository, to.name, **where))
            if size is not None and size > limit:
                raise _too_large(to.name, limit)
            path = huggingface_hub.hf_hub_download(
                repository, to.name, cache_dir=self._config.cache_dir, local_files_only=size is None, **where
            )
        except AdapterRefused:
            raise
        except LocalEntryNotFoundError as error:
            if may_lack:
                return None, True
            message = f"source {self._config.name} cannot be reached, and {repository} is not in its cache"
            raise SourceUnavailable("source_unavailable", message, "source") from error
        except EntryNotFoundError:
            return None, False
        except HFValidationError as error:
            raise InvalidKey("invalid_key", f"{repository!r} is not a valid repository name", "key") from error
        except RevisionNotFoundError as error:
            raise UnknownKey("key_not_found", f"{repository} has no revision {revision}", "key") from error
        except RepositoryNotFoundError as error:
            message = f"source {self._config.name} has no repository {repository}, or it may not be read"
            raise UnknownKey("key_not_found", message, "key") from error
        except Exception as error:
            # What the client's transport raises depends on its version.
            message = f"source {self._config.name} cannot be read"
            raise SourceUnavailable("source_unavailable", message, "source") from error
        with Path(path).open("rb") as file:
            _copy(file, to, limit)
        return Path(path), size is None

    def _size(self, url: str) -> int | None:
        """Bytes of a file; None if the hub cannot be reached. Raises the client's errors for what is not there."""
        try:
            return huggingface_hub.get_hf_file_metadata(url).size or 0
        except (RepositoryNotFoundError, RevisionNotFoundError, EntryNotFoundError):
            raise
        except Exception:
            return None

    def _exists(self, repository: str, folder: str, name: str, revision: str | None) -> bool:
        """Only the wording of a refusal depends on it."""
        url = huggingface_hub.hf_hub_url(repository, name, subfolder=folder or None, revision=revision)
        try:
            return self._size(url) is not None
        except (RepositoryNotFoundError, RevisionNotFoundError, EntryNotFoundError):
            return False


class ObjectStoreSource:
    """A file system of fsspec."""

    def __init__(self, name: str, filesystem: Any, root: str) -> None:
        self._name = name
        self._filesystem = filesystem
        self._root = root.rstrip("/")

    def fetch(self, key: str, into: Path, max_weights_bytes: int) -> None:
        folder = f"{self._root}/{checked_key(key)}"
        limits = _limits(max_weights_bytes)
        try:
            for _ in range(_CHANGED_ATTEMPTS):
                if self._copied(folder, into, limits):
                    break
            else:
                raise _changed(key, self._name)
            for name in OTHER_WEIGHTS_FILES:
                if self._filesystem.exists(f"{folder}/{name}"):
                    (into / name).touch()
            is_empty = not any(into.iterdir())
            if is_empty and not self._filesystem.isdir(folder):
                raise UnknownKey("key_not_found", f"source {self._name} has no adapter {key}", "key")
        except (AdapterRefused, SourceUnavailable, StoreUnusable, UnknownKey):
            raise
        except Exception as error:
            # Every file system of fsspec has its own errors for "cannot be reached" and "may not".
            raise SourceUnavailable("source_unavailable", f"source {self._name} cannot be read", "source") from error

    def _copied(self, folder: str, into: Path, limits: Mapping[str, int]) -> bool:
        """One try; False if the adapter changed under it."""
        before = {name: self._identity(f"{folder}/{name}") for name in limits}
        for name, limit in limits.items():
            (into / name).unlink(missing_ok=True)
            if before[name] is not None:
                try:
                    with self._filesystem.open(f"{folder}/{name}", "rb") as file:
                        _copy(file, into / name, limit)
                except FileNotFoundError:
                    return False
        return all(self._identity(f"{folder}/{name}") == seen for name, seen in before.items())

    def _identity(self, path: str) -> str | None:
        self._filesystem.invalidate_cache()
        try:
            if self._filesystem.info(path)["type"] != "file":
                return None
            return str(self._filesystem.ukey(path))
        except FileNotFoundError:
            return None


def _open_below(root: Path, path: Path) -> BinaryIO:
    """Open a resolved path part by part without following links, so that none put there since leads out of `root`."""
    descriptor = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
    try:
        *folders, name = path.relative_to(root).parts
        for folder in folders:
            below = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=descriptor)
            os.close(descriptor)
            descriptor = below
        # O_NONBLOCK: a named pipe in place of a file must not hold the thread.
        opened = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=descriptor)
    finally:
        os.close(descriptor)
    if not stat.S_ISREG(os.fstat(opened).st_mode):
        os.close(opened)
        raise AdapterRefused(
            "missing_weights" if name == WEIGHTS_FILE else "missing_config", f"{name} must be a regular file", name
        )
    return os.fdopen(opened, "rb")


_Identity = tuple[int, int, int, int, int]


def _identity(status: os.stat_result) -> _Identity:
    return (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)


def _identity_at(path: Path) -> _Identity | None:
    try:
        return _identity(path.stat())
    except (FileNotFoundError, NotADirectoryError):
        return None


def _copy(file: Any, to: Path, limit: int) -> None:
    """Copy an open file. Raises StoreUnusable, and AdapterRefused after `limit` bytes when it is larger."""
    try:
        # Unbuffered, so that a full disk shows at a write and not when the file is closed.
        out = to.open("wb", buffering=0)
    except OSError as error:
        raise unwritable(error) from error
    with out:
        remaining = limit
        while block := file.read(min(2**20, remaining + 1)):
            remaining -= len(block)
            if remaining < 0:
                raise _too_large(to.name, limit)
            _write(out, block)


def _write(out: FileIO, block: bytes) -> None:
    """Write all of a block. Raises StoreUnusable: the source is not to blame."""
    rest = memoryview(block)
    try:
        while rest:
            rest = rest[out.write(rest) :]
    except OSError as error:
        raise unwritable(error) from error


def _changed(key: str, source: str) -> SourceUnavailable:
    message = f"{key} in source {source} changes while it is read: rename finished folders into place"
    return SourceUnavailable("source_changed", message, "key")


def _limits(max_weights_bytes: int) -> dict[str, int]:
    """Most bytes of each file."""
    return {CONFIG_FILE: MAX_CONFIG_BYTES, WEIGHTS_FILE: max_weights_bytes, **CHAT_FILES}


def _too_large(name: str, limit: int) -> AdapterRefused:
    code = "weights_too_large" if name == WEIGHTS_FILE else "config_too_large"
    return AdapterRefused(code, f"{name} has more than {limit} bytes", name)


def _commit_of(path: Path) -> str:
    """The commit of a file in the hub's cache: .../snapshots/<commit>/<file>."""
    parts = path.parts
    return parts[parts.index("snapshots") + 1]
