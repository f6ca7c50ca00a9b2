"""Bases, adapters that PEFT made for them, and stores over a temporary folder."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lorafleet.adapter_store.base_weights import CheckpointWeights
from lorafleet.adapter_store.manifest import BaseGeometry, Dtype, ModuleShape
from lorafleet.adapter_store.names import NameRecord
from lorafleet.adapter_store.peft_format import AdapterReader
from lorafleet.adapter_store.service import AdapterStore
from lorafleet.adapter_store.source_config import DirectoryConfig
from tests.support.adapters import make_adapter
from tests.support.bases import BaseKind
from tests.support.clock import Clock

MAX_RANK = 64


def geometry_of(model: PreTrainedModel, dtype: Dtype = "float32") -> BaseGeometry:
    """Every linear module, the embedding and the norms of a model."""
    modules = {}
    embedding, output = model.get_input_embeddings(), model.get_output_embeddings()
    names = {module: name for name, module in model.named_modules()}
    for module, name in names.items():
        if isinstance(module, torch.nn.Linear):
            modules[name] = ModuleShape("linear", module.in_features, module.out_features)
        elif isinstance(module, Conv1D):
            modules[name] = ModuleShape("linear", module.nx, module.nf)
        elif module is embedding:
            modules[name] = ModuleShape("embedding", module.num_embeddings, module.embedding_dim)
    vectors = {
        name: parameter.shape[0]
        for name, parameter in model.named_parameters()
        if "norm" in name.split(".")[-2] or name.split(".")[-2].startswith("ln_")
    }
    tied = {names[output]: names[embedding]} if output.weight is embedding.weight else {}
    return BaseGeometry(modules, dtype, vectors, tied, frozenset(name for name, _ in model.named_parameters()))


@dataclass(frozen=True)
class Base:
    """A tiny base on disk."""

    folder: Path
    geometry: BaseGeometry

    def reader(self, *, max_rank: int = MAX_RANK) -> AdapterReader:
        return AdapterReader(self.geometry, max_rank, CheckpointWeights(self.folder))


@pytest.fixture(scope="session")
def base_for(base_of: Callable[[BaseKind], Path]) -> Callable[[BaseKind], Base]:
    """`base_for("llama")`."""
    made: dict[BaseKind, Base] = {}

    def of(kind: BaseKind) -> Base:
        if kind not in made:
            folder = base_of(kind)
            with torch.device("meta"):
                model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
            made[kind] = Base(folder, geometry_of(model))
        return made[kind]

    return of


@pytest.fixture(scope="session")
def base(base_for: Callable[[BaseKind], Base]) -> Base:
    """The Llama with untied embeddings."""
    return base_for("llama")


@pytest.fixture(scope="session")
def adapter_of(base: Base, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`adapter_of("rank4_qv", seed=2)`: a folder that PEFT wrote for `base`; not to be changed."""
    made: dict[str, Path] = {}

    def of(kind: str, **options: Any) -> Path:
        label = json.dumps([kind, options], sort_keys=True)
        if label not in made:
            made[label] = make_adapter(tmp_path_factory.mktemp("adapters") / kind, base.folder, kind, **options)
        return made[label]

    return of


@dataclass(frozen=True)
class AdapterCopy:
    """A copy of a PEFT adapter, to be broken."""

    folder: Path

    def set_config(self, **fields: Any) -> None:
        path = self.folder / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))

    def change_tensors(self, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
        path = self.folder / "adapter_model.safetensors"
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path)


CopyOf = Callable[..., AdapterCopy]
OpenStore = Callable[..., AdapterStore]


@pytest.fixture
def copy_of(adapter_of: Callable[..., Path], tmp_path: Path) -> Callable[..., AdapterCopy]:
    """`copy_of("rank4_qv", "name")`: below `tmp_path / "adapters"`, the root of `store`'s source."""

    def of(kind: str, name: str = "a", **options: Any) -> AdapterCopy:
        folder = tmp_path / "adapters" / name
        shutil.copytree(adapter_of(kind, **options), folder, dirs_exist_ok=True)
        return AdapterCopy(folder)

    return of


@pytest.fixture
def clock() -> Clock:
    return Clock(1000.0)


@pytest.fixture
def open_store(base: Base, tmp_path: Path, clock: Clock) -> Iterator[Callable[..., AdapterStore]]:
    """Open a store; one that is open already is closed first, as a restart would."""
    (tmp_path / "adapters").mkdir(exist_ok=True)
    opened: list[AdapterStore] = []

    def of(**options: Any) -> AdapterStore:
        for store in opened:
            store.close()
        opened.clear()
        settings: dict[str, Any] = {
            "state_dir": tmp_path / "state",
            "sources": [DirectoryConfig(name="disk", root=tmp_path / "adapters", resolve=True)],
            "geometry": base.geometry,
            "max_rank": MAX_RANK,
            "host_cache_bytes": 2**24,
            "clock": clock,
            "base_weights": CheckpointWeights(base.folder),
        }
        opened.append(AdapterStore(**{**settings, **options}))
        return opened[0]

    yield of
    for store in opened:
        store.close()


@pytest.fixture
def store(open_store: Callable[..., AdapterStore]) -> AdapterStore:
    return open_store()


def staged_files(tmp_path: Path) -> list[Path]:
    """What lies in the staging folders of all bases."""
    return [path for staging in (tmp_path / "state").glob("*/staging") for path in staging.iterdir()]


async def load(store: AdapterStore, name: str, key: str | None = None, **options: Any) -> str:
    """Publish and flip, as a PUT does. Returns the version."""
    manifest = await store.publish("disk", key or name)
    given = {"source": "disk", "key": key or name, "pinned": False, "warm": 1, "origin": "admin", **options}
    return (await store.flip(NameRecord(name, manifest.version, **given))).version
