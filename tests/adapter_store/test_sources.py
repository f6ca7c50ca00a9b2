"""Sources: what they copy, what they refuse to follow, and what they say when they cannot be reached."""

from __future__ import annotations

import hashlib
import os
import socket
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import fsspec
import huggingface_hub
import pytest
from pydantic import TypeAdapter, ValidationError

from lorafleet.adapter_store import sources
from lorafleet.adapter_store.errors import (
    AdapterRefused,
    AdapterStoreError,
    InvalidKey,
    SourceUnavailable,
    UnknownKey,
)
from lorafleet.adapter_store.peft_format import INDEX_FILES
from lorafleet.adapter_store.source_config import DirectoryConfig, HubConfig, ObjectStoreConfig, SourceConfig
from lorafleet.adapter_store.sources import DirectorySource, ObjectStoreSource, Source, open_source

CONFIG, WEIGHTS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
LIMIT = 1000

BAD_KEYS = [
    "",
    "/",
    "/etc",
    "..",
    "../secret",
    "a/../../secret",
    "a/..",
    "./a",
    "a//b",
    "a/",
    "~root/a",
    "a\\..\\b",
    "a\0b",
    "a\nb",
    "a\n",
    "C:/a",
    "s3://bucket/a",
    "a?x=1",
    "a#b",
    "*",
    "a[bc]",
    "%2e%2e/a",
    "\ud800",
    "x" * 256,
    "/".join(["x"] * 1000),
]


def put_adapter(folder: Path, text: str = "one") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    folder.joinpath(CONFIG).write_text(f"config {text}")
    folder.joinpath(WEIGHTS).write_text(f"weights {text}")
    return folder


def fetched(source: Source, key: str, into: Path) -> dict[str, str]:
    into.mkdir()
    source.fetch(key, into, LIMIT)
    return {path.name: path.read_text() for path in into.iterdir()}


ONE = {CONFIG: "config one", WEIGHTS: "weights one"}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    put_adapter(tmp_path / "secret", "secret")
    put_adapter(tmp_path / "root" / "a")
    return tmp_path / "root"


@pytest.fixture(params=["directory", "local_url", "memory"])
def any_source(request: pytest.FixtureRequest, root: Path) -> Iterator[Source]:
    match request.param:
        case "directory":
            yield open_source(DirectoryConfig(name="s", root=root))
        case "local_url":
            yield open_source(ObjectStoreConfig(name="s", url=f"file://{root}"))
        case _:
            memory = fsspec.filesystem("memory")
            memory.store.clear()
            memory.put(str(root) + "/", "/bucket/adapters", recursive=True)
            yield open_source(ObjectStoreConfig(name="s", url="memory://bucket/adapters"))
            memory.store.clear()


def test_copies_config_and_weights_alone(any_source: Source, tmp_path: Path) -> None:
    assert fetched(any_source, "a", tmp_path / "into") == ONE


@pytest.mark.parametrize("key", BAD_KEYS, ids=repr)
def test_keys_that_are_no_plain_paths_are_refused(any_source: Source, tmp_path: Path, key: str) -> None:
    with pytest.raises(InvalidKey) as caught:
        fetched(any_source, key, tmp_path / "into")
    assert caught.value.code == "invalid_key"
    assert list((tmp_path / "into").iterdir()) == []


@pytest.mark.parametrize("key", ["b", "a/b", "a/adapter_config.json", "A b (c)"])
def test_unknown_keys_are_told_from_failures(any_source: Source, tmp_path: Path, key: str) -> None:
    with pytest.raises(UnknownKey) as caught:
        fetched(any_source, key, tmp_path / "into")
    assert caught.value.code == "key_not_found"
    assert str(tmp_path) not in str(caught.value)


def test_files_over_the_limit_are_refused(any_source: Source, tmp_path: Path) -> None:
    (tmp_path / "into").mkdir()
    with pytest.raises(AdapterRefused) as caught:
        any_source.fetch("a", tmp_path / "into", 5)
    assert caught.value.code == "weights_too_large"
    assert (tmp_path / "into" / WEIGHTS).stat().st_size <= 5


def test_missing_files_are_left_out_and_pickles_only_named(root: Path, tmp_path: Path) -> None:
    (root / "a" / WEIGHTS).rename(root / "a" / PICKLE)
    configs: list[SourceConfig] = [
        DirectoryConfig(name="s", root=root),
        ObjectStoreConfig(name="s", url=f"file://{root}"),
    ]
    for number, config in enumerate(configs):
        assert fetched(open_source(config), "a", tmp_path / str(number)) == {CONFIG: "config one", PICKLE: ""}


