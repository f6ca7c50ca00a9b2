"""Logprobs of the engine against transformers + PEFT, of prompts and of answers, in one mixed batch.

    python benchmarks/fidelity.py [--device cpu] [--dtype float32] [--base tiny]

Three comparisons: `basic`, prompts of 5 to 11 tokens; `full`, these and longer ones; `chunked`, the same with logits of
4 tokens at a time. Every prompt is one for the base and for each adapter; PEFT makes the adapters first. The oracle
computes in fp32 from the very weights that are served, so what differs is the engine's own rounding. Besides, each
request by itself and, on a GPU, all without CUDA graphs must say what `full` says. In half precision transformers' own
differences in that dtype stand beside. A line of JSON each; the exit status says whether the bars are kept.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import os
import platform
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import bars
import random_models
import torch
import transformers
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft_adapters import write_peft_adapters
from torch import Tensor
from transformers import AutoModelForCausalLM

from lorafleet.adapter_store.manifest import AdapterWeights
from lorafleet.adapter_store.peft_format import AdapterReader
from lorafleet.workers.assembly import assemble
from lorafleet.workers.config import EngineConfig, ModelConfig, PoolConfig
from lorafleet.workers.engine import Delivery
from lorafleet.workers.model.geometry import TORCH_DTYPES, read_geometry
from lorafleet.workers.request import EngineRequest, GenerateDelta, SamplingParams, TokenLogprobs

HERE = Path(__file__).parent
MAX_MODEL_LEN = 2048
GEOMETRIES: dict[str, dict[str, Any]] = {
    "tiny": random_models.GEOMETRIES["tiny"] | {"vocab_size": 1024},
    "llama-7b-4-layers": random_models.GEOMETRIES["llama-7b"] | {"num_hidden_layers": 4},
}
ALL_SEVEN = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ADAPTERS: dict[str, dict[str, Any]] = {
    "rank8_qv": {"r": 8, "target_modules": ["q_proj", "v_proj"]},
    "rank16": {"r": 16, "target_modules": ALL_SEVEN},
    "embed_tokens": {"r": 8, "target_modules": ["embed_tokens"]},
    "lm_head": {"r": 8, "target_modules": ["lm_head"]},
    "rank64_rslora": {"r": 64, "use_rslora": True, "target_modules": "all-linear"},
    "everything": {"r": 16, "target_modules": [*ALL_SEVEN, "embed_tokens", "lm_head"]},
}
SHORT = (5, 6, 7, 8, 9, 10, 11)
LONG = (33, 64, 150, 400, 777, 1500, 2000)
NUM_TOP = 5
"""Alternatives that are compared at each place, beside the token itself."""
CHUNK = 4
BARS = {"float32": 1e-4, "float16": 0.1, "bfloat16": 0.1}
"""Largest difference of any logprob."""


def write_base(folder: Path, geometry: str, dtype: torch.dtype) -> Path:
    """A Llama of random weights as loud as trained ones: each layer adds to what came, logits spread over units."""
    config = transformers.LlamaConfig(
        **GEOMETRIES[geometry], max_position_embeddings=MAX_MODEL_LEN, rms_norm_eps=1e-5, tie_word_embeddings=False
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.normal_(1.0, 0.1)
            elif "embed_tokens" in name:
                parameter.normal_(0.0, 0.5)
            else:
                gain = 0.7 if name.endswith(("o_proj.weight", "down_proj.weight")) else 1.0
                parameter.normal_(0.0, gain * parameter.shape[1] ** -0.5)
    model.to(dtype).save_pretrained(folder)
    return folder


def make_adapters(base: Path, root: Path, dtype: torch.dtype) -> dict[str, Path]:
    """Let PEFT write the adapters of `ADAPTERS`; their random weights change what is said, and are exact in `dtype`."""

    def fill(module: LoraLayer) -> None:
        for a, b in _factors(module):
            a.normal_(0, a.shape[1] ** -0.5 if module.lora_A else 0.5)
            b.normal_(0, 0.5 / (module.scaling["default"] * a.shape[0] ** 0.5))
            for factor in (a, b):
                factor.copy_(factor.to(dtype))

    return write_peft_adapters(base, root, ADAPTERS, fill, save_embedding_layers=False)


def _factors(module: LoraLayer) -> Iterable[tuple[Tensor, Tensor]]:
    for name in module.lora_A:
        yield module.lora_A[name].weight, module.lora_B[name].weight
    for name in module.lora_embedding_A:
        yield module.lora_embedding_A[name], module.lora_embedding_B[name]


@dataclass(frozen=True, slots=True)
class Question:
    """One prompt for the base (None) or an adapter."""

    adapter: str | None
    prompt: tuple[int, ...]


def make_questions(lengths: Sequence[int], vocab_size: int, seed: int) -> list[Question]:
    """A prompt of each length for each adapter and the base."""
    generator = torch.Generator().manual_seed(seed)
    return [
        Question(adapter, tuple(torch.randint(3, vocab_size, (length,), generator=generator).tolist()))
        for length in lengths
        for adapter in (None, *ADAPTERS)
    ]


@dataclass(slots=True)
class Answer:
    """Result of a question."""

    tokens: tuple[int, ...] = ()
    entries: tuple[TokenLogprobs, ...] = ()
    """Of the prompt's tokens from the second on, then of `tokens`."""

    @property
    def ids(self) -> Tensor:
        """(places, 1 + NUM_TOP): each token and its alternatives."""
        return torch.tensor([[entry.token_id, *(token for token, _ in entry.top)] for entry in self.entries])

    @property
    def logprobs(self) -> Tensor:
        """(places, 1 + NUM_TOP) float32: theirs."""
        return torch.tensor([[entry.logprob, *(value for _, value in entry.top)] for entry in self.entries])


