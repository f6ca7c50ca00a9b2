"""The cases of `engine.py`: what each runs on which engine, and the lines that it leaves."""

from __future__ import annotations

import os
import random
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Literal

import numpy as np
from random_models import GEOMETRIES, RandomAdapters, kv_bytes, write_base, write_tokenizer, write_weights
from running_engine import Figures, RunningEngine, running_engine

from lorafleet.workers.config import EngineConfig, PoolConfig, SpeculationConfig
from lorafleet.workers.request import SamplingParams, StructuredOutputs


@dataclass(frozen=True, slots=True)
class Work:
    """Amounts of work in a case."""

    requests: int = 256
    prompt: int = 512
    output: int = 128
    adapters: int = 64
    decode_output: int = 256
    short_prompt: int = 64
    hot_streams: int = 32
    hot_output: int = 512
    cold_tries: int = 12
    many_adapters: int = 512
    many_runs: tuple[tuple[float, int], ...] = ((60.0, 1024), (40.0, 600))
    """Requests a second, and how many: the one is nearly all that a GPU can do, the other leaves it room."""
    many_output: int = 64
    long: tuple[tuple[int, int], ...] = ((32, 8192), (4, 32768))
    """Requests of long prompts, and their tokens."""
    shared: int = 700
    own: int = 100
    answers: int = 200
    answer: int = 143
    max_batch_tokens: int = 8192
    max_running: int = 256


FULL = Work()
TINY = Work(
    requests=6,
    prompt=24,
    output=5,
    adapters=4,
    decode_output=6,
    short_prompt=8,
    hot_streams=3,
    hot_output=12,
    cold_tries=4,
    many_adapters=12,
    many_runs=((60.0, 20), (40.0, 15)),
    many_output=4,
    long=((4, 200), (2, 300)),
    shared=40,
    own=10,
    answers=5,
    answer=4,
    max_batch_tokens=64,
    max_running=8,
)
RANK = 16
"""Of the adapters of most cases, and all that their pool has room for: other servers are told so when they run them."""
RANKS = (8, 16, 32, 64)
PAGE_ROUND = 1.1
"""Pages are whole, so memory for them is more than what goes into them."""


Kind = Literal["lora", "no_lora", "fp8", "guessing"]


@dataclass(slots=True)
class Lab:
    """Engine, adapters and memory that the cases of one process share."""

    work: Work
    geometry: str
    repeats: int
    stack: ExitStack
    rng: random.Random = field(default_factory=lambda: random.Random(0))
    started: dict[str, RunningEngine] = field(default_factory=dict)
    folder: Path = field(init=False)
    base: Path = field(init=False)
    adapters: RandomAdapters = field(init=False)
    prompts: list[list[int]] = field(init=False)

    def __post_init__(self) -> None:
        folder = tempfile.TemporaryDirectory(prefix="lorafleet-bench-", ignore_cleanup_errors=True)
        self.folder = Path(self.stack.enter_context(folder))
        self.base = write_base(self.folder / "base", self.geometry)
        self.adapters = RandomAdapters(self.base)
        self.prompts = [self.tokens(self.work.prompt) for _ in range(self.work.requests)]

    def tokens(self, count: int) -> list[int]:
        """Random ones of the base's vocabulary."""
        return [self.rng.randrange(10, GEOMETRIES[self.geometry]["vocab_size"] - 10) for _ in range(count)]

    def engine(self, kind: Kind) -> RunningEngine:
        """`lora`, and the same but for one thing: without adapters, with a base in fp8, or guessing. Started once."""
        if kind not in self.started:
            work = self.work
            num_tokens = work.requests * (work.prompt + work.output + 32) + 2 * 2048
            guesses = SpeculationConfig() if kind == "guessing" else None
            config = self.config(prefix_cache=False, kv_bytes=kv_bytes(self.geometry, num_tokens), speculation=guesses)
            # Room for more adapters than one batch has, and not for all that ever come.
            pool_bytes = int(PAGE_ROUND * (work.adapters + 32) * self.adapters.num_bytes(16))
            pool = PoolConfig(max_rank=RANK, max_slots=0 if kind == "no_lora" else 256, pool_bytes=pool_bytes)
            quantization: Literal["none", "fp8"] = "fp8" if kind == "fp8" else "none"
            context = running_engine(self.base, self.adapters, config, pool, quantization=quantization)
            self.started[kind] = self.stack.enter_context(context)
        return self.started[kind]

    def config(self, **settings: object) -> EngineConfig:
        """Of an engine."""
        sizes = {"max_batch_tokens": self.work.max_batch_tokens, "max_running": self.work.max_running}
        return EngineConfig.model_validate({**sizes, **settings})


