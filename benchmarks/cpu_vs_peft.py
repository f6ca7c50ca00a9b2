"""The engine on a CPU against PEFT, in one process: 32 requests over 8 adapters.

    python benchmarks/cpu_vs_peft.py [--base examples/demo/base] [--rounds 5] [--tokens 64]

PEFT serves the same requests in two ways: one after another, switching adapters, and as one batch in which every row
names its adapter (`adapter_names`). All decode greedily in fp32, and must say the same: the run fails otherwise. Each
round times all three, one after another; medians count. Seconds of CPU are told beside: they say the same where other
programs want the machine too. A line of JSON each, and a picture of the newest run.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import bars
import matplotlib as mpl
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft_adapters import write_peft_adapters
from transformers import AutoModelForCausalLM

from lorafleet.adapter_store.manifest import AdapterWeights
from lorafleet.adapter_store.peft_format import AdapterReader
from lorafleet.workers.config import EngineConfig, ModelConfig, PoolConfig
from lorafleet.workers.model.geometry import read_geometry
from lorafleet.workers.request import EngineRequest, SamplingParams
from lorafleet.workers.worker import Worker

HERE = Path(__file__).parent
NUM_REQUESTS = 32
ALL_SEVEN = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ADAPTERS: dict[str, dict[str, Any]] = {
    "rank4_qv": {"r": 4, "target_modules": ["q_proj", "v_proj"]},
    "rank8_attention": {"r": 8, "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]},
    "rank8_mlp": {"r": 8, "target_modules": ["gate_proj", "up_proj", "down_proj"]},
    "rank8": {"r": 8, "target_modules": ALL_SEVEN},
    "rank16": {"r": 16, "target_modules": ALL_SEVEN},
    "rank16_rslora": {"r": 16, "use_rslora": True, "target_modules": ALL_SEVEN},
    "rank_pattern": {"r": 8, "rank_pattern": {"down_proj": 16, "q_proj": 4}, "target_modules": ALL_SEVEN},
    "rank32": {"r": 32, "target_modules": ALL_SEVEN},
}
BARS = {"peft_switching": 8.0, "peft_mixed": 1.5}
"""How many times the tokens per second of each the engine is to reach."""
TITLES = {
    "lorafleet": "lorafleet",
    "peft_mixed": "PEFT, one batch (adapter_names)",
    "peft_switching": "PEFT, switching request by request",
}

Answers = list[tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class Work:
    """The work that each contestant does."""

    prompts: Sequence[tuple[int, ...]]
    adapters: Sequence[str]
    """Name of each request's adapter."""
    num_tokens: int


def make_adapters(base: Path, root: Path) -> dict[str, Path]:
    """Let PEFT write the adapters of `ADAPTERS`, with random weights that change what is said."""

    def fill(module: LoraLayer) -> None:
        b = module.lora_B["default"].weight
        b.normal_(0, 0.3 / (module.scaling["default"] * b.shape[1] ** 0.5))

    return write_peft_adapters(base, root, ADAPTERS, fill)


def make_work(base: Path, num_tokens: int) -> Work:
    """Prompts of 8 to 39 tokens, adapters in turn."""
    generator = torch.Generator().manual_seed(0)
    vocab_size = json.loads((base / "config.json").read_text())["vocab_size"]
    lengths = [8 + number * 7 % 32 for number in range(NUM_REQUESTS)]
    prompts = [tuple(torch.randint(8, vocab_size, (length,), generator=generator).tolist()) for length in lengths]
    names = list(ADAPTERS)
    return Work(prompts, [names[number % len(names)] for number in range(NUM_REQUESTS)], num_tokens)


class Peft:
    """One PEFT model with all adapters."""

    def __init__(self, base: Path, folders: dict[str, Path]) -> None:
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
        model.generation_config.eos_token_id = None
        (first, folder), *others = folders.items()
        self._model = PeftModel.from_pretrained(model, folder, adapter_name=first)
        for name, folder in others:
            self._model.load_adapter(folder, adapter_name=name)
        self._model.eval()

    @torch.inference_mode()
    def switching(self, work: Work) -> Answers:
        """One request after another."""
        answers = []
        for prompt, adapter in zip(work.prompts, work.adapters, strict=True):
            self._model.set_adapter(adapter)
            answers += self._generate([prompt], work.num_tokens)
        return answers

    @torch.inference_mode()
    def mixed(self, work: Work) -> Answers:
        """All requests in one batch, padded on the left."""
        return self._generate(work.prompts, work.num_tokens, adapter_names=list(work.adapters))

    def _generate(self, prompts: Sequence[tuple[int, ...]], num_tokens: int, **options: Any) -> Answers:
        width = max(map(len, prompts))
        ids = torch.tensor([[0] * (width - len(prompt)) + list(prompt) for prompt in prompts])
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        output = self._model.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=num_tokens, do_sample=False, pad_token_id=0, **options
        )
        return [tuple(row) for row in output[:, width:].tolist()]