class Ours:
    """An engine in this process."""

    def __init__(self, base: Path, folders: dict[str, Path], device: str, dtype: Any, **settings: Any) -> None:
        """`settings`: fields of EngineConfig, and `captures`."""
        model = ModelConfig(id="base", source=str(base), dtype=dtype)
        reader = AdapterReader(read_geometry(model, device), max_rank=64)
        weights: dict[str | None, AdapterWeights] = {name: reader.read(folder) for name, folder in folders.items()}
        self._versions = {name: one.manifest.version for name, one in weights.items()}
        self._weights = {one.manifest.version: one for one in weights.values()}
        self._answers: dict[str, Answer] = {}
        self._open: set[str] = set()
        self._errors: list[str] = []
        self._is_done = threading.Event()
        captures = settings.pop("captures", True)
        self._parts = assemble(
            worker_id="fidelity",
            model=model,
            engine=EngineConfig(device=device, prefix_cache=False, **settings),
            pool=PoolConfig(max_rank=64, max_slots=16),
            fetch=self._weights.__getitem__,
            deliver=self._take,
            captures=captures,
        )
        self._parts.engine.start()

    def ask(self, questions: Sequence[Question], num_tokens: int) -> list[Answer]:
        """All questions in one batch."""
        sampling = SamplingParams(
            max_tokens=num_tokens, temperature=0.0, ignore_eos=True, logprobs=NUM_TOP, prompt_logprobs=True
        )
        requests = [
            EngineRequest(f"{number}-{time.monotonic_ns()}", self._versions.get(one.adapter), one.prompt, sampling)
            for number, one in enumerate(questions)
        ]
        self._answers = {request.request_id: Answer() for request in requests}
        self._open = set(self._answers)
        self._is_done.clear()
        engine = self._parts.engine
        engine.call(lambda: [engine.submit(request) for request in requests])
        if not self._is_done.wait(600) or self._errors:
            raise RuntimeError(f"{len(self._open)} requests never ended; {self._errors[:3]}")
        return list(self._answers.values())

    def _take(self, deliveries: list[Delivery]) -> None:
        for request_id, item in deliveries:
            if isinstance(item, GenerateDelta):
                answer = self._answers[request_id]
                answer.tokens += item.token_ids
                answer.entries += (item.prompt_logprobs or ())[1:] + (item.logprobs or ())
            else:
                self._errors.append(repr(item))
            if not isinstance(item, GenerateDelta) or item.finish_reason is not None:
                self._open.discard(request_id)
        if not self._open:
            self._is_done.set()

    @property
    def layers(self) -> str:
        """The share of the base that fused layers compute, in a word."""
        return self._parts.runner.layers

    def close(self) -> None:
        """End the engine and give its memory back."""
        self._parts.close()
        del self._parts
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