Named = Iterator[tuple[str, Figures]]
"""Lines to keep: which case, and its figures."""
Case = Callable[[Lab], Named]


def start(lab: Lab) -> Named:
    """Seconds from nothing to ready, by stage, with made-up weights."""
    yield "start", lab.engine("lora").parts.startup_s


def base(lab: Lab) -> Named:
    yield from _throughput(lab, "base", [None] * lab.work.requests)


def one(lab: Lab) -> Named:
    yield from _throughput(lab, "one", ["a0-r16"] * lab.work.requests)


def lora64(lab: Lab) -> Named:
    versions = [f"a{i % lab.work.adapters}-r16" for i in range(lab.work.requests)]
    yield from _throughput(lab, "lora64", versions)


def stream_base(lab: Lab) -> Named:
    yield from _decode(lab, "stream_base", "lora", None, 1)


def stream_one(lab: Lab) -> Named:
    yield from _decode(lab, "stream_one", "lora", "a0-r16", 1)


def fp8_start(lab: Lab) -> Named:
    yield "fp8_start", lab.engine("fp8").parts.startup_s


def fp8_base(lab: Lab) -> Named:
    yield from _throughput(lab, "fp8_base", [None] * lab.work.requests, "fp8")


def fp8_lora64(lab: Lab) -> Named:
    versions = [f"a{i % lab.work.adapters}-r16" for i in range(lab.work.requests)]
    yield from _throughput(lab, "fp8_lora64", versions, "fp8")


def fp8_decode_base(lab: Lab) -> Named:
    yield from _decode(lab, "fp8_decode_base", "fp8", None)


def fp8_decode_lora64(lab: Lab) -> Named:
    yield from _decode(lab, "fp8_decode_lora64", "fp8", "a{}-r16")


def fp8_stream_base(lab: Lab) -> Named:
    yield from _decode(lab, "fp8_stream_base", "fp8", None, 1)


def small_base(lab: Lab) -> Named:
    """A base of 0.5B, whose layers take the GPU so little time that launching them takes the host longer."""
    yield from _throughput(lab, "small_base", [None] * lab.work.requests)


def small_lora64(lab: Lab) -> Named:
    versions = [f"a{i % lab.work.adapters}-r16" for i in range(lab.work.requests)]
    yield from _throughput(lab, "small_lora64", versions)


def _throughput(lab: Lab, case: str, versions: list[str | None] | list[str], kind: Kind = "lora") -> Named:
    engine, work = lab.engine(kind), lab.work
    engine.run(lab.prompts, versions, min(16, work.output))
    for _ in range(lab.repeats):
        yield case, engine.run(lab.prompts, versions, work.output)


def decode_base(lab: Lab) -> Named:
    yield from _decode(lab, "decode_base", "lora", None)


def decode_lora64(lab: Lab) -> Named:
    yield from _decode(lab, "decode_lora64", "lora", "a{}-r16")


def prefill_base(lab: Lab) -> Named:
    """Steps of prompts alone: with `--profile`, where the time of a full one goes."""
    yield "prefill_base", lab.engine("lora").run(lab.prompts, [None] * lab.work.requests, 1)


def prefill_lora64(lab: Lab) -> Named:
    versions = [f"a{i % lab.work.adapters}-r16" for i in range(lab.work.requests)]
    engine = lab.engine("lora")
    engine.run([prompt[:16] for prompt in lab.prompts], versions, 1)
    yield "prefill_lora64", engine.run(lab.prompts, versions, 1)


def decode_no_lora(lab: Lab) -> Named:
    yield from _decode(lab, "decode_no_lora", "no_lora", None)


