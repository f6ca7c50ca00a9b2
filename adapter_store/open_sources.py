"""The configured sources, open: each with threads of its own, so that one that hangs keeps nobody else waiting."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from lorafleet.adapter_store.errors import SourceUnavailable, UnknownSource
from lorafleet.adapter_store.source_config import SourceConfig
from lorafleet.adapter_store.sources import Source, checked_key, open_source

Result = TypeVar("Result")

_THREADS = 4


@dataclass(frozen=True, slots=True)
class OpenSource:
    """A source, its settings and its threads."""

    config: SourceConfig
    source: Source
    threads: ThreadPoolExecutor

    @classmethod
    def of(cls, config: SourceConfig) -> OpenSource:
        """Open a source; nothing is contacted yet."""
        return cls(config, open_source(config), ThreadPoolExecutor(_THREADS, f"source-{config.name}"))

    def fetch(self, key: str, into: Path, max_weights_bytes: int) -> None:
        """Copy an adapter into the empty folder `into`, as `Source.fetch` does. Blocks."""
        checked_key(key)
        self.source.fetch(key, into, max_weights_bytes)

    async def run(self, work: Callable[[], Result]) -> Result:
        """Run work in the source's own threads. Work that takes too long is left alone, and done for nobody."""
        running = asyncio.get_running_loop().run_in_executor(self.threads, work)
        try:
            return await asyncio.wait_for(running, self.config.timeout_s)
        except TimeoutError as error:
            message = f"source {self.config.name} did not answer within {self.config.timeout_s:g} s"
            raise SourceUnavailable("source_unavailable", message, "source") from error


class OpenSources:
    """The sources by name."""

    def __init__(self, configs: Sequence[SourceConfig]) -> None:
        names = [config.name for config in configs]
        if len(set(names)) != len(names):
            raise ValueError(f"two sources have the same name: {sorted(names)}")
        self._sources = {config.name: OpenSource.of(config) for config in configs}

    def __getitem__(self, name: str) -> OpenSource:
        """The source of this name. Raises UnknownSource."""
        if name not in self._sources:
            choices = f"choose one of {', '.join(self._sources)}" if self._sources else "none is configured"
            raise UnknownSource("unknown_source", f"there is no source {name[:128]!r}; {choices}", "source")
        return self._sources[name]

    @property
    def resolving(self) -> tuple[str, ...]:
        """The sources that are asked for names that were never loaded, in their order."""
        return tuple(name for name, opened in self._sources.items() if opened.config.resolve)

    def close(self) -> None:
        """End the threads; work that runs is not waited for."""
        for opened in self._sources.values():
            opened.threads.shutdown(wait=False, cancel_futures=True)
