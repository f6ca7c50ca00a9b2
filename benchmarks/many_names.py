"""Measures a load, a worker's question and a desired set with 10,000 adapters, against bars.

    python benchmarks/many_names.py [--names 10000] [--minutes 10] [--out results.jsonl]

In this process, without Ray: the store on disk, and the controller's judgement over workers of plain objects. With
`--minutes` the store is asked for so long as a service asks it: 100 workers once a second, names of requests, a
changed adapter a second, and a page of the listing every few. `put` and `reconcile` are CPU seconds. `stall_s` is the
longest time in which the store's event loop did not come round, and `stall_cpu_s` the most CPU of its thread in one
round: other work on the machine is not in it. Both are printed for each step, too.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import count
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lorafleet.adapter_store.manifest import AdapterManifest, shared_module
from lorafleet.adapter_store.names import NamedAdapter, NameRecord
from lorafleet.adapter_store.service import AdapterStore
from lorafleet.cluster import heap
from lorafleet.cluster.admin.desired import DesiredSet
from lorafleet.cluster.admin.rollout import Rollout
from lorafleet.workers.config import ModelConfig
from lorafleet.workers.model.geometry import read_geometry
from tests.cluster.fleets import DictFleet, DictStore
from tests.support.bases import make_base

NUM_WORKERS, NUM_HELD = 100, 1_000
PAGE_NAMES = 1_000
BARS = {"put_ratio": 1.5, "reconcile_cores": 0.1, "desired_s": 2.0, "stall_s": 0.05, "stall_cpu_s": 0.05}


NUM_LAYERS, TARGETS = 32, ("down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj")


def manifest_of(number: int) -> AdapterManifest:
    """An adapter on all linear modules of a base of 7 billion weights."""
    modules = [shared_module(f"model.layers.{n}.{target}", 8, 2.0) for n in range(NUM_LAYERS) for target in TARGETS]
    return AdapterManifest(f"{number:064x}", 8, TARGETS, tuple(modules), 40_000_000)


@contextmanager
def cpu_s(into: dict[str, float], name: str, count: int = 1) -> Iterator[None]:
    began = time.process_time()
    yield
    into[name] = (time.process_time() - began) / count


class Stalls:
    """The longest time, and the most CPU time, in which the loop did not come round: for each step."""

    def __init__(self) -> None:
        self.longest: dict[str, tuple[float, float]] = {}
        self.step = ""

    async def run(self) -> None:
        while True:
            step, began, began_cpu = self.step, time.perf_counter(), time.thread_time()
            await asyncio.sleep(0.001)
            wall_s, cpu_s = time.perf_counter() - began - 0.001, time.thread_time() - began_cpu
            for each in {step, self.step}:  # a round that a step ended in may be of either
                longest = self.longest.get(each, (0.0, 0.0))
                self.longest[each] = max(longest[0], wall_s), max(longest[1], cpu_s)


def fill(store: AdapterStore, first: int, count: int) -> None:
    """Give the catalogue versions and names without the work of reading adapters."""
    catalog = store._catalog
    for number in range(first, first + count):
        manifest = manifest_of(number)
        with catalog.staging_folder() as folder:
            for name in ("adapter_config.json", "adapter_model.safetensors"):
                (folder / name).touch()
            catalog.publish(folder, manifest)
        catalog.set_name(NameRecord(f"n{number}", manifest.version, "demo", "a", False, 1, "config"))


async def put_cost(store: AdapterStore, figures: dict[str, float], name: str) -> None:
    """Time a PUT's calls of the store, without reading the adapter: the name, the flip, and the ingress's question."""
    generation = await store.generation()
    num_puts = 50
    with cpu_s(figures, name, num_puts):
        for number in range(num_puts):
            adapter = await store.named("n0")
            record = NameRecord(**{f: getattr(adapter, f) for f in NameRecord.__dataclass_fields__})
            await store.flip(replace(record, key=f"k{number}"))
            changes = await store.names_since(generation)
            assert changes.is_complete
            generation = changes.generation


async def live(store: AdapterStore, num_names: int, minutes: float) -> None:
    """Ask it, once a second, what a service asks in a second."""
    trimming = asyncio.create_task(heap.trim_often())
    ends = time.monotonic() + 60 * minutes
    for second in count():
        begun = time.monotonic()
        if begun >= ends:
            break
        generation = await store.generation()
        adapter = await store.named("n0")
        record = NameRecord(**{f: getattr(adapter, f) for f in NameRecord.__dataclass_fields__})
        await store.flip(replace(record, key=f"live{second}"))
        assert (await store.names_since(generation)).is_complete
        for worker in range(NUM_WORKERS):
            assert await store.reconcile_again(f"w{worker}", generation) is not None
            assert store.find(f"n{(second * NUM_WORKERS + worker) % num_names}") is not None
            await asyncio.sleep(0)  # each is a call of its own
        if second % 5 == 0:
            await store.page("", PAGE_NAMES)
        await asyncio.sleep(max(0.0, begun + 1 - time.monotonic()))
    trimming.cancel()


async def measure(num_names: int, folder: Path, minutes: float = 0.0) -> dict[str, float]:
    base = make_base(folder / "base", "llama")
    geometry = read_geometry(ModelConfig(id="base", source=str(base)), "cpu")
    store = AdapterStore(state_dir=folder / "state", sources=(), geometry=geometry, max_rank=64, host_cache_bytes=1)
    figures: dict[str, float] = {}
    await asyncio.to_thread(fill, store, 0, 10)
    await put_cost(store, figures, "put_at_10_s")
    await asyncio.to_thread(fill, store, 10, num_names - 10)
    held = [tuple(f"{(97 * w + n) % num_names:064x}" for n in range(NUM_HELD)) for w in range(NUM_WORKERS)]
    heap.settle()  # as the deployment does
    stalls = Stalls()
    watching = asyncio.create_task(stalls.run())
    stalls.step = "put"
    await put_cost(store, figures, f"put_at_{num_names}_s")
    figures["put_ratio"] = figures[f"put_at_{num_names}_s"] / figures["put_at_10_s"]
    stalls.step = "reconcile"
    for worker, versions in enumerate(held):
        await store.reconcile(f"w{worker}", versions)
        await asyncio.sleep(0)  # each is a call of its own
    generation = await store.generation()
    rounds = 10
    with cpu_s(figures, "reconcile_cores", rounds):
        for _ in range(rounds):  # each is a second of the service
            for worker in range(NUM_WORKERS):
                await store.reconcile_again(f"w{worker}", generation)
                await asyncio.sleep(0)
    stalls.step = "collect"
    await store.collect()
    stalls.step = "list"
    adapters = await store.page("", None)
    stalls.step = "records"
    records = await store.records()
    assert len(adapters) == len(records) == num_names
    if minutes:
        stalls.step = "live"
        await live(store, num_names, minutes)
    stalls.step = "garbage"
    await asyncio.sleep(0.01)
    gc.collect()
    await asyncio.sleep(0.01)
    watching.cancel()
    for step, (wall_s, cpu) in stalls.longest.items():
        if step:
            figures |= {f"stall_{step}_s": wall_s, f"stall_{step}_cpu_s": cpu}
    figures["stall_s"] = max(wall_s for wall_s, _ in stalls.longest.values())
    figures["stall_cpu_s"] = max(cpu for _, cpu in stalls.longest.values())
    del adapters, records
    figures["desired_s"] = await desired_cost(num_names)
    store.close()
    return figures


async def desired_cost(num_names: int) -> float:
    """Seconds from a `user_config` that is in place to the judgement that nothing is to be done."""
    store = DictStore(keys={f"k{number}": manifest_of(number) for number in range(num_names)})
    fleet = DictFleet(store, ["w0", "w1"])
    adapters = []
    for number in range(num_names):
        await store_name(store, number)
        fleet.workers["w0"].resident[manifest_of(number).version] = manifest_of(number)
        adapters.append({"name": f"n{number}", "source": "demo", "key": f"k{number}"})
    desired = DesiredSet(Rollout(store, fleet), (), store=store, num_workers=2)
    began = time.perf_counter()
    await desired.take_user_config(1, {"adapters": adapters})
    await desired.apply()
    assert not desired._problems
    assert {call for call, _ in fleet.calls} == {"state"}
    return time.perf_counter() - began


async def store_name(store: DictStore, number: int) -> None:
    manifest = store.keys[f"k{number}"]
    record = NameRecord(f"n{number}", manifest.version, "demo", f"k{number}", False, 1, "config")
    store.names[record.name] = NamedAdapter.of(record, manifest)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--names", type=int, default=10_000)
    parser.add_argument("--minutes", type=float, default=0.0, help="of a service's work")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        figures = asyncio.run(measure(arguments.names, Path(folder), arguments.minutes))
    late = {name for name, bar in BARS.items() if figures[name] > bar}
    for name, figure in figures.items():
        bar = f"  bar {BARS[name]:g}{' MISSED' if name in late else ''}" if name in BARS else ""
        print(f"{name:>22} {figure:.6f}{bar}")
    if arguments.out is not None:
        with arguments.out.open("a") as out:
            out.write(json.dumps({"names": arguments.names, "minutes": arguments.minutes, **figures}) + "\n")
    return int(bool(late))


if __name__ == "__main__":
    raise SystemExit(main())