def _decode(lab: Lab, case: str, kind: Kind, name: str | None, most: int = 64) -> Named:
    """Steps of 64 short sequences, or of `most`."""
    engine, count = lab.engine(kind), min(most, lab.work.adapters)
    prompts = [prompt[:16] for prompt in (lab.prompts * count)[:count]]
    versions = [name.format(i) if name else None for i in range(count)]
    engine.run(prompts, versions, min(16, lab.work.decode_output))
    for _ in range(lab.repeats):
        yield case, engine.run(prompts, versions, lab.work.decode_output)


def no_lora(lab: Lab) -> Named:
    """The base on an engine that serves no adapters, and on one that does, in turn."""
    nobody = [None] * lab.work.requests
    engines = {"base_no_lora": lab.engine("no_lora"), "base_enabled": lab.engine("lora")}
    for engine in engines.values():
        engine.run(lab.prompts, nobody, min(16, lab.work.output))
    for _ in range(lab.repeats + 1):
        for case, engine in engines.items():
            yield case, engine.run(lab.prompts, nobody, lab.work.output)


def cold(lab: Lab) -> Named:
    """First token of an adapter of rank 16 that is in host memory only, against one that is resident."""
    engine, prompt = lab.engine("lora"), lab.prompts[0][: lab.work.short_prompt]
    times: dict[str, list[float]] = {"warm": [], "cold": []}
    for i in range(lab.work.cold_tries):
        engine.run([prompt], ["warm-r16"], 4)
        for kind, version in (("warm", "warm-r16"), ("cold", f"cold{i}-r16")):
            times[kind].append(engine.run([prompt], [version], 2)["first_token_ms_p50"])
    # The first two find nothing ready: no packing is remembered.
    warm, cold = (np.array(times[kind][2:]) for kind in ("warm", "cold"))
    yield (
        "cold",
        {
            "warm_ms_p50": float(np.median(warm)),
            "cold_ms_p50": float(np.median(cold)),
            "cold_ms_max": float(cold.max()),
            "over_warm_ms_p50": float(np.median(cold) - np.median(warm)),
        },
    )


def hot(lab: Lab, per_second: float = 10.0) -> Named:
    """Inter-token times of hot streams, alone and while cold adapters come in at `per_second`, in turn."""
    engine, work = lab.engine("lora"), lab.work
    prompts = [prompt[: work.short_prompt] for prompt in (lab.prompts * work.hot_streams)[: work.hot_streams]]
    versions = [f"a{i}-r16" for i in range(work.hot_streams)]
    engine.run(prompts, versions, min(16, work.hot_output))
    for turn in range(lab.repeats):
        alone = engine.run(prompts, versions, work.hot_output)
        is_over = threading.Event()

        def bring_cold(turn: int = turn, is_over: threading.Event = is_over) -> None:
            number = 0
            while not is_over.wait(1 / per_second):
                version = f"stream{turn}.{number}-r16"
                engine.submit(version, (15, 16, 17), version, 1)
                number += 1

        bringer = threading.Thread(target=bring_cold)
        bringer.start()
        try:
            beside = engine.run(prompts, versions, work.hot_output)
        finally:
            is_over.set()
            bringer.join()
        figures = {f"{kind}_{name}": run[name] for kind, run in (("alone", alone), ("beside", beside)) for name in GAPS}
        yield "hot", {**figures, "loads": beside["loads"], "loads_per_s": beside["loads_per_s"]}


GAPS = ("gap_ms_p50", "gap_ms_p99")


def zipf_resident(lab: Lab) -> Named:
    yield from _many(lab, "zipf_resident")


def zipf_pool64(lab: Lab) -> Named:
    yield from _many(lab, "zipf_pool64")