class Oracle:
    """Transformers with PEFT, one request at a time."""

    def __init__(self, base: Path, folders: dict[str, Path], device: str, dtype: torch.dtype = torch.float32) -> None:
        model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype).to(device).eval()
        (first, folder), *others = folders.items()
        self._model = PeftModel.from_pretrained(model, folder, adapter_name=first)
        for name, folder in others:
            self._model.load_adapter(folder, adapter_name=name)
        self._model.to(device).eval()

    @torch.inference_mode()
    def logprobs(self, question: Question, answer: Answer) -> Tensor:
        """(tokens - 1, vocab): the distribution before each token of prompt and answer but the first."""
        ids = torch.tensor([question.prompt + answer.tokens[:-1]], device=self._model.device)
        if question.adapter is None:
            with self._model.disable_adapter():
                logits = self._model(input_ids=ids, use_cache=False).logits[0]
        else:
            self._model.set_adapter(question.adapter)
            logits = self._model(input_ids=ids, use_cache=False).logits[0]
        return logits.float().log_softmax(-1)


@dataclass(slots=True)
class Report:
    """One comparison: the differences of each request, and which answers the oracle would have given."""

    prefill: list[Tensor] = field(default_factory=list)
    decode: list[Tensor] = field(default_factory=list)
    num_equal: int = 0

    def note(self, question: Question, answer: Answer, given: Tensor, expected: Tensor) -> None:
        """`given`, (places, 1 + NUM_TOP) of the answer's `ids`, against distributions over the answer's tokens."""
        num_prompt = len(question.prompt) - 1
        differences = (given - _at(expected, answer.ids)).abs()
        self.prefill.append(differences[:num_prompt])
        self.decode.append(differences[num_prompt:])
        # Greedy decoding would have gone the same way at every step, so to the same end.
        self.num_equal += expected[num_prompt:].argmax(-1).tolist() == list(answer.tokens)

    @property
    def largest(self) -> float:
        return max(float(each.max()) for each in (*self.prefill, *self.decode))

    def figures(self) -> dict[str, Any]:
        """Summary of each phase, and the number of answers that are the oracle's."""
        return {
            **{phase: _summary(getattr(self, phase)) for phase in ("prefill", "decode")},
            "strings_equal": self.num_equal,
            "strings": len(self.decode),
        }


def _at(logprobs: Tensor, ids: Tensor) -> Tensor:
    return logprobs.gather(1, ids.to(logprobs.device)).cpu()


def _summary(differences: list[Tensor]) -> dict[str, float]:
    largest = torch.stack([each.max() for each in differences])
    means = torch.stack([each.mean() for each in differences])
    figures = {"max_of_max": largest.max(), "mean_of_max": largest.mean(), "mean_of_mean": means.mean()}
    return {name: float(f"{float(value):.3g}") for name, value in figures.items()}


def compare(
    oracle: Oracle, questions: Sequence[Question], answers: Sequence[Answer], other: Oracle | None = None
) -> Report:
    """Each answer against the oracle, or what `other` says of the answer's tokens."""
    report = Report()
    for question, answer in zip(questions, answers, strict=True):
        given = answer.logprobs if other is None else _at(other.logprobs(question, answer), answer.ids)
        report.note(question, answer, given, oracle.logprobs(question, answer))
    return report


def num_parted(oracle: Oracle, questions: Sequence[Question], ours: Sequence[Answer], others: Sequence[Answer]) -> int:
    """Count the answers that differ without a tie: the oracle's logprobs of the two tokens are a bar apart."""
    count = 0
    for question, one, other in zip(questions, ours, others, strict=True):
        place = next(
            (i for i, pair in enumerate(zip(one.tokens, other.tokens, strict=True)) if len(set(pair)) > 1), None
        )
        if place is not None:
            here = oracle.logprobs(question, one)[len(question.prompt) - 1 + place]
            count += float((here[one.tokens[place]] - here[other.tokens[place]]).abs()) > max(BARS.values())
    return count


def show(reports: dict[str, dict[str, Any]]) -> None:
    """The reports as a table."""
    columns = ("max_of_max", "mean_of_max", "mean_of_mean")
    heads = [column.replace("_", " ") for column in columns]
    print(f"\n{'':20} {'':8} " + " ".join(f"{head:>13}" for head in heads) + f" {'strings equal':>14}")
    for name, figures in reports.items():
        for phase in ("prefill", "decode"):
            numbers = " ".join(f"{figures[phase][column]:13.2e}" for column in columns)
            equal = f"{figures['strings_equal']}/{figures['strings']}" if phase == "decode" else ""
            print(f"{name if phase == 'prefill' else '':20} {phase:8} {numbers} {equal:>14}")


