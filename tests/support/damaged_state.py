"""A state folder of the adapter store with entries of every kind, and trials that damage one byte of it."""

from __future__ import annotations

import shutil
from pathlib import Path
from random import Random
from typing import Any

from lorafleet.adapter_store.catalog import Catalog
from lorafleet.adapter_store.manifest import AdapterManifest, ExtraManifest, ModuleManifest
from lorafleet.adapter_store.names import NameRecord
from lorafleet.adapter_store.records import DesiredRecord


def manifest(version: str) -> AdapterManifest:
    modules = (ModuleManifest("model.layers.0.q_proj", 4, 0.1), ModuleManifest("lm_head", 2, 1 / 3))
    extras = (ExtraManifest("model.layers.0.q_proj", "added", 1, 8), ExtraManifest("norm.weight", "replaced", 1, 4))
    return AdapterManifest(version, 4, ("lm_head", "q_proj"), modules, 1234, extras)


def record(name: str, version: str, **fields: Any) -> NameRecord:
    given = {"source": "s", "key": f"k/{name}", "pinned": False, "warm": 1, "origin": "admin", **fields}
    return NameRecord(name, version, **given)


def publish(catalog: Catalog, version: str) -> None:
    with catalog.staging_folder() as staged:
        staged.joinpath("adapter_config.json").write_text(version)
        staged.joinpath("adapter_model.safetensors").write_bytes(b"weights of " + version.encode())
        catalog.publish(staged, manifest(version))


class States:
    """Two folders with the same entries: of a store that was closed, and of one that was killed."""

    def __init__(self, root: Path) -> None:
        self._root = root
        closed = root / "closed"
        catalog = Catalog(closed)
        for number in range(4):
            publish(catalog, f"v{number}")
            catalog.set_name(record(f"name{number}", f"v{number}"))
        for number in range(4):
            catalog.set_name(record(f"gone{number}", "v0"))
            catalog.delete_name(f"gone{number}", explicit=True)
        catalog.set_desired([DesiredRecord(f"wanted{number}", "s", "k") for number in range(4)], 9)
        self._records, self._manifests = dict(catalog.names.records), dict(catalog.manifests)
        shutil.copytree(closed, root / "killed", ignore=shutil.ignore_patterns("*-shm"))
        catalog.close()

    def damage(self, random: Random) -> tuple[str, ...]:
        """Flip or cut one byte of a copy, and start a store on it. Returns the kinds of entries that it names.

        Asserts that it starts, has all that is undamaged, names all that is not, and goes on from there.
        """
        folder = self._root / "trial"
        shutil.copytree(self._root / random.choice(["closed", "killed"]), folder)
        files = sorted(p for p in folder.rglob("*") if p.is_file() and p.stat().st_size and p.suffix != ".safetensors")
        path = random.choice(files)
        content = bytearray(path.read_bytes())
        place = random.randrange(len(content))
        is_cut = random.random() < 0.2
        if is_cut:
            del content[place:]
        else:
            content[place] ^= random.randrange(1, 256)
        path.write_bytes(content)
        told = f"{path.relative_to(folder)} {'cut' if is_cut else 'flipped'} at {place}"
        catalog = Catalog(folder)
        damaged = {(damage.kind, damage.entry) for damage in catalog.damaged()}
        has_lost_file = any(kind == "database" for kind, _ in damaged)
        for name, kept in self._records.items():
            if name in catalog.names.records:
                assert catalog.names.records[name] == kept, told
            else:
                assert ("name", name) in damaged or has_lost_file, told
        assert catalog.names.records.keys() <= self._records.keys(), told
        for number in range(4):
            assert catalog.names.is_deleted(f"gone{number}") or has_lost_file, told
            is_wanted = any(adapter.name == f"wanted{number}" for adapter in catalog.desired().adapters)
            assert is_wanted or not catalog.desired().is_complete or has_lost_file, told
        assert catalog.desired().generation == 9 or has_lost_file, told
        assert catalog.manifests == self._manifests, told
        assert len(damaged) <= 2 or has_lost_file, told
        assert catalog.set_name(record("name0", "v1")).generation > 12 or has_lost_file, told
        catalog.close()
        shutil.rmtree(folder)
        return tuple(sorted(kind for kind, _ in damaged))