def _many(lab: Lab, case: str) -> Named:
    """512 adapters of rank 8 to 64, Zipf 1.0, so many requests a second: all resident, or in a pool that holds 64."""
    work, rng = lab.work, np.random.default_rng(0)
    versions = [f"z{i}-r{rank}" for i, rank in enumerate(rng.choice(RANKS, size=work.many_adapters))]
    shares = 1.0 / np.arange(1, len(versions) + 1)
    most = max(count for _, count in work.many_runs)
    chosen = [versions[i] for i in rng.choice(len(versions), size=most, p=shares / shares.sum())]
    prompts = [lab.prompts[i % len(lab.prompts)] for i in range(len(chosen))]
    used = sorted(set(chosen))
    sizes = {version: lab.adapters.num_bytes(int(version.rpartition("-r")[2])) for version in versions}
    pool_bytes = sum(sizes[version] for version in used)
    if case == "zipf_pool64":
        pool_bytes = work.adapters * sum(sizes.values()) / len(sizes)
    num_tokens = work.max_running * (work.prompt + work.many_output + 32) + 2 * 2048
    engine_config = lab.config(prefix_cache=False, kv_bytes=kv_bytes(lab.geometry, num_tokens))
    pool = PoolConfig(max_rank=64, max_slots=work.many_adapters, pool_bytes=int(PAGE_ROUND * pool_bytes))
    with running_engine(lab.base, lab.adapters, engine_config, pool) as engine:
        engine.run([prompts[0][:32]] * len(used), used, 1)
        for rate, count in work.many_runs:
            figures = engine.run(prompts[:count], chosen[:count], work.many_output, per_second=rate)
            yield case, {**figures, "adapters": len(set(chosen[:count])), "per_second": rate}


def gsm8k(lab: Lab) -> Named:
    """Requests that share most of their prompt; one adapter, with embeddings and head; of Llama-2-7B's geometry."""
    work = lab.work
    adapters = RandomAdapters(lab.base, embeddings=True)
    config = lab.config(prefix_cache=True, max_running=min(work.answers, 200))
    pool = PoolConfig(max_rank=64, max_slots=8, pool_bytes=int(8 * PAGE_ROUND * adapters.num_bytes(16)))
    shared = lab.tokens(work.shared)
    with running_engine(lab.base, adapters, config, pool) as engine:
        for turn in range(-1, lab.repeats):
            prompts = [shared + lab.tokens(work.own) for _ in range(work.answers)]
            figures = engine.run(prompts, ["e-r16"] * work.answers, work.answer if turn >= 0 else 4)
            if turn >= 0:
                yield "gsm8k", figures


def long(lab: Lab) -> Named:
    """Requests of long prompts, for the base and for adapters in turn."""
    work = lab.work
    num_tokens = max(count * (prompt + work.output + 32) for count, prompt in work.long)
    max_model_len = max(prompt for _, prompt in work.long) + work.output
    base = write_base(lab.folder / "long", lab.geometry, max_model_len)
    config = lab.config(prefix_cache=False, kv_bytes=kv_bytes(lab.geometry, num_tokens + 2 * max_model_len))
    adapters = RandomAdapters(base)
    most = max(count for count, _ in work.long)
    pool = PoolConfig(max_rank=RANK, max_slots=64, pool_bytes=int(PAGE_ROUND * most * adapters.num_bytes(RANK)))
    with running_engine(base, adapters, config, pool, max_model_len=max_model_len) as engine:
        for count, length in work.long:
            prompts = [lab.tokens(length) for _ in range(count)]
            names: dict[str, list[str | None]] = {"base": [None] * count, "lora": [f"a{i}-r16" for i in range(count)]}
            for versions in names.values():
                engine.run(prompts[:1], versions[:1], 2)
                engine.run([prompt[:32] for prompt in prompts], versions, 2)
            for _ in range(lab.repeats):
                for name, versions in names.items():
                    first_s = engine.run(prompts, versions, 1)["seconds"]
                    figures = engine.run(prompts, versions, work.output)
                    own = {"prompt": length, "prompt_tokens_per_s": count * length / first_s}
                    yield f"long_{name}", {**figures, **own}


ENDLESS = {
    "type": "array",
    "minItems": 500,
    "items": {
        "type": "object",
        "properties": {
            "name": {"type": "string", "pattern": "^[A-Z][a-z]{2,12}$"},
            "age": {"type": "integer", "minimum": 0, "maximum": 120},
            "kind": {"enum": ["cat", "dog", "bird"]},
        },
        "required": ["name", "age", "kind"],
        "additionalProperties": False,
    },
}
"""A schema whose documents are longer than any answer here."""