def _machine(device: str) -> dict[str, Any]:
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else bars.cpu_name(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "transformers", "peft")},
    }


def run(
    options: argparse.Namespace, base: Path, folders: dict[str, Path]
) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """Every comparison's figures, and what was missed."""
    vocab_size = json.loads((base / "config.json").read_text())["vocab_size"]
    short = make_questions(SHORT, vocab_size, 0)
    full = [*short, *make_questions([length for length in LONG if length <= options.longest], vocab_size, 1)]
    oracle = Oracle(base, folders, options.device)
    answers: dict[str, list[Answer]] = {}

    def engine(**settings: Any) -> Ours:
        settings = {"kv_bytes": options.kv_bytes, "max_running": len(full), **settings}
        return Ours(base, folders, options.device, options.dtype, **settings)

    ours = engine()
    answers["basic"] = ours.ask(short, options.tokens)
    answers["full"] = ours.ask(full, options.tokens)
    answers["full, one by one"] = [answer for one in full for answer in ours.ask([one], options.tokens)]
    ours.close()
    ours = engine(logits_chunk_tokens=CHUNK)
    answers["chunked"] = ours.ask(full, options.tokens)
    ours.close()
    if options.device == "cuda":
        ours = engine(captures=False)
        answers["full, no graphs"] = ours.ask(full, options.tokens)
        ours.close()

    bar, reports, missed = BARS[options.dtype], {}, []
    for name, given in answers.items():
        questions = short if name == "basic" else full
        report = compare(oracle, questions, given)
        reports[name] = report.figures()
        if not report.largest < bar:
            missed.append(f"{name}: a logprob is {report.largest:.2e} off, the bar is {bar:g}")
        if options.dtype == "float32" and report.num_equal < len(questions):
            missed.append(f"{name}: {len(questions) - report.num_equal} answers are not the oracle's")
        if name not in ("basic", "full"):
            reports[name]["as_full"] = sum(a.tokens == b.tokens for a, b in zip(given, answers["full"], strict=True))
            parted = num_parted(oracle, full, answers["full"], given)
            if parted:
                missed.append(f"{name}: {parted} answers differ from those of `full`, and not at a tie")
    if options.dtype != "float32":
        rounding = Oracle(base, folders, options.device, TORCH_DTYPES[options.dtype])
        reports["transformers' own"] = compare(oracle, full, answers["full"], rounding).figures()
    return reports, missed


def main(arguments: Sequence[str] | None = None) -> int:
    """Compare, print, record; the exit status says whether the bars are kept."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=tuple(BARS), default="float32")
    parser.add_argument(
        "--base", default="tiny", help=f"{' or '.join(GEOMETRIES)}, or the folder of a Llama-like model"
    )
    parser.add_argument("--longest", type=int, default=max(LONG), help="prompt, in tokens")
    parser.add_argument("--tokens", type=int, default=32, help="that each request makes")
    parser.add_argument("--kv-bytes", type=int, default=1 << 30)
    parser.add_argument("--threads", type=int, default=1, help="of torch on a CPU")
    parser.add_argument("--commit", default="", help="what is measured, where git cannot say")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "fidelity.jsonl")
    options = parser.parse_args(arguments)
    warnings.simplefilter("ignore")  # PEFT's advice
    logging.basicConfig(level=logging.WARNING)
    torch.set_num_threads(options.threads)

    started_s = time.perf_counter()
    dtype = TORCH_DTYPES[options.dtype]
    with tempfile.TemporaryDirectory() as root:
        is_made = options.base in GEOMETRIES
        base = write_base(Path(root) / "base", options.base, dtype) if is_made else Path(options.base)
        reports, missed = run(options, base, make_adapters(base, Path(root), dtype))

    about = {
        "base": options.base if is_made else Path(options.base).name,
        "dtype": options.dtype,
        "tokens": options.tokens,
        "longest_prompt": options.longest,
        "adapters": len(ADAPTERS),
        "seconds": round(time.perf_counter() - started_s, 1),
        "commit": options.commit or bars.commit(),
        **_machine(options.device),
    }
    for name, figures in reports.items():
        bars.append(options.out, {"comparison": name, **figures, "missed": bool(missed), **about})
    show(reports)
    for line in missed:
        print(f"missed: {line}")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