@pytest.mark.parametrize("index", INDEX_FILES)
def test_shards_are_only_named(root: Path, tmp_path: Path, index: str) -> None:
    (root / "a" / WEIGHTS).rename(root / "a" / "adapter_model-00001-of-00002.safetensors")
    (root / "a" / index).write_text("{}")
    source = open_source(DirectoryConfig(name="s", root=root))
    assert fetched(source, "a", tmp_path / "1") == {CONFIG: "config one", index: ""}
    memory = fsspec.filesystem("memory")
    memory.store.clear()
    memory.pipe({f"/b/a/{index}": b"{}"})
    assert fetched(open_source(ObjectStoreConfig(name="s", url="memory://b")), "a", tmp_path / "2") == {index: ""}
    memory.store.clear()


def test_object_store_names_pickles_too(tmp_path: Path) -> None:
    memory = fsspec.filesystem("memory")
    memory.store.clear()
    memory.pipe({"/b/a/adapter_model.bin": b"pickle", "/b/empty/other": b"x"})
    source = open_source(ObjectStoreConfig(name="s", url="memory://b"))
    assert fetched(source, "a", tmp_path / "1") == {PICKLE: ""}
    assert fetched(source, "empty", tmp_path / "2") == {}
    memory.store.clear()


class TestLinks:
    """Links within the root are followed; whatever leads out is refused, and not read."""

    @pytest.fixture
    def source(self, root: Path) -> Source:
        return open_source(DirectoryConfig(name="s", root=root))

    def refused(self, source: Source, key: str, tmp_path: Path) -> None:
        with pytest.raises(InvalidKey) as caught:
            fetched(source, key, tmp_path / "into")
        assert caught.value.code == "key_outside_root"
        assert str(tmp_path) not in str(caught.value)
        assert all("secret" not in path.read_text() for path in (tmp_path / "into").iterdir())

    def test_within_the_root(self, source: Source, root: Path, tmp_path: Path) -> None:
        (root / "latest").symlink_to("a")
        (root / "b").mkdir()
        (root / "b" / CONFIG).symlink_to(root / "a" / CONFIG)
        (root / "b" / WEIGHTS).symlink_to("../a/" + WEIGHTS)
        assert fetched(source, "latest", tmp_path / "1") == ONE
        assert fetched(source, "b", tmp_path / "2") == ONE

    def test_folder(self, source: Source, root: Path, tmp_path: Path) -> None:
        (root / "b").symlink_to(tmp_path / "secret")
        self.refused(source, "b", tmp_path)

    def test_folder_on_the_way(self, source: Source, root: Path, tmp_path: Path) -> None:
        (root / "b").symlink_to("..")
        self.refused(source, "b/secret", tmp_path)

    def test_nothing_there(self, source: Source, root: Path, tmp_path: Path) -> None:
        (root / "b").symlink_to("/nowhere/at/all")
        self.refused(source, "b", tmp_path)

    @pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
    def test_file(self, source: Source, root: Path, tmp_path: Path, name: str) -> None:
        (root / "a" / name).unlink()
        (root / "a" / name).symlink_to(tmp_path / "secret" / name)
        self.refused(source, "a", tmp_path)

    def test_neighbour_whose_name_starts_alike(self, source: Source, root: Path, tmp_path: Path) -> None:
        put_adapter(tmp_path / "root2" / "a", "secret")
        (root / "b").symlink_to("../root2/a")
        self.refused(source, "b", tmp_path)

    def test_circle(self, source: Source, root: Path, tmp_path: Path) -> None:
        (root / "b").symlink_to("c")
        (root / "c").symlink_to("b")
        with pytest.raises(AdapterStoreError):
            fetched(source, "b", tmp_path / "into")

    def test_local_url(self, root: Path, tmp_path: Path) -> None:
        (root / "b").symlink_to(tmp_path / "secret")
        self.refused(open_source(ObjectStoreConfig(name="s", url=str(root))), "b", tmp_path)

    def test_link_put_between_look_and_open(
        self, source: Source, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        opened = sources._open_below

        def swapped(below: Path, path: Path) -> Any:
            if (root / "a").is_dir() and not (root / "a").is_symlink():
                (root / "a").rename(root / "was")
                (root / "a").symlink_to(tmp_path / "secret")
            return opened(below, path)

        monkeypatch.setattr(sources, "_open_below", swapped)
        with pytest.raises((InvalidKey, SourceUnavailable)):
            fetched(source, "a", tmp_path / "into")
        assert list((tmp_path / "into").iterdir()) == []

    def test_pipe_does_not_hang(self, source: Source, root: Path, tmp_path: Path) -> None:
        (root / "a" / WEIGHTS).unlink()
        os.mkfifo(root / "a" / WEIGHTS)
        with pytest.raises(AdapterRefused):
            fetched(source, "a", tmp_path / "into")


class TestChangesWhileRead:
    """A folder that is replaced under the reader gives all of one state, or is asked for again."""

    def replace_after(self, monkeypatch: pytest.MonkeyPatch, change: Callable[[int], None], name: str) -> None:
        """Call `change(1)`, `change(2)`, ... after each copy of `name`."""
        copied, times = sources._copy, 0

        def changing(file: Any, to: Path, limit: int) -> None:
            nonlocal times
            copied(file, to, limit)
            if to.name == name:
                times += 1
                change(times)

        monkeypatch.setattr(sources, "_copy", changing)

    def files_renamed(self, root: Path, text: str) -> None:
        put_adapter(root / "new", text)
        for name in (CONFIG, WEIGHTS):
            (root / "new" / name).replace(root / "a" / name)

    def folder_swapped(self, root: Path, text: str) -> None:
        put_adapter(root / f"new {text}", text)
        (root / "a").rename(root / f"old {text}")
        (root / f"new {text}").rename(root / "a")

    def written_in_place(self, root: Path, text: str) -> None:
        put_adapter(root / "a", text)

    @pytest.mark.parametrize("after", [CONFIG, WEIGHTS])
    @pytest.mark.parametrize("how", ["files_renamed", "folder_swapped", "written_in_place"])
    def test_one_change(
        self, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str, after: str
    ) -> None:
        self.replace_after(monkeypatch, lambda n: getattr(self, how)(root, "two!") if n == 1 else None, after)
        source = open_source(DirectoryConfig(name="s", root=root))
        assert fetched(source, "a", tmp_path / "into") == {CONFIG: "config two!", WEIGHTS: "weights two!"}

    def test_without_end(self, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.replace_after(monkeypatch, lambda n: self.files_renamed(root, f"change {n}"), CONFIG)
        with pytest.raises(SourceUnavailable, match="changes while it is read") as caught:
            fetched(open_source(DirectoryConfig(name="s", root=root)), "a", tmp_path / "into")
        assert caught.value.code == "source_changed"

    def test_object_store(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        memory = fsspec.filesystem("memory")
        memory.store.clear()

        def put(text: str) -> None:
            memory.pipe({f"/b/a/{CONFIG}": f"config {text}".encode(), f"/b/a/{WEIGHTS}": f"weights {text}".encode()})

        put("one")
        self.replace_after(monkeypatch, lambda n: put("two") if n == 1 else None, CONFIG)
        source = open_source(ObjectStoreConfig(name="s", url="memory://b"))
        assert fetched(source, "a", tmp_path / "into") == {CONFIG: "config two", WEIGHTS: "weights two"}
        memory.store.clear()


class TestUnavailable:
    def test_root_that_is_not_there(self, tmp_path: Path) -> None:
        with pytest.raises(SourceUnavailable) as caught:
            fetched(open_source(DirectoryConfig(name="s", root=tmp_path / "none")), "a", tmp_path / "into")
        assert caught.value.retryable
        assert str(tmp_path) not in str(caught.value)

    def test_object_store_that_fails(self, tmp_path: Path) -> None:
        class Broken:
            def __getattr__(self, name: str) -> Any:
                raise ConnectionError("no route to host 10.1.2.3")

        with pytest.raises(SourceUnavailable) as caught:
            fetched(ObjectStoreSource("s", Broken(), "b"), "a", tmp_path / "into")
        assert "10.1.2.3" not in str(caught.value)


COMMIT = "a" * 40


def commit_of(revision: str) -> str:
    return hashlib.sha1(revision.encode()).hexdigest()


BUSY = "(the hub has too many requests)"
"""A file that it does not tell of now."""


class FakeHub(BaseHTTPRequestHandler):
    """The few routes of the hub that its client needs to download a file."""

    files: dict[str, str]

    def do_HEAD(self) -> None:
        self.answer(with_body=False)

    def do_GET(self) -> None:
        self.answer(with_body=True)

    def answer(self, *, with_body: bool) -> None:
        repository, _, rest = self.path.strip("/").partition("/resolve/")
        revision, _, name = unquote(rest).partition("/")
        if revision not in ("main", COMMIT):
            # Of other revisions the files are kept as `owner/repository@revision/path`; the commit is made of it.
            named = {commit_of(path.partition("@")[2].partition("/")[0]): path for path in self.files if "@" in path}
            known = named.get(revision, f"@{revision}/").partition("@")[2].partition("/")[0]
            if not any(path.startswith(f"{repository}@{known}/") for path in self.files):
                self.send_response(404)
                self.send_header("X-Error-Code", "RevisionNotFound")
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            repository, commit = f"{repository}@{known}", commit_of(known)
        else:
            commit = COMMIT
        text = self.files.get(f"{repository}/{name}")
        if text == BUSY:
            self.send_response(429)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        if text is None:
            is_known = any(path.startswith(f"{repository}/") for path in self.files)
            self.send_response(404)
            self.send_header("X-Error-Code", "EntryNotFound" if is_known else "RepoNotFound")
            self.send_header("X-Repo-Commit", commit)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        self.send_response(200)
        self.send_header("X-Repo-Commit", commit)
        self.send_header("ETag", f'"{abs(hash(text))}"')
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        if with_body:
            self.wfile.write(text.encode())

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        """Keep quiet."""


class TestHub:
    @pytest.fixture
    def hub(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, str]]:
        """Files of a hub that runs on this machine, by `owner/repository/path`."""
        files: dict[str, str] = {}
        handler = type("Hub", (FakeHub,), {"files": files})
        server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        monkeypatch.setattr(
            huggingface_hub.constants,
            "HUGGINGFACE_CO_URL_TEMPLATE",
            f"http://127.0.0.1:{server.server_port}/{{repo_id}}/resolve/{{revision}}/{{filename}}",
        )
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        yield files
        server.shutdown()
        server.server_close()

    @pytest.fixture
    def source(self, tmp_path: Path) -> Source:
        return open_source(HubConfig(name="hub", cache_dir=tmp_path / "cache"))

    def put(self, hub: dict[str, str], repository: str, text: str = "one") -> None:
        hub.update({f"{repository}/{CONFIG}": f"config {text}", f"{repository}/{WEIGHTS}": f"weights {text}"})

    def test_downloads_and_then_serves_from_the_cache(
        self, hub: dict[str, str], source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        self.put(hub, "org/a")
        assert fetched(source, "org/a", tmp_path / "1") == ONE
        with monkeypatch.context() as patch:
            patch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
            assert fetched(source, "org/a", tmp_path / "2") == ONE

    def test_folders_of_a_repository_and_namespaces(self, hub: dict[str, str], tmp_path: Path) -> None:
        self.put(hub, "org/many/sub/a")
        assert fetched(open_source(HubConfig(name="h", cache_dir=tmp_path)), "org/many/sub/a", tmp_path / "1") == ONE
        of_org = open_source(HubConfig(name="h", namespace="org", cache_dir=tmp_path))
        assert fetched(of_org, "many/sub/a", tmp_path / "2") == ONE

    def test_revisions_of_a_key(self, hub: dict[str, str], tmp_path: Path) -> None:
        self.put(hub, "org/a")
        self.put(hub, "org/a@v2", "two")
        self.put(hub, "org/a@v3/sub", "three")
        source = open_source(HubConfig(name="h", cache_dir=tmp_path / "cache"))
        assert fetched(source, "org/a", tmp_path / "1") == ONE
        assert fetched(source, "org/a@v2", tmp_path / "2") == {CONFIG: "config two", WEIGHTS: "weights two"}
        assert fetched(source, "org/a/sub@v3", tmp_path / "3") == {CONFIG: "config three", WEIGHTS: "weights three"}
        fixed = open_source(HubConfig(name="h", namespace="org", revision="v2", cache_dir=tmp_path / "cache"))
        assert fetched(fixed, "a", tmp_path / "4")[CONFIG] == "config two"
        assert fetched(fixed, "a@main", tmp_path / "5") == ONE
        with pytest.raises(UnknownKey, match="has no revision v9"):
            fetched(source, "org/a@v9", tmp_path / "6")
        for i, key in enumerate(("org/a@", "org/a@../b", "org/a@v 2", "org/a@v2@v3", "@v2")):
            with pytest.raises(InvalidKey):
                fetched(source, key, tmp_path / f"bad{i}")

    def test_what_is_not_there(self, hub: dict[str, str], source: Source, tmp_path: Path) -> None:
        hub["org/a/other"] = "x"
        hub[f"org/pickled/{CONFIG}"] = "config one"
        hub[f"org/pickled/{PICKLE}"] = "pickle"
        assert fetched(source, "org/a", tmp_path / "1") == {}
        assert fetched(source, "org/pickled", tmp_path / "2") == {CONFIG: "config one", PICKLE: ""}
        hub[f"org/sharded/{INDEX_FILES[0]}"] = "{}"
        assert fetched(source, "org/sharded", tmp_path / "4") == {INDEX_FILES[0]: ""}
        with pytest.raises(UnknownKey):
            fetched(source, "org/b", tmp_path / "3")

    @pytest.mark.parametrize("key", ["a", "org/..", "org/-a", "o--g/a..b"])
    def test_keys_that_are_no_repositories(self, source: Source, tmp_path: Path, key: str) -> None:
        with pytest.raises(InvalidKey):
            fetched(source, key, tmp_path / "into")

    def test_offline_and_not_cached(self, source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        with pytest.raises(SourceUnavailable) as caught:
            fetched(source, "org/a", tmp_path / "into")
        assert str(tmp_path) not in str(caught.value)

    def test_unreachable(
        self, hub: dict[str, str], source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        self.put(hub, "org/a")
        assert fetched(source, "org/a", tmp_path / "1") == ONE
        with socket.socket() as closed:
            closed.bind(("127.0.0.1", 0))
            port = closed.getsockname()[1]
        url = f"http://127.0.0.1:{port}"
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", url)
        template = f"{url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        with pytest.raises(SourceUnavailable) as caught:
            fetched(source, "org/b", tmp_path / "2")
        assert url not in str(caught.value)
        # What is in the cache is served all the same.
        assert fetched(source, "org/a", tmp_path / "3") == ONE

    def test_what_the_hub_could_not_say_just_now_is_not_left_out(
        self, hub: dict[str, str], source: Source, tmp_path: Path
    ) -> None:
        self.put(hub, "org/a")
        hub["org/a/chat_template.jinja"] = BUSY
        with pytest.raises(SourceUnavailable):
            fetched(source, "org/a", tmp_path / "1")
        hub["org/a/chat_template.jinja"] = "a template"
        assert fetched(source, "org/a", tmp_path / "2") == {**ONE, "chat_template.jinja": "a template"}

    def test_a_name_without_an_owner_is_not_asked_for(self, hub: dict[str, str], tmp_path: Path) -> None:
        source = open_source(HubConfig(name="h", resolve=True, cache_dir=tmp_path))
        hub.clear()  # whatever is asked for now would be missing, not invalid
        for i, name in enumerate(("shout", "policy@12", "/data/step_1")):
            with pytest.raises(InvalidKey):
                fetched(source, name, tmp_path / f"{i}")


class TestConfig:
    adapter: TypeAdapter[SourceConfig] = TypeAdapter(SourceConfig)

    def test_kinds(self, tmp_path: Path) -> None:
        made = [
            self.adapter.validate_python({"name": "a", "kind": "directory", "root": str(tmp_path), "resolve": True}),
            self.adapter.validate_python({"name": "b", "kind": "hub", "resolve": False, "revision": "v1"}),
            self.adapter.validate_python({"name": "c", "kind": "object_store", "url": "memory://x"}),
        ]
        assert [type(config) for config in made] == [DirectoryConfig, HubConfig, ObjectStoreConfig]
        assert isinstance(open_source(made[0]), DirectorySource)
        assert isinstance(open_source(made[2]), ObjectStoreSource)

    @pytest.mark.parametrize(
        "fields",
        [
            {"name": "a", "kind": "ftp", "root": "/"},
            {"name": "a", "kind": "directory"},
            {"name": "a", "root": "/x"},
            {"name": "a b", "kind": "directory", "root": "/x"},
            {"name": "a", "kind": "directory", "root": "/x", "revision": "main"},
            {"name": "a", "kind": "directory", "root": "/x", "timeout_s": 0},
        ],
    )
    def test_mistakes(self, fields: dict[str, object]) -> None:
        with pytest.raises(ValidationError):
            self.adapter.validate_python(fields)