def structured(lab: Lab) -> Named:
    """64 streams, of which a quarter keeps to a JSON schema, against 64 that are free, in turn."""
    work, count = lab.work, min(64, lab.work.adapters)
    write_tokenizer(lab.base, lab.geometry)
    engine = lab.engine("lora")
    prompts = [prompt[: work.short_prompt] for prompt in (lab.prompts * count)[:count]]
    versions = [f"a{i}-r16" for i in range(count)]
    outputs = [StructuredOutputs(json_schema=ENDLESS)] * max(1, count // 4)
    for asked in ((), outputs):
        engine.run(prompts, versions, min(16, work.decode_output), outputs=asked)
    for _ in range(lab.repeats + 1):
        free = engine.run(prompts, versions, work.decode_output)
        mixed = engine.run(prompts, versions, work.decode_output, outputs=outputs)
        yield (
            "structured",
            {
                "free_tokens_per_s": free["output_tokens_per_s"],
                "mixed_tokens_per_s": mixed["output_tokens_per_s"],
                "of_free": mixed["output_tokens_per_s"] / free["output_tokens_per_s"],
                "gap_ms_p50": free["gap_ms_p50"],
                "free_gap_ms_p50": mixed["free_gap_ms_p50"],
                "mixed_steps": mixed["steps"],
            },
        )


def speculation(lab: Lab) -> Named:
    """Engines that guess and do not, in turn. Text repeats itself where few tokens may come, and else it is random."""
    work, engines = lab.work, [lab.engine("lora"), lab.engine("guessing")]
    texts = {
        "one_token": SamplingParams(temperature=0.0, logit_bias={7: 100.0}),
        "four_tokens": SamplingParams(temperature=0.0, logit_bias=dict.fromkeys(range(7, 11), 100.0)),
        "random": SamplingParams(temperature=2.0),
    }
    for (text, sampling), count in product(texts.items(), (1, 8, 64)):
        prompts = (lab.prompts * count)[:count]
        versions = [f"a{i % work.adapters}-r16" for i in range(count)]
        for engine in engines:
            engine.run(prompts, versions, min(16, work.decode_output), sampling=sampling)
        for _ in range(lab.repeats):
            runs = [engine.run(prompts, versions, work.decode_output, sampling=sampling) for engine in engines]
            plain, guessing = runs
            yield (
                f"speculation_{text}_{count}",
                {
                    "plain_tokens_per_s": plain["output_tokens_per_s"],
                    "tokens_per_s": guessing["output_tokens_per_s"],
                    "of_plain": guessing["output_tokens_per_s"] / plain["output_tokens_per_s"],
                    "plain_steps": plain["steps"],
                    "steps": guessing["steps"],
                },
            )


def start_weights(lab: Lab) -> Named:
    """Seconds from nothing to ready, by stage: weights from the page cache, nothing compiled or rehearsed before."""
    write_weights(lab.base)
    os.environ["TRITON_CACHE_DIR"] = str(lab.folder / "triton")
    os.environ["HOME"] = str(lab.folder)  # rehearsals are kept there
    pool = PoolConfig(max_rank=64, max_slots=256)
    with running_engine(lab.base, lab.adapters, lab.config(), pool, load="weights") as engine:
        yield "start_weights", engine.parts.startup_s


PROCESSES: dict[str, tuple[str, tuple[Case, ...]]] = {
    "main": (
        "llama-8b",
        (
            start,
            base,
            lora64,
            one,
            decode_base,
            decode_lora64,
            stream_base,
            stream_one,
            prefill_base,
            prefill_lora64,
            cold,
            hot,
            no_lora,
            decode_no_lora,
        ),
    ),
    "fp8": ("llama-8b", (fp8_start, fp8_base, fp8_lora64, fp8_decode_base, fp8_decode_lora64, fp8_stream_base)),
    "small": ("qwen-0.5b", (small_base, small_lora64)),
    "gsm8k": ("llama-7b", (gsm8k,)),
    "long": ("llama-8b", (long,)),
    "zipf_pool64": ("llama-8b", (zipf_pool64,)),
    "zipf_resident": ("llama-8b", (zipf_resident,)),
    "structured": ("llama-8b", (structured,)),
    "speculation": ("llama-8b", (speculation,)),
    "start_weights": ("llama-8b", (start_weights,)),
}
"""Cases that can share a process, and the geometry of their base."""