class Lorafleet:
    """A worker in this process, and the event loop that reads its streams."""

    def __init__(self, base: Path, folders: dict[str, Path]) -> None:
        model = ModelConfig(id="base", source=str(base), dtype="float32")
        reader = AdapterReader(read_geometry(model, "cpu"), max_rank=64)
        weights = [reader.read(folder) for folder in folders.values()]
        self._weights = {one.manifest.version: one for one in weights}
        self._versions = dict(zip(folders, self._weights, strict=True))
        self._loop = asyncio.new_event_loop()
        self._worker = Worker(
            worker_id="benchmark",
            model=model,
            # Without a prefix cache, which would spare a repeated prompt its work.
            engine=EngineConfig(device="cpu", prefix_cache=False),
            pool=PoolConfig(max_rank=64),
            fetch=self._fetch,
        )

    async def _fetch(self, version: str) -> AdapterWeights:
        return self._weights[version]

    def batched(self, work: Work) -> Answers:
        """All requests at once, each a stream."""
        return self._loop.run_until_complete(self._answer(work))

    async def _answer(self, work: Work) -> Answers:
        sampling = SamplingParams(max_tokens=work.num_tokens, temperature=0.0, ignore_eos=True)

        async def stream(number: int) -> tuple[int, ...]:
            request = EngineRequest(str(number), self._versions[work.adapters[number]], work.prompts[number], sampling)
            return tuple([token async for delta in self._worker.generate(request) for token in delta.token_ids])

        return await asyncio.gather(*(stream(number) for number in range(len(work.prompts))))

    def close(self) -> None:
        self._worker.close()
        self._loop.close()


@dataclass(slots=True)
class Runs:
    """One way's rounds."""

    seconds: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)
    """Of this process."""
    num_same: int = 0
    """Answers that are those of the first way."""

    def rate(self, num_tokens: int) -> float:
        """Tokens per second, of the median round."""
        return num_tokens / statistics.median(self.seconds)


def measure(ways: dict[str, Callable[[Work], Answers]], work: Work, rounds: int) -> dict[str, Runs]:
    """Every way in every round, after a warm-up."""
    short = Work(work.prompts, work.adapters, 4)
    for way in ways.values():
        way(short)
    runs = {name: Runs() for name in ways}
    for number in range(rounds):
        expected: Answers = []
        for name, way in ways.items():
            started_s, started_cpu_s = time.perf_counter(), time.process_time()
            answers = way(work)
            runs[name].seconds.append(time.perf_counter() - started_s)
            runs[name].cpu_seconds.append(time.process_time() - started_cpu_s)
            expected = expected or answers
            runs[name].num_same = sum(mine == theirs for mine, theirs in zip(answers, expected, strict=True))
        print(f"round {number}: " + ", ".join(f"{name} {runs[name].seconds[-1]:.2f} s" for name in ways), flush=True)
    return runs


def draw(path: Path, rates: dict[str, float]) -> None:
    """A bar for each way."""
    mpl.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 2.4), layout="constrained")
    names = list(reversed(rates))
    bars = axes.barh([TITLES[name] for name in names], [rates[name] for name in names], color="#b8c4d6")
    bars[-1].set_color("#2f6fde")
    axes.bar_label(bars, labels=[f"{rates[name]:,.0f}" for name in names], padding=4)
    axes.set_xlabel(f"tokens/s on {os.cpu_count()} CPU cores: {NUM_REQUESTS} requests over {len(ADAPTERS)} adapters")
    axes.margins(x=0.12)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


def _machine() -> dict[str, Any]:
    return {
        "cpu": bars.cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "transformers", "peft")},
    }


def main() -> int:
    """Measure, print, record; the exit status says whether the bars are reached."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, default=HERE.parent / "examples" / "demo" / "base")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=64, help="that each request makes")
    parser.add_argument("--threads", type=int, default=1, help="of torch: one, as Ray gives a replica by default")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "cpu_vs_peft.jsonl")
    options = parser.parse_args()
    warnings.simplefilter("ignore")  # PEFT's advice
    torch.set_num_threads(options.threads)

    work = make_work(options.base, options.tokens)
    with tempfile.TemporaryDirectory() as root:
        folders = make_adapters(options.base, Path(root))
        ours, peft = Lorafleet(options.base, folders), Peft(options.base, folders)
        ways = {"lorafleet": ours.batched, "peft_mixed": peft.mixed, "peft_switching": peft.switching}
        runs = measure(ways, work, options.rounds)
        ours.close()

    num_tokens = NUM_REQUESTS * options.tokens
    rates = {name: run.rate(num_tokens) for name, run in runs.items()}
    about = {"commit": bars.commit(), "base": options.base.parent.name, "tokens": num_tokens, **_machine()}
    for name, run in runs.items():
        figures = {
            "way": name,
            "tokens_per_s": round(rates[name], 1),
            "seconds": [round(value, 3) for value in run.seconds],
            "cpu_seconds": [round(value, 3) for value in run.cpu_seconds],
            "same_answers": run.num_same,
        }
        bars.append(options.out, figures | about)
    draw(options.out.with_suffix(".png"), rates)

    print(f"\n{'':36} {'tokens/s':>9} {'lorafleet is':>13} {'CPU s':>7} {'same answers':>13}")
    for name, run in runs.items():
        cpu_s = statistics.median(run.cpu_seconds)
        ratio = rates["lorafleet"] / rates[name]
        print(f"{TITLES[name]:36} {rates[name]:9.0f} {ratio:12.1f}x {cpu_s:7.1f} {run.num_same:10}/{NUM_REQUESTS}")
    if runs["peft_switching"].num_same != NUM_REQUESTS:
        print("the answers differ from PEFT's, so the times mean nothing")
        return 1
    missed = [name for name, bar in BARS.items() if rates["lorafleet"] < bar * rates[name]]
    for name in missed:
        print(f"missed: {BARS[name]} times {TITLES[name]}")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
